"""Bounds of the outputs of a network over a region: intervals, CROWN, Lipschitz constants."""
