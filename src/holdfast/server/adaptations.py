"""Runs of `holdfast adapt` as the server knows them: their steps, which run holds the server, and the approval."""

import json
import shlex
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.adaptation.server_state import Approval
from holdfast.server.keys import ApiKey
from holdfast.server.requests import Refused
from holdfast.server.served_weights import Record

HELD_S = 60.0
"""seconds after its last sign of life for which a run holds the server"""
_MOST_BYTES = 8192
"""largest size of the facts of a step as JSON"""
_MOST_RUNS, _MOST_STEPS = 10, 200
_LONGEST_NAME = 100

APPROVAL = "approval"
"""name of the step that waits for a human approval"""


@dataclass(eq=False)
class Adaptation:
    """One run with its steps."""

    run: str
    steps: list[Mapping[str, Any]] = field(default_factory=list)
    approval: Approval | None = None
    by: str = ""
    """name of the key with which the candidate was approved or rejected"""
    posted_by: set[str] = field(default_factory=set)
    """hashes of the keys with which steps of the run were posted, or its canary or a reload were requested"""
    seen_s: float = 0.0

    def note(self, key: ApiKey | None) -> None:
        """Note the key of a request of the run."""
        if key is not None:
            self.posted_by.add(key.hash)

    def document(self) -> dict[str, Any]:
        """Return the run for the operator."""
        return {"run": self.run, "steps": list(self.steps), "approval": self.approval, "by": self.by}


class Adaptations:
    """The newest runs. All methods may be called by any thread, as `record` is."""

    def __init__(
        self,
        record: Record,
        pseudonym: Callable[[str], str] = str,
        held_s: float = HELD_S,
        *,
        keys: Path | None = None,
        single_operator: bool = False,
    ) -> None:
        """Prepare an empty list. `keys` is the file of keys, for advice; with `single_operator`, a run may be approved
        with the key that posted it.
        """
        self._record, self._pseudonym, self._held_s = record, pseudonym, held_s
        self._keys, self._single_operator = keys, single_operator
        self._lock = threading.Lock()
        self._runs: list[Adaptation] = []

    @property
    def holder(self) -> str | None:
        """The run that holds the server; None if no run gave a sign of life of late."""
        with self._lock:
            return self._holder()

    def _holder(self) -> str | None:
        now = time.monotonic()
        return next((each.run for each in self._runs if now - each.seen_s < self._held_s), None)

    def took(self, run: object, step: object, facts: object, key: ApiKey | None = None) -> None:
        """Record a step of a run, or only its sign of life if `step` is None. `key` is that of the request; None on a
        server without keys.

        Raises `Refused` for invalid values, and while another run holds the server.
        """
        run, step = _name(run, "run"), None if step is None else _name(step, "step")
        if not isinstance(facts, Mapping) or not _is_short(facts):
            raise Refused(
                400,
                f"facts is no object of at most {_MOST_BYTES} bytes of JSON, with finite numbers and valid text",
            )
        with self._lock:
            self._refuse_held(run)
            adaptation = self._found(run) or Adaptation(run)
            if adaptation not in self._runs:
                self._runs = [adaptation, *self._runs][:_MOST_RUNS]
            adaptation.seen_s = time.monotonic()
            adaptation.note(key)
            if step is None:
                return
            if len(adaptation.steps) >= _MOST_STEPS:
                raise Refused(400, f"the run has more than {_MOST_STEPS} steps")
            adaptation.steps.append({"step": step, "time": time.time(), "facts": dict(facts)})
            if step == APPROVAL and adaptation.approval is None:
                adaptation.approval = "pending"
            self._record("adapt", run=run, step=step, facts=dict(facts))

    def release(self, run: object) -> None:
        """Let other runs begin, because this one has ended."""
        with self._lock:
            found = self._found(_name(run, "run"))
            if found is not None:
                found.seen_s = -self._held_s

    def note_request(self, run: object, key: ApiKey | None = None) -> str:
        """Return the name of a run that holds the server and requests a canary or a reload, of which the key is noted
        as for a step. Raises `Refused` if the run does not hold the server.
        """
        name = _name(run, "run")
        with self._lock:
            self._refuse_held(name)
            found = self._found(name)
            if self._holder() is None or found is None:
                raise Refused(
                    409, f"the run {name} does not hold the server; send a step to /adaptation first"
                )
            found.note(key)
        return name

    def approve(self, run: object, approved: object, key: ApiKey | None = None, by: str = "") -> None:
        """Approve or reject the candidate of a run that waits for it. `by` is the name of the operator without a key.

        Raises `Refused` for an approval with a key with which the run was posted, unless there is a single operator.
        """
        name = _name(run, "run")
        if not isinstance(approved, bool):
            raise Refused(400, "approved is neither true nor false")
        with self._lock:
            found = self._found(name)
            if found is None or found.approval != "pending":
                raise Refused(409, f"the run {name} does not wait for an approval")
            own = key is not None and key.hash in found.posted_by
            if own and approved and not self._single_operator:
                raise Refused(409, self._second_key(name))
            by = by if key is None else key.name
            found.approval, found.by = "approved" if approved else "rejected", by
            self._record("approval", run=name, approved=approved, principal=self._pseudonym(by), own=own)

    def _second_key(self, run: str) -> str:
        file = f" --file {shlex.quote(str(self._keys))}" if self._keys is not None else ""
        return (
            f"this key posted steps of the run {run}, and another key must approve it: create one with holdfast keys "
            f"add NAME --scope approve{file}, or start the server with --single-operator"
        )

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs for the operator, the newest first."""
        with self._lock:
            return [each.document() for each in self._runs]

    def _found(self, run: str) -> Adaptation | None:
        return next((each for each in self._runs if each.run == run), None)

    def _refuse_held(self, run: str) -> None:
        holder = self._holder()
        if holder not in (None, run):
            raise Refused(
                409,
                f"the run {holder} adapts the model; wait until it has ended, or {self._held_s:g} s after it died",
            )


def _name(value: object, key: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME or not value.isprintable():
        raise Refused(400, f"{key} is no text of 1 to {_LONGEST_NAME} printable characters")
    return value


def _is_short(facts: Mapping[str, Any]) -> bool:
    """Whether facts can be written to the audit chain and returned as JSON, and are not too long."""
    try:
        return len(json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()) <= _MOST_BYTES
    except (ValueError, RecursionError):  # NaN, infinity, and half of a surrogate pair
        return False
