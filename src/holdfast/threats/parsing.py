"""Parses threat models from text such as `linf:8/255`. The module does not import torch, so that mistakes are reported
immediately.

A threat model is `linf:8/255`, `snr:40dB`, `peak:30dB`, `corruptions:3`, `patch:5x5,at=centre`,
`spatial:rotate=30,shift=3`, `spatial:flow=1.5`, `colour:hue=18,saturation=0.3`, `table:rules.yaml`,
`text:edits=2,words=3`, `bytes:change=16,append=64`, `trigger:drill.trigger.npz` or `training-set:20`, or for policies
`observations:linf:0.1`, `actions:linf:0.1` or `parameters:mass=0.1,length=0.1`, followed by any of `goal=targeted:K`,
`goal=vanish|fabricate|mislabel|map:K`, `access=none|labels|scores|gradients` and `queries=N`, separated by commas or
spaces. `unit=range`, `unit=std` and `unit=@FILE` state the unit of the eps of a norm for each feature.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from holdfast.core.errors import Remedy, UsageError
from holdfast.core.names import (
    MAP,
    PARTS,
    Objective,
    did_you_mean,
    fraction_of,
    is_size,
    limits_text,
    parse_number,
    size_text,
)
from holdfast.core.threat import Change, ThreatModel
from holdfast.threats.domains import BYTES, CONTROL, SIGNAL, TABLE, TEXT, Domain

Sees = Literal["none", "labels", "scores", "gradients"]
Argument = float | str

MOST_SCALED = 0.9
"""largest fraction by which an image may grow or shrink; with 1 it could shrink to nothing"""

MOVED = {"rotate": 180.0, "shift": math.inf, "scale": MOST_SCALED}  # a rotation by up to 180 degrees is any
_SPATIAL: Final[Mapping[str, float]] = {**MOVED, "flow": math.inf}
RECOLOURED: Final[Mapping[str, float]] = {"hue": 180.0, "saturation": 1.0, "brightness": 1.0, "contrast": 1.0}
"""Largest value of each image transformation that a threat model may allow."""

_SIZE = re.compile(
    r"\s*(norm=)?(?P<norm>linf|l2|l1|l0)?[=:,(\s]*(eps(ilon)?\s*[=:]\s*)?"
    r"(?P<size>\d*\.?\d+(e-?\d+)?(\s*/\s*\d+)?(px)?)\s*\)?(?P<rest>([,\s].*)?)",
    re.IGNORECASE,
)
"""pattern of an eps without a norm, or with another sign than a colon after the norm"""


@dataclass(frozen=True)
class Form:
    """A form of threat models in text: `NAME:VALUE,ARGUMENT=VALUE`."""

    creator: str
    """module and name of the class of its constraint or of the function that creates it, which is not imported before
    it is needed"""
    value: Callable[[str, str], Mapping[str, Argument]] | None = None
    """function that reads the text after the colon; its second argument is the whole text, for messages. The result
    are arguments of the creator. Without it, arguments follow the colon"""
    arguments: Mapping[str, Callable[[str], Argument]] = field(default_factory=lambda: MappingProxyType({}))
    """functions that read the values of further arguments, by name"""
    domain: Domain | None = None
    """kind of the inputs that can be changed like this; None if any inputs of numbers can"""
    example: str = ""
    """text of a threat, for messages"""
    units: bool = False
    """whether the size may be in a unit of each feature"""
    provable: bool = False
    """whether robustness can be proved under the threat"""
    aimed: bool = True
    """whether the attacker may have a target class"""


def parse_threat(text: str) -> ThreatModel:
    """Return the threat model in a text such as `linf:8/255,access=scores,queries=5000`. Raises `UsageError`, with the
    right spelling if the text contains an eps without a norm or without the colon.
    """
    try:
        return _threat(text)
    except UsageError:
        spelling = _with_colon(text)
        if not spelling:
            raise
        raise UsageError(
            f"the threat is {text!r}; a norm, a colon and a size were expected", Remedy("threat", spelling)
        ) from None


def _with_colon(text: str) -> str:
    """Return a text such as `linf=0.1`, `l2,eps=0.5` or `8/255` as a threat, with the norm linf if it contains none, or
    an empty string for any other text.
    """
    matched = _SIZE.fullmatch(text)
    if matched is None:
        return ""
    spelling = f"{(matched['norm'] or 'linf').lower()}:{''.join(matched['size'].split())}{matched['rest']}"
    try:
        _threat(spelling)
    except UsageError:
        return ""
    return spelling


def _threat(text: str) -> ThreatModel:
    parts = PARTS.findall(text)
    if not parts:
        raise UsageError("the threat is empty; expected a norm and a size, such as linf:8/255")
    first, *others = parts
    name, _, value = first.partition(":")
    name = name.lower()
    if name not in FORMS:
        raise UsageError(f"the threat {first!r} has no known norm{did_you_mean(name, FORMS)}")
    form = FORMS[name]
    arguments = {} if form.value is None else dict(form.value(value, first))
    conditions: dict[str, Any] = {}
    for part in others if form.value else (value, *others):
        key, equals, content = part.partition("=")
        if key in form.arguments and (equals or part is not value):
            arguments[key] = form.arguments[key](content)
        elif form.value is None and part is value:
            given = f"the limit {part!r}" if part else "no limits"
            raise UsageError(
                f"the threat {name} has {given}; expected any of {', '.join(form.arguments)}, as in {form.example}"
            )
        else:
            conditions |= _condition(name, part)
    refuse_mixed(arguments)
    if name == "text":
        refuse_text_limits(arguments)
    change = Change(name, arguments, form.creator, form.domain)
    if form.provable and form.units and {"on", "words"} & {*arguments}:
        change = _of_embeddings(name, arguments, text, conditions)
    threat = ThreatModel(change, **conditions)
    object.__setattr__(threat, "given", text)
    return threat


def _of_embeddings(
    name: str, arguments: Mapping[str, Argument], text: str, conditions: Mapping[str, Any]
) -> Change:
    """Return the change of the embeddings of one word, inside a ball of the norm `name`."""
    eps = float(arguments["eps"])
    if not {"on", "words"} <= {*arguments} or math.isinf(eps):
        raise UsageError(
            f"the threat is {text!r}; changes of embeddings have a size and the number of words whose embeddings "
            "change, as in l2:0.1,on=embeddings,words=1"
        )
    if conditions:
        raise UsageError(
            f"the threat is {text!r}; robustness to changes of embeddings is proved, for any attacker: leave "
            f"{', '.join(conditions)} out"
        )
    limits: dict[str, Argument] = {
        "norm": name,
        "eps": eps,
        "on": arguments["on"],
        "words": arguments["words"],
    }
    return Change(name, limits, "holdfast.threats.word_embeddings:WordEmbeddings", TEXT)


def _eps(text: str, threat: str) -> Mapping[str, Argument]:
    """Read the eps of a norm; without one it is infinite."""
    if ":" not in threat:
        return {"eps": math.inf}
    eps = parse_number(text, f"eps in {threat!r}")
    if eps < 0:
        raise UsageError(f"eps is {eps:g} in {threat!r}; it must be 0 (clean accuracy) or more")
    return {"eps": eps}


def _decibels(text: str, threat: str) -> Mapping[str, Argument]:
    """Read a size in decibels relative to each clip as a fraction; without one it is infinite."""
    if ":" not in threat:
        return {"eps": math.inf}
    number = parse_number(re.sub(r"\s*db$", "", text, flags=re.IGNORECASE), f"the size in {threat!r}")
    if not abs(number) <= _MOST_DECIBELS:
        raise UsageError(
            f"the size in {threat!r} is {number:g} dB; expected at most {_MOST_DECIBELS} dB, as in snr:40dB, where a "
            "larger number is a weaker attacker"
        )
    return {"eps": fraction_of(number)}


_MOST_DECIBELS = 200  # 16 bits have a range of 96 dB


def _count(text: str, threat: str) -> Mapping[str, Argument]:
    """Read the number of values or pixels that may change."""
    per_pixel = text.endswith("px")
    eps = float(_eps(text.removesuffix("px"), threat)["eps"])
    if (per_pixel and math.isinf(eps)) or (eps % 1 and not math.isinf(eps)):
        raise UsageError(
            f"eps is {eps:g} in {threat!r}; l0 counts values, so it must be whole, as in l0:10 or l0:10px"
        )
    return {"eps": eps, "per": "pixel" if per_pixel else "value"}


def _perturbation(text: str, threat: str) -> Mapping[str, Argument]:
    """Read the norm and the size of a perturbation in each step of an episode."""
    norm, colon, size = text.partition(":")
    kind = threat.partition(":")[0]
    if norm not in ("linf", "l2", "l1") or not colon:
        raise UsageError(
            f"the threat {threat!r} has no norm and size; expected linf, l2 or l1 and a size, as in {kind}:linf:0.1"
        )
    eps = parse_number(size, f"eps in {threat!r}")
    if not 0 <= eps < math.inf:
        raise UsageError(
            f"eps is {eps:g} in {threat!r}; it must be 0 or more and finite, as in {kind}:linf:0.1"
        )
    return {"norm": norm, "size": eps}


def _severity(text: str, threat: str) -> Mapping[str, Argument]:
    if text not in ("1", "2", "3", "4", "5"):
        raise UsageError(f"the threat {threat!r} has no severity of 1 to 5; write one, as in corruptions:3")
    return {"severity": int(text)}


def _patch(size: str, threat: str) -> Mapping[str, Argument]:
    matched = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size)
    if matched is None:
        raise UsageError(
            f"the threat {threat!r} has no size in pixels; write height and width, as in patch:5x5 or "
            f"patch:8x8,at=centre"
        )
    return {"height": int(matched[1]), "width": int(matched[2])}


def _changes(text: str, threat: str) -> Mapping[str, Argument]:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", text):
        raise UsageError(
            f"the threat {threat!r} has no number of changes; write how many training examples may be added or "
            "removed, as in training-set:20"
        )
    return {"changes": int(text)}


def file_argument(name: str) -> Callable[[str, str], Mapping[str, Argument]]:
    """Return the function that reads the path of a file as the argument `name`. A path with commas or spaces is
    quoted.
    """

    def read(text: str, threat: str) -> Mapping[str, Argument]:
        path = text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
        if not path:
            raise UsageError(f"the threat {threat!r} has no file; write its path after the colon")
        return {name: path}

    return read


def _budget(text: str) -> Argument:
    eps = parse_number(text, "eps")
    if not 0 < eps < math.inf:
        raise UsageError(f"eps is {eps:g}; the budget of a table must be above 0")
    return eps


def _file(text: str) -> Argument:
    return file_argument("file")(text, f"file={text}")["file"]


def _matching(
    name: str, pattern: str, expected: str, kind: type[Argument] = str
) -> Callable[[str], Argument]:
    """Return the function that reads an argument whose text matches a pattern."""

    def read(text: str) -> Argument:
        if not re.fullmatch(pattern, text):
            raise UsageError(f"{name} is {text!r}; expected {expected}")
        return kind(text)

    return read


def _named_or_file(name: str, known: tuple[str, ...], expected: str) -> Callable[[str], Argument]:
    """Return the function that reads an argument that is a known name, or `@` and the path of a file. A path with
    commas or spaces is quoted.
    """

    def read(text: str) -> Argument:
        value = text[1:-1] if text[:1] in ("'", '"') and text[-1:] == text[:1] else text
        if value not in known and not (value.startswith("@") and value[1:]):
            raise UsageError(f"{name} is {text!r}; expected {expected}")
        return value

    return read


def _limits(largest: Mapping[str, float], example: str) -> Mapping[str, Callable[[str], Argument]]:
    return {key: partial(limit_of, key, most=most, example=example) for key, most in largest.items()}


def limit_of(key: str, value: str, most: float, example: str) -> float:
    """Return the value of the limit `key` of a transformation. Raises `UsageError` if it is out of range."""
    limit = parse_number(value, key)
    if not 0 < limit <= most or math.isinf(limit):
        bound = "" if math.isinf(most) else f" and at most {most:g}"
        raise UsageError(f"{key} is {value}; it must be more than 0{bound}, as in {example}")
    return limit


def _condition(name: str, text: str) -> dict[str, Any]:
    """Return the arguments of the threat model that a part of its text states, such as `access=scores`."""
    key, equals, value = text.partition("=")
    if not equals or key not in ("goal", "access", "queries", "unit"):
        raise UsageError(f"the threat has {text!r}{did_you_mean(key, ('goal', 'access', 'queries', 'unit'))}")
    if key == "unit":
        if not FORMS[name].units:
            raise UsageError(f"{text} is the unit of an eps, and the size of {name} has none; leave it out")
        if value not in ("range", "std") and not re.fullmatch(r"@.+", value):
            raise UsageError(
                f"unit is {value!r}; expected range (of the bounds of each feature), std (of its values), or @FILE "
                "with a JSON object from feature to unit"
            )
        return {"unit": value}
    if key == "access":
        if value not in get_args(Sees):
            raise UsageError(f"access is {value!r}{did_you_mean(value, get_args(Sees))}")
        return {"access": value}
    if key == "queries":
        # 18 digits fit into 64 bits
        if not re.fullmatch(r"[0-9]{1,18}", value) or int(value) < 1:
            raise UsageError(
                f"queries is {value if value.isascii() and value.isdigit() else repr(value)}; expected a whole number "
                "of at least 1, as in queries=1000"
            )
        return {"queries": int(value)}
    aimed = re.fullmatch(r"targeted:(?:([0-9]{1,18})|(.*[^\d\s].*))", value)
    if value == "untargeted":
        return {"goal": None, "goal_name": ""}
    if value in get_args(Objective) or re.fullmatch(rf"{MAP}[0-9]{{1,6}}", value):
        return {"objective": value}
    if not FORMS[name].aimed:
        raise UsageError(f"{_AIMLESS[name]} have no target class; leave {text!r} out")
    if aimed is None:
        raise UsageError(
            f"the goal is {value!r}; expected untargeted or targeted:K with the number or the name K of a class, or "
            f"for a detector {', '.join(get_args(Objective))}, or for masks {MAP}K"
        )
    return {"goal": int(aimed[1]) if aimed[1] else None, "goal_name": aimed[2] or ""}


_AIMLESS = {
    "corruptions": "common corruptions",
    "training-set": "changes of a training set",
    **dict.fromkeys(("observations", "actions", "parameters"), "policies"),
}
_NORM = Form(
    "",
    _eps,
    {
        "on": _matching("on", "embeddings", "embeddings, as in l2:0.1,on=embeddings,words=1"),
        "words": _matching("words", "1", "1: the embeddings of one word change, any one", int),
    },
    units=True,
    provable=True,
)
_SPATIAL_EXAMPLE = "spatial:rotate=30,shift=3"
_COLOUR_EXAMPLE = "colour:hue=18,saturation=0.3,brightness=0.2"
_BYTES_EXAMPLE = "bytes:change=16,append=64"
_TEXT_EXAMPLES = {
    **dict.fromkeys(("edits", "words"), "text:edits=2,words=3"),
    "synonyms": "text:synonyms=2,file=FILE.json",
    "inserts": "text:inserts=5,file=FILE.json",
}
FORMS: Final[dict[str, Form]] = {
    "linf": replace(_NORM, creator="holdfast.core.constraints:Linf"),
    "l2": replace(_NORM, creator="holdfast.core.constraints:L2"),
    "l1": replace(_NORM, creator="holdfast.core.constraints:L1"),
    "l0": Form("holdfast.core.constraints:L0", _count),
    "snr": Form("holdfast.threats.signals:SNR", _decibels, domain=SIGNAL),
    "peak": Form("holdfast.threats.signals:Peak", _decibels, domain=SIGNAL),
    "corruptions": Form(
        "holdfast.threats.transformations:Corruptions",
        _severity,
        aimed=False,
    ),
    "patch": Form(
        "holdfast.io.printed_patches:patch_threat",
        _patch,
        {
            "at": _matching(
                "at",
                "anywhere|centre|on|beside|[0-9]{1,5}:[0-9]{1,5}",
                "anywhere, centre, on or beside (objects), or ROW:COLUMN of the upper left corner, as in at=3:4",
            ),
            "jitter": _matching("jitter", "[0-9]{1,4}", "a number of pixels, as in jitter=3", int),
            "within": _matching(
                "within",
                "[0-9]{1,5}:[0-9]{1,5}-[0-9]{1,5}:[0-9]{1,5}",
                "ROW:COLUMN-ROW:COLUMN, the first and the last pixel that the patch may cover, as in within=4:4-23:23",
            ),
            "printable": _named_or_file(
                "printable",
                ("default",),
                "default, or @ and a table of colours, as in printable=@colours.csv",
            ),
            "shape": _named_or_file(
                "shape", ("circle", "bars"), "circle, bars, or @ and an image, as in shape=@sticker.png"
            ),
        },
        provable=True,
    ),
    "spatial": Form(
        "holdfast.threats.transformations:Spatial",
        arguments=_limits(_SPATIAL, _SPATIAL_EXAMPLE),
        example=_SPATIAL_EXAMPLE,
    ),
    "table": Form(
        "holdfast.settings.table_rules:table_threat",
        file_argument("file"),
        {"eps": _budget},
        domain=TABLE,
        provable=True,
    ),
    "text": Form(
        "holdfast.io.texts_of_users:text_edits",
        arguments={
            **{
                name: _matching(
                    name, "[1-9][0-9]{0,3}", f"a whole number from 1 to 9999, as in {example}", int
                )
                for name, example in _TEXT_EXAMPLES.items()
            },
            "file": _file,
            "similarity": _matching(
                "similarity",
                r"(0?\.\d{1,6}|1(\.0{1,6})?)",
                "a number above 0 and at most 1, as in similarity=0.7",
                float,
            ),
        },
        domain=TEXT,
        provable=True,
        example=_TEXT_EXAMPLES["edits"],
    ),
    "bytes": Form(
        "holdfast.io.rules_of_bytes:byte_changes",
        arguments={
            **{
                name: _matching(
                    name, "[1-9][0-9]{0,5}", f"a whole number from 1 to 999999, as in {_BYTES_EXAMPLE}", int
                )
                for name in ("change", "append", "insert")
            },
            "file": _file,
        },
        domain=BYTES,
        example=_BYTES_EXAMPLE,
    ),
    "training-set": Form(
        "holdfast.threats.triggers:TrainingSet",
        _changes,
        provable=True,
        aimed=False,
    ),
    "observations": Form(
        "holdfast.threats.policies:Observations",
        _perturbation,
        domain=CONTROL,
        units=True,
        provable=True,
        aimed=False,
        example="observations:linf:0.1",
    ),
    "actions": Form("holdfast.threats.policies:Actions", _perturbation, domain=CONTROL, aimed=False),
    "parameters": Form(
        "holdfast.threats.policies:Parameters",
        arguments=_limits({"mass": MOST_SCALED, "length": MOST_SCALED}, "parameters:mass=0.1,length=0.1"),
        domain=CONTROL,
        aimed=False,
        example="parameters:mass=0.1,length=0.1",
    ),
    "trigger": Form(
        "holdfast.io.data.npz:trigger_threat",
        file_argument("file"),
    ),
    "colour": Form(
        "holdfast.threats.transformations:Colour",
        arguments=_limits(RECOLOURED, _COLOUR_EXAMPLE),
        example=_COLOUR_EXAMPLE,
    ),
}
"""Forms of threat models by name. A new form is one entry; one with a file is read by `file_argument`."""


def refuse_mixed(limits: Mapping[str, float | str]) -> None:
    """Raise `UsageError` if a spatial threat combines `flow` (displacements of single pixels) with other
    transformations, because no attack supports that.
    """
    if "flow" in limits and len(limits) > 1:
        raise UsageError(
            f"{limits_text('spatial', limits)} combines a flow with other transformations, which no attack "
            f"supports; use each alone, as in {limits_text('spatial', {'flow': limits['flow']})}"
        )


def refuse_text_limits(limits: Mapping[str, float | str]) -> None:
    """Raise `UsageError` unless a threat on texts has one kind of change, with the limits and the file it needs."""
    kinds = [name for name in ("edits", "synonyms", "inserts") if limits.get(name)]
    if len(kinds) != 1:
        given = limits_text("text", limits)
        raise UsageError(
            f"{given} {'combines ' + ' and '.join(kinds) if kinds else 'allows no change'}; give one of "
            "text:edits=2,words=3, text:synonyms=2,file=FILE.json and text:inserts=5,file=FILE.json"
        )
    if bool(limits.get("words")) != (kinds[0] == "edits"):
        missing = kinds[0] == "edits"
        raise UsageError(
            f"{limits_text('text', limits)} {'has no number of words that change' if missing else 'has words'}; words "
            "is the largest number of words with edits, as in text:edits=2,words=3"
        )
    if kinds[0] != "edits" and not limits.get("file"):
        raise UsageError(
            f"{limits_text('text', limits)} has no file; give file=FILE.json with a JSON object such as "
            f"{_TEXT_FILES[kinds[0]]}{_OR_FOLDER if kinds[0] == 'synonyms' else ''}"
        )


_OR_FOLDER = ", or file=FOLDER with a model of transformers, whose embeddings give the synonyms"
_TEXT_FILES = {
    "synonyms": '{"synonyms": {"good": ["great", "fine"]}}',
    "inserts": '{"insert": ["hello", "thanks"]}',
}
"""Examples of the file of a threat on texts."""


def threat_of(threat: object, where: str = "threat") -> ThreatModel:
    """Return the threat model that a user gives as text, as a constraint such as `Linf(8/255)`, or as a `ThreatModel`.
    `where` is its name in messages.

    Raises `UsageError` for anything else, and for a threat model with surrogates, which are a separate argument.
    """
    if isinstance(threat, str):
        return parse_threat(threat)
    from holdfast.core.constraints import Constraint  # for objects only, whose classes import torch

    model = ThreatModel(threat) if isinstance(threat, Constraint) else threat
    if not isinstance(model, ThreatModel) or model.constraint.name not in FORMS:
        raise UsageError(
            f"{where} is {threat!r}; expected text as in linf:8/255, or a constraint as in holdfast.Linf(8/255)",
            *([Remedy("threat", f"linf:{size_text(threat)}")] if is_size(threat) else []),
        )
    if model.surrogates:
        raise UsageError(
            f"{where} contains surrogates; give them as a separate argument, as in surrogates=[net]"
        )
    return parse_threat(model.text)  # for the checks of its values
