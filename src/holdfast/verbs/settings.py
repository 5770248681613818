"""The settings of each command, composed of groups of settings. Each class is also the command in Python:
`holdfast.Assess(model="mnist-cnn", data="mnist-mini").run()`.

A class lists its groups in reverse order: pydantic begins with the fields of the last base class, and options are shown
in the order of the fields. The module imports neither torch nor a module that carries out a command: such a method
states the place of its function (`carried_out_by`).
"""

# mypy: disable-error-code="empty-body"

from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from holdfast.core.catalogue import AUDITS, GENERATOR_RECIPES, REPORT_FILE
from holdfast.core.errors import Remedy, UsageError
from holdfast.gates.grammar import parse
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.settings import groups, guard_settings, serve_settings, values
from holdfast.settings.grammar import refuse_uncertifiable
from holdfast.settings.groups import Flag, Section, SettingGroup
from holdfast.verbs import placement
from holdfast.verbs.checked_settings import VERBS, VerbSettings, carried_out_by

if TYPE_CHECKING:
    from holdfast.adaptation.journal import Adapted
    from holdfast.audits.audit import AuditResult, AuditStart, PreparedAudit
    from holdfast.core.batch import Batch, Data
    from holdfast.explanation.case import Explained
    from holdfast.io.doctor import Checkup
    from holdfast.monitoring.watching import Monitored
    from holdfast.runs.assess.expected_time import ExpectedCost, Rehearsed
    from holdfast.runs.assess.request import Opened, Subject
    from holdfast.runs.assess.result import Result
    from holdfast.runs.harden.checkpoints import OnEpoch
    from holdfast.runs.harden.hardened import Hardened
    from holdfast.server.server_setup import ServerSetup
    from holdfast.verbs.calibrate import Calibrated
    from holdfast.verbs.harden import ForHardening


