"""The serving set of a pool: `swap` replaces it by a randomly chosen admitted set, `expose` lists a set as stolen, and
`status` and `head` return the state of the pool and of its ledger.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.core.errors import Inconclusive, Placeholder, Remedy, UsageError
from holdfast.rotation.ledger_state import SetRecord, Term
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.rotation_request import trained_generator
from holdfast.runs.store.append_log import Head


@dataclass(frozen=True)
class Exposed:
    """State of the pool after a parameter set was listed as stolen."""

    name: str
    why: str
    serving: bool
    """whether the set serves now; it is then replaced at the next swap"""
    unjudged: int
    """number of admitted sets that wait to serve and must be judged again"""


def expose(pool: Pool, name: str, why: str) -> Exposed:
    """List a parameter set that an attacker is known or assumed to have as stolen, with a description of what happened.
    If it is the serving set, it is replaced at the next swap. New sets are tested against it.
    """
    if not why.strip():
        raise UsageError(
            "the exposure has no reason",
            Remedy("why", Placeholder("TEXT"), reason="which describes what happened"),
        )
    pool.expose(name, why)
    serving = pool.serving
    return Exposed(name, why, serving is not None and serving.name == name, len(pool.unjudged))


UNJUDGED = "it was not judged against all sets that are now listed as stolen"
"""Note on a serving set that was not judged against all stolen sets."""


@dataclass(frozen=True)
class Swapped:
    """The parameter set that serves after a swap."""

    name: str
    epoch: int
    """number of the period of service, from 1"""
    since: str
    """time at which the set began to serve, in UTC"""
    unjudged: bool
    """whether the set was not judged against all stolen sets"""
    waiting: int
    """number of admitted sets that wait to serve"""


def swap(pool: Pool, why: str = "", *, unjudged: bool = False, epoch: int | None = None) -> Swapped:
    """Make a randomly chosen admitted set of the pool the serving set. The ledger records the reason `why`.

    If `epoch` is given, it must be the current period of service, so that two processes with the same reason swap only
    once. Raises `Inconclusive`, and changes nothing, if no set waits that was judged against all stolen sets, unless
    `unjudged` allows other sets.
    """
    others = pool.unjudged
    serving = pool.swap(epoch=epoch, why=why, choose=next_set, unjudged=unjudged)
    return Swapped(serving.name, serving.epoch, serving.since, serving.name in others, len(pool.ahead))


def next_set(waiting: Sequence[str]) -> str:
    """Return the name of the set that serves next, chosen at random from the waiting admitted sets so that an attacker
    cannot predict it.

    Raises `Inconclusive` if `waiting` is empty.
    """
    if not waiting:
        raise Inconclusive(
            "no admitted set is waiting, so the serving set is not changed; draw and admit more sets"
        )
    # not from the run's draws, which an attacker with the seed could repeat
    return secrets.choice(waiting)


def head(pool: Pool) -> Head:
    """Return the number and the digest of the last ledger entry of a pool."""
    ledger = pool.ledger
    latest = ledger.head
    return Head(ledger.entry_of(latest) or 0, latest)


def status(pool: Pool) -> dict[str, Any]:
    """Return the state of the parameter sets of a pool from its verified ledger, as plain values."""
    ledger, about = pool.ledger, pool.manifest["about"]
    terms, serving, generator = ledger.terms, pool.serving, trained_generator(pool)
    return {
        "pool": str(pool.path),
        "of": {key: about.get(key) for key in ("model", "data", "threat", "recipe", "source")},
        "generator": None if generator is None else vars(generator),
        "serving": None if serving is None else vars(serving),
        "ahead": list(pool.ahead),
        "entries": ledger.entries,
        "head": ledger.head,
        "unjudged": list(pool.unjudged),
        "sets": [_set_row(member, terms) for member in ledger.members],
        "terms": [_service_row(term) for term in terms],
        "notes": _notes(pool),
    }


def _set_row(member: SetRecord, terms: tuple[Term, ...]) -> dict[str, Any]:
    served = [term for term in terms if term.name == member.name]
    return {
        "name": member.name,
        "state": "deleted" if member.deleted else member.state,
        "since": member.since,
        "why": member.why,
        "bases": list(member.bases),
        "role": member.role,
        "exposed": None if member.exposed is None else member.exposed.why,
        "listed_automatically": member.exposed is not None and member.exposed.automatic,
        "epochs": [term.epoch for term in served],
        "answers": sum(term.others + sum(term.answers.values()) for term in served),
    }


def _service_row(term: Term) -> dict[str, Any]:
    most = max(term.answers.values(), default=0)
    return {
        "set": term.name,
        "epoch": term.epoch,
        "since": term.since,
        "until": term.until,
        "principals": len(term.answers),
        "most_to_one": most,
        "others": term.others,
    }


def _notes(pool: Pool) -> list[str]:
    """Notes on problems that need an action."""
    ledger, serving = pool.ledger, pool.serving
    notes = []
    if pool.unjudged:
        notes.append(
            f"{len(pool.unjudged)} of {len(pool.ahead)} waiting sets were not judged against all stolen sets; "
            f"judge them with holdfast rotate admit {pool.shown}. Until then holdfast rotate swap refuses them"
        )
    if serving is not None and ledger.member(serving.name).exposed is not None:
        notes.append(f"{serving.name} serves and is listed as stolen; swap to another set")
    if ledger.unlisted:
        listed = ", ".join(ledger.unlisted[:3])
        more = f" and {len(ledger.unlisted) - 3} more" if len(ledger.unlisted) > 3 else ""
        notes.append(
            f"sets that serve or may serve were generated from {listed}{more}, which are neither listed as stolen "
            "nor deleted. Protect these: an attacker gains more from them than from other sets"
        )
    return notes
