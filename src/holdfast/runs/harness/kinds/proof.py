"""Stages that prove robustness: quick methods before the attacks of the suite, and slow ones after them.

Each method is run on the examples that are still undecided: classified correctly when clean, not certified, and not
broken. Inputs with which a method refutes robustness are judged by the original model, like those of attacks.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from holdfast.certifiers.protocol import (
    HIGH,
    LOW,
    PIXELS,
    Proofs,
    Prover,
    RadiusProver,
    ReadyProver,
    StatisticalProver,
)
from holdfast.core.batch import Batch, encoded
from holdfast.core.errors import TargetError
from holdfast.core.evidence import Columns, Cost, Table, in_table
from holdfast.core.meter import Pieces, margin
from holdfast.core.model import out_of_memory
from holdfast.core.names import slug
from holdfast.core.tasks import MEASURED
from holdfast.core.types import Ids, Inputs, Mask
from holdfast.runs.harness.stage import (
    Outline,
    Stage,
    StageKind,
    Work,
    broken_by_suite,
    certified_in,
)
from holdfast.runs.harness.target import LOOKED_AT, PreparedModel, stored_inputs, unattacked, verdict_of

if TYPE_CHECKING:
    from holdfast.core.threat import ThreatModel
    from holdfast.runs.harness.plan import Plan

UNDEFINED = "undefined"
"""Name of the table of the operations whose domain the bounds of examples leave."""
_WIDTH = 240
"""largest number of characters of an operation with its place"""
AT_ONCE = 16
"""Number of examples that randomised smoothing certifies between two checks of the time limit."""
DOUBLE = "double precision"
"""Name under which a target keeps the copy of its model in double precision."""


class ProofKind(StageKind, Protocol):
    """Base class of the kinds of stages that run a method of certification on undecided examples."""

    named: ClassVar[str] = r"proof-\d+-.*"
    proves: ClassVar[bool] = True
    at_once: ClassVar[int | None] = None
    """largest number of examples between two checks of the time limit; None for the batch size of the run"""
    refutes: ClassVar[bool] = True
    """whether the methods return counterexamples, which are then judged"""
    title: ClassVar[str] = "{}"
    listed: ClassVar[str] = "proofs"
    of_outputs: ClassVar[bool] = False
    """whether the methods also bound the outputs of examples that are not correct, of models with another task than
    classes"""

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the undecided examples: correct when clean, not certified, and broken by no attack of the
        suite and no counterexample.
        """
        stages, clean = plan.stages(), by_stage["clean"]
        refuted = broken_by_suite(stages, by_stage)
        for earlier in stages:
            if earlier.kind.proves and earlier.name in by_stage:
                refuted |= by_stage[earlier.name]["success"]
        certified = certified_in(stages, by_stage)
        if self.of_outputs and unproved(clean):
            return clean["eligible"] & ~certified
        return clean["correct"] & clean["eligible"] & ~refuted & ~certified

    def run(self, stage: Stage, work: Work) -> Columns:
        """Run the method of the stage on the chosen examples of a shard, and return the columns of all its examples."""
        columns, chosen, batch = self.columns(work.clean), work.chosen, work.batch
        chosen = torch.ones_like(work.clean["correct"]) if chosen is None else chosen
        # the other examples count as finished in the progress of the shard
        work.room.progress(int((~chosen).sum()))
        if not chosen.any():
            return columns
        assert stage.prover is not None
        sample = batch.take(torch.arange(min(len(batch), LOOKED_AT), device=batch.ids.device))
        ready = prepared_prover(work.target, stage.prover, sample, work.plan.threat)
        missed = batch.ids if work.broken is None else batch.ids[~work.broken.to(batch.ids.device)]
        size = work.room.size if self.at_once is None else min(work.room.size, self.at_once)
        pieces = Pieces(batch.take(chosen), replace(work.room, size=size))
        for piece in pieces:
            with pieces.attempt():
                pieces.add(self.piece(ready, work, piece, missed))
        for name, values in pieces.columns().items():
            if in_table(name):
                columns[name] = values
            else:
                columns[name][chosen] = values
        return columns

    def piece(self, ready: ReadyProver, work: Work, batch: Batch, missed: Ids) -> dict[str, Tensor]:
        """Run a prepared method on one batch, and return as columns its proofs and the judgement of its
        counterexamples by the original model.

        Of the examples in `missed`, counterexamples are stored.
        """
        plan, target = work.plan, work.target
        with torch.no_grad():
            # raises the error of the run's time limit, which the bounds of a traced model do not notice
            target.optimised(batch.x[:1], batch.ids[:1])
        proofs = ready(batch)
        if not self.refutes:
            proofs = replace(proofs, broken=torch.zeros_like(proofs.broken))
        refuse_contradictory(proofs)
        columns = {
            "certified": proofs.certified,
            "bound": proofs.bound.double(),
            "work": proofs.work.long(),
            "stopped": proofs.stopped,
            "claimed": proofs.broken,
            "ran": torch.ones_like(proofs.certified),
            "success": torch.zeros_like(proofs.broken),
            "confirmed": torch.zeros_like(proofs.broken),
        }
        if proofs.broken.any():
            x_adv = torch.where(_as_rows(proofs.broken, batch.x), proofs.x_adv, batch.x)
            _, judged = verdict_of(plan, target, batch, x_adv)
            judged["success"] = judged["success"] & proofs.broken
            confirmed = judged["success"] & wrong_in_double(target, batch, x_adv)
            columns |= {**judged, "confirmed": confirmed}
            columns |= stored_inputs(plan, target, batch, x_adv, columns, missed)
        else:
            columns |= stored_inputs(plan, target, batch, batch.x, columns, missed)
        columns |= {**self.more(proofs), **proofs.of_task, **_undefined(proofs, batch.ids)}
        return {name: values.cpu() for name, values in _with_all(columns, batch, work).items()}

    def more(self, proofs: Proofs) -> dict[str, Tensor]:
        """Return the columns of proofs that only some kinds have."""
        return {}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of a method for examples on which it was not run: nothing is proved about them."""
        n = len(clean["id"])
        return {
            **unattacked(clean),
            **{
                name: torch.zeros(n, dtype=torch.bool)
                for name in ("certified", "stopped", "claimed", "confirmed")
            },
            "bound": torch.full((n,), -torch.inf, dtype=torch.float64),
            "work": torch.zeros(n, dtype=torch.int64),
            **unproved(clean),
        }

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which counterexamples were judged."""
        return int(columns["claimed"].sum())

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns that all methods together add to the evidence: which examples are certified, by which
        method, with which bound and radius, and which examples were attacked.
        """
        clean = by_stage["clean"]
        steps = [step for step in outline.steps if step.kind.proves and step.name in by_stage]
        by = torch.full_like(clean["id"], -1)
        bound = torch.full(by.shape, -torch.inf, dtype=torch.float64)
        for place, step in enumerate(steps):
            columns = by_stage[step.name]
            by = torch.where(columns["certified"] & (by < 0), place, by)
            bound = torch.maximum(bound, columns["bound"])
        certified = by >= 0
        return {
            "certified": certified,
            "certified_by": by,
            "certified_bound": bound,
            "certified_radius": certified.double() * outline.threat.constraint.eps,
            "attacked": attacked_by_suite(outline, by_stage),
            **_of_outputs([by_stage[step.name] for step in steps], unproved(clean)),
        }

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table `undefined` of the evidence, of the examples for which the last method ended because its
        bounds leave the domain of an operation, with the code points of the operation and its place; none without such
        examples.
        """
        rows: dict[int, Tensor] = {}
        for columns in by_stage.values():
            if f"{UNDEFINED}.id" in columns:
                for id_ in columns["id"][columns["ran"]].tolist():
                    rows.pop(id_, None)
                texts = columns[f"{UNDEFINED}.operation"]
                rows |= dict(zip(columns[f"{UNDEFINED}.id"].tolist(), texts, strict=True))
        if not rows:
            return {}
        columns = {"id": torch.tensor(list(rows)), "operation": torch.stack(list(rows.values()))}
        return {UNDEFINED: Table("example whose bounds leave the domain of an operation", columns)}


