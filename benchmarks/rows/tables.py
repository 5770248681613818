"""Rules of tables: rows judged by a checker of the benchmark, and phishing pages under fourteen relations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import CAPGD, PGD, ColumnSearch, GeneticSearch
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.data.arrays import Choice
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.data.tables import open_table
from holdfast.io.models.models import Declared
from holdfast.settings.table_rules import drafted, rules_from
from holdfast.threats.table_rules import Rules
from holdfast.threats.tables import Table

WHAT = "adversarial rows of six tables, judged again by rules, and the recall of a network on phishing pages"
TABLES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "phishing_url": ("status", ("url",)),
    "adult": ("income", ()),
    "credit_default": ("default", ("ID",)),
    "credit_fraud_small": ("Class", ()),
    "clamp_pe_malware": ("class", ()),
    "nsl_kdd_train20": ("category", ("label", "difficulty")),
}
"""label and dropped columns of each table"""
ROWS, TRAINING, EPS = 150, 4000, 0.1
PHISHING_EPS = 0.5
URL_TEXT = 56
"""number of columns of the phishing table that an attacker controls with the text of the URL"""
_COUNTS = [
    "nb_dots",
    "nb_hyphens",
    "nb_at",
    "nb_qm",
    "nb_and",
    "nb_or",
    "nb_eq",
    "nb_underscore",
    "nb_tilde",
    "nb_percent",
    "nb_slash",
    "nb_star",
    "nb_colon",
    "nb_comma",
    "nb_semicolumn",
]
_IMPLIED = (
    ("nb_com", "nb_dots"),
    ("http_in_path", "nb_slash"),
    ("nb_space", "ratio_digits_url"),
    ("ip", "ratio_digits_url"),
    ("punycode", "ratio_digits_url"),
    ("abnormal_subdomain", "ratio_digits_host"),
)
_AT_MOST = (
    ({"length_hostname": 1}, 0),
    (dict.fromkeys(_COUNTS, 1) | {"nb_space": 3}, 0),
    ({"nb_www": 3, "nb_com": 4, "http_in_path": 2}, 0),
    ({"nb_www": 3}, 1),
    ({"nb_com": 4}, 1),
    ({"ip": 4}, 1),
    ({"http_in_path": 2}, 1),
)
"""weights of columns whose sum is at most the length of the URL plus a constant"""
RELATIONS = (
    *(f"if {cause} > 0 then {effect} > 0" for cause, effect in _IMPLIED),
    *(
        " + ".join(f"{weight}*{name}" for name, weight in weights.items()) + f" <= length_url + {constant}"
        for weights, constant in _AT_MOST
    ),
    "nb_external_redirection <= nb_redirection",
)
"""the relations that TabularBench intends for this table; it writes six of them so that they always hold"""


def measured() -> Outcome:
    try:
        import pandas as pd  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as why:
        raise Absent(f"{why.name} is not installed: pip install -e '.[trees]' pandas") from why
    table: list[Cells] = []
    invalid = sum(_attacked(table, name) for name in TABLES)
    left = _phishing(table)
    invalid += int(left.pop("invalid"))
    claims = [
        Claim("adversarial rows that the checker of the benchmark refuses <= 0", invalid, 0),
        Claim("recall on phishing pages, all columns <= 0.03", left["all columns"], 0.03),
        Claim(
            "recall on phishing pages, columns of the text of the URL <= 0.08", left["text of the URL"], 0.08
        ),
    ]
    return Outcome(table, claims, {"rows": ROWS, "training": TRAINING, "eps": EPS, "seed": 0})


def path_of(name: str) -> Path:
    path = folder("HOLDFAST_DATA", "data") / f"{name}.csv.gz"
    if not path.is_file():
        raise Absent(f"{path.name} is not at hand; HOLDFAST_DATA names its folder")
    return path


def drafted_rules(name: str) -> dict[str, Any]:
    """The rules that `holdfast init` drafts for a table, in which categories may change within the budget."""
    label, drop = TABLES[name]
    content: dict[str, Any] = yaml.safe_load(drafted(path_of(name), label, drop, None)[0])
    for column in content["columns"].values():
        if column.get("type") == "category":
            column["cost"] = EPS
    content["budget"] = {"norm": "linf", "eps": EPS}
    content["relations"] = list(RELATIONS) if name == "phishing_url" else []
    return content


def _attacked(table: list[Cells], name: str) -> int:
    """Add the accuracy of a boosted model under attack; return the number of invalid adversarial rows."""
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OrdinalEncoder

    content, (label, drop) = drafted_rules(name), TABLES[name]
    rules = rules_from(content, name)
    path = path_of(name)
    frame = pd.read_csv(path)
    if "split" in frame:
        frame = frame[frame.split == "train"].drop(columns="split")
    frame = frame.sample(TRAINING, random_state=0) if len(frame) > TRAINING else frame
    words = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
    encoded = ColumnTransformer([("words", words, list(rules.categories))], remainder="passthrough")
    estimator = make_pipeline(encoded, HistGradientBoostingClassifier(max_iter=60, random_state=0))
    estimator.fit(frame.drop(columns=[label, *drop]), frame[label])
    model = Declared(rules=rules).wrap(estimator)
    batch = correct_examples(path, label, drop, rules, model)
    constraint = Table(name, rules.content, EPS)
    best = batch.x
    for attack in (ColumnSearch(), GeneticSearch()):
        x_adv = attack(model, batch, ThreatModel(constraint, access="scores"), rng=Draws(0))
        lower = margin(model(x_adv), batch) < margin(model(best), batch)
        best = torch.where(lower[:, None], x_adv, best)
    broken = margin(model(best), batch) <= 0
    valid = [
        follows(content, after, before)
        for after, before in zip(best[broken].tolist(), batch.x[broken].tolist(), strict=True)
    ]
    table.append(
        {"table": name, "model": "histograms", "rows": ROWS, "clean": len(batch) / ROWS}
        | {"survive attack": int((~broken).sum()) / ROWS, "adversarial rows": len(valid), "valid": sum(valid)}
    )
    return len(valid) - sum(valid)


def correct_examples(
    path: Path, label: str, drop: tuple[str, ...], rules: Rules, model: Classifier, n: int = ROWS
) -> Batch:
    """Some rows of the test split that the model classifies correctly."""
    expected = DeclaredData(
        model.bounds,
        class_names=model.class_names,
        class_labels=model.class_labels,
        words=tuple(rules.categories),
        rules=rules,
        accepts_missing=True,
        lenient=True,
    )
    data = open_table(path, Choice(sample=n), name=path.name, label=label, drop=drop, expected=expected)
    batch = data.read(0, len(data))
    return batch.take(model(batch.x).argmax(1) == batch.y)


def follows(content: Mapping[str, Any], after: Sequence[float], before: Sequence[float]) -> bool:
    """Whether a row is a change that the drafted rules allow. Written without the code of the package."""
    named = dict(zip(content["columns"], after, strict=True))
    for (name, column), old in zip(content["columns"].items(), before, strict=True):
        new = named[name]
        if math.isnan(old) or math.isnan(new):
            if math.isnan(old) != math.isnan(new):
                return False
            continue
        if column.get("change") == "none" and new != old:
            return False
        if column.get("type") == "category":
            if new not in range(len(column["values"])):
                return False
            continue
        low, high = column.get("min", -math.inf), column.get("max", math.inf)
        slack = 1e-6 * max(1, abs(low), abs(high)) if math.isfinite(low) else 0
        if not low - slack <= new <= high + slack or (column.get("type") == "whole" and new != round(new)):
            return False
        if new != old and abs(new - old) > EPS * (high - low) * (1 + 1e-5) + slack:
            return False
    return not content["relations"] or _related(named, dict(zip(content["columns"], before, strict=True)))


def _related(row: Mapping[str, float], clean: Mapping[str, float]) -> bool:
    """Whether a row of the phishing table satisfies the relations that its clean row satisfies."""

    def verdicts(values: Mapping[str, float]) -> list[bool]:
        length = values["length_url"]
        return [
            *(values[cause] <= 0 or values[effect] > 0 for cause, effect in _IMPLIED),
            *(
                sum(weight * values[name] for name, weight in weights.items()) <= length + constant + 1e-3
                for weights, constant in _AT_MOST
            ),
            values["nb_external_redirection"] <= values["nb_redirection"],
        ]

    return all(now or not before for now, before in zip(verdicts(row), verdicts(clean), strict=True))


class _Scaled(nn.Module):
    """A network of three layers on columns that are scaled to their ranges."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.low, self.width = low, torch.where(high > low, high - low, torch.ones(()))
        self.layers = nn.Sequential(
            nn.Linear(len(low), 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers((x - self.low) / self.width)
        return logits


def _phishing(table: list[Cells]) -> dict[str, float]:
    """Add the recall of a network on phishing pages under CAPGD, and the share of valid rows of plain PGD."""
    import pandas as pd

    content = drafted_rules("phishing_url")
    content["budget"] = {"norm": "l2", "eps": PHISHING_EPS}
    path = path_of("phishing_url")
    frame = pd.read_csv(path)
    y = torch.tensor((frame.status == "phishing").to_numpy().astype(np.int64))
    x = torch.tensor(frame.drop(columns=["url", "status", "split"]).to_numpy(np.float32))
    train = torch.tensor((frame.split == "train").to_numpy())
    low, high = x.amin(0), x.amax(0)
    net = _trained(_Scaled(low, high), x[train], y[train])
    model = Classifier(net, bounds=Bounds(low, high), classes=2)
    pages = Batch(x[~train], y[~train], torch.arange(int((~train).sum())))
    pages = pages.take(pages.y == 1)
    detected = pages.take(net(pages.x).argmax(1) == 1)
    left: dict[str, float] = {}
    for name, mutable in (("all columns", len(low)), ("text of the URL", URL_TEXT)):
        columns = {
            column: properties | ({} if place < mutable else {"change": "none"})
            for place, (column, properties) in enumerate(content["columns"].items())
        }
        rules = rules_from(content | {"columns": columns}, name)
        constraint = Table(name, rules.content, PHISHING_EPS)
        x_adv = CAPGD()(model, detected, ThreatModel(constraint), rng=Draws(0))
        kept = net(x_adv).argmax(1) == 1
        valid = sum(
            _moved_within(columns, (high - low).tolist(), after, before)
            for after, before in zip(x_adv[~kept].tolist(), detected.x[~kept].tolist(), strict=True)
        )
        left[name] = int(kept.sum()) / len(pages)
        left["invalid"] = left.get("invalid", 0) + int((~kept).sum()) - valid
        table.append(
            {"table": "phishing_url", "model": f"network, CAPGD, {name}", "rows": len(pages)}
            | {"clean": len(detected) / len(pages), "survive attack": left[name]}
            | {"adversarial rows": int((~kept).sum()), "valid": valid}
        )
    _plain(table, net, detected, content, len(pages))
    return left


def _moved_within(
    columns: Mapping[str, Any], widths: Sequence[float], after: Sequence[float], before: Sequence[float]
) -> bool:
    """Whether a row of the phishing table is a change within the L2 budget that the rules allow."""
    length = 0.0
    for column, width, new, old in zip(columns.values(), widths, after, before, strict=True):
        fixed = column.get("change") == "none" and new != old
        fraction = column["type"] == "whole" and new != round(new)
        slack = 1e-6 * max(1.0, abs(column["max"]))
        if fixed or fraction or not column["min"] - slack <= new <= column["max"] + slack:
            return False
        length += ((new - old) / width) ** 2 if width else 0.0
    related = _related(*(dict(zip(columns, row, strict=True)) for row in (after, before)))
    return related and math.sqrt(length) <= PHISHING_EPS * (1 + 1e-4)


def _plain(table: list[Cells], net: _Scaled, detected: Batch, content: Mapping[str, Any], pages: int) -> None:
    """Add plain PGD on the scaled columns: its success, and the number of its rows that are valid."""
    scaled = Classifier(net.layers, classes=2)
    batch = detected.at((detected.x - net.low) / net.width)
    x_adv = PGD()(scaled, batch, ThreatModel(L2(PHISHING_EPS)), rng=Draws(0)) * net.width + net.low
    broken = net(x_adv).argmax(1) == 0
    whole = torch.tensor([column.get("type") == "whole" for column in content["columns"].values()])
    valid = ((x_adv == x_adv.round()) | ~whole).all(1) & torch.tensor(
        [
            _related(*(dict(zip(content["columns"], row, strict=True)) for row in pair))
            for pair in zip(x_adv.tolist(), detected.x.tolist(), strict=True)
        ]
    )
    table.append(
        {
            "table": "phishing_url",
            "model": "network, plain PGD",
            "rows": pages,
            "clean": len(detected) / pages,
        }
        | {"survive attack": int((~broken).sum()) / pages}
        | {"adversarial rows": int(broken.sum()), "valid": int((valid & broken).sum())}
    )


def _trained(net: _Scaled, x: Tensor, y: Tensor) -> _Scaled:
    torch.manual_seed(0)
    for layer in net.layers:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(30):
        for rows in torch.split(torch.randperm(len(x)), 128):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return net.requires_grad_(False).eval()
