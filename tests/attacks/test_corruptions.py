"""Common corruptions against the published code's numbers, and on images of other sizes, boxes and colours."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.published_corruptions import IDS, OWN_DRAWS, SIZES, picture, places
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.corruptions import EXTRA, STANDARD, corrupted
from holdfast.corruptions.constants import LARGE, SMALL
from holdfast.corruptions.images import jpeg_compression

ALL = (*STANDARD, *EXTRA)
SEVERITIES = range(1, 6)
PUBLISHED = json.loads((Path(__file__).parents[2] / "benchmarks/references/corruptions.json").read_text())
# the published code cuts these to 256 levels on the way, and JPEG may round a coefficient the other way
COARSE = {"glass_blur", "motion_blur", "pixelate", "snow", "jpeg_compression"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(set(ALL) - {"frost"}))
def test_gives_the_values_of_the_published_code(name, size):
    x = picture(size)
    for severity, known in zip(SEVERITIES, PUBLISHED[str(size)][name], strict=True):
        found = corrupted(name, x, severity, IDS, Draws(0))
        mean, change = float(found.mean()), float((found - x).std())
        if name in OWN_DRAWS:
            assert mean == pytest.approx(known["mean"], abs=0.006)
            assert change == pytest.approx(known["change"], rel=0.12)
            continue
        near = 0.01 if name in COARSE else 1e-3
        assert mean == pytest.approx(known["mean"], abs=near / 2)
        assert change == pytest.approx(known["change"], rel=0.02)
        assert found.flatten()[places(size)].tolist() == pytest.approx(known["values"], abs=near)


def test_counts_of_photons_are_poisson():
    ids, rng = torch.arange(4000), Draws(1)
    for value, severity in ((0.01, 5), (0.5, 1), (0.9, 3)):
        x = torch.full((4000, 1, 4, 4), value, dtype=torch.float64)
        rate = SMALL["shot_noise"][severity - 1][0]
        counts = rate * corrupted("shot_noise", x, severity, ids, rng)
        assert torch.equal(counts.round(), counts.round().clamp_min(0))
        torch.testing.assert_close(counts, counts.round(), atol=1e-6, rtol=0)
        if value <= 0.5:  # nothing is cut at 1
            mean = value * rate
            assert float(counts.mean()) == pytest.approx(mean, abs=5 * (mean / 64000) ** 0.5)
            assert float(counts.var()) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_hit_their_share(severity):
    x = torch.full((500, 3, 16, 16), 0.5)
    found = corrupted("impulse_noise", x, severity, torch.arange(500), Draws(2))
    share = SMALL["impulse_noise"][severity - 1][0]
    assert float((found != x).float().mean()) == pytest.approx(share, rel=0.05)
    assert float(found[found != x].mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [80, 40, 15])
def test_jpeg_is_what_the_library_writes(channels, quality):
    x = (
        picture(64)[:, :channels, :45, :33] + 0.05 * torch.randn(1, channels, 45, 33, generator=_seeded())
    ).clamp(0, 1)
    levels = (255 * x[0]).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(levels if channels == 3 else levels[..., 0]).save(file, "JPEG", quality=quality)
    known = torch.from_numpy(np.array(Image.open(file))).view(45, 33, channels).movedim(-1, 0)
    found = 255 * jpeg_compression(x, (quality,), IDS, Draws(0))[0]
    gap = (found - known).abs()
    assert float(gap.mean()) < 1
    assert float(gap.max()) < 25


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ALL)
def test_keeps_to_the_box_and_to_its_own_row(name):
    batch = torch.rand(5, 3, 28, 21, generator=_seeded()) * 4 - 1
    ids, box = torch.tensor([9, 2, 4, 7, 1]), Bounds(-1.0, torch.full((3, 1, 1), 3.0))
    found = corrupted(name, batch, 5, ids, Draws(3), box)
    assert found.shape == batch.shape
    assert found.dtype == batch.dtype
    assert found.isfinite().all()
    assert ((found >= -1) & (found <= 3)).all()
    assert not torch.equal(found, batch)
    alone = corrupted(name, batch[3:4], 5, ids[3:4], Draws(3), box)
    # a rounded level of JPEG is a step, all else is continuous in the rounding of sums
    torch.testing.assert_close(
        alone, found[3:4], atol=1e-5 if name != "jpeg_compression" else 4 / 100, rtol=0
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 1, 1), (1, 3, 70), (3, 90, 66)], ids=str)
def test_takes_any_size_grey_or_in_colour(name, shape):
    x = torch.rand(2, *shape, generator=_seeded())
    for severity in (1, 5):
        found = corrupted(name, x, severity, torch.arange(2), Draws(4))
        assert found.shape == x.shape
        assert found.isfinite().all()
    black = corrupted(name, torch.zeros(1, *shape), 3, torch.arange(1), Draws(4))
    assert black.isfinite().all()
    assert not len(corrupted(name, x[:0], 3, torch.arange(0), Draws(4)))


@pytest.mark.parametrize("name", sorted(set(ALL) - {"brightness", "saturate", "elastic_transform"}))
def test_a_higher_severity_changes_more(name):
    x = picture(96).float().expand(16, 3, 96, 96)
    gap = [float((corrupted(name, x, s, torch.arange(16), Draws(5)) - x).abs().mean()) for s in (1, 5)]
    assert gap[1] > gap[0]


def test_large_images_take_the_constants_of_imagenet():
    for side, table in ((64, SMALL), (65, LARGE)):
        x = torch.full((1, 3, side, side), 0.5, dtype=torch.float64)
        x[..., 0] = 0.7
        found = corrupted("contrast", x, 2, torch.arange(1), Draws(0))
        assert float(found.std() / x.std()) == pytest.approx(table["contrast"][1][0])


def test_grey_images_stay_grey_and_a_table_is_refused():
    x = torch.rand(2, 1, 28, 28, generator=_seeded())
    assert torch.equal(corrupted("saturate", x, 5, torch.arange(2), Draws(0)), x)
    with pytest.raises(UsageError, match="images of 1 or 3 channels"):
        corrupted("fog", torch.rand(2, 12), 1, torch.arange(2), Draws(0))
