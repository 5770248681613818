"""Thresholds of the doubts, with reasons. Calibrated on undefended networks and on networks with masked gradients.

`docs/decisions/0002-doubts.md` describes differences from the first design.
"""

from typing import Final

SAMPLE: Final = 128
"""Largest number of examples for a probe."""
FORWARDS: Final = 300
"""Largest number of forward passes for each example, without `black-box` and the new run of `not-exhausted`."""
BACKWARDS: Final = 150
"""Largest number of backward passes for each example, with the same exceptions."""

ZERO_GRADIENTS: Final = 0.01
"""Share of examples without a gradient of the margin. A ReLU network may have none at one point, but rarely at two."""
POINTS_BY_SCALE: Final = 0.03
"""Share that scaled-down logits break in addition to that of the original logits."""
POINTS_BY_RIVAL: Final = 0.02
"""Difference of shares by which a weaker attack must beat a stronger one."""
P_BY_RIVAL: Final = 0.01
"""Exact McNemar p-value below which the difference is significant."""
NOISE: Final = 0.005
"""Share of the surviving examples that random inputs may break."""
NOISE_DRAWS: Final = 100
"""Random inputs for each example."""
FRESH_ROWS: Final = 32
"""Number of surviving examples that the suite is run on again, those of lowest margin."""
FRESH_BROKEN: Final = 3
"""Number of them that must be broken to raise the doubt."""
WHOLE_BOX: Final = 0.05
"""Largest share of surviving examples, by the lower end of its interval, if every input inside the bounds is
allowed."""
CHANGE: Final = 1e-4
"""Relative change of the logits between two calls. Differences of about 1e-6 are normal for different batch sizes."""
CONSTANT: Final = 1e-6
"""Relative spread of the outputs over all examples below which they are considered constant."""
LOSS_SPREAD: Final = 0.15
"""Share by which the best loss may beat the worst untargeted one. Short and weak trainings reach 0.08; networks
whose logits saturate have 0.31 and more."""
SLOPE_RATIO: Final = (0.5, 2.0)
"""Interval for the median ratio of measured to predicted change."""
