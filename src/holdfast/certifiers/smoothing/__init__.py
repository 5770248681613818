"""Randomised smoothing: predictions of a classifier under noise, and the radius that they prove."""
