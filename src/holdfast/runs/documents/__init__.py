"""The documents of stored runs: written, read, recomputed and compared."""
