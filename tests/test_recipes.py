"""Every law on every recipe, and what each recipe is at eps 0."""

import pytest
import torch

from holdfast import recipes
from holdfast.config.naming import RECIPES
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.threat import ThreatModel
from holdfast.recipes import (
    ATTA,
    IKL,
    MART,
    SCORE,
    TRADES,
    GradientRegularisation,
    PGDTraining,
    SingleStep,
    Standard,
)
from holdfast.testing import fakes
from holdfast.testing.recipes import RECIPE_LAWS, SHORT, same

CASES = [
    Standard(),
    Standard(label_smoothing=0.1),
    PGDTraining(steps=2),
    PGDTraining(steps=2, clean=0.5),
    TRADES(steps=2),
    MART(steps=2),
    ATTA(refresh=2),
    IKL(steps=2),
    GradientRegularisation(),
    GradientRegularisation(method="finite-difference"),
    SingleStep(),
    SingleStep(noise=0.0, clip=True),
    SCORE(steps=2, forgiven=0.01, label_smoothing=0.1),
]


@pytest.mark.parametrize("law", RECIPE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("recipe", CASES, ids=repr)
def test_law(recipe, law):
    law(recipe)


def test_the_catalogue_is_what_may_be_named_and_every_recipe_has_its_cases():
    assert set(RECIPES.values()) == set(recipes.__all__)
    assert {type(case).__name__ for case in CASES} == set(recipes.__all__)


@pytest.mark.parametrize(
    "recipe",
    [
        PGDTraining(training=SHORT),
        TRADES(training=SHORT),
        SingleStep(training=SHORT),
        GradientRegularisation(training=SHORT),
    ],
    ids=repr,
)
def test_at_eps_0_it_is_ordinary_training(recipe):
    model, data = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    threat = ThreatModel(Linf(0.0))
    one = list(recipe(model, data, threat, rng=Draws(0)))[-1]
    other = list(Standard(training=SHORT)(model, data, threat, rng=Draws(0)))[-1]
    for name, value in one.tensors.items():
        torch.testing.assert_close(value, other.tensors[name], rtol=1e-9, atol=1e-12)
    assert not same(one, list(Standard(training=SHORT)(model, data, threat, rng=Draws(1)))[-1])
