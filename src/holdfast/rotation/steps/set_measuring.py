"""Assesses parameter sets of a pool on consecutive ranges of the held-out examples, one run for each range, and joins
the evidence.

The run on each range has its own folder under `admission/NAME/`. Therefore at most a shard is lost if the process is
killed, a reference set is measured only once, and the examples behind each gate can be inspected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch

from holdfast.attacks.apgd import APGD
from holdfast.attacks.pgd import PGD
from holdfast.core.chain import canonical, digest
from holdfast.core.evidence import Doubt, Evidence
from holdfast.core.model import Classifier
from holdfast.core.names import slug
from holdfast.core.types import Mask
from holdfast.io.data.arrays import Arrays
from holdfast.reports.numbers import strict
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.rotation.steps.transfer_examples import Attacker, TransferExamples
from holdfast.runs.assess.assess import assess
from holdfast.runs.assess.request import AssessRequest, Subject
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.engine.progress import Progress, silent
from holdfast.runs.harness import Member, Plan
from holdfast.runs.store.files import make_private
from holdfast.runs.store.folder import read_stage
from holdfast.runs.store.records import read_chain

FOLDER = "admission"
WHITE = (Member("PGD-20", PGD(steps=20)), Member("APGD", APGD()))
"""The white-box attacks with which the robust accuracy of a set is measured."""
_TAG = 8  # hex digits that distinguish runs with other attacks, code or settings


@dataclass(frozen=True)
class TransferResult:
    """Results of all transfer attacks on a parameter set."""

    evidence: Evidence
    """evidence whose worst case is over all attacks of all attackers"""
    broken: Mapping[tuple[Attacker, str], Mask]
    """for each attacker and attack, the mask (n) of the broken examples"""


def set_subject(request: RotateRequest, name: str, sha: str, model: Classifier) -> Subject:
    """Return a parameter set as a model that can be assessed. `sha` is the digest of the set."""
    card = {key: value for key, value in request.subject.card.items() if key != "files"}
    return Subject(model, sha, {**card, "name": name, "digest": sha})


@dataclass
class SetMeasurements:
    """Assesses parameter sets of a pool, and caches the evidence."""

    pool: Pool
    transfer_examples: TransferExamples
    progress: Progress = silent
    again: str = ""
    """command that resumes a stopped run"""
    _known: dict[tuple[str, str, int], Evidence] = field(default_factory=dict)

    def white(self, of: Subject, n: int, *, first: int) -> Evidence:
        """Return the evidence of a parameter set under white-box attacks, for the first `n` held-out examples.

        `first` is the size of the first range; see `judged_ranges`.
        """
        return self._cached(of, "white-box", WHITE, n, first)

    def clean(self, of: Subject, n: int, *, first: int) -> Evidence:
        """Return the evidence of a parameter set on clean inputs, for the first `n` held-out examples."""
        return self._cached(of, "clean", (), n, first)

    def transferred(
        self, subject: Subject, attackers: Sequence[Attacker], n: int, *, first: int
    ) -> TransferResult:
        """Test a parameter set with the transfer examples of each attacker for the first `n` held-out examples, and
        return the results.
        """
        kinds = "-".join(sorted({attacker.kind.lower() for attacker in attackers}))
        evidence, broken = [], []
        for start, stop in judged_ranges(n, first):
            members = [
                member
                for attacker in attackers
                for member in self.transfer_examples.members(attacker, start, stop)
            ]
            evidence_of_range, path = self._piece(subject, kinds, members, start, stop)
            evidence.append(evidence_of_range)
            broken.append(_broken_in(path, members))
        keys = [
            (attacker, attack)
            for attacker in attackers
            for attack in self.transfer_examples.transfer_attacker.attacks
        ]
        by_key = {key: torch.cat([piece[place] for piece in broken]) for place, key in enumerate(keys)}
        return TransferResult(joined_evidence(evidence), by_key)

    def _cached(self, subject: Subject, kind: str, members: Sequence[Member], n: int, first: int) -> Evidence:
        key = (subject.digest, kind, n)
        if key not in self._known:
            pieces = [self._piece(subject, kind, members, *piece)[0] for piece in judged_ranges(n, first)]
            self._known[key] = joined_evidence(pieces)
        return self._known[key]

    def _piece(
        self, subject: Subject, kind: str, members: Sequence[Member], start: int, stop: int
    ) -> tuple[Evidence, Path]:
        request = self.transfer_examples.request
        threat = replace(request.threat, access="gradients", queries=None, surrogates=())
        plan = Plan(
            tuple(members), threat, request.seed, full=kind not in ("white-box", "clean"), shown=False
        )
        stages = plan.outline(request.model.classes or 0).steps
        tag = digest(canonical([self._base, strict(stages)]))[:_TAG]
        of_set = self.pool.path / FOLDER / str(subject.card["name"])
        run = of_set / f"{kind}-{start}-{stop}-{tag}"
        for folder in (of_set.parent, of_set):
            make_private(folder)
        order = AssessRequest(plan, device=request.device)
        result = assess(
            subject,
            self._rows(start, stop),
            order,
            run=run,
            resume=True,
            progress=self.progress,
            again=self.again,
        )
        return result.evidence, run

    def _rows(self, start: int, stop: int) -> Arrays:
        """Held-out examples `start` to `stop`, with their row numbers in the training data as ids."""
        examples, rows = self.transfer_examples.request.examples, slice(start, stop)
        x, y, ids = (
            value[rows].cpu().numpy()
            for value in (examples.held_out.x, examples.held_out.y, examples.held_out.ids)
        )
        return Arrays(f"held-out examples {start + 1} to {stop} of {examples.name}", x, y, ids)

    @cached_property
    def _base(self) -> str:
        """Digest of the code and of the settings of the pool; runs with another digest are not reused."""
        return digest(canonical(strict([code_digest(), self.transfer_examples.request.about()])))


def judged_ranges(n: int, first: int) -> list[tuple[int, int]]:
    """Return the ranges (start, stop) into which `n` examples are divided for the judging of a parameter set. The first
    range has `first` examples.

    Each later range has as many examples as all ranges before it.
    """
    stops = [0, min(first, n)]
    while stops[-1] < n:
        stops.append(min(2 * stops[-1], n))
    return list(pairwise(stops))


def _broken_in(path: Path, members: Sequence[Member]) -> list[Mask]:
    """For each attack, which examples it broke, read from its stage of the run."""
    chain, masks = read_chain(path, repair=False), []
    for place, member in enumerate(members, 1):
        stage = read_stage(path, chain, f"{place}-{slug(member.name)}")
        assert stage is not None
        masks.append(stage.columns["success"])
    return masks


def joined_evidence(pieces: Sequence[Evidence]) -> Evidence:
    """Join the evidence of several runs on consecutive examples. The model and the attacks of all runs must be the
    same.
    """
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0].columns}
    doubts: dict[str, Doubt] = {}
    for doubt in (doubt for piece in pieces for doubt in piece.doubts):
        if doubt.name not in doubts or doubt.state == "raised":
            doubts[doubt.name] = doubt
    return replace(pieces[0], columns=columns, doubts=tuple(doubts.values()))
