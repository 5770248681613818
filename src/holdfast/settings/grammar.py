"""Parsers for the values of command-line flags, such as `60s`, the names of attacks, suites, recipes and other choices,
and the default suite. The module does not import torch.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from holdfast.attacks.suites import (
    SUITES,
    VARIANTS,
    Kind,
    Specs,
    SuiteName,
    attacks_of,
    is_possible,
    kind_of_change,
)
from holdfast.core.catalogue import ATTACKS, names
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.names import did_you_mean, exact, parse_number, slug, suggestion
from holdfast.core.threat import ThreatModel
from holdfast.threats.domains import CONTROL
from holdfast.threats.parsing import FORMS, MOVED, RECOLOURED, Sees, limit_of

LogKind = Literal["csv", "tensorboard", "mlflow", "wandb"]

SEEN: Final[Mapping[str, float]] = {
    **MOVED,
    "perspective": 0.5,
    **RECOLOURED,
    "blur": 10.0,
    "noise": 1.0,
}
"""Random transformations that may be applied to the inputs of a model, with the largest value of each."""
_HEARD: Final[Mapping[str, tuple[str, str, float]]] = {
    "room": ("room", "", 10.0),
    "shift": ("shift_s", "s", math.inf),
    "gain": ("gain_db", "dB", 60.0),
}
"""The name, unit and largest value of the limits of random transformations of clips."""

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def numbers(text: str, what: str) -> tuple[float, ...]:
    """Return the numbers in a text such as `0.5,8/255`, which are separated by commas. `what` is the name of the text
    in error messages.
    """
    return tuple(parse_number(part, what) for part in text.split(","))


def seconds(text: str, what: str) -> float:
    """Return the number of seconds of a duration such as `60s`, `10min` or `24h`. `what` is its name in
    error messages.
    """
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if matched is None or float(matched[1]) <= 0:
        raise UsageError(f"{what} is {text!r}; expected a duration above 0, such as 60s, 10min or 24h")
    return float(matched[1]) * _UNITS[matched[2]]


def per_second(text: str, what: str = "http_rate") -> float:
    """Return the number per second of a rate such as `4/s`, `100/min` or `2000/h`. `what` is its name in messages."""
    matched = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*(s|min|h)\s*", text)
    if matched is None or not 0 < float(matched[1]) < math.inf:
        raise UsageError(f"{what} is {text!r}; expected a number in a time, such as 4/s, 100/min or 2000/h")
    return float(matched[1]) / _UNITS[matched[2]]


_REMOTE_STORES = ("databricks", "databricks-uc", "uc")
"""Addresses of MLflow without a scheme that are servers."""


def parse_log(text: str) -> tuple[LogKind, str]:
    """Split the text of the option `log` at its first colon, and return the kind of the log and the file, folder or
    address to which it is written: `csv` and `curve.csv` for `csv:curve.csv`.

    Raises `UsageError` for an unknown kind, for an empty place, and for an address with a password.
    """
    kind, _, place = text.partition(":")
    for known in get_args(LogKind):
        if kind == known and place:
            _refuse_password(kind, place)
            return known, place
    raise UsageError(
        f"log is {text!r}; expected csv:FILE, tensorboard:DIR, mlflow:URI or wandb:PROJECT, as in csv:curve.csv"
    )


def _refuse_password(kind: str, place: str) -> None:
    """Raise `UsageError` for the address of a log with a password, or a user name of a web server, because the address
    is stored with the run.
    """
    scheme, separator, rest = place.partition("://")
    user, at, host = rest.rpartition("@")
    of_server = scheme.lower() in ("http", "https")
    if not separator or not at or not (of_server or ":" in user):
        return
    if kind == "mlflow" and of_server:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
    else:
        remedy = "give it in the environment, as in PGPASSWORD for PostgreSQL"
    raise UsageError(
        f"the address of the log {kind}:{scheme}://…@{host} contains a user name or a password, and would be stored "
        f"with the run; give {kind}:{scheme}://{host if of_server else f'USER@{host}'} and {remedy}"
    )


def is_remote_log(text: str) -> bool:
    """Return whether a log of a training is sent over the network, and not written to a file of this machine."""
    kind, place = parse_log(text)
    if kind == "mlflow":
        scheme, separator, rest = place.partition(":")
        local = scheme in ("file", "sqlite") and (not rest.startswith("//") or rest.startswith("///"))
        return not local and (bool(separator) or place in _REMOTE_STORES)
    return kind == "wandb" or (kind == "tensorboard" and "://" in place)


def parse_every(text: str) -> tuple[Literal["answers", "seconds"], float]:
    """Return the kind and the threshold of a trigger that swaps the serving parameter set, parsed from a text such as
    `24h`.

    `50q/principal` swaps after 50 answers to one principal, and `24h` after that time.
    """
    count = re.fullmatch(r"\s*(\d+)\s*q/principal\s*", text)
    if count is not None and int(count[1]) > 0:
        return "answers", int(count[1])
    try:
        return "seconds", seconds(text, "every")
    except UsageError:
        raise UsageError(
            f"every is {text!r}; expected answers to one principal or a duration, as in 50q/principal or 24h"
        ) from None


def parse_scores(text: str) -> None:
    """Check what clients receive of scores: `all`, `labels`, or a number of decimal digits."""
    if text not in ("all", "labels") and not re.fullmatch(r"\d|1[0-5]", text):
        raise UsageError(
            f"scores is {text!r}; expected all, labels, or a number of decimal digits up to 15, as in 2"
        )


def parse_transform(text: str) -> Mapping[str, float]:
    """Return the limits of random input transformations by name, from a text such as
    `rotate=15,scale=0.1,brightness=0.2`, or of clips as in `room=1,shift=0.1s,gain=6dB,band=300-3400`.
    """
    limits: dict[str, float] = {}
    example = "rotate=15,scale=0.1,brightness=0.2"
    for part in re.split(r"[,\s]+", text.strip()):
        key, equals, value = part.partition("=")
        heard = _limit_of_clips(key, value)
        if heard:
            limits |= heard
        elif equals and key in SEEN:
            limits[key] = limit_of(key, value, SEEN[key], example)
        else:
            raise UsageError(
                f"transform has {part!r}; expected any of {', '.join(SEEN)}, as in {example}, or of room, shift, gain "
                f"and band for clips, as in {_ON_CLIPS}"
            )
    if 0 < sum(name in HEARD for name in limits) < len(limits):
        raise UsageError(
            f"transform is {text!r}, which transforms images and clips; expected one kind, as in {example} or "
            f"{_ON_CLIPS}"
        )
    return limits


_ON_CLIPS = "room=1,shift=0.1s,gain=6dB,band=300-3400"
HEARD: Final = frozenset({"low_hz", "high_hz", *(name for name, _, _ in _HEARD.values())})
"""Names of the limits of random transformations of clips."""


def _limit_of_clips(key: str, value: str) -> dict[str, float]:
    """Return the limits in a part of a transformation of clips; none for another part."""
    if key == "band":
        band = re.fullmatch(r"(\d{1,6})-(\d{1,6})(hz)?", value, re.IGNORECASE)
        if band is None or not 0 < int(band[1]) < int(band[2]):
            raise UsageError(
                f"band is {value!r}; expected the lowest and the highest frequency in Hz, as in 300-3400"
            )
        return {"low_hz": float(band[1]), "high_hz": float(band[2])}
    name, unit, most = _HEARD.get(key, ("", "", 0.0))
    number = value[: len(value) - len(unit)]
    if not name or value[len(number) :].lower() != unit.lower():
        return {}
    return {name: limit_of(key, number, most, _ON_CLIPS)}


def transform_meaning(limits: Mapping[str, float]) -> str:
    """Return for readers what random transformations with these limits do, as one clause for each kind of limit."""
    one_sided = {
        "room": "by a synthetic room whose reflections are multiplied by {}",
        "noise": "by noise with a standard deviation of {} of the range of the inputs",
        "blur": "by a blur with a standard deviation of up to {} pixels",
    }
    both = {
        name: limit for name, limit in limits.items() if name not in one_sided and not name.endswith("_hz")
    }
    parts = (
        [f"in both directions by up to {transform_text(both).replace('=', ' ').replace(',', ', ')}"]
        if both
        else []
    )
    parts += [one_sided[name].format(exact(limit)) for name, limit in limits.items() if name in one_sided]
    if "low_hz" in limits:
        low, high = limits["low_hz"], limits["high_hz"]
        parts.append(
            f"by a band-pass with a lower edge of up to {low:.0f} Hz and an upper edge of at least {high:.0f} Hz"
        )
    return "; ".join(parts)


def transform_text(limits: Mapping[str, float]) -> str:
    """Return the limits of random transformations as the text from which `parse_transform` reads them."""
    written = {name: (key, unit) for key, (name, unit, _) in _HEARD.items()}
    parts = [
        "{0}={2}{1}".format(*written.get(name, (name, "")), exact(limit))
        for name, limit in limits.items()
        if name not in ("low_hz", "high_hz")
    ]
    if "low_hz" in limits:
        parts.append(f"band={limits['low_hz']:.0f}-{limits['high_hz']:.0f}")
    return ",".join(parts)


def parse_surrogate(text: str, role: str = "surrogate") -> dict[str, object]:
    """Return the settings of a surrogate from text such as `weights.pt,arch=net.py:build,mean=0.5,std=0.25`.

    Unknown keys are arguments of the factory. `role` is the name of such a model in errors, as in `teacher`.
    """
    # only at commas before a key, since values such as mean=0.5,0.4 contain commas
    address, *conditions = re.split(r",(?=[A-Za-z_]\w*=)", text.strip())
    if not address:
        raise UsageError(
            f"the {role} {text!r} has no address; expected one as for a model, as in mnist-cnn or net.py:build"
        )
    settings: dict[str, object] = {"model": address}
    arguments: dict[str, str] = {}
    for condition in conditions:
        key, _, value = condition.partition("=")
        into = settings if key in ("arch", "mean", "std", "skip", "decay") else arguments
        if key in into:
            raise UsageError(f"the {role} {text!r} contains {key} twice; keep one")
        into[key] = value
    return {**settings, "model_args": arguments} if arguments else settings


def parse_pairs(items: Iterable[str], flag: str) -> dict[str, str]:
    """Return strings of the form `NAME=VALUE` as a dictionary."""
    values: dict[str, str] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"{flag} got {item!r}; expected NAME=VALUE")
        values[key.strip()] = value
    return values


def is_folder(output: str) -> bool:
    """Return whether the path of a report ends with a slash, which means that a folder is to be written."""
    return output.endswith(("/", "\\"))


AUTO: Final = "auto"
"""Value of `--recipe` that selects a recipe automatically."""

CARD: Final = "card"
"""Value of `--recipe` for `rotate`: the recipe in the card of the model, or `standard` for a model without a card."""

SOURCES: Final = {
    "basins": "Basins",
    "low-rank": "LowRank",
    "seeds": "Seeds",
    "subset": "Subset",
}
"""Names of the sources of parameter sets for `rotate collect`, with the names of their classes in
`holdfast.rotation`."""

ENSEMBLE, MIXED = "ensemble:", "mixed:"
"""Addresses of a model that consists of the models in the setting `members`."""
COMBINATIONS: Final = ("logits", "mean", "votes")
"""Ways of combining the members of an ensemble, which follow the address `ensemble:`; the first is the default."""


def chosen(names: Sequence[str], only: Sequence[str], skip: Sequence[str]) -> set[str]:
    """Return the attacks of a suite, as normalised names, that remain after the options `only` and `skip` are applied.

    Raises `UsageError` for unknown names, or if no attack remains.
    """
    available = dict.fromkeys(slug(name) for name in names)
    for option in (*only, *skip):
        if slug(option) not in available:
            others = map(slug, (*ATTACKS, *VARIANTS))
            hint = (
                f"; expected one of {', '.join(available)}"
                if slug(option) in others
                else did_you_mean(slug(option), available)
            )
            raise UsageError(f"this suite has no attack {option!r}{hint}")
    remaining = ({slug(name) for name in only} or set(available)) - {slug(name) for name in skip}
    if not remaining:
        raise UsageError(f"no attack is left; this suite has {', '.join(available)}")
    return remaining


@dataclass(frozen=True)
class Spelling:
    """Names of an attack in addition to its canonical name, such as short names."""

    paper: str
    """name in the paper; empty if it is the same or if another attack has this name here"""
    short: tuple[str, ...] = ()
    """usual short names of the attack"""

    def __str__(self) -> str:
        return ", ".join(name for name in (self.paper, *self.short) if name)


SPELLINGS: Final[Mapping[str, Spelling]] = {
    **{
        entry.name: Spelling(entry.paper, entry.short)
        for entry in ATTACKS.values()
        if entry.paper or entry.short
    },
    "DI-FGSM": Spelling("DI2-FGSM"),
}
"""Further names of attacks, by the canonical name."""

SUITE_SPELLINGS: Final[Mapping[SuiteName, tuple[str, ...]]] = {
    "standard": ("autoattack", "aa"),
    "rand": ("autoattack-rand", "aa-rand"),
}
"""Usual names of suites in other software, by the canonical name."""

ADAPTIVE: Final = (
    "Pair", "Pair-light", "Pair-heavy", "EOT", "BPDA", "BPDA-T", "BPDA-ALMA", "BPDA-FAB", "Search",
    "AdaptiveSearch",
)  # fmt: skip
"""Names of the attacks that the setting `adaptive` adds depending on the doubts. A test compares them with `doubts`."""


def folded(name: str) -> str:
    """Return a name in the form in which names are compared: lower case, without `-`, `_` and spaces.

    >>> folded("Hop-Skip_Jump")
    'hopskipjump'
    """
    return "".join(letter for letter in name.casefold() if letter not in "-_ ")


def suite_called(name: str) -> SuiteName | None:
    """Return the canonical name of the suite that has `name` as one of its names, or None if there is no such suite."""
    return _suites().get(folded(name))


def is_suite_only(name: str) -> bool:
    """Return whether a name is the name of a suite and not that of an attack."""
    return suite_called(name) is not None and folded(name) not in _attacks()


def attack_called(name: str) -> str:
    """Return the canonical name of the attack, or of the variant of an attack in a suite, that has `name` as one of its
    names.

    Raises `UsageError` with the most similar name if there is none.
    """
    canonical = _attacks()
    known_name = canonical.get(folded(name))
    if known_name is not None:
        return known_name
    if folded(name) in map(folded, ADAPTIVE):
        raise UsageError(
            f"{name} is an attack that is added depending on the raised doubts, and it cannot be named directly",
            Remedy("adaptive", True, function="assess", reason="instead"),
        )
    similar = suggestion(name, every_name())
    raise UsageError(
        f"there is no attack {name!r}{f'; {similar}' if similar else did_you_mean(name, _canonical_names())}"
    )


def attack_class_called(name: str) -> str:
    """Return the canonical name of an attack whose settings can be changed. Raises `UsageError` for a variant of an
    attack in a suite, whose settings are fixed.
    """
    canonical = attack_called(name)
    if canonical in VARIANTS:
        of = VARIANTS[canonical]
        raise UsageError(
            f"{canonical} is the name of {of} with certain settings in suites; name {of} to give settings (see "
            f"holdfast attacks {of}), or name {canonical} without settings, as in suite: [{canonical}]"
        )
    return canonical


def suite_or_attacks(names: Iterable[str]) -> str | tuple[str, ...]:
    """Return the canonical name of the suite if `names` consists of one suite; otherwise return the canonical names of
    the attacks in `names`.

    Raises `UsageError` for an unknown name, and for a suite together with other names.
    """
    listed = [name.strip() for part in names for name in part.split(",") if name.strip()]
    if not listed:
        raise UsageError("suite is empty; expected a suite, as in fast, or attacks, as in pgd,square")
    if len(listed) == 1:
        (only_name,) = listed
        suite = suite_called(only_name)
        if (
            suite is None
            and folded(only_name) not in _attacks()
            and folded(only_name) not in map(folded, ADAPTIVE)
        ):
            similar = suggestion(only_name, (*SUITES, *_canonical_names()))
            expected = (
                f"expected one of the suites {', '.join(SUITES)}, or an attack that holdfast attacks lists"
            )
            raise UsageError(f"suite is {only_name!r}; {similar or expected}")
        return suite or (attack_called(only_name),)
    return tuple(attack_listed(name) for name in listed)


def attack_listed(name: str) -> str:
    """Return the canonical name of one attack in a list of attacks. Raises `UsageError` if the name is
    that of a suite.
    """
    if is_suite_only(name):
        raise UsageError(
            f"{name} is a suite, which cannot be combined with other names; leave them out, or list attacks, as in "
            f"pgd,square"
        )
    return attack_called(name)


def norms_of_suite(name: str) -> tuple[Kind, ...]:
    """Return the kinds of changes under which at least one suite contains the attack `name`."""
    norms = (kind for by_kind in SUITES.values() for kind, specs in by_kind.items() if name in _names(specs))
    return tuple(dict.fromkeys(norms))


def suites_of(name: str) -> tuple[str, ...]:
    """Return the names of the suites that contain the attack `name` under at least one norm."""
    return tuple(
        s for s, by_kind in SUITES.items() if any(name in _names(specs) for specs in by_kind.values())
    )


def _names(specs: Specs) -> list[str]:
    return [spec.name for spec in specs]


def every_name() -> tuple[str, ...]:
    """Return all names that the setting `suite` accepts, for shell completion: suites, attacks, variants of attacks,
    and short names.
    """
    short = (
        s
        for forms in (*SUITE_SPELLINGS.values(), *(spelling.short for spelling in SPELLINGS.values()))
        for s in forms
    )
    return tuple(dict.fromkeys((*SUITES, *_canonical_names(), *short)))


def _canonical_names() -> list[str]:
    return [*names("attacks"), *VARIANTS]


def _attacks() -> dict[str, str]:
    """Canonical names by all folded names. Holdfast's names take precedence over those of other packages."""
    bundled = {folded(name): name for name in (*ATTACKS, *VARIANTS)}
    short = {folded(form): name for name, spelling in SPELLINGS.items() for form in spelling.short}
    papers = {folded(spelling.paper): name for name, spelling in SPELLINGS.items() if spelling.paper}
    added = {folded(name): name for name in names("attacks")}
    return {**added, **papers, **short, **bundled}


