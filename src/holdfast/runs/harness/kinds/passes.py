"""Stages on every example without an attack of its own: clean and repeated passes, and transfer between models."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from holdfast.attacks.parts.ascent import flat
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.attacks.parts.random_search import sample_rows
from holdfast.attacks.pgd import PGD, margin_pgd
from holdfast.attacks.transfer import Transfer
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Cost, Table
from holdfast.core.meter import Metered, Pieces, Spent, for_label, in_pieces, margin
from holdfast.core.model import Model
from holdfast.core.names import slug
from holdfast.core.outputs import Aim, score
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Logits, Mask, PerExample
from holdfast.doubts.answering import EVEN
from holdfast.runs.harness.kinds.attack import AttackKind, unlimited
from holdfast.runs.harness.stage import (
    Against,
    Member,
    Outline,
    Stage,
    StageKind,
    Work,
    evaluations,
)
from holdfast.runs.harness.target import (
    PreparedModel,
    aimed,
    cost_columns,
    digests,
    measured_by_task,
    returned,
    stored_inputs,
    unattacked,
    verdict_of,
    votes,
)

if TYPE_CHECKING:
    from holdfast.runs.harness.plan import Plan


class Clean(StageKind):
    """Kind of the first stage of a measurement, which evaluates the model on the clean inputs."""

    name = "clean"
    named = "clean"

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that evaluates the model on the clean inputs, which every plan contains."""
        return [Stage("clean", self)]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, which means all examples, because the model is evaluated on every clean input."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Evaluate the model on the clean inputs of a shard, and return its predictions and the digests of the inputs
        as columns.
        """
        rng = Draws(work.plan.seed).at("stage", stage.name)
        return in_pieces(lambda piece: _clean(work, piece, rng), work.batch, work.room)

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the measured columns `clean`, because no example is left out of the clean stage."""
        return dict(clean)

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return the measured columns of the clean stage, with every example correct and eligible. The few examples of
        the check may all be misclassified or ineligible, while others in the data are not.
        """
        columns = self.run(stage, work)
        every = torch.ones_like(columns["correct"])
        return {**columns, "correct": every, "eligible": every.clone()}

    def cost(self, columns: Columns, *, randomised: bool) -> Cost:
        """Return the cost of the clean stage: one query for each example, and further forward passes for the votes of a
        randomised model.
        """
        n = len(columns["id"])
        return Cost(n * evaluations(randomised=randomised), 0, n)


def _clean(work: Work, batch: Batch, rng: Draws) -> dict[str, Tensor]:
    target, goal = work.target, work.plan.threat.goal
    with target.repeatable(rng.at(int(batch.ids[0]))):
        outputs, right, _ = votes(target, batch, batch.x, lambda logits: target.correct_logits(logits, batch))
    logits = target.correct_logits(outputs, batch)
    class_logits = logits[:, : target.classes]
    probabilities = class_logits.softmax(1)
    height = margin(logits, batch.towards(None))
    prediction = target.predicted(logits)
    eligible = torch.ones_like(prediction, dtype=torch.bool)
    if goal is not None:
        eligible = (batch.y != goal) & (prediction != goal)
    columns = {
        "id": batch.ids,
        "y": batch.y,
        "digest": digests(batch),
        "prediction": prediction,
        "margin": height,
        "confidence": probabilities.amax(1),
        "entropy": torch.special.entr(probabilities).sum(1),
        "probability_margin": margin(probabilities, batch.towards(None)),
        "correct": right > 0.5,
        "right": right,
        "eligible": eligible,
        "nan": outputs.flatten(1).isnan().any(1),
        # the tolerance allows for the rounding of a sum in float32
        "is_probability": ((class_logits.sum(1) - 1).abs() < 1e-4) & (class_logits >= 0).all(1),
    }
    if target.rejects:
        columns["rejected"] = target.rejected(logits)
        columns["score"], columns["class_margin"] = score(logits), margin(class_logits, batch.towards(None))
    columns |= measured_by_task(target, outputs, batch)
    return {name: values.cpu() for name, values in columns.items()}


FIXED = Member("PGD-40", PGD(steps=40, reach=2.5, loss=cross_entropy, schedule=flat, drop=False))
"""Attack of the fixed pass. It runs on every example, so its result does not depend on the order of the suite."""
_DRAWS = "attacked"
"""Name of the random draws of the fixed pass, which decides its results."""


class FixedPass(AttackKind):
    """Kind of stage that runs PGD with 40 steps on every example. Entropy, margin, F1 and calibration under attack are
    computed from its results.
    """

    name = "fixed-pgd"
    named = "fixed-pgd"
    title = "the fixed {} pass"
    listed = "fixed pass"
    lost = "entropy, margin, precision and calibration under attack are"

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage of the fixed PGD attack, if the plan contains it and the threat model permits gradients."""
        return [Stage(self.name, self, FIXED)] if plan.attacked and plan.threat.gives("gradients") else []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return a mask that contains all examples, because the fixed PGD attack is run on every example."""
        return torch.ones_like(by_stage["clean"]["correct"])

    def run(self, stage: Stage, work: Work) -> Columns:
        """Run the fixed PGD attack on all examples of a shard, and return its columns."""
        batch, rng = work.batch, Draws(work.plan.seed).at("stage", _DRAWS)
        missed = batch.ids if work.broken is None else batch.ids[~work.broken.to(batch.ids.device)]
        pieces = Pieces(batch, work.room)
        for piece in pieces:
            with pieces.attempt():
                pieces.add(self.piece(stage, work, piece, rng, missed))
        return pieces.columns()

    def further(self, target: PreparedModel, batch: Batch, logits: Logits, spent: Spent) -> dict[str, Tensor]:
        """Return confidence, entropy and margin of the class probabilities of the attacked inputs."""
        probabilities = for_label(logits[:, : target.classes], batch.y).softmax(1)
        return {
            "confidence": probabilities.amax(1),
            "entropy": torch.special.entr(probabilities).sum(1),
            "probability_margin": margin(probabilities, batch.towards(None)),
        }

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return columns with the results for clean inputs instead of those for attacked ones. They serve to check
        gates before a run.
        """
        clean = {name: values for name, values in work.clean.items() if name != "correct"}
        return {**self.columns(work.clean), **clean}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return the columns that the fixed PGD attack adds to the evidence: predictions, confidences, entropies and
        margins of the attacked inputs.
        """
        if self.name not in by_stage:
            return {}
        names = ("prediction", "confidence", "entropy", "probability_margin")
        return {f"attacked_{name}": by_stage[self.name][name] for name in names}


class CurvePass(AttackKind):
    """Kind of stage that runs minimum-norm attacks on every correct example, from which accuracy as a function of eps
    is computed.
    """

    name = "curve"
    named = r"curve-\d+-.*"
    title = "{} of the eps curve"
    listed = "curve"
    lost = "its distances are"
    smallest = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return one stage for each minimum-norm attack from which accuracy as a function of eps is computed."""
        return [Stage(f"curve-{k}-{slug(m.name)}", self, m) for k, m in enumerate(plan.curve, 1)]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the correctly classified examples, on which the smallest change is searched for."""
        return by_stage["clean"]["correct"] & by_stage["clean"]["eligible"]

    def threat(self, plan: "Plan") -> ThreatModel:
        """Return the threat model of the plan without a limit on the size of changes, because the smallest change is
        searched for.
        """
        return unlimited(plan.threat)


FALSE_POSITIVES = (0.5, 0.05, 0.01, 0.001)
"""False positive rates at which a detector is attacked, in order of increasing threshold.

