"""Metrics, which are functions from evidence to an `Estimate`. `names` is their catalogue and does not import torch."""
