"""What a run on a served model sends: counted over all attempts, and answered from a journal after a stop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.core.model import Classifier
from holdfast.core.purpose import Kind
from holdfast.ops.expectation import inner
from holdfast.sources.sent import Sent, Totals, counting_by
from holdfast.sources.served import Served
from holdfast.store.files import SERVED, usable
from holdfast.store.folder import planned, refuse_used
from holdfast.store.journal import NAME, Journal

_OPENING = 16
"""rows at most that show how the data are read"""
_KINDS: tuple[Kind, ...] = ("clean", "attacks", "doubts", "judging")


def served_by(model: Classifier) -> Served | None:
    """What asks the server of a served model; None for any other model."""
    net = inner(model).net
    return net if isinstance(net, Served) else None


@contextmanager
def journaled(run: Path | None, *, resume: bool, keep: bool) -> Iterator[None]:
    """Within it, served models that are opened count their rows, and keep their answers in the folder of a run.

    With `resume`, what earlier attempts in that folder sent is counted, too, and what they were answered is not sent
    again. With `keep` the answers stay in the folder when the run is over. Raises `TargetError` where the journal was
    cut or changed.
    """
    if run is None:
        yield
        return
    made: list[Journal] = []
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]

    def journal(limit: int | None) -> Sent:
        refuse_used(run, resume=resume)
        found = Journal(limit, run / NAME, resume=resume, keep=keep)
        made.append(found)
        if planned(run) is None:  # a run that was begun is in the use of the process that holds its lease
            with usable(run):
                run.mkdir(parents=True, exist_ok=True)
            found.attach()
        return found

    try:
        with counting_by(journal):
            yield
    finally:
        for each in made:
            each.close()
        if made and not any(each.totals.sent for each in made) and [p.name for p in run.glob("*")] == [NAME]:
            with usable(run):  # nothing was sent, and no run was begun
                (run / NAME).unlink()
                for folder in missing:
                    folder.rmdir()


def opening_rows(sent: Sent) -> int:
    """Rows that were sent before a run to find out how the data are read; the most it takes after a stop."""
    return sent.totals.rows.total() if not sent.earlier else _OPENING


def attach(served: Served | None) -> None:
    """Keep the answers in the folder of the run, which is there now and in no other process's use."""
    if served is not None and isinstance(served.sent, Journal):
        served.sent.attach()


def finish(served: Served) -> None:
    """Leave what was sent in all in the folder of a run that is over."""
    if isinstance(served.sent, Journal):
        served.sent.finish()


def totals_in(run: Path) -> Totals | None:
    """What a finished run in a folder sent; None where it did not measure a served model."""
    if not (run / SERVED).is_file():
        return None
    journal = Journal(None, run / SERVED, resume=True)
    journal.close()
    return journal.totals


def to_json(totals: Totals) -> dict[str, Any]:
    """What was sent, as the evidence has it; see `Evidence.served`."""
    return {
        "rows": totals.rows.total(),
        **{kind: totals.rows[kind] for kind in _KINDS},
        "requests": totals.requests,
        "refused": totals.refused,
        "rejected": dict(totals.rejected),
        "sent_again": {
            "rows": totals.failed_rows,
            "requests": totals.failed.total(),
            "why": dict(totals.failed),
        },
        "unanswered": totals.unanswered,
        "max_rows": totals.most,
        "says": list(in_words(totals)),
    }


def in_words(totals: Totals) -> tuple[str, ...]:
    """The same in sentences."""
    by_kind = ", ".join(f"{kind} {totals.rows[kind]:,}" for kind in _KINDS)
    rows, requests = _many(totals.rows.total(), "row"), _many(totals.requests, "request")
    said = [f"the server received {rows} in {requests}: {by_kind}"]
    if totals.failed:
        kinds = ", ".join(f"{what} {n:,}" for what, n in sorted(totals.failed.items()))
        requests, rows = _many(totals.failed.total(), "request"), _many(totals.failed_rows, "row")
        said.append(
            f"{requests} with {rows} failed temporarily and had to be sent again ({kinds}); they are not among the "
            "rows above"
        )
    if totals.unanswered:
        rows = _many(totals.unanswered, "row")
        said.append(f"{rows} had no answer when the run was stopped; they are not among the rows above")
    if totals.rejected:
        kinds = ", ".join(f"{status} {n:,}" for status, n in sorted(totals.rejected.items()))
        inputs = _many(totals.rejected.total(), "attacked input")
        said.append(
            f"the server refused {inputs} ({kinds}); a refused input counts as rejected, and not as adversarial"
        )
    if totals.refused:
        said.append(f"of the rows above, {totals.refused:,} were in requests that the server refused")
    if totals.most:
        said.append(
            f"the server refused a request of {totals.too_many} rows and answered one of {totals.most}, the most that "
            f"each later request had; --http-max-rows {totals.most} begins with that"
        )
    return tuple(said)


def _many(n: int, noun: str) -> str:
    """A number of things, as in 2 rows."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
