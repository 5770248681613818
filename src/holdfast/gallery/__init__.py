"""Masked models: small versions of defences that look robust under a naive evaluation, as tests of the doubts.

None of them is suitable as a defence. Each is the construction of its paper, built in seconds on 5,000 digits, and
comes with an undefended twin, which is the same network without the defence. For each, `holdfast demo --gallery` shows
the robust accuracy under plain PGD and under an adaptive attack, and the doubts that are raised.
"""

from holdfast.gallery import activations, generative, images, logits
from holdfast.gallery.item import EPS, Item
from holdfast.gallery.training import undefended

ITEMS: tuple[Item, ...] = (*logits.ITEMS, *images.ITEMS, *activations.ITEMS, *generative.ITEMS)
"""All masked models, grouped by the part of the network that they change."""

__all__ = ["EPS", "ITEMS", "Item", "undefended"]
