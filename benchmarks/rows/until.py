"""Runs that end as soon as a gate is decided: examples that they need, and decisions that are wrong.

Every example of a setting is attacked once. The gates are placed beside the share of robust examples, and the rule of
`assess --until` is replayed on the verdicts in random orders of the examples. One run of the command itself for each
setting shows whether it finds on its examples what the run on all examples finds there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median, quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.absent import Absent
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome

WHAT = "`assess --until`: examples attacked until a gate is decided, and wrong decisions"
N, REPEATS, SUITE = 1000, 200, "fast"
NEAR, FAR = 0.1, 0.2
"""distances of the gates from the share of robust examples"""


@dataclass(frozen=True)
class Setting:
    """A network and a threat model under which some examples are robust and others are not."""

    network: str
    threat: str


SETTINGS = (
    Setting("mnist-cnn", "linf:0.06"),
    Setting("mnist-cnn", "linf:0.1"),
    Setting("mnist-cnn", "l2:1"),
    Setting("cifar_cnn_a_adv", "linf:2/255"),
)


def measured() -> Outcome:
    """The replayed gates of all settings whose network and images are there."""
    table, attacked, wrong, undecided, agreement, notes = (
        [],
        list[float](),
        list[float](),
        0,
        list[float](),
        [],
    )
    detail: Cells = {}
    for setting in SETTINGS:
        name = f"{setting.network} {setting.threat}"
        try:
            found = part("until", name, partial(_measured, setting))
        except Absent as why:
            notes.append(f"{name}: {why}")
            continue
        detail[name] = found
        verdicts = np.array([letter == "." for letter in found["measured"]["all"]])
        agreement.append(_differing(verdicts, found["measured"]["until"]))
        for condition in _gates(verdicts.mean()):
            sizes, verdict_of_run = zip(
                *(_replayed(condition, verdicts, k) for k in range(REPEATS)), strict=True
            )
            truth = "pass" if _holds(condition, verdicts.mean()) else "fail"
            undecided += verdict_of_run.count("unclear")
            wrong.append(sum(verdict not in (truth, "unclear") for verdict in verdict_of_run) / REPEATS)
            attacked += [size / N for size in sizes]
            table.append(
                {
                    "setting": name,
                    "robust, %": 100 * verdicts.mean(),
                    "gate": condition,
                    "decision": truth,
                    "attacked, % (median)": 100 * median(sizes) / N,
                    "attacked, % (mean)": 100 * mean(sizes) / N,
                    "attacked, % (9 of 10 runs)": 100 * quantiles(sizes, n=10)[-1] / N,
                    "wrong, %": 100 * wrong[-1],
                }
            )
    claims = [
        Claim("gates", len(table), 12, least=True),
        Claim("examples attacked, median over all runs <= 25 %", 100 * median(attacked or [1]), 25),
        Claim("examples attacked, mean over all runs <= 25 %", 100 * mean(attacked or [1]), 25),
        Claim("wrong decisions, largest share of a gate <= 5 %", 100 * max(wrong, default=1), 5),
        Claim("runs without a decision after all examples <= 0", undecided, 0),
        Claim(
            "robust accuracy on the examples of a run with --until, beside the run on all, points <= 1",
            100 * max(agreement, default=1),
            1,
        ),
    ]
    config = {
        "n": N,
        "repeats": REPEATS,
        "suite": SUITE,
        "settings": [vars(s) for s in SETTINGS],
        "distances": [NEAR, FAR],
    }
    return Outcome(table, claims if table else [], config, detail, notes)


def _measured(setting: Setting) -> Cells:
    """The verdict of each example in a run on all, `.` where it is robust, and those of a run with `until` by id."""
    import holdfast

    net = network(setting.network)
    data = images(net.data, N)
    measure = partial(holdfast.assess, net.module, data, setting.threat, SUITE, doubts=False)
    whole = measure()
    robust = whole["robust_accuracy"].value
    ended = measure(until=f"robust_accuracy >= {robust - 0.1:.2f}")
    assert whole.evidence["id"].tolist() == list(range(N))
    rows = zip(ended.evidence["id"].tolist(), _robust(ended), strict=True)
    return {"all": "".join(".x"[not stands] for stands in _robust(whole)), "until": dict(rows)}


def _gates(share: float) -> tuple[str, ...]:
    """Two gates near the share, above and below, and one that is farther towards the middle."""
    far = share + FAR if share < 0.5 else share - FAR
    bounds = ((">=", share + NEAR), (">=", share - NEAR), ("<=", far))
    return tuple(f"robust_accuracy {relation} {bound:.2f}" for relation, bound in bounds)


def _robust(result: Any) -> list[bool]:
    stands: list[bool] = (result.evidence["correct"] & ~result.evidence["success"]).tolist()
    return stands


def _differing(verdicts: NDArray[np.bool_], until: dict[str, bool]) -> float:
    """Difference of the shares of robust examples on the examples of a run with `until`."""
    ids = [int(name) for name in until]
    return float(abs(verdicts[ids].mean() - mean(until.values())))


def _holds(condition: str, share: float) -> bool:
    from holdfast.gates.grammar import parse_until

    claim = parse_until(condition)
    return share >= claim.bound if claim.relation == ">=" else share <= claim.bound


def _replayed(condition: str, verdicts: NDArray[np.bool_], seed: int) -> tuple[int, str]:
    """Number of examples, and the decision, of the rule of the command in a random order of the examples."""
    from holdfast.core.estimate import Estimate
    from holdfast.gates.grammar import look_sizes, parse_until
    from holdfast.gates.judging import Doubts, judged_estimate, sequential

    claim, ordered = parse_until(condition), np.random.default_rng(seed).permutation(verdicts)
    sizes: Sequence[int] = look_sizes(len(verdicts))
    for n in sizes:
        estimate = sequential(Estimate(float(ordered[:n].mean()), 0.0, 1.0, n))
        verdict = judged_estimate(claim, estimate, Doubts()).verdict
        if verdict != "unclear":
            break
    return n, verdict
