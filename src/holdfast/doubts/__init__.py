"""Doubts: reasons why the measured robust accuracy may be too high, each with a test.

Each doubt is a module with its thresholds, its probe, its conclusion and its explanation; `holdfast.core.catalogue`
lists them. `probing` selects probes and examples, and `concluding` computes the states from the results; both are pure
functions, and the harness runs the probes. Doubts do not change the metrics of the suite.
"""
