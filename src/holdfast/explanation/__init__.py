"""Explanations of robustness: why one input breaks a model, and where a model is fragile."""
