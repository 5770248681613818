"""Opens models: files, Python objects, estimators, and architectures."""
