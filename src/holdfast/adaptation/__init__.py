"""Adaptation of a served model: screening of labels, comparison of a canary with the served model, and the steps of a
run.
"""
