"""Metrics, which are functions that compute an estimate with a confidence interval from evidence. The module `names`
lists them and does not import torch.
"""