class _Measured(VerbSettings):
    """The steps that an assessment and a certification share."""

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a proof that is not possible under the threat model, and for a guard on a cluster."""
        if isinstance(self, Certify) or self.certify:
            refuse_uncertifiable(self.threat)
        if self.guard is not None and self.on != "local":
            raise UsageError(
                f"the guard {self.guard} is read on this machine only, and shards run on {self.on}",
                Remedy("on"),
            )

    @carried_out_by("holdfast.verbs.assess:opened")
    def open(self: Any) -> "Opened":
        """Open the model, the data and the surrogates, and return them. Worker processes call it as well."""

    @carried_out_by("holdfast.verbs.assess:estimated")
    def estimate(self: Any) -> "ExpectedCost | Rehearsed":
        """Estimate the cost of a run on a few examples, without storing anything."""

    @carried_out_by("holdfast.verbs.assess:measured")
    def run(
        self: Any,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
        detail: Notify = ignore,
        command: str = "",
    ) -> "Result":
        """Measure the model and judge the gates, and return the result.

        If `folder` is given, all artefacts are stored in it, with the command line `command` that repeats the run, and
        `resume` continues the run in it. `notify` is called with messages, and `detail` with those on single shards.
        """


class Doctor(
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.QueryLimit,
    groups.InferenceSource,
    groups.Members,
    groups.ModelSource,
    groups.ThreatSource,
    VerbSettings,
):
    """All settings of the command `holdfast doctor`. Of the threat, only rules of a table and edits of texts matter."""

    verb = "doctor"

    @carried_out_by("holdfast.verbs.doctor:opened")
    def open(self) -> "tuple[Subject, Data]":
        """Open the model and the data, and return them. Data that do not fit the model are opened as well."""

    @carried_out_by("holdfast.verbs.doctor:checked")
    def run(self) -> "Checkup":
        """Check the model and the data for common mistakes, and return the findings."""


class Explain(
    groups.Device,
    groups.Seed,
    groups.ExampleSelection,
    groups.ExampleGroups,
    groups.DataSource,
    groups.InputSpace,
    groups.QueryLimit,
    groups.InferenceSource,
    groups.Members,
    groups.ModelSource,
    groups.ThreatSource,
    groups.StoredExamples,
    groups.ExplainOptions,
    VerbSettings,
):
    """All settings of the command `holdfast explain`."""

    verb = "explain"

    @carried_out_by("holdfast.verbs.explain:explained")
    def run(self) -> "Explained":
        """Explain the example `index`, or the model if it is None."""


class Calibrate(
    groups.Device,
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.ServerLimits,
    groups.InferenceSource,
    groups.Members,
    groups.ModelSource,
    guard_settings.CalibrateOptions,
    VerbSettings,
):
    """All settings of the command `holdfast calibrate`."""

    verb = "calibrate"

    @carried_out_by("holdfast.verbs.calibrate:calibrate_file")
    def run(self) -> "Calibrated":
        """Calibrate the guard in the file `guard`, and write its calibration beside that file."""


class Assess(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.Members,
    groups.ModelSource,
    groups.Device,
    placement.ClusterSettings,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.ExampleGroups,
    groups.AssessOptions,
    groups.StoredExamples,
    groups.Reports,
    groups.GateSettings,
    groups.SuiteSettings,
    groups.ThreatSource,
    _Measured,
):
    """All settings of the command `holdfast assess`."""

    verb = "assess"


class Harden(
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.ModelSource,
    groups.Device,
    placement.ClusterSettings,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.ExampleGroups,
    groups.StoredExamples,
    groups.Reports,
    groups.GateSettings,
    groups.SuiteSettings,
    groups.ThreatSource,
    groups.HardenOptions,
    VerbSettings,
):
    """All settings of the command `holdfast harden`: those of the training, and those of the assessments before and
    after it.
    """

    verb = "harden"
    verdicts = ("improved",)

    @property
    def trains_generator(self) -> bool:
        """Whether the recipe trains a generator instead of a classifier."""
        recipe: object = self.recipe  # a Python object is accepted too
        return isinstance(recipe, Mapping) and recipe["use"] in GENERATOR_RECIPES

    @carried_out_by("holdfast.verbs.harden:open_for_hardening")
    def open(self) -> "ForHardening":
        """Open the model, the examples for training and those for the assessments, and return them."""

    @carried_out_by("holdfast.verbs.harden:hardened")
    def run(
        self,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
        detail: Notify = ignore,
        command: str = "",
        on_epoch: "OnEpoch | None" = None,
        held_out: "Batch | None" = None,
    ) -> "Hardened[Any, Any]":
        """Train a new model that is more robust, assess both, and return them. `on_epoch` is called with the
        measurements of each epoch. Examples that are equal to one of `held_out` are not trained on. The other arguments
        are those of `Assess.run`. With a recipe for generators, the model and the measurements are a GAN and its
        audits.
        """


class RotateSettings(
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.ModelSource,
    groups.Device,
    placement.LocalOnly,
    groups.Seed,
    groups.GateSettings,
    groups.RotateOptions,
    groups.ThreatSource,
    VerbSettings,
):
    """All settings of the command `holdfast rotate`: how parameter sets are trained and generated, and when they are
    swapped.
    """

    verb = "rotate"


class Certify(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.DataSource,
    groups.InputSpace,
    groups.Members,
    groups.ModelSource,
    groups.Device,
    placement.CertifyCluster,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.ExampleGroups,
    groups.StoredExamples,
    groups.Reports,
    groups.GateSettings,
    placement.CertifyOptions,
    groups.ThreatSource,
    _Measured,
):
    """All settings of the command `holdfast certify`. Its attacks are those of the default suite, so that the settings
    of an assessment for other attacks have fixed values.
    """

    verb = "certify"
    suite: ClassVar[None] = None
    attacks: ClassVar[None] = None
    surrogates: ClassVar[tuple[()]] = ()
    only: ClassVar[tuple[()]] = ()
    skip: ClassVar[tuple[()]] = ()
    curve: ClassVar[bool] = False
    doubts: ClassVar[bool] = True
    adaptive: ClassVar[bool] = False
    adaptive_budget: ClassVar[int | None] = None
    fit: ClassVar[None] = None
    across: ClassVar[tuple[()]] = ()
    transform: ClassVar[None] = None


class Serve(
    groups.InputSpace,
    serve_settings.ServedInference,
    groups.Members,
    groups.ModelSource,
    groups.Device,
    serve_settings.RequestLimits,
    serve_settings.ProxySettings,
    serve_settings.ServeOptions,
    VerbSettings,
):
    """All settings of the command `holdfast serve`."""

    verb = "serve"

    @carried_out_by("holdfast.verbs.serve:open_for_serving")
    def open(self) -> "ServerSetup":
        """Open the model, the guard and the keys once, and return the setup of the server."""

    @carried_out_by("holdfast.verbs.serve:serve_until_stopped")
    def run(self, *, notify: Notify = ignore) -> None:
        """Serve the model until SIGTERM or Ctrl-C, and then drain. `notify` is called with messages, such as the
        address when requests are answered.
        """


class Monitor(
    groups.Device,
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.QueryLimit,
    groups.InferenceSource,
    groups.Members,
    groups.ModelSource,
    groups.MonitorOptions,
    VerbSettings,
):
    """All settings of the command `holdfast monitor`. `data` is the stream, whose order is that of the time."""

    verb = "monitor"
    model: Annotated[values.Given | None, Flag("MODEL", completion="MODEL", common=True)] = Field(
        default=None, description=groups.ModelSource.model_fields["model"].description
    )

    @carried_out_by("holdfast.verbs.monitor:monitored")
    def run(self) -> "Monitored":
        """Compare the stream with the reference, and return what the tests found."""


class Adapt(
    groups.OtherData,
    groups.DataSource,
    groups.Device,
    groups.Seed,
    groups.StoredExamples,
    groups.ExampleSelection,
    groups.GateSettings,
    groups.SuiteSettings,
    groups.ThreatSource,
    groups.HardenOptions,
    serve_settings.AdaptOptions,
    VerbSettings,
):
    """All settings of the command `holdfast adapt`: those of the training and of the assessments, and those of the
    server, which states how the served model is opened.
    """

    verb = "adapt"
    data: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None, description=groups.DataSource.model_fields["data"].description
    )

    @carried_out_by("holdfast.verbs.adapt:adapted")
    def run(
        self,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
    ) -> "Adapted":
        """Adapt the served model, and return what happened. The run folder `folder` is needed to resume the run."""


class AuditOptions(SettingGroup):
    """Settings that all audits have."""

    section: ClassVar[Section] = "report"
    gates: Annotated[list[str], Flag("G", "--gate", "-g", identifies=False, common=True)] = Field(
        default_factory=list,
        description="Condition on the result of the audit: no-backdoor, no-poison and, for the other audits, "
        "not-flagged pass if nothing is flagged; membership and privacy have the metrics membership_tpr_at_1_percent "
        "and epsilon_lower, as in epsilon_lower <= 2. Without a gate, the exit code is 0.",
    )
    output: groups.ReportFiles = Field(default_factory=list, description=REPORT_FILE)
    kind: ClassVar[str] = ""
    """name of the audit in `holdfast.core.catalogue.AUDITS`"""
    summary: ClassVar[str] = ""
    """what the audit does, in a few words"""
    about: ClassVar[str] = ""
    """help of the command and of the Python function, to which the paragraphs of the class after the first are added"""
    arguments: ClassVar[Mapping[str, str]] = {"model": "MODEL", "data": "DATA"}
    """arguments of the command without an option, and their names in the help"""
    example: ClassVar[str] = "mnist-cnn mnist-mini"
    """arguments of an example of the command"""
    files: ClassVar[tuple[str, ...]] = ()
    """settings that are addresses of files, which must exist"""
    opening: ClassVar[str] = ""
    """place of the function that `prepared` calls, unless the audit has its own `prepared`"""
    of_generators: ClassVar[bool] = False
    """whether the model may be a generator"""

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate that the audit does not have."""
        entry = AUDITS[self.kind]
        for gate in self.gates:
            if gate.strip() == entry.gate:
                continue
            if not entry.metrics or gate.strip() in {other.gate for other in AUDITS.values()}:
                raise UsageError(
                    f"{prefix}gate {gate!r} is not one of audit {self.kind}, whose gate is {entry.gate}"
                )
            parse(gate, entry.metrics)


