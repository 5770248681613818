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
    nearest,
    pairs,
)
from holdfast.config.naming import CARD
from holdfast.config.suites import refuse_unknown
from holdfast.config.wording import complaint, place
from holdfast.config.yaml_text import MAX_CHARACTERS, parsed
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
        description="a bundled or catalogue name, an .npz, .csv or .parquet file, or a folder of class folders",
    )
    arch: str | None = Field(
        None, description="architecture of a state dict: a catalogue name or file.py:factory"
    )
    model_args: dict[str, str] = Field(default_factory=dict, description="arguments of the factory")
    input_shape: values.InputShape | None = Field(
        None,
        description="sizes of one example without the batch, as in 3,224,224, where an .onnx file leaves them free",
    )
    bounds: values.Numbers = Field(
        (0.0, 1.0), description="lowest and highest legal input", min_length=2, max_length=2
    )
    mean: values.Numbers | None = Field(
        None, description="subtracted from the input inside the model, one number a channel"
    )
    std: values.Numbers | None = Field(
        None, description="divides the input inside the model, one number a channel"
    )
    data_normalised: values.Normalised | None = Field(
        None,
        description="MEAN/STD by which the data were normalised, one number a channel: it is undone, so that eps is in "
        "pixels, and the model gets normalised input again",
    )
    layout: Literal["chw", "hwc", "asis"] | None = Field(
        None,
        description="axes of the stored arrays: channels first, channels last, or given to the model as they are; "
        "without it the model decides",
    )
    model_output: Literal["logit", "probability"] | None = Field(
        None, description="what the model returns; needed for one number an example from 0 to 1"
    )
    classes: values.Classes | None = Field(None, description="number of classes, to be checked")
    class_names: values.ClassNames | None = Field(
        None,
        description="names of the model's classes in the order of its outputs, or @FILE with one a line: class folders "
        "and text labels are matched with them",
    )
    class_order: Literal["lexical", "numeric"] | None = Field(
        None,
        description="how class folders and text labels were numbered in training, where no names are given",
    )
    allow_hosts: values.Names = Field(
        default_factory=list, description="servers that a URL may name, each HOST or HOST:PORT"
    )
    headers: list[values.Header] = Field(
        default_factory=list, description="sent to the server, each `NAME: env:VARIABLE`"
    )
    http_request: str | None = Field(
        None,
        description="JSON that asks a server, $x being the rows, or $x_one one example without a batch axis "
        "($x_last and $x_one_last: channels last); without it the Open Inference Protocol",
    )
    http_response: str | None = Field(
        None,
        description="where the answer holds scores or classes, as in predictions or rows.*.scores; "
        "else an output's name",
    )
    http_labels: bool = Field(
        False, description="the answer holds one class a row, its number or its name, and no scores"
    )
    http_max_rows: values.Positive = Field(64, description="rows of one request to a server at most")
    http_timeout: values.Timeout = Field("30s", description="how long a server may take to answer")
    http_retries: values.Whole = Field(
        5, description="how often a request that failed temporarily is sent again"
    )
    http_concurrency: values.Positive = Field(
        1, description="requests to a server that are under way at once, at most"
    )
    http_rate: values.Rate | None = Field(
        None, description="requests to a server in a time, at most, as in 4/s or 100/min"
    )
    max_queries: values.Positive | None = Field(
        None, description="rows that a server is sent, at most: then the run stops, and goes on by --resume"
    )
    on_refused: Literal["reject", "stop"] = Field(
        "reject",
        description="an attacked input that a server refuses (400, 422) counts as rejected, or stops the run",
    )
    keep_answers: bool = Field(
        False, description="keep the answers of a server in the run folder after the run"
    )
    split: str | None = Field(None, description="train or test, or a value of a table's split column")
    label: str | None = Field(None, description="label column of a table")
    x: str | None = Field(None, description="array of an .npz file that holds the inputs")
    y: str | None = Field(None, description="array of an .npz file that holds the labels")
    drop: list[str] = Field(default_factory=list, description="columns of a table that are no features")
    fit: str | None = Field(
        None,
        description="other examples to learn attacks on, or to train on in harden: an address, else the train split",
    )
    across: list[str] = Field(
        default_factory=list,
        description="other data of the same shape, which changes are carried to and from",
    )
    transform: values.Transform | None = Field(
        None,
        description="random changes that inputs are seen through, as in rotate=15,scale=0.1,brightness=0.2",
    )
    n: values.Positive | None = Field(None, description="use the first N examples")
    sample: values.Positive | None = Field(None, description="use a seeded sample of N examples")
    threat: values.Threat = Field(
        "linf:8/255", description="what the adversary may do, as in linf:8/255,queries=1000"
    )
    surrogates: list[values.Surrogate] = Field(
        default_factory=list,
        description="models of the attacker's own, each an address or `model: ADDRESS` with arch, mean, std, skip",
    )
    suite: values.SuiteSpec | None = Field(
        None,
        description="a named list of attacks, or names of attacks, as in [pgd, square]; fast, unless attacks are "
        "listed (transfer where access is none)",
    )
    attacks: list[dict[str, Any]] | None = Field(
        None, min_length=1, description="attacks of your own, each `use: NAME` with its settings"
    )
    only: values.Names = Field(default_factory=list, description="attacks of the suite to run, by name")
    skip: values.Names = Field(default_factory=list, description="attacks of the suite to leave out, by name")
    gates: list[values.Gate] = Field(
        default_factory=list, description='claims to be judged, as in "robust_accuracy >= 0.40"'
    )
    baseline: str | None = Field(None, description="run folder that `vs baseline` gates compare with")
    accept_doubts: values.Reasons = Field(
        default_factory=dict, description="doubts that a person answers for, each with a reason"
    )
    curve: bool = Field(False, description="also measure accuracy against eps, with minimum-norm attacks")
    full: bool = Field(False, description="run every attack on every example, standing or not")
    doubts: bool = Field(True, description="probe for reasons why the number may flatter the model")
    adaptive: bool = Field(
        False,
        description="attack once more in the ways that raised doubts or a detector call for (BPDA, EOT, search)",
    )
    save_adversarial: bool = Field(False, description="keep every successful input in the run folder")
    time_budget: values.TimeBudget | None = Field(
        None, description="stop attacking after this long, as in 10min"
    )
    batch_size: values.Positive | None = Field(None, description="examples that go through the model at once")
    workers: values.Positive | None = Field(
        None, description="processes that share the work out among them, each on one thread"
    )
    seed: values.Whole = Field(0, description="seed of every random draw")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:1")
    trust_code: bool = Field(False, description="let model files run code that they bring along")
    output: list[str] = Field(
        default_factory=list, description="reports to write, by suffix: .html .json .xml .sarif .md .csv"
    )


