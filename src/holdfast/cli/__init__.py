"""The command line of Holdfast. Large libraries such as torch are imported only by the commands that need them."""

from holdfast.cli.app import main

__all__ = ["main"]
