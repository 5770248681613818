"""Functions on tensors that attacks and recipes share: losses, gradient ascent, statistics and geometry."""
