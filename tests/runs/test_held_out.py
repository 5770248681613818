"""What a training does not learn from: which examples choose its checkpoint, which judge it, and how they are seen."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from holdfast.core.batch import UNLABELLED, Batch
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.meter import PIECE, results_in_pieces
from holdfast.core.model import Bounds, Classifier
from holdfast.io.data.loaders import as_data
from holdfast.recipes import IBPTraining
from holdfast.runs.harden import candidates
from holdfast.runs.harden.harden import harden
from holdfast.runs.harden.held_out import (
    harmless,
    held_out_accuracies,
    proved_accuracy,
    refuse_missing_classes,
    split_of,
    without_held,
    without_judged,
)
from holdfast.runs.harden.pace import with_predicted_labels
from holdfast.verbs.settings import Harden
from runs import fakes
from runs.test_hardening import HOW, THREAT, trainable, training, wish


@pytest.mark.slow
def test_training_examples_that_are_judged_are_left_out_and_named(tmp_path):
    data, test = training(), fakes.data()
    judged = test.read(0, len(test))
    both = Batch(torch.cat((data.x, judged.x[3:8])), torch.cat((data.y, judged.y[3:8])), torch.arange(605))
    kept, said = without_judged(both, test)
    assert torch.equal(kept.x, data.x)
    assert "5 of 605" in said and "600 is test example 3" in said and "and 2 more" in said
    assert without_judged(data, test) == (data, "")
    found = harden(trainable(), both, test, wish())
    assert found.notes[0] == said
    few = as_data(judged.x[:3], judged.y[:3])
    assert harden(trainable(), both, few, wish(excluded=test)).notes[0] == said
    assert said not in harden(trainable(), both, few, wish()).notes
    with pytest.raises(UsageError, match="give other test examples"):
        without_judged(judged, test)


@pytest.mark.slow
def test_training_examples_that_equal_those_that_choose_are_left_out():
    data = training()
    _, held = split_of(data, 0)
    more = Batch(torch.cat((data.x, held.x[:7])), torch.full((607,), UNLABELLED), torch.arange(607))
    more.y[:600] = data.y
    rest, held = split_of(more, 0)
    fresh, said = without_held(rest, held)
    assert said.startswith("7 training examples equal one of the 60 that choose the checkpoint")
    assert set(fresh.ids.tolist()) == set(range(600)) - set(held.ids.tolist())
    assert harden(trainable(), more, fakes.data(), wish()).notes[0] == said
    with pytest.raises(UsageError, match="no training example is left"):
        without_held(held, held)


def test_too_few_examples_to_choose_by_are_refused():
    with pytest.raises(UsageError, match="499 training examples leave 49 .* at least 500"):
        split_of(training(499), 0)


def test_a_class_without_examples_is_named():
    data, subject = training(), trainable()
    with pytest.raises(TargetError, match="no training example is of class 2, of the 4"):
        harden(subject, data.take(data.y != 2), fakes.data(), wish())
    with pytest.raises(TargetError, match="training labels are 0; at least two classes"):
        harden(trainable(), data.take(data.y == 0), fakes.data(), wish())


def test_an_evaluation_is_timed_as_that_of_a_robust_network():
    model, data = trainable().model, training()
    data = data.labelled((model(data.x).argmax(1) + 1) % fakes.CLASSES)
    assert held_out_accuracies(model, data, harmless(THREAT)) == (0.0, 0.0)
    assert held_out_accuracies(model, with_predicted_labels(model, data), harmless(THREAT)) == (1.0, 1.0)
    unknown = with_predicted_labels(model, data.labelled(torch.where(data.ids < 9, UNLABELLED, data.y)))
    assert (unknown.y[:9] == UNLABELLED).all() and (unknown.y[9:] >= 0).all()


def test_a_class_keeps_an_example_to_train_on_whichever_choose():
    data = training()
    rare = data.labelled(torch.where(data.ids == 17, 3, data.y.clamp(max=2)))
    for seed in range(60):
        rest, held = split_of(rare, seed)
        assert len(held) == 60 and len(rest) == 540
        assert 17 in rest.ids.tolist()
    drawn = {tuple(split_of(data, seed)[1].ids.tolist()) for seed in range(3)}
    assert len(drawn) == 3


def test_a_class_without_examples_to_judge_it_is_reported():
    data = training()
    rare = data.labelled(torch.where(data.ids == 17, 3, data.y.clamp(max=2)))
    judged = as_data(data.x[10:20], fakes.data().read(0, 10).y)
    said = "10 of 600 training examples are also test examples"
    with pytest.raises(
        TargetError, match=re.escape(said) + ".*; no training example is of class 3, of the 4"
    ):
        harden(trainable(), rare, judged, wish())


def test_data_without_a_label_is_refused_in_words():
    data = training()
    nothing = data.labelled(torch.full_like(data.y, UNLABELLED))
    with pytest.raises(TargetError, match="no training example has a label; at least two classes are needed"):
        refuse_missing_classes(nothing, 4)


class Narrow(torch.nn.Sequential):
    """Runs out of memory for more examples than a batch has."""

    most = 64

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


@pytest.mark.slow
def test_an_evaluation_without_memory_is_halved_and_the_batch_remains():
    net = Narrow(*fakes.network(1)).requires_grad_()
    whole = harden(trainable(), training(1_000), fakes.data(), wish())
    found = harden(fakes.subject(net), training(1_000), fakes.data(), wish())
    assert [point.batch for point in found.curve] == [64, 64, 64]
    assert [point.robust for point in found.curve] == [point.robust for point in whole.curve]
    assert not [note for note in found.notes if "memory" in note]


def test_pieces_are_halved_as_often_as_it_takes():
    data, sizes = training(PIECE + 100), []

    def seen(some):
        if len(some) > 50:
            raise MemoryError
        sizes.append(len(some))
        return some.ids

    assert torch.equal(torch.cat(results_in_pieces(data, seen)), data.ids)
    assert max(sizes) == 32 and sum(sizes) == len(data)

    def full(some):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(TargetError, match="memory ran out with one example at a time"):
        results_in_pieces(data, full)

    def broken(some):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        results_in_pieces(data, broken)


class Noisy(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x + 0.3 * torch.randn_like(x))


def test_a_look_at_a_network_that_draws_is_the_same_again():
    model, data = fakes.subject(Noisy(*fakes.network(1))).model, training()
    torch.manual_seed(0)
    first = held_out_accuracies(model, data, THREAT)
    assert held_out_accuracies(model, data, THREAT) == first
    state = torch.random.get_rng_state()
    held_out_accuracies(model, data, THREAT)
    assert torch.equal(torch.random.get_rng_state(), state)


def sorted_file(tmp_path):
    """A data set whose examples stand in the order of their classes."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(4).repeat_interleave(750)
    x = torch.rand(3_000, fakes.FEATURES, generator=g, dtype=torch.float64)
    path = tmp_path / "sorted.npz"
    np.savez(path, x_test=x, y_test=y, x_train=1 - x, y_train=y)
    return str(path)


