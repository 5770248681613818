"""Comparison of generated examples with training examples, which shows whether a generator copies them."""

from typing import Any

import torch
from torch import Tensor

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.statistics.nearest import copy_threshold, nearest_example

COMPARED = 500
"""largest number of generated examples, and of test examples, whose nearest training example is searched"""
_PIECE = 1_000  # training examples that are compared at once


def copies(generated: Batch, test: Batch, data: TrainingData, rng: Draws) -> dict[str, Any]:
    """Return the distances (L2) from generated examples to the nearest training example, beside those from test
    examples: both medians, and the share of the generated examples that are nearer than 99 % of every second
    test example, which an audit of a generator counts as copies.
    """
    sides = [_drawn(batch, rng) for batch in (generated, test)]
    both = torch.cat([side.x.flatten(1).float() for side in sides])
    nearest = both.new_full((len(both),), torch.inf)
    rows = torch.split(torch.arange(len(data), device=data.ids.device), _PIECE)
    with data.reading(rows, rng.at("reading")) as parts:
        for part in parts:
            distances, _ = nearest_example(both, part.x.to(both))
            nearest = torch.minimum(nearest, distances)
    own, others = nearest[: len(sides[0])], nearest[len(sides[0]) :]
    return {
        "generated": len(own),
        "test": len(others),
        "median_generated": float(own.median()),
        "median_test": float(others.median()),
        "nearer": float((own < copy_threshold(others)).double().mean()),
    }


def _drawn(batch: Batch, rng: Draws) -> Batch:
    order: Tensor = rng.at("compared").bits(batch.ids).argsort()
    return batch.take(order[:COMPARED])


def sentence_on_copies(found: dict[str, Any]) -> str:
    """Return a sentence on the distances of `copies`, without a full stop."""
    return (
        f"the median distance to the nearest training example is {found['median_generated']:.3g} for "
        f"{found['generated']:,} generated images and {found['median_test']:.3g} for {found['test']:,} test examples; "
        f"{100 * found['nearer']:.1f} % of the generated images are nearer than 99 % of every second test example"
    )
