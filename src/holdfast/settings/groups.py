"""The settings of all commands, each declared once in a group of related settings. The module imports pydantic, but not
torch.

A verb uses several groups (`holdfast.verbs.configuration`). The keys of a configuration file, the options of the
command line and the JSON Schema are generated from the fields of the groups.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import get_annotations
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from holdfast.attacks.suites import SUITES
from holdfast.core.catalogue import (
    DRIFT_TESTS,
    ENVIRONMENTS,
    GENERATOR_RECIPES,
    POLICY_RECIPES,
    RECIPES,
    REPORT_FILE,
)
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.names import TaskName
from holdfast.gates.grammar import GATED, VERDICTS, refused_verdict
from holdfast.gates.grammar import parse as parse_gate
from holdfast.settings import values
from holdfast.settings.grammar import CARD, COMBINATIONS, DEFAULT_SUITE, ENSEMBLE, MIXED, SOURCES
from holdfast.threats.domains import BYTES, CONTROL, TEXT
from holdfast.threats.parsing import threat_of

Section = Literal["command", "threat", "model", "data", "report", "run"]
"""The part of the help that an option is in; `command` has the options that only one command has."""


@dataclass(frozen=True)
class Flag:
    """The command-line option of a setting: its name, its short form and the placeholder of its value in the help."""

    metavar: str = ""
    name: str = ""
    """name of the option, if it is not `--` followed by the key with hyphens; `--no-…` for one that sets False"""
    short: str = ""
    """one-letter form of the option"""
    completion: str = ""
    """values that the shell completes: a name of `holdfast.cli.completing`, or PATH"""
    negated: bool = False
    """whether the option also exists in the form `--no-…`"""
    identifies: bool = True
    """whether the value affects the evidence, so that it is part of the digest in the name of a new run folder"""
    help: str = ""
    """help text of the option, if it is not the description of the setting"""
    common: bool = False
    """whether most people use the option, so that `--help` shows it; `--help-all` shows all"""


ReportFiles = Annotated[list[str], Flag("FILE", short="-o", completion="PATH", identifies=False, common=True)]
"""Files of reports, in the option `-o`."""


class SettingGroup(BaseModel):
    """Base class of groups of related settings, such as those of the data or of the threat model."""

    # the validators of a class are built when it is first used, because a command uses few of all classes
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), strict=False, defer_build=True
    )
    section: ClassVar[Section] = "command"
    """part of the help with the options of the settings that this class declares"""

    @classmethod
    def section_of(cls, key: str) -> Section:
        """Return the part of the help that the option of a setting is in: that of the class that declares it first."""
        declaring = next(kind for kind in reversed(cls.__mro__) if key in get_annotations(kind))
        section: Section = vars(declaring).get("section", "command")
        return section

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if settings of this group contradict each other. Groups with such settings override this
        method.

        `prefix` begins the message with the source of the settings, and `written` maps keys to the form in which the
        user wrote them.
        """


class FileFormat(SettingGroup):
    """Setting with the format version of a configuration file."""

    schema_version: Literal[2] = Field(default=2, description="Version of the format of this file.")


