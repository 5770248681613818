"""The settings of each command, composed of groups of settings. Each class is also the command in Python:
`holdfast.Assess(model="mnist-cnn", data="mnist-mini").run()`.

A class lists its groups in reverse order: pydantic begins with the fields of the last base class, and options are shown
in the order of the fields. The classes do not import torch; their methods do.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, model_validator

from holdfast.api import placing
from holdfast.api.placing import Ray
from holdfast.core.catalogue import GENERATOR_RECIPES
from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.core.remedies import Remedy
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.settings import audit_settings, groups, guard_settings, serve_settings, values
from holdfast.settings.default_suite import refuse_uncertifiable
from holdfast.settings.grammar import did_you_mean
from holdfast.settings.groups import Flag, SettingGroup
from holdfast.settings.wording import complaint, place

if TYPE_CHECKING:
    from holdfast.adaptation.adapted import Adapted
    from holdfast.api.guards import Calibrated
    from holdfast.api.harden_generator import HardenedGenerator
    from holdfast.api.hardening import ForHardening
    from holdfast.audits.audit import AuditResult, AuditStart, PreparedAudit
    from holdfast.core.batch import Data
    from holdfast.explanation.explained import Explained
    from holdfast.io.doctor import Checkup
    from holdfast.monitoring.monitored import Monitored
    from holdfast.runs.assess.expected_rows import Rehearsed
    from holdfast.runs.assess.expected_time import ExpectedCost
    from holdfast.runs.assess.request import Opened, Subject
    from holdfast.runs.assess.result import Result
    from holdfast.runs.harden.epoch_log import OnEpoch
    from holdfast.runs.harden.hardened import Hardened
    from holdfast.server.server_setup import ServerSetup

G = TypeVar("G", bound=SettingGroup)
S = TypeVar("S", bound="Checked")


class Checked(SettingGroup):
    """Base class of settings whose construction raises `UsageError` that names the first invalid one."""

    verb: ClassVar[str] = ""
    """name of the command, or of the Python function, that has these settings"""

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, given: Any, filled: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        source: tuple[str, Mapping[str, str]] = info.context or (f"{cls.verb}(): ", {})
        prefix, written = source
        if not isinstance(given, Mapping):
            raise UsageError(f"{prefix}the settings are {kind_of(given)}; expected a mapping")
        content = cls._flat(given)
        for key in content:
            if key not in cls.model_fields:
                raise UsageError(f"{prefix}unknown key {key!r}{_of_other_verbs(str(key), cls)}")
        try:
            settings = filled(content)
        except ValidationError as error:
            key, dot, rest = place(error).partition(".")
            raise UsageError(f"{written.get(key, prefix + key)}{dot}{rest} {complaint(error)}") from None
        for kind in reversed(cls.__mro__):
            if "refuse_contradictions" in vars(kind):
                kind.refuse_contradictions(settings, prefix, written)  # type: ignore[attr-defined]
        return settings

    @classmethod
    def _flat(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return settings in which results of `open_model` and `open_data`, and a `Ray`, are replaced by the settings
        that they contain.
        """
        content = dict(given)
        for key, kind in (("model", ModelReference), ("data", DataReference)):
            reference = content.get(key)
            if isinstance(reference, kind) and cls is not kind:
                own = {name: getattr(reference, name) for name in reference.model_fields_set}
                cls._refuse_twice(own.keys() & content.keys() - {key}, kind.verb)
                if unused := [name for name in own if name not in cls.model_fields]:
                    raise UsageError(
                        f"{unused[0]}={own[unused[0]]!r} is not possible for the model of {cls.verb}",
                        Remedy(unused[0], function=kind.verb),
                    )
                content |= own
        if isinstance(on := content.get("on"), Ray) and issubclass(cls, placing.Placement):
            own = on.settings(cls.waiting_key)
            cls._refuse_twice(own.keys() & content.keys() - {"on"}, "Ray")
            content |= own
        return content

    @classmethod
    def _refuse_twice(cls, keys: set[str], other: str) -> None:
        """Raise `UsageError` for the first setting that is given both to this command and to another function."""
        if keys:
            raise UsageError(f"{min(keys)} is given to {cls.verb} and to {other}; give it once")

    def __repr_args__(self) -> Iterator[tuple[str, Any]]:
        """Return the settings that were given, for the text of the object."""
        return ((key, getattr(self, key)) for key in type(self).model_fields if key in self.model_fields_set)


class ModelReference(
    groups.ServerLimits, groups.InferenceSource, groups.Members, groups.ModelSource, Checked
):
    """A model that is not opened yet, and options for opening it. The run opens it, so that the run counts all requests
    to a server.
    """

    verb = "open_model"


class DataReference(groups.DataSource, Checked):
    """Examples that are not read yet, and options for reading them. The run reads them, because some options depend on
    the model.
    """

    verb = "open_data"


