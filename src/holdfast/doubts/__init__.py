"""Doubts: reasons why the measured robust accuracy may be too high, each with a test.

`names` lists them and does not import torch. `probing` selects probes and examples, and `concluding` computes the state
of each doubt from the results; both are pure functions, and the harness runs the probes. Doubts do not change the
metrics of the suite.
"""