An input whose score is below the lowest threshold is also below the others.
"""
AWARE = margin_pgd(restarts=3)
"""The attack on the network and the detector together."""
DETECTION = (
    Member("Oblivious", FIXED.attack, against=Against(0.0)),
    *(Member(f"Aware-{100 * rate:g}", AWARE, against=Against(EVEN, rate)) for rate in FALSE_POSITIVES),
    Member("Aware", AWARE, against=Against(EVEN)),
)
"""The passes on a model that rejects inputs: one that ignores the detector, then one for each threshold."""
PASSES = tuple(slug(member.name) for member in DETECTION)
"""Names of the stages of these passes."""


class DetectorPass(AttackKind):
    """Kind of stage that attacks a network together with its detector, to measure the detection rate at each false
    positive rate.
    """

    name = "detection"
    named = "|".join(PASSES)
    title = "the pass {} on the detector"
    listed = "passes on the detector"
    lost = "the evaluation of the detector is"
    aware = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage of an attack that ignores the detector, and one stage for each threshold of the detector, if
        the plan contains them.
        """
        return [Stage(slug(m.name), self, m) for m in DETECTION if plan.detection]

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of the examples for which no earlier attack on the detector has found a misclassified and
        undetected input.
        """
        return undetected(stage.aim, by_stage)

    def further(self, target: PreparedModel, batch: Batch, logits: Logits, spent: Spent) -> dict[str, Tensor]:
        """Return the scores of the detector for the attacked inputs. The score is inf for an input that the network
        classifies correctly.
        """
        wrong = ~(margin(logits[:, : target.classes], batch) > 0)
        return {"score": torch.where(wrong, score(logits), torch.inf)}

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns for examples that were not attacked. Their detector score `score` is infinite, since no
        misclassified input was found.
        """
        return super().columns(clean) | {"score": torch.full_like(clean["margin"], torch.inf)}

    def evidence(
        self, outline: Outline, by_stage: Mapping[str, Columns], worst: Columns
    ) -> Mapping[str, Tensor]:
        """Return for each example the lowest detector score of an attacked input, for the attack that ignores the
        detector and for those that evade it.
        """
        if not set(PASSES) <= set(by_stage):
            return {}
        # an example that an attack broke is misclassified with a score below the threshold
        broken_score = torch.where(worst["success"], 0.0, torch.inf)
        return {
            "oblivious_score": by_stage[PASSES[0]]["score"],
            "aware_score": torch.minimum(lowest(by_stage), broken_score),
        }


