"""Tools for testing attacks, constraints and models: laws, a linear oracle, small test models and a pytest plugin.

The package imports nothing, so that a test run that only loads the plugin does not import torch.
"""
