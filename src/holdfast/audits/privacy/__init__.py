"""Audit of a differentially private training: a lower bound of its epsilon, from one training with canaries."""
