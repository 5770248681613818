"""The Python functions and the opening of models and data from settings."""
