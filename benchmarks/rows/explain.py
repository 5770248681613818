"""`holdfast explain`: attributions beside Captum, closed forms, completeness, counterfactuals, and its cost."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.networks import present
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.tables import TABLES, correct_examples, drafted_rules, follows, path_of
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Constraint, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.explanation.case import About
from holdfast.explanation.counterfactual import (
    changes,
    counterfactual,
    gradient,
    integrated_gradients,
    occlusion,
    smooth_gradient,
)
from holdfast.explanation.example import explain_example
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.models.models import Declared, open_model
from holdfast.runs.harness.target import PreparedModel, prepared
from holdfast.threats.tables import Table

WHAT = "explanations: attributions beside Captum, closed forms, completeness, counterfactuals and cost"
N, COMPARED, COMPLETE = 30, 8, 50
"""examples of each counterfactual, of the comparison with Captum, and of the completeness gap"""
TABLE, TRAINING, EPS = "credit_default", 4000, 0.1


def measured() -> Outcome:
    notes: list[str] = []
    claims = [*_beside_captum(notes), *_closed_forms(), *_completeness()]
    table: list[Cells] = []
    forbidden, unverified = 0, 0
    for name, target, batch, constraint, allows in _cases(notes):
        with target as prepared_target:
            counts = _counterfactuals(prepared_target, batch, constraint, allows)
        table.append({"data": name, "examples": len(batch), **counts})
        forbidden += counts["forbidden"]
        unverified += counts["shown"] - counts["confirmed"]
    claims += [
        Claim("counterfactuals that the model does not confirm <= 0", unverified, 0),
        Claim("forbidden changes <= 0", forbidden, 0),
        Claim("data sets with counterfactuals, one of them a table >= 3", len(table), 3, least=True),
        *_cost(notes),
    ]
    config: Cells = {"counterfactuals": N, "compared": COMPARED, "complete": COMPLETE, "seed": 0}
    return Outcome(table, claims, config, notes=notes)


def _digits(n: int) -> Batch:
    data = open_data("mnist-mini", n=n, expected=DeclaredData(layout="chw", lenient=True))
    return data.read(0, n)


def _beside_captum(notes: list[str]) -> list[Claim]:
    """The largest differences to Captum, as a fraction of the largest attribution."""
    try:
        attr = peer("captum.attr")
    except Absent as why:
        notes.append(str(why))
        return []
    model = open_model("mnist-cnn").model.eval().requires_grad_(requires_grad=False)
    x = _digits(COMPARED).x
    classes, zero = model(x).argmax(1), torch.zeros_like(x)
    noise = 0.1 * torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(0))
    saliency = attr.Saliency(model)
    captum_smooth = torch.stack(
        [saliency.attribute((x + each).requires_grad_(), classes, abs=False) for each in noise]
    ).mean(0)
    pairs = {
        "gradient": (
            gradient(model, x, classes),
            saliency.attribute(x.clone().requires_grad_(), classes, abs=False),
        ),
        "SmoothGrad": (smooth_gradient(model, x, classes, noise), captum_smooth),
        "integrated gradients": (
            integrated_gradients(model, x, zero, classes, nodes=50).values,
            attr.IntegratedGradients(model).attribute(x, zero, classes, n_steps=50, method="gausslegendre"),
        ),
        "occlusion": (
            occlusion(model, x, zero, classes, (1, 4, 4), (1, 3, 3)),
            attr.Occlusion(model).attribute(x, (1, 4, 4), (1, 3, 3), zero, classes),
        ),
    }
    return [
        Claim(
            f"relative difference of {name} to Captum <= 1e-5",
            float((a - b).abs().max() / b.abs().max()),
            1e-5,
        )
        for name, (a, b) in pairs.items()
    ]


def _closed_forms() -> list[Claim]:
    """Errors of the attributions and the counterfactual of a linear model, whose values are known."""
    random = torch.Generator().manual_seed(0)
    w, x, start = (torch.randn(1, 20, generator=random, dtype=torch.float64) for _ in range(3))
    bias = -float((w * x).sum()) + 1.5
    layer = nn.Linear(20, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.cat((torch.zeros_like(w), w)))
        layer.bias.copy_(torch.tensor([0.0, bias], dtype=torch.float64))
    model = Classifier(layer, bounds=Bounds(-100.0, 100.0)).eval()
    batch = Batch(x, torch.tensor([1]), torch.tensor([0]))
    exact = x - ((w * x).sum() + bias) * w / (w * w).sum()
    with prepared(model, batch) as target:
        one = torch.tensor([1])
        errors = {
            "gradient": gradient(model, x, one) - w,
            "integrated gradients": integrated_gradients(model, x, start, one).values - w * (x - start),
        }
        found = counterfactual(target, batch, ThreatModel(L2(10.0)), rng=Draws(0)).nearest
        errors["counterfactual"] = torch.full_like(x, torch.inf) if found is None else found - exact
    return [
        Claim(f"linear model: error of the {name} <= 1e-6", float(error.abs().max()), 1e-6)
        for name, error in errors.items()
    ]


def _completeness() -> list[Claim]:
    """The largest completeness gap over some images, for both bundled networks."""
    x = _digits(COMPLETE).x
    claims = []
    for name in ("mnist-cnn", "mnist-cnn-hardened"):
        model = open_model(name).model.eval().requires_grad_(requires_grad=False)
        result = integrated_gradients(model, x, torch.zeros_like(x), model(x).argmax(1))
        claims.append(Claim(f"{name}: largest completeness gap < 0.01", float(result.gap.max()), 0.01))
    return claims


Allows = Callable[[Tensor, Tensor], bool]
"""function of a changed and a clean input"""
Case = tuple[str, AbstractContextManager[PreparedModel], Batch, Constraint, Allows]
"""name, prepared model, examples, constraint, and a check of a change that does not use the code of the package"""


def _cases(notes: list[str]) -> Iterator[Case]:
    """The data sets on which counterfactuals are searched for."""

    def in_ball(after: Tensor, before: Tensor) -> bool:
        small = bool((after - before).abs().max() <= 0.1 + 1e-6)
        return small and bool((after >= 0).all() and (after <= 1).all())

    digits = _digits(N)
    yield "mnist-mini", prepared(open_model("mnist-cnn").model, digits), digits, Linf(0.1), in_ball
    try:
        model, clothes = _small_network("fashion-mnist")
        yield "fashion-mnist", prepared(model, clothes), clothes, Linf(0.1), in_ball
    except Exception as why:  # noqa: BLE001  the data are absent
        notes.append(f"fashion-mnist: {why}")
    try:
        yield _table()
    except (Absent, ImportError) as why:
        notes.append(f"{TABLE}: {why}")


def _small_network(name: str) -> tuple[Classifier, Batch]:
    """A small network that is trained for one pass over 6,000 images, and test images that it classifies correctly."""
    expected = DeclaredData(layout="chw", lenient=True)
    train = open_data(name, split="train", n=6000, expected=expected).read(0, 6000)
    test = open_data(name, split="test", n=4 * N, expected=expected).read(0, 4 * N)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(train.x[0].numel(), 64), nn.ReLU(), nn.Linear(64, 10))
    _fit(net, train.x, train.y)
    model = Classifier(net).eval()
    return model, test.take(model(test.x).argmax(1) == test.y).first(N)


def _fit(net: nn.Module, x: Tensor, y: Tensor) -> None:
    optimiser = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(3):
        for rows in torch.split(torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), 64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()


def _table() -> Case:
    import pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier

    from holdfast.settings.table_rules import rules_from

    content, (label, drop) = drafted_rules(TABLE), TABLES[TABLE]
    rules, path = rules_from(content, TABLE), path_of(TABLE)
    frame = pd.read_csv(path)
    frame = frame[frame.split == "train"].drop(columns="split") if "split" in frame else frame
    frame = frame.sample(TRAINING, random_state=0)
    estimator = HistGradientBoostingClassifier(max_iter=60, random_state=0)
    estimator.fit(frame.drop(columns=[label, *drop]), frame[label])
    model = Declared(rules=rules).wrap(estimator)
    batch = correct_examples(path, label, drop, rules, model, 2 * N).first(N)

    def allows(after: Tensor, before: Tensor) -> bool:
        return follows(content, after.flatten().tolist(), before.flatten().tolist())

    return TABLE, prepared(model, batch), batch, Table(TABLE, rules.content, EPS), allows


def _counterfactuals(
    target: PreparedModel, batch: Batch, constraint: Constraint, allows: Allows
) -> dict[str, int]:
    """Counts of the counterfactuals inside the constraint, confirmed by the model, and of forbidden changes."""
    predicted = target.original(batch.x).argmax(1)
    counts = {"inside": 0, "shown": 0, "confirmed": 0, "forbidden": 0, "values": 0, "values changed": 0}
    access = target.original.access
    for row in range(len(batch)):
        one = batch.take(torch.tensor([row])).labelled(predicted[row : row + 1])
        found = counterfactual(target, one, ThreatModel(constraint, access=access), rng=Draws(0))
        if found.shown is None or not found.inside:
            continue
        counts["inside"] += 1
        for point in (found.nearest, found.sparse):
            if point is None:
                continue
            counts["shown"] += 1
            counts["confirmed"] += int(margin(target.original(point), one)[0] <= 0)
            inside = bool(allowed(constraint, point, one.x, target.original.bounds)[0])
            counts["forbidden"] += int(not inside or not allows(point[0], one.x[0]))
        counts["values"] += one.x[0].numel()
        counts["values changed"] += int(changes(found.shown, one.x).sum())
    return counts


def _cost(notes: list[str]) -> list[Claim]:
    """CPU seconds of an explanation of one example after the import, the largest of each network and three images."""
    digits = _digits(200)
    settings: list[tuple[str, Classifier, Batch, float]] = [
        (name, open_model(name).model, digits, 0.1) for name in ("mnist-cnn", "mnist-cnn-hardened")
    ]
    for net, x, y in present([("cifar_resnet20",)], 200, notes):
        settings.append((net.name, Classifier(net.module), Batch(x, y, torch.arange(len(y))), 1 / 255))
    claims = []
    for name, model, batch, eps in settings:
        seconds = []
        for row in (17, 40, 3):
            started = time.process_time()
            one = batch.take(torch.tensor([row]))
            with prepared(model, one) as target:
                threat, about = ThreatModel(Linf(eps)), About(name, name, f"linf:{eps:g}")
                explain_example(target, one, threat, about, rng=Draws(0), train=batch).page()
            seconds.append(time.process_time() - started)
        claims.append(Claim(f"{name}: CPU seconds of the explanation of one example <= 5", max(seconds), 5))
    return claims
