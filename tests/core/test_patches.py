"""The threat of a patch: what it allows, and where it lies."""

import pytest
import torch

from holdfast.core.batch import Batch
from holdfast.core.constraints import allowed
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.testing import geometry
from holdfast.testing.fakes import examples
from holdfast.threats.transformations import Patch

BATCH = examples(0, n=6, shape=(3, 7, 9))
ANYWHERE, CENTRE, CORNER, NEAR, CONFINED, INNER = (
    Patch(3, 2),
    Patch(3, 2, "centre"),
    Patch(3, 2, "0:7"),
    Patch(3, 2, "centre", 1),
    Patch(3, 2, within="1:2-5:6"),
    Patch(3, 2, "centre", 4, within="1:2-4:6"),
)
ALL = pytest.mark.parametrize("patch", [ANYWHERE, CENTRE, CORNER, NEAR, CONFINED, INNER], ids=str)


def changed(row, column, height=3, width=2):
    x = BATCH.x.clone()
    x[:, :, row : row + height, column : column + width] = 0.123
    return x


@pytest.mark.parametrize(
    ("patch", "place", "fits"),
    [
        (ANYWHERE, (0, 0), True),
        (ANYWHERE, (4, 7), True),
        (CENTRE, (2, 3), True),
        (CENTRE, (2, 4), False),
        (CORNER, (0, 7), True),
        (CORNER, (1, 7), False),
        (NEAR, (1, 4), True),
        (NEAR, (0, 4), False),
        (ANYWHERE, (0, 0, 4, 2), False),
        (ANYWHERE, (0, 0, 3, 3), False),
        (CENTRE, (3, 4, 1, 1), True),
        (CONFINED, (1, 2), True),
        (CONFINED, (3, 5), True),
        (CONFINED, (0, 2), False),
        (CONFINED, (3, 6), False),
        (INNER, (2, 2), True),
        (INNER, (3, 2), False),
    ],
)
def test_allows_what_one_rectangle_in_its_place_covers(patch, place, fits):
    x_adv = changed(*place)
    assert (allowed(patch, x_adv, BATCH.x, Bounds()) == fits).all()
    assert (patch.distance(BATCH.x, BATCH.x) == 0).all()


@pytest.mark.parametrize(
    "patch",
    [Patch(1, 1), Patch(2, 1, "centre"), Patch(1, 2, "centre", 1), Patch(1, 1, within="0:0-1:1")],
    ids=str,
)
@pytest.mark.parametrize(
    "law", [geometry.projects_inside, geometry.projection_is_idempotent, geometry.samples_inside]
)
def test_geometry(patch, law):
    law(patch, 0)


@ALL
def test_a_projection_leaves_the_allowed_alone(patch):
    inside = patch.sample(BATCH, Bounds(), Draws(1))
    assert torch.equal(patch.project(inside, BATCH.x, Bounds()), inside)


def test_does_not_fit():
    with pytest.raises(UsageError, match="does not fit into images of 7x9"):
        Patch(8, 2).places(BATCH.x.shape[1:])
    with pytest.raises(UsageError, match="does not fit"):
        Patch(3, 2, "5:0").places(BATCH.x.shape[1:])
    for within in ("0:0-7:3", "0:0-3:9", "2:2-3:4", "5:5-2:2"):
        with pytest.raises(UsageError, match=f"within={within} does not fit into images of 7x9"):
            Patch(3, 2, within=within).places(BATCH.x.shape[1:])
    with pytest.raises(UsageError, match="does not fit"):
        Patch(3, 2, "0:0", within="1:1-5:5").places(BATCH.x.shape[1:])
    with pytest.raises(UsageError, match="needs images"):
        Patch(3, 2).places(torch.Size((5,)))


def test_an_empty_batch():
    none = BATCH.take(torch.zeros(0, dtype=torch.int64))
    assert isinstance(none, Batch)
    assert len(ANYWHERE.project(none.x, none.x, Bounds())) == 0
