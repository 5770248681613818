"""Certification of models of texts: randomised masking, and bounds over the substitutes of words."""
