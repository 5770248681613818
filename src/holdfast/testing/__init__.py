"""What attacks, constraints and models are tested with: laws, the linear oracle, tiny fakes, a pytest plugin.

Nothing is imported here, so that a test run that only loads the plugin does not pay for torch.
"""
