"""The function `holdfast.certify`, which proves for each example that no input of the threat model is misclassified."""

from pathlib import Path
from typing import Any

from holdfast.config.assess_inputs import AssessInputs, opened_for_assess
from holdfast.config.attacks import ThreatLike, threat_written
from holdfast.config.clusters import Ray, cluster_settings
from holdfast.config.python_functions import verb_with
from holdfast.config.references import DataLike, ModelLike
from holdfast.config.resolve import folder_of, sources_given
from holdfast.config.settings import CertifySettings, check_settings, given
from holdfast.engine.progress import Notify, Progress, ignore, silent
from holdfast.stored import baseline_evidence
from holdfast.verbs import assess as assessing
from holdfast.verbs.result import Result


@verb_with(CertifySettings)
def certify(
    model: ModelLike,
    data: DataLike,
    threat: ThreatLike = "linf:8/255",
    method: str = "auto",
    *,
    baseline: Result | str | Path | None = None,
    on: str | Ray = "local",
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
    the legal range.
    With `geometry`, the report shows the decision boundary around as many examples.
    The attacks are those of the default suite; of the certified examples they are run on 32, or on all with `full`. The
    other arguments are those of `assess`.
    Raises `UnsoundProof` if an attack breaks a certified example, and `UsageError` for a model or a threat model about
    which the method proves nothing.
    """
    cluster = cluster_settings(on)
    checked = check_settings(
        given(
            **settings,
            threat=threat_written(threat, "certify(): threat"),
            method=method,
            cluster_timeout=cluster.pop("timeout", None),
            **cluster,
        ),
        "certify()",
        kind=CertifySettings,
    )
    sources = sources_given(model, data, checked)
    inputs = AssessInputs(checked, sources, (), None, (), None, baseline_evidence(baseline))
    return _certified(inputs, folder_of(run, resume=resume), resume=resume, progress=progress)


def carry_out_certification(
    settings: CertifySettings,
    *,
    run: Path,
    resume: bool = False,
    progress: Progress = silent,
    notify: Notify = ignore,
    detail: Notify = ignore,
    command: str = "",
) -> Result:
    """Run a certification with the settings of the command line or of a configuration file, and return its result.

    The run stores the command line `command`. `detail` is called with messages on single shards.
    """
    inputs = AssessInputs.of(settings, command)
    return _certified(inputs, run, resume=resume, progress=progress, notify=notify, detail=detail)


def _certified(
    inputs: AssessInputs,
    run: Path | None,
    *,
    resume: bool,
    progress: Progress,
    notify: Notify = ignore,
    detail: Notify = ignore,
) -> Result:
    """Open the model and the data, and take the steps of the run."""
    with opened_for_assess(inputs, run, resume=resume) as (subject, examples, request):
        return assessing.assess(
            subject,
            examples,
            request,
            run=run,
            resume=resume,
            progress=progress,
            opening=inputs.open_all,
            notify=notify,
            detail=detail,
        )
