"""One configuration: the YAML file is the flags is the Python arguments. `grammar` and `settings` need no torch."""
