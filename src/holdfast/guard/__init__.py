"""The guard of a model: rules, detectors, their calibration, and states that processes share. It imports no HTTP."""
