"""Tools for tests of attacks, constraints, recipes and models: properties to check, exact distances for linear models,
small test models, and a pytest plugin.

The package imports nothing, so that a test run that only loads the plugin does not import torch.
"""
