"""Plugin for pytest with the fixture `assert_robust`, which fails a test if a model is not robust enough.

    def test_holds(assert_robust):
        assert_robust(model, (x, y), threat="linf:8/255", at_least=0.4)

It does not slow down the start of pytest, because torch is imported in the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from holdfast.attacks.protocol import Attack
    from holdfast.gates.judging import Judgement
    from holdfast.runs.assess.result import Result
    from holdfast.verbs.opening.arguments import DataLike, ModelLike

_SHOWN = 10  # number of broken examples that a message lists


@pytest.fixture(name="assert_robust")
def _assert_robust() -> Callable[..., Result]:
    """`assert_robust(model, data, threat="linf:8/255", at_least=0.5)` fails unless the model is that robust."""
    return assert_robust


def assert_robust(
    model: ModelLike,
    data: DataLike,
    *,
    threat: str,
    at_least: float,
    suite: str | Sequence[Attack] = "quick",
    n: int | None = None,
    seed: int = 0,
    bounds: Sequence[float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    accept_doubts: Mapping[str, str] | None = None,
) -> Result:
    """Assess a model in a test, and raise `AssertionError` unless the whole confidence interval of its robust accuracy
    is at or above `at_least`.

    It is also raised if a doubt is neither answered nor accepted. The arguments are those of `holdfast.assess`, whose
    result is returned. An unclear verdict fails too; the message states whether more examples or the acceptance of a
    doubt could change it.
    """
    from holdfast.verbs.functions import assess

    __tracebackhide__ = True  # pytest then shows the line of the test
    claim = f"robust_accuracy >= {at_least!r}"
    result = assess(
        model,
        data,
        threat,
        suite,
        gates=[claim],
        n=n,
        seed=seed,
        bounds=bounds,
        mean=mean,
        std=std,
        accept_doubts=accept_doubts,
    )
    (judgement,) = result.gates
    if judgement.verdict != "pass":
        raise AssertionError("\n".join(_message(result, judgement, threat)))
    return result


def _message(result: Result, judgement: Judgement, threat: str) -> list[str]:
    """Lines with the value and its interval, the attacks, the broken examples and the open doubts."""
    evidence, clean = result.evidence, result.metrics["clean_accuracy"]
    lines = [
        f"robust accuracy under {threat} is {judgement.because} ({judgement.verdict})",
        f"clean accuracy: {clean.value:.4g}",
    ]
    for record in evidence.attacks:
        n_broken = record.surviving_before - record.surviving_after
        lines.append(
            f"{record.name}: broke {n_broken} of the {record.surviving_before} that survived the attacks before"
        )
    broken = evidence["id"][evidence["success"]].tolist()
    if broken:
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        lines.append(f"broken examples: {', '.join(map(str, broken[:_SHOWN]))}{more}")
    for doubt in evidence.doubts:
        if doubt.name in judgement.open_doubts:
            lines.append(f"doubt {doubt.name}: {doubt.message}")
            lines.append(f"  to accept it: accept_doubts={{{doubt.name!r}: 'why'}}")
    if judgement.verdict == "unclear" and judgement.estimate.low < judgement.claim.bound:
        lines.append(f"more examples than {judgement.estimate.n} narrow the interval")
    return lines
