"""The formats of reports: a module for each file suffix, whose function `render` writes a report to an open file."""
