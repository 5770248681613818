"""Balls of clips: their sizes, the padding, the rounding to 16 bits, and the search in coordinates of equal radius."""

import math

import pytest
import torch

import holdfast
from holdfast.attacks import PGD, Square
from holdfast.attacks.protocol import attacked_inputs
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.gates.grammar import parse
from holdfast.threats.parsing import parse_threat
from holdfast.threats.signals import LEVELS, LinfOfClips, on_clips, sound_of

BOUNDS = Bounds(-1.0, 1.0)
THREATS = ("snr:20dB", "peak:26dB", "snr:60dB", "peak:70dB")


def clips(n=6, samples=400):
    """Clips on 16-bit levels with quiet, loud and padded ones, and their labels and ids."""
    x = torch.randn(n, samples, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-2.5, -0.5, n)[:, None]
    x = (x.clamp(-1, 1) * LEVELS).round() / LEVELS
    x[1, 300:] = 0
    x[2, 100:] = 0
    return Batch(x, torch.zeros(n, dtype=torch.int64), torch.arange(10, 10 + n))


def linear(samples=400):
    weight = torch.randn(2, samples, generator=torch.Generator().manual_seed(1))
    net = torch.nn.Linear(samples, 2)
    with torch.no_grad():
        net.weight.copy_(weight)
        net.bias.copy_(torch.tensor([1e3, 0.0]))  # unbreakable, so that attacks go to the edge of the ball
    return Classifier(net, bounds=BOUNDS)


def decibels(x_adv, x):
    return 20 * torch.log10(x.double().norm(dim=1) / (x_adv.double() - x.double()).norm(dim=1))


