"""The audit of membership: whether a model, or a training procedure, reveals which examples it was trained on."""
