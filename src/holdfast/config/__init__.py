"""Settings that have the same names in YAML files, on the command line and in Python. The modules `grammar` and
`settings` do not import torch.
"""
