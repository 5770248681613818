"""The audit of training data: scores of examples, and the comparison of a set with trusted examples."""
