"""What a run on a served model sends: counted over all attempts, and answered from a journal after a stop."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.core.model import Classifier
from holdfast.core.purpose import Kind
from holdfast.ops.expectation import inner
from holdfast.sources.sent import Sent, Totals, count
from holdfast.sources.served import Served
from holdfast.store import forms
from holdfast.store.files import SERVED as ROWS
from holdfast.store.files import usable, write_atomically
from holdfast.store.forms import refuse_form
from holdfast.store.journal import NAME, Journal
from holdfast.store.records import document, read_document

_KINDS: tuple[Kind, ...] = ("clean", "attacks", "doubts", "judging")
_FIELDS: Mapping[str, forms.Form] = {
    **dict.fromkeys(("sent", "requests", "refused", "failed_rows", "too_many"), forms.count),
    **dict.fromkeys(("rows", "rejected", "failed"), forms.mapped(forms.count)),
    "most": forms.maybe(forms.count),
}
_TOTALS = forms.record({}, _FIELDS)


def served_by(model: Classifier) -> Served | None:
    """What asks the server of a served model; None for any other model."""
    net = inner(model).net
    return net if isinstance(net, Served) else None


@contextmanager
def counted(served: Served | None, run: Path | None, *, resume: bool, keep: bool) -> Iterator[None]:
    """Within it, a served model counts its rows, and keeps its answers where the run has a folder.

    With `resume`, what earlier attempts in that folder sent is counted, too, and what they were answered is not sent
    again. With `keep` the answers stay in the folder when the run is over. Raises `TargetError` where the journal was
    cut or changed.
    """
    if served is None or run is None:
        if served is not None:
            served.begin(Sent(served.remote.max_queries), run=True)
        yield
        return
    journal = Journal(served.remote.max_queries, run / NAME, resume=resume, keep=keep)
    if resume and not (run / NAME).is_file() and (run / ROWS).is_file():
        journal.totals = _read(run / ROWS)
    journal.earlier = journal.totals.sent
    served.begin(journal, run=True)
    try:
        yield
    finally:
        journal.close()


def attach(served: Served | None) -> None:
    """Keep the answers in the folder of the run, which is there now and in no other process's use."""
    if served is not None and isinstance(served.sent, Journal):
        served.sent.attach()


def finish(served: Served, run: Path | None) -> None:
    """Write down what was sent in all, and remove the answers unless they are to be kept."""
    if run is not None and isinstance(served.sent, Journal):
        with usable(run / ROWS):
            write_atomically(run / ROWS, document(vars(served.sent.totals)))
        served.sent.close(finished=True)


def totals_in(run: Path) -> Totals | None:
    """What a finished run in a folder sent; None where it did not measure a served model."""
    return _read(run / ROWS) if (run / ROWS).is_file() else None


def _read(path: Path) -> Totals:
    totals = Totals()
    content = read_document(path)
    refuse_form(path, content, _TOTALS)
    count(totals, {"t": "totals", **{name: content[name] for name in _FIELDS if name in content}})
    return totals


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
    }


def in_words(totals: Totals) -> tuple[str, ...]:
    """The same in sentences."""
    served = to_json(totals)
    by_kind = ", ".join(f"{kind} {served[kind]:,}" for kind in _KINDS)
    rows, requests = _many(served["rows"], "row"), _many(served["requests"], "request")
    said = [f"the server received {rows} in {requests}: {by_kind}"]
    again = served["sent_again"]
    if again["requests"]:
        kinds = ", ".join(f"{what} {n:,}" for what, n in sorted(again["why"].items()))
        said.append(
            f"{_many(again['requests'], 'request')} with {_many(again['rows'], 'row')} failed in passing and had to be "
            f"sent again ({kinds}); they are not among the rows above"
        )
    if served["unanswered"]:
        said.append(
            f"{_many(served['unanswered'], 'row')} had no answer when the run was stopped; they are not among the rows "
            "above"
        )
    if served["rejected"]:
        kinds = ", ".join(f"{status} {n:,}" for status, n in sorted(served["rejected"].items()))
        total = sum(served["rejected"].values())
        said.append(
            f"the server refused {_many(total, 'attacked input')} ({kinds}); a refused input counts as rejected, and "
            "not as adversarial"
        )
    if served["max_rows"]:
        most = served["max_rows"]
        said.append(
            f"the server refused a request of {totals.too_many} rows and answered one of {most}, the most that each "
            f"later request had; --http-max-rows {most} begins with that"
        )
    return tuple(said)


def _many(n: int, noun: str) -> str:
    """A number of things, as in 2 rows."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
