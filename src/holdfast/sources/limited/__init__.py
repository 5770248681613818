"""Parsers that run in a process of their own, under limits of memory and time: a file may come from a stranger.

`calling` starts such a process and `answering` is its main program. The other modules are the parsers. A parser imports
torch only where its format needs it.
"""
