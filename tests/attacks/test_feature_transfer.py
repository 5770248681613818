"""FeatureTransfer breaks models that decide hard at the end, and leaves alone those with a gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from holdfast.attacks import FeatureTransfer
from holdfast.attacks.parts.adaptive_search import SharedBudget
from holdfast.attacks.parts.feature_search import features_of
from holdfast.attacks.pgd import margin_pgd
from holdfast.core.constraints import L0, L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.testing.fakes import examples, labelled, network

CODES = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 0]], dtype=torch.float64)
EPS = 0.18
LEFT_BY_PGD, LEFT = 0.6, 0.2


class Hard(nn.Module):
    """The smooth network of `network`, whose logits a function turns into hard decisions."""

    def __init__(self, decide, seed=0):
        super().__init__()
        self.net = network(seed).net
        self.decide = decide

    def forward(self, x):
        return self.decide(self.net(x))


def one_hot(z):
    return F.one_hot(z.argmax(1), 4).to(z.dtype)


def prototypes(z):
    """Nearest of four prototypes, in distances that no gradient leaves."""
    corners = 3 * torch.eye(4, dtype=z.dtype)
    return F.one_hot(torch.cdist(z, corners).argmin(1), 4).to(z.dtype)


def prototypes_elsewhere(z):
    corners = 3 * torch.eye(4, dtype=z.dtype).numpy()
    distances = ((z.detach().numpy()[:, None] - corners) ** 2).sum(-1)
    return F.one_hot(torch.from_numpy(distances.argmin(1)), 4).to(z.dtype)


def code_words(z):
    bits = (z > z.mean(1, keepdim=True)).to(z.dtype)
    return -(bits[:, None] != CODES).sum(-1).to(z.dtype)


def votes(z):
    return sum(F.one_hot((z + shift).argmax(1), 4) for shift in torch.eye(4, dtype=z.dtype) / 2).to(z.dtype)


def memory(z):
    stored = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    return F.one_hot(stored.argmax(1)[torch.cdist(z, stored).argmin(1)], 4).to(z.dtype)


def codebook(z):
    table = torch.linspace(-3, 3, 7, dtype=z.dtype)
    return table[(z[..., None] - table).abs().argmin(-1)]


def low_precision(z):
    return (2 * z).to(torch.int8).to(z.dtype)


def noise_votes(z):
    return sum(one_hot(z + 0.2 * torch.randn_like(z)) for _ in range(9))


def problem(decide, *, n=24, access="gradients", constraint=None):
    model = Classifier(Hard(decide)).eval().requires_grad_(False)
    batch = labelled(model, examples(n=n))
    return model, batch, ThreatModel(constraint or Linf(EPS), access=access)


def surviving(model, batch, x_adv):
    """The share of examples that most of five calls classify correctly."""
    with torch.no_grad():
        right = torch.stack([margin(model(x_adv), batch) > 0 for _ in range(5)]).double().mean(0)
    return float((right > 0.5).double().mean())


def by_codebook(z):
    entries = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, -1.0]], dtype=z.dtype)
    pairs = z.unflatten(1, (2, 2))
    return entries[torch.cdist(pairs, entries).argmin(-1)].flatten(1)


@pytest.mark.parametrize(
    "decide, chooses",
    [
        (by_codebook, True),
        (one_hot, True),
        (prototypes_elsewhere, True),
        (torch.round, False),
        (torch.sign, False),
    ],
)
def test_choices_among_outcomes_are_distinguished_from_roundings(decide, chooses):
    model = Classifier(Hard(decide))
    assert features_of(model, examples()).chooses == chooses


@pytest.mark.parametrize(
    "decide",
    [
        one_hot,
        prototypes,
        prototypes_elsewhere,
        code_words,
        votes,
        memory,
        codebook,
        low_precision,
        noise_votes,
    ],
    ids=lambda decide: decide.__name__,
)
def test_it_breaks_what_a_hard_decision_hides(decide):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch, threat = problem(decide)
        pgd = margin_pgd()(model, batch, threat, rng=Draws(0))
        assert surviving(model, batch, pgd) >= LEFT_BY_PGD
        x_adv = FeatureTransfer(passes=400)(model, batch, threat, rng=Draws(0))
        assert surviving(model, batch, x_adv) <= LEFT
    assert allowed(threat.constraint, x_adv, batch.x, model.bounds).all()


@pytest.mark.parametrize("constraint", [L2(1.0), L1(5.0)], ids=lambda constraint: constraint.name)
def test_it_works_in_every_norm_with_an_eps(constraint):
    model, batch, threat = problem(prototypes, constraint=constraint)
    x_adv = FeatureTransfer(passes=400)(model, batch, threat, rng=Draws(0))
    assert allowed(constraint, x_adv, batch.x, model.bounds).all()
    assert surviving(model, batch, x_adv) <= LEFT


def test_l0_and_a_missing_eps_are_refused():
    for constraint in (L0(2), Linf()):
        model, batch, threat = problem(one_hot, constraint=constraint)
        with pytest.raises(UsageError, match="FeatureTransfer"):
            FeatureTransfer()(model, batch, threat, rng=Draws(0))


@pytest.mark.parametrize("passes", [1, 20, 100])
@pytest.mark.parametrize("decide", [one_hot, noise_votes], ids=["one-hot", "noise"])
def test_it_uses_no_more_passes_than_its_setting(decide, passes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch, threat = problem(decide, constraint=Linf(0.001))
        metered = Metered(model, batch, threat)
        FeatureTransfer(passes=passes)(metered, batch, threat, rng=Draws(0))
    spent = metered.spent
    assert int((spent.queries + spent.backwards).max()) <= passes


def beside(z):
    """Logits whose order of size is only looked at."""
    return z - 0 * z.argsort(1).sum()


@pytest.mark.parametrize(
    "decide", [nn.Identity(), beside, F.softmax], ids=["smooth", "beside", "probabilities"]
)
def test_a_model_with_a_gradient_costs_one_pass_and_is_returned_as_it_is(decide):
    model, batch, threat = problem(partial(decide, dim=1) if decide is F.softmax else decide)
    metered = Metered(model, batch, threat)
    x_adv = FeatureTransfer()(metered, batch, threat, rng=Draws(0))
    assert torch.equal(x_adv, batch.x)
    assert int((metered.spent.queries + metered.spent.backwards).max()) <= 2


def test_runs_of_one_seed_agree_and_leave_model_and_inputs_alone():
    model, batch, threat = problem(memory)
    before, x = {name: value.clone() for name, value in model.state_dict().items()}, batch.x.clone()
    first, second = (FeatureTransfer(passes=200)(model, batch, threat, rng=Draws(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(batch.x, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_successful_query_is_returned():
    for decide in (one_hot, prototypes_elsewhere):
        model, batch, threat = problem(decide, constraint=Linf(0.05))
        metered = Metered(model, batch, threat)
        x_adv = FeatureTransfer(passes=100)(metered, batch, threat, rng=Draws(0))
        found = metered.spent.first_success > 0
        with torch.no_grad():
            assert not (margin(model(x_adv), batch) > 0)[found].any()


@pytest.mark.parametrize("passes, rationed", [(300, 300), (2000, 300)], ids=["within", "beyond"])
def test_examples_that_were_broken_within_a_part_of_the_budget_are_returned(passes, rationed):
    """The ration counts a backward pass for each evaluation with a gradient, and may end the attack early."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch, threat = problem(noise_votes)
        ration = SharedBudget(model, batch, threat.constraint, exact=False)
        ration.begin(torch.arange(len(batch)), rationed)
        x_adv = FeatureTransfer(passes=passes)(ration, batch, threat, rng=Draws(0))
        assert surviving(model, batch, x_adv) <= 0.5


