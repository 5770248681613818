"""Where doubts begin, each with its reason. Calibrated on honest networks and on masked ones.

`docs/decisions/0002-doubts.md` says where they differ from the first design.
"""

from typing import Final

SAMPLE: Final = 128
"""Examples that a probe is run on, at most."""
FORWARDS: Final = 300
"""Forwards of each of them, at most, `black-box` and the fresh pass of `not-exhausted` apart."""
BACKWARDS: Final = 150
"""Backwards of each of them, at most, with the same exceptions."""

ZERO_GRADIENTS: Final = 0.01
"""Share of examples whose margin has no gradient; a network of ReLUs may be dead at a point, not at two by rule."""
POINTS_BY_SCALE: Final = 0.03
"""Share broken by scaled-down logits beyond what the logits as they are break."""
POINTS_BY_RIVAL: Final = 0.02
"""Share by which a weaker attack must beat a stronger one."""
P_BY_RIVAL: Final = 0.01
"""Exact McNemar probability below which that is no chance."""
NOISE: Final = 0.005
"""Share of the standing that random draws may break."""
NOISE_DRAWS: Final = 100
"""Random draws for each example."""
FRESH_ROWS: Final = 32
"""Standing examples that the suite tries again, those of lowest margin."""
FRESH_BROKEN: Final = 3
"""How many of them must fall for the suite not to have been done."""
WHOLE_BOX: Final = 0.05
"""Share that may be left, by the lower end of its interval, where every input of the box is allowed."""
CHANGE: Final = 1e-4
"""Relative change of the logits between two calls; kernels differ by some 1e-6 with the size of a batch."""
CONSTANT: Final = 1e-6
"""Relative spread of the outputs over all examples up to which they are one output, rounded differently."""
LOSS_SPREAD: Final = 0.15
"""Share by which the best loss may beat the worst untargeted one. Networks of short and weak trainings come to 0.08,
networks whose logits saturate begin at 0.31."""
SLOPE_RATIO: Final = (0.5, 2.0)
"""Between what the median of measured over predicted change must lie."""