class StatisticalProof(ProofKind):
    """Kind of stage for a method whose certificates have a failure probability, such as randomised smoothing.

    Its draws may show that the model predicts another class at a clean input. As the votes of the clean stage say
    otherwise, the example remains undecided.
    """

    name = "statistical-proof"
    at_once: ClassVar[int | None] = AT_ONCE
    refutes = False

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stages of the statistical methods, in their order."""
        return [
            stage for stage in _stages(self, plan.proofs, 1) if isinstance(stage.prover, StatisticalProver)
        ]

    def more(self, proofs: Proofs) -> dict[str, Tensor]:
        """Return the certified radii, and which examples the method abstained on."""
        assert proofs.radius is not None
        assert proofs.abstained is not None
        return {"radius": proofs.radius, "abstained": proofs.abstained}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of a method for examples on which it was not run: their radius is 0."""
        nothing = super().columns(clean)
        radius = torch.zeros_like(nothing["bound"])
        return {**nothing, "radius": radius, "abstained": torch.zeros_like(nothing["certified"])}

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return the cost: one forward pass of the base classifier for each draw."""
        return super().cost(columns, randomised=randomised) + Cost(int(columns["work"].sum()))

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns of all methods, with `abstained`, with the certified radii, which may exceed eps or be
        below it, and with `contradicted`: certified examples that an attack broke, which do not count as certified.
        """
        columns = dict(super().evidence(outline, by_stage, worst))
        radius, abstained = columns["certified_radius"], torch.zeros_like(columns["certified"])
        for step in outline.steps:
            if step.kind is self and step.name in by_stage:
                radius = torch.maximum(radius, by_stage[step.name]["radius"])
                abstained |= by_stage[step.name]["abstained"]
        contradicted = columns["certified"] & worst["success"]
        return columns | {
            "certified": columns["certified"] & ~contradicted,
            "certified_by": columns["certified_by"].masked_fill(contradicted, -1),
            "certified_radius": radius.masked_fill(worst["success"], 0.0),
            "abstained": abstained,
            "contradicted": contradicted,
        }


