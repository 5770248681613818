"""Audits: whether a model or a data set was manipulated, or reveals what it must not. One folder for each audit."""
