"""The attackers A0 to A6 of a rotation, and their success rates."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from holdfast.attacks.parts.losses import expect_eps, expect_norm, margin
from holdfast.attacks.parts.random_search import proposals_for, window_share
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.draws import Draws
from holdfast.core.errors import LostLoss
from holdfast.core.evidence import Evidence
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Fraction, Inputs, Mask, Steps
from holdfast.gates.judging import protection_verdict, with_effects
from holdfast.recipes.training.recipe import trained_as
from holdfast.reports.words import amount
from holdfast.rotation.collecting import last_of, rows_of, with_fresh_weights
from holdfast.rotation.pool import Pool
from holdfast.rotation.steps.alternatives import ATTACKS, Alternatives, TransferAttacker, doubt, share_json
from holdfast.rotation.steps.rotation_request import (
    RotateRequest,
    accuracy,
    bases,
    bases_left,
    generator_of,
    surrogates,
)
from holdfast.rotation.steps.set_measuring import sets_of_same_draw
from holdfast.runs.assess.request import Keep
from holdfast.runs.engine.progress import Progress, Step
from holdfast.statistics.intervals import proportion

_BLOCK = 64  # steps whose windows are sampled together


@dataclass(frozen=True)
class AcrossSwaps:
    """Square Attack on a service that swaps its parameter sets. It keeps the changes of a window that lower the margin
    on the serving set.
    """

    queries: Steps = 600
    """number of queries for each input, to all sets together"""
    every: Steps = 50
    """number of queries after which the serving set is swapped"""
    p_init: Fraction = 0.8
    """fraction of the pixels in the first windows; divided by eight if the search starts from an adversarial example"""

    @torch.no_grad()
    def __call__(
        self,
        sets: Sequence[Classifier],
        batch: Batch,
        threat: ThreatModel,
        *,
        start: Inputs | None = None,
        rng: Draws,
    ) -> Inputs:
        """Return the changed inputs. The sets serve in turn, in such an order that the first one serves at the last
        query.
        """
        norm = expect_norm(expect_eps(threat.constraint, self), self, Linf, L2, L1)
        assert isinstance(norm, (Linf, L2, L1))
        proposals = proposals_for(batch, norm, sets[0].bounds)
        if start is None:
            proposals.start(rng.at("start"))
        else:
            proposals.x = start.clone()
        first = self.p_init if start is None else self.p_init / 8
        shares = [window_share(first, step, self.queries) for step in range(self.queries)]
        last = (self.queries - 1) // self.every
        for step in range(self.queries):
            serving = sets[(last - step // self.every) % len(sets)]
            at = step % _BLOCK
            if at == 0:
                block = shares[step : step + _BLOCK]
                draws = rng.at("block", step // _BLOCK).uniform(batch.ids, _BLOCK, proposals.per_step)
                proposals.plan(draws[:, : len(block)], block)
            if step % self.every == 0:  # the first query to a set measures the candidate
                height = margin(serving(proposals.x.clone(), batch.ids), batch)
                continue
            margins = margin(serving(proposals.propose(at), batch.ids), batch)
            lower = ~(margins >= height)
            proposals.keep(lower)
            height = torch.where(lower, margins, height)
        return proposals.x


ATTACKERS = ("A0", "A1", "A1u", "A2", "A2c", "A3", "A4", "A5", "A6")
_MOST = 8  # largest number of sets of an attacker with several sets, and of sets that are attacked one by one
# For the generated sets of A3: inputs on which a set is tested, the accuracy that it may have less than the bases, sets
# that are generated at a time, and the largest number of times:
_LOOKED, _POINTS, _CHUNK, _CHUNKS = 500, 0.02, 16, 24
_SAME_DRAW_PLACE = "siblings"  # place of random draws: another name would change the numbers of every pool
_FLAT = 0.02  # more generated sets are added until the success rate increases by no more than this
_QUICK = {name: ATTACKS[name] for name in ("MI", "PGD-50")}
Json = dict[str, Any]


@dataclass(frozen=True)
class Means:
    """Resources of the attackers of a rotation: their attacks, and the numbers of queries, sets and epochs that they
    use.
    """

    transfer_attacker: TransferAttacker = field(default_factory=TransferAttacker)
    quick: TransferAttacker = field(default_factory=lambda: TransferAttacker(_QUICK))
    """attacks that are used for comparisons with alternatives, and for attackers with many generated sets"""
    draws: tuple[int, ...] = (4, 16, 64)
    """numbers of generated sets that an attacker with the generator attacks at once; they are tried in turn until the
    success rate no longer grows"""
    query_search: AcrossSwaps = field(default_factory=AcrossSwaps)
    labels: Steps = 6_000
    """number of answers of the service on which A6 trains its surrogate"""
    epochs: Steps = 5
    """number of epochs for which A6 trains its surrogate"""


@dataclass
class AttackerTable:
    """Measures the attackers of a pool one after another. Stored results are not measured again."""

    pool: Pool
    request: RotateRequest
    means: Means = field(default_factory=Means)

    def __call__(
        self,
        evidence: Evidence,
        judged_on: Batch,
        *,
        known: Mapping[str, Any] | None,
        keep: Keep,
        progress: Progress,
    ) -> Mapping[str, Any]:
        """Return the table of attackers as a document. `keep` is called with the unfinished document after each row."""
        if not evidence.threat.constraint.in_input_units or evidence.threat.goal is not None:
            reason = (
                "the table of attackers needs an eps under Linf, L2 or L1 and no target, so none was measured"
            )
            return {"rows": [], "alternatives": [], "doubt": None, "conclusion": reason, "complete": True}
        return _Measuring(self, evidence, judged_on, known or {}, keep, progress).table()


class _Measuring:
    """One call of an `AttackerTable`, which measures all rows of the table of attackers."""

    def __init__(
        self,
        table: AttackerTable,
        evidence: Evidence,
        judged_on: Batch,
        known: Mapping[str, Any],
        keep: Keep,
        progress: Progress,
    ) -> None:
        self.pool, self.request, self.means = table.pool, table.request, table.means
        self.keep, self.progress = keep, progress
        serving = self.pool.serving
        assert serving is not None
        self.name = str(evidence.model.get("set", serving.name))
        self.live = self.request.of_set(self.pool, self.name)
        self.seen = evidence.threat.access
        self.threat = replace(evidence.threat, access="gradients", queries=None, surrogates=())
        self.rng = Draws(evidence.seed).at("attackers")
        n = len(judged_on)
        right, self.broken = evidence["correct"][:n].bool().cpu(), evidence["success"][:n].bool().cpu()
        self.whole = judged_on.take(torch.arange(n)).to(torch.device(self.request.device))
        self.batch = self.whole.take(right)
        self.broken = self.broken[right]
        self.known = {member.name: member for member in self.pool.ledger.members}
        self.document: Json = {"set": self.name, "n": n, "n_correct": len(self.batch), "rows": []}
        self.document |= {"alternatives": [], "ids": self.batch.ids.tolist(), "exposed": self._exposed}
        self.document["complete"] = False
        if known.get("exposed") == self._exposed:  # otherwise rows of two ledger states would be mixed
            self.document |= {name: known[name] for name in ("rows", "alternatives")}

    # --- rows and verdict

    def table(self) -> Json:
        """Measure all attackers and alternatives to the rotation, and return the results, the doubt and the verdict as
        a JSON document.
        """
        if not len(self.batch):
            return self.document | {
                "conclusion": "the serving set classifies no input correctly, so there is nothing to attack",
                "complete": True,
            }
        parts = dict(zip(ATTACKERS, self._parts(), strict=True))
        alternatives = list(self._alternatives.rows())
        of = len(parts) + len(alternatives)
        for place, (name, measure_part) in enumerate(parts.items(), 1):
            self._row("rows", "attacker", name, measure_part, place, of)
        for place, (name, measure) in enumerate(alternatives, len(parts) + 1):
            self._row("alternatives", "alternative", name, measure, place, of)
        by_name = {
            row["alternative"]: row for row in self.document["alternatives"] if row.get("clean_accuracy")
        }
        white_box = (by_name.get("static") or {}).get("white_box")
        rows = with_effects(self.document["rows"], white_box)
        share_of_a1 = next(row["share"] for row in rows if row["attacker"] == "A1")
        measured = {name: by_name.get(name) for name, _ in alternatives}
        return self.document | {
            "rows": rows,
            "doubt": doubt(measured, self.request, share_of_a1),
            "conclusion": protection_verdict(rows, white_box),
            "notes": self._notes(),
            "complete": True,
        }

    def _row(
        self, table: str, key: str, name: str, measure: Callable[[], Json | None], place: int, of: int
    ) -> None:
        """Measure a row of a table, unless it is stored; `key` is the key of its name."""
        if any(row[key] == name for row in self.document[table]):
            return
        self.progress(Step(name, place, of, 0, len(self.batch), 0, 0))
        begin = time.perf_counter()
        measured = measure() or {"message": "the pool contains no run with several sets"}
        row = {key: name, **measured, "seconds": round(time.perf_counter() - begin, 1)}
        self.document = self.document | {table: [*self.document[table], row]}
        self.keep(self.document)

    def _parts(self) -> Iterator[Callable[[], Json]]:
        yield self._nothing
        yield self._listed
        yield self._unlisted
        yield self._several
        yield self._collection
        yield self._generator
        yield self._query_search
        yield self._white_box
        yield self._extracted

    def _notes(self) -> list[str]:
        if self.request.threat.constraint == self.threat.constraint:
            return []
        return [f"the pool was collected for another threat model, {self.request.threat_text}"]

    @cached_property
    def _alternatives(self) -> Alternatives:
        place, quick = self.rng.at("instead"), self.means.quick
        return Alternatives(self.pool, self.request, self.live, self.whole, self.threat, place, quick)

    # --- the attackers

    def _nothing(self) -> Json:
        models = surrogates(self.pool, self.request)
        data = self.pool.manifest["about"]["data"]
        has = f"{len(models)} surrogates, trained by {self.request.candidate.name} on {data['name']}"
        return self._row_of(has, self._stolen("A0", models))

    def _listed(self) -> Json:
        names, stand_in = self._stolen_or_base
        if not names:
            return _unmeasured("no set is listed as stolen, and the bases are deleted")
        has = f"one of {amount(len(names), 'stolen sets')}, the one with the highest success rate"
        if stand_in:
            has = f"{names[0]}, a base, because no set is listed as stolen"
        return self._row_of(has, self._stolen_one_by_one("A1", names))

    def _unlisted(self) -> Json:
        names = self._unlisted_names
        if not names:
            return _unmeasured("every base and every set that served is listed as stolen, or deleted")
        return self._row_of(
            f"one of {amount(len(names), 'sets')} that the ledger does not list",
            self._stolen_one_by_one("A1u", names),
        )

    def _several(self) -> Json:
        names = self._exposed[-_MOST:]
        if len(names) < 2:
            return _unmeasured(f"{amount(len(names), 'sets')} listed as stolen; at least two are needed")
        return self._row_of(f"{len(names)} stolen sets", self._stolen("A2", self._sets(names)))

    def _collection(self) -> Json:
        names = bases_left(self.pool)[:_MOST]
        if len(names) < 2:
            return _unmeasured(f"{amount(len(names), 'bases')} left; at least two are needed")
        return self._row_of(f"the collection: {len(names)} bases", self._stolen("A2c", self._sets(names)))

    def _generator(self) -> Json:
        broken: dict[str, Mask] = {}
        sources: list[str] = []
        generator = generator_of(self.pool, self.request)
        if generator is not None:
            drawn, best_before = self._drawn, -1.0
            for k in self.means.draws:
                attacker = self.means.transfer_attacker if k == self.means.draws[0] else self.means.quick
                by_attack_of_eot = self._stolen(f"A3 {k}", drawn[:k], attacker)
                eot = f"EOT over {min(k, len(drawn))} generated sets"
                broken |= {f"{eot}, {name}": mask for name, mask in by_attack_of_eot.items()}
                best = max(float(mask.float().mean()) for mask in by_attack_of_eot.values())
                if best <= best_before + _FLAT or len(drawn) <= k:
                    break
                best_before = best
            mean_model = [self.request.of_weights(generator.mean())]
            broken |= {
                f"the mean set, {name}": mask for name, mask in self._stolen("mean", mean_model).items()
            }
            sources.append("the generator")
        same_draw = sets_of_same_draw(self.pool, self.name, lambda name: True)[:_MOST]
        if same_draw:
            by_attack = self._stolen(_SAME_DRAW_PLACE, self._sets(same_draw))
            sources.append(f"{amount(len(same_draw), 'sets')} of the same draw")
            broken |= {f"{sources[-1]}, {name}": mask for name, mask in by_attack.items()}
        if not broken:
            return _unmeasured("no generator, no set of the same draw, and the procedure was not repeated")
        message = "" if same_draw else "no set of the same draw is left, and the procedure was not repeated"
        return self._row_of(" and ".join(sources), broken, message)

    def _query_search(self) -> Json:
        search = self.means.query_search
        other_names = [name for name in self.pool.ahead if name != self.name][: _MOST - 1]
        sets = [self.live, *self._sets(other_names)]
        broken = {"search": self._search(sets, None)}
        if self._stolen_or_base[0]:
            name, x = self._example
            broken[f"search from {name} on a stolen set"] = self._search(sets, x)
        has = f"{search.queries} queries per input, {amount(len(sets), 'sets')} swapped every {search.every} queries"
        message = "" if other_names else "no other set is admitted, so there was no swap"
        return self._row_of(has, broken, message)

    def _search(self, sets: Sequence[Classifier], start: Inputs | None) -> Mask:
        place = self.rng.at("A4", "anew" if start is None else "from")
        return self._broken(self.means.query_search(sets, self.batch, self.threat, start=start, rng=place))

    def _white_box(self) -> Json:
        """The results of the suite; if it had no gradients, also those of transfer attacks from the set itself."""
        broken = {"the suite": self.broken}
        if self.seen != "gradients":
            broken |= self._stolen("A5", [self.live])
        return self._row_of(f"the serving set, {self.name}", broken)

    def _extracted(self) -> Json:
        """Train a surrogate on the answers of several sets, and attack it."""
        served = [term.name for term in reversed(self.pool.ledger.terms)]
        names = [
            name
            for name in dict.fromkeys([self.name, *served, *self.pool.ahead])
            if not self.known[name].deleted
        ][:_MOST]
        place = self.rng.at("A6")
        queried = rows_of(self.request.train, self.means.labels, place.at("inputs"))
        labels, sets = queried.y.clone(), self._sets(names)
        for k, model in enumerate(sets):
            rows = torch.arange(k, len(queried), len(sets), device=queried.x.device)
            labels[rows] = torch.cat([_classes(model, part.x) for part in queried.take(rows).split(1_000)])
        recipe = trained_as(
            self.request.candidate.recipe, replace(self.request.training, epochs=self.means.epochs)
        )
        initial = with_fresh_weights(self.request.model, place.at("begin"), self.request.begins)
        try:
            surrogate = last_of(
                recipe, initial, queried.labelled(labels), self.request.threat, place.at("training")
            )
        except LostLoss as error:
            return _unmeasured(f"the surrogate could not be distilled: {error.message}")
        agrees = float(
            (_classes(surrogate, self.whole.x) == _classes(self.live, self.whole.x)).float().mean()
        )
        has = (
            f"a surrogate distilled from {len(queried):,} answers of {amount(len(sets), 'sets')} in "
            f"{self.means.epochs} epochs"
        )
        message = f"the surrogate agrees with the serving set on {100 * agrees:.1f} % of the inputs"
        return self._row_of(has, self._stolen("A6", [surrogate]), message)

    # --- models of the attackers

    @cached_property
    def _exposed(self) -> list[str]:
        return [
            exposure.name for exposure in self.pool.ledger.exposed() if not self.known[exposure.name].deleted
        ]

    @cached_property
    def _stolen_or_base(self) -> tuple[list[str], bool]:
        """The sets of which A1 has one, the most recently stolen ones; and whether a base is used instead."""
        if self._exposed:
            return self._exposed[-_MOST:], False
        return list(bases_left(self.pool)[:1]), True

    @cached_property
    def _unlisted_names(self) -> list[str]:
        """Bases, and sets that served before, that the ledger does not list as stolen."""
        served = [term.name for term in self.pool.ledger.terms]
        names = [*self.known[self.name].bases, *bases(self.pool), *reversed(served)]
        members = [self.known[name] for name in dict.fromkeys(names) if name != self.name]
        return [member.name for member in members if member.exposed is None and not member.deleted][:_MOST]

    @cached_property
    def _drawn(self) -> list[Classifier]:
        """Generated sets with sufficient accuracy, as an attacker would select them; if too few, the best ones."""
        generator, rng = generator_of(self.pool, self.request), self.rng.at("drawn")
        assert generator is not None
        tested = rows_of(self.request.train, _LOOKED, rng.at("looked at"))
        n_wanted, base_names = max(self.means.draws), bases_left(self.pool)
        base_accuracies = [accuracy(model, tested) for model in self._sets(base_names[:_MOST])]
        least_accuracy = sum(base_accuracies) / len(base_accuracies) - _POINTS if base_accuracies else 0.0
        models_found: list[tuple[float, Classifier]] = []
        for chunk in range(_CHUNKS):
            drawn = generator.drawn(_CHUNK, rng.at(chunk))
            models = [self.request.of_weights(drawn.one(k)) for k in range(len(drawn))]
            models_found += [(accuracy(model, tested), model) for model in models]
            if sum(share >= least_accuracy for share, _ in models_found) >= n_wanted:
                break
        sufficient = [model for share, model in models_found if share >= least_accuracy]
        most_accurate = sorted(models_found, key=lambda scored: -scored[0])[: self.means.draws[0]]
        return (
            sufficient[:n_wanted]
            if len(sufficient) >= self.means.draws[0]
            else [model for _, model in most_accurate]
        )

    def _sets(self, names: Sequence[str]) -> list[Classifier]:
        return [self.live if name == self.name else self.request.of_set(self.pool, name) for name in names]

    # --- examples and success rates

    @cached_property
    def _example(self) -> tuple[str, Inputs]:
        """The attack with the highest success rate on the most recently stolen set of A1, and its examples."""
        stolen = self._sets(self._stolen_or_base[0][-1:])
        examples = self.means.quick.crafted(stolen, self.batch, self.threat, rng=self.rng.at("A4 prior"))
        return max(examples.items(), key=lambda named_examples: int(self._broken(named_examples[1]).sum()))

    def _stolen(
        self, place: str, sources: Sequence[Classifier], attacker: TransferAttacker | None = None
    ) -> dict[str, Mask]:
        """For each attack on the models in `sources`, which inputs are adversarial for the serving set."""
        attacker = attacker or self.means.transfer_attacker
        examples = attacker.crafted(sources, self.batch, self.threat, rng=self.rng.at(place))
        return {name: self._broken(x) for name, x in examples.items()}

    def _stolen_one_by_one(self, place: str, names: Sequence[str]) -> dict[str, Mask]:
        """For each attack on each single set, which inputs are adversarial for the serving set."""
        broken: dict[str, Mask] = {}
        for name in names:
            by_attack = self._stolen(f"{place} {name}", self._sets([name]))
            broken |= {f"{attack} on {name}": mask for attack, mask in by_attack.items()}
        return broken

    def _broken(self, x: Inputs) -> Mask:
        attacked = self.batch.at(x)
        wrong = [_classes(self.live, part.x) != part.y for part in attacked.split(1_000)]
        return torch.cat(wrong).cpu()

    def _row_of(self, has: str, broken: Mapping[str, Mask], message: str = "") -> Json:
        """A row of the table, with the attack of the highest success rate and its adversarial examples."""
        attack, mask = max(broken.items(), key=lambda item: int(item[1].sum()))
        return {
            "has": has,
            "share": share_json(proportion(mask)),
            "attack": attack,
            "message": message,
            "broken_ids": self.batch.ids.cpu()[mask].tolist(),
        }


def _unmeasured(reason: str) -> Json:
    return {"has": "–", "share": None, "attack": "", "message": reason, "broken_ids": []}


@torch.no_grad()
def _classes(model: Classifier, x: Inputs) -> torch.Tensor:
    classes: torch.Tensor = model(x).argmax(1)
    return classes
