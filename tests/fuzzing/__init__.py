"""Damages good files of every format, and opens each in a process with limited memory."""
