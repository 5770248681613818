"""Counterfactuals: closed forms, constraints, and what is returned if none is found."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from holdfast.core.batch import Batch, decoded, encoded
from holdfast.core.constraints import L0, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.explanation.counterfactual import counterfactual
from holdfast.io.models.models import open_model
from holdfast.runs.harness.target import prepared
from holdfast.settings.table_rules import rules_from
from holdfast.threats.tables import Table
from holdfast.threats.text_edits import TextEdits


def one(model, x, threat, **others):
    batch = Batch(x, model(x).argmax(1), torch.tensor([0]))
    with prepared(model, batch) as target, torch.enable_grad():
        return counterfactual(target, batch, threat, rng=Draws(0), **others), batch


def test_the_counterfactual_of_a_linear_model_is_its_projection():
    random = torch.Generator().manual_seed(0)
    w, x = (torch.randn(1, 12, generator=random, dtype=torch.float64) for _ in range(2))
    bias = 1.2 - float((w * x).sum())
    layer = nn.Linear(12, 2).double()
    with torch.no_grad():
        layer.weight.copy_(torch.cat((torch.zeros_like(w), w)))
        layer.bias.copy_(torch.tensor([0.0, bias]))
    model = Classifier(layer, bounds=Bounds(-50.0, 50.0)).eval()
    found, _ = one(model, x, ThreatModel(L2(5.0)))
    exact = x - ((w * x).sum() + bias) * w / (w * w).sum()
    assert torch.allclose(found.nearest, exact, atol=1e-6)
    assert found.inside
    assert found.predicted == 0


@pytest.mark.parametrize("constraint", [Linf(0.3), L2(3.0), L0(60.0)])
def test_a_counterfactual_is_inside_the_constraint_and_changes_the_class(constraint):
    from holdfast.io.data.data import open_data
    from holdfast.io.data.layouts import DeclaredData

    x = open_data("mnist-mini", n=1, expected=DeclaredData(layout="chw", lenient=True)).read(0, 1).x
    model = open_model("mnist-cnn").model
    found, batch = one(model, x, ThreatModel(constraint))
    assert found.inside
    assert found.nearest is not None
    assert found.sparse is not None or constraint.name == "l0"  # its change has the fewest values already
    for point in (found.nearest, found.shown):
        assert bool(allowed(constraint, point, batch.x, model.bounds)[0])
        assert int(model(point).argmax(1)) != int(batch.y[0])
    assert (found.shown != x).sum() <= (found.nearest != x).sum()


def test_none_is_found_for_a_constant_model():
    model = Classifier(lambda x: torch.stack((x.sum(1) * 0 + 1, x.sum(1) * 0), 1))
    found, _ = one(model, torch.rand(1, 4), ThreatModel(Linf(0.1)))
    assert found.nearest is None
    assert found.shown is None
    assert not found.inside
    assert found.attack


def test_without_gradients_labels_are_used():
    model = Classifier(lambda x: torch.stack((x.sum(1), 2 - x.sum(1)), 1), access="scores")
    found, _ = one(model, torch.full((1, 4), 0.3), ThreatModel(Linf(0.5), access="scores"))
    assert found.inside
    assert found.distance == pytest.approx(0.05, abs=0.005)


def test_rules_of_a_table_are_kept():
    content = {
        "columns": {
            "age": {"type": "whole", "min": 0, "max": 100, "change": "none"},
            "amount": {"type": "number", "min": 0, "max": 10},
            "paid": {"type": "number", "min": 0, "max": 10},
        },
        "relations": ["paid <= amount"],
        "budget": {"norm": "linf", "eps": 0.5},
    }
    rules = rules_from(content, "rules")
    model = Classifier(
        lambda x: torch.stack((x[:, 1] + x[:, 2] + x[:, 0], x[:, 0] + 0 * x[:, 1] + 8.0), 1),
        bounds=Bounds(0.0, 100.0),
        access="scores",
    )
    constraint = Table("rules", rules.content, 0.5)
    x = torch.tensor([[30.0, 3.0, 2.0]])
    found, batch = one(model, x, ThreatModel(constraint, access="scores"))
    assert found.shown is not None
    assert bool(allowed(constraint, found.shown, batch.x, model.bounds)[0])
    assert float(found.shown[0, 0]) == 30
    assert float(found.shown[0, 2]) <= float(found.shown[0, 1])
    assert int(model(found.shown).argmax(1)) == 0


def test_words_of_a_text_are_undone():
    def logits(x):
        return torch.tensor([[float("prize" in text), 0.5] for text in decoded(x)])

    model = Classifier(logits, bounds=Bounds(0.0, 2.0**21), access="scores")
    x = encoded(["you win a prize today"], 40)
    threat = ThreatModel(TextEdits(edits=1, words=3), access="scores")
    found, batch = one(model, x, threat)
    assert found.sparse is not None
    old, new = (decoded(each)[0].split(" ") for each in (batch.x, found.sparse))
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 1


def test_a_stored_input_is_used():
    model = Classifier(
        lambda x: torch.stack((x.sum(1).detach(), 1.9 - x.sum(1).detach()), 1), access="scores"
    )
    x = torch.full((1, 4), 0.3)
    stored = torch.full((1, 4), 0.5)
    threat = replace(ThreatModel(L0(4.0)), access="scores")
    found, _ = one(model, x, threat, stored=stored)
    assert found.inside


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("kind", ["number", "whole"])
def test_the_change_of_a_row_under_rules_is_minimal(norm, kind):
    columns = {name: {"type": kind, "min": 0, "max": 100} for name in ("amount", "days")}
    rules = rules_from({"columns": columns, "budget": {"norm": norm, "eps": 0.5}}, "rules")
    weights = torch.tensor([1.0, 0.4])
    net = nn.Linear(2, 2)
    net.weight.data, net.bias.data = torch.stack([-weights, weights]), torch.tensor([69.7, -69.7])
    model = Classifier(net, bounds=Bounds(0.0, 100.0))
    for row in ([56.0, 43.0], [63.0, 30.0], [40.0, 60.0]):
        x = torch.tensor([row])
        found, _ = one(model, x, ThreatModel(Table("rules", rules.content, 0.5)))
        margin = float((x[0] * weights).sum() - 69.7)
        exact = abs(margin) / float(weights.max() if norm == "l1" else weights.sum()) / 100
        assert found.inside and not torch.equal(model(found.nearest).argmax(1), model(x).argmax(1))
        assert exact - 1e-6 <= found.distance <= 1.02 * exact + (0.011 if kind == "whole" else 0)
        assert float(Table("rules", rules.content, 0.5).distance(found.shown, x)[0]) == found.distance
