"""What a pool holds, in plain values: where each set stands, what served when and to whom, what leaked."""

from collections.abc import Sequence
from typing import Any

from holdfast.rotation import next_set
from holdfast.runs.rotate.collecting import BASE_OF
from holdfast.runs.rotate.learning import what_was_learned
from holdfast.store.pool import Pool
from holdfast.store.standing import Member, Term

UNJUDGED = "it was admitted before the last exposure, and not judged against what leaked then"
"""What is said of a set that serves so."""


def standing(pool: Pool) -> dict[str, Any]:
    """The pool as its ledger says, which was verified to say it."""
    ledger, about = pool.ledger, pool.manifest["about"]
    terms, now, learned = ledger.terms, pool.serving, what_was_learned(pool)
    return {
        "pool": str(pool.path),
        "of": {key: about.get(key) for key in ("model", "data", "threat", "recipe", "source")},
        "generator": None if learned is None else vars(learned),
        "serving": None if now is None else vars(now),
        "ahead": list(pool.ahead),
        "entries": ledger.entries,
        "sets": [_member(member, terms) for member in ledger.members],
        "terms": [_term(term) for term in terms],
        "notes": _notes(pool),
    }


def _member(member: Member, terms: tuple[Term, ...]) -> dict[str, Any]:
    served = [term for term in terms if term.name == member.name]
    return {
        "name": member.name,
        "state": "deleted" if member.deleted else member.state,
        "since": member.since,
        "why": member.why,
        "bases": list(member.bases),
        "exposed": None if member.exposed is None else member.exposed.why,
        "epochs": [term.epoch for term in served],
        "answers": sum(term.others + sum(term.answers.values()) for term in served),
    }


def _term(term: Term) -> dict[str, Any]:
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


def unjudged(pool: Pool) -> tuple[str, ...]:
    """Sets that wait and were admitted before the last exposure: nobody asked what leaked then turns on them."""
    leaked = max((one.entry for one in pool.ledger.exposed() if not one.why.startswith(BASE_OF)), default=0)
    return tuple(name for name in pool.ahead if pool.ledger.member(name).entry < leaked)


def next_judged(pool: Pool, waiting: Sequence[str]) -> str:
    """Which set serves next: one that was judged against all that leaked, where one waits."""
    old = unjudged(pool)
    return next_set([name for name in waiting if name not in old] or waiting)


def _notes(pool: Pool) -> list[str]:
    """What somebody should do something about."""
    ledger, now = pool.ledger, pool.serving
    notes = []
    old = unjudged(pool)
    if old:
        notes.append(
            f"{len(old)} of {len(pool.ahead)} sets that wait were admitted before the last exposure, and not judged "
            f"against it; judge them again with holdfast rotate admit {pool.shown}; others serve first"
        )
    if now is not None and ledger.member(now.name).exposed is not None:
        notes.append(f"{now.name} serves and is exposed; swap another in")
    if ledger.unlisted:
        named = ", ".join(ledger.unlisted[:3])
        more = f" and {len(ledger.unlisted) - 3} more" if len(ledger.unlisted) > 3 else ""
        notes.append(
            f"sets that serve or may were made from {named}{more}, which are neither listed as exposed nor deleted: "
            f"stolen, they are worth more than others"
        )
    return notes
