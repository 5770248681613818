"""The settings of an assessment with validation. They need pydantic, but not torch.

The same names are used as keys of the YAML file, flags of the command line and arguments of `holdfast.assess`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from holdfast.config import values
from holdfast.config.consent import refuse_consent
from holdfast.config.grammar import (
    did_you_mean,
    parse_pairs,
)
from holdfast.config.naming import CARD
from holdfast.config.suites import refuse_unknown
from holdfast.config.wording import complaint, place
from holdfast.config.yaml_text import MAX_CHARACTERS, parse_yaml
from holdfast.core.errors import TargetError, UsageError

SCHEMA_VERSION = 1


class AssessSettings(BaseModel):
    """All settings of `holdfast assess`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), strict=False)

    schema_version: Literal[1] = Field(1, description="version of this file's format")
    model: str | None = Field(
        None,
        description="a bundled name, file.py:factory, a .safetensors, .pt, .pt2, .onnx, .skops, .json or .ubj file, "
        "a URL",
    )
    data: str | None = Field(
        None,
        description="a bundled or catalogue name, an .npz, .csv or .parquet file, or a folder with one folder of "
        "images for each class",
    )
    arch: str | None = Field(
        None, description="architecture of a state dict: a catalogue name or file.py:factory"
    )
    model_args: dict[str, str] = Field(
        default_factory=dict, description="arguments of the factory in file.py:factory"
    )
    input_shape: values.InputShape | None = Field(
        None,
        description="sizes of one example without the batch, as in 3,224,224, if an .onnx file does not fix them",
    )
    bounds: values.Numbers = Field(
        (0.0, 1.0), description="lowest and highest legal input", min_length=2, max_length=2
    )
    mean: values.Numbers | None = Field(
        None, description="subtracted from the input inside the model, one number per channel"
    )
    std: values.Numbers | None = Field(
        None, description="divides the input inside the model, one number per channel"
    )
    data_normalised: values.Normalised | None = Field(
        None,
        description="MEAN/STD by which the data were normalised, one number per channel; it is undone, so that eps is "
        "in pixels, and the model normalises its input instead",
    )
    layout: Literal["chw", "hwc", "asis"] | None = Field(
        None,
        description="axes of the stored arrays: chw (channels first), hwc (channels last), or asis (unchanged); by "
        "default determined with the model",
    )
    model_output: Literal["logit", "probability"] | None = Field(
        None,
        description="what the model returns: logit or probability; required for one number per example from 0 to 1",
    )
    classes: values.Classes | None = Field(None, description="expected number of classes")
    class_names: values.ClassNames | None = Field(
        None,
        description="names of the model's classes in the order of its outputs, or @FILE with one per line; class "
        "folders and text labels are matched with them",
    )
    class_order: Literal["lexical", "numeric"] | None = Field(
        None,
        description="order by which class folders and text labels were numbered in training, if no names are given",
    )
    allow_hosts: values.Names = Field(
        default_factory=list, description="servers to which requests may be sent, each HOST or HOST:PORT"
    )
    headers: list[values.Header] = Field(
        default_factory=list, description="headers of requests to the server, each `NAME: env:VARIABLE`"
    )
    http_request: str | None = Field(
        None,
        description="JSON of a request to the server, with $x for the rows, or $x_one for one example without a batch "
        "axis ($x_last and $x_one_last: channels last); by default the Open Inference Protocol",
    )
    http_response: str | None = Field(
        None,
        description="path of the scores or classes in the JSON of an answer, as in predictions or rows.*.scores; in "
        "the Open Inference Protocol the name of an output",
    )
    http_labels: bool = Field(
        False, description="answers contain one class per row, as a number or a name, instead of scores"
    )
    http_max_rows: values.Positive = Field(64, description="maximum number of rows in a request")
    http_timeout: values.Timeout = Field("30s", description="maximum time for an answer")
    http_retries: values.Whole = Field(
        5, description="number of retries of a request that failed temporarily"
    )
    http_concurrency: values.Positive = Field(1, description="maximum number of simultaneous requests")
    http_rate: values.Rate | None = Field(None, description="maximum rate of requests, as in 4/s or 100/min")
    max_queries: values.Positive | None = Field(
        None,
        description="maximum number of rows sent to a server; then the run stops, and --resume continues it",
    )
    on_refused: Literal["reject", "stop"] = Field(
        "reject",
        description="an attacked input that a server refuses (400, 422) counts as rejected, or stops the run",
    )
    keep_answers: bool = Field(False, description="keep the server's answers in the run folder after the run")
    split: str | None = Field(None, description="train or test, or a value of a table's split column")
    label: str | None = Field(None, description="label column of a table")
    x: str | None = Field(None, description="name of the array of inputs in an .npz file")
    y: str | None = Field(None, description="name of the array of labels in an .npz file")
    drop: list[str] = Field(default_factory=list, description="columns of a table that are not features")
    fit: str | None = Field(
        None,
        description="address of other examples to fit attacks on, or to train on in harden; by default the train split",
    )
    across: list[str] = Field(
        default_factory=list,
        description="other data of the same shape, to and from which perturbations are transferred",
    )
    transform: values.Transform | None = Field(
        None,
        description="random transformations of inputs before the model, as in rotate=15,scale=0.1,brightness=0.2",
    )
    n: values.Positive | None = Field(None, description="use the first N examples")
    sample: values.Positive | None = Field(
        None, description="use a random sample of N examples, determined by the seed"
    )
    threat: values.Threat = Field(
        "linf:8/255", description="what the attacker may change and use, as in linf:8/255,queries=1000"
    )
    surrogates: list[values.Surrogate] = Field(
        default_factory=list,
        description="surrogate models of the attacker, each an address or `model: ADDRESS` with arch, mean, std, skip",
    )
    suite: values.SuiteSpec | None = Field(
        None,
        description="a suite, or names of attacks, as in [pgd, square]; by default fast (transfer if access is none), "
        "unless attacks are listed",
    )
    attacks: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="attacks with settings, each `use: NAME` and its settings"
    )
    only: values.Names = Field(default_factory=list, description="attacks of the suite to run, by name")
    skip: values.Names = Field(default_factory=list, description="attacks of the suite to leave out, by name")
    gates: list[values.Gate] = Field(
        default_factory=list, description='conditions on metrics, as in "robust_accuracy >= 0.40"'
    )
    baseline: str | None = Field(None, description="run folder with which `vs baseline` gates compare")
    accept_doubts: values.Reasons = Field(
        default_factory=dict, description="raised doubts that are accepted, each with a reason"
    )
    curve: bool = Field(
        False, description="also measure robust accuracy as a function of eps, with minimum-norm attacks"
    )
    full: bool = Field(
        False, description="run every attack on every example, even if an earlier one broke it"
    )
    doubts: bool = Field(True, description="test for reasons why the robust accuracy may be too high")
    adaptive: bool = Field(
        False,
        description="also run adaptive attacks, chosen by the raised doubts and for a detector (BPDA, EOT, search)",
    )
    save_adversarial: bool = Field(False, description="store all adversarial examples in the run folder")
    time_budget: values.TimeBudget | None = Field(
        None, description="stop attacking after this time, as in 10min"
    )
    batch_size: values.Positive | None = Field(
        None, description="number of examples in one call of the model"
    )
    workers: values.Positive | None = Field(
        None, description="number of processes that share the work, each with one thread"
    )
    seed: values.Whole = Field(0, description="seed of all random numbers")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    trust_code: bool = Field(False, description="allow model files to run the code that they contain")
    output: list[str] = Field(
        default_factory=list,
        description="report files, in the format of their suffix: .html .json .xml .sarif .md .csv",
    )


