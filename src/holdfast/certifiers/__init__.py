"""Certifiers, which prove that no input of a threat model changes the prediction of a model."""

from holdfast.certifiers.operators import register

__all__ = ["register"]
