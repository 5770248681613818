"""The steps `status` and `head` of a rotation: they report the sets of a pool, when each set served, the stolen sets,
and the last ledger entry.
"""

from typing import Any

from holdfast.rotation.pool.ledger_state import SetRecord, Term
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.generator_quality import trained_generator
from holdfast.runs.store.append_log import Head


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
