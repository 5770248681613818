"""Computes the state of every parameter set of a pool from the entries of its ledger, in their order.

A set is first a candidate, and is then admitted or refused. An admitted set serves, and is then retired. While it waits
to serve, it may be judged again against newly stolen sets, and is then confirmed or refused. A base remains one. That a
set is listed as stolen is not a state but an additional mark: a stolen set that serves continues to serve until the
next swap.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from holdfast.core.errors import UsageError

State = Literal["base", "candidate", "admitted", "refused", "serving", "retired"]

_BEFORE: Mapping[str, tuple[State, ...]] = {
    "admitted": ("candidate", "admitted"),
    "refused": ("candidate", "admitted"),
    "serving": ("admitted",),
    "retired": ("admitted", "serving"),
    "exposed": ("base", "candidate", "admitted", "refused", "serving", "retired"),
    "deleted": ("candidate", "refused", "retired", "base"),
}
"""The allowed states of a set before an entry of each kind."""

Role = Literal["service", "base"]
"""Purpose of a set: `service` sets may serve after their admission; new sets are made from `base` sets, which never
serve."""
_ROLES = ("service", "base")

_FIELDS: Mapping[str, Mapping[str, type]] = {
    "begun": {"manifest": str},
    "candidate": {"set": str, "digest": str, "bases": list, "role": str, "why": str},
    **{kind: {"set": str, "why": str} for kind in _BEFORE},
    "admitted": {"set": str, "why": str, "canary": str, "against": list},
    "serving": {"set": str, "why": str, "epoch": int, "retires": list, "unjudged": bool},
    "exposed": {"set": str, "why": str, "automatic": bool},
    "answers": {"epoch": int, "answers": dict, "others": int},
}
"""The fields of an entry of each kind, in addition to its time. `why` is for readers and never interpreted."""

_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
"""The name of a set is part of a file name."""


@dataclass(frozen=True)
class Exposure:
    """The listing of a parameter set as stolen, with its reason and its time."""

    name: str
    why: str
    at: str
    """time at which it was listed, in UTC"""
    entry: int
    """number of the entry that lists it"""
    automatic: bool = False
    """whether it was listed because a set made from it was admitted, and not because of a reported theft"""


@dataclass(frozen=True)
class SetRecord:
    """A parameter set of a pool, with its origin and its state in the ledger."""

    name: str
    digest: str
    """SHA-256 of its parameters, in hex"""
    bases: tuple[str, ...]
    """names of the sets from which it was made"""
    state: State
    since: str
    """time at which it entered its state, in UTC"""
    why: str
    entry: int
    """number of the entry that set its state"""
    role: Role = "service"
    canary: str = ""
    """fingerprint of its answers to known inputs, computed at its admission"""
    against: tuple[str, ...] = ()
    """names of the stolen sets against which it was judged at its admission"""
    exposed: Exposure | None = None
    deleted: bool = False

    @property
    def status(self) -> str:
        """State of the parameter set as a word, such as `admitted`. It is `exposed` if the set is listed as stolen."""
        return self.state if self.exposed is None else "exposed"

    @property
    def needed(self) -> bool:
        """Whether the parameters must not be deleted, because the set is the serving set, may serve later, or is listed
        as stolen.
        """
        return self.status in ("admitted", "serving", "exposed") and not self.deleted


@dataclass(frozen=True)
class Serving:
    """The parameter set of a pool that answers requests now."""

    name: str
    epoch: int
    """number of sets that have served so far, including this one"""
    since: str


@dataclass(frozen=True)
class Term:
    """A period in which a parameter set serves, with the number of requests that it answered."""

    name: str
    """name of the parameter set"""
    epoch: int
    """number of the period, from 1"""
    since: str
    """time at which it began, in UTC, as in 2026-11-27T12:00:00Z"""
    until: str | None
    """time at which it ended, in the same form; None for the current period"""
    answers: Mapping[str, int]
    """number of answers to each principal"""
    others: int
    """number of answers to callers without a name"""


def well_formed(entry: Mapping[str, Any]) -> None:
    """Raise a `ValueError`, `KeyError` or `TypeError` if a ledger entry does not have the required fields."""
    for name, kind in {"at": str, **_FIELDS[entry["kind"]]}.items():
        if type(entry[name]) is not kind:  # `isinstance` would accept True as a number
            raise TypeError(f"{name} is {entry[name]!r}; a {kind.__name__} was expected")
    if entry.get("role", "service") not in _ROLES:
        raise ValueError(f"role is {entry['role']!r}; {' or '.join(_ROLES)} was expected")
    names = [entry["set"]] if "set" in entry else []
    for name in [
        *names,
        *(other_name for key in ("bases", "retires", "against") for other_name in entry.get(key, ())),
    ]:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a valid name of a set: letters, digits, '.', '_' and '-' were expected"
            )
    for principal, count in entry.get("answers", {}).items():
        if not (isinstance(principal, str) and type(count) is int and count > 0):
            raise ValueError(
                f"the answers to {principal!r} are {count!r}; a name and a positive number were expected"
            )
    if entry.get("others", 0) < 0:
        raise ValueError(
            f"the answers to callers without a name are {entry['others']}; 0 or more were expected"
        )


class LedgerState:
    """State of all parameter sets of a pool after the ledger entries that were applied so far."""

    def __init__(self) -> None:
        self.manifest: str | None = None
        """digest of the manifest of the pool; None for a ledger without a pool"""
        self.members: dict[str, SetRecord] = {}
        """sets by name, in the order in which they were added"""
        self._terms: list[Term] = []
        self._answers: list[dict[str, int]] = []
        self._exposures: list[Exposure] = []
        self._entries = 0

    @property
    def terms(self) -> tuple[Term, ...]:
        """All periods in which a parameter set served, oldest first. The current period is the last one."""
        # Copies, because later entries change the counts.
        return tuple(
            replace(term, answers=dict(answers))
            for term, answers in zip(self._terms, self._answers, strict=True)
        )

    @property
    def serving(self) -> Serving | None:
        """The serving set of the pool. It is None if no set has served yet, or if the last one was retired without a
        successor.
        """
        if not self._terms or self._terms[-1].until is not None:
            return None
        last = self._terms[-1]
        return Serving(last.name, last.epoch, last.since)

    @property
    def epoch(self) -> int:
        """Number of periods so far in which a parameter set served, including the current one."""
        return len(self._terms)

    @property
    def exposed(self) -> tuple[Exposure, ...]:
        """The stolen sets, each once, in the order in which they were listed as stolen."""
        return tuple(self._exposures)

    @property
    def ahead(self) -> tuple[str, ...]:
        """Names of the admitted sets that wait to serve, in the order of their admission. Stolen
        sets are not included.
        """
        waiting = [m for m in self.members.values() if m.state == "admitted" and m.exposed is None]
        return tuple(member.name for member in sorted(waiting, key=lambda member: member.entry))

    @property
    def unjudged(self) -> tuple[str, ...]:
        """Names of the admitted sets that wait to serve, but were not assessed against all stolen sets.

        A set that was judged before a theft was reported must be judged again, even if the stolen set had been listed
        automatically before.
        """
        return tuple(name for name in self.ahead if not self._judged(self.members[name]))

    def _judged(self, member: SetRecord) -> bool:
        return all(
            exposure.name in member.against and (exposure.automatic or exposure.entry < member.entry)
            for exposure in self._exposures
            if exposure.name != member.name and not self.members[exposure.name].deleted
        )

    @property
    def unlisted(self) -> tuple[str, ...]:
        """Names of the bases of candidates, admitted sets and the serving set that are neither listed as stolen nor
        deleted.

        No gate considers the theft of these bases.
        """
        candidates_and_serving = [
            m for m in self.members.values() if m.state in ("candidate", "admitted", "serving")
        ]
        bases = dict.fromkeys(base for member in candidates_and_serving for base in member.bases)
        members = (self.members[base] for base in bases)
        return tuple(member.name for member in members if member.exposed is None and not member.deleted)

    def refuse_illegal(self, entry: Mapping[str, Any]) -> None:
        """Raise `UsageError` if a new ledger entry is not allowed in the current state of the pool."""
        kind = entry["kind"]
        if kind == "begun":
            if self._entries:
                raise UsageError("only the first entry of a ledger creates it")
        elif kind == "answers":
            if not 1 <= entry["epoch"] <= self.epoch:
                raise UsageError(
                    f"the answers are of epoch {entry['epoch']}, but there were {self.epoch} epochs"
                )
        elif kind == "candidate":
            if entry["set"] in self.members:
                raise UsageError(
                    f"{entry['set']!r} is in the ledger already, as {self.members[entry['set']].state}"
                )
            for base in entry["bases"]:
                self.member(base)
        else:
            self._refuse_step(entry)

    def _refuse_step(self, entry: Mapping[str, Any]) -> None:
        kind, member = entry["kind"], self.member(entry["set"])
        if kind == "admitted" and member.role == "base":
            raise UsageError(
                f"{member.name!r} is a base, which other sets are generated from; it cannot become admitted"
            )
        if member.state not in _BEFORE[kind]:
            allowed = " or ".join(_BEFORE[kind])
            raise UsageError(
                f"{member.name!r} is {member.state}; only a set that is {allowed} can become {kind}"
            )
        # A copy of a deleted set may have been stolen before.
        if member.deleted and kind != "exposed":
            raise UsageError(f"{member.name!r} was deleted; it cannot become {kind}")
        for stolen in entry.get("against", ()):
            self.member(stolen)
        if kind in ("serving", "deleted") and member.exposed is not None:
            raise UsageError(
                f"{member.name!r} is listed as stolen since {member.exposed.at} ({member.exposed.why}); "
                + (
                    "serve another set"
                    if kind == "serving"
                    else "keep it, because new sets must be tested against it"
                )
            )
        if kind == "serving":
            serving_before = [] if self.serving is None else [self.serving.name]
            if entry["epoch"] != self.epoch + 1 or entry["retires"] != serving_before:
                raise UsageError(
                    f"epoch {entry['epoch']} retires {entry['retires']}; epoch {self.epoch + 1} retiring "
                    f"{serving_before} was expected"
                )
            if not entry["unjudged"] and not self._judged(member):
                raise UsageError(
                    f"{member.name!r} was not judged against all stolen sets; judge it again, or let it serve "
                    "unjudged"
                )

    def member(self, name: str) -> SetRecord:
        """Return the record of a parameter set. Raises `UsageError`, with similar names, if there is no set of this
        name.
        """
        if name not in self.members:
            raise UsageError(f"{name!r} is not a set of this ledger; {_suggestion(name, self.members)}")
        return self.members[name]

    def take(self, entry: Mapping[str, Any]) -> None:
        """Update the state of the pool by a ledger entry that `refuse_illegal` accepts."""
        kind, at, self._entries = entry["kind"], entry["at"], self._entries + 1
        if kind == "begun":
            self.manifest = entry["manifest"]
        elif kind == "answers":
            answers, term = self._answers[entry["epoch"] - 1], self._terms[entry["epoch"] - 1]
            self._terms[term.epoch - 1] = replace(term, others=term.others + entry["others"])
            for principal, count in entry["answers"].items():
                answers[principal] = answers.get(principal, 0) + count
        elif kind == "candidate":
            self.members[entry["set"]] = SetRecord(
                entry["set"],
                entry["digest"],
                tuple(entry["bases"]),
                "base" if entry["role"] == "base" else "candidate",
                at,
                entry["why"],
                self._entries,
                role=entry["role"],
            )
        elif kind == "exposed":
            self._expose(Exposure(entry["set"], entry["why"], at, self._entries, entry["automatic"]))
        elif kind == "deleted":
            self.members[entry["set"]] = replace(self.members[entry["set"]], deleted=True)
        else:
            self._step(kind, entry)

    def _step(self, state: State, entry: Mapping[str, Any]) -> None:
        name, at, why = entry["set"], entry["at"], entry["why"]
        if self.serving is not None and (state == "serving" or name == self.serving.name):
            self._terms[-1] = replace(self._terms[-1], until=at)
        new_states: dict[str, State] = {name: state}
        new_states |= dict.fromkeys(entry.get("retires", ()), "retired")
        for changed, new_state in new_states.items():
            member = self.members[changed]
            self.members[changed] = replace(
                member,
                state=new_state,
                since=at,
                why=why,
                entry=self._entries,
                canary=entry.get("canary", member.canary),
                against=tuple(entry.get("against", member.against)),
            )
        if state == "serving":
            self._terms.append(Term(name, entry["epoch"], at, None, {}, 0))
            self._answers.append({})

    def _expose(self, exposure: Exposure) -> None:
        """Keep the first listing of a set, or the first report after an automatic listing."""
        member = self.members[exposure.name]
        earlier = member.exposed
        if earlier is None or (earlier.automatic and not exposure.automatic):
            self.members[exposure.name] = replace(member, exposed=exposure)
            self._exposures = [other for other in self._exposures if other is not earlier] + [exposure]


def _suggestion(name: str, known: Collection[str]) -> str:
    """Known names that are similar to an unknown one, as text."""
    if not known:
        return "it contains no sets yet"
    similar = [
        candidate for candidate in known if name and candidate.startswith(name[:4])
    ] or get_close_matches(name, known, 3, 0.5)
    return (
        f"similar names: {', '.join(similar[:3])}"
        if similar
        else f"the last ones are {', '.join(list(known)[-3:])}"
    )
