"""The audit of a model: searches for the trigger of a backdoor, and compares its size with those of clean networks."""
