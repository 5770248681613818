"""The Python functions `holdfast.audit.backdoor`, `holdfast.audit.poison` and `holdfast.audit.privacy`, and the run of
an audit from its settings.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.api.grad_mode import gradients
from holdfast.api.python_functions import verb_with
from holdfast.api.reading_settings import given
from holdfast.api.references import DataLike, ModelLike
from holdfast.api.resolve import folder_of
from holdfast.api.verb_settings import (
    AuditBackdoor,
    AuditGenerator,
    AuditMembership,
    AuditPoison,
    AuditPrivacy,
    AuditVerb,
)
from holdfast.audits.audit import AuditResult, AuditStart, audited
from holdfast.core.needs import refuse_unmet
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.store.folder import refuse_used

__all__ = ["backdoor", "generator", "membership", "poison", "privacy"]


def __dir__() -> list[str]:
    """Names of the functions, for completion."""
    return __all__


@verb_with(AuditBackdoor)
def backdoor(
    model: ModelLike,
    data: DataLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> AuditResult:
    """Search a model for a backdoor: a small trigger with which it predicts one class for almost every input.

    `data` are clean examples. The model is `flagged` only if its trigger is unusual among those of at least 20 control
    networks of the same architecture (`controls` or `train_controls`); without them the result is `unclear`.
    """
    return AuditBackdoor(**given(model=model, data=data, **settings)).run(
        run, resume=resume, progress=progress
    )


@verb_with(AuditPoison)
def poison(
    data: DataLike,
    model: ModelLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> AuditResult:
    """Search training data for manipulated examples and wrong labels. `model` is the network that is trained on them.

    The data are `flagged` only by comparison with trusted examples of the same classes (`clean`); without them the
    examples are ranked, and the result is `unclear`.
    """
    return AuditPoison(**given(data=data, model=model, **settings)).run(run, resume=resume, progress=progress)


@verb_with(AuditPrivacy)
def privacy(
    model: ModelLike,
    data: DataLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> AuditResult:
    """Measure a lower bound of the epsilon of a differentially private training, and compare it with the claimed one.

    `train` is the function `fit(x, y, seed)` that trains the network on `data`, and `model` is a network of its
    architecture. One network is trained with canaries. The training is `flagged` if the bound at 95 % confidence
    exceeds `epsilon`; a bound below it is no proof of privacy.
    """
    return AuditPrivacy(**given(model=model, data=data, **settings)).run(
        run, resume=resume, progress=progress
    )


@verb_with(AuditMembership)
def membership(
    model: ModelLike,
    data: DataLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> AuditResult:
    """Measure how many training examples an attacker finds among others, at a low false-positive rate.

    With `non_members`, the model is audited, whose training examples are `data`. Otherwise a training procedure is
    audited: the function `train`, `fit(x, y, seed)`, or a default training of the architecture of `model`. It trains
    `references` networks on random halves of the data. The result is `flagged` if members are found more often than
    the false-positive rate `fpr`. It is `unclear` if members and non-members differ in kind, or if they are not found
    without reference networks.
    """
    return AuditMembership(**given(model=model, data=data, **settings)).run(
        run, resume=resume, progress=progress
    )


@verb_with(AuditGenerator)
def generator(
    model: Any,
    data: DataLike,
    *,
    run: str | Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
    **settings: Any,
) -> AuditResult:
    """Measure how well the samples of a generator match examples that it was not trained on (`held_out`), and how many
    of them are copies of its training examples `data`.

    `model` is an object with a method `sample(n, seed)`, the address of a function that returns one, as in
    `"gen.py:make"`, or a file of samples. The generator is `flagged` if more samples than held-out examples are copies,
    or if it has collapsed: its samples are like few training examples.
    """
    return AuditGenerator(**given(model=model, data=data, **settings)).run(
        run, resume=resume, progress=progress
    )


@gradients()
def run_audit(
    settings: AuditVerb,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    command: str = "",
) -> AuditResult:
    """Open the model and the data of an audit, and take its steps."""
    place = folder_of(folder, resume=resume)
    if place is not None:
        refuse_used(place, resume=resume)
    with settings.prepared(AuditStart(place, resume, notify, command)) as audit:
        refuse_unmet(audit.needs)
        return audited(
            replace(audit.request, examples=settings.examples),
            audit.measure,
            place,
            resume=resume,
            progress=progress,
            notify=notify,
            executor=audit.executor,
        )
