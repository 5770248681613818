"""What people and machines read of a run: one summary, and every other output made from it."""
