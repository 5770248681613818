"""The exhibition of masked models: the gallery, measured by a naive evaluation and by the adaptive attacks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from holdfast.attacks.suites import suite
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.names import did_you_mean
from holdfast.core.threat import ThreatModel
from holdfast.doubts.gallery import DISCRETE, ITEMS, SLOW, Item, undefended
from holdfast.io.data import data as data_sources
from holdfast.runs.assess.assess import assess as run_assessment
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.assess.result import Result
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.runs.harness.plan import DoubtsWanted, Plan, adaptive_members
from holdfast.runs.harness.stage import Member
from holdfast.verbs.configuration import DIGITS

__all__ = ["Exhibit", "exhibition"]

NAIVE = "naive@1"
"""Name of the naive evaluation: PGD-40 on the cross-entropy with ordinary autograd, which gradient masking misleads."""
SOUND = "standard"
"""Name of the suite with which the undefended model is evaluated."""


@dataclass(frozen=True)
class Exhibit:
    """The measurements of one model of the gallery: its accuracies under several evaluations, and the doubts that were
    raised.
    """

    name: str
    source: str
    eps: float
    clean_accuracy: float
    naive_robust_accuracy: float
    twin_robust_accuracy: float
    adaptive_robust_accuracy: float
    doubts: tuple[str, ...]
    """names of the doubts that the naive evaluation raised"""
    adaptive: tuple[str, ...]
    """names of the adaptive attacks that were run"""
    bypassed: tuple[str, ...]
    """the stages that the adaptive attacks bypassed, and how they did it"""
    n: int
    cpu_s: float
    """CPU time of the naive and the adaptive evaluation, in seconds"""


def exhibits(
    training: Batch,
    data: Data,
    items: Sequence[Item] = ITEMS,
    *,
    seed: int = 0,
) -> Iterator[Exhibit]:
    """Build each model of the gallery from the training digits, measure it on `data`, and yield the measurements."""
    plain, sound = undefended(training), dict[tuple[nn.Module, float], Result]()
    for item in items:
        model = item.build(training, plain)
        twin = item.twin(model) if item.twin else plain
        if (twin, item.eps) not in sound:
            members = tuple(Member(*named) for named in suite(SOUND, Linf(item.eps)).attacks)
            sound[twin, item.eps] = assessed_net(twin, data, item.eps, members, seed=seed)
        naive = assessed_net(model, data, item.eps, (FIXED,), seed=seed)
        adaptive = assessed_net(model, data, item.eps, (FIXED,), seed=seed, doubts="all", adaptive=True)
        ran = adaptive.attacks[1:]
        yield Exhibit(
            item.name,
            item.source,
            item.eps,
            naive.metrics["clean_accuracy"].value,
            naive.metrics["robust_accuracy"].value,
            sound[twin, item.eps].metrics["robust_accuracy"].value,
            adaptive.metrics["robust_accuracy"].value,
            raised(adaptive),
            tuple(record.name for record in ran),
            tuple(note for record in ran[:1] for note in record.notes[1:]),
            len(data),
            naive.cost.cpu_s + adaptive.cost.cpu_s,
        )


def raised(result: Result) -> tuple[str, ...]:
    """Return the names of the doubts that an assessment raised, including those that an adaptive attack answered."""
    return tuple(doubt.name for doubt in result.doubts if doubt.state in ("raised", "answered"))


def assessed_net(
    net: nn.Module,
    data: Data,
    eps: float,
    members: tuple[Member, ...],
    *,
    seed: int = 0,
    doubts: DoubtsWanted = "none",
    adaptive: bool = False,
    run: Path | None = None,
) -> Result:
    """Return the assessment of a network with the attacks `members`, within an Linf ball of radius `eps`.

    With `adaptive`, the adaptive attacks that the raised doubts call for are run as well. `run` is a folder in which
    the run is stored.
    """
    plan = Plan(
        members,
        ThreatModel(Linf(eps)),
        seed,
        NAIVE,
        doubts=doubts,
        adaptive=adaptive_members(Linf(eps)) if adaptive else (),
    )
    return run_assessment(
        DescribedModel(Classifier(net), digest(canonical([]))), data, AssessRequest(plan), run=run
    )


def exhibition(
    *, n: int = 500, only: Sequence[str] = (), shown: Callable[[Exhibit], None] = lambda exhibit: None
) -> tuple[Exhibit, ...]:
    """Build each model of the gallery, whose gradients are masked on purpose, and measure it on the first `n` bundled
    images of digits.

    `shown` is called with each result as soon as it is known. `only` lists the names of the models to build; if it is
    empty, those of `holdfast.doubts.gallery.ITEMS` are built. The names of `DISCRETE` and `SLOW` are accepted as well.
    Raises `UsageError` for an unknown name.
    """
    known = (*ITEMS, *DISCRETE, *SLOW)
    names = [item.name for item in known]
    for name in only:
        if name not in names:
            raise UsageError(f"there is no {name!r} in the gallery{did_you_mean(name, names)}")
    items = [item for item in known if item.name in only] if only else ITEMS
    training = data_sources.open_data(DIGITS, split="train")
    digits = training.read(0, len(training))
    built = []
    for exhibit in exhibits(digits, data_sources.open_data(DIGITS, n=n), items):
        shown(exhibit)
        built.append(exhibit)
    return tuple(built)