def _suites() -> dict[str, SuiteName]:
    short = {folded(form): name for name, forms in SUITE_SPELLINGS.items() for form in forms}
    return {**short, **{folded(name): name for name in SUITES}}


DEFAULT_SUITE: SuiteName = "fast"


def usual_suite(threat: ThreatModel, *, trees: bool = False) -> SuiteName:
    """Return the suite that is used under a threat model if the user gives neither a suite nor attacks.

    It is `trees` for a model with readable `trees`. Otherwise it depends on the access of the attacker: `transfer` for
    no access, `black-box` for scores or labels, and otherwise `fast`.
    """
    if threat.access == "gradients" or is_possible(DEFAULT_SUITE, threat.change, "none"):
        return DEFAULT_SUITE
    if trees and names_in_suite("trees", threat):
        return "trees"
    if threat.access == "none":
        return "transfer"
    return "black-box" if names_in_suite("black-box", threat) else DEFAULT_SUITE


def names_in_suite(suite: SuiteName, threat: ThreatModel) -> tuple[str, ...]:
    """Return the names of the attacks of a suite under a threat model, or an empty tuple if it has none."""
    return tuple(spec.name for spec in attacks_of(suite, kind_of_change(threat.change), threat.access))


def refuse_unknown(
    suite: SuiteName | tuple[str, ...] | None,
    attacks: Sequence[Mapping[str, Any]] | None,
    threat: ThreatModel,
    only: Sequence[str],
    skip: Sequence[str],
) -> None:
    """Raise `UsageError` if the options `only` and `skip` contain names that are not attacks of the suite.

    Names that are known only after an import of torch are not checked.
    """
    if isinstance(suite, tuple):
        names = suite
    elif attacks is not None:
        names = tuple(str(attack.get("use")) for attack in attacks)
    else:
        names = names_in_suite(suite or usual_suite(threat), threat)
    if not names or not set(names) <= {*ATTACKS, *VARIANTS}:
        return
    try:
        chosen(names, only, skip)
    except UsageError:
        usual = suite is None and attacks is None
        if not usual or not _of_black_box(threat, (*only, *skip)):
            raise


