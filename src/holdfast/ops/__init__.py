"""Functions on tensors: losses, gradient ascent, statistics and geometry, independent of attack and recipe classes."""
