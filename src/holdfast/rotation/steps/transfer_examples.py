"""Computes the transfer examples of the attackers against which the candidates of a pool are judged, on held-out
inputs.

A0 has no set of the pool and trains surrogates. A1 has one stolen set. A2 has as many of the most recently stolen sets
as A0 has surrogates. A3 can run the procedure and has sets generated in the same draw as the candidate. Attacks and
inputs are not those with which sets are immunised. All examples are computed only once.
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
from holdfast.reports.numbers import strict
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps.contents import surrogates
from holdfast.rotation.steps.rotation_request import RotateRequest
from holdfast.rotation.transfer_attacks import TransferAttacker
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.engine.progress import Notify, ignore
from holdfast.runs.harness import Member
from holdfast.runs.harness.plan import settings

Kind = Literal["A0", "A1", "A2", "A3"]
SAME_DRAW_SETS = 4
"""Number of sets of an attacker that has sets generated in the same draw."""


@dataclass(frozen=True)
class Attacker:
    """An attacker of a rotation, with the parameter sets or surrogates on which it computes transfer examples."""

    kind: Kind
    sources: tuple[str, ...]
    """names of sets of the pool; for A0 a text with the number of surrogates, such as `own 4`"""

    @property
    def name(self) -> str:
        """Name of the attacker in columns and reports, with the sets that it has."""
        source = self.sources[0] if len(self.sources) == 1 else f"{len(self.sources)} sets"
        return f"{self.kind} {source}"


@dataclass(frozen=True)
class Prepared:
    """An attack that returns transfer examples that were computed before. It finds them by the ids of the inputs and
    does not query the model.
    """

    attacker: str
    sources: str
    """the models on which the examples were computed"""
    attack: Attack
    """the attack that computed the examples"""
    given: Callable[[Batch], Inputs]

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return self.given(batch)


@dataclass
class TransferExamples:
    """Computes the transfer examples of attackers, and stores them encrypted in the pool, so that each is computed only
    once.

    If the number of inputs grows, only the new inputs are attacked.
    """

    pool: Pool
    request: RotateRequest
    transfer_attacker: TransferAttacker = field(default_factory=TransferAttacker)
    notify: Notify = ignore
    _cache: dict[tuple[Attacker, int, int], dict[str, Inputs]] = field(default_factory=dict)
    """examples by attacker and range of the held-out inputs, for each attack"""
    _own: list[Classifier] = field(default_factory=list)

    @property
    def own(self) -> list[Classifier]:
        """Surrogate models of the surrogate-only attacker."""
        self._own = self._own or surrogates(self.pool, self.request)
        return self._own

    def surrogate_only(self, size: int | None = None) -> Attacker:
        """Return the surrogate-only attacker with `size` surrogates, or with all surrogates if `size` is None."""
        return Attacker("A0", (f"own {len(self.own) if size is None else min(size, len(self.own))}",))

    def members(self, attacker: Attacker, start: int, stop: int) -> list[Member]:
        """Return the attacks of an attacker as members of a suite, with transfer examples for the held-out inputs from
        `start` to `stop` - 1.

        The examples of all attacks are computed when they are first used; for a run whose results are stored, none is
        computed.
        """
        sources = " ".join(attacker.sources)
        return [
            Member(
                f"{attacker.name} {name}",
                Prepared(attacker.name, sources, attack, self._given(attacker, name, start, stop)),
            )
            for name, attack in self.transfer_attacker.attacks.items()
        ]

    def _given(self, attacker: Attacker, name: str, start: int, stop: int) -> Callable[[Batch], Inputs]:
        lookup = Lookup(self.request.examples.held_out.ids[start:stop].cpu())

        def stored(batch: Batch) -> Inputs:
            examples = self._of(attacker, start, stop)[name]
            return examples[lookup.rows(batch.ids.cpu())].to(batch.x)

        return stored

    def _of(self, attacker: Attacker, start: int, stop: int) -> dict[str, Inputs]:
        """The examples of an attacker for some inputs, by attack, cached."""
        key = (attacker, start, stop)
        if key not in self._cache:
            some = self.request.held_out.take(torch.arange(start, stop))
            constraint, bounds = self.request.threat.constraint, self.request.model.bounds
            self._cache[key] = {
                name: constraint.project(some.x + change.to(some.x), some.x, bounds).cpu()
                for name, change in self._changes(attacker, some, start).items()
            }
        return self._cache[key]

    def _changes(self, attacker: Attacker, some: Batch, start: int) -> dict[str, Tensor]:
        """The perturbations of an attacker in half precision, from the pool if they are stored there."""
        about = digest(
            canonical(strict([code_digest(), len(some), self._attack_settings, self.request.about()]))
        )
        place = digest(canonical([attacker.kind, *attacker.sources, start]))[:16]
        stored = self.pool.kept(f"made_{place}")
        if stored is not None and stored.about["of"] == about:
            return stored.columns
        self.notify(
            f"{attacker.name}: examples of {len(some):,} inputs by {', '.join(self.transfer_attacker.attacks)}"
        )
        rng = Draws(self.request.seed).at("thief", attacker.kind, *attacker.sources)
        examples = self.transfer_attacker.crafted(self._models(attacker), some, self.request.threat, rng=rng)
        changes = {name: (x - some.x).half().cpu() for name, x in examples.items()}
        if attacker.kind != "A3":  # these sets differ for each candidate
            self.pool.keep(f"made_{place}", changes, {"of": about})
        return changes

    @property
    def _attack_settings(self) -> dict[str, Any]:
        return {name: settings(attack) for name, attack in self.transfer_attacker.attacks.items()}

    def _models(self, attacker: Attacker) -> Sequence[Classifier]:
        if attacker.kind == "A0":
            return self.own[: int(attacker.sources[0].removeprefix("own "))]
        return [self.request.of_set(self.pool, name) for name in attacker.sources]


@dataclass(frozen=True)
class Attackers:
    """All attackers against which a candidate of a pool is judged."""

    nothing: Attacker
    one: tuple[Attacker, ...]
    """attackers with one stolen set each"""
    several: Attacker | None
    """attacker with several stolen sets; None if fewer than two sets are stolen"""
    evenly: Attacker | None
    """surrogate-only attacker with as many surrogates as the attacker `several` has sets"""
    same_draw: Attacker | None
    """attacker with other sets of the same draw; None if there are none"""


def attackers_against(
    transfer_examples: TransferExamples, name: str, exposed: Sequence[str], same_draw: Sequence[str]
) -> Attackers:
    """Return the attackers against which the parameter set `name` is judged. `exposed` are the stolen sets, and the
    most recently stolen one is last.
    """
    own_models = len(transfer_examples.own)
    last = tuple(exposed[-own_models:])
    several = Attacker("A2", last) if len(last) > 1 else None
    return Attackers(
        transfer_examples.surrogate_only(),
        tuple(Attacker("A1", (name_of_set,)) for name_of_set in exposed),
        several,
        None if several is None else transfer_examples.surrogate_only(len(last)),
        Attacker("A3", tuple(same_draw[:SAME_DRAW_SETS])) if same_draw else None,
    )


def exposed_for(pool: Pool, name: str) -> tuple[str, ...]:
    """Return the names of the sets that an attacker is assumed to have when the parameter set `name` serves.

    These are its bases and the stolen sets; the most recently stolen set is last.
    """
    members = {member.name: member for member in pool.ledger.members}
    listed = [exposure.name for exposure in pool.ledger.exposed()]
    unlisted = [candidate_name for candidate_name in members[name].bases if candidate_name not in listed]
    return tuple(
        candidate_name
        for candidate_name in (*unlisted, *listed)
        if candidate_name != name and not members[candidate_name].deleted
    )


def sets_of_same_draw(pool: Pool, name: str, usable: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the names of the other parameter sets generated in the same draw, in their order. An attacker with the
    generator could generate such sets as well.

    Refused sets are included, so that the result does not depend on the order in which sets are judged. Only sets for
    which `usable` returns true are included.
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
