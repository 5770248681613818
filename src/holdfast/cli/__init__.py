"""The command line. All commands share one grammar, and large libraries are imported only when a command needs them."""

from holdfast.cli.app import main

__all__ = ["main"]
