"""Every law on every recipe, and what each recipe is at eps 0."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from holdfast import recipes
from holdfast.core.batch import Batch
from holdfast.core.catalogue import RECIPES
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import (
    ATTA,
    CURE,
    DPSGD,
    FTSAM,
    HAT,
    IKL,
    LLR,
    MART,
    RSLAD,
    SABR,
    SCORE,
    TRADES,
    VAT,
    AugmentPolicy,
    CurriculumTraining,
    Denoising,
    EnsembleTraining,
    FreeTraining,
    GaussianNoise,
    GeneratedData,
    GradientRegularisation,
    Hybrid,
    IBPTraining,
    Int8,
    JacobianRegularisation,
    LeagueTraining,
    LipschitzConstraint,
    MarginTraining,
    MaskedPatches,
    MultiNormTraining,
    Partitions,
    PGDTraining,
    PolicyTraining,
    Prune,
    Repair,
    SingleStep,
    Standard,
    Tuning,
)
from holdfast.recipes.training.follow_up import RAISED, OverfittingGuard
from holdfast.recipes.training.learner import Learner, Loop, trained
from holdfast.recipes.training.recipe import LossRecipe
from holdfast.testing import fakes
from holdfast.testing.recipes import (
    RECIPE_LAWS,
    SHORT,
    does_not_use_global_randomness,
    is_reproducible,
    learns,
    same,
)


def certain_teacher():
    """The network that labels the examples of the laws, with ten times its logits: a soft teacher is learned slowly."""
    teacher = fakes.network(0)
    for weight in teacher.net[-1].parameters():
        weight.data *= 10
    return teacher


CASES = [
    Standard(),
    Standard(label_smoothing=0.1),
    PGDTraining(steps=2),
    PGDTraining(steps=2, clean=0.5),
    TRADES(steps=2),
    MART(steps=2),
    ATTA(refresh=2),
    EnsembleTraining(steps=2),
    HAT(steps=2),
    Hybrid(steps=2),
    IKL(steps=2),
    GradientRegularisation(),
    GradientRegularisation(method="finite-difference"),
    SingleStep(),
    SingleStep(noise=0.0, clip=True),
    SCORE(steps=2, forgiven=0.01, label_smoothing=0.1),
    CurriculumTraining(steps=3),
    FreeTraining(replays=3),
    MultiNormTraining(others=(L2(0.2), L1(0.5)), steps=2),
    MultiNormTraining(others=(L2(0.2), L1(0.5)), method="average", steps=2),
    MultiNormTraining(others=(L2(0.2), L1(0.5)), method="max", steps=2),
    VAT(),
    VAT(iterations=2),
    JacobianRegularisation(projections=2),
    CURE(),
    LLR(),
    LipschitzConstraint(),
    LipschitzConstraint(gain=5.0, weight=0.0),
    MarginTraining(),
    GaussianNoise(sigma=0.1),
    GaussianNoise(sigma=0.1, copies=2, stability=2.0),
    IBPTraining(),
    IBPTraining(clean=0.5),
    SABR(),
    PolicyTraining(),
    PolicyTraining(strategy="random"),
    LeagueTraining(past=1),
    DPSGD(epsilon=500.0, delta=1e-3, max_grad_norm=10.0),
    RSLAD(opened=certain_teacher(), steps=2),
    RSLAD(opened=certain_teacher(), steps=2, alpha=1.0),
    Int8(steps=2),
    Prune(0.5, steps=2),
    Prune(0.5, gradual=0.0, steps=2, clean=0.5),
]
PARTITIONS = [Partitions(3), Partitions(2)]
"""These train one member after another, with one checkpoint: tests/certifiers/test_partitions.py has their laws."""
DENOISING = [Denoising(sigma=0.1), Denoising(sigma=0.1, mse=0.0), Denoising(sigma=0.1, stability=0.0)]
"""These train another part of a model, and no labels: `learns` is a test of their own."""
REPAIRS = [Repair(), Repair(stamped=0.2), FTSAM(rho=0.1), MaskedPatches()]
"""These are for the threat of a trigger or of a patch."""
CHOOSING = [
    GeneratedData(steps=2, generator=1.0),
    AugmentPolicy(period=2, steps=2),
    Tuning(steps=2, search=0.9, candidates=4),
]
"""These train on other images than those of a batch, or with other settings."""


@pytest.mark.parametrize("law", RECIPE_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("recipe", [*CASES, *REPAIRS, *CHOOSING], ids=repr)
def test_law(recipe, law):
    law(recipe)


@pytest.mark.parametrize(
    "law", [law for law in RECIPE_LAWS if law is not learns], ids=lambda law: law.__name__
)
@pytest.mark.parametrize("recipe", DENOISING, ids=repr)
def test_law_of_denoising(recipe, law):
    law(recipe)


@pytest.mark.parametrize(
    "law", [is_reproducible, does_not_use_global_randomness], ids=lambda law: law.__name__
)
@pytest.mark.parametrize("recipe", PARTITIONS, ids=repr)
def test_law_of_partitions(recipe, law):
    law(recipe)


def test_the_catalogue_is_what_may_be_named_and_every_recipe_has_its_cases():
    assert {entry.cls for entry in RECIPES.values()} == set(recipes.__all__)
    of_texts = {"MaskedWords"}  # has its own tests, because the laws are about inputs that are numbers
    cases = {type(case).__name__ for case in (*CASES, *CHOOSING, *DENOISING, *PARTITIONS, *REPAIRS)}
    assert cases | of_texts == set(recipes.__all__)


@pytest.mark.parametrize(
    "recipe",
    [
        PGDTraining(training=SHORT),
        TRADES(training=SHORT),
        SingleStep(training=SHORT),
        GradientRegularisation(training=SHORT),
        CurriculumTraining(training=SHORT),
        FreeTraining(replays=1, training=SHORT),
        MultiNormTraining(others=(L2(0.0),), training=SHORT),
        VAT(training=SHORT),
        CURE(training=SHORT),
        LLR(training=SHORT),
        LipschitzConstraint(gain=100.0, training=SHORT),
        IBPTraining(regularisation=0.0, training=SHORT),
        SABR(regularisation=0.0, training=SHORT),
    ],
    ids=repr,
)
def test_at_eps_0_it_is_ordinary_training(recipe):
    trains_as_usual(recipe, fakes.network(1).requires_grad_())


def trains_as_usual(recipe, model):
    data, threat = fakes.labelled(fakes.network(), fakes.examples(n=26)), ThreatModel(Linf(0.0))
    one = list(recipe(model, data, threat, rng=Draws(0)))[-1]
    other = list(Standard(training=SHORT)(model, data, threat, rng=Draws(0)))[-1]
    for name, value in other.tensors.items():
        torch.testing.assert_close(value, one.tensors[name], rtol=1e-9, atol=1e-12)
    assert not same(one, list(Standard(training=SHORT)(model, data, threat, rng=Draws(1)))[-1])


@pytest.mark.parametrize(
    "layer", [partial(nn.Dropout, 0.5), partial(nn.BatchNorm1d, 16)], ids=["dropout", "batch-norm"]
)
@pytest.mark.parametrize(
    "recipe",
    [
        GradientRegularisation(training=SHORT),
        GradientRegularisation(method="finite-difference", training=SHORT),
        VAT(training=SHORT),
        CURE(training=SHORT),
        LLR(training=SHORT),
    ],
    ids=repr,
)
def test_at_eps_0_two_passes_differ_in_nothing_and_leave_what_one_does(recipe, layer):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), layer(), nn.Tanh(), nn.Linear(16, 4))
    trains_as_usual(recipe, Classifier(net.double()).eval())


@pytest.mark.parametrize("recipe", CASES, ids=repr)
def test_at_eps_0_its_loss_is_its_own_on_the_inputs_as_they_are(recipe, monkeypatch):
    model, data = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=26))
    threat = ThreatModel(Linf(0.0), surrogates=(fakes.network(2),))
    short = replace(recipe, training=SHORT)
    if isinstance(recipe, HAT):
        model = fakes.network().requires_grad_()
    if isinstance(recipe, GaussianNoise):
        short = replace(short, sigma=0.0)
    if isinstance(recipe, MultiNormTraining):
        short = replace(short, others=(L2(0.0), L1(0.0)))
    seen, loop_of = [], LossRecipe.loop

    def measuring(recipe, *given, **named):
        loop = loop_of(recipe, *given, **named)

        def loss(learner, batch, x_adv):
            seen.append((batch.x, x_adv))
            return loop.loss(learner, batch, x_adv)

        return replace(loop, loss=loss)

    monkeypatch.setattr(LossRecipe, "loop", measuring)
    list(short(model, data, threat, rng=Draws(0)))
    assert len(seen) >= 2
    for x, x_adv in seen:
        torch.testing.assert_close(
            x_adv, x.repeat(len(x_adv) // len(x), 1, 1, 1).view_as(x_adv), rtol=0, atol=0
        )


@pytest.mark.slow
def test_the_guard_undoes_the_last_updates_and_adds_a_step(set_guard_accuracy, before_updates):
    model, data = fakes.network(1).requires_grad_(), fakes.labelled(fakes.network(), fakes.examples(n=900))
    recipe, looks = SingleStep(training=replace(SHORT, epochs=2, batch=4)), []

    def right(self, steps):
        looks.append(
            (steps, int(self.learner.state[RAISED]), self.learner.net.net[1].weight.detach().clone())
        )
        overfitted = 5 <= len(looks) <= 6  # the third look: one step holds, ten do not
        return 0.9 if steps == 1 or not overfitted else 0.1

    begins = []

    def begin(loop, epoch, step, rows):
        begins.append((epoch, step, loop.tensors()["weights.net.1.weight"].clone()))

    set_guard_accuracy(right)
    before_updates(begin)
    found = list(recipe(model, data, ThreatModel(Linf(0.05)), rng=Draws(0)))
    assert [int(checkpoint.tensors["state.raised"]) for checkpoint in found][-1] == 1
    before, objected, again = looks[2], looks[4], looks[6]
    assert (before[1], objected[1], again[1]) == (0, 0, 1)
    assert not torch.equal(objected[2], again[2])
    first, second = ([begin for begin in begins if begin[:2] == twice] for twice in ((1, 0), (1, 1)))
    assert len(first) == len(second) == 2
    assert torch.equal(first[0][2], first[1][2])  # anew from where the updates that it undid began
    assert not torch.equal(second[0][2], second[1][2])


def test_a_network_that_overfits_to_one_step_is_found():
    class Kinked(torch.nn.Module):
        """Wrong where the mean has risen by half of eps, and right again at the end of a whole step."""

        def forward(self, x):
            risen = (x - 0.5).flatten(1).mean(1)
            height = 400 * (risen - 0.05) ** 2 - 0.09
            return torch.stack((height, torch.zeros_like(height)), 1)

    net = Classifier(Kinked())
    held = Batch(torch.full((40, 24), 0.5), torch.zeros(40, dtype=torch.int64), torch.arange(40))
    learner = Learner(net, net, ThreatModel(Linf(0.1)), {RAISED: torch.zeros((), dtype=torch.int64)})
    guard = OverfittingGuard(learner, held)
    assert not guard.passes()
    assert int(learner.state[RAISED]) == 1
    for _ in range(5):
        guard.passes()
    assert int(learner.state[RAISED]) == 3
    assert guard.passes()


@pytest.mark.parametrize("overshoot", [1.0, 1.25])
def test_eps_grows_at_first_for_attack_and_loss_alike(overshoot):
    seen, model = [], fakes.network(1).requires_grad_()
    data = fakes.labelled(fakes.network(), fakes.examples(n=32))

    def inner(learner, batch, update):
        seen.append(learner.threat.constraint.eps)
        return batch.x

    def loss(learner, batch, x_adv):
        seen.append(learner.threat.constraint.eps)
        return Standard().loss(learner, batch, x_adv)

    how = replace(SHORT, epochs=2, warmup=0.5, overshoot=overshoot)  # four updates each
    list(trained(Loop(model, data, ThreatModel(Linf(0.08)), how, Draws(0), None, inner, loss)))
    eps = [overshoot * value for value in (0.0, 0.02, 0.04, 0.06, 0.08, 0.08, 0.08, 0.08)]
    assert seen[::2] == seen[1::2] == pytest.approx(eps)


@pytest.mark.parametrize("eps", [0.3, 1e6])
def test_atta_remembers_changes_of_any_size(eps):
    """In half words, whose largest number is 65504."""
    model = Classifier(fakes.network(1).net.requires_grad_(), bounds=Bounds(-1e7, 1e7))
    *_, kept = ATTA(training=SHORT)(model, fakes.examples(40), ThreatModel(Linf(eps)), rng=Draws(0))
    changes = kept.tensors["state.kept"]
    assert changes.isfinite().all()
    assert 0.5 <= float(changes.abs().max()) <= 1.001
