"""Parsers of files that may be untrusted or need much memory, in a process with limits."""
