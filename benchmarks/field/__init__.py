"""Models of packages as their users meet them: opened, assessed beside an independent attack, and explained.

`python -m benchmarks.field` installs the packages of `requirements.txt` without dependencies into
`benchmarks/cache/field`, and measures the row `field`. Nothing of a package is part of this repository.
"""