class VerbSettings(groups.FileFormat, Checked):
    """Base class of the settings of one command, such as `assess`."""


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

    def open(self: Any) -> "Opened":
        """Open the model, the data and the surrogates, and return them. Worker processes call it as well."""
        from holdfast.api.assess_requests import opened

        return opened(self)

    def estimate(self: Any) -> "ExpectedCost | Rehearsed":
        """Estimate the cost of a run on a few examples, without storing anything."""
        from holdfast.api.assess_requests import estimated

        return estimated(self)

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
        from holdfast.api.assess_requests import measured

        return measured(
            self, folder, resume=resume, progress=progress, notify=notify, detail=detail, command=command
        )


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

    def open(self) -> "tuple[Subject, Data]":
        """Open the model and the data, and return them. Data that do not fit the model are opened as well."""
        from holdfast.api.resolve import open_examples, open_subject
        from holdfast.io.remote.counting import inspection_counter

        subject = open_subject(self)
        inspection_counter(subject.model)
        return subject, open_examples(self, subject.model, lenient=True)

    def run(self) -> "Checkup":
        """Check the model and the data for common mistakes, and return the findings."""
        from holdfast.api.expecting import edits_of, notes_of
        from holdfast.api.grad_mode import gradients
        from holdfast.io.doctor import Checkup, Finding, examine

        with gradients():
            subject, data = self.open()
            findings = examine(subject.model, data, texts=edits_of(self) is not None)
            return Checkup((*(Finding("data", "note", note) for note in notes_of(data)), *findings))


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

    def run(self) -> "Explained":
        """Explain the example `index`, or the model if it is None."""
        from holdfast.api.explain import explained
        from holdfast.api.grad_mode import gradients

        with gradients():
            return explained(self)


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

    def run(self) -> "Calibrated":
        """Calibrate the guard in the file `guard`, and write its calibration beside that file."""
        from holdfast.api.grad_mode import gradients
        from holdfast.api.guards import calibrate_file

        with gradients():
            return calibrate_file(self)


class Assess(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.Members,
    groups.ModelSource,
    groups.Device,
    placing.ClusterSettings,
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
    placing.ClusterSettings,
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

    def open(self) -> "ForHardening":
        """Open the model, the examples for training and those for the assessments, and return them."""
        from holdfast.api.hardening import open_for_hardening

        return open_for_hardening(self)

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
    ) -> "Hardened":
        """Train a new model that is more robust, assess both, and return them. `on_epoch` is called with the
        measurements of each epoch. The other arguments are those of `Assess.run`.
        """
        from holdfast.api.hardening import hardened

        return hardened(
            self, folder, resume=resume, progress=progress, notify=notify, detail=detail, command=command,
            on_epoch=on_epoch,
        )  # fmt: skip

    def run_generator(
        self,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
        command: str = "",
    ) -> "HardenedGenerator":
        """Train a new generator with a recipe for generators, audit both, and return the new one with the result."""
        from holdfast.api.grad_mode import gradients
        from holdfast.api.harden_generator import hardened_generator

        with gradients():
            return hardened_generator(
                self, folder, resume=resume, progress=progress, notify=notify, command=command
            )


class RotateSettings(
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.ModelSource,
    groups.Device,
    placing.LocalOnly,
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
    placing.CertifyCluster,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.ExampleGroups,
    groups.StoredExamples,
    groups.Reports,
    groups.GateSettings,
    placing.CertifyOptions,
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

    def open(self) -> "ServerSetup":
        """Open the model, the guard and the keys once, and return the setup of the server."""
        from holdfast.api.serve import open_for_serving

        return open_for_serving(self)

    def run(self, *, notify: Notify = ignore) -> None:
        """Serve the model until SIGTERM or Ctrl-C, and then drain. `notify` is called with messages, such as the
        address when requests are answered.
        """
        from holdfast.api.serve import serve_until_stopped

        serve_until_stopped(self.open(), notify)


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
    model: Annotated[values.Given | None, Flag("MODEL", completion="MODEL")] = Field(
        default=None, description=groups.ModelSource.model_fields["model"].description
    )

    def run(self) -> "Monitored":
        """Compare the stream with the reference, and return what the tests found."""
        from holdfast.api.grad_mode import gradients
        from holdfast.api.monitoring_streams import monitored

        with gradients():
            return monitored(self)


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
    data: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None, description=groups.DataSource.model_fields["data"].description
    )

    def run(
        self,
        folder: str | Path | None = None,
        *,
        resume: bool = False,
        progress: Progress = silent,
        notify: Notify = ignore,
    ) -> "Adapted":
        """Adapt the served model, and return what happened. The run folder `folder` is needed to resume the run."""
        from holdfast.api.adapting import adapted
        from holdfast.api.grad_mode import gradients

        with gradients():
            return adapted(self, folder, resume=resume, progress=progress, notify=notify)


