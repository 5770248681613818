"""The stateful query detector: attacks are found, natural sequences are not, and fingerprints need the key."""

import numpy as np
import pytest
import torch

from benchmarks.blacklight import Blacklight
from holdfast.attacks import Square
from holdfast.core.batch import Batch, encoded_files
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.guard.detectors.evasion import InformedSquare
from holdfast.guard.detectors.queries import (
    QueryDetector,
    QuerySettings,
    fingerprinter,
    for_cameras,
    radius_for,
)
from holdfast.guard.state_in_memory import MemoryState

KEY = bytes(range(32))


def images(n, seed=0, channels=3):
    """Smooth random images, whose low-pass versions differ."""
    coarse = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=32, mode="bilinear", align_corners=False)


def detector(shape=(3, 32, 32), **settings):
    return QueryDetector(KEY, MemoryState(), shape, **settings)


def test_distances_of_files_are_those_of_their_sets_of_runs_wherever_the_runs_are():
    rng = np.random.default_rng(0)
    prints = fingerprinter(KEY, None, QuerySettings())
    old = rng.bytes(4000)

    def runs(content):
        return {(b"\0\0" + content + b"\0\0")[k : k + 3] for k in range(len(content) + 2)}

    for new in (old[:9] + b"x" + old[9:], rng.bytes(300) + old, old[:2000], rng.bytes(4000)):
        common = len(runs(old) & runs(new)) / (len(runs(old)) * len(runs(new))) ** 0.5
        sketches = prints.sketch(encoded_files([old, new], 5000))
        assert np.square(sketches[0] - sketches[1]).sum() == pytest.approx(
            2 * (1 - common), rel=0.4, abs=0.01
        )
        wide, narrow = (prints(encoded_files([new], width)) for width in (5000, 4300))
        assert np.array_equal(wide.sketches, narrow.sketches) and wide.digests == narrow.digests
    long = encoded_files(
        [rng.bytes(100_000) for _ in range(2)], 100_000
    )  # of which only some runs are compared
    distance = np.square(np.subtract(*prints.sketch(long))).sum()
    assert distance == pytest.approx(2, rel=0.4)


class Recorded:
    """A linear model that records its queries."""

    def __init__(self, features):
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features, 10))
        self.bounds, self.queries = Classifier(self.net).bounds, []

    def __call__(self, x, ids=None):
        self.queries.extend(x.clone())
        with torch.no_grad():
            return 1e-3 * self.net(x) + 10 * torch.nn.functional.one_hot(torch.tensor([0] * len(x)), 10)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (40,)])
def test_an_attack_is_found_and_different_inputs_are_not(shape):
    benign = torch.rand(400, *shape, generator=torch.Generator().manual_seed(1))
    if len(shape) == 3:
        benign = images(400, 1, shape[0])[..., : shape[1], : shape[2]]
    found = detector(shape, radius=radius_for(benign, KEY, queries=400))
    assert (found.score(benign, ["client"] * 400, 0.0) >= found.settings.threshold).mean() <= 0.005
    model, x = Recorded(benign[0].numel()), benign[:1]
    Square(queries=60)(
        model, Batch(x, torch.tensor([0]), torch.tensor([0])), ThreatModel(Linf(0.03)), rng=Draws(0)
    )
    results = [found.examine(q[None], [f"client {k}"], 1.0) for k, q in enumerate(model.queries)]
    scores = [result.scores[0] for result in results if not result.details[0].repeat]
    assert len(scores) > 40 and np.mean(np.array(scores[-20:]) >= found.settings.threshold) > 0.9


def test_motion_brightness_and_contrast_count_little_and_noise_counts():
    x = images(1)
    moved = (x + 0.3 * (x.roll(1, 3) - x.roll(-1, 3)) / 2)[..., 1:-1]
    pan = torch.nn.functional.pad(moved, (1, 1, 0, 0), mode="replicate")
    details = []
    for other in (
        pan,
        0.97 * x + 0.02,
        0.9 * (x - x.mean()) + x.mean(),
        x + 0.1 * torch.randn_like(x).sign(),
    ):
        found = detector()
        found.score(x, [""], 0.0)
        details.append(found.examine(other, [""], 0.0).details[0])
    assert all(detail.distance > 0.05 for detail in details)
    assert all(detail.weight <= 0.1 for detail in details[:3]) and details[3].weight > 0.9


def test_many_natural_or_very_small_differences_are_an_attack():
    x = images(1)
    bright = x + 0.001 * torch.arange(1, 41)[:, None, None, None]
    noisy = x + torch.randn(40, *x.shape[1:], generator=torch.Generator().manual_seed(0)) / 255
    for versions in (bright, noisy):
        scores = detector().score(torch.cat((x, versions)), [""] * 41, 0.0)
        assert scores[15] < QuerySettings().threshold <= scores[30]


def test_only_a_detector_for_cameras_accepts_nearly_equal_images_of_one_scene():
    scene, cameras = images(1), for_cameras(QuerySettings())
    frames = scene + 5 / 255 * torch.randn(60, *scene.shape[1:], generator=torch.Generator().manual_seed(0))
    attack = (
        scene + 8 / 255 * torch.randn(60, *scene.shape[1:], generator=torch.Generator().manual_seed(1)).sign()
    )
    coarse = scene + 8 / 255 * (images(60, seed=1) - 0.5).sign()
    assert detector().score(frames, [""] * 60, 0.0)[-1] >= cameras.threshold
    assert not detector(settings=cameras).score(frames, [""] * 60, 0.0).any()
    assert detector(settings=cameras).score(coarse, [""] * 60, 0.0)[-1] >= cameras.threshold
    assert not detector(settings=cameras).score(attack, [""] * 60, 0.0).any()  # the price


