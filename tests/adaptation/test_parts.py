"""The parts of an adaptation: the screen of labels, and flagged inputs."""

import pytest
import torch

from holdfast.adaptation.server_state import disagreeing, read_flagged, screened
from holdfast.core.errors import TargetError, UsageError
from holdfast.guard.stored_inputs import StoredRequest


def clusters(n, seed=0, noise=0.3):
    """Points of three classes, most of which are nearest to their own."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    return torch.eye(3)[y] + noise * torch.randn(n, 3, generator=g), y


def test_flipped_labels_are_found_and_true_ones_are_not():
    (x, y), (new, labels) = clusters(900), clusters(900, 1)
    assert not screened(new, labels, x, y).suspicious
    flipped = labels.clone()
    flipped[:90] = (flipped[:90] + 1) % 3
    found = screened(new, flipped, x, y)
    assert found.suspicious and found.disagree - found.trusted_disagree > 60
    one = flipped.clone()
    one[1:] = labels[1:]
    assert disagreeing(new[:1], one[:1], x, y).item() and not disagreeing(new[:1], labels[:1], x, y).item()


def test_a_trusted_point_is_no_neighbour_of_itself():
    x, y = torch.tensor([[0.0], [0.1], [5.0]]), torch.tensor([0, 0, 1])
    assert disagreeing(x, y, x, y, own=True).tolist() == [False, False, True]
    assert not disagreeing(x[2:], y[2:], x, torch.tensor([1, 1, 1])).any()


class Stored:
    """Two stored requests with three inputs."""

    def read(self):
        yield StoredRequest("a", 0.0, torch.zeros(2, 3), (0, 2), ({}, {}))
        yield StoredRequest("b", 0.0, torch.ones(1, 3), (0,), ({},))


def test_labels_of_flagged_inputs(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("request,row,label\na,2,cat\nb,,1\n")
    flagged = read_flagged(Stored(), labels, ("dog", "cat"), strict=True)
    assert (flagged.n, flagged.y.tolist(), flagged.x.tolist()) == (3, [1, 1], [[0.0] * 3, [1.0] * 3])
    assert (
        read_flagged(Stored(), None, (), strict=True).n == 3
        and len(read_flagged(None, None, (), strict=True).y) == 0
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("request,class\na,1\n", "the columns are class, request"),
        ("request,label\nz,1\n", "input 0 of the request 'z' is not among the stored"),
        ("request,label\na,fish\n", "line 2 is 'fish'; a whole number"),
        ("request,label\na,1\na,1\n", "line 3 repeats"),
        ("request,label\na\n", "line 2 is ''; a whole number"),
        (f"request,label\na,{'9' * 5000}\n", "line 2 is '9+'; a whole number of at most 18 digits"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, text, reason):
    labels = tmp_path / "labels.csv"
    labels.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_flagged(Stored(), labels, ("dog", "cat"), strict=True)
    with pytest.raises(TargetError, match="does not exist"):
        read_flagged(Stored(), tmp_path / "absent.csv", (), strict=True)
