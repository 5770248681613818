"""Thresholds above which doubts are raised, with reasons. They were calibrated on undefended networks and on networks
with masked gradients.

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

ZERO_GRADIENTS: Final = 0.01
"""fraction of examples without a gradient of the margin above which the doubt is raised; a ReLU network may have no
gradient at one point, but rarely at two"""
POINTS_BY_SCALE: Final = 0.03
"""fraction of examples that the attack on scaled-down logits must break in addition to that on the original logits"""
POINTS_BY_RIVAL: Final = 0.02
"""difference of success rates by which a weaker attack must exceed a stronger one to raise a doubt"""
P_BY_RIVAL: Final = 0.01
"""exact McNemar p-value below which this difference is significant"""
NOISE: Final = 0.005
"""fraction of the surviving examples that random inputs may break without raising the doubt"""
NOISE_DRAWS: Final = 100
"""number of random inputs for each example"""
FRESH_ROWS: Final = 32
"""number of surviving examples on which the suite is run again, those with the lowest margin"""
FRESH_BROKEN: Final = 3
"""number of these examples that must be broken to raise the doubt"""
WHOLE_BOX: Final = 0.05
"""largest fraction of examples that may survive if every input inside the bounds is allowed, by the lower end of its
confidence interval"""
CHANGE: Final = 1e-4
"""relative change of the logits between two calls that raises a doubt; differences of about 1e-6 are normal for
different batch sizes"""
CONSTANT: Final = 1e-6
"""relative spread of the outputs over all examples below which they are considered constant"""
LOSS_SPREAD: Final = 0.15
"""difference between the success rates of the best loss and the worst untargeted one above which the doubt is raised;
networks after short and weak training reach 0.09, and networks whose logits saturate 0.31 and more. A smaller threshold
would find no further model of the gallery: distillation reaches 0.95, resize-and-pad 0.12 (it raises `randomness` and
`whole-box`), and the others at most 0.03, because no loss attacks them"""
SLOPE_RATIO: Final = (0.5, 2.0)
"""interval in which the median ratio of measured to predicted change must be"""
