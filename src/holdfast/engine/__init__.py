"""The run engine: named steps whose artefacts are stored once, executors of shards, signals and progress.

The engine does not depend on attacks or recipes. A verb passes functions to it that compute the artefacts.
"""
