"""Decides whether inputs of networks exist that satisfy constraints: searches for them, and proves that there are none."""
