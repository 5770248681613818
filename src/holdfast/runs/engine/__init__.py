"""The run engine: executes the named steps of a run, stores the artefact of each once, and resumes stopped runs.

The engine does not depend on attacks or recipes. A verb passes functions to it that compute the artefacts.
"""