class ModelSource(SettingGroup):
    """Settings for the model: its address, how it is opened, and the meaning of its outputs."""

    section: ClassVar[Section] = "model"
    model: values.Given | None = Field(
        default=None,
        description="A bundled name, file.py:factory, a .safetensors, .pt, .pt2, .onnx, .skops, .json, .ubj or .txt "
        "file, a folder of harden or transformers, or a URL.",
    )
    arch: Annotated[str | None, Flag("NAME|FILE.py:F", common=True)] = Field(
        default=None,
        description="Architecture of a state dict: a name (see holdfast models) or a function in a file.",
    )
    model_args: Annotated[dict[str, str], Flag("K=V")] = Field(
        default_factory=dict,
        description="Argument of the function that returns the model (file.py:factory).",
    )
    model_output: Annotated[Literal["logit", "probability"] | None, Flag("KIND")] = Field(
        default=None,
        description="What the model returns: logit or probability. Required for one number per example from 0 to 1.",
    )
    classes: Annotated[values.Classes | None, Flag("N")] = Field(
        default=None, description="Expected number of classes."
    )
    class_names: Annotated[values.ClassNames | None, Flag("A,B,…|@FILE")] = Field(
        default=None,
        description="Names of the classes in the order of the model's outputs, or a file with one name per line. Class "
        "folders and text labels are matched with them.",
    )
    class_order: Annotated[Literal["lexical", "numeric"] | None, Flag("ORDER")] = Field(
        default=None,
        description="Order by which classes were numbered in training, if no names are given: lexical or numeric.",
    )
    trust_code: Annotated[bool, Flag()] = Field(
        default=False, description="Allow files to run the code that they contain."
    )

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if several models are one model and the command needs a single network."""
        if _is_composed(self.model) and "members" not in type(self).model_fields:
            raise UsageError(
                f"{prefix}the model is {self.model}, which has no weights of its own, and {self.verb} needs one "
                "network; give a member, and assess the whole afterwards"
            )


class TaskOfModel(SettingGroup):
    """Settings of what the model returns, if it is not one class of each example."""

    section: ClassVar[Section] = "model"
    task: Annotated[TaskName | None, Flag("TASK", common=True)] = Field(
        default=None,
        description="What the model returns: classes, segmentation (masks), detection (boxes), regression (numbers) or "
        "multilabel. Masks, boxes and a tolerance show it.",
    )
    tolerance: Annotated[values.Tolerance | None, Flag("N|N%")] = Field(
        default=None,
        description="Largest error of a regression that counts as right, in the units of the targets, or in percent of "
        "each target.",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a regression without a tolerance, or a tolerance of another task."""
        if self.task == "regression" and self.tolerance is None:
            raise UsageError(
                f"{prefix}a regression needs the largest error that counts as right",
                Remedy("tolerance", "10%"),
            )
        if self.tolerance is not None and self.task not in (None, "regression"):
            raise UsageError(
                f"{prefix}tolerance is {self.tolerance}, which is for a regression, and the task is {self.task}",
                Remedy("tolerance"),
            )


def _is_composed(model: object) -> bool:
    return isinstance(model, str) and model.startswith((ENSEMBLE, MIXED))


