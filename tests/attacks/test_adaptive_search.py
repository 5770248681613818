"""The adaptive search: its budget, the choice among its methods, and models on which single methods fail."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.attacks import HopSkipJump
from holdfast.attacks.adaptive_search import AdaptiveSearch
from holdfast.attacks.parts.adaptive_search import LABELS, METHODS, Method, SharedBudget, starts
from holdfast.attacks.parts.ascent import FIRST, stable_ascent
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import BudgetSpent
from holdfast.core.evidence import METHOD_STATES
from holdfast.core.meter import Metered, margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel

NAMES = (*(method.name for method in METHODS), LABELS.name)
EPS = 0.2
CENTRES = torch.tensor(
    [[0.3] * 12, [0.3] * 6 + [0.6] * 6, [0.6] * 6 + [0.3] * 6, [0.6] * 12], dtype=torch.float64
)
"""class k is around the k-th centre; the distance of a centre to the boundary of another class is 0.15 under Linf"""


class Distances(nn.Module):
    """Decides by the nearest centre, with a gradient."""

    def forward(self, x):
        return -torch.cdist(x, CENTRES)


class Prototypes(nn.Module):
    """The same decisions without a gradient and without scores."""

    def forward(self, x):
        return nn.functional.one_hot(torch.cdist(x, CENTRES).argmin(1), 4).to(x.dtype)


class Noisy(nn.Module):
    def __init__(self, size=0.3):
        super().__init__()
        self.net, self.size = Distances(), size

    def forward(self, x):
        return self.net(x + self.size * torch.randn_like(x))


class Fragile(nn.Module):
    """Raises an error for inputs between the classes."""

    def __init__(self):
        super().__init__()
        self.net = Prototypes()

    def forward(self, x):
        if ((x[:, None] - CENTRES).abs().amax(2).amin(1) > 0.12).any():
            raise ValueError("out of range")
        return self.net(x)


class Remembers(nn.Module):
    """Answers another class after 150 inputs."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = Distances(), 0

    def forward(self, x):
        self.seen += len(x)
        return self.net(x).roll(int(self.seen > 150), 1)


def examples(n=24):
    y, g = torch.arange(n) % 4, torch.Generator().manual_seed(0)
    x = CENTRES[y] + 0.05 * (2 * torch.rand(n, 12, generator=g, dtype=torch.float64) - 1)
    return Batch(x, y, torch.arange(n))


def searched(net, passes, *, access="gradients", constraint=None, batch=None, methods=NAMES):
    model = Classifier(net.eval())
    for weight in model.parameters():
        weight.requires_grad_(False)
    threat = ThreatModel(constraint or Linf(EPS), access=access)
    batch = examples() if batch is None else batch
    meter = Metered(model, batch, threat)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, columns = AdaptiveSearch(passes=passes, methods=methods).itemised(
            meter, batch, threat, rng=Draws(0)
        )
    return model, batch, x, columns, meter


def state(columns, name):
    return METHOD_STATES[int(columns[f"{name}.state"][0])]


@pytest.mark.parametrize("passes", [1, 3, 40, 58])
@pytest.mark.parametrize("net", [Distances, Prototypes, Noisy])
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
            self.net = Distances()

        def forward(self, x):
            logits = self.net(x)
            near = (x[:, None] - BATCH.x).abs().amax(2)
            for row, distance in enumerate(near.unbind(0)):
                for k in (distance <= EPS + 1e-9).nonzero()[:, 0].tolist():
                    value = float(margin(logits[row : row + 1].detach(), BATCH.take(torch.tensor([k]))))
                    lowest[k] = min(lowest.get(k, value), value)
            return logits

    BATCH = examples(8)
    _, batch, x, *_ = searched(Recorded(), 50, batch=BATCH)
    reached = margin(Distances()(x), batch)
    assert all(reached[k] <= lowest[k] + 1e-9 or reached[k] <= 0 for k in lowest)


@pytest.mark.parametrize("net, missing", [(Distances(), set()), (Noisy(), {"margin"})])
def test_every_applicable_method_is_tried_on_a_few_examples(net, missing, monkeypatch):
    tried = set()

    def looked(self, model, batch, threat, passes, rng, *, randomised):
        tried.add(self.name)
        assert passes >= self.cost(self.least, randomised=randomised)
        for _ in range(6):
            model(batch.x, batch.ids)
        return batch.x, 0

    monkeypatch.setattr(Method, "points", looked)
    searched(net, 3000, constraint=Linf(1e-3), batch=examples(4))
    assert tried == {*NAMES} - {"labels"} - missing


@pytest.mark.slow
def test_a_model_that_decides_hard_is_broken_by_what_needs_no_gradient():
    model, batch, x, columns, _ = searched(Prototypes(), 800)
    assert (margin(model(x), batch) > 0).double().mean() <= 0.1
    assert state(columns, "margin") in ("dropped", "not reached")
    total = sum(int(columns[f"{name}.broke"].sum()) for name in NAMES)
    assert total == int((margin(model(x), batch) <= 0).sum())


def test_the_search_from_labels_breaks_what_the_others_leave():
    model, batch, x, columns, _ = searched(Prototypes(), 300, methods=("labels",))
    assert columns["labels.broke"].all()
    assert not (margin(model(x), batch) > 0).any()


