"""Adversarial training on generated images beside `auto` with the same total time, the training of the generator
included; and a learned augmentation policy and a search of settings in short trainings.
"""

from typing import Any

import holdfast
from benchmarks.hardened import made, percent, shares, spent
from benchmarks.parts import RUNS
from benchmarks.record import Cells, Claim, Outcome

WHAT = "`generated` beside `auto`, Fashion-MNIST linf:0.1, 12.5 CPU minutes with the generator, `standard` on 1,000 images"
ROW, DATA, THREAT, BUDGET, SEED = "generated", "fashion_mnist", "linf:0.1", "750s", 0
