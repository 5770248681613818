"""Monitoring of a model in use: tests that compare a stream of samples with a reference, and estimates of the accuracy.

Each test is a module; `holdfast.core.catalogue` lists them. Tests receive the stream in batches and have a state that
can be pickled.
"""
