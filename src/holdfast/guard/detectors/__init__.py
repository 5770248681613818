"""Detectors of suspicious inputs: stateless ones, which use an input and the outputs of the model, and the stateful
query detector.
"""
