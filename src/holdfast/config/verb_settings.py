"""The settings of each command, composed of groups of settings.

A class lists its groups in reverse order: pydantic begins with the fields of the last base class, and options are shown
in the order of the fields.
"""

from typing import ClassVar, TypeVar

from holdfast.config import groups, guard_settings, placing, serve_settings
from holdfast.config.groups import SettingGroup

G = TypeVar("G", bound=SettingGroup)


class VerbSettings(groups.FileFormat):
    """Base class of the settings of one command, such as `assess`."""

    verb: ClassVar[str] = ""


class Doctor(
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.InferenceSource,
    groups.ModelSource,
    VerbSettings,
):
    """All settings of the command `holdfast doctor`."""

    verb = "doctor"


class CalibrateSettings(
    groups.Seed,
    groups.ExampleSelection,
    groups.DataSource,
    groups.InputSpace,
    groups.ServerLimits,
    groups.InferenceSource,
    groups.ModelSource,
    guard_settings.CalibrateOptions,
    VerbSettings,
):
    """All settings of the command `holdfast calibrate`."""

    verb = "calibrate"


class Assess(
    groups.ServerLimits,
    groups.InferenceSource,
    groups.OtherData,
    groups.DataSource,
    groups.InputSpace,
    groups.ModelSource,
    groups.Device,
    placing.ClusterSettings,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.AssessOptions,
    groups.Reports,
    groups.GateSettings,
    groups.SuiteSettings,
    groups.ThreatSource,
    VerbSettings,
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
    groups.ModelSource,
    groups.Device,
    placing.CertifyCluster,
    groups.Execution,
    groups.Seed,
    groups.ExampleSelection,
    groups.Reports,
    groups.GateSettings,
    placing.CertifyOptions,
    groups.ThreatSource,
    VerbSettings,
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
    fit: ClassVar[None] = None
    across: ClassVar[tuple[()]] = ()
    transform: ClassVar[None] = None


class ServeSettings(
    groups.InputSpace,
    serve_settings.ServedInference,
    groups.ModelSource,
    groups.Device,
    serve_settings.RequestLimits,
    serve_settings.ProxySettings,
    serve_settings.ServeOptions,
    VerbSettings,
):
    """All settings of the command `holdfast serve`."""

    verb = "serve"


OpeningSettings = Doctor | CalibrateSettings | Assess | Certify | Harden | RotateSettings
"""Settings of any command that opens a model and data."""


def part(settings: SettingGroup, kind: type[G]) -> G:
    """Return those settings of a command that belong to a group, or the defaults if the command does not have them."""
    if not isinstance(settings, kind):
        return kind()
    own = kind.model_fields.keys()
    values = {name: getattr(settings, name) for name in own}
    return kind.model_construct(_fields_set=settings.model_fields_set & own, **values)
