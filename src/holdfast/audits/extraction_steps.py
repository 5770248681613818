"""The steps of the audit of extraction: copies of a model that are trained on its answers, over budgets of queries,
pools of inputs and kinds of answers; and what a guard sees of the queries.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise, product

import torch
from torch import Tensor

from holdfast.attacks.transfer import Transfer
from holdfast.audits import extraction_copies as copies
from holdfast.audits.extraction_copies import ANSWERS, Answers, Choice, CopyTraining
from holdfast.audits.finding import Images
from holdfast.core.batch import Batch, fingerprints_of
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.meter import purpose
from holdfast.core.model import Classifier
from holdfast.core.outputs import refused
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels, Logits, Mask
from holdfast.runs.engine.run import Run

OWN, OTHER, NOISE = "own", "other", "noise"
"""names of the pools: data of the same kind, the data of `pool`, and uniform noise"""
EVALUATION, AGAIN, EXACT, SENT = "evaluation", "again", "exact", "sent"
"""names of the stages with the labels of the test examples, with the answers to repeated queries, and with the exact
extraction, and of the document with the number of sent rows"""
AGREEMENT, ROBUST = "copy_agreement", "robust_accuracy_under_copy"
"""names of the metrics"""
QUERIES = "queries"
"""name of the place of the answers that a server is sent inputs for, in the journal of the run"""
KEYS = (1, 10)
"""numbers of API keys over which the stream of queries is spread"""
REPEATED = 16
"""number of inputs that are sent twice"""
Screen = Callable[[Inputs, Logits, int], Mapping[str, Mask]]
"""Type of a function from a stream of queries (n, …), their logits and a number of keys to masks: `flagged`, in which a
rule of a guard fired, `stateful`, in which that of the query detector fired, and `refused`."""


@dataclass(frozen=True)
class Arm:
    """One way to copy the model: a pool, what the answers reveal, and the choice of the queries."""

    pool: str
    answers: Answers
    choice: Choice = "random"

    def step(self, queries: int) -> str:
        """Return the name of the stage with the copy after a number of queries."""
        return f"copy-{self.pool}-{self.answers}-{self.choice}-{queries}"

    @property
    def queried(self) -> str:
        """Name of the stage with the answers."""
        return f"queries-{self.pool}-{self.choice}"


@dataclass(frozen=True)
class Design:
    """What the audit measures."""

    pools: Mapping[str, int]
    """number of inputs of each pool by name; the first one is that of the result"""
    budgets: Sequence[int]
    """numbers of queries, in ascending order"""
    classes: int
    labels_only: bool
    """whether the model answers with labels only"""
    attacked: int
    """number of test examples that are attacked on the largest copies; 0 if no attack is possible under the threat"""
    exact: bool
    """whether the exact extraction is tried"""
    guarded: bool
    """whether a guard sees the queries"""
    remote: bool
    """whether the model is behind a server, which may refuse queries"""

    def budgets_of(self, pool: str) -> list[int]:
        """Return the numbers of queries for a pool, which are at most its number of inputs."""
        return sorted({min(budget, self.pools[pool]) for budget in self.budgets})

    @property
    def result(self) -> Arm:
        """The arm that is the result, which does not depend on what is measured."""
        return Arm(next(iter(self.pools)), "labels" if self.labels_only else "scores")

    def arms(self) -> list[Arm]:
        """Return all arms: scores and labels for each pool, and all answers and choices for the first one."""
        first, k_centre = self.result.pool, replace(self.result, choice="k-centre")
        pairs = ((pool, answers) for pool in self.pools for answers in self._answers(whole=pool == first))
        return [*(Arm(pool, answers) for pool, answers in pairs), *([k_centre] if self.several else [])]

    def _answers(self, *, whole: bool) -> Sequence[Answers]:
        if self.labels_only:
            return ("labels",)
        return ANSWERS if whole else ("scores", "labels")

    @property
    def several(self) -> bool:
        """Whether the first pool is queried with more than one budget."""
        return len(self.budgets_of(self.result.pool)) > 1

    def steps(self) -> tuple[str, ...]:
        """Return the names of the stages in their order."""
        arms = self.arms()
        return (
            EVALUATION,
            AGAIN,
            *([EXACT] if self.exact else []),
            *dict.fromkeys(arm.queried for arm in arms),
            *(arm.step(n) for arm in arms for n in self.budgets_of(arm.pool)),
            *(
                name
                for pool in self.pools
                for keys in KEYS * self.guarded
                for name in guard_steps(pool, keys)
            ),
            *(refusal_step(pool) for pool in self.pools if self.remote),
        )


def guard_steps(pool: str, keys: int) -> tuple[str, str]:
    """Names of the stages with what the guard sees, and with the copy at the first recognised query."""
    return f"guard-{pool}-{keys}", f"copy-guard-{pool}-{keys}"


def refusal_step(pool: str) -> str:
    """Name of the stage with the copy at the first query that the server refuses."""
    return f"copy-refused-{pool}"


def refuse_few(budgets: Sequence[int], classes: int) -> None:
    """Raise `UsageError` for a budget of less than one query for each class."""
    if budgets[0] < classes:
        raise UsageError(
            f"queries is {budgets[0]:,}, and the model has {classes:,} classes: fewer than one query for each class; "
            "expected more queries",
            Remedy("queries", ",".join(str(n) for n in sorted({max(n, classes) for n in budgets}))),
        )


@dataclass(frozen=True)
class ExtractionRequest:
    """The inputs of an audit of extraction."""

    design: Design
    evaluation: Batch
    """test examples, with the label -1 if it is unknown"""
    pools: Mapping[str, Inputs]
    fresh: Callable[[Draws], Classifier]
    """function that returns a copy with random weights"""
    threat: ThreatModel
    screen: Screen | None
    """what a guard sees of the queries; None without a guard"""
    seed: int


@dataclass
class _Steps:
    run: Run
    model: Classifier
    request: ExtractionRequest
    train: CopyTraining = field(default_factory=CopyTraining)
    answered: dict[bytes, Tensor] = field(default_factory=dict)
    """logits of the inputs that a server has answered, by the hash of the input"""

    @property
    def design(self) -> Design:
        return self.request.design

    @property
    def rng(self) -> Draws:
        return Draws(self.request.seed).at("extraction")

    def asked(self, x: Inputs, stage: str = QUERIES) -> Logits:
        """Logits of inputs in float64. A server is not sent an input again, unless `stage` is another one. A server
        with a guard may refuse any input, also test examples, which does not end the run.
        """
        with purpose(
            stage, 0, "attacks"
        ):  # of one name, so that a resumed run finds the answers of all steps
            if not self.model.remote or stage != QUERIES:
                return copies.logits_in_pieces(self.model, x)
            keys = fingerprints_of(x)
            new = {key: place for place, key in enumerate(keys) if key not in self.answered}
            if new:
                rows = torch.tensor([*new.values()], device=x.device)
                self.answered |= dict(zip(new, copies.logits_in_pieces(self.model, x[rows]), strict=True))
            return torch.stack([self.answered[key] for key in keys])

    @cached_property
    def compared(self) -> tuple[Batch, Labels]:
        """The test examples for which the model returns a prediction, and these."""
        batch = self.request.evaluation

        def labels() -> Columns:
            logits = self.asked(batch.x)
            predicted = logits.argmax(1).masked_fill(refused(logits), -1)
            if (predicted < 0).all():
                raise UsageError(f"the server refuses all {len(batch):,} test examples; give other data")
            return {
                "id": torch.arange(len(batch)),
                "row": batch.ids.cpu(),
                "label": batch.y.cpu(),
                "predicted": predicted,
            }

        predicted: Labels = self.run.stage(EVALUATION, labels).columns["predicted"]
        kept = predicted >= 0
        return batch.take(kept.to(batch.x.device)), predicted[kept]

    def again(self) -> None:
        """Send some test examples again."""
        x = self.compared[0].x[:REPEATED]

        def columns() -> Columns:
            first, second = self.asked(x), self.asked(x, stage=AGAIN)
            lost = refused(second)
            difference = (first.softmax(1) - second.softmax(1)).abs().amax(1)
            return {
                "id": torch.arange(len(x)),
                "same": ((first.argmax(1) == second.argmax(1)) & ~lost).long(),
                "difference": torch.where(lost, 1.0, difference),
            }

        self.run.stage(AGAIN, columns)

    def exact(self) -> None:
        """Extract a softmax model exactly, unless the model is none."""
        x = self.compared[0].x

        def columns() -> Columns:
            not_softmax = {"id": torch.arange(len(x)), "softmax": torch.tensor([0])}
            if len(x) < 2 * copies.PAIRS or not copies.is_softmax(self.asked, x):
                return not_softmax
            found, z = copies.softmax_weights(self.asked, x, self.model.bounds), copies.centred(self.asked(x))
            error = (found(x.cpu()) - z).abs().amax(1)
            if not copies.is_small(
                error, z
            ):  # linear between test examples only, or answers that are not finite
                return not_softmax
            return {
                "id": torch.arange(len(x)),
                "softmax": torch.tensor([1]),
                "features": torch.tensor([len(found.weight)]),
                "predicted": found(x.cpu()).argmax(1),
                "error": error,
            }

        self.run.stage(EXACT, columns)

    def random(self, arm: Arm) -> Columns:
        """The answers to queries that are chosen at random. Those of a smaller budget are the first ones."""
        pool = self.request.pools[arm.pool]
        order = self.rng.at("queries", arm.pool).bits(torch.arange(len(pool))).argsort()
        return self.answers(pool, order[: self.design.budgets_of(arm.pool)[-1]])

    def answers(self, pool: Inputs, rows: Tensor) -> Columns:
        """The answers to some inputs of a pool."""
        logits = self.asked(pool[rows.to(pool.device)])
        lost = refused(logits)
        kept = torch.where(lost[:, None], 0.0, logits).float()
        return {"id": torch.arange(len(rows)), "row": rows, "logits": kept, "refused": lost.long()}

    def k_centre(self, arm: Arm) -> Columns:
        """The answers to queries of which the first budget is chosen at random, and each further one by the copy of the
        budget before. Inputs that the random queries have had answered are not sent again.
        """
        pool, budgets = self.request.pools[arm.pool], self.design.budgets_of(arm.pool)
        random = replace(arm, choice="random")
        known = self.run.stage(random.queried, partial(self.random, random)).columns
        columns = _first(known, budgets[0])
        for queries, following in pairwise(budgets):
            probabilities = copies.logits_in_pieces(self.copy(arm, columns, queries), pool).softmax(1)
            rest = torch.ones(len(pool), dtype=torch.bool)
            rest[columns["row"]] = False
            places = rest.nonzero()[:, 0]
            centres = probabilities[columns["row"]]
            chosen = places[copies.k_centre(probabilities[places], centres, following - queries)]
            new = chosen[~torch.isin(chosen, known["row"])]
            if len(new):
                sent = self.answers(pool, new)
                known = {name: torch.cat((values, sent[name])) for name, values in known.items()}
            at = torch.empty(len(pool), dtype=torch.int64)
            at[known["row"]] = torch.arange(len(known["row"]))
            rows = torch.cat((columns["row"], chosen))
            columns = {name: values[at[rows]] for name, values in known.items()}
        return {**columns, "id": torch.arange(len(columns["id"]))}

    def copy(self, arm: Arm, answered: Columns, queries: int) -> Classifier:
        """Train a copy on the first answers of an arm."""
        answered, pool = _first(answered, queries), self.request.pools[arm.pool]
        kept = answered["refused"] == 0
        x = pool[answered["row"][kept].to(pool.device)]
        targets = copies.revealed(answered["logits"][kept].softmax(1), arm.answers).to(x)
        # of one name for all answers, so that copies differ by these alone and not by their initial weights
        rng = self.rng.at("copy", arm.pool, self.design.result.answers, arm.choice, queries)
        return self.train(self.request.fresh(rng.at("begin")), x, targets, rng.at("training"))

    def measured(self, arm: Arm, answered: Columns, queries: int, *, attacked: bool) -> Columns:
        """What a copy predicts for the test examples, and the answers of the model to examples made on it."""
        n_answers = int((answered["refused"][:queries] == 0).sum())
        (batch, answers), n = self.compared, len(self.compared[1])
        if n_answers < self.design.classes:
            return {"id": torch.arange(n), "predicted": torch.full((n,), -1)}
        copy = self.copy(arm, answered, queries)
        columns = {"id": torch.arange(n), "predicted": copies.logits_in_pieces(copy, batch.x).argmax(1)}
        if not attacked or not self.design.attacked:
            return columns
        places = self.rng.at("attacked").bits(batch.ids.cpu()).argsort()[: self.design.attacked]
        part, predicted = batch.take(places.to(batch.x.device)), answers[places]
        y = torch.where(part.y < 0, predicted.to(part.y.device), part.y)
        threat = replace(self.request.threat, surrogates=(copy,))
        x_adv = Transfer()(self.model, part.labelled(y), threat, rng=self.rng.at("transfer"))
        logits, before = self.asked(x_adv), predicted == y.cpu()
        after = before & ((logits.argmax(1) == y.cpu()) | refused(logits))
        return columns | {"place": places, "before": before.long(), "after": after.long()}

    def guarded(self, pool: str, keys: int) -> None:
        """Pass the random queries of a pool through the guard, and train a copy on the answers before the first query
        that it recognises.
        """
        arm, screen = replace(self.design.result, pool=pool), self.request.screen
        assert screen is not None
        answered, (seen, copied) = self.run.stage(arm.queried, dict).columns, guard_steps(pool, keys)

        def columns() -> Columns:
            x = self.request.pools[pool]
            masks = screen(x[answered["row"].to(x.device)], answered["logits"], keys)
            return {"id": answered["id"], **{name: mask.long() for name, mask in masks.items()}}

        self.until(recognised(self.run.stage(seen, columns).columns), arm, copied)

    def until(self, hits: Mask, arm: Arm, step: str) -> None:
        """Train a copy on the answers before the first query of an arm in a mask."""
        answered, queries = self.run.stage(arm.queried, dict).columns, before_first(hits)

        def copy() -> Columns:
            if queries < len(hits):
                return self.measured(arm, answered, queries, attacked=False)
            largest = self.run.stage(arm.step(len(hits)), dict).columns  # the copy of all answers
            return {name: largest[name] for name in ("id", "predicted")}

        self.run.stage(step, copy)


def measure(run: Run, model: Classifier, request: ExtractionRequest) -> Images:
    """Take the steps of the audit that are not stored in the run. `model` is in eval mode.

    The answers to the queries of each pool are stored, and those of smaller budgets and of answers that reveal less are
    derived from them, so that no query is sent twice.
    """
    steps = _Steps(run, model, request)
    steps.again()
    if request.design.exact:
        steps.exact()
    for arm in request.design.arms():
        ask = steps.random if arm.choice == "random" else steps.k_centre
        answered = run.stage(arm.queried, partial(ask, arm)).columns
        budgets = request.design.budgets_of(arm.pool)
        for n in budgets:
            run.stage(arm.step(n), partial(steps.measured, arm, answered, n, attacked=n == budgets[-1]))
    for pool, keys in product(request.design.pools, KEYS * request.design.guarded):
        steps.guarded(pool, keys)
    for pool in request.design.pools if request.design.remote else ():
        arm = replace(request.design.result, pool=pool)
        steps.until(run.stage(arm.queried, dict).columns["refused"] == 1, arm, refusal_step(pool))
    return dict


def _first(columns: Columns, n: int) -> Columns:
    return {name: values[:n] for name, values in columns.items()}


def recognised(seen: Columns) -> Mask:
    """Queries that a guard refuses or that its query detector recognises."""
    return (seen["stateful"] == 1) | (seen["refused"] == 1)


def before_first(mask: Mask) -> int:
    """Number of queries before the first in a mask, or of all if there is none."""
    return int(mask.nonzero()[0]) if mask.any() else len(mask)
