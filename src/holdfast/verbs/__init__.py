"""Runs of the verbs, which can be resumed: they divide the work, call the lower layers, store the measurements, and
judge the gates.
"""
