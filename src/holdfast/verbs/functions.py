"""Python functions that do the same as the commands, with the same names, arguments and results; and the exhibition of
masked models.

Each function accepts a network, a function or an address as its model, and tensors, arrays, a loader or an address as
its data. It creates the object with the settings of its command, such as `holdfast.Assess`, and runs it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from holdfast.attacks.suites import suite
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import Linf
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.names import did_you_mean
from holdfast.core.threat import ThreatModel
from holdfast.doubts.gallery import ITEMS, Item, undefended
from holdfast.io.data import data as data_sources
from holdfast.recipes.training.recipe import Recipe
from holdfast.reports.write import check_destination as check_place
from holdfast.runs.assess.assess import assess as run_assessment
from holdfast.runs.assess.request import AssessRequest, Subject
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.harness.kinds.passes import FIXED
from holdfast.runs.harness.plan import DoubtsWanted, Plan, adaptive_members
from holdfast.runs.harness.stage import Member
from holdfast.verbs.configuration import DEMO, DEMO_COMMAND, DIGITS, given
from holdfast.verbs.opening.plans import SuiteLike
from holdfast.verbs.opening.python_functions import DataLike, ModelLike, verb_with
from holdfast.verbs.opening.recipes import ThreatLike
from holdfast.verbs.settings import Adapt, Assess, Certify, Doctor, Harden, Monitor

if TYPE_CHECKING:
    from holdfast.adaptation.journal import Adapted
    from holdfast.io.doctor import Checkup
    from holdfast.monitoring.watching import Monitored
    from holdfast.runs.harden.checkpoints import OnEpoch
    from holdfast.runs.harden.hardened import Hardened

__all__ = ["adapt", "assess", "certify", "demo", "doctor", "exhibition", "harden", "monitor"]


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
    return run_assessment(Subject(Classifier(net), digest(canonical([]))), data, AssessRequest(plan), run=run)


@verb_with(Assess)
def assess(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    suite: SuiteLike | None = None,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Result:
    """Measure the robust accuracy of a model against a suite of attacks, with confidence intervals and doubts.

    An example is robust if no attack of the suite breaks it. `model` and `data` are objects, addresses, or results of
    `open_model` and `open_data`. `threat` is a string, or a constraint such as `holdfast.Linf(8/255)`. `suite` is the
    name of a suite or of attacks (`"pgd,square"`), an attack, a class of attacks, or a list of these. The default is
    `fast`, or `transfer` for a threat with access=none. `surrogates` are models of the attacker; a `Classifier`
    declares the preprocessing, and `holdfast.skipped` is for skip gradients. `across` lists other data sets with inputs
    of the same shape: perturbations computed on `data` are also evaluated on them, and theirs on `data`. With `certify`
    interval bounds and CROWN come first, and 32 of the examples that they certify are attacked. `fit` contains the
    examples on which learned attacks are fitted, and `baseline` is the run with which gates compare: a result, or the
    folder of a run. `on` states where `workers` measure: on this machine, or on a Ray cluster (`"ray"`,
    `"ray://HOST:PORT"`, or a `holdfast.Ray`). If `run` is given, all artefacts are stored in that folder, and `resume`
    continues the run in it.
    """
    checked = Assess(**given(model=model, data=data, threat=threat, suite=suite, **settings))
    return checked.run(run, resume=resume, progress=progress)


@verb_with(Certify)
def certify(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    method: str = "auto",
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> Result:
    """Prove for each example that no input of the threat model is misclassified, or find one that is.

    Every example is certified, broken or unknown. `method` is `auto`, which runs interval bounds, CROWN, attacks, and
    branch and bound, or one method, which is run with the attacks. CROWN, alpha-CROWN and branch and bound take at most
    `timeout` for each example.
    With `method="smoothing"` the model of the result is the smoothed classifier of `model` with noise of standard
    deviation `sigma`; a verdict takes at most `draws` noisy inputs (10,000 by default), and is wrong with a probability
    of at most `failure_probability` (0.001 by default) for each example. With `clip`, noisy inputs are first clamped to
    the legal range. `method="masking"` is the same for models of texts, with random masks that `keep` a share of the
    words and replace the others by `mask`.
    With `geometry`, the report shows the decision boundary around as many examples.
    The attacks are those of the default suite; of the certified examples they are run on 32, or on all with `full`. The
    other arguments are those of `assess`.
    Raises `UnsoundProof` if an attack breaks a certified example, and `UsageError` for a model or a threat model about
    which the method proves nothing.
    """
    checked = Certify(**given(model=model, data=data, threat=threat, method=method, **settings))
    return checked.run(run, resume=resume, progress=progress)


@verb_with(Harden)
def harden(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike | None = None,
    recipe: Recipe | str | Mapping[str, Any] = "auto",
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    on_epoch: "OnEpoch | None" = None,
    **settings: Any,
) -> "Hardened[Any, Any]":
    """Train a new model that is more robust than `model`, and assess both. The given model is never changed.

    `model` and `data` are objects, addresses, or results of `open_model` and `open_data`. If `data` is an address, its
    train split is used for training and its test split for measurement. If it is an object, it is used for measurement
    and `fit` for training; without `fit`, a tenth of it is held out for measurement. `unlabelled` contains further
    inputs for training, as an address or an object, for recipes that use inputs without labels. Without `threat`,
    linf:8/255 is used. `budget` is the wall-clock time for the training, as in "10min", and `assess_budget` that for
    both measurements; a budget in which no epoch fits is refused unless `anyway` is True. The other arguments are those
    of `assess`, and apply to the measurements before and after the training. If `run` is given, all artefacts are
    stored in that folder, and `resume` continues the run in it. `on_epoch` is called with the measurements of each
    epoch (`holdfast.runs.harden.checkpoints.EpochRecord`); an exception that it raises stops the run, which can be
    resumed.
    With a recipe for generators, such as `robust-gan`, `model` is a GAN, and so is that of the result; `before` and
    `after` are then audits.
    """
    checked = Harden(**given(model=model, data=data, threat=threat, recipe=recipe, **settings))
    return checked.run(run, resume=resume, progress=progress, on_epoch=on_epoch)


def demo(
    folder: str | Path = "holdfast-demo", *, progress: Progress = silent, notify: Notify = ignore
) -> Result:
    """Assess a bundled model on bundled data, without a network connection, and write `report.html` and `report.json`
    to `folder`.

    The model is a bundled network, and the data are real images of digits. `notify` is called with the expected time.
    """
    paths = [Path(folder) / name for name in ("report.html", "report.json")]
    for path in paths:
        # before the run, so that it does not end without its reports
        check_place(path)
    result = Assess(**DEMO).run(progress=progress, notify=notify, command=DEMO_COMMAND)
    for path in paths:
        result.write(path)
    return result


def exhibition(
    *, n: int = 500, only: Sequence[str] = (), shown: "Callable[[Exhibit], None]" = lambda exhibit: None
) -> "tuple[Exhibit, ...]":
    """Build each model of the gallery, whose gradients are masked on purpose, and measure it on the first `n` bundled
    images of digits.

    `shown` is called with each result as soon as it is known. `only` lists the names of the models to build; if it is
    empty, those of `holdfast.doubts.gallery.ITEMS` are built. The names of `DISCRETE` and `SLOW` are accepted as well.
    Raises `UsageError` for an unknown name.
    """
    from holdfast.doubts.gallery import DISCRETE, ITEMS, SLOW

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


@verb_with(Doctor)
def doctor(model: ModelLike, data: DataLike, **settings: Any) -> "Checkup":
    """Check within seconds whether a model and its data fit together, and return findings about common mistakes, which
    are printed as `holdfast doctor` prints them.

    `model` and `data` are objects, addresses, or results of `open_model` and `open_data`.
    """
    return Doctor(**given(model=model, data=data, **settings)).run()


@verb_with(Monitor)
def monitor(
    data: DataLike, reference: DataLike, model: ModelLike | None = None, **settings: Any
) -> "Monitored":
    """Compare a recorded stream `data`, in the order of time, with the examples `reference`, and return the alarms.

    `data` and `reference` are objects, addresses, or results of `open_data`; the stream may have no labels, as an array
    or as an `.npz` file without `y`. With `model`, its outputs and the outputs of an inner layer are compared as well,
    and its accuracy is estimated. The model must not have been trained on `reference`.
    """
    return Monitor(**given(data=data, reference=reference, model=model, **settings)).run()


@verb_with(Adapt)
def adapt(
    server: str,
    data: DataLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    notify: Notify = ignore,
    **settings: Any,
) -> "Adapted":
    """Harden the model of a running server, replace it if the new model passes all gates, and return what happened.

    `server` is the address of the operator's port, and `data` the examples for the training and the assessments. `run`
    is the folder of the run, with which `resume` continues it. `notify` is called with a line for each step.
    """
    return Adapt(**given(server=server, data=data, **settings)).run(run, resume=resume, notify=notify)
