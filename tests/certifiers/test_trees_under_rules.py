"""Monotone tree ensembles are certified against attackers who only increase columns, at every budget."""

import numpy as np
import pytest
import torch

from holdfast.attacks import ColumnSearch
from holdfast.certifiers.tree_ensembles import Trees
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.threat import ThreatModel
from holdfast.io.models.models import Declared
from holdfast.settings.table_rules import rules_from
from holdfast.threats.tables import Table

pytest.importorskip("sklearn")
pytest.importorskip("veritas")

NAMES = ("a", "b", "c")


def table(changes=("up", "up", "none"), eps=1.0):
    columns = {
        name: {"min": 0, "max": 1, "change": change} for name, change in zip(NAMES, changes, strict=True)
    }
    rules = rules_from({"columns": columns, "budget": {"eps": eps}}, "rules.yaml")
    return Table("rules.yaml", rules.content, eps)


def fitted(*, monotone, order=NAMES):
    """A boosted ensemble on a frame whose columns have another order than the rules."""
    import pandas as pd
    from sklearn.ensemble import HistGradientBoostingClassifier

    x = np.random.default_rng(0).random((300, 3)).astype(np.float32)
    y = (x @ [1.0, 0.7, -0.4] + 0.3 * np.sin(9 * x[:, 0]) > 0.7).astype(int)
    constraint = {"a": 1, "b": 1} if monotone else None
    estimator = HistGradientBoostingClassifier(max_iter=25, monotonic_cst=constraint, random_state=0)
    estimator.fit(pd.DataFrame(x, columns=list(NAMES))[list(order)], y)
    return estimator, Batch(torch.from_numpy(x[:80]), torch.from_numpy(y[:80]), torch.arange(80))


@pytest.mark.parametrize("order", [NAMES, ("c", "a", "b")])
def test_a_monotone_ensemble_keeps_the_class_that_only_increases(order):
    estimator, batch = fitted(monotone=True, order=order)
    model = Declared(rules=table().rules).wrap(estimator)
    batch = batch.take(model(batch.x).argmax(1) == batch.y)
    proofs = Trees().ready(model, batch, ThreatModel(table()))(batch)
    assert torch.equal(proofs.certified, batch.y == 1)
    x_adv = ColumnSearch()(model, batch, ThreatModel(table()), rng=Draws(0))
    broken = model(x_adv).argmax(1) != batch.y
    assert broken.any() and not (broken & proofs.certified).any()


def test_other_ensembles_and_directions_are_not_certified():
    estimator, batch = fitted(monotone=False)
    model = Declared(rules=table().rules).wrap(estimator)
    assert not Trees().ready(model, batch, ThreatModel(table()))(batch).certified.any()
    for changes in (("up", "down", "none"), ("any", "none", "none")):
        with pytest.raises(UsageError, match="only increase, or only decrease"):
            Trees().ready(model, batch, ThreatModel(table(changes)))
