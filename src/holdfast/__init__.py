"""Holdfast: find out how a model breaks, make it harder to break, keep it that way in production."""

__version__ = "0.1.0"