class AuditVerb(
    groups.Device,
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.StoredExamples,
    groups.ModelSource,
    audit_settings.AuditOptions,
    VerbSettings,
):
    """The settings and the steps that all audits share."""

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
        from holdfast.api.audits import run_audit
        from holdfast.api.grad_mode import gradients

        with gradients():
            return run_audit(self, folder, resume=resume, progress=progress, notify=notify, command=command)

    @abstractmethod
    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""


class AuditBackdoor(audit_settings.BackdoorOptions, AuditVerb):
    """All settings of the command `holdfast audit backdoor`. `data` are clean examples."""

    verb = "audit-backdoor"

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        from holdfast.api.audit_backdoor import prepared_backdoor

        return prepared_backdoor(self, start)


class AuditPoison(audit_settings.PoisonOptions, AuditVerb):
    """All settings of the command `holdfast audit poison`. `data` are the examples that are audited, and `model` is the
    network that is trained on them.
    """

    verb = "audit-poison"
    model: Annotated[values.Given | None, Flag("MODEL", completion="MODEL")] = Field(
        default=None, description=groups.ModelSource.model_fields["model"].description
    )

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        from holdfast.api.audit_poison import prepared_poison

        return prepared_poison(self, start)


class AuditPrivacy(audit_settings.PrivacyOptions, AuditVerb):
    """All settings of the command `holdfast audit privacy`. `data` are the training examples, and `model` is a network
    of the architecture that is trained on them.
    """

    verb = "audit-privacy"

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        from holdfast.api.audit_privacy import prepared_privacy

        return prepared_privacy(self, start)


class AuditMembership(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.ExampleGroups,
    placing.ClusterSettings,
    audit_settings.MembershipOptions,
    AuditVerb,
):
    """All settings of the command `holdfast audit membership`. `data` are the training examples of `model` if
    `non_members` are given, and otherwise the examples of which a training procedure gets random halves.
    """

    verb = "audit-membership"

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        from holdfast.api.audit_membership import prepared_membership

        return prepared_membership(self, start)


class AuditGenerator(audit_settings.GeneratorOptions, AuditVerb):
    """All settings of the command `holdfast audit generator`. `model` is a generator or a file of its samples, and
    `data` are its training examples.
    """

    verb = "audit-generator"
    model: values.Given | None = Field(
        default=None,
        description="Function of a Python file that returns an object with sample(n, seed), as in gen.py:make, or a "
        "file of samples.",
    )

    def prepared(self, start: "AuditStart") -> AbstractContextManager["PreparedAudit"]:
        """Context manager that opens the model and the data, and yields the audit."""
        from holdfast.api.audit_generator import prepared_generator

        return prepared_generator(self, start)


Opening = Doctor | Explain | Calibrate | Assess | Certify | Harden | RotateSettings | Monitor | AuditVerb
"""Settings of any command that opens a model and data."""

VERBS: Mapping[str, type[VerbSettings]] = {
    kind.verb: kind
    for kind in (
        Assess,
        Certify,
        Harden,
        RotateSettings,
        Serve,
        Monitor,
        Adapt,
        AuditBackdoor,
        AuditPoison,
        AuditPrivacy,
        AuditMembership,
        AuditGenerator,
    )
}
"""Class of the settings of each verb, by name. A configuration file may contain a section for each of these verbs."""


def verbs_with(key: str) -> list[str]:
    """Return the verbs that have a setting."""
    return [verb for verb, kind in VERBS.items() if key in kind.model_fields]


def _of_other_verbs(key: str, kind: type[SettingGroup]) -> str:
    verbs = verbs_with(key)
    return f", which is a setting of {', '.join(verbs)}" if verbs else did_you_mean(key, kind.model_fields)


def check_settings(
    content: Mapping[str, Any],
    where: str,
    written: Mapping[str, str] = MappingProxyType({}),
    *,
    kind: type[S],
) -> S:
    """Return the settings of a command from text, such as a file or options. Raises `UsageError` that names the first
    invalid key and the most similar valid one.

    The message begins with `where`, the source of the content, except for keys in `written`, which maps keys to the
    form in which the user wrote them.
    """
    prefix, suite = f"{where}: " if where else "", content.get("suite")
    if "suite" in kind.model_fields and suite is not None and not values.is_suite(suite):
        raise UsageError(
            f"{prefix}suite is {suite!r}; expected a name, or names as in [pgd, square]; list attacks with settings "
            "under attacks:, as in [{use: PGD, steps: 100}]"
        )
    return kind.model_validate(dict(content), context=(prefix, written))


def group_of(settings: SettingGroup, kind: type[G]) -> G:
    """Return those settings of a command that belong to a group, or the defaults if the command does not have them."""
    if not isinstance(settings, kind):
        return kind.model_construct()
    return composed(kind, settings)


def composed(kind: type[G], *settings: SettingGroup) -> G:
    """Return an object with those settings of others that it has, and its defaults for the rest."""
    own = {key: value for each in settings for key, value in each if key in kind.model_fields}
    given = {key for each in settings for key in each.model_fields_set}
    return kind.model_construct(_fields_set=given & own.keys(), **own)
