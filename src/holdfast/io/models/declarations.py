"""Remedies that several readers of models and data have in common."""

from holdfast.core.remedies import Placeholder, Remedy

LAYOUT = Remedy("layout", Placeholder("LAYOUT", "LAYOUT"), function="open_data", reason="(chw, hwc or asis)")
"""declaration of the axes of stored arrays"""
ARCHITECTURE = Remedy("arch", Placeholder("file.py:factory", "'file.py:factory'"), function="open_model")
"""the network of a file that contains weights only, as a function in the user's code"""
NORMALISED_DATA = Remedy("data_normalised")
"""removal of a declared normalisation of the data"""
OWN_FUNCTION = "write a function that returns scores (n, classes) into scores.py, and give scores.py:make"
"""advice for models that are no classifiers of numbers, which lines of code follow"""
