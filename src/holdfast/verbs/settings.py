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

from holdfast.core.catalogue import (
    AUDITS,
    BY_OPERATIONS,
    GENERATOR_RECIPES,
    MASKING,
    PATCH_MASKS,
    POLICY_RECIPES,
    PROVERS,
    REPORT_FILE,
    SMOOTHING,
    SUBSTITUTIONS,
    Arithmetic,
)
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.gates.grammar import parse, refused_verdict
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.settings import groups, guard_settings, serve_settings, values
from holdfast.settings.grammar import AUTO, refuse_uncertifiable
from holdfast.settings.groups import Flag, Section, SettingGroup
from holdfast.threats.domains import CONTROL, TEXT
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
    from holdfast.runs.assess.request import DescribedModel, Opened
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
    def open(self) -> "tuple[DescribedModel, Data]":
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
    groups.TaskOfModel,
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
    groups.TaskOfModel,
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

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a recipe for policies without a threat on observations, and for another recipe with
        one.
        """
        of_policies = isinstance(self.recipe, Mapping) and self.recipe["use"] in POLICY_RECIPES
        name = self.recipe["use"] if isinstance(self.recipe, Mapping) else "an object"
        if of_policies and self.threat.name != "observations":
            raise UsageError(
                f"{prefix}the recipe {name} is for policies under perturbed observations, and the threat is "
                f"{self.threat}",
                Remedy("threat", "observations:linf:0.1"),
            )
        if self.threat.change.domain is CONTROL and not of_policies and name != AUTO:
            raise UsageError(
                f"{prefix}the recipe is {name}, and the threat {self.threat} is for policies",
                Remedy("recipe", POLICY_RECIPES[0]),
            )

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


_RANDOM = (SMOOTHING, MASKING)
_OF_TEXTS = (SUBSTITUTIONS, MASKING)
_OF_METHODS = {
    "sigma": (SMOOTHING,),
    "clip": (SMOOTHING,),
    "keep": (MASKING,),
    "mask": (MASKING,),
    "masks": (PATCH_MASKS,),
    "draws": _RANDOM,
    "failure_probability": _RANDOM,
}
"""methods that each setting is for"""


class CertifyOptions(groups.MaskCount):
    """Settings of the command `holdfast certify` that no other command has."""

    method: Annotated[values.Method, Flag("M", completion="METHOD", common=True)] = Field(
        default="auto",
        description=f"Method of certification: auto (the default, which runs the methods from the cheapest to the most "
        f"exact) or one of {', '.join(PROVERS)}.",
    )
    timeout: Annotated[values.WaitingTime, Flag("T", common=True)] = Field(
        default="10s",
        description="Time limit for each example in each of the methods crown, alpha-crown, branch-and-bound and "
        "trees (default: 10s).",
    )
    arithmetic: Annotated[Arithmetic, Flag("ARITHMETIC")] = Field(
        default="exact",
        description="Arithmetic that certificates are about: exact (the default), of the network with its stored "
        "weights, or float32, in which the network is computed, in any order of summation.",
    )
    sigma: Annotated[values.Deviation | None, Flag("S", common=True)] = Field(
        default=None,
        description="Standard deviation of the noise of --method smoothing, in units of the inputs, as in 0.5.",
    )
    draws: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Largest number of changed copies of an example that --method smoothing or masking classifies "
        "(default: 10000).",
    )
    clip: Annotated[bool, Flag()] = Field(
        default=False,
        description="Clamp noisy inputs of --method smoothing to the legal range, as a first step of the model.",
    )
    failure_probability: Annotated[values.Probability | None, Flag("A")] = Field(
        default=None,
        description="Probability, for each example, that a verdict of --method smoothing or masking is wrong "
        "(default: 0.001).",
    )
    keep: Annotated[values.Probability | None, Flag("SHARE")] = Field(
        default=None,
        description="Share of the words of a text that --method masking keeps, as in 0.1 (the default).",
    )
    mask: Annotated[str | None, Flag("WORD")] = Field(
        default=None,
        description="Word in the place of the others of --method masking (default: [MASK]); with an empty one they are "
        "deleted.",
    )
    geometry: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Add the geometry of the decision boundary around the first N examples to the report: proved and "
        "attacked distances, Lipschitz constants and slices.",
    )
    full: Annotated[bool, Flag()] = Field(
        default=False, description="Run the attacks on all certified examples, and not only on 32 of them."
    )
    save_adversarial: Annotated[bool, Flag()] = Field(
        default=False, description="Store all adversarial examples in the run folder."
    )

    @property
    def chosen_method(self: Any) -> str:
        """The method; for `auto`, that of the threat if it has only one."""
        return PATCH_MASKS if self.method == AUTO and self.threat.name == "patch" else str(self.method)

    def _refuse_arithmetic(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for what is about exact arithmetic alone."""
        method = self.chosen_method
        if method in PROVERS and method not in BY_OPERATIONS:
            raise UsageError(
                f"{prefix}arithmetic is {self.arithmetic}, and the method is {method}, "
                f"which bounds no operations of a network; the methods are {', '.join(BY_OPERATIONS)}",
                Remedy("arithmetic"),
            )
        if self.geometry is not None:
            raise UsageError(
                f"{written.get('geometry', prefix + 'geometry')} measures the network in exact arithmetic, and "
                f"arithmetic is {self.arithmetic}",
                Remedy("geometry"),
                Remedy("arithmetic"),
            )

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for smoothing without a noise level, for a method that does not fit the threat, and for
        settings of another method.
        """
        of_texts = self.threat.change.domain is TEXT
        on_embeddings = "on" in self.threat.change.limits
        if on_embeddings and self.method in PROVERS and self.method not in BY_OPERATIONS:
            raise UsageError(
                f"{prefix}method is {self.method}, and the threat is {self.threat}, for which the methods are "
                f"{', '.join(BY_OPERATIONS)}",
                Remedy("method", "crown"),
            )
        if of_texts and not on_embeddings and self.method in PROVERS and self.method not in _OF_TEXTS:
            raise UsageError(
                f"{prefix}method is {self.method}, and the threat is {self.threat}, for which the methods are "
                f"{' and '.join(_OF_TEXTS)}",
                Remedy("method", MASKING),
            )
        if not of_texts and self.method in _OF_TEXTS:
            raise UsageError(
                f"{prefix}method is {self.method}, which certifies changed words of texts, and the threat is "
                f"{self.threat}; give a threat such as text:edits=2,words=3"
            )
        of_patches, method = self.threat.name == "patch", self.chosen_method
        if method in PROVERS and of_patches != (method == PATCH_MASKS):
            what = "certifies patches in images" if method == PATCH_MASKS else "certifies no patches"
            raise UsageError(
                f"{prefix}method is {method}, which {what}, and the threat is {self.threat}",
                Remedy("method", PATCH_MASKS) if of_patches else Remedy("threat", "patch:4x4"),
            )
        if self.method == SMOOTHING and self.sigma is None:
            raise UsageError(
                f"{prefix}method is smoothing, and sigma is missing, the standard deviation of the noise",
                Remedy("sigma", Placeholder("SIGMA"), reason="such as twice the eps of the threat"),
            )
        if self.geometry is not None and (of_texts or method in (SMOOTHING, PATCH_MASKS)):
            why = "the threat is on texts" if of_texts else f"the method is {method}, which has none"
            raise UsageError(
                f"{written.get('geometry', prefix + 'geometry')} computes bounds of a network, and {why}",
                Remedy("geometry"),
            )
        if self.arithmetic != "exact":
            self._refuse_arithmetic(prefix, written)
        random = MASKING if of_texts else SMOOTHING
        for key, methods in _OF_METHODS.items():
            if getattr(self, key) not in (None, False) and method not in methods:
                kind = "" if methods == (PATCH_MASKS,) else "randomised "
                raise UsageError(
                    f"{written.get(key, prefix + key)} concerns {kind}{' and '.join(methods)}, and the method is "
                    f"{method}",
                    *((Remedy("method", random),) if random in methods else ()),
                    Remedy(key),
                )


class Certify(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.DataSource,
    groups.InputSpace,
    groups.Members,
    groups.TaskOfModel,
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
    CertifyOptions,
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
        "not-flagged pass if nothing is flagged. Metrics, as in epsilon_lower <= 2: membership_tpr_at_1_percent "
        "(membership), epsilon_lower (privacy), attribute_accuracy_gain and attribute_tpr_gain_at_1_percent "
        "(attributes), copy_agreement and robust_accuracy_under_copy (extraction), exactly_reconstructed and "
        "psnr_above_mean_image (reconstruct). Without a gate, the exit code is 0.",
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
    needs_data: ClassVar[bool] = True
    """whether data must be given"""
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
            if parse(gate, entry.metrics).metric not in entry.metrics:
                raise refused_verdict(gate.strip(), prefix)


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
