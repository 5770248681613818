"""The documents of stored runs, and the comparison of what they state with their columns."""
