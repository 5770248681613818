"""Statements about a model beyond single attacks: the geometry of its decision boundary, and answers to queries of
VNN-LIB, which ask whether inputs exist that satisfy constraints.
"""