class HardenSettings(AssessSettings):
    """All settings of `holdfast harden`: how to train, and how the model is assessed before and after."""

    recipe: values.RecipeSpec = Field(
        default_factory=lambda: {"use": "auto"},
        description="training method: a name, `auto` to have one selected, or `use: NAME` with its settings",
    )
    budget: values.Budget | None = Field(
        None, description="time for the training, as in 10min; by default the epochs of the recipe"
    )
    unlabelled: str | None = Field(
        None,
        description="additional examples whose labels are not used, for vat: an address with a train split",
    )


class RotateSettings(HardenSettings):
    """All settings of `holdfast rotate`: where parameter sets come from, how they are trained, and when they swap."""

    recipe: values.SetsRecipeSpec = Field(
        default_factory=lambda: {"use": CARD},
        description="training method of the sets: a name, `card` for that of the model's card (else standard), or "
        "`use: NAME` with its settings",
    )
    source: values.SourceSpec = Field(
        default_factory=lambda: {"use": "basins"},
        description="method that collects sets: basins, seeds, trajectory, subset, low-rank, or `use: NAME` with "
        "settings",
    )
    begins: Literal["he", "own"] = Field(
        "he",
        description="initial weights of an independent training: he (He initialisation) or own (that of each layer)",
    )
    codec: dict[str, Any] = Field(default_factory=dict, description="settings of the codec")
    generator: dict[str, Any] = Field(default_factory=dict, description="settings of the latent diffusion")
    immunise: dict[str, Any] = Field(
        default_factory=dict, description="settings of the training against examples computed on stolen sets"
    )
    every: list[values.Every] = Field(
        default_factory=list, description="when to swap, as in 50q/principal or 24h"
    )
    keep: values.Positive = Field(8, description="number of admitted sets that wait")
    judged: values.Positive = Field(
        2000,
        description="number of held-out examples on which a set is judged first; twice as many while a gate is unclear",
    )


_RIVALS = (("n", "sample"), ("sample", "n"), ("suite", "attacks"), ("attacks", "suite"))
"""Pairs of settings that exclude each other: a flag (or a `--set`) for one replaces the other in the file."""


S = TypeVar("S", bound=AssessSettings)