def undetected(aim: Aim, by_stage: Mapping[str, Columns]) -> Mask:
    """Return the mask of the examples for which no earlier attack found a misclassified input with a detector score
    below the attacked threshold.

    For the pass that ignores the detector, these are all examples that the network classifies correctly.
    """
    if aim.beyond == torch.inf:
        return by_stage["clean"]["class_margin"] > 0
    return lowest(by_stage) > aim.beyond


def lowest(by_stage: Mapping[str, Columns]) -> PerExample:
    """Return for each example the lowest detector score among the misclassified inputs that were found, or infinity if
    there is none.

    The clean input and the inputs of all passes are included.
    """
    clean = by_stage["clean"]
    least = torch.where(clean["class_margin"] > 0, torch.inf, clean["score"])
    for name, columns in by_stage.items():
        if name in PASSES:
            least = torch.minimum(least, columns["score"])
    return least


MATRIX = Member("Transfer", Transfer(reach=2.5, diversity=0.5, neighbours=0))
"""Attack that computes the examples of the transfer matrix and of the transfer across data sets."""
MATRIX_ROWS = 500
"""Largest number of examples in the transfer matrix, and of each data set in the transfer across data sets.

With this number, a fraction is known to 4.5 percentage points.
"""
_COLUMNS = ("id", "right", "wrong")


