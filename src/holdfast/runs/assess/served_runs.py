"""Supports runs on a model behind a server: it counts the sent rows over all attempts, and reads responses to repeated
rows from a journal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from holdfast.attacks.parts.images import inner
from holdfast.core.errors import Remedy, UsageError, model_argument
from holdfast.core.meter import Kind
from holdfast.core.model import Classifier
from holdfast.io.remote.http_client import Sent, Totals, counting_by
from holdfast.io.remote.served_model import Served
from holdfast.runs.assess.request import AssessRequest, DescribedModel
from holdfast.runs.harness.plan import refuse_what_is_hidden
from holdfast.runs.harness.target import base_of
from holdfast.runs.store.files import SERVED, make_private, usable
from holdfast.runs.store.folder import refuse_used, stored_manifest
from holdfast.runs.store.journal import NAME, Journal

_OPENING = 16
"""largest number of rows that are sent to determine how the data are read"""
_KINDS: tuple[Kind, ...] = ("clean", "attacks", "doubts", "judging")


def served_by(model: Classifier) -> Served | None:
    """Return the connection to the server of a served model, or None for a model that is not behind a server."""
    net = inner(base_of(model)).net
    return net if isinstance(net, Served) else None


@contextmanager
def journaled(run: Path | None, *, resume: bool, keep: bool) -> Iterator[None]:
    """Context manager that counts the rows of all served models that are opened in it, and stores the servers' answers
    in the folder `run`.

    With `resume`, the rows of earlier attempts in that folder are counted, and their answers are reused. With `keep`,
    the answers stay in the folder after the run. Raises `TargetError` if the journal is truncated or altered.
    """
    if run is None:
        yield
        return
    journals: list[Journal] = []
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]

    def journal(limit: int | None) -> Sent:
        refuse_used(run, resume=resume)
        journal_of_model = Journal(limit, run / NAME, resume=resume, keep=keep)
        journals.append(journal_of_model)
        if stored_manifest(run) is None:  # the folder of a begun run belongs to the process with the lease
            with usable(run):
                make_private(run)
            journal_of_model.attach()
        return journal_of_model

    try:
        with counting_by(journal):
            yield
    finally:
        for journal_made in journals:
            journal_made.close()
        if (
            journals
            and not any(journal_made.totals.sent for journal_made in journals)
            and [p.name for p in run.glob("*")] == [NAME]
        ):
            with usable(run):  # nothing was sent, and no run was started
                (run / NAME).unlink()
                for folder in missing:
                    folder.rmdir()


def refuse_early(served: Served, subject: DescribedModel, request: AssessRequest) -> None:
    """Raise `UsageError` for a request that is not possible for a served model, before further rows are sent to the
    server.

    Also records the number of rows that were sent while the data were opened. Several worker processes are refused,
    because the sent rows could not be counted across processes.
    """
    sent = served.sent  # rows that determine the layout of the inputs; for a resumed run, an upper bound
    served.opening = sent.totals.rows.total() if not sent.earlier else _OPENING
    if not request.surrogates:
        refuse_what_is_hidden(request.plan, subject.model.access, subject.model.hides)
    if request.workers is not None:
        raise UsageError(
            f"workers is {request.workers}, but the model is behind a server, which computes its outputs",
            Remedy(
                "workers",
                also=(model_argument("http_concurrency", request.workers),),
                reason="to send that many requests at the same time",
            ),
        )


def attach(served: Served | None) -> None:
    """Start to store the server's answers in the folder of the run. This process must have the lease of the folder."""
    if served is not None and isinstance(served.sent, Journal):
        served.sent.attach()


def finish(served: Served) -> None:
    """Write the numbers of rows and requests that were sent to a server to the folder of a finished run."""
    if isinstance(served.sent, Journal):
        served.sent.finish()


def totals_in(run: Path) -> Totals | None:
    """Return the numbers of rows and requests that a finished run sent to a server, or None if its model was not behind
    a server.
    """
    if not (run / SERVED).is_file():
        return None
    journal = Journal(None, run / SERVED, resume=True)
    journal.close()
    return journal.totals


def totals_to_json(totals: Totals) -> dict[str, Any]:
    """Return the numbers of rows and requests that a run sent to a server as JSON, in the format of the evidence."""
    return {
        "rows": totals.rows.total(),
        **{kind: totals.rows[kind] for kind in _KINDS},
        "requests": totals.requests,
        "refused": totals.refused,
        "rejected": dict(totals.rejected),
        "retried": {
            "rows": totals.failed_rows,
            "requests": totals.failed.total(),
            "reasons": dict(totals.failed),
        },
        "unanswered": totals.unanswered,
        "max_rows": totals.most,
        "messages": list(in_words(totals)),
    }


def in_words(totals: Totals) -> tuple[str, ...]:
    """Return the numbers of rows and requests that a run sent to a server as sentences for the notes of a report."""
    by_kind = ", ".join(f"{kind} {totals.rows[kind]:,}" for kind in _KINDS)
    rows, requests = _many(totals.rows.total(), "row"), _many(totals.requests, "request")
    sentences = [f"the server received {rows} in {requests}: {by_kind}"]
    if totals.failed:
        kinds = ", ".join(f"{failure} {n:,}" for failure, n in sorted(totals.failed.items()))
        requests, rows = _many(totals.failed.total(), "request"), _many(totals.failed_rows, "row")
        sentences.append(
            f"{requests} with {rows} failed temporarily and had to be sent again ({kinds}); they are not among the "
            "rows above"
        )
    if totals.unanswered:
        rows = _many(totals.unanswered, "row")
        sentences.append(
            f"{rows} had no response when the run was stopped; they are not among the rows above"
        )
    if totals.rejected:
        kinds = ", ".join(f"{status} {n:,}" for status, n in sorted(totals.rejected.items()))
        inputs = _many(totals.rejected.total(), "attacked input")
        sentences.append(
            f"the server rejected {inputs} ({kinds}); these count as rejected, and not as adversarial"
        )
    if totals.refused:
        sentences.append(f"of the rows above, {totals.refused:,} were in requests that the server rejected")
    if totals.most:
        sentences.append(
            f"the server rejected a request of {totals.too_many} rows and accepted one of {totals.most}, so each later "
            f"request had at most that many; give --http-max-rows {totals.most} to avoid rejected requests"
        )
    return tuple(sentences)


def _many(n: int, noun: str) -> str:
    """A count with its noun, as in `2 rows`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