def read_settings(
    path: Path | None,
    overrides: Mapping[str, Any],
    sets: Sequence[str] = (),
    *,
    flags: Mapping[str, str] = MappingProxyType({}),
    kind: type[S],
) -> S:
    """Return validated settings from a YAML file, `--set a.b=c` and overrides, in increasing order of precedence.

    The file may be shared by all verbs: settings of other verbs are validated and left out. `flags` are the names of
    the overrides for messages.
    """
    loaded = {} if path is None else load(path)
    refuse_consent(loaded, str(path))
    content = _for(loaded, str(path), kind)
    overriding = {key: value for key, value in overrides.items() if value is not None}
    assignments = parse_pairs(sets, "--set")
    spoken = {key.partition(".")[0]: f"--set {key.partition('.')[0]}" for key in assignments}
    refuse_consent(spoken, "--set")
    spoken |= {key: flags.get(key, key) for key in overriding}
    for key, rival in _RIVALS:
        if key in spoken and rival in content and rival not in spoken:
            check_settings({rival: content.pop(rival)}, str(path), kind=kind)
    for key, value in assignments.items():
        put_setting(content, key, parse_yaml(value, f"--set {key}"))
    content |= overriding
    settings = check_settings(content, "" if path is None else str(path), spoken, kind=kind)
    refuse_unknown(settings.suite, settings.attacks, settings.threat, settings.only, settings.skip)
    return settings


def _for(content: dict[str, Any], where: str, kind: type[S]) -> dict[str, Any]:
    """Return the settings of a file for a verb, without those of other verbs, which are validated."""
    others = {
        key: content[key]
        for key in content
        if key in RotateSettings.model_fields and key not in kind.model_fields
    }
    check_settings(others, where, kind=RotateSettings)
    return {key: value for key, value in content.items() if key not in others}


def load(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises `TargetError` if it cannot be read, `UsageError` if it is not a mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise TargetError(
            f"cannot read the configuration {str(path)!r}: {error}; write one with holdfast init"
        ) from error
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path} contains a {type(content).__name__}; expected keys such as model: and data:"
        )
    return content


def put_setting(content: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path, such as `attacks.0.steps`."""
    *parents, last = path.split(".")
    place: Any = content
    for parent in parents:
        try:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        except (IndexError, ValueError, AttributeError):
            raise UsageError(f"--set {path}: there is no entry {parent!r}") from None
    if isinstance(place, list) and last in map(str, range(len(place))):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UsageError(f"--set {path}: {last!r} is not an entry of a {type(place).__name__}")


def check_settings(
    content: Mapping[str, Any],
    where: str,
    spoken: Mapping[str, str] = MappingProxyType({}),
    *,
    kind: type[S],
) -> S:
    """Return validated settings. The `UsageError` contains the first wrong key with the most similar valid name.

    The message begins with `where`, the source of the content, except for keys that a person gave as `spoken`.
    """
    fields = kind.model_fields
    prefix = f"{where}: " if where else ""
    for key in content:
        if key not in fields:
            raise UsageError(f"{prefix}unknown key {key!r}{did_you_mean(str(key), fields)}")
    suite = content.get("suite")
    if suite is not None and not values.is_suite(suite):
        way_out = "list attacks with settings under attacks:, as in [{use: PGD, steps: 100}]"
        raise UsageError(
            f"{prefix}suite is {suite!r}; expected a name, or names as in [pgd, square]; {way_out}"
        )
    try:
        settings = kind.model_validate(dict(content))
    except ValidationError as error:
        key, dot, rest = place(error).partition(".")
        named = f"{spoken.get(key, prefix + key)}{dot}{rest}"
        raise UsageError(f"{named} {complaint(error)}") from None
    if settings.suite is not None and settings.attacks is not None:
        raise UsageError(f"{prefix}give a suite or a list of attacks, not both")
    if settings.n is not None and settings.sample is not None:
        raise UsageError(f"{prefix}give n (the first N) or sample (a random N), not both")
    if settings.std is not None and not all(number > 0 for number in settings.std):
        way_out = "every number must be positive, as in 0.2470,0.2435,0.2616"
        raise UsageError(f"{spoken.get('std', f'{prefix}std')} is {list(settings.std)}; {way_out}")
    if settings.data_normalised is not None and (settings.mean is not None or settings.std is not None):
        raise UsageError(
            f"{prefix}give data_normalised, for data that were normalised beforehand, or mean and std, for data that "
            "are pixels and a model that expects normalised input, not both"
        )
    if not settings.bounds[0] < settings.bounds[1] or not all(map(math.isfinite, settings.bounds)):
        way_out = "give two numbers, the lower first, as in 0,1"
        raise UsageError(f"{prefix}bounds are {settings.bounds}; {way_out}")
    return settings


def canonical_settings(settings: AssessSettings) -> dict[str, Any]:
    """Return the settings that affect the evidence as plain values, whose digest a resumed run compares."""
    outside = {"output", "gates", "accept_doubts", "baseline", "device", "schema_version"}
    content: dict[str, Any] = json.loads(settings.model_dump_json(exclude=outside))
    return content
