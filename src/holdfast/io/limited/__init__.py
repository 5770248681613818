"""Parsers of files that may be untrusted. They run in a separate process with limits of memory and time.

`calling` starts such a process, and `limited_main` is its main program. The other modules are the parsers. A parser
imports torch only if its format requires it.
"""