def test_an_attack_whose_queries_seem_natural_is_found():
    x = 0.2 + 0.6 * images(1)
    model = Recorded(x[0].numel())
    InformedSquare(queries=60)(
        model, Batch(x, torch.tensor([0]), torch.tensor([0])), ThreatModel(Linf(0.02)), rng=Draws(0)
    )
    assert len(model.queries) == 60
    result = detector().examine(torch.stack(model.queries), [""] * 60, 0.0)
    assert np.median([detail.distance for detail in result.details[1:]]) > 0.3
    weights = [detail.weight for detail in result.details[1:11]]
    assert max(weights) <= 0.5 and result.scores[-1] >= QuerySettings().threshold


def test_queries_of_one_batch_are_near_duplicates_of_each_other():
    x = images(1)
    attack = (x + 0.05 * torch.randn(30, *x.shape[1:]).sign()).clamp(0, 1)
    one, many = detector(), detector()
    singly = [one.score(each[None], [""], 0.0)[0] for each in attack]
    assert many.score(attack, [""] * 30, 0.0) == pytest.approx(
        singly, rel=1e-3
    )  # sums depend on the size of the batch


def test_many_inputs_with_few_queries_each_of_one_principal_are_found():
    found, x = detector(), images(40, seed=2).repeat_interleave(4, dim=0)
    scores = found.score(x + 0.08 * torch.randn_like(x).sign(), ["attacker"] * len(x), 0.0)
    others = found.score(images(20, seed=3), ["client"] * 20, 0.0)
    assert scores[-1] > found.settings.threshold > max(scores[:40]) and not others.any()


def test_repeats_of_rejected_queries_are_rejected():
    x = images(1)
    attack = (x + 0.05 * torch.randn(30, *x.shape[1:]).sign()).clamp(0, 1)
    found = detector()
    scores = found.score(attack, [""] * 30, 0.0)
    again = found.score(attack[[0, -1]], [""] * 2, 1.0)
    assert scores[-1] > 10 and again[0] == 0 and again[1] > 10


@pytest.mark.parametrize("step", [1e-9, 2**-52])
@pytest.mark.parametrize("shape", [(3, 32, 32), (4,)])
def test_differences_that_float32_does_not_resolve_are_near_duplicates_and_no_repeats(shape, step):
    x = torch.full((60, *shape), 0.5, dtype=torch.float64)
    x.flatten(1)[:, 0] += step * torch.arange(60)
    found = detector(shape)
    scores = found.score(x.float(), [""] * 60, 0.0, x)
    assert len({*map(tuple, x.flatten(1).tolist())}) == 60 and (scores[30:] >= found.settings.threshold).all()
    assert found.examine(x, [""] * 60, 1.0).details[0].repeat


def test_digests_are_those_of_the_values_in_any_data_type():
    prints = fingerprinter(KEY, (4,), QuerySettings())

    def digests(x, *sent):
        return prints(x, *sent).digests

    whole = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)
    assert len({tuple(digests(whole.to(kind))) for kind in kinds}) == 1
    tenth = torch.full((1, 4), 0.1)
    assert digests(tenth) == digests(tenth.double()) == digests(whole[:1], tenth.double())
    assert digests(tenth) != digests(tenth, torch.full((1, 4), 0.1, dtype=torch.float64))
    far = torch.tensor([[2**63 - 1, 0, 0, 0], [2**63 - 2, 0, 0, 0], [2**24 + 1, 0, 0, 0], [2**24, 0, 0, 0]])
    assert len(set(digests(far))) == 4


def test_fingerprints_depend_on_the_key_and_not_on_the_batch():
    x, settings = images(5), QuerySettings()
    one, other = (fingerprinter(key, x.shape[1:], settings) for key in (KEY, bytes(32)))
    prints, foreign, single = one(x), other(x), one(x[2:3])
    assert not set(prints.digests) & set(foreign.digests) and not (prints.hashes == foreign.hashes).any()
    assert prints.digests[2] == single.digests[0] and (prints.hashes[2] == single.hashes[0]).all()
    distance = np.linalg.norm(prints.sketches[0] - prints.sketches[1])
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 8).flatten(1)
    assert distance == pytest.approx(float((pooled[0] - pooled[1]).norm()), rel=0.35)


def test_inputs_that_are_not_finite_do_not_stop_the_detector():
    x = torch.full((2, 3, 32, 32), torch.nan)
    x[1] = torch.inf
    assert np.isfinite(detector().score(x, ["", ""], 0.0)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QueryDetector(b"short", MemoryState(), (3, 32, 32)), "has 5 bytes; expected at least 16"),
        (lambda: detector().score(images(2), ["one"], 0.0), "2 inputs have 1 principals"),
        (lambda: detector((1, 28, 28)).score(images(1), [""], 0.0), "expected \\(1, 28, 28\\)"),
        (lambda: radius_for(images(1).repeat(9, 1, 1, 1), KEY), "contain many equal"),
    ],
)
def test_wrong_use_is_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_blacklight_finds_small_changes_and_misses_large_ones():
    x, found = images(1), Blacklight(KEY, (3, 32, 32))
    small, large = x.clone(), (x + 0.06 * torch.randn_like(x).sign()).clamp(0, 1)
    small[..., :6, :6] += 0.03
    assert found.score(torch.cat([x, images(1, seed=9)])).tolist() == [0, 0]
    assert found.score(small)[0] >= found.settings.threshold > found.score(large)[0]
