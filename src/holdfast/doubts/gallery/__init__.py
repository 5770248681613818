"""Masked models, which are small versions of published defences that seem robust only because their gradients are
masked.

They serve to test whether the doubts about such an evaluation are raised; none of them is suitable as a defence. Each
is built like the defence in its paper, within seconds on 5,000 digits, and is compared with an undefended twin, which
is the same network without the defence. For each, `holdfast demo --gallery` shows the robust accuracy under plain PGD
and under an adaptive attack, and the doubts that are raised.
"""

from holdfast.doubts.gallery import decisions, images, layers, memories, purifiers
from holdfast.doubts.gallery.item import EPS, Item, undefended

ITEMS: tuple[Item, ...] = (
    *layers.LOGIT_MASKS,
    *images.ITEMS,
    *layers.ACTIVATIONS,
    *purifiers.GENERATIVE,
    *purifiers.GUIDED,
)
"""Masked models that `holdfast demo --gallery` shows, grouped by the module that defines them."""

DISCRETE: tuple[Item, ...] = (*decisions.ITEMS, *memories.CODEBOOKS, *layers.PRECISIONS, *memories.MEMORIES)
"""Further masked models: each decides, quantises or looks up, in part without a derivative.

They were committed shortly before the attacks `StandIn` and `FeatureTransfer`, without knowledge of them, but after the
first version of the search that divides the budget; the attacks were not developed on them. They are not
marked with replacements of a gradient.
"""

SLOW: tuple[Item, ...] = purifiers.PURIFIERS
"""Masked models whose evaluation takes minutes, which `holdfast demo --gallery` does not show."""

__all__ = ["DISCRETE", "EPS", "ITEMS", "SLOW", "Item", "undefended"]
