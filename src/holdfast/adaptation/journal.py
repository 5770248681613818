"""The file of an adaptation: its steps with their facts, so that a run that was killed continues with the next one."""

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.core.errors import TargetError, UsageError
from holdfast.runs.store.files import make_private, usable, write_atomically
from holdfast.runs.store.records import document, read_document

Outcome = Literal["promoted", "not promoted", "rolled back"]

JOURNAL = "adaptation.json"
VERSION = 1


@dataclass(frozen=True)
class Step:
    """A finished step and its facts."""

    step: str
    time: float
    facts: Mapping[str, Any]


@dataclass(eq=False)
class Journal:
    """The steps of the run in a folder."""

    folder: Path
    server: str
    settings: str
    """digest of the settings"""
    run: str = ""
    steps: list[Step] = field(default_factory=list)
    outcome: Outcome | None = None
    reason: str = ""

    @classmethod
    def opened(cls, folder: Path, server: str, settings: str, *, resume: bool) -> "Journal":
        """Create the journal in a new folder, or read it to resume the run.

        Raises `UsageError` for a folder with another run, or for other settings.
        """
        path = folder / JOURNAL
        if not path.exists():
            if folder.exists() and any(folder.iterdir()):
                raise UsageError(
                    f"{str(folder)!r} is not empty, and contains no adaptation; give another folder"
                )
            with usable(folder):
                make_private(folder)
            journal = cls(folder, server, settings, secrets.token_hex(8))
            journal.write()
            return journal
        if not resume:
            raise UsageError(f"{str(folder)!r} contains an adaptation; resume it, or give another folder")
        journal = cls.read(folder)
        if (journal.server, journal.settings) != (server, settings):
            raise UsageError(
                f"the adaptation in {str(folder)!r} has other settings; give these, or a new folder"
            )
        return journal

    @classmethod
    def read(cls, folder: Path) -> "Journal":
        """Read the journal in a folder. Raises `TargetError` if its format is another one."""
        path = folder / JOURNAL
        try:
            content = read_document(path)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            return cls(
                folder,
                content["server"],
                content["settings"],
                content["run"],
                [Step(**step) for step in content["steps"]],
                content["outcome"],
                content["reason"],
            )
        except (ValueError, LookupError, TypeError) as error:
            raise TargetError(f"{str(path)!r} was changed ({error}); begin a new run") from error

    def facts(self, step: str) -> Mapping[str, Any] | None:
        """Return the facts of a finished step; None if it is not finished."""
        return next((each.facts for each in self.steps if each.step == step), None)

    def add(self, step: str, facts: Mapping[str, Any]) -> Step:
        """Add a finished step, and write the journal."""
        added = Step(step, time.time(), json.loads(json.dumps(facts)))
        self.steps.append(added)
        self.write()
        return added

    def end(self, outcome: Outcome, reason: str) -> None:
        """Note how the run ended."""
        self.outcome, self.reason = outcome, reason
        self.write()

    def write(self) -> None:
        """Write the journal, which has its old or its new content after a crash."""
        content = {
            "version": VERSION,
            "run": self.run,
            "server": self.server,
            "settings": self.settings,
            "steps": [asdict(step) for step in self.steps],
            "outcome": self.outcome,
            "reason": self.reason,
        }
        with usable(self.folder):
            write_atomically(self.folder / JOURNAL, document(content))
