"""Limits of the probes, and thresholds that several doubts share, with reasons. Each other threshold is in the module
of its doubt. They were calibrated on undefended networks and on networks with masked gradients.

`docs/decisions/0002-doubts.md` describes differences from the first design.
"""

from typing import Final

SAMPLE: Final = 128
"""largest number of examples for a probe"""
FORWARDS: Final = 300
"""largest number of forward passes of all probes for each example, without `black-box` and the new run of
`not-exhausted`"""
BACKWARDS: Final = 150
"""largest number of backward passes of all probes for each example, with the same exceptions"""
SEARCHES: Final = 1000
"""number of queries of the search of `black-box` for each example"""
FRESH_ROWS: Final = 32
"""number of surviving examples on which the suite is run again, those with the lowest margin"""

POINTS_BY_RIVAL: Final = 0.02
"""difference of success rates by which a weaker attack must exceed a stronger one to raise a doubt"""
P_BY_RIVAL: Final = 0.01
"""exact McNemar p-value below which this difference is significant"""
CHANGE: Final = 1e-4
"""relative change of the logits between two calls that raises a doubt; differences of about 1e-6 are normal for
different batch sizes"""
