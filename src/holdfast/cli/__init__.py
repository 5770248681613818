"""The command line: one grammar for all verbs. Nothing heavy is imported before a command runs."""

from holdfast.cli.app import main

__all__ = ["main"]
