"""Metrics: functions from evidence to an `Estimate`. `names` is the catalogue and does not import torch."""
