"""The audit of a generator: how well its samples match data, and how many are copies of training examples."""