class Members(SettingGroup):
    """Setting with the models that an ensemble or a mix consists of."""

    section: ClassVar[Section] = "model"
    members: Annotated[values.Members, Flag("MODEL[,K=V]", "--member", completion="MODEL")] = Field(
        default_factory=list,
        description=f"Member of the model {', '.join(ENSEMBLE + name for name in ('', *COMBINATIONS[1:]))}, or the "
        f"accurate and then the robust member of {MIXED}; an address, or `model: ADDRESS` with arch, mean, std.",
    )

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if the number of members or other settings do not fit the address of the model."""
        model, n = self.model, len(self.members)
        if not _is_composed(model):
            if n:
                raise UsageError(
                    f"{prefix}members are given, which are those of the models {ENSEMBLE} and {MIXED}, and the model "
                    f"is {model if isinstance(model, str) else 'another one'}",
                    Remedy("members", option="--member"),
                )
            return
        address, combine = model.partition(":")[0] + ":", model.partition(":")[2]
        known = COMBINATIONS if address == ENSEMBLE else ()
        if combine and combine not in known:
            raise UsageError(
                f"{prefix}the model is {model!r}; expected {ENSEMBLE}, {MIXED}, or one of "
                f"{', '.join(ENSEMBLE + name for name in COMBINATIONS)}"
            )
        if (n != 2) if address == MIXED else (n < 2):
            expected = "two members (the accurate one first)" if address == MIXED else "at least two members"
            raise UsageError(
                f"{prefix}{model} has {n} {'member' if n == 1 else 'members'}; {expected} were expected",
                Remedy(
                    "members", Placeholder("MODEL", "[MODEL, MODEL]"), "--member", reason="for each of them"
                ),
            )
        for name in ("arch", "mean", "std", *(() if address == MIXED else ("model_args",))):
            if getattr(self, name, None):
                raise UsageError(
                    f"{prefix}{written.get(name, name)} is given, and the model is {model}; give it for each member, "
                    f"as in MODEL,{name if name != 'model_args' else 'KEY'}=VALUE",
                    Remedy(name),
                )
        if any(getattr(member, "skip", None) for member in self.members):
            raise UsageError(
                f"{prefix}a member has skip, which changes the gradients of a surrogate; leave it out"
            )


class InferenceSource(SettingGroup):
    """Settings for opening a model that can be evaluated but not trained: an ONNX file, or a model behind a server."""

    section: ClassVar[Section] = "model"
    input_shape: Annotated[values.InputShape | None, Flag("N,…")] = Field(
        default=None,
        description="Sizes of one example without the batch, as in 3,224,224, if an .onnx file does not fix them.",
    )
    constants: Annotated[dict[str, FiniteFloat], Flag("NAME=VALUE", "--constant")] = Field(
        default_factory=dict,
        description="Value of a further input of an .onnx file, as in sr=16000. A recurrent state starts at 0, and is "
        "carried over the windows of an example, whose size is input_shape.",
    )
    allow_hosts: Annotated[values.Names, Flag("HOST[:PORT]", "--allow-host")] = Field(
        default_factory=list, description="Server to which requests may be sent."
    )
    headers: Annotated[list[values.Header], Flag("'NAME: env:VAR'", "--header")] = Field(
        default_factory=list,
        description="Header of the requests. Its value is read from an environment variable.",
    )
    http_request: Annotated[str | None, Flag("JSON")] = Field(
        default=None,
        description="JSON of a request, with $x for the rows, as in '{\"instances\": $x}', or $x_one for one example "
        "without a batch axis ($x_last and $x_one_last: channels last). Default: the Open Inference Protocol.",
    )
    http_response: Annotated[str | None, Flag("PATH")] = Field(
        default=None,
        description="Path of the scores or classes in the JSON of an answer, as in predictions or rows.*.scores. In "
        "the Open Inference Protocol the name of an output.",
    )
    http_labels: Annotated[bool, Flag()] = Field(
        default=False, description="Answers contain classes (numbers or names) instead of scores."
    )
    http_max_rows: Annotated[values.Positive, Flag("N")] = Field(
        default=64, description="Maximum number of rows in a request (default: 64)."
    )
    http_timeout: Annotated[values.Timeout, Flag("T")] = Field(
        default="30s", description="Maximum time for an answer (default: 30s)."
    )
    http_retries: Annotated[values.Whole, Flag("N")] = Field(
        default=5, description="Number of retries of a request that failed temporarily (default: 5)."
    )
    http_concurrency: Annotated[values.Positive, Flag("N")] = Field(
        default=1, description="Maximum number of simultaneous requests (default: 1)."
    )
    http_rate: Annotated[values.Rate | None, Flag("N/T")] = Field(
        default=None, description="Maximum rate of requests, as in 4/s or 100/min."
    )
    guard: Annotated[values.PathText | None, Flag("FILE[:RULE]")] = Field(
        default=None,
        description="Guard (guard.yaml) whose calibrated detectors, or only RULE, become a part of the model.",
    )


class QueryLimit(SettingGroup):
    """Limit of the number of rows that are sent to a model behind a server."""

    section: ClassVar[Section] = "model"
    max_queries: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Maximum number of rows sent to a server. The command stops there, and --resume continues a run.",
    )


class ServerLimits(QueryLimit):
    """Settings that limit the requests of a run to a model behind a server."""

    section: ClassVar[Section] = "model"
    on_refused: Annotated[Literal["reject", "stop"], Flag("HOW")] = Field(
        default="reject",
        description="Effect of an attacked input that a server refuses (400, 422): reject (it counts as rejected, the "
        "default) or stop (the run stops).",
    )
    keep_answers: Annotated[bool, Flag()] = Field(
        default=False, description="Keep the server's answers in the run folder after the run."
    )


class InputSpace(SettingGroup):
    """Settings for the inputs of a model: their bounds, and the normalisation that is applied inside the model."""

    section: ClassVar[Section] = "model"
    bounds: Annotated[values.Bounds, Flag("LOW,HIGH|@FILE")] = Field(
        default=(0.0, 1.0),
        description="Lowest and highest legal input value (default: 0,1), or a JSON file with the two values of each "
        "feature by its name or position. In Python also two arrays.",
    )
    mean: Annotated[values.Numbers | None, Flag("M,…", common=True)] = Field(
        default=None, description="Subtracted from the input inside the model, one number per channel."
    )
    std: Annotated[values.Numbers | None, Flag("S,…", common=True)] = Field(
        default=None, description="Divides the input inside the model, one number per channel."
    )
    data_normalised: Annotated[values.Normalised | None, Flag("M,…/S,…")] = Field(
        default=None,
        description="Mean and standard deviation by which the data were normalised. This is undone, and done inside "
        "the model instead, so that eps is in the units before the normalisation.",
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if a standard deviation or the bounds are invalid, or if the normalisation of the inputs
        is declared twice.
        """
        if self.std is not None and not all(number > 0 for number in self.std):
            raise UsageError(
                f"{written.get('std', f'{prefix}std')} is {list(self.std)}; every number must be positive, as in "
                "0.2470,0.2435,0.2616"
            )
        if self.data_normalised is not None and (self.mean is not None or self.std is not None):
            raise UsageError(
                f"{prefix}give data_normalised, for data that were normalised beforehand, or mean and std, for data "
                "that were not and a model that expects normalised input, not both"
            )
        if not isinstance(self.bounds, tuple) or not isinstance(self.bounds[0], float):
            return  # checked when they were parsed, with the name of the feature
        low, high = self.bounds
        if not low < high or not all(map(math.isfinite, (low, high))):
            raise UsageError(
                f"{prefix}bounds are {self.bounds}; give two numbers, the lower first, as in 0,1"
            )


