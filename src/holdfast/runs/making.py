"""One assessment in one process: manifest, stages, doubts, evidence and verdict."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from holdfast.attacks.protocol import Learned
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import UsageError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.purpose import purpose
from holdfast.doubts.answering import arms, called
from holdfast.gates.judging import Doubts, Judgement, judge
from holdfast.harness import FOUND, MATRIX_ROWS, Plan, Target, paired
from holdfast.reports.numbers import strict
from holdfast.runs import probes
from holdfast.runs.assembling import (
    ADAPTIVE,
    DOUBTS,
    ROTATION,
    adversarial,
    counted_passes,
    evidence_of,
    with_attackers,
)
from holdfast.runs.course import Alone, Course, Watch, shards_of
from holdfast.runs.entry import (
    batch_size_for,
    refuse_batch,
    slight,
)
from holdfast.runs.expected_rows import expected_of
from holdfast.runs.identity import code_digest, hardware, versions
from holdfast.runs.keeping import InFolder, InMemory, Keeper
from holdfast.runs.order import Notify, Opening, Order, Progress, Subject, ignore
from holdfast.runs.preparing import model_digest
from holdfast.runs.repeating import repeatable
from holdfast.runs.result import Result, about_of
from holdfast.runs.selection import selected
from holdfast.runs.served import finish
from holdfast.runs.signals import Stopper
from holdfast.runs.team import Team, gathered
from holdfast.runs.worker import Job
from holdfast.runs.written import (
    VERDICT,
    doubt_from_json,
    doubt_to_json,
    judgement_from_json,
    outline_to_json,
    verdict_to_json,
)
from holdfast.sources.served import Served
from holdfast.store.folder import RunFolder, Split

VERB = "assess"
JUDGED_BY_ATTACKERS = 1_000
"""Largest number of examples, from the first on, for the table of attackers."""


@dataclass(frozen=True)
class Making:
    """The inputs of an assessment, and the methods that measure and judge."""

    subject: Subject
    data: Data
    order: Order
    plan: Plan
    target: Target
    device: torch.device
    shape: tuple[int, ...]
    progress: Progress
    opening: Opening
    served: Served | None = None
    """connection to the server of a served model"""
    notify: Notify = ignore

    def manifest(self, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """Content of `run.json`. A resumed run uses the batch size of its first attempt."""
        order, plan, config = self.order, self.plan, self.config()
        small = order.time_budget_s is not None or order.workers is not None
        size = order.batch_size or batch_size_for(math.prod(self.shape), order.device)
        if order.batch_size is None and self.served is not None:
            size = max(size, self.served.at_once)
        if known is not None:
            size = known["plan"]["batch_size"]
        return {
            "verb": VERB,
            "digests": {
                "config": digest(canonical(config)),
                "model": model_digest(self.subject, self.target),
                "data": self.data.digest,
                "code": code_digest(),
            },
            "config": config,
            "model": strict({**self.subject.card, "randomised": self.target.randomised}),
            "surrogates": [_known(surrogate) for surrogate in order.surrogates],
            "others": [{"name": each.name, "digest": each.digest, "n": len(each)} for each in order.across],
            "data": self.data_card(),
            "notes": self.notes(),
            "versions": versions(),
            "hardware": hardware(self.device),
            "seed": plan.seed,
            "plan": {
                "shards": shards_of(
                    len(self.data), min(order.shard_size, size) if small else order.shard_size
                ),
                "batch_size": size,
                "stages": _stage_names(plan),
            },
        }

    def config(self) -> dict[str, Any]:
        """The settings of the run that can change a number."""
        order, plan = self.order, self.plan
        held = [_known(surrogate) for surrogate in order.surrogates]
        return {
            **outline_to_json(plan.outline(self.target.classes)),
            "full": plan.full,
            "keep_adversarial": plan.keep_adversarial,
            "doubts": plan.doubts,
            "batch_size": order.batch_size,
            "shard_size": order.shard_size,
            "time_budget_s": order.time_budget_s,
            "fit": None if order.fit is None else order.fit.digest,
            "surrogates": {f"{place} {one['name']}": one["digest"] for place, one in enumerate(held, 1)},
            "across": {f"{place} {one.name}": one.digest for place, one in enumerate(order.across, 1)},
        }

    def fit(self) -> Batch | None:
        """The examples that learned attacks are fitted to: as many as the largest number that one of them needs."""
        wanted = [m.attack.examples for m in self.plan.members if isinstance(m.attack, Learned)]
        if not wanted or self.order.fit is None:
            return None
        batch = self.order.fit.read(0, min(max(wanted), len(self.order.fit)))
        if batch.x.shape[1:] != self.shape:
            raise UsageError(
                f"inputs of {self.order.fit.name}, to learn attacks on, have shape {tuple(batch.x.shape[1:])}, and "
                f"those of {self.data.name} {self.shape}; name examples of the same kind with --fit DATA"
            )
        refuse_batch(
            batch, self.target.bare.bounds, self.target.classes, self.order.fit.name, whole=self.order.fit
        )
        return self._typed(batch)

    def across(self) -> tuple[Batch, ...]:
        """Equally many inputs of each data set, a seeded sample, in the order in which they are paired."""
        if not self.plan.across:
            return ()
        sets, seed = (self.data, *self.order.across), self.plan.seed
        n = min(MATRIX_ROWS, *map(len, sets))
        drawn = (selected(each, n=None, sample=n, seed=seed).read(0, n) for each in sets)
        return tuple(paired(self._typed(batch), seed, place) for place, batch in enumerate(drawn))

    def _typed(self, batch: Batch) -> Batch:
        """Inputs of other data, converted to the data type of those of the run."""
        return batch.at(batch.x.to(self.data.read(0, 1).x.dtype))

    def data_card(self) -> dict[str, Any]:
        """Name, digest, size, shape, classes and features of the data."""
        data = self.data
        known = {"name": data.name, "digest": data.digest, "n": len(data), "shape": self.shape}
        features = getattr(data, "features", None)
        columns = {} if features is None else {"features": features}
        content: dict[str, Any] = strict({**known, "classes": data.classes, **columns})
        return content

    def notes(self) -> list[str]:
        """Notes on model, data and threat model that a reader needs before the numbers."""
        small = slight(self.plan.threat.constraint, self.target.bare.bounds, math.prod(self.shape))
        held = [
            f"the surrogate {one.card.get('name', '')}: {note}"
            for one in self.order.surrogates
            for note in one.notes
        ]
        return [*self.subject.notes, *held, *getattr(self.data, "notes", ()), *self.target.notes, *small]

    def about(self) -> dict[str, Any]:
        """Entries that may differ between two equal runs: time and command."""
        return {
            "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "command": repeatable(self.order.command),
        }

    def result(
        self,
        manifest: Mapping[str, Any],
        stopper: Stopper,
        folder: RunFolder | None = None,
        *,
        lasting: bool = True,
    ) -> Result:
        """Measure and judge; record in the folder, if any. A folder that is not `lasting` is not part of the result."""
        keeper: Keeper = InMemory() if folder is None else InFolder(folder)
        if self.served is not None and keeper.document(DOUBTS) is None:
            self.notify(self._expected(self.served, manifest["plan"]))
        with self.team(manifest, folder) as team:
            evidence, found = self.measured(keeper, stopper, manifest, team)
        rotation = self._attackers(evidence, keeper, stopper)
        evidence = with_attackers(evidence, rotation)
        gates, accepted = self.judged(evidence, keeper.document(VERDICT))
        with stopper.finishing():
            keeper.record(VERDICT, verdict_to_json(gates, accepted))
        if folder is None or not lasting:
            about, place = about_of(manifest, self.about(), None, None), None
        else:
            about, place = about_of(manifest, folder.about(), folder.path, folder.chain.head), folder.path
        return Result(evidence, gates, accepted, about, place, found, self.order.baseline, rotation)

    def _expected(self, served: Served, cut: Mapping[str, Any]) -> str:
        """The message on how many rows the run sends, and how many were sent before a stop."""
        rows = expected_of(self.order, self.plan, self.target, len(self.data), cut, opening=served.opening)
        earlier = served.sent.earlier
        return f"expected: {rows.says}" + (f"; {earlier:,} rows were sent before the stop" if earlier else "")

    def judged(
        self, evidence: Evidence, known: Mapping[str, Any] | None
    ) -> tuple[tuple[Judgement, ...], Mapping[str, str]]:
        """Judge the gates; return them with the accepted doubts. If neither is given, the stored ones are used."""
        order, claims, accepted = self.order, self.order.gates, self.order.accepted
        if known is not None:
            before = tuple(map(judgement_from_json, known["gates"]))
            if not claims and not accepted:
                return before, known["accepted_doubts"]
            claims = claims or tuple(judgement.claim for judgement in before)
            accepted = accepted or known["accepted_doubts"]
        doubts = Doubts(evidence.doubts, accepted)
        return tuple(judge(claim, evidence, doubts, baseline=order.baseline) for claim in claims), accepted

    @contextmanager
    def team(self, manifest: Mapping[str, Any], folder: RunFolder | None) -> Iterator[Team | None]:
        """The worker processes in the run folder; None if this process measures alone."""
        if folder is None or self.order.workers is None:
            yield None
            return
        digests = {what: manifest["digests"][what] for what in ("model", "data")}
        digests["surrogates"] = [surrogate.digest for surrogate in self.order.surrogates]
        plan = replace(self.plan, threat=replace(self.plan.threat, surrogates=()))
        owner = folder.leases.owner
        assert owner is not None
        job = Job(self.opening, digests, plan, self.order.device, folder.path, owner)
        with gathered(folder, job, self.order.workers) as team:
            yield team

    def measured(
        self,
        keeper: Keeper,
        stopper: Stopper,
        manifest: Mapping[str, Any],
        team: Team | None,
    ) -> tuple[Evidence, Columns]:
        """The evidence and the adversarial inputs. Stored stages are reused; the others are measured."""
        names = tuple(manifest["plan"]["stages"])
        course = self._course(keeper, stopper, manifest["plan"], team)
        by_stage, missed = course.run()
        if team is not None:
            team.end()
        asked = keeper.document(DOUBTS)
        if asked is None:
            asked = self._asked(course, by_stage, missed)
        elif (known := keeper.stage(FOUND)) is not None:
            by_stage[FOUND] = known.columns
        adapted = self._adapted(course, by_stage, asked) if self.plan.adaptive else None
        spent = {name: keeper.spent(name) for name in names}
        if self.served is not None:
            finish(self.served)
        sent = None if self.served is None else self.served.sent.totals
        evidence = evidence_of(manifest, by_stage, asked, spent, adapted, sent)
        attacks = [stage.name for stage in self.plan.stages() if stage.kind == "attack"]
        counted = counted_passes(manifest, by_stage, asked)
        return evidence, adversarial(by_stage, attacks, counted, smallest=self.plan.smallest)

    def _course(self, keeper: Keeper, stopper: Stopper, cut: Mapping[str, Any], team: Team | None) -> Course:
        """The stages of the run, with the shards and the batch size of its manifest."""
        names = tuple(cut["stages"])
        before = sum(keeper.spent(name).wall for name in names)
        budget = math.inf if self.order.time_budget_s is None else self.order.time_budget_s
        return Course(
            self.plan,
            self.target,
            self.data,
            self.device,
            tuple((start, stop) for start, stop in cut["shards"]),
            cut["batch_size"],
            keeper,
            stopper,
            self.progress,
            time.perf_counter() + budget - before,
            names,
            team or Alone(),
            self.fit(),
            served=self.served,
            across=self.across(),
        )

    def _asked(
        self, course: Course, by_stage: dict[str, Columns], missed: Sequence[str]
    ) -> Mapping[str, Any]:
        """Measure and record the doubts, with notes on what time did not allow.

        Adversarial examples of the probes are added to `by_stage`.
        """
        keeper, off = course.keeper, self.plan.doubts == "none"
        keeper.begin(DOUBTS, 0)
        watch = Watch(lambda seconds, last: keeper.spend(DOUBTS, 0, seconds, done=last))
        unasked = ["nothing was doubted: the doubts were switched off"] if off and not self.plan.alone else []
        with purpose(DOUBTS, 0, "doubts"):
            found = probes.ask(course, by_stage, missed, watch)
        course.confirm()
        if found.found:
            by_stage[FOUND] = found.found
        asked = _written(
            found,
            [*missed, *unasked],
            keeper.splits(),
        )
        with course.stopper.finishing():
            if found.found and keeper.stage(FOUND) is None:  # a killed attempt may have kept it already
                keeper.complete(FOUND, found.found, None)
            keeper.record(DOUBTS, asked)
            watch.tick(done=True)
        course.settle(DOUBTS)
        return asked

    def _attackers(self, evidence: Evidence, keeper: Keeper, stopper: Stopper) -> Mapping[str, Any] | None:
        """Measure the table of attackers of a model with rotation; each row is recorded when it is done."""
        known = keeper.document(ROTATION)
        if self.order.attackers is None or (known is not None and known["complete"]):
            return known

        def keep(found: Mapping[str, Any]) -> None:
            with stopper.finishing():
                keeper.record(ROTATION, found)

        judged_on = self.data.read(0, min(JUDGED_BY_ATTACKERS, len(self.data)))
        found = self.order.attackers(evidence, judged_on, known=known, keep=keep, progress=self.progress)
        keep(found)
        return found

    def _adapted(
        self, course: Course, by_stage: dict[str, Columns], asked: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Run the adaptive attacks that the doubts require, and record which those are and why."""
        doubts = tuple(map(doubt_from_json, asked["doubts"]))
        members = {member.name for member in self.plan.adaptive}
        known = [arm for arm in arms(self.plan.threat.constraint) if arm.name in members]
        because = called(known, doubts)
        missed = course.adapt(by_stage, because)
        said = course.keeper.document(ADAPTIVE)
        if said is None:
            said = {
                "because": {arm: list(names) for arm, names in because.items()},
                "ways": list(self.target.masking.says),
                "blind": self.target.blind_view,
                "missed": list(missed),
                "notes": [] if because else ["no doubt called for an adaptive attack, so none was run"],
            }
            with course.stopper.finishing():
                course.keeper.record(ADAPTIVE, said)
        return said


