"""Evidence made up for the reports' tests: plausible, seeded, of any size."""

import contextlib
import math

import torch

from holdfast.core.constraints import Linf
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import AttackRecord, Cost, Doubt, Evidence, Residual, Table
from holdfast.core.threat import ThreatModel
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Doubts, Judgement, judge
from holdfast.metrics.catalogue import estimate
from holdfast.metrics.shares import Absent
from holdfast.reports.formats import html
from holdfast.reports.run import run_report
from holdfast.reports.summary import summary
from holdfast.reports.terminal import body, verdict
from holdfast.reports.write import rendered

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

STAGES = (
    ("APGD-CE", 0.58, Cost(100_000, 100_000, 100_000, 41.0, 22.1)),
    ("APGD-T", 0.44, Cost(361_800, 361_800, 361_800, 155.0, 80.4)),
    ("FAB-T", 0.425, Cost(396_000, 396_000, 396_000, 170.0, 88.0)),
    ("Square", 0.415, Cost(2_113_000, 0, 2_113_000, 420.5, 214.8)),
)


def tables(**columns):
    """Tables of evidence by name, from their columns."""
    return {name: Table("row", of_table) for name, of_table in columns.items()}


def evidence(
    n: int = 1000, *, seed: int = 0, classes=CLASSES, image: bool = True, gallery: int = 6, **changes
) -> Evidence:
    g = torch.Generator().manual_seed(seed)
    k = len(classes)
    y = torch.randint(k, (n,), generator=g)
    toughness = torch.rand(n, generator=g) + 0.02 * (y - k / 2)
    rank = toughness.argsort(descending=True).argsort().double() / max(n, 1)
    correct = rank < 0.985
    broken_by = torch.full((n,), -1)
    before = 0.985
    for place, (_, after, _) in enumerate(STAGES):
        broken_by[(rank < before) & (rank >= after)] = place
        before = after
    success = broken_by >= 0
    wrong = (y + 1 + torch.randint(k - 1, (n,), generator=g)) % k
    prediction = torch.where(correct, y, wrong)
    distance = torch.where(correct, 0.34 - 0.3 * rank**1.5 + 0.04 * toughness, 0.0)
    first = torch.where(
        success, (1 + 5000 * torch.rand(n, generator=g) ** 6 * (1 + broken_by.clamp_min(0))).long(), 0
    )
    infinite = torch.where(success, 0.2, torch.where(correct, math.inf, 0.0))
    columns = {
        "id": torch.arange(n),
        "y": y,
        "digest": torch.randint(256, (n, 32), generator=g).to(torch.uint8),
        "prediction": prediction,
        "margin": torch.where(correct, 1.0, -1.0) * toughness,
        "correct": correct,
        "success": success,
        "broken_by": broken_by,
        "adversarial_prediction": torch.where(success, wrong, prediction),
        "distance_linf": infinite,
        "distance_l2": infinite * 9,
        "distance_l1": infinite * 90,
        "distance_l0": infinite * 2000,
        "queries": torch.where(success, first, 8000),
        "first_success": first,
        "distance": distance,
    }
    attacks, surviving = [], int(correct.sum())
    for place, (name, _, cost) in enumerate(STAGES):
        left = surviving - int((broken_by == place).sum())
        settings = {"steps": 100, "restarts": 1, "loss": name.lower(), "eot": None}
        notes = ("DLR needs three classes; the margin stands in for it",) if name == "APGD-T" else ()
        risk = Residual(left - 32, 0.089) if name == "Square" and left > 32 else None
        attacks.append(
            AttackRecord(f"{place + 1}-{name.lower()}", name, settings, surviving, left, cost, notes, risk)
        )
        surviving = left
    shape = (1, 28, 28) if image else (12,)
    shown = success.nonzero()[:gallery, 0]
    x = _digits(len(shown), g) if image else torch.rand((len(shown), *shape), generator=g)
    noise = 0.2 * torch.randint(0, 2, x.shape, generator=g).float().mul(2).sub(1)
    standard = {
        "columns": columns,
        "threat": ThreatModel(Linf(0.2)),
        "suite": "standard@1",
        "attacks": tuple(attacks),
        "seed": seed,
        "doubts": DOUBTS,
        "model": {
            "name": "mnist-cnn-hardened",
            "how": "bundled",
            "digest": "ab" * 32,
            "parameters": 166_406,
            "bounds": [0.0, 1.0],
        },
        "data": {
            "name": "mnist-mini",
            "classes": list(classes),
            "digest": "cd" * 32,
            "split": "test",
            "licence": "CC BY-SA 3.0",
        },
        "notes": (),
        "cost": Cost(3_100_000, 900_000, 3_000_000, 800.0, 412.0),
        "doubts_cost": Cost(38_400, 19_200, 38_400, 20.0, 11.0),
        "tables": tables(gallery={"id": columns["id"][shown], "x": x, "x_adv": (x + noise).clamp(0, 1)}),
    }
    return Evidence(**(standard | changes))


