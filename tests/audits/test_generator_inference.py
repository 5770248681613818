"""Membership inference of generators: a planted memoriser, a generator with a known density, and other data."""

import pytest
import torch

from holdfast.audits.generator.attacks import FPR, Membership, rated
from holdfast.audits.generator.sensitivity import Context
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.io.models.generators import OpenedGenerator

FEATURES, CPU = 8, torch.device("cpu")


def normal(n, seed, shift=0.0):
    return shift + torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(seed))


class Memoriser:
    """Diffusion of the empirical distribution: its estimates are those of the mixture of normals around `x`."""

    def __init__(self, x):
        self.x = x

    def sample(self, n, seed):
        return self.x[torch.randint(len(self.x), (n,), generator=torch.Generator().manual_seed(seed))]

    def denoising_loss(self, x, t, noise):
        noisy = x + t * noise
        weights = (-torch.cdist(noisy, self.x).square() / (2 * t**2)).softmax(1)
        return ((noisy - weights @ self.x) / t - noise).square().mean(1)


class Normal:
    """Diffusion of the standard normal distribution, with its density."""

    def sample(self, n, seed):
        return normal(n, 1000 + seed)

    def denoising_loss(self, x, t, noise):
        noisy = x + t * noise
        return (noisy * t / (1 + t**2) - noise).square().mean(1)

    def log_prob(self, x):
        return -x.square().sum(1) / 2


def found(generator, *, training=None, held_out=None, samples=None):
    """The columns and the finding of the part."""
    training = normal(200, 0) if training is None else training
    held_out = normal(2400, 1) if held_out is None else held_out
    samples = generator.sample(800, 2) if samples is None else samples
    batches = [
        Batch(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x))) for x in (training, held_out)
    ]
    opened = None if generator is None else OpenedGenerator("generator", "0" * 64, generator)
    context, part = Context(samples, *batches, opened, CPU, Draws(0)), Membership()
    assert part.missing(context) == ""
    columns = part.measure(context)
    return columns, part.concluded(columns)


def test_a_memoriser_is_found_by_each_score_and_takes_its_own_samples_for_members():
    _, finding = found(Memoriser(normal(200, 0)))
    for name in ("distance", "denoising", "score_norm"):
        assert finding.facts[name]["tpr"] >= 0.9
        assert finding.facts[name]["own"] >= 0.9
    assert finding.verdict == "flagged"
    assert finding.facts["memorised"] >= 0.9
    assert finding.facts["memorised_held_out"] <= 0.05
    assert finding.metrics["membership_tpr_at_1_percent"].low > 0.5
    assert "of the generator's own samples" in finding.headline


def test_a_generator_that_does_not_memorise_is_not_flagged():
    columns, finding = found(Normal(), training=normal(1000, 3))
    for name in ("distance", "denoising", "score_norm", "log_prob"):
        assert finding.facts[name]["low"] <= FPR <= finding.facts[name]["high"]
    assert finding.verdict == "not flagged"
    assert not finding.facts["different_data"]
    assert finding.facts["memorised"] <= 0.05
    # the closed form: the norm of the score of a normal distribution is proportional to that of the example
    norms = -columns["score_norm"][:1000]
    x = normal(1000, 3)[columns["row"][:1000]].norm(dim=1).double()
    assert torch.allclose(norms / x, (norms / x)[0].expand(1000), rtol=1e-4)


def test_a_file_of_samples_is_tested_by_the_distance_alone():
    _, finding = found(None, samples=Memoriser(normal(200, 0)).sample(800, 2))
    assert finding.facts["best"] == "distance"
    assert finding.facts["distance"]["tpr"] >= 0.9
    assert [table.title for table in finding.tables] == ["Membership"]


def test_few_held_out_examples_give_no_lower_bound_and_no_flag():
    _, finding = found(Memoriser(normal(200, 0)), held_out=normal(400, 1))
    assert finding.facts["denoising"]["tpr"] >= 0.9
    assert finding.facts["denoising"]["low"] == 0
    assert finding.verdict == "not flagged"
    assert "the threshold is imprecise" in finding.tables[0].note


def test_examples_of_other_data_are_not_called_a_leak():
    _, finding = found(Normal(), training=normal(1000, 3, shift=1.0))
    assert finding.facts["different_data"]
    assert finding.verdict == "not flagged"
    assert "cannot be concluded" in finding.headline


def test_the_columns_are_the_same_again():
    first, _ = found(Normal())
    again, _ = found(Normal())
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_too_few_samples_are_missing():
    x = normal(20, 0)
    batch = Batch(x, torch.zeros(20, dtype=torch.int64), torch.arange(20))
    assert Membership().missing(Context(x, batch, batch, None, CPU, Draws(0))) == "at least 100 samples"


def test_the_share_of_own_samples_is_that_above_the_threshold_of_held_out_examples():
    score = torch.cat((torch.arange(100.0), torch.arange(100.0), torch.tensor([97.0, 98.5, 99.5, 200.0])))
    group = torch.tensor([0] * 100 + [1] * 100 + [2] * 4)
    result = rated(score, group)
    assert result.own.value == pytest.approx(0.75)
    assert result.tpr.value == pytest.approx(0.01)
    assert result.auc == pytest.approx(0.5)