def refuse_uncertifiable(threat: ThreatModel) -> None:
    """Raise `UsageError` for a threat model under which robustness is not proved: without a norm and a positive eps or
    rules of a table, or with a target class.
    """
    name = threat.name
    if "inserts" in threat.change.limits:
        raise UsageError(
            f"the threat {threat} appends words, and robustness is proved for changes of the words of a text, whose "
            "number stays the same; give edits and words, or synonyms and a file"
        )
    if not FORMS[name].provable:
        *provable, last = (name for name, form in FORMS.items() if form.provable)
        other = "observations:linf:0.1" if threat.change.domain is CONTROL else "linf:0.1"
        raise UsageError(
            f"the threat is {threat}, and robustness is proved under {', '.join(provable)} and {last} only",
            Remedy("threat", threat.with_change(other)),
        )
    if threat.eps == float("inf"):
        raise UsageError(
            f"the threat {threat} has no eps, which is to be proved",
            Remedy("threat", threat.with_change(f"{name}:0.1")),
        )
    if threat.eps == 0:
        raise UsageError(
            f"the threat is {threat}, and under eps 0 there is nothing to prove",
            Remedy("threat", threat.with_change(f"{name}:0.1")),
        )
    if threat.goal is not None or threat.goal_name or threat.objective:
        goal = threat.objective or f"targeted:{threat.goal_name or threat.goal}"
        raise UsageError(
            f"the threat is {threat}, and a proof is about every wrong class; leave goal={goal} out"
        )


def _of_black_box(threat: ThreatModel, names: Sequence[str]) -> bool:
    """Whether all names are attacks of `black-box` or `trees`, the default suites for models without gradients."""
    accesses: tuple[Sees, ...] = ("scores", "labels")
    accepted = {
        slug(name)
        for access in accesses
        for name in names_in_suite("black-box", ThreatModel(threat.change, access=access))
    }
    return {slug(name) for name in names} <= accepted | set(map(slug, names_in_suite("trees", threat)))
