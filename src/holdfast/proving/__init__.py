"""Decides whether inputs of networks exist that satisfy constraints, by searches and by proofs that there are none."""
