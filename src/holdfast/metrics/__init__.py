"""Metrics: plain functions from evidence to an `Estimate`. `names` is the catalogue and needs no torch."""