def _digits(n: int, g: torch.Generator) -> torch.Tensor:
    """Strokes on black, soft as a scanned digit's."""
    rough = (torch.rand((n, 1, 28, 28), generator=g) > 0.93).float()
    rough[:, :, :5] = rough[:, :, -5:] = rough[:, :, :, :5] = rough[:, :, :, -5:] = 0
    return torch.nn.functional.avg_pool2d(rough, 3, 1, 1).mul(3).clamp(0, 1)


DOUBTS = (
    Doubt("zero-gradient", "clear", 0.0, 0.01, 128, "0 of 128 examples have a gradient of zero or NaN."),
    Doubt("probabilities", "clear", 0.0, 0.5, 128, "The outputs are not probabilities."),
    Doubt(
        "black-box",
        "raised",
        0.041,
        0.02,
        128,
        "Square alone breaks 4.1 points more than PGD-40 alone (p = 0.002).",
    ),
    Doubt("noise", "clear", 0.0, 0.005, 128, "100 draws broke 0 of 53 surviving examples."),
    Doubt("transfer", "not measured", None, None, 0, "No surrogate was declared."),
    Doubt("state", "not applicable", None, None, 0, ""),
)


def judged(made: Evidence, *claims: str, accepted: dict[str, str] | None = None) -> list[Judgement]:
    """Gates judged as a run judges them."""
    doubts = Doubts(made.doubts, accepted or {})
    return [judge(parse(claim), made, doubts) for claim in claims]


def summarised(made: Evidence, *claims: str, accepted: dict[str, str] | None = None) -> dict:
    """The summary that a run writes."""
    gates = judged(made, *claims, accepted=accepted)
    return summary(made, metrics=measured(made), gates=gates, accepted_doubts=accepted, run=RUN)


def measured(made: Evidence) -> dict[str, Estimate]:
    """The metrics that take no bootstrap, of those that the evidence allows."""
    found = {}
    for name in QUICK_METRICS:
        with contextlib.suppress(Absent):
            found[name] = estimate(name, made)
    return found


QUICK_METRICS = (
    "clean_accuracy",
    "robust_accuracy",
    "targeted_success_rate",
    "attack_success_rate",
    "worst_class",
    "perturbation_linf",
    "robust_margin",
    "adversarial_radius",
)


RUN = {
    "verb": "assess",
    "created": "2026-11-20T09:12:33Z",
    "folder": "holdfast-runs/20261120-091233-assess-1a2b3c",
    "command": "holdfast assess mnist-cnn-hardened mnist-mini --threat linf:0.2 --suite standard --seed 0",
    "hashes": {"config": "11" * 32, "model": "ab" * 32, "data": "cd" * 32, "chain": "ef" * 32},
    "versions": {"holdfast": "0.2.0", "python": "3.11.2", "torch": "2.13.0"},
    "hardware": "2 cores, no accelerator",
}


def report(content, suffix):
    """The report of a run in the format of a suffix, made from its summary."""
    return rendered(run_report(content), suffix)


def page(content):
    return report(content, ".html")


def markdown(content):
    return report(content, ".md")


def notebook(content):
    return html.notebook(run_report(content))


def on_terminal(content, **options):
    return body(run_report(content), **{"colour": False, **options})


def stated(content, *, colour=False):
    """The verdict of a run as text for a terminal."""
    return verdict(run_report(content), colour=colour)
