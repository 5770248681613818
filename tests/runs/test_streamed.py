"""Training examples that are read by index: equal results, other data at each reading, and memory."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import holdfast
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.loaders import Source, as_data, in_order, index_order
from holdfast.io.data.streamed import Streamed, open_by_index, training_data
from holdfast.recipes import ATTA, SingleStep
from holdfast.recipes.training.fit import Saving, Training
from holdfast.recipes.training.follow_up import OverfittingGuard
from holdfast.runs.harden.held_out import digest_of, examples_of
from holdfast.verbs.settings import Harden
from runs import fakes
from runs.test_hardening import RECIPE, THREAT, training


class Examples(Dataset):
    """A map-style data set. `change` is added to each example when it is read."""

    def __init__(self, data, change=lambda: 0.0):
        self.data, self.change = data, change

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return (self.data.x[index] + self.change()).clamp(0, 1), int(self.data.y[index])


def torch_noise():
    return 0.1 * torch.rand(()).item() + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002


def own_noise():
    return 0.1 * np.random.default_rng().random()


def opened(data):
    found = open_by_index(data, DeclaredData())
    assert found is not None
    return found


def test_examples_that_are_read_by_index_equal_those_in_memory():
    data, test = training(), fakes.data()
    loader = DataLoader(Examples(data), batch_size=7, shuffle=True, num_workers=2, persistent_workers=True)
    whole, read = examples_of(data, test, 0, 4), examples_of(opened(loader), test, 0, 4)
    assert whole.digest == read.digest
    assert torch.equal(whole.held_out.x, read.held_out.x)
    rows = torch.tensor([3, 1, 2])
    order = [rows, rows, torch.tensor([5])]
    with read.rest.reading(order, Draws(0)) as several:
        for positions, part in zip(order, several, strict=True):
            expected = whole.rest.take(positions)
            assert torch.equal(part.x, expected.x) and torch.equal(part.y, expected.y)
            assert torch.equal(part.ids, expected.ids)
    assert not len(read.rest.take(rows[:0]))
    several = DataLoader(TensorDataset(data.x, data.y), sampler=SubsetRandomSampler([4, 9]))
    assert torch.equal(opened(several).first(9).x, data.x[[4, 9]])


def test_bytes_are_converted_as_in_memory():
    x = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8)
    data = Batch(x, torch.arange(9) % 3, torch.arange(9))

    class Bytes(Examples):
        def __getitem__(self, index):
            return {"image": x[index], "label": int(data.y[index])}

    assert torch.equal(opened(Bytes(data)).first(9).x, as_data(x, data.y).read(0, 9).x)


def test_data_larger_than_a_share_of_the_memory_are_read_by_index(set_limit, tmp_path):
    data = training()
    np.save(tmp_path / "x.npy", data.x.float().numpy())
    given = as_data(np.load(tmp_path / "x.npy", mmap_mode="r"), data.y)
    whole = training_data(given)
    assert isinstance(whole, Batch)
    set_limit("holdfast.io.data.streamed.IN_MEMORY_BYTES", 1_000)
    read = training_data(given)
    assert isinstance(read, Streamed) and "would take 0.0 GiB in memory" in read.notes[0]
    assert digest_of(read) == digest_of(whole)
    assert torch.equal(read.take(read.ids % 3 == 1).x, whole.take(whole.ids % 3 == 1).x)
    set_limit("holdfast.recipes.atta.IN_MEMORY_BYTES", 1_000)
    model = Classifier(fakes.network(1).float())
    with pytest.raises(UsageError, match="atta stores a perturbation of each of 600 examples"):
        ATTA()(model, read, ThreatModel(holdfast.Linf(0.1)), rng=Draws(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_random_changes_in_a_data_set_are_those_of_seed_epoch_and_example(workers):
    read = opened(DataLoader(Examples(training(), torch_noise), num_workers=workers))
    assert read.changing == 0
    assert "training example 0 differs between two readings: the data set changes" in read.notes[1]
    order = [torch.tensor([3, 1]), torch.tensor([2])]

    def inputs(epoch, order):
        state = torch.random.get_rng_state(), random.getstate(), np.random.rand()  # noqa: NPY002
        with read.reading(order, Draws(0).at(epoch)) as found:
            x = torch.cat([part.x for part in found])
        assert torch.equal(torch.random.get_rng_state(), state[0]) and random.getstate() == state[1]
        return x

    assert torch.equal(inputs(1, order), inputs(1, order))
    assert torch.equal(inputs(1, order)[2:], inputs(1, order[1:]))
    assert not torch.equal(inputs(1, order), inputs(2, order))
    assert torch.equal(read.take(order[0]).x, read.take(order[0]).x)


def test_an_epoch_is_read_once_and_again_only_after_a_guard_has_undone_updates(monkeypatch):
    data = training()
    read, passes, opened_at = opened(Examples(data)), [], []
    reading = Source.reading

    def counted(*rest):
        opened_at.append(len(passes))
        return reading(*rest)

    def fails_once(guard):
        passes.append(True)
        return len(passes) != 2

    monkeypatch.setattr(Source, "reading", counted)
    monkeypatch.setattr(OverfittingGuard, "passes", fails_once)
    monkeypatch.setattr(OverfittingGuard, "every", property(lambda guard: 20, lambda guard, value: None))
    ends = []
    for examples in (read, data):
        passes.clear()
        how = Training(epochs=1, batch=10, saving=Saving(10, lambda checkpoint: None))
        recipe = SingleStep(training=how)
        (end,) = recipe(
            fakes.subject(fakes.network(1).requires_grad_()).model, examples, THREAT, rng=Draws(0)
        )
        ends.append(end)
    assert (len(passes), opened_at[-2:]) == (4, [0, 2])
    one, other = ends
    assert all(torch.equal(value, other.tensors[name]) for name, value in one.tensors.items())


def test_changes_that_the_comparison_does_not_find_are_seeded_too():
    class Rarely(Examples):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch_noise() * (index == 30), y  # which is not compared

    first, second = opened(Rarely(training())), opened(Rarely(training()))
    assert first.changing is None and digest_of(first) == digest_of(second)
    rows = torch.arange(len(first))
    inputs = []
    for epoch in (1, 1, 2):
        with first.reading([rows], Draws(0).at(epoch)) as found:
            inputs.append(next(found).x)
    assert torch.equal(inputs[0], inputs[1]) and not torch.equal(inputs[0], inputs[2])


class Together(Examples):
    """Returns a whole batch, as data sets do that read faster so."""

    def __getitem__(self, index):
        raise NotImplementedError

    def __getitems__(self, indices):
        return self.data.x[indices], self.data.y[indices]


def test_a_data_set_that_returns_several_examples_at_once_is_read_so():
    loader = DataLoader(Together(training()), collate_fn=lambda batch: batch)
    assert torch.equal(opened(loader).first(9).x, training().x[:9])


def test_a_function_that_worker_processes_cannot_receive_is_refused_with_a_remedy():
    loader = DataLoader(SET, num_workers=1, multiprocessing_context="spawn", collate_fn=lambda pairs: pairs)
    with pytest.raises(TargetError, match="cannot be pickled: .*lambda.* multiprocessing_context='fork'"):
        opened(loader)


def test_changes_that_no_seed_repeats_are_stated_and_do_not_make_another_run():
    first, second = (opened(Examples(training(), own_noise)) for _ in range(2))
    assert "A resumed run continues from its checkpoint, but its result differs" in first.notes[1]
    assert digest_of(first) == digest_of(second)


@pytest.mark.parametrize("fit", [None, TensorDataset(training().x, training().y)])
def test_test_examples_that_change_are_refused(fit):
    data = DataLoader(Examples(training(), torch_noise), batch_size=50)
    settings = {} if fit is None else {"fit": fit}
    with pytest.raises(TargetError, match="example 0 of the data differs between two readings"):
        holdfast.harden(
            fakes.network(1).requires_grad_(), data, threat="linf:0.06", recipe=RECIPE, **settings
        )


def test_an_input_of_another_shape_is_refused():
    def collated(pairs):
        x = torch.stack([x for x, _ in pairs])
        return x[:, : 12 if len(pairs) == 32 else 11], torch.tensor([y for _, y in pairs])

    with pytest.raises(TargetError, match=r"has shape \(11,\) .* others have shape \(12,\)"):
        opened(DataLoader(Examples(training()), collate_fn=collated))


def stream():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(training().x, training().y))

    return Stream()


SET = TensorDataset(torch.zeros(4, 2), torch.zeros(4))


@pytest.mark.parametrize(
    ("data", "order"),
    [
        (SET, [0, 1, 2, 3]),
        (DataLoader(SET, shuffle=True), [0, 1, 2, 3]),
        (DataLoader(SET, sampler=SubsetRandomSampler([3, 1])), [3, 1]),
        (DataLoader(SET, sampler=RandomSampler(SET, replacement=True)), None),
        (DataLoader(SET, sampler=WeightedRandomSampler([1, 2, 3, 4], 4)), None),
        (DataLoader(SET, batch_sampler=[[0, 1], [2]]), None),
        (DataLoader(SET, batch_size=None), None),
        (DataLoader(stream()), None),
        (iter([]), None),
    ],
)
def test_the_order_of_a_loader_is_replaced_where_it_only_shuffles(data, order):
    found = index_order(data)
    assert (found and list(found)) == order


def test_examples_to_judge_by_are_read_in_the_order_of_their_data_set():
    data = training()
    loader = DataLoader(Examples(data), batch_size=9, shuffle=True)
    assert torch.equal(as_data(loader).read(0, 600).x, data.x)
    weighted = DataLoader(SET, sampler=WeightedRandomSampler([1, 2, 3, 4], 4))
    assert in_order(weighted) is weighted


def test_a_loader_whose_order_cannot_be_repeated_is_read_once_with_a_note():
    settings = Harden(
        model=fakes.network(1).requires_grad_(),
        data=as_data(training(40).x, training(40).y),
        fit=DataLoader(stream(), batch_size=50),
        threat="linf:0.06",
    )
    _, found, _, _, notes = settings.open()
    assert isinstance(found, Batch) and torch.equal(found.x, training().x)
    assert "A run can be resumed only with the same examples in the same order" in notes[0]


def script(*arguments):
    path = Path(__file__).with_name("streaming.py")
    environment = {**os.environ, "PYTHONPATH": str(path.parents[1])}
    done = subprocess.run(
        [sys.executable, path, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_run_with_worker_processes_that_is_stopped_and_killed_ends_with_the_same_bytes(tmp_path):
    found = script("killed", tmp_path)
    assert found["stopped"] == "stopped by SIGINT" and not found["remain"]
    assert found["hits"] == 2 and found["equal"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    # in memory, the examples would need three times their size
    assert script("memory", tmp_path, 250)["grown_mb"] < 400