class HardenSettings(AssessSettings):
    """All settings of `holdfast harden`: how to train, and how the model is assessed before and after."""

    recipe: values.RecipeSpec = Field(
        default_factory=lambda: {"use": "auto"},
        description="how to train: a name, `auto` to have it chosen, or `use: NAME` with its settings",
    )
    budget: values.Budget | None = Field(
        None, description="time for the training, as in 10min; without it the epochs of the recipe"
    )
    unlabelled: str | None = Field(
        None,
        description="other examples whose labels are not looked at, for vat: an address with a train split",
    )


class RotateSettings(HardenSettings):
    """All settings of `holdfast rotate`: where parameter sets come from, how they are trained, and when they swap."""

    recipe: values.SetsRecipeSpec = Field(
        default_factory=lambda: {"use": CARD},
        description="how sets are trained: a name, `card` for that of the model's card (else standard), or `use: NAME` "
        "with its settings",
    )
    source: values.SourceSpec = Field(
        default_factory=lambda: {"use": "basins"},
        description="where sets come from: basins, seeds, trajectory, subset, low-rank, or `use: NAME` with settings",
    )
    begins: Literal["he", "own"] = Field(
        "he",
        description="how weights of a run of its own are drawn: as large as He has it, or by each layer's rule",
    )
    codec: dict[str, Any] = Field(default_factory=dict, description="settings of the codec")
    generator: dict[str, Any] = Field(default_factory=dict, description="settings of the latent diffusion")
    immunise: dict[str, Any] = Field(
        default_factory=dict, description="settings of the training against exposed sets"
    )
    every: list[values.Every] = Field(
        default_factory=list, description="when to swap, as in 50q/principal or 24h"
    )
    keep: values.Positive = Field(8, description="admitted sets that are made ahead")
    judged: values.Positive = Field(
        2000,
        description="held-out examples that a set is judged on at first; twice as many where that is unclear",
    )