def test_the_sound_ends_at_the_last_sample_that_is_not_zero_in_any_channel():
    x = torch.tensor([[[0.0, 1, 0, 0], [0, 0, -1, 0]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    assert sound_of(x).tolist() == [[[True, True, True, False]], [[True] * 4]]


def test_the_size_in_decibels_is_that_of_the_sound_whatever_the_padding():
    batch, constraint = clips(), parse_threat("snr:20dB").constraint
    padded = torch.nn.functional.pad(batch.x, (0, 100))
    noisy = constraint.sample(batch, BOUNDS, Draws(0))
    alone, longer = (
        constraint.distance(noisy, batch.x),
        constraint.distance(torch.nn.functional.pad(noisy, (0, 100)), padded),
    )
    torch.testing.assert_close(alone, longer)
    torch.testing.assert_close(-20 * alone.double().log10(), decibels(noisy, batch.x), atol=1e-3, rtol=0)
    assert (decibels(noisy, batch.x) >= 20 - 1e-4).all()
    assert (decibels(noisy, batch.x) < 20.3).all()


@pytest.mark.parametrize("text", [*THREATS, "linf:0.01", "l2:0.05"])
@pytest.mark.parametrize(
    "attack", [PGD(steps=4), Square(queries=6)], ids=lambda attack: type(attack).__name__
)
def test_attacked_clips_are_allowed_have_16_bits_and_their_padding(text, attack):
    batch, threat = clips(), parse_threat(text)
    object.__setattr__(threat, "constraint", on_clips(threat.constraint))
    x_adv = attacked_inputs(attack, linear(), batch, threat, rng=Draws(0))
    assert allowed(threat.constraint, x_adv, batch.x, BOUNDS).all()
    assert (x_adv * LEVELS == (x_adv * LEVELS).round()).all()
    assert (x_adv[~sound_of(batch.x).expand_as(x_adv)] == 0).all()


def test_a_search_ends_at_the_edge_of_the_ball_in_spite_of_the_rounding():
    batch, threat = clips(), parse_threat("snr:20dB")
    x_adv = attacked_inputs(PGD(steps=4), linear(), batch, threat, rng=Draws(0))
    assert (decibels(x_adv, batch.x)[2:] < 20.1).all()


def test_rounding_leaves_a_quiet_clip_unchanged_if_no_level_is_inside():
    batch, threat = clips(), parse_threat("peak:70dB")
    x_adv = attacked_inputs(PGD(steps=4), linear(), batch, threat, rng=Draws(0))
    quiet = batch.x.abs().amax(1) * threat.eps < 1 / LEVELS
    assert quiet.any()
    assert not quiet.all()
    assert (x_adv[quiet] == batch.x[quiet]).all()
    assert (x_adv[~quiet] != batch.x[~quiet]).any(1).all()


def test_silence_has_no_allowed_change():
    silent, constraint = torch.zeros(1, 8), parse_threat("snr:20dB").constraint
    assert constraint.distance(silent, silent).tolist() == [0]
    assert constraint.distance(silent + 1e-4, silent).tolist() == [math.inf]


def test_changed_padding_is_outside_every_ball_of_clips():
    batch = clips()
    x_adv = batch.x.clone()
    x_adv[1, -1] = 1e-6
    for constraint in (parse_threat("snr:0dB").constraint, on_clips(Linf(1)), on_clips(L2(1))):
        assert constraint.distance(x_adv, batch.x)[1] == math.inf


def test_more_decibels_are_a_smaller_eps_in_threats_and_gates():
    assert parse_threat("snr:40dB").eps < parse_threat("snr:30").eps < parse_threat("peak:20DB").eps
    claim = parse("robust_accuracy@40dB >= 0.5")
    assert claim.decibels
    assert claim.eps == parse_threat("snr:40dB").eps
    assert not parse("robust_accuracy@0.5 >= 0.5").decibels


@pytest.mark.parametrize("text", ["room=1,shift=0.1s,gain=6dB,band=300-3400", "rotate=15,shift=2"])
def test_transformations_are_equal_after_text(text):
    from holdfast.settings.grammar import parse_transform, transform_text

    limits = parse_transform(text)
    assert parse_transform(transform_text(limits)) == limits
    assert transform_text(limits) == text


def test_directions_are_stated_of_those_transformations_alone_that_have_two():
    from holdfast.settings.grammar import parse_transform, transform_meaning

    assert transform_meaning(parse_transform("room=1,shift=0.1s,band=300-3400")) == (
        "in both directions by up to shift 0.1s; by a synthetic room whose reflections are multiplied by 1; by a "
        "band-pass with a lower edge of up to 300 Hz and an upper edge of at least 3400 Hz"
    )
    assert "both" not in transform_meaning(parse_transform("noise=0.1,blur=2"))


def test_clips_behind_random_rooms_keep_their_shape_and_gradient_and_differ():
    from holdfast.attacks.parts.sounds import heard_through
    from holdfast.settings.grammar import parse_transform

    model = heard_through(linear(), parse_transform("room=1,shift=0.01s,gain=6dB,band=300-3400"))
    model.net.suit(8000)
    x = clips().x.requires_grad_()
    first, second = model(x), model(x)
    assert (first != second).any(1).all()
    (grad,) = torch.autograd.grad(first.sum(), x)
    assert grad.isfinite().all()
    assert grad.any(1).all()


def test_silent_clips_are_excluded_and_counted_and_gates_are_in_decibels():
    batch = clips()
    x = batch.x.clone()
    x[4] = 0
    settings = {"threat": "snr:20dB", "suite": [PGD(steps=2)], "doubts": False}
    result = holdfast.assess(linear(), (x, batch.y), gates=["robust_accuracy >= 0.1"], **settings)
    assert len(result.evidence) == 5
    assert any("1 of 6 clips is silent" in note for note in result.evidence.notes)
    with pytest.raises(UsageError, match="@40dB"):
        holdfast.assess(linear(), (x, batch.y), gates=["robust_accuracy@0.1 >= 0.1"], **settings)
    with pytest.raises(UsageError, match="no clip has a sound"):
        holdfast.assess(linear(), (0 * x, batch.y), **settings)


@pytest.mark.parametrize("constraint", [Linf(0.3), L2(0.3)])
def test_bounds_of_networks_leave_the_padding_of_clips_unchanged(constraint):
    from holdfast.certifiers.bounds.graph import region_of

    x = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]])
    region = region_of(x, on_clips(constraint), Bounds(-1, 1))
    assert torch.equal(region.low[:, 3:], x[:, 3:]) and torch.equal(region.high[:, 3:], x[:, 3:])
    assert (region.low[:, :3] < x[:, :3] - 0.3).all() and (region.high[:, :3] > x[:, :3] + 0.3).all()


@pytest.mark.slow
def test_robustness_of_clips_is_proved_under_linf():
    batch, model = clips(), linear()
    data = holdfast.open_data((batch.x, batch.y), sampling_rate=8000)
    settings = {"threat": "linf:0.0005", "suite": [PGD(steps=2)], "doubts": False}
    result = holdfast.assess(model, data, certify=True, **settings)
    assert result.metrics["certified_accuracy"].value == 1  # the bias alone decides
    assert type(result.evidence.threat.constraint) is LinfOfClips


def test_what_probes_find_is_judged_as_a_file_stores_it():
    clip = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    constraint = parse_threat("snr:40dB").opened().constraint
    moved = constraint.project(clip + 1e-5, clip, Bounds(-1.0, 1.0))
    stored = constraint.as_stored(moved, clip, Bounds(-1.0, 1.0))
    assert ((stored == clip) | (stored * 32768 == (stored * 32768).round())).all()
    assert not torch.equal(stored, moved)
