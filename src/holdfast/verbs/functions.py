"""Python functions that do the same as the commands, with the same names, arguments and results.

Each function accepts a network, a function or an address as its model, and tensors, arrays, a loader or an address as
its data. It creates the object with the settings of its command, such as `holdfast.Assess`, and runs it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.recipes.training.recipe import Recipe
from holdfast.reports.write import check_destination as check_place
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.verbs.configuration import DEMO, DEMO_COMMAND, given
from holdfast.verbs.opening.arguments import DataLike, ModelLike, verb_with
from holdfast.verbs.opening.plans import SuiteLike
from holdfast.verbs.opening.recipes import ThreatLike
from holdfast.verbs.settings import Adapt, Assess, Certify, Doctor, Harden, Monitor

if TYPE_CHECKING:
    from holdfast.adaptation.journal import Adapted
    from holdfast.io.doctor import Checkup
    from holdfast.monitoring.watching import Monitored
    from holdfast.runs.harden.checkpoints import OnEpoch
    from holdfast.runs.harden.hardened import Hardened

__all__ = ["adapt", "assess", "certify", "demo", "doctor", "harden", "monitor"]


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
    interval bounds and CROWN come first, and 32 of the examples that they certify are attacked. With `until`, a
    condition such as `"robust_accuracy >= 0.4"`, the run ends as soon as it is decided. `fit` contains the examples on
    which learned attacks are fitted. `baseline` is an earlier run, a result or the folder of a run, with which gates
    compare, and with whose stored adversarial examples (`save_adversarial`) the attacks begin. `on` states where
    `workers` measure: on this machine, or on a Ray cluster (`"ray"`, `"ray://HOST:PORT"`, or a `holdfast.Ray`). If
    `run` is given, all artefacts are stored in that folder, and `resume` continues the run in it.
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
    words and replace the others by `mask`. Under a threat such as `patch:4x4` the model of the result is the vote over
    masks of `model` (`method="patch-masks"`), with `masks` masks along each axis of an image (6 by default).
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
