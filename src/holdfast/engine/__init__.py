"""The run engine: named steps whose artefacts are stored once, executors of shards, signals and progress.

The engine knows no attack and no recipe. A verb gives it functions that compute the artefacts.
"""