class TrainingFunctionSource(SettingGroup):
    """Setting of the audits that train networks."""

    train: Annotated[values.Given | None, Flag("FILE.py:F", common=True)] = Field(
        default=None,
        description="Function fit(x, y, seed) that trains a network on the examples and returns it, as in net.py:fit. "
        "Or a folder that harden wrote, whose card states the training.",
    )


class AuditVerb(
    groups.Device,
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.StoredExamples,
    groups.ModelSource,
    AuditOptions,
    VerbSettings,
):
    """The settings and the steps that all audits share."""

    @carried_out_by("holdfast.verbs.audit.functions:run_audit")
    def run(
        self,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
        command: str = "",
    ) -> "AuditResult":
        """Run the audit, and return its result. If `folder` is given, all artefacts are stored in it, and `resume`
        continues the run in it. `notify` is called with messages.
        """

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        module, _, name = self.opening.partition(":")
        audit: AbstractContextManager[PreparedAudit] = getattr(import_module(module), name)(self, start)
        return audit


def audits() -> dict[str, type[AuditVerb]]:
    """Return the settings of each audit that is a command, by the name of the audit."""
    return {kind.kind: kind for kind in VERBS.values() if issubclass(kind, AuditVerb)}


Opening = Doctor | Explain | Calibrate | Assess | Certify | Harden | RotateSettings | Monitor | AuditVerb
"""Settings of any command that opens a model and data."""