def _stage_names(plan: Plan) -> list[str]:
    """Names of everything that takes time, in its order."""
    stages = plan.stages()
    before = [stage.name for stage in stages if not stage.adaptive]
    return [*before, DOUBTS, *(stage.name for stage in stages if stage.adaptive)]


def _known(surrogate: Subject) -> dict[str, str]:
    """Name, origin and digest of a surrogate model."""
    name, how = (str(surrogate.card.get(key, "")) for key in ("name", "how"))
    return {"name": name, "how": how, "digest": surrogate.digest}


def _written(asked: probes.Asked, remarks: Sequence[str], splits: Sequence[Split]) -> dict[str, Any]:
    """The document of the doubts, with notes on the course of the run."""
    return {
        "doubts": [doubt_to_json(doubt) for doubt in asked.findings.doubts],
        "fallen": {name: ids.tolist() for name, ids in asked.findings.fallen.items()},
        "probes": list(asked.probes),
        "notes": [*remarks, *_halved(splits)],
        "cost": {name: getattr(asked.cost, name) for name in ("forwards", "backwards", "queries")},
    }


def _halved(splits: Sequence[Split]) -> list[str]:
    if not splits:
        return []
    size = min(split["size"] for split in splits)
    return [
        f"memory ran out, and the run went on with {size} examples at a time; --batch-size {size} starts with that"
    ]