def test_a_target_class_is_reached():
    model, batch, threat = problem(prototypes, constraint=Linf(0.4))
    aimed = batch.towards((batch.y + 1) % 4)
    x_adv = FeatureTransfer(passes=400)(model, aimed, replace(threat, goal=1), rng=Draws(0))
    assert surviving(model, aimed, x_adv) <= LEFT


def test_a_single_example_and_an_empty_batch_are_attacked():
    model, batch, threat = problem(prototypes_elsewhere)
    for n in (0, 1):
        part = batch.first(n)
        x_adv = FeatureTransfer(passes=100)(model, part, threat, rng=Draws(0))
        assert x_adv.shape == part.x.shape


def test_features_of_a_model_that_treats_the_examples_one_by_one_are_those_of_any_batch():
    """The number of operations depends on the size of the batch, which falls as examples are broken."""

    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network(0).net

        def forward(self, x):
            shifts = [0.01 * int((255 * each).round().sum() % 3) for each in x]
            return one_hot(torch.cat([self.net(x[k : k + 1] + shift) for k, shift in enumerate(shifts)]))

    model = Classifier(OneByOne()).eval().requires_grad_(False)
    batch = labelled(model, examples(n=12))
    features = features_of(model, batch)
    for n in (1, 3, 12):
        part = batch.first(n)
        logits, values = features.forward(model, part, part.x.clone().requires_grad_())
        assert values[0].argmax(1).equal(logits.argmax(1))


def test_a_model_that_takes_gradients_of_its_own_is_attacked():
    class Descending(nn.Module):
        """Denoises its input by gradient steps before it decides."""

        def __init__(self):
            super().__init__()
            self.net = network(0).net

        def forward(self, x):
            z = x.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad((z - 0.5).square().sum(), z)
            return one_hot(self.net(z.detach() - 0.1 * grad))

    model = Classifier(Descending()).eval().requires_grad_(False)
    batch = labelled(model, examples(n=8))
    x_adv = FeatureTransfer(passes=200)(model, batch, ThreatModel(Linf(0.2)), rng=Draws(0))
    assert surviving(model, batch, x_adv) <= LEFT


def test_a_model_whose_graph_is_used_up_is_attacked_without_crossing_detach():
    class Ending(nn.Module):
        """Frees the graph of the outputs that it decides on."""

        def __init__(self):
            super().__init__()
            self.net = network(0).net

        def forward(self, x):
            z = x.detach()
            outputs = self.net(z)
            if outputs.requires_grad:
                torch.autograd.grad(outputs.sum(), z)
            return one_hot(outputs + 0 * self.net(x))

    model = Classifier(Ending()).eval().requires_grad_(False)
    batch = labelled(model, examples(n=8))
    x_adv = FeatureTransfer(passes=100)(model, batch, ThreatModel(Linf(EPS)), rng=Draws(0))
    assert allowed(Linf(EPS), x_adv, batch.x, model.bounds).all()
