"""Measuring sets of a pool by ordinary assessments, in pieces of the held-out examples that are joined afterwards.

Every piece is a run folder under `admission/NAME/`, so that a kill loses no more than a shard, a set that others are
compared with is measured once, and each gate can be followed to the examples that it was judged on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch

from holdfast.attacks import APGD, PGD
from holdfast.core.chain import canonical, digest
from holdfast.core.evidence import Doubt, Evidence
from holdfast.core.model import Classifier
from holdfast.core.names import slug
from holdfast.core.types import Mask
from holdfast.harness import Member, Plan
from holdfast.reports.numbers import strict
from holdfast.runs.assess import assess
from holdfast.runs.identity import code_digest
from holdfast.runs.order import Order, Progress, Subject, silent
from holdfast.runs.rotate.crafting import Attacker, Workshop
from holdfast.runs.rotate.terms import Terms
from holdfast.sources.arrays import Arrays
from holdfast.store.files import private
from holdfast.store.folder import read_stage
from holdfast.store.pool import Pool
from holdfast.store.records import read_chain

FOLDER = "admission"
WHITE = (Member("PGD-20", PGD(steps=20)), Member("APGD", APGD()))
"""What says how robust a set is."""
_TAG = 8  # hex digits that tell a run from one of other attackers, of other code, of other terms


@dataclass(frozen=True)
class Carried:
    """What the examples of thieves did to a set."""

    evidence: Evidence
    """its worst case is that over all of them"""
    fell: Mapping[tuple[Attacker, str], Mask]
    """by thief and attack, which examples (n) were turned"""


def subject_of(terms: Terms, name: str, sha: str, model: Classifier) -> Subject:
    """A set as a run takes it."""
    card = {key: value for key, value in terms.subject.card.items() if key != "files"}
    return Subject(model, sha, {**card, "name": name, "digest": sha})


@dataclass
class Measuring:
    """Measures sets, and remembers what it has measured."""

    pool: Pool
    workshop: Workshop
    progress: Progress = silent
    again: str = ""
    """how to go on with what is stopped"""
    _known: dict[tuple[str, str, int], Evidence] = field(default_factory=dict)

    def white(self, of: Subject, n: int, *, first: int) -> Evidence:
        """How the first `n` held-out examples fare under attacks that see the set."""
        return self._remembered(of, "white-box", WHITE, n, first)

    def clean(self, of: Subject, n: int, *, first: int) -> Evidence:
        """What the set says of the first `n` as they are."""
        return self._remembered(of, "clean", (), n, first)

    def carried(self, of: Subject, thieves: Sequence[Attacker], n: int, *, first: int) -> Carried:
        """What examples of each thief do to it."""
        what = "-".join(sorted({thief.kind.lower() for thief in thieves}))
        evidence, fell = [], []
        for start, stop in ends(n, first):
            members = [member for thief in thieves for member in self.workshop.members(thief, start, stop)]
            found, path = self._piece(of, what, members, start, stop)
            evidence.append(found)
            fell.append(_fell(path, members))
        keys = [(thief, attack) for thief in thieves for attack in self.workshop.thief.attacks]
        by_key = {key: torch.cat([piece[place] for piece in fell]) for place, key in enumerate(keys)}
        return Carried(joined(evidence), by_key)

    def _remembered(self, of: Subject, what: str, members: Sequence[Member], n: int, first: int) -> Evidence:
        key = (of.digest, what, n)
        if key not in self._known:
            pieces = [self._piece(of, what, members, *piece)[0] for piece in ends(n, first)]
            self._known[key] = joined(pieces)
        return self._known[key]

    def _piece(
        self, of: Subject, what: str, members: Sequence[Member], start: int, stop: int
    ) -> tuple[Evidence, Path]:
        terms = self.workshop.terms
        threat = replace(terms.threat, access="gradients", queries=None, surrogates=())
        plan = Plan(tuple(members), threat, terms.seed, full=what not in ("white-box", "clean"), shown=False)
        asked = plan.outline(terms.model.classes or 0).steps
        tag = digest(canonical([self._base, strict(asked)]))[:_TAG]
        run = self.pool.path / FOLDER / str(of.card["name"]) / f"{what}-{start}-{stop}-{tag}"
        order = Order(plan, device=terms.device)
        with private():
            result = assess(
                of,
                self._rows(start, stop),
                order,
                run=run,
                resume=True,
                progress=self.progress,
                again=self.again,
            )
        return result.evidence, run

    def _rows(self, start: int, stop: int) -> Arrays:
        """Held-out examples, by the rows that they are in the training data."""
        examples, rows = self.workshop.terms.examples, slice(start, stop)
        x, y, ids = (
            value[rows].cpu().numpy() for value in (examples.held.x, examples.held.y, examples.held.ids)
        )
        return Arrays(f"held-out examples {start + 1} to {stop} of {examples.name}", x, y, ids)

    @cached_property
    def _base(self) -> str:
        """What all runs have in common: by other code, or of other examples, they are others."""
        return digest(canonical(strict([code_digest(), self.workshop.terms.about()])))


def ends(n: int, first: int) -> list[tuple[int, int]]:
    """Pieces of `n` examples: the first, and each later one as large as all before it."""
    found = [0, min(first, n)]
    while found[-1] < n:
        found.append(min(2 * found[-1], n))
    return list(pairwise(found))


def _fell(path: Path, members: Sequence[Member]) -> list[Mask]:
    """Of each attack, which examples it turned, as its stage of the run has it."""
    chain, found = read_chain(path, mend=False), []
    for place, member in enumerate(members, 1):
        stage = read_stage(path, chain, f"{place}-{slug(member.name)}")
        assert stage is not None
        found.append(stage.columns["success"])
    return found


def joined(pieces: Sequence[Evidence]) -> Evidence:
    """One evidence of several, of the same model under the same attacks, on examples one after another."""
    columns = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0].columns}
    doubts: dict[str, Doubt] = {}
    for doubt in (doubt for piece in pieces for doubt in piece.doubts):
        if doubt.name not in doubts or doubt.state == "raised":
            doubts[doubt.name] = doubt
    return replace(pieces[0], columns=columns, doubts=tuple(doubts.values()))