class DataSource(SettingGroup):
    """Settings for the examples: their address, and how they are read."""

    section: ClassVar[Section] = "data"
    data: values.Given | None = Field(
        default=None,
        description="A bundled or catalogue name, an .npz, .csv or .parquet file, or a folder with one folder of "
        "images (.png, .jpg, …), DICOM files (.dcm) or clips (.wav, .flac) for each class.",
    )
    split: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        description="Split of the data, or a value of a table's split column (default: test if there is one).",
    )
    label: Annotated[str | None, Flag("COL", common=True)] = Field(
        default=None, description="Label column of a table."
    )
    drop: Annotated[list[str], Flag("COL")] = Field(
        default_factory=list, description="Leave out a column of a table, such as an id."
    )
    x: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        description="Name of the inputs: an array of an .npz file (default: x_test or x), a column of images or of "
        "arrays in a .parquet file, a column of texts, or an entry of batches that are mappings.",
    )
    y: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        description="Name of the labels: an array of an .npz file (default: y_test or y), or an entry of batches that "
        "are mappings.",
    )
    separator: Annotated[values.Separator | None, Flag("C")] = Field(
        default=None,
        description="Character between the cells of a .csv file, as in ';' or tab (default: a comma).",
    )
    header: Annotated[
        bool,
        Flag(
            name="--no-header",
            help="Read the first row of a .csv file as data. The columns get the names 0, 1, 2, …, or those of the "
            "model if their number is equal.",
        ),
    ] = Field(
        default=True,
        description="Whether the first row of a .csv file contains the names of the columns (default: yes). Otherwise "
        "they are named 0, 1, 2, …, or as those of the model if their number is equal.",
    )
    follow_links: Annotated[bool, Flag(identifies=False)] = Field(
        default=False,
        description="Read images or clips through links that lead out of the folder of the data.",
    )
    sampling_rate: Annotated[values.Positive | None, Flag("HZ")] = Field(
        default=None,
        description="Sampling rate of clips. Files with another rate are resampled to it, and arrays have it. Inputs "
        "are then clips, from -1 to 1 unless bounds are given.",
    )
    bits: Annotated[Literal[10, 12, 14, 16] | None, Flag("N")] = Field(
        default=None,
        description="Bits of the pixels of stored arrays of whole numbers: values from 0 to 2^N - 1 are read as 0 to "
        "1, as bytes are from 0 to 255. DICOM files state their own.",
    )
    layout: Annotated[Literal["chw", "hwc", "asis"] | None, Flag("L")] = Field(
        default=None,
        description="Axes of stored arrays: chw (channels first), hwc (channels last), or asis (unchanged). By default "
        "they are determined with the model.",
    )


class OtherData(SettingGroup):
    """Settings for data other than the examples on which a model is evaluated, such as the data for training."""

    section: ClassVar[Section] = "data"
    fit: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Examples on which attacks are fitted, or models are trained (default: the train split).",
    )