_RIVALS = (("n", "sample"), ("sample", "n"), ("suite", "attacks"), ("attacks", "suite"))
"""Pairs of settings that exclude each other: a flag (or a `--set`) for one replaces the other in the file."""


S = TypeVar("S", bound=AssessSettings)


def read(
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
    said = {} if path is None else load(path)
    refuse_consent(said, str(path))
    content = _for(said, str(path), kind)
    given = {key: value for key, value in overrides.items() if value is not None}
    put_in = pairs(sets, "--set")
    spoken = {key.partition(".")[0]: f"--set {key.partition('.')[0]}" for key in put_in}
    refuse_consent(spoken, "--set")
    spoken |= {key: flags.get(key, key) for key in given}
    for key, rival in _RIVALS:
        if key in spoken and rival in content and rival not in spoken:
            check({rival: content.pop(rival)}, str(path), kind=kind)
    for key, value in put_in.items():
        put(content, key, parsed(value, f"--set {key}"))
    content |= given
    settings = check(content, "" if path is None else str(path), spoken, kind=kind)
    refuse_unknown(settings.suite, settings.attacks, settings.threat, settings.only, settings.skip)
    return settings


def _for(content: dict[str, Any], where: str, kind: type[S]) -> dict[str, Any]:
    """Return the settings of a file for a verb, without those of other verbs, which are validated."""
    others = {
        key: content[key]
        for key in content
        if key in RotateSettings.model_fields and key not in kind.model_fields
    }
    check(others, where, kind=RotateSettings)
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
            f"cannot read the configuration {str(path)!r}: {error}; make one with holdfast init"
        ) from error
    content = parsed(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {type(content).__name__}; expected keys such as model: and data:")
    return content


def put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path, such as `attacks.0.steps`."""
    *parents, last = path.split(".")
    place: Any = content
    for parent in parents:
        try:
            place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
        except (IndexError, ValueError, AttributeError):
            raise UsageError(f"--set {path}: there is no {parent!r} to set something in") from None
    if isinstance(place, list) and last in map(str, range(len(place))):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UsageError(f"--set {path}: {last!r} is no place in {type(place).__name__}")


def check(
    content: Mapping[str, Any],
    where: str,
    spoken: Mapping[str, str] = MappingProxyType({}),
    *,
    kind: type[S],
) -> S:
    """Return validated settings. The `UsageError` contains the first wrong key with the most similar valid name.

    The message begins with `where`, the source of the content, except for keys that a person gave as `spoken`.
    """
    known = kind.model_fields
    prefix = f"{where}: " if where else ""
    for key in content:
        if key not in known:
            raise UsageError(f"{prefix}unknown key {key!r}{nearest(str(key), known)}")
    said = content.get("suite")
    if said is not None and not values.is_suite(said):
        way_out = "list attacks with settings under attacks:, as in [{use: PGD, steps: 100}]"
        raise UsageError(
            f"{prefix}suite is {said!r}; expected a name, or names as in [pgd, square]; {way_out}"
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
            "are pixels and a model that wants normalised input, not both"
        )
    if not settings.bounds[0] < settings.bounds[1] or not all(map(math.isfinite, settings.bounds)):
        way_out = "give two numbers, the lower first, as in 0,1"
        raise UsageError(f"{prefix}bounds are {settings.bounds}; {way_out}")
    return settings


def canonical(settings: AssessSettings) -> dict[str, Any]:
    """Return the settings that affect the evidence as plain values, whose digest a resumed run compares."""
    outside = {"output", "gates", "accept_doubts", "baseline", "device", "schema_version"}
    content: dict[str, Any] = json.loads(settings.model_dump_json(exclude=outside))
    return content
