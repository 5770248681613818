"""Confidence intervals, statistical tests, and rates of detectors."""
