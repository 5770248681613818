"""Building blocks that several attacks share, as pure functions on tensors."""
