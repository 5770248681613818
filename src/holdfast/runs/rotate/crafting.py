"""Whom candidates are judged against, and what each of these thieves made of the held-out inputs, made once.

A0 holds nothing of the pool, and trained the surrogates himself; A1 holds one exposed set; A2 as many as A0 has
surrogates, those exposed last; A3 has the procedure, and drew siblings of the candidate. The attacks and the inputs are
others than those by which sets are immunised.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.lookup import Lookup
from holdfast.core.model import Classifier, Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs
from holdfast.harness import Member
from holdfast.harness.plan import settings
from holdfast.reports.numbers import strict
from holdfast.rotation.thieves import Thief
from holdfast.runs.identity import code_digest
from holdfast.runs.order import Notify, ignore
from holdfast.runs.rotate.collecting import surrogates
from holdfast.runs.rotate.terms import Terms
from holdfast.store.pool import Pool

Kind = Literal["A0", "A1", "A2", "A3"]
SIBLINGS = 4
"""Sets that a thief of the procedure draws."""


@dataclass(frozen=True)
class Attacker:
    """A thief and what he holds."""

    kind: Kind
    sources: tuple[str, ...]
    """names of sets of the pool; of A0, how many surrogates: `own 4`"""

    @property
    def name(self) -> str:
        """What columns and reports call him."""
        held = self.sources[0] if len(self.sources) == 1 else f"{len(self.sources)} sets"
        return f"{self.kind} {held}"


@dataclass(frozen=True)
class Prepared:
    """Examples that were made before, and are given by id; the model is never asked."""

    attacker: str
    sources: str
    """what they were made on"""
    attack: Attack
    """what made them"""
    given: Callable[[Batch], Inputs]

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return self.given(batch)


@dataclass
class Workshop:
    """What every attacker has made so far, sealed in the pool: what leaked once is attacked once.

    Of more inputs only the new ones are attacked.
    """

    pool: Pool
    terms: Terms
    thief: Thief = field(default_factory=Thief)
    notify: Notify = ignore
    _made: dict[tuple[Attacker, int, int], dict[str, Inputs]] = field(default_factory=dict)
    """by attacker and the rows of the held-out inputs, of each attack"""
    _own: list[Classifier] = field(default_factory=list)

    @property
    def own(self) -> list[Classifier]:
        """The surrogates of a thief of nothing."""
        self._own = self._own or surrogates(self.pool, self.terms)
        return self._own

    def nothing(self, size: int | None = None) -> Attacker:
        """The thief of nothing, with so many surrogates, or all."""
        return Attacker("A0", (f"own {len(self.own) if size is None else min(size, len(self.own))}",))

    def members(self, attacker: Attacker, start: int, stop: int) -> list[Member]:
        """One for each attack, with its examples of the held-out inputs from `start` to `stop`.

        All of them are made when the first is asked for: a run that is told again makes none.
        """
        sources = " ".join(attacker.sources)
        return [
            Member(
                f"{attacker.name} {name}",
                Prepared(attacker.name, sources, attack, self._given(attacker, name, start, stop)),
            )
            for name, attack in self.thief.attacks.items()
        ]

    def _given(self, attacker: Attacker, name: str, start: int, stop: int) -> Callable[[Batch], Inputs]:
        lookup = Lookup(self.terms.examples.held.ids[start:stop].cpu())

        def made_before(batch: Batch) -> Inputs:
            made = self._of(attacker, start, stop)[name]
            return made[lookup.rows(batch.ids.cpu())].to(batch.x)

        return made_before

    def _of(self, attacker: Attacker, start: int, stop: int) -> dict[str, Inputs]:
        """What the attacker makes of some inputs, made once."""
        key = (attacker, start, stop)
        if key not in self._made:
            some = self.terms.held.take(torch.arange(start, stop))
            constraint, bounds = self.terms.threat.constraint, self.terms.model.bounds
            self._made[key] = {
                name: constraint.project(some.x + change.to(some.x), some.x, bounds).cpu()
                for name, change in self._changes(attacker, some, start).items()
            }
        return self._made[key]

    def _changes(self, attacker: Attacker, some: Batch, start: int) -> dict[str, Tensor]:
        """What the attacker adds to each input, rounded to two bytes: as it is sealed in the pool, or made now."""
        about = digest(canonical(strict([code_digest(), len(some), self._asked, self.terms.about()])))
        place = digest(canonical([attacker.kind, *attacker.sources, start]))[:16]
        kept = self.pool.kept(f"made_{place}")
        if kept is not None and kept.about["of"] == about:
            return kept.columns
        self.notify(f"{attacker.name}: examples of {len(some):,} inputs by {', '.join(self.thief.attacks)}")
        rng = Draws(self.terms.seed).at("thief", attacker.kind, *attacker.sources)
        made = self.thief.crafted(self._models(attacker), some, self.terms.threat, rng=rng)
        changes = {name: (x - some.x).half().cpu() for name, x in made.items()}
        if attacker.kind != "A3":  # siblings are others each time
            self.pool.keep(f"made_{place}", changes, {"of": about})
        return changes

    @property
    def _asked(self) -> dict[str, Any]:
        return {name: settings(attack) for name, attack in self.thief.attacks.items()}

    def _models(self, attacker: Attacker) -> Sequence[Classifier]:
        if attacker.kind == "A0":
            return self.own[: int(attacker.sources[0].removeprefix("own "))]
        return [self.terms.of_set(self.pool, name) for name in attacker.sources]


@dataclass(frozen=True)
class Attackers:
    """Everyone that a candidate is judged against."""

    nothing: Attacker
    one: tuple[Attacker, ...]
    """of one exposed set each"""
    several: Attacker | None
    """None where fewer than two sets are exposed"""
    evenly: Attacker | None
    """the thief of nothing with as many surrogates as `several` has sets"""
    siblings: Attacker | None


def attackers(workshop: Workshop, name: str, exposed: Sequence[str], siblings: Sequence[str]) -> Attackers:
    """Against whom the set `name` must hold, where these are exposed, the one that leaked last at the end."""
    own = len(workshop.own)
    last = tuple(exposed[-own:])
    several = Attacker("A2", last) if len(last) > 1 else None
    return Attackers(
        workshop.nothing(),
        tuple(Attacker("A1", (each,)) for each in exposed),
        several,
        None if several is None else workshop.nothing(len(last)),
        Attacker("A3", tuple(siblings[:SIBLINGS])) if siblings else None,
    )


def exposed_for(pool: Pool, name: str) -> tuple[str, ...]:
    """What an attacker may hold when the set serves: what it was made from, then what leaked, the last at the end."""
    known = {member.name: member for member in pool.ledger.members}
    listed = [one.name for one in pool.ledger.exposed()]
    unlisted = [each for each in known[name].bases if each not in listed]
    return tuple(each for each in (*unlisted, *listed) if each != name and not known[each].deleted)


def siblings_of(pool: Pool, name: str, usable: Callable[[str], bool]) -> tuple[str, ...]:
    """Other sets of the same drawing, such as whoever has the procedure could have drawn, in their order.

    Refused ones are among them, so that it does not matter who is judged first.
    """
    drawing = pool.about(name).get("drawing")
    if drawing is None:
        return ()
    return tuple(
        member.name
        for member in pool.ledger.members
        if member.name != name
        and not member.deleted
        and pool.about(member.name).get("drawing") == drawing
        and usable(member.name)
    )