class ExampleSelection(SettingGroup):
    """Settings that select some of the examples of `data`. Other data of a command, such as `fit`, are not affected."""

    section: ClassVar[Section] = "data"
    n: Annotated[values.Positive | None, Flag("N", "-n", common=True)] = Field(
        default=None,
        description="Use the first N examples of DATA (monitor: of STREAM). Data of other options are not affected.",
    )
    sample: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Use N examples of DATA chosen at random by the seed. Data of other options are not affected.",
    )

    @property
    def selects(self) -> bool:
        """Whether some of the examples are selected."""
        return self.n is not None or self.sample is not None

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if both `n` and `sample` are given."""
        if self.n is not None and self.sample is not None:
            raise UsageError(f"{prefix}give n (the first N) or sample (a random N), not both")


class ExampleGroups(SettingGroup):
    """Setting with the groups of the examples."""

    section: ClassVar[Section] = "data"
    groups: Annotated[values.ExampleGroups | None, Flag("NAME")] = Field(
        default=None,
        description="Groups of the examples, for the robust accuracy of each and worst_group: a column of a table, "
        "an array of an .npz file, or label for the classes. In Python also an array.",
    )


class MaskCount(SettingGroup):
    """Setting of the vote over masks."""

    masks: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Number of masks of the vote over masks along each axis of an image (default: 6). More masks hide "
        "less of an image each, and take more time.",
    )


class SensitiveColumn(SettingGroup):
    """Setting with the column of a table that an attacker infers."""

    section: ClassVar[Section] = "data"
    sensitive: Annotated[str | None, Flag("COLUMN", common=True)] = Field(
        default=None, description="Column with the attribute that the attacker infers, as in sex."
    )


class ThreatSource(SettingGroup):
    """Setting with the threat model, which states what the attacker may change and use."""

    section: ClassVar[Section] = "threat"
    threat: Annotated[values.Threat, Flag("T", short="-t", completion="THREAT", common=True)] = Field(
        default="linf:8/255",
        validate_default=True,
        description="Threat model: what the attacker may change and use, as in linf:8/255,queries=1000 (default: "
        "linf:8/255).",
    )

    @classmethod
    def model_construct(cls, _fields_set: set[str] | None = None, **values: Any) -> Self:
        """Return settings without validation, but with a parsed default of the threat model."""
        given = set(values) if _fields_set is None else _fields_set
        usual = threat_of(cls.model_fields["threat"].default)
        return super().model_construct(_fields_set=given, **{"threat": usual, **values})

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a threat on texts in an adaptation or a rotation, and for the name of a target class
        outside of an assessment.
        """
        if self.threat.goal_name and self.verb not in ("assess", "certify"):
            raise UsageError(
                f"{prefix}the threat is {self.threat}, and names of classes are looked up by assess only; give the "
                "number of the class, as in goal=targeted:0"
            )
        if self.verb not in ("certify", "doctor") and "on" in self.threat.change.limits:
            raise UsageError(
                f"{prefix}the threat is {self.threat}, and changes of embeddings are no inputs of a model, so that "
                "nothing attacks them; prove robustness to them with holdfast certify"
            )
        if self.verb in ("adapt", "harden", "rotate") and self.threat.change.domain is BYTES:
            raise UsageError(
                f"{prefix}the threat is {self.threat}, and {self.verb} is not available for files; assess measures a "
                "model of files"
            )
        if self.verb in ("adapt", "rotate") and self.threat.change.domain is TEXT:
            raise UsageError(
                f"{prefix}the threat is {self.threat}, and {self.verb} is not available for texts; assess measures a "
                "model of texts"
            )