class TransferMatrix(AttackKind):
    """Kind of stage that measures, on a sample of the examples, how attacks transfer between the target and the
    surrogates.
    """

    name = "transfer"
    named = "transfer"
    title = "the transfer matrix"
    lost = "the transfer matrix is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that measures the transfer between models, if the plan contains it."""
        return [Stage("transfer", self, MATRIX)] if plan.matrix else []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> Mask:
        """Return the mask of a random sample of the examples. With a target class, the sample contains only examples of
        other classes.
        """
        clean, goal = by_stage["clean"], plan.threat.goal
        chosen = torch.zeros_like(clean["correct"])
        among = torch.ones_like(chosen) if goal is None else clean["y"] != goal
        chosen[sample_rows(clean, among, Draws(plan.seed).at("stage", stage.name), MATRIX_ROWS)] = True
        return chosen

    def piece(self, stage: Stage, work: Work, batch: Batch, rng: Draws, missed: Ids) -> dict[str, Tensor]:
        """Compute adversarial examples for one batch on each source model, and return as columns which of the models
        each of them breaks.

        The judgement of an example is that of the input from the first source that breaks the target.
        """
        plan, target = work.plan, work.target
        batch, threat = aimed(batch, plan.threat), replace(plan.threat, queries=None)
        metered = Metered(target.queried(target.optimised, batch), batch, threat)

        def correct_by_model(x: Inputs, target_logits: Logits) -> Tensor:
            with torch.no_grad():
                surrogate_logits = [model(x, batch.ids) for model in threat.surrogates]
            return torch.stack(
                [margin(logits, batch) > 0 for logits in (target_logits, *surrogate_logits)], 1
            )

        wrong, columns, x_best = [], dict[str, Tensor](), batch.x
        with target.repeatable(rng.at(int(batch.ids[0]))):
            right = correct_by_model(batch.x, target.logits(batch.x))
            for models in makers(metered, threat):
                x_adv, _ = returned(stage.attack, replace(threat, surrogates=models), target, batch, rng)
                logits, judged = verdict_of(plan, target, batch, x_adv)
                wrong.append(~correct_by_model(x_adv, target.judged_logits(logits, batch)))
                replaced = judged["success"]
                # the first source gives the columns of all examples, later ones only those that still survive
                replaced = replaced & ~columns["success"] if columns else torch.ones_like(replaced)
                x_best = torch.where(replaced.view(-1, *[1] * (x_adv.dim() - 1)), x_adv, x_best)
                columns = {
                    name: torch.where(replaced, judged[name], columns.get(name, judged[name]))
                    for name in judged
                }
        columns |= {
            **cost_columns(metered.spent),
            **stored_inputs(plan, target, batch, x_best, columns, missed),
            "transfer.id": batch.ids,
            "transfer.right": right,
            "transfer.wrong": torch.stack(wrong, 1),
        }
        return {name: values.cpu() for name, values in columns.items()}

    def as_if_broken(self, stage: Stage, work: Work) -> Columns:
        """Return the columns that the stage would have if all models agreed with the target and every example broke all
        of them. They serve to check gates before a run.
        """
        clean, threat = work.clean, work.plan.threat
        models, right = 1 + len(threat.surrogates), clean["correct"][:, None]
        wrong = right[:, None].expand(-1, len(makers(work.target.optimised, threat)), models)
        table = {"transfer.id": clean["id"], "transfer.right": right.expand(-1, models)}
        return {**super().as_if_broken(stage, work), **table, "transfer.wrong": wrong}

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which the examples of the transfer matrix were judged.

        Each example is judged once clean, and once for each set of source models.
        """
        if "transfer.wrong" not in columns:
            return super().judged(columns, randomised=randomised)
        sources = columns["transfer.wrong"].shape[1]
        return int(columns["ran"].sum()) * (1 + sources * evaluations(randomised=randomised))

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence that contains the results of the transfer between models."""
        return sampled_table(by_stage, "transfer", "example", _COLUMNS)


def sampled_table(
    by_stage: Mapping[str, Columns], stage: str, unit: str, names: tuple[str, ...]
) -> dict[str, Table]:
    """Return a table of the evidence with the results of a stage that was run on a sample of the examples, by the name
    of the stage.

    Returns an empty dictionary if the stage was not run or not finished.
    """
    columns = by_stage.get(stage, {})
    sampled = {name: columns[f"{stage}.{name}"] for name in names if f"{stage}.{name}" in columns}
    return {stage: Table(unit, sampled)} if sampled else {}


def makers(target: Model, threat: ThreatModel) -> list[tuple[Model, ...]]:
    """Return the models, or sets of models, on which the adversarial examples of the transfer matrix are computed.

    These are the target alone, if gradients are allowed, each surrogate alone and, if there are several, all
    surrogates.
    """
    target_alone, single_surrogates = (
        [(target,)] if threat.gives("gradients") else [],
        [(model,) for model in threat.surrogates],
    )
    return [*target_alone, *single_surrogates, *([threat.surrogates] if len(single_surrogates) > 1 else [])]


_IMAGE = 4  # dimensions of a batch of images (n, channels, height, width)


