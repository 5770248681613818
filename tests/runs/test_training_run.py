"""Whom a training holds out, and what it learns from beside the labelled examples."""

import pytest
import torch

import holdfast
from holdfast.core.batch import UNLABELLED
from holdfast.core.errors import UsageError
from holdfast.runs.harden.held_out import split_of
from holdfast.testing import fakes
from holdfast.verbs.harden import _with_unlabelled


def with_unlabelled(batch, unlabelled, model):
    return _with_unlabelled(batch, holdfast.Harden(unlabelled=unlabelled), model)


def blank(n, every):
    """Examples of which one in so many has a label."""
    some = fakes.labelled(fakes.network(), fakes.examples(n=n))
    return some.labelled(torch.where(torch.arange(n) % every == 0, some.y, UNLABELLED))


def test_only_labelled_examples_are_held_out_and_nothing_is_lost():
    data = blank(1200, 2)
    rest, held = split_of(data, 0)
    assert (held.y >= 0).all()
    assert len(held) == 60
    assert sorted((*rest.ids.tolist(), *held.ids.tolist())) == sorted(data.ids.tolist())
    assert int((rest.y == UNLABELLED).sum()) == 600
    with pytest.raises(UsageError, match="400 training examples leave 40"):
        split_of(blank(1200, 3), 0)


def test_unlabelled_examples_come_behind_with_ids_of_their_own(tmp_path, monkeypatch):
    import numpy as np

    images = np.random.default_rng(0).random((30, 3, 4, 4)).astype("float32")
    file = tmp_path / "more.npz"
    np.savez(file, x_train=images, y_train=np.zeros(30, "int64"), x_test=images, y_test=np.zeros(30, "int64"))
    data = fakes.labelled(fakes.network(), fakes.examples(n=26))
    both = with_unlabelled(data, str(file), fakes.network(shape=(3, 4, 4)))
    assert len(both) == len(set(both.ids.tolist())) == 56
    assert torch.equal(both.y[:26], data.y)
    assert (both.y[26:] == UNLABELLED).all()
    torch.testing.assert_close(both.x[26:], torch.from_numpy(images).double())
    for given in (images, torch.from_numpy(images), (images, np.ones(30, "int64"))):
        again = with_unlabelled(data, given, fakes.network(shape=(3, 4, 4)))
        assert torch.equal(again.x, both.x) and torch.equal(again.y, both.y)
    other = fakes.labelled(fakes.network(shape=(5,)), fakes.examples(n=26, shape=(5,)))
    with pytest.raises(UsageError, match=r"have shape \(3, 4, 4\), and the labelled ones \(5,\)"):
        with_unlabelled(other, str(file), fakes.network(shape=(3, 4, 4)))


@pytest.mark.slow
def test_unlabelled_examples_in_hand_are_trained_on_beside_data_in_hand():
    data = fakes.labelled(fakes.network(), fakes.examples(n=660))
    data.y[:24] = torch.arange(24) % 4  # of each class a few
    seen = holdfast.harden(
        fakes.network(1).requires_grad_(),
        (data.x, data.y),
        "linf:0.1",
        {"use": "vat", "training": {"epochs": 1}},
        unlabelled=data.x[:32] * 0.5,
        suite="quick",
        doubts=False,
    )
    assert seen.card["recipe"] == "vat"
    with pytest.raises(UsageError, match="32 of 567 training examples have no label"):
        holdfast.harden(
            fakes.network(1).requires_grad_(),
            (data.x, data.y),
            "linf:0.1",
            "pgd",
            unlabelled=data.x[:32] * 0.5,
            suite="quick",
        )
