"""The pool of a rotation: encrypted parameter sets, and the ledger of their use."""