@pytest.mark.slow
def test_judged_examples_are_drawn_by_the_seed_without_a_choice(tmp_path):
    path = sorted_file(tmp_path)

    def judged(**more):
        return Harden(model=fakes.network(), data=path, **more).open()[2].read(0, 3_000)

    drawn = judged()
    assert len(drawn) == 1_000 and set(drawn.y.tolist()) == {0, 1, 2, 3}
    assert torch.equal(judged().ids, drawn.ids) and not torch.equal(judged(seed=1).ids, drawn.ids)
    assert judged(n=700).ids.tolist() == list(range(700))


def test_errors_of_other_training_data_are_explained_without_a_hint_at_their_split(tmp_path):
    path, csv = sorted_file(tmp_path), tmp_path / "more.csv"
    csv.write_text("a,b\n1,0\n")

    def asked(fit):
        return Harden(model=fakes.network(), data=path, fit=fit).open()

    with pytest.raises(UsageError, match="label"):
        asked(str(csv))
    whole = tmp_path / "whole.npz"
    np.savez(whole, x=np.load(path)["x_train"], y=np.load(path)["y_train"])
    assert len(asked(str(whole))[1]) == 3_000
    with pytest.raises(UsageError, match="has no train split to train on"):
        Harden(model=fakes.network(), data=whole).open()


def test_a_zero_of_the_other_sign_is_the_same_input():
    data = training()
    data.x[3, 4:6] = torch.tensor([0.0, -0.0], dtype=torch.float64)
    twin = as_data(
        data.x[3:4] * torch.ones(fakes.FEATURES).index_fill(0, torch.tensor([4, 5]), -1), data.y[3:4]
    )
    kept, said = without_judged(data, twin)
    assert "1 of 600" in said and "3 is test example 0" in said
    assert set(range(600)) - set(kept.ids.tolist()) == {3}


@pytest.mark.slow
def test_the_checkpoint_of_a_certified_training_is_that_of_which_most_is_proved(monkeypatch):
    proved = iter((0.2, 0.5, 0.4))
    monkeypatch.setattr(candidates, "proved_accuracy", lambda *_: next(proved))
    found = harden(trainable(), training(), fakes.data(), wish(IBPTraining(training=HOW)))
    assert [point.certified for point in found.curve] == [0.2, 0.5, 0.4]
    assert found.card["chosen"]["epoch"] == 2
    assert any("50.0 %" in note for note in found.card["notes"])


def test_proved_examples_of_a_linear_network_are_those_that_no_attack_breaks():
    net = torch.nn.Linear(fakes.FEATURES, 2).double()
    held, wide = training(300), Bounds(-10.0, 10.0)
    held = replace(held, y=(net(held.x).argmax(1) + (held.ids % 5 == 0)) % 2)
    gap = net(held.x).diff(dim=1)[:, 0] * (2 * held.y - 1)
    least = gap - THREAT.constraint.eps * net.weight.diff(dim=0).abs().sum()
    share = proved_accuracy(Classifier(net, bounds=wide), held, THREAT, [IBPTraining()])
    assert 0.1 < share == float((least > 0).double().mean()) < 0.75
    assert proved_accuracy(Classifier(net, bounds=wide), held, THREAT, [wish().candidates[0].recipe]) is None