class SuiteSettings(SettingGroup):
    """Settings for the attacks of an assessment and for measurements in addition to them."""

    section: ClassVar[Section] = "threat"
    suite: Annotated[values.SuiteSpec | None, Flag("S", short="-s", completion="SUITE", common=True)] = Field(
        default=None,
        description=f"Suite of attacks: {', '.join(SUITES)} (default: {DEFAULT_SUITE}; trees for a tree "
        "ensemble, black-box for another model without gradients, transfer for access=none), or attacks by name, "
        "as in pgd,square.",
    )
    attacks: list[dict[str, Any]] | None = Field(
        default=None,
        min_length=1,
        description="Attacks with settings instead of a suite, each `use: NAME` and its settings.",
    )
    surrogates: Annotated[values.Surrogates, Flag("MODEL[,K=V]", "--surrogate", completion="MODEL")] = Field(
        default_factory=list,
        description="Surrogate model of the attacker, on which transfer examples are computed: an address, or "
        "`model: ADDRESS` with arch, mean, std, skip.",
    )
    only: Annotated[values.Names, Flag("ATTACK", completion="ATTACK")] = Field(
        default_factory=list, description="Run only these attacks of the suite."
    )
    skip: Annotated[values.Names, Flag("ATTACK", completion="ATTACK")] = Field(
        default_factory=list, description="Leave these attacks of the suite out."
    )
    curve: Annotated[bool, Flag(negated=True)] = Field(
        default=False,
        description="Also measure robust accuracy as a function of eps, with minimum-norm attacks.",
    )
    full: Annotated[bool, Flag()] = Field(
        default=False, description="Run every attack on every example, even if an earlier one broke it."
    )
    doubts: Annotated[bool, Flag(negated=True)] = Field(
        default=True, description="Test for reasons why the result may be too optimistic (default: on)."
    )
    adaptive: Annotated[bool, Flag(negated=True)] = Field(
        default=False,
        description="Also run adaptive attacks, chosen by the raised doubts and for a detector (BPDA, EOT, search).",
    )
    adaptive_budget: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None,
        description="Queries and gradients that adaptive attacks share for each example (default: 20000).",
    )
    save_adversarial: Annotated[bool, Flag()] = Field(
        default=False, description="Store all adversarial examples in the run folder."
    )

    def refuse_contradictions(self, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for both a suite and a list of attacks, and for a budget without adaptive attacks."""
        if self.suite is not None and self.attacks is not None:
            raise UsageError(f"{prefix}give a suite or a list of attacks, not both")
        if self.adaptive_budget is not None and not self.adaptive:
            raise UsageError(
                f"{prefix}adaptive_budget is {self.adaptive_budget}, but no adaptive attacks are run",
                Remedy("adaptive", True),
                Remedy("adaptive_budget"),
            )


class StoredExamples(SettingGroup):
    """Setting that leaves examples out of what a command writes."""

    section: ClassVar[Section] = "report"
    examples: Annotated[
        bool,
        Flag(
            name="--no-examples",
            help="Store and show no examples, only numbers of each, such as its label, margin and distance.",
        ),
    ] = Field(
        default=True,
        description="Whether some examples are stored and shown as pictures, texts or values, in addition to numbers "
        "of each example, such as its label, margin and distance (default: true).",
    )

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` if adversarial examples are to be stored, and no examples."""
        if not self.examples and "save_adversarial" in type(self).model_fields and self.save_adversarial:
            raise UsageError(
                f"{prefix}save_adversarial stores all adversarial examples, and no examples are to be stored",
                Remedy("save_adversarial"),
                Remedy("examples", option="--no-examples"),
            )


class GateSettings(SettingGroup):
    """Settings for the gates of a run, and for the doubts that the user accepts."""

    section: ClassVar[Section] = "report"
    gates: Annotated[values.Gates, Flag("G", "--gate", "-g", identifies=False, common=True)] = Field(
        default_factory=list,
        description='Condition on a metric, as in "robust_accuracy >= 0.40", or for harden the verdict improved.',
    )
    accept_doubts: Annotated[values.Reasons, Flag('NAME="why"', "--accept-doubt", identifies=False)] = Field(
        default_factory=dict, description="Accept a raised doubt, with the reason."
    )
    verdicts: ClassVar[tuple[str, ...]] = ()
    """verdicts of the verb that a gate may require by their name"""

    @property
    def trains_generator(self) -> bool:
        """Whether a generator is trained instead of a classifier."""
        return False

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for a gate on a verdict that the verb does not reach, or on a metric that it does not
        measure, and for a bundled environment with a threat on examples.
        """
        domain = self.threat.change.domain
        if isinstance(self.data, str) and self.data in ENVIRONMENTS and domain is not CONTROL:
            raise UsageError(
                f"{prefix}data is {self.data!r}, an environment of policies, and the threat {self.threat} changes "
                "examples of data",
                Remedy("threat", "observations:linf:0.1"),
            )
        gated: Collection[str] = GATED
        if domain is not None and domain.metrics:
            gated = domain.certified if self.verb == "certify" else domain.metrics
        for gate in self.gates:
            if gate.strip() in VERDICTS and (gate.strip() not in self.verdicts or self.trains_generator):
                raise refused_verdict(gate.strip(), prefix)
            parse_gate(gate, values.GENERATOR_METRICS if self.trains_generator else gated)


class Reports(SettingGroup):
    """Settings for the reports of a run, and for the earlier run with which it is compared."""

    section: ClassVar[Section] = "report"
    baseline: Annotated[values.Given | None, Flag("RUN", completion="PATH")] = Field(
        default=None,
        description="Folder of an earlier run, for gates that end in `vs baseline`. assess also begins with the "
        "adversarial examples that it stores (--save-adversarial).",
    )
    output: ReportFiles = Field(default_factory=list, description=REPORT_FILE)


class Execution(SettingGroup):
    """Settings for the execution of a run, such as the batch size, the number of worker processes and
    the time limit.
    """

    section: ClassVar[Section] = "run"
    time_budget: Annotated[values.Duration | None, Flag("T")] = Field(
        default=None, description="Stop attacking after this time, as in 10min."
    )
    batch_size: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None, description="Examples in one call of the model."
    )
    workers: Annotated[values.Positive | None, Flag("N")] = Field(
        default=None, description="Number of processes that share the work, each with one thread."
    )


class Seed(SettingGroup):
    """Setting with the seed of all random numbers."""

    section: ClassVar[Section] = "run"
    seed: Annotated[values.Whole, Flag("N")] = Field(
        default=0, description="Seed of all random numbers (default: 0)."
    )


class Device(SettingGroup):
    """Setting with the torch device on which the model runs."""

    section: ClassVar[Section] = "run"
    device: Annotated[str, Flag("NAME", identifies=False, common=True)] = Field(
        default="auto", description="Device: auto, cpu, cuda or cuda:1 (default: auto)."
    )


class AssessOptions(SettingGroup):
    """Settings of the command `holdfast assess` that no other command has."""

    section: ClassVar[Section] = "threat"
    across: Annotated[values.Others, Flag("DATA", completion="DATA")] = Field(
        default_factory=list,
        description="Another data set of the same shape: perturbations are transferred from DATA to it and back.",
    )
    certify: Annotated[bool, Flag()] = Field(
        default=False,
        description="First prove robustness by interval bounds and CROWN. Of the certified examples, 32 are attacked.",
    )
    until: Annotated[values.Until | None, Flag("G", common=True)] = Field(
        default=None,
        description='Measure examples in a random order only until this condition is decided, as in "robust_accuracy '
        '>= 0.40". It is also a gate, whose interval is valid at every look.',
    )
    transform: Annotated[values.Transform | None, Flag("T")] = Field(
        default=None,
        description="Transform every input at random before the model, as in rotate=15,scale=0.1,brightness=0.2, or "
        "clips as in room=1,shift=0.1s,gain=6dB,band=300-3400.",
    )


_BUDGET = "Time for the training, as in 10min (default: the epochs of the recipe)."


class HardenOptions(SettingGroup):
    """Settings of the command `holdfast harden` that no other command has."""

    recipe: Annotated[values.RecipeSpec, Flag("R", completion="RECIPE", common=True)] = Field(
        default_factory=lambda: {"use": "auto"},
        description=f"Training method: auto (the default, which selects one), {', '.join(RECIPES)}; for generators "
        f"{' and '.join(GENERATOR_RECIPES)}; for policies {' and '.join(POLICY_RECIPES)}. Settings: --set "
        "recipe.NAME=VALUE, or `use: NAME` with its settings.",
    )
    budget: Annotated[values.Duration | None, Flag("T", common=True)] = Field(
        default=None, description=f"{_BUDGET} The assessments take additional time."
    )
    assess_budget: Annotated[values.Duration | None, Flag("T")] = Field(
        default=None,
        description="Time for the assessments before and after, which use fewer test examples if necessary (default: "
        "the budget of the training).",
    )
    anyway: Annotated[bool, Flag()] = Field(
        default=False, description="Train although less than one epoch fits into the budget."
    )
    checkpoint_every: Annotated[values.Positive | None, Flag("N", identifies=False)] = Field(
        default=None,
        description="Number of updates between two checkpoints within an epoch (default: a checkpoint after each "
        "epoch).",
    )
    train_only: Annotated[values.Names, Flag("GLOB")] = Field(
        default_factory=list,
        description="Train only parameters whose name matches, as in 'fc.*' or 'layer4.*'.",
    )
    log: Annotated[values.LogTargets, Flag("KIND:PLACE", identifies=False)] = Field(
        default_factory=list,
        description="Log the measurements of each epoch, as in csv:FILE, tensorboard:DIR, mlflow:URI or wandb:PROJECT.",
    )
    unlabelled: Annotated[values.Given | None, Flag("DATA", completion="DATA")] = Field(
        default=None,
        description="Additional examples to train on without labels (recipe vat): an address with a train split.",
    )


class RotateOptions(SettingGroup):
    """Settings of the command `holdfast rotate` that no other command has: how parameter sets are trained and
    generated, and when they are swapped.
    """

    recipe: Annotated[values.SetsRecipeSpec, Flag("R", completion="SETS_RECIPE", common=True)] = Field(
        default_factory=lambda: {"use": CARD},
        description=f"Training method of the sets: card (the default: as the model was trained, else standard), "
        f"{', '.join(RECIPES)}.",
    )
    budget: Annotated[values.Duration | None, Flag("T", common=True)] = Field(
        default=None,
        description="Time for all trainings of the collection, as in 20min (default: the epochs of the recipe).",
    )
    source: Annotated[values.SourceSpec, Flag("S", completion="SOURCE", common=True)] = Field(
        default_factory=lambda: {"use": "basins"},
        description=f"Method that collects sets: {', '.join(SOURCES)} (default: basins). Settings: --set "
        "source.NAME=VALUE, or `use: NAME` with its settings.",
    )
    initialisation: Literal["he", "own"] = Field(
        default="he",
        description="Initial weights of an independent training: he (He initialisation) or own (that of each layer).",
    )
    codec: dict[str, Any] = Field(default_factory=dict, description="Settings of the codec.")
    generator: dict[str, Any] = Field(default_factory=dict, description="Settings of the latent diffusion.")
    immunise: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the training against examples computed on stolen sets.",
    )
    every: Annotated[list[values.Every], Flag("T", common=True)] = Field(
        default_factory=list,
        description="When to swap, as in 50q/principal (answers to one principal) or 24h. A stolen serving set is "
        "always swapped.",
    )
    min_waiting: Annotated[values.Positive, Flag("N")] = Field(
        default=8, description="Number of admitted sets that should wait (default: 8)."
    )
    n_judged: values.Positive = Field(
        default=2000,
        description="Number of held-out examples on which a set is judged first. It is doubled while a gate is "
        "inconclusive.",
    )


class ExplainOptions(SettingGroup):
    """Settings of the command `holdfast explain` that no other command has."""

    index: Annotated[values.Whole | None, Flag("ID", common=True)] = Field(
        default=None,
        description="Row number of the example to explain (default: the model is explained).",
    )
    from_run: Annotated[values.PathText | None, Flag("FOLDER", completion="PATH", common=True)] = Field(
        default=None,
        description="Folder of a finished run of this model and these data, whose adversarial inputs are used if it "
        "has stored them.",
    )
    train: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Training examples, of which the nearest ones are shown.",
    )
    checkpoints: Annotated[list[values.Given], Flag("FILE", name="--checkpoint", completion="PATH")] = Field(
        default_factory=list,
        description="Weights of the model after an epoch of its training, for the examples that support a wrong "
        "prediction (TracIn); several may be given.",
    )
    output: ReportFiles = Field(default_factory=list, description=REPORT_FILE)

    def refuse_contradictions(self: Any, prefix: str, written: Mapping[str, str]) -> None:
        """Raise `UsageError` for the explanation of an example that is not to be shown."""
        if self.index is not None and not self.examples:
            raise UsageError(
                f"{prefix}index is {self.index}, and the explanation of an example shows it",
                Remedy("examples", option="--no-examples"),
                Remedy("index", reason="for an explanation of the model"),
            )


class MonitorOptions(SettingGroup):
    """Settings of the command `holdfast monitor` that no other command has."""

    reference: Annotated[values.Given | None, Flag("DATA", completion="DATA", common=True)] = Field(
        default=None,
        description="Examples with which the stream is compared. The model must not have been trained on them.",
    )
    layer: Annotated[str | None, Flag("NAME")] = Field(
        default=None,
        description="Layer of the model whose outputs are compared as embeddings, as in layer4 (default: the one "
        "before the last linear layer).",
    )
    generated: Annotated[bool, Flag(common=True)] = Field(
        default=False,
        description="Whether the stream consists of samples of a generator. Copies of the reference and repeats are "
        "counted as well, and labels are not used. A folder of images without class folders is such a stream.",
    )
    features: Annotated[str | None, Flag("MODEL[,K=V]", completion="MODEL")] = Field(
        default=None,
        description="Network whose features of generated samples are compared, as in net.pt,arch=net.py:make (default: "
        "only inputs are compared).",
    )
    alarm: Annotated[values.DriftTests, Flag("TEST", completion="DRIFT_TEST", common=True)] = Field(
        default_factory=lambda: ["martingale"],
        description=f"Test whose alarm sets the exit code 1: {', '.join(DRIFT_TESTS)} (default: martingale).",
    )
    output: ReportFiles = Field(default_factory=list, description=REPORT_FILE)
