"""The nouns: batch, model, constraints, threat, draws, evidence, the hash chain, and the errors."""
