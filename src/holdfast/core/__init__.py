"""Basic types: batch, model, constraints, threat model, random numbers, evidence, hash chain and errors."""