class QuickProof(ProofKind):
    """Kind of stage for the methods of certification that are run before the attacks of the suite."""

    name = "quick-proof"
    of_outputs = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stages of the quick methods, in their order."""
        return [
            stage
            for stage in _stages(self, plan.proofs, 1)
            if not isinstance(stage.prover, StatisticalProver | RadiusProver)
        ]


class RadiusProof(ProofKind):
    """Kind of stage for the methods that prove a radius for each example, which may exceed eps or be below it."""

    name = "radius-proof"
    refutes = False

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stages of these methods, in their order."""
        return [stage for stage in _stages(self, plan.proofs, 1) if isinstance(stage.prover, RadiusProver)]

    def more(self, proofs: Proofs) -> dict[str, Tensor]:
        """Return the certified radii, which are 0 for a model about which nothing is proved."""
        return {"radius": torch.zeros_like(proofs.bound) if proofs.radius is None else proofs.radius}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of a method for examples on which it was not run: their radius is 0."""
        nothing = super().columns(clean)
        return {**nothing, "radius": torch.zeros_like(nothing["bound"])}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns of all methods, with the largest certified radius of each example."""
        columns = dict(super().evidence(outline, by_stage, worst))
        for step in outline.steps:
            if step.kind is self and step.name in by_stage:
                radius = by_stage[step.name]["radius"]
                columns["certified_radius"] = torch.maximum(columns["certified_radius"], radius)
        return columns


