"""Measurement of robustness: runs attacks on the surviving examples, and judges their results with the original model.

A measurement is a sequence of stages. A stage takes examples and the columns of earlier stages, and returns columns.
Its result depends only on these, the plan and the seed, so that a caller may store, resume or parallelise the work.
`measure` (`measure.py`) is a caller that keeps everything in memory.
"""
