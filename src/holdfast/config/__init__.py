"""One configuration for YAML file, flags and Python arguments. `grammar` and `settings` do not import torch."""