class LateProof(ProofKind):
    """Kind of stage for the methods of certification that are run on what the attacks of the suite left undecided."""

    name = "late-proof"
    at_once: ClassVar[int | None] = 1

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stages of the slow methods, in their order."""
        return _stages(self, plan.late_proofs, 1 + len(plan.proofs))


def _stages(kind: StageKind, provers: Sequence[Prover], first: int) -> list[Stage]:
    return [
        Stage(f"proof-{k}-{slug(prover.name)}", kind, prover=prover)
        for k, prover in enumerate(provers, first)
    ]


def prepared_prover(
    target: PreparedModel, prover: Prover, sample: Batch, threat: "ThreatModel"
) -> ReadyProver:
    """Return a prover that is prepared for the model of a target and a threat model. It is prepared once for each
    target, since tracing a network may take longer than the bounds of a batch.
    """
    if isinstance(prover, StatisticalProver):
        return _prepared_smoothing(target, prover, sample, threat)
    from holdfast.certifiers.provers import GraphProver, prepared_graph
    from holdfast.certifiers.word_embeddings import on_embeddings
    from holdfast.threats.word_embeddings import WordEmbeddings

    ball = threat.constraint
    if isinstance(ball, WordEmbeddings):
        assert isinstance(prover, GraphProver)  # settings contain no other method
        return target.once(
            f"prover {prover.name} {prover!r}",
            lambda: on_embeddings(prover, target.original, ball),
        )
    if isinstance(prover, GraphProver):  # all of them use the same graph
        graph = target.once("graph", lambda: prepared_graph(target.original, sample))
        return target.once(
            f"prover {prover.name} {prover!r}", lambda: prover.on(graph, target.original, threat)
        )
    return target.once(
        f"prover {prover.name} {prover!r}", lambda: prover.ready(target.original, sample, threat)
    )


def _prepared_smoothing(
    target: PreparedModel, prover: StatisticalProver, sample: Batch, threat: "ThreatModel"
) -> ReadyProver:
    smoothed = target.smoothed
    if smoothed is None or not same_changes(prover, smoothed.smoothing):
        raise ValueError("smoothing certifies a smoothed classifier; see holdfast.certifiers.smoothing")
    return target.once(f"prover {prover!r}", lambda: prover.ready(smoothed.base, sample, threat))


def same_changes(*methods: StatisticalProver) -> bool:
    """Return whether methods have the same smoothed classifier and failure probability, and the same draws up to their
    number.
    """
    first, *others = [(each.name, each.parameters, each.seed, each.failure_probability) for each in methods]
    return all(each == first for each in others)


def refuse_contradictory(proofs: Proofs) -> None:
    """Raise `ValueError` if a prover both certifies and breaks an example, which is a bug of the prover."""
    if (proofs.certified & proofs.broken).any():
        raise ValueError("a prover returned a certificate and a counterexample for the same example")


def wrong_in_double(target: PreparedModel, batch: Batch, x_adv: Inputs) -> Mask:
    """Return the mask of the inputs that a copy of the model in double precision misclassifies as well, so that the
    error is not due to rounding.

    A model that cannot be evaluated in double precision confirms nothing.
    """
    try:
        double = target.once(DOUBLE, lambda: copy.deepcopy(target.original).double())
        with torch.no_grad():
            logits = double(x_adv.double())
    except (TargetError, RuntimeError, TypeError) as error:
        if out_of_memory(error):
            raise
        return torch.zeros_like(batch.ids, dtype=torch.bool)
    return ~(margin(target.correct_logits(logits, batch), batch) > 0)


def attacked_by_suite(outline: Outline, by_stage: Mapping[str, Columns]) -> Mask:
    """Return the mask of the examples on which at least one attack of the suite was run."""
    attacked = torch.zeros_like(by_stage["clean"]["correct"])
    for step in outline.steps:
        if step.kind.in_suite and step.name in by_stage:
            attacked |= by_stage[step.name]["ran"]
    return attacked


def unproved(clean: Columns) -> dict[str, Tensor]:
    """Return the columns of what is proved about the outputs of a model with another task than classes, for examples
    about which nothing is proved. Empty for a model of classes.
    """
    if f"{MEASURED}pixels" in clean:
        return {PIXELS: torch.zeros_like(clean[f"{MEASURED}pixels"][..., 0])}
    if f"{MEASURED}output" in clean:
        infinite = torch.full_like(clean[f"{MEASURED}output"], torch.inf, dtype=torch.float64)
        return {LOW: -infinite, HIGH: infinite}
    return {}


def _of_outputs(by_method: Sequence[Columns], nothing: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What all methods together prove about outputs: the intersection of intervals, the larger numbers of pixels."""
    tighter = {LOW: torch.maximum, HIGH: torch.minimum, PIXELS: torch.maximum}
    return {
        name: reduce(tighter[name], (columns[name] for columns in by_method), values)
        for name, values in nothing.items()
    }


def _undefined(proofs: Proofs, ids: Ids) -> dict[str, Tensor]:
    """The columns of the table of the operations whose domain the bounds of undecided examples leave."""
    undecided = set(ids[~(proofs.certified | proofs.broken)].tolist())
    known = {id_: text for id_, text in proofs.undefined.items() if id_ in undecided}
    return {
        f"{UNDEFINED}.id": torch.tensor(list(known), dtype=torch.int64),
        f"{UNDEFINED}.operation": encoded([text[:_WIDTH] for text in known.values()], _WIDTH),
    }


def _as_rows(mask: Mask, x: Inputs) -> Tensor:
    """A mask of examples, in a shape that broadcasts over their inputs."""
    return mask.view(-1, *(1 for _ in x.shape[1:]))


def _with_all(columns: Mapping[str, Tensor], batch: Batch, work: Work) -> dict[str, Tensor]:
    """The columns of a piece, in which those that were not measured are as for an example that was not attacked."""
    rows = torch.isin(work.clean["id"], batch.ids.cpu())
    return {**{name: values[rows] for name, values in unattacked(work.clean).items()}, **columns}
