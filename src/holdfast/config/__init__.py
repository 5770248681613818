"""Settings that are the same in YAML files, in flags and in Python arguments. `grammar` and `settings` do not import
torch.
"""
