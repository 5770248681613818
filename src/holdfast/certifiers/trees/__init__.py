"""Certification of tree ensembles: exact worst cases, and proofs from the structure of the trees."""
