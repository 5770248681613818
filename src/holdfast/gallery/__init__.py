"""Masked models: defences whose naive evaluation flatters them, each in small, for the doubts to find.

None of them is a defence to use. Each is the real construction of its paper, built in seconds on 5,000 digits, and
stands beside the same network without it: the undefended twin. `holdfast demo --gallery` shows what PGD as it comes
says of each, what an attacker who knows it leaves, and the doubts that give it away.
"""

from holdfast.gallery import activations, generative, images, logits
from holdfast.gallery.item import EPS, Item
from holdfast.gallery.training import undefended

ITEMS: tuple[Item, ...] = (*logits.ITEMS, *images.ITEMS, *activations.ITEMS, *generative.ITEMS)
"""All of them, by what they do to which part of a network."""

__all__ = ["EPS", "ITEMS", "Item", "undefended"]
