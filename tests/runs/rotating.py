"""A pool whose sets learn in a second which of four blobs an image is, begun without the command line."""

from copy import deepcopy
from functools import cache

import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.threat import ThreatModel
from holdfast.rotation import Basins, Crafting, Immunise
from holdfast.rotation.collecting import trained_from_fresh_weights
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.collect import BASE
from holdfast.rotation.steps.rotation_request import OWN, Examples, RotateRequest
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.harden.candidates import Candidate
from rotation.problem import examples, task

DRAWING = {"drawing": "d1"}
SMALL = ThreatModel(Linf(0.05))
"""Under which attacks on the set itself break a third."""


def terms(held: int = 1_000) -> RotateRequest:
    """RotateRequest of the problem; the first rows are trained on, and others judge."""
    made, judging = task(), examples(7, held)
    apart = Batch(judging.x, judging.y, judging.ids + 10_000)
    subject = DescribedModel(made.model, "a" * 64, {"name": "fake", "digest": "a" * 64})
    candidate = Candidate("standard", made.recipe, {})
    data = Examples(made.data, apart, "b" * 64, "blobs", ())
    return RotateRequest(subject, SMALL, "linf:0.05", candidate, Basins(), data)


@cache
def trained(seed: int):
    """A model of the problem, of a training of its own."""
    return trained_from_fresh_weights(task(), Draws(100 + seed))


def state(model, **changes):
    """Its weights, as a pool takes them."""
    found = {name: value.detach().clone() for name, value in model.net.state_dict().items()}
    return found | changes


def nearby(model, share: float):
    """The same weights with a little noise."""
    g, moved = torch.Generator().manual_seed(3), deepcopy(model)
    with torch.no_grad():
        for value in moved.net.parameters():
            value.add_(
                torch.randn(value.shape, generator=g), alpha=share * float(value.square().mean().sqrt())
            )
    return moved


def begun(path, bases=(0, 1)) -> Pool:
    """A pool with surrogates and bases, none of them exposed."""
    pool = Pool.create(path, terms().about())
    for k in range(OWN):
        pool.keep(f"own_{k}", state(trained(10 + k)), {"accuracy": 1.0})
    for k in bases:
        pool.add(state(trained(k)), {"base": True}, why=BASE, role="base")
    return pool


@cache
def immunised(seed: int, against: int = 0):
    """A model of a training of its own, trained on a little against another."""
    made = task()
    how = Immunise(share=1.0, weight=1.0, lr=2e-3, crafting=Crafting(examples=512))
    return how(trained(seed), [trained(against)], made.recipe, made.data, SMALL, rng=Draws(1))