class AcrossSets(StageKind):
    """Kind of stage that transfers perturbations between data sets. It uses the same number of inputs from each data
    set, paired by row.
    """

    name = "across"
    named = "across"
    sharded = False
    lost = "the transfer between data sets is"
    sampled = True

    def stages(self, plan: "Plan") -> list[Stage]:
        """Return the stage that transfers perturbations between data sets, if the plan contains it."""
        return [Stage("across", self, MATRIX)] if plan.across else []

    def due(self, stage: Stage, plan: "Plan", by_stage: Mapping[str, Columns]) -> None:
        """Return None, because the transfer between data sets is measured on all of their inputs."""

    def run(self, stage: Stage, work: Work) -> Columns:
        """Transfer perturbations between data sets, and return as columns which inputs each perturbation breaks.

        The masks `across.turned` and `across.control`, (n, source, destination), state which inputs were broken by a
        perturbation and by its control. The other columns are costs.
        """
        first_set = work.batch
        pairs = replace(first_set, ids=torch.arange(len(first_set), device=first_set.ids.device))
        return in_pieces(
            lambda piece: _transferred(stage, work, [data_set.take(piece.ids) for data_set in work.sets]),
            pairs,
            work.room,
        )

    def columns(self, clean: Columns) -> dict[str, Tensor]:
        """Return the columns of this stage for examples that are not in the data sets of the transfer."""
        return unattacked(clean)

    def judged(self, columns: Columns, *, randomised: bool) -> int:
        """Return the number of forward passes with which the transfer between data sets was judged.

        The inputs of each data set are judged once clean, and once with each perturbation and with each control.
        """
        if "across.turned" not in columns:
            return super().judged(columns, randomised=randomised)
        sets = columns["across.turned"].shape[1]
        return int(columns["ran"].sum()) * sets * (1 + 2 * sets)

    def tables(self, by_stage: Mapping[str, Columns]) -> Mapping[str, Table]:
        """Return the table of the evidence that contains the results of the transfer between data sets."""
        return sampled_table(by_stage, "across", "input of each data set", ("turned", "control"))


def paired(batch: Batch, seed: int, place: int) -> Batch:
    """Return the examples of a data set in a random order, in which they are paired with those of other data sets."""
    rng = Draws(seed).at("across", place)
    return batch.take(rng.uniform(batch.ids, 1, dtype=torch.float64)[:, 0].argsort(stable=True))


def _transferred(stage: Stage, work: Work, sets: Sequence[Batch]) -> dict[str, Tensor]:
    plan, target = work.plan, work.target
    rng, threat = Draws(plan.seed).at("stage", stage.name), replace(plan.threat, queries=None)
    project, bounds = threat.constraint.project, target.original.bounds
    turned: list[Tensor] = []
    control: list[Tensor] = []
    queries = backwards = torch.zeros_like(sets[0].ids)
    with target.repeatable(rng.at(int(sets[0].ids[0]))):
        sets = [replace(source, y=target.logits(source.x)[:, : target.classes].argmax(1)) for source in sets]
        for place, source in enumerate(sets):
            metered = Metered(target.queried(target.optimised, source), source, threat)
            makers = (metered,) if threat.gives("gradients") else threat.surrogates
            x_adv, _ = returned(
                stage.attack, replace(threat, surrogates=makers), target, source, rng.at(place)
            )
            change = x_adv - source.x
            permuted = _permuted(change, source, rng.at("control", place))
            for delta, masks in ((change, turned), (permuted, control)):
                moved = [
                    (destination, project(destination.x + delta, destination.x, bounds))
                    for destination in sets
                ]
                masks.append(torch.stack([_turned(target, destination, x) for destination, x in moved], 1))
            queries, backwards = queries + metered.spent.queries, backwards + metered.spent.backwards
    columns = {
        "id": sets[0].ids,
        "ran": torch.ones_like(sets[0].ids, dtype=torch.bool),
        "queries": queries,
        "backwards": backwards,
        "across.turned": torch.stack(turned, 1),
        "across.control": torch.stack(control, 1),
    }
    return {name: values.cpu() for name, values in columns.items()}


def _permuted(change: Inputs, batch: Batch, rng: Draws) -> Inputs:
    """Each perturbation with its places in random order; the channels of a pixel stay together."""
    spread = change.flatten(2) if change.dim() == _IMAGE else change.flatten(1)[:, None]
    order = rng.uniform(batch.ids, spread.shape[2]).argsort(1)
    return spread.gather(2, order[:, None].expand_as(spread)).view_as(change)


def _turned(target: PreparedModel, batch: Batch, x: Inputs) -> Mask:
    return ~(margin(target.judged_logits(target.logits(x), batch), batch) > 0)
