"""Functions of the Python interface that read stored runs: `compare`, `report` and `verify`; and the list of runs."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.adaptation.journal import adaptation_entry, is_adaptation, open_adaptation
from holdfast.audits.audit import AuditResult, is_audit, open_audit
from holdfast.core.errors import HoldfastError
from holdfast.runs.assess.result import Result
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.verify import Verified
from holdfast.runs.store.verify import verify as verify_folder
from holdfast.runs.stored.stored_runs import Comparison, RunEntry, open_run, refuse_false, runs_in

if TYPE_CHECKING:
    from holdfast.explanation.explained import Explained

__all__ = ["compare", "report", "verify"]


def compare(first: Result | str | Path, second: Result | str | Path) -> Comparison:
    """Compare two runs on the examples that both contain, and return the differences between them."""
    return Comparison(_result(first), _result(second))


def report(run: str | Path) -> Result | AuditResult:
    """Read the folder of a finished run or audit and return its result."""
    if is_audit(Path(run)):
        return open_audit(Path(run))
    return replace(open_run(Path(run)), explaining=_explained)


def _explained(result: Result, index: int | None) -> "Explained":
    """Explain an example of a stored run, or its model, which is opened by its address."""
    from holdfast.api.verb_settings import Explain  # late, as few runs are explained

    return Explain(model=str(result.run_folder), index=index).run()


def verify(run: str | Path, *, expect_head: str = "") -> Verified:
    """Check that the files in the folder of a run or audit match its hash chain, and that its results follow from its
    columns. Return the number of files and the state of the run.

    Raises `TargetError` for the first difference, and if the chain does not contain `expect_head`, an earlier head.
    """
    verified = verify_folder(Path(run), expect_head=expect_head)
    if is_adaptation(Path(run)):
        open_adaptation(Path(run))
    elif not is_audit(Path(run)):
        refuse_false(Path(run))
    elif verified.complete:
        open_audit(Path(run))
    return verified


def stored_runs(parent: Path) -> list[RunEntry]:
    """Return the runs, audits and adaptations in a folder, oldest first. Subfolders without a readable one are
    skipped.
    """
    entries = runs_in(parent)
    for folder in parent.iterdir() if parent.is_dir() else ():
        with suppress(HoldfastError, OSError):
            if (folder / MANIFEST).is_file() and is_adaptation(folder):
                entries.append(adaptation_entry(folder))
    return sorted(entries, key=lambda entry: (entry.created, entry.path.name))


def _result(run: Result | str | Path) -> Result:
    return run if isinstance(run, Result) else open_run(Path(run))
