"""The commands and Python functions, a module or a few for each: they open models and data from settings, and run."""
