"""The settings of each command, composed of groups of settings."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from holdfast.config import groups, guard_settings, placing, serve_settings
from holdfast.config.groups import SettingGroup


@dataclass(frozen=True, kw_only=True)
class VerbSettings:
    """Base class of the settings of one command, such as `assess`: groups of settings."""

    verb: ClassVar[str] = ""


def _group(kind: type[SettingGroup]) -> Any:
    return field(default_factory=kind)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(VerbSettings):
    """All settings of the command `holdfast doctor`."""

    verb = "doctor"
    file: groups.FileFormat = _group(groups.FileFormat)
    model: groups.ModelSource = _group(groups.ModelSource)
    inference: groups.InferenceSource = _group(groups.InferenceSource)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    selection: groups.ExampleSelection = _group(groups.ExampleSelection)
    random: groups.Seed = _group(groups.Seed)


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(VerbSettings):
    """All settings of the command `holdfast calibrate`."""

    verb = "calibrate"
    file: groups.FileFormat = _group(groups.FileFormat)
    options: guard_settings.CalibrateOptions = _group(guard_settings.CalibrateOptions)
    model: groups.ModelSource = _group(groups.ModelSource)
    inference: groups.InferenceSource = _group(groups.InferenceSource)
    limits: groups.ServerLimits = _group(groups.ServerLimits)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    selection: groups.ExampleSelection = _group(groups.ExampleSelection)
    random: groups.Seed = _group(groups.Seed)


@dataclass(frozen=True, kw_only=True)
class AssessSettings(VerbSettings):
    """All settings of the command `holdfast assess`."""

    verb = "assess"
    file: groups.FileFormat = _group(groups.FileFormat)
    threat: groups.ThreatSource = _group(groups.ThreatSource)
    suite: groups.SuiteSettings = _group(groups.SuiteSettings)
    judgement: groups.GateSettings = _group(groups.GateSettings)
    reports: groups.Reports = _group(groups.Reports)
    options: groups.AssessOptions = _group(groups.AssessOptions)
    selection: groups.ExampleSelection = _group(groups.ExampleSelection)
    random: groups.Seed = _group(groups.Seed)
    execution: groups.Execution = _group(groups.Execution)
    cluster: placing.ClusterSettings = _group(placing.ClusterSettings)
    device: groups.Device = _group(groups.Device)
    model: groups.ModelSource = _group(groups.ModelSource)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    others: groups.OtherData = _group(groups.OtherData)
    inference: groups.InferenceSource = _group(groups.InferenceSource)
    limits: groups.ServerLimits = _group(groups.ServerLimits)


@dataclass(frozen=True, kw_only=True)
class HardenSettings(VerbSettings):
    """All settings of the command `holdfast harden`: those of the training, and those of the assessments before and
    after it.
    """

    verb = "harden"
    file: groups.FileFormat = _group(groups.FileFormat)
    options: groups.HardenOptions = _group(groups.HardenOptions)
    threat: groups.ThreatSource = _group(groups.ThreatSource)
    suite: groups.SuiteSettings = _group(groups.SuiteSettings)
    judgement: groups.GateSettings = _group(groups.GateSettings)
    reports: groups.Reports = _group(groups.Reports)
    selection: groups.ExampleSelection = _group(groups.ExampleSelection)
    random: groups.Seed = _group(groups.Seed)
    execution: groups.Execution = _group(groups.Execution)
    cluster: placing.ClusterSettings = _group(placing.ClusterSettings)
    device: groups.Device = _group(groups.Device)
    model: groups.ModelSource = _group(groups.ModelSource)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    others: groups.OtherData = _group(groups.OtherData)


@dataclass(frozen=True, kw_only=True)
class RotateSettings(VerbSettings):
    """All settings of the command `holdfast rotate`: how parameter sets are trained and generated, and when they are
    swapped.
    """

    verb = "rotate"
    file: groups.FileFormat = _group(groups.FileFormat)
    threat: groups.ThreatSource = _group(groups.ThreatSource)
    options: groups.RotateOptions = _group(groups.RotateOptions)
    judgement: groups.GateSettings = _group(groups.GateSettings)
    random: groups.Seed = _group(groups.Seed)
    place: placing.LocalOnly = _group(placing.LocalOnly)
    device: groups.Device = _group(groups.Device)
    model: groups.ModelSource = _group(groups.ModelSource)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    others: groups.OtherData = _group(groups.OtherData)


@dataclass(frozen=True, kw_only=True)
class CertifySettings(VerbSettings):
    """All settings of the command `holdfast certify`."""

    verb = "certify"
    file: groups.FileFormat = _group(groups.FileFormat)
    threat: groups.ThreatSource = _group(groups.ThreatSource)
    options: placing.CertifyOptions = _group(placing.CertifyOptions)
    judgement: groups.GateSettings = _group(groups.GateSettings)
    reports: groups.Reports = _group(groups.Reports)
    selection: groups.ExampleSelection = _group(groups.ExampleSelection)
    random: groups.Seed = _group(groups.Seed)
    execution: groups.Execution = _group(groups.Execution)
    cluster: placing.CertifyCluster = _group(placing.CertifyCluster)
    device: groups.Device = _group(groups.Device)
    model: groups.ModelSource = _group(groups.ModelSource)
    inputs: groups.InputSpace = _group(groups.InputSpace)
    data: groups.DataSource = _group(groups.DataSource)
    inference: groups.InferenceSource = _group(groups.InferenceSource)
    limits: groups.ServerLimits = _group(groups.ServerLimits)


@dataclass(frozen=True, kw_only=True)
class ServeSettings(VerbSettings):
    """All settings of the command `holdfast serve`."""

    verb = "serve"
    file: groups.FileFormat = _group(groups.FileFormat)
    options: serve_settings.ServeOptions = _group(serve_settings.ServeOptions)
    proxying: serve_settings.ProxySettings = _group(serve_settings.ProxySettings)
    limits: serve_settings.RequestLimits = _group(serve_settings.RequestLimits)
    device: groups.Device = _group(groups.Device)
    model: groups.ModelSource = _group(groups.ModelSource)
    inference: serve_settings.ServedInference = _group(serve_settings.ServedInference)
    inputs: groups.InputSpace = _group(groups.InputSpace)


class OpeningSettings(Protocol):
    """Protocol for the settings of any command that opens a model and data."""

    @property
    def model(self) -> groups.ModelSource:
        """Settings for the model: its address, and how it is opened."""

    @property
    def data(self) -> groups.DataSource:
        """Settings for the examples: their address, and how they are read."""

    @property
    def inputs(self) -> groups.InputSpace:
        """Settings for the inputs of the model: their bounds and their normalisation."""

    @property
    def random(self) -> groups.Seed:
        """Setting with the seed of random numbers."""
