"""The adaptive search: its budget, the choice among its methods, and models on which single methods fail."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.attacks import HopSkipJump
from holdfast.attacks.adaptive_search import AdaptiveSearch
from holdfast.attacks.parts.methods import METHODS, starts
from holdfast.attacks.parts.stable_ascent import FIRST, stable_ascent
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.evidence import METHOD_STATES
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from runs.fakes import data, network

EPS = 0.1


class Prototypes(nn.Module):
    """Decides by the nearest of four prototypes, without a gradient."""

    def __init__(self):
        super().__init__()
        self.net = network()
        with torch.no_grad():
            x = data().read(0, 40).x
            features, labels = self.net(x), self.net(x).argmax(1)
        self.prototypes = torch.stack([features[labels == k].mean(0) for k in range(4)])

    def forward(self, x):
        nearest = torch.cdist(self.net(x), self.prototypes).argmin(1)
        return nn.functional.one_hot(nearest, 4).to(x.dtype)


class Noisy(nn.Module):
    def __init__(self, size=0.3):
        super().__init__()
        self.net, self.size = network(), size

    def forward(self, x):
        return self.net(x + self.size * torch.randn_like(x))


class Fragile(nn.Module):
    """Raises an error for inputs with a mean far from that of the data."""

    def __init__(self):
        super().__init__()
        self.net = Prototypes()

    def forward(self, x):
        if ((x.mean(1) - 0.5).abs() > 0.3).any():
            raise ValueError("out of range")
        return self.net(x)


class Remembers(nn.Module):
    """Answers another class after 150 inputs."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = network(), 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x).roll(self.seen > 150, 1)


def correct(model, n=30):
    batch = data().read(0, n)
    with torch.no_grad():
        return batch.labelled(model(batch.x).argmax(1))


def searched(net, passes, *, access="gradients", constraint=None, batch=None):
    model = Classifier(net.eval())
    for weight in model.parameters():
        weight.requires_grad_(False)
    threat = ThreatModel(constraint or Linf(EPS), access=access)
    batch = correct(model) if batch is None else batch
    meter = Metered(model, batch, threat)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, columns = AdaptiveSearch(passes=passes).itemised(meter, batch, threat, rng=Draws(0))
    return model, batch, x, columns, meter


def state(columns, name):
    return METHOD_STATES[int(columns[f"{name}.state"][0])]


@pytest.mark.parametrize("passes", [1, 3, 40, 400])
@pytest.mark.parametrize("net", [network, Prototypes, Noisy])
def test_no_example_has_more_passes_than_the_budget(net, passes):
    _, batch, x, columns, meter = searched(net(), passes)
    assert (meter.spent.queries + meter.spent.backwards <= passes).all()
    assert x.shape == batch.x.shape
    assert set(columns) == set(AdaptiveSearch.columns)
    assert all(values.shape == batch.ids.shape for values in columns.values())


def test_the_result_is_no_worse_than_any_queried_point():
    lowest = {}

    class Recorded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            logits = self.net(x)
            near = (x[:, None] - BATCH.x).abs().amax(2)
            for row, distance in enumerate(near.unbind(0)):
                for k in (distance <= EPS + 1e-9).nonzero()[:, 0].tolist():
                    value = float(margin(logits[row : row + 1].detach(), BATCH.take(torch.tensor([k]))))
                    lowest[k] = min(lowest.get(k, value), value)
            return logits

    BATCH = correct(network(), 6)
    model, batch, x, *_ = searched(Recorded(), 150, batch=BATCH)
    reached = margin(network()(x), batch)
    assert all(reached[k] <= lowest[k] + 1e-9 or reached[k] <= 0 for k in lowest)


def test_a_model_that_decides_hard_is_broken_by_what_needs_no_gradient():
    model, batch, x, columns, _ = searched(Prototypes(), 1500)
    assert (margin(model(x), batch) > 0).double().mean() <= 0.2
    assert state(columns, "margin") == "dropped"
    contributed = {name for name in ("features", "stand-in", "square", "labels") if columns[f"{name}.broke"].any()}
    assert contributed
    total = sum(int(columns[f"{method.name}.broke"].sum()) for method in METHODS)
    assert total + int(columns["labels.broke"].sum()) == int((margin(model(x), batch) <= 0).sum())


@pytest.mark.parametrize(
    "access, missing", [("scores", {"features", "margin", "expectation"}), ("labels", {"square"})]
)
def test_less_access_leaves_the_methods_that_need_no_more(access, missing):
    model, batch, x, columns, meter = searched(Prototypes(), 600, access=access)
    assert all(state(columns, name).startswith("needs") for name in missing)
    assert not meter.spent.backwards.any()
    assert (margin(model(x), batch) <= 0).any()


def test_under_l1_there_is_no_search_from_labels():
    *_, columns, _ = searched(network(), 100, constraint=L1(0.1))
    assert state(columns, "labels") == "other norm"


def test_a_small_budget_trains_no_stand_in():
    *_, columns, _ = searched(Prototypes(), 55)
    assert state(columns, "stand-in") == "too few passes"
    assert not columns["stand-in.forwards"].any()


def test_a_model_that_raises_far_from_the_data_is_searched_elsewhere():
    model, batch, x, columns, _ = searched(Fragile(), 400, access="labels")
    assert columns["raised"].any()
    assert (margin(model(x), batch) <= 0).any()


def test_a_model_that_raises_at_once_is_no_model_that_raises_far_from_the_data():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("never works")

    with pytest.raises(Exception, match="never works"):
        searched(Broken(), 50, batch=correct(network()))


def test_a_model_that_answers_from_its_history_is_noticed():
    net = Remembers()
    batch = correct(network())
    *_, columns, _ = searched(net, 200, batch=batch, constraint=Linf(1e-3))
    assert columns["changed"].any()
    *_, columns, _ = searched(network(), 200, batch=batch, constraint=Linf(1e-3))
    assert not columns["changed"].any()


def test_the_draws_of_a_gradient_grow_with_the_noise():
    batch = correct(network())
    draws = [
        stable_ascent(Classifier(net), batch, Linf(EPS), 2000, 0.0, Draws(0))[1]
        for net in (network(), Noisy(1.0))
    ]
    assert draws[0] == FIRST
    assert draws[1] > FIRST


def test_a_search_starts_from_the_nearest_images_of_other_classes():
    model = Classifier(Prototypes())
    batch = correct(model)
    predicted = model(batch.x).argmax(1)
    threat = ThreatModel(L2(0.1), access="labels")
    points = starts(batch, batch.x, batch.x, predicted, threat)
    nearest = points[2]
    assert (model(nearest).argmax(1) != batch.y).all()
    distances = torch.cdist(batch.x, batch.x).masked_fill(predicted == batch.y[:, None], torch.inf)
    assert torch.allclose(L2().distance(nearest, batch.x), distances.amin(1))
    few = HopSkipJump(queries=12)
    free = replace(threat, constraint=L2(torch.inf))
    given = few.started(model, batch, free, points, rng=Draws(0))
    alone = few(model, batch, free, rng=Draws(0))
    assert L2().distance(given, batch.x).mean() < L2().distance(alone, batch.x).mean() or not (alone != batch.x).any()


def test_targets_are_reached():
    model = Classifier(Prototypes())
    batch = correct(model)
    batch = Batch(batch.x, batch.y, batch.ids).take(batch.y != 1)
    batch = batch.towards(torch.ones_like(batch.y))
    _, batch, x, *_ = searched(Prototypes(), 600, batch=batch, constraint=Linf(0.3))
    assert (model(x).argmax(1) == 1).any()
