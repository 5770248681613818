"""The command line: one grammar for all verbs. Large libraries are imported only when a command runs."""

from holdfast.cli.app import main

__all__ = ["main"]
