"""The Python functions of the audits, such as `holdfast.audit.backdoor`, and the run of an audit from its settings.

This module is `holdfast.audit`. It has a function for each audit that is a command, created when it is first used from
the settings of the audit (`holdfast.verbs.audit`).
"""

import re
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, Signature, cleandoc
from pathlib import Path
from typing import Any

from holdfast.audits.audit import AuditResult, AuditStart, audited
from holdfast.core.errors import refuse_unmet
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.verbs.configuration import given
from holdfast.verbs.opening.arguments import DataLike, ModelLike, gradients, verb_with
from holdfast.verbs.opening.resolve import free_folder_of
from holdfast.verbs.settings import AuditVerb, audits


def __dir__() -> list[str]:
    """Names of the functions, for completion."""
    return sorted(audits())


def __getattr__(name: str) -> Callable[..., AuditResult]:
    kinds = audits()
    if name not in kinds:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = _function(name, kinds[name])
    return function


def _function(name: str, kind: type[AuditVerb]) -> Callable[..., AuditResult]:
    """Return the function of an audit, whose arguments are the model, the data and the settings of the audit."""
    first = {"model": Any if kind.of_generators else ModelLike, "data": DataLike}
    order = sorted(first, key=lambda key: key not in kind.arguments)
    common = {"run": (str | Path | None, None), "resume": (bool, False), "progress": (Progress, silent)}
    parameters = Signature(
        [
            *(Parameter(key, Parameter.POSITIONAL_OR_KEYWORD, annotation=first[key]) for key in order),
            *(
                Parameter(key, Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
                for key, (annotation, default) in common.items()
            ),
            Parameter("settings", Parameter.VAR_KEYWORD, annotation=Any),
        ],
        return_annotation=AuditResult,
    )

    def call(*arguments: Any, **options: Any) -> AuditResult:
        try:
            bound = parameters.bind(*arguments, **options).arguments
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        settings = kind(**given(model=bound["model"], data=bound["data"], **bound.get("settings", {})))
        return settings.run(
            **{"folder" if key == "run" else key: bound[key] for key in common if key in bound}
        )

    call.__name__ = call.__qualname__ = name
    call.__doc__ = _in_python(kind)
    vars(call)["__signature__"] = parameters
    return verb_with(kind)(call)


_RUN = """\
`run` is the folder in which all artefacts are stored, `resume` continues the audit in it, and `progress` is called
after each step. Returns an `AuditResult` with the `verdict`, "flagged", "not flagged" or "unclear", the measured
`facts` and `metrics` by name, the `exit_code` of the gates, and `write`, which writes a report. Raises `UsageError`
for settings, data or a model with which the audit is not possible, and `TargetError` for files that cannot be read."""
"""last paragraph of the docstring of each function"""


def _in_python(kind: type[AuditVerb]) -> str:
    """Return the docstring of an audit: the help of the command with the names of arguments in place of those on the
    command line, and the details of the function.
    """
    text = kind.about
    for key, metavar in {"model": "MODEL", "data": "DATA", **kind.arguments}.items():
        text = re.sub(rf"\b{metavar}\b", f"`{key}`", text)
    text = re.sub(r"--([a-z][a-z-]*)", lambda match: f"`{match[1].replace('-', '_')}`", text)
    _, _, details = cleandoc(kind.__doc__ or "").partition("\n\n")
    return f"{text}\n\n{details}\n\n{_RUN}"


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
    place = free_folder_of(folder, resume=resume)
    with settings.prepared(AuditStart(place, resume, notify)) as audit:
        refuse_unmet(audit.needs)
        return audited(
            replace(audit.request, gates=tuple(settings.gates), command=command, examples=settings.examples),
            audit.measure,
            place,
            resume=resume,
            progress=progress,
            notify=notify,
            executor=audit.executor,
        )
