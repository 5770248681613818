"""The steps of an adaptation as documents of a run, so that a run that was killed continues with the next step; and the
result of an adaptation.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from textwrap import wrap
from typing import Any, Literal

from typing_extensions import TypedDict

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError
from holdfast.core.names import line
from holdfast.reports.tree import Check, Report, Section, Table
from holdfast.reports.write import rendered, write
from holdfast.runs.documents.record import VERDICT
from holdfast.runs.documents.run_manifest import about_run
from holdfast.runs.documents.stored_runs import RunEntry, open_run
from holdfast.runs.engine.identity import code_digest, versions
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Name, refuse_form
from holdfast.runs.store.files import MANIFEST, content_of
from holdfast.runs.store.folder import (
    Chain,
    RunFolder,
    open_run_folder,
    read_about,
    read_chain,
    read_manifest,
    recorded_document,
    refuse_altered,
)

Outcome = Literal["promoted", "not promoted", "rolled back"]

HARDENING = "harden"
"""step whose run is in a folder of this name"""
_BEFORE = ("begin", "trigger", "quarantine", HARDENING)
_JUDGED = ("assess", "gates", "shadow", "approved")
OF_FILE = (*_BEFORE, *_JUDGED, "canary", "promote", "watch")
"""steps of an adaptation of a model in a file, in their order"""
OF_POOL = (*_BEFORE, "immunise", *_JUDGED, "measure", "admit", "promote", "watch")
"""steps of an adaptation of a pool"""


@dataclass(frozen=True)
class Step:
    """A finished step and its facts."""

    step: str
    time: float
    """seconds since 1970; 0 if it is unknown, because times are outside of the chain"""
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Adaptation:
    """The steps that a folder contains."""

    folder: Path
    run: str
    server: str
    steps: tuple[Step, ...]
    head: str
    """digest of the last record of the chain"""
    outcome: Outcome | None = None
    """how it ended; None if it is not finished"""
    reason: str = ""
    expected: tuple[str, ...] = ()
    """names of all steps, in their order"""


def concluded(steps: Sequence[Step]) -> tuple[Outcome, str] | None:
    """Return the outcome that follows from steps, and its reason; None if a step is missing."""
    if not steps:
        return None
    last = steps[-1]
    if reason := last.facts.get("ends"):
        return "rolled back" if last.step == "watch" else "not promoted", str(reason)
    return ("promoted", "") if last.step == "watch" else None


class Journal:
    """The steps of the run in a folder that this process may write."""

    def __init__(self, folder: RunFolder) -> None:
        self._store, self._run = folder, Run(OF_FILE, folder)
        self.folder, self.run, self.server = folder.path, folder.manifest["run"], folder.manifest["server"]
        self._times = read_about(folder.path).get("times", {})

    def facts(self, step: str) -> Mapping[str, Any] | None:
        """Return the facts of a finished step; None if it is not finished."""
        return self._store.document(step)

    def take(self, step: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return the facts of a step, which are computed and stored first unless it is finished."""
        return self._run.document(step, lambda: self._timed(step, compute()))

    def _timed(self, step: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        self._times = {**self._times, step: time.time()}
        self._store.add_about({"times": self._times})
        content: dict[str, Any] = json.loads(json.dumps(facts))
        return content

    def keep(self, name: str, content: bytes) -> Path:
        """Store a file, such as a copy of weights, and return its path."""
        self._store.keep(Path(name).stem, name, content)
        return self.folder / name

    def keep_written(self, name: str) -> None:
        """Record a file that was written to the folder, if there is one."""
        if (self.folder / name).is_file():
            self.keep(name, content_of(self.folder / name))

    def drop_written(self, name: str) -> None:
        """Delete a file that was written to the folder, unless it is recorded."""
        if self._store.chain.last(Path(name).stem) is None:
            (self.folder / name).unlink(missing_ok=True)

    def end(self) -> None:
        """Store the outcome that follows from the steps."""
        outcome, reason = concluded(self.stored().steps) or (None, "")
        assert outcome is not None, "all steps were taken, or one ends the run"
        self._run.record(VERDICT, {"verdict_of": "adapt", "outcome": outcome, "reason": reason})

    def stored(self) -> Adaptation:
        """Return the steps that the folder contains."""
        return _adaptation(self.folder, self._store.manifest, self._store.chain)


@contextmanager
def open_journal(folder: Path, config: Mapping[str, Any], *, resume: bool) -> Iterator[Journal]:
    """Context manager that starts or resumes the run of an adaptation in a folder, with its lease. `config` are its
    settings, with the URL of the operator's port as `server`.

    Raises `UsageError` for a folder with another run.
    """
    manifest = {
        "verb": "adapt",
        "run": secrets.token_hex(8),
        "server": config["server"],
        # the model and the data are facts of the steps, because the server states the model
        "digests": {"config": digest(canonical(config)), "model": "", "data": "", "code": code_digest()},
        "config": dict(config),
        "versions": versions(),
    }
    with open_run_folder(folder, manifest, about_run(""), resume=resume) as store:
        yield Journal(store)


class _Manifest(TypedDict):
    verb: Literal["adapt"]
    run: Name
    server: str
    config: dict[str, Any]


class _Concluded(TypedDict):
    verdict_of: Literal["adapt"]
    outcome: Outcome
    reason: str


def is_adaptation(folder: Path) -> bool:
    """Return whether a folder with a `run.json` contains an adaptation."""
    return read_manifest(folder).get("verb") == "adapt"


def read_adaptation(folder: Path) -> Adaptation:
    """Return the steps in a folder. Raises `TargetError` if they do not match the chain or each other. The
    run of the hardening within it is not read.
    """
    return _adaptation(folder, read_manifest(folder), read_chain(folder, repair=False))


def open_adaptation(folder: Path) -> Adaptation:
    """Return the same as `read_adaptation`, and read the run of the hardening as well. Raises `TargetError` for a fault
    in it.
    """
    adaptation = read_adaptation(folder)
    if any(each.step == HARDENING and "chain" in each.facts for each in adaptation.steps):
        open_run(folder / HARDENING)
    return adaptation


def open_finished(folder: Path) -> Adaptation:
    """Return the same as `open_adaptation`. Raises `TargetError` for an adaptation that is not finished."""
    stored = open_adaptation(folder)
    if stored.outcome is None:
        raise TargetError(
            f"the adaptation in {str(folder)!r} is not finished; resume it with its command and --resume"
        )
    return stored


def adaptation_entry(folder: Path) -> RunEntry:
    """Return the entry of the adaptation in a folder for the list of runs. The model is named by its server. Raises
    `TargetError` as `read_adaptation` does.
    """
    stored, manifest = read_adaptation(folder), read_manifest(folder)
    data, threat, suite = (
        text if isinstance(text := manifest["config"].get(key), str) else ""
        for key in ("data", "threat", "suite")
    )
    finished = stored.outcome is not None
    return RunEntry(
        folder,
        "adapt",
        str(read_about(folder).get("created", "")),
        stored.server,
        data,
        threat,
        suite,
        finished,
        len(stored.steps),
        len(stored.expected),
        (0 if stored.outcome == "promoted" else 1) if finished else None,
    )


def _adaptation(folder: Path, manifest: Mapping[str, Any], chain: Chain) -> Adaptation:
    refuse_form(folder / MANIFEST, manifest, _Manifest)
    refuse_altered(folder, chain)
    times = read_about(folder).get("times", {})
    kinds = [link.content["kind"] for link in chain.links]
    taken = [kind for kind in kinds if kind in {*OF_FILE, *OF_POOL}]
    steps = tuple(Step(kind, times.get(kind, 0.0), _facts(folder, chain, kind)) for kind in taken)
    expected = OF_POOL if steps and "pool" in steps[0].facts else OF_FILE
    ended = [bool(step.facts.get("ends")) for step in steps[:-1]]
    if tuple(taken) != expected[: len(taken)] or any(ended):
        raise TargetError(
            f"the chain of {str(folder)!r} has the steps {', '.join(taken)}, and expected are {', '.join(expected)}, "
            "each once, up to the one that ends the run; restore it from a copy"
        )
    _refuse_other_hardening(folder, steps)
    decided, found = recorded_document(folder, chain, VERDICT), concluded(steps)
    outcome, reason = (None, "") if decided is None or found is None else found
    if decided is not None:
        refuse_form(folder / f"{VERDICT}.json", decided, _Concluded)
        if kinds[-1] != VERDICT or (decided["outcome"], decided["reason"]) != found:
            raise TargetError(
                f"{str(folder / f'{VERDICT}.json')!r} does not follow from the steps; restore it from a copy"
            )
    return Adaptation(
        folder, manifest["run"], manifest["server"], steps, chain.head, outcome, reason, expected
    )


def _facts(folder: Path, chain: Chain, step: str) -> Mapping[str, Any]:
    facts = recorded_document(folder, chain, step)
    assert facts is not None, "it is in the chain"
    if "ends" in facts and not isinstance(facts["ends"], str):
        raise TargetError(
            f"{str(folder / f'{step}.json')!r} has a reason of the end that is no text; restore it"
        )
    return facts


def _refuse_other_hardening(folder: Path, steps: Sequence[Step]) -> None:
    """Raise `TargetError` if the run of the hardening is not the one whose chain the step states. That of a pool is
    deleted at the end, and its step states none.
    """
    for step in steps:
        if step.step != HARDENING or "chain" not in step.facts:
            continue
        within = folder / HARDENING
        is_run = (within / MANIFEST).is_file() and not within.is_symlink()
        if not is_run or read_chain(within, repair=False).head != step.facts["chain"]:
            raise TargetError(
                f"{str(within)!r} is not the run whose chain is recorded in {HARDENING}.json; restore it from a copy"
            )


# --- records of the server


APPROVAL, END = "approval", "end"
"""steps that are in the chain of the server alone: the request for an approval, and the outcome"""


def difference(stored: Adaptation, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the first difference between the steps of a finished run and the records of a server; empty if they agree.

    A step may be recorded several times, because a run that is resumed sends its last one again.
    """
    of_run = [each for each in records if each.get("run") == stored.run]
    if not of_run:
        return "they have no record of this run"
    sent: dict[str, list[bytes]] = {}
    for each in of_run:
        if each["kind"] == "adapt":
            sent.setdefault(str(each.get("step")), []).append(canonical(each.get("facts")))
    facts = {step.step: step.facts for step in stored.steps}
    expected = {**facts, END: {"outcome": stored.outcome, "reason": stored.reason}}
    for name, content in expected.items():
        if name not in sent:
            return f"they have no step {name}"
        if any(each != canonical(content) for each in sent[name]):
            return f"they have other facts of the step {name}"
    order = [name for name in sent if name != APPROVAL]
    if order != list(expected):
        return f"they have the steps {', '.join(order)}"
    return _other_approval(facts.get("approved", {}), of_run)


def _other_approval(facts: Mapping[str, Any], of_run: Sequence[Mapping[str, Any]]) -> str:
    if not facts.get("required"):
        return ""
    decided = [each.get("approved") for each in of_run if each["kind"] == APPROVAL]
    approved = not facts.get("ends")
    if approved in decided and (not approved) not in decided:
        return ""
    return f"they have no {'approval' if approved else 'rejection'} of the candidate"


@dataclass(frozen=True)
class Adapted:
    """How an adaptation ended, and its steps with their facts."""

    run: str
    server: str
    outcome: Outcome
    reason: str
    steps: tuple[Step, ...]
    folder: Path

    @classmethod
    def of(cls, stored: Adaptation) -> "Adapted":
        """Return the result of a run that has ended."""
        assert stored.outcome is not None
        return cls(stored.run, stored.server, stored.outcome, stored.reason, stored.steps, stored.folder)

    @property
    def promoted(self) -> bool:
        """Whether the candidate serves now."""
        return self.outcome == "promoted"

    @property
    def exit_code(self) -> int:
        """0 if the candidate was promoted, and 1 if not."""
        return 0 if self.promoted else 1

    def summary(self) -> dict[str, Any]:
        """Return the result as strict JSON."""
        return {
            "schema_version": 1,
            "verb": "adapt",
            "run": self.run,
            "server": self.server,
            "outcome": self.outcome,
            "reason": self.reason,
            "steps": [asdict(step) for step in self.steps],
        }

    @property
    def report(self) -> Report:
        """The report of the adaptation."""
        state: Literal["pass", "fail"] = "pass" if self.promoted else "fail"
        return Report(
            verb="adapt",
            about=f"adaptation of {self.server}",
            headline=str(self),
            content=self.summary(),
            tone=state,
            sections=(Section("Steps", (steps_table(self.steps),)),),
            checks=(Check("adaptation", "promotion", state, str(self)),),
        )

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return rendered(self.report, ".json")

    def write(self, path: str | Path) -> Path:
        """Write a report in the format of the file suffix, such as `.html`. Return the path."""
        return write(self.report, Path(path))

    def text(self, *, width: int | None = None) -> str:
        """Return the steps as text, each with its time (UTC) and its facts."""
        blocks = []
        for step in self.steps:
            begin = f"{clock(step.time)}  {step.step:<11}"
            blocks += wrap(
                begin + facts_text(step.step, step.facts), width or 100, subsequent_indent=" " * len(begin)
            )
        return "\n".join(blocks)

    def __str__(self) -> str:
        ends = {
            "promoted": "The candidate was promoted",
            "not promoted": "The candidate was not promoted",
            "rolled back": "The candidate was promoted and rolled back",
        }
        return line(f"{ends[self.outcome]}{f': {self.reason}' if self.reason else ''}.")


def steps_table(steps: Sequence[Step]) -> Table:
    """Return the steps of an adaptation, each with its time (UTC) and its facts, as a table."""
    rows = [(step.step, clock(step.time), facts_text(step.step, step.facts) or "-") for step in steps]
    return Table(("step", "time", "facts"), rows, texts=frozenset({1, 2}))


def facts_text(step: str, facts: Mapping[str, Any]) -> str:
    """Return the facts of a step as one line, without those that have parts or are empty. A fact that has the name of
    its step is written without the name.

    >>> facts_text("quarantine", {"flagged": 3, "share": 0.25, "classes": ["a", "b"]})
    'flagged 3; share 0.25; classes: a, b'
    >>> facts_text("gates", {"gates": ["robust_accuracy >= 0.5: pass"]})
    'robust_accuracy >= 0.5: pass'
    """
    parts = []
    for key, value in facts.items():
        if isinstance(value, Mapping) or value == "":
            continue
        if isinstance(value, Sequence) and not isinstance(value, str):
            between, shown = ": ", ", ".join(map(str, value))
        elif isinstance(value, bool):
            between, shown = ": ", "yes" if value else "no"
        else:
            between, shown = " ", f"{value:.4g}" if isinstance(value, float) else str(value)
        parts.append(shown if key == step else f"{key.replace('_', ' ')}{between}{shown}")
    return line("; ".join(parts))


def clock(time: float) -> str:
    """Return the time of day in UTC as text, of the same length if it is unknown."""
    return f"{datetime.fromtimestamp(time, UTC):%H:%M:%S}" if time else "--:--:--"