@pytest.mark.parametrize(
    "access, missing", [("scores", {"features", "margin", "expectation"}), ("labels", {"square"})]
)
def test_less_access_leaves_the_methods_that_need_no_more(access, missing):
    *_, columns, meter = searched(Prototypes(), 58, access=access)
    assert all(state(columns, name).startswith("needs") for name in missing)
    assert not meter.spent.backwards.any()


def test_under_l1_there_is_no_search_from_labels():
    *_, columns, _ = searched(Distances(), 50, constraint=L1(0.1))
    assert state(columns, "labels") == "other norm"


def test_a_small_budget_trains_no_stand_in():
    *_, columns, _ = searched(Prototypes(), 55)
    assert state(columns, "stand-in") == "too few passes"
    assert not columns["stand-in.forwards"].any()


def test_a_model_that_raises_far_from_the_data_is_searched_elsewhere():
    model, batch, x, columns, _ = searched(
        Fragile(), 120, access="labels", methods=("labels",), batch=examples(4)
    )
    assert columns["raised"].any()
    assert (margin(model(x), batch) <= 0).any()


def test_calls_that_find_which_inputs_raise_are_counted():
    class Counted(Fragile):
        calls = 0

        def forward(self, x):
            self.calls += len(x)
            return super().forward(x)

    net, batch = Counted(), examples(4)
    search = AdaptiveSearch(passes=120, methods=("labels",))
    threat = ThreatModel(Linf(EPS), access="labels")
    _, columns = search.itemised(Classifier(net.eval()), batch, threat, rng=Draws(0))
    assert columns["raised"].any()
    assert net.calls <= 120 * len(batch)


def test_an_error_of_the_inspection_of_a_model_is_none_of_inputs_far_from_the_data():
    class Detaching(nn.Module):
        def forward(self, x):
            if x.requires_grad:
                raise RuntimeError("no gradient here")
            return Distances()(x)

    batch = examples(4)
    ration = SharedBudget(Classifier(Detaching()), batch, Linf(EPS), exact=True)
    ration.begin(torch.arange(4), 10)
    ration(batch.x)
    with pytest.raises(Exception, match="no gradient here"):
        ration(batch.x.clone().requires_grad_())


@pytest.mark.parametrize("queries", [0, 1, 30])
def test_a_model_that_ends_the_queries_leaves_points_and_columns(queries):
    class Ending:
        bounds, calls = Bounds(), 0

        def __call__(self, x, ids=None):
            self.calls += 1
            if self.calls > queries:
                raise BudgetSpent("all queries are used")
            return Distances()(x)

    batch = examples(4)
    search, threat = AdaptiveSearch(passes=100), ThreatModel(Linf(EPS))
    x, columns = search.itemised(Ending(), batch, threat, rng=Draws(0))
    assert x.shape == batch.x.shape
    assert set(columns) == set(AdaptiveSearch.columns)


def test_a_model_that_raises_at_once_is_no_model_that_raises_far_from_the_data():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("never works")

    with pytest.raises(Exception, match="never works"):
        searched(Broken(), 50, batch=examples())


def test_a_model_that_answers_from_its_history_is_noticed():
    for net, noticed in ((Remembers(), True), (Distances(), False)):
        *_, columns, _ = searched(net, 40, constraint=Linf(1e-3))
        assert bool(columns["changed"].any()) is noticed


def test_the_draws_of_a_gradient_grow_with_the_noise():
    batch = examples()
    draws = [
        stable_ascent(Classifier(net), batch, Linf(EPS), 1000, 0.0, Draws(0))[1]
        for net in (Distances(), Noisy(1.0))
    ]
    assert draws[0] == FIRST
    assert draws[1] > FIRST


def test_a_search_starts_from_the_nearest_images_of_other_classes():
    model, batch = Classifier(Prototypes()), examples()
    predicted = model(batch.x).argmax(1)
    threat = ThreatModel(L2(0.1), access="labels")
    points = starts(batch, batch.x, batch.x, predicted, threat)
    assert (model(points[2]).argmax(1) != batch.y).all()
    distances = torch.cdist(batch.x, batch.x).masked_fill(predicted == batch.y[:, None], torch.inf)
    assert torch.allclose(L2().distance(points[2], batch.x), distances.amin(1))
    free = replace(threat, constraint=L2(torch.inf))
    given = HopSkipJump(queries=12).started(model, batch, free, points, rng=Draws(0))
    assert (model(given).argmax(1) != batch.y).all()
    assert (L2().distance(given, batch.x) < distances.amin(1)).all()


def test_targets_are_reached():
    batch = examples()
    batch = batch.take(batch.y != 1)
    batch = batch.towards(torch.ones_like(batch.y))
    model, batch, x, *_ = searched(Prototypes(), 300, batch=batch, constraint=Linf(0.25), methods=("labels",))
    assert (model(x).argmax(1) == 1).double().mean() > 0.9


def test_an_error_that_is_none_of_the_model_ends_the_search():
    """Such as the end of the time budget of a run."""

    class Ended(Exception):
        pass

    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            return Distances()(x)

    def model(x, ids=None):
        if net.calls > 20:
            raise Ended
        return net(x)

    net, batch = Slow(), examples()
    model.bounds = Bounds()
    with pytest.raises(Ended):
        AdaptiveSearch(passes=100)(model, batch, ThreatModel(Linf(1e-3)), rng=Draws(0))
