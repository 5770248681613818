"""The audit of membership: an attacker's success in telling training examples from others, and its controls.

A training procedure is audited on networks that are trained on random halves of the data, each of which is the target
in turn. A given model is audited on its training examples and on others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NotRequired

import torch
from pydantic import Field, Strict
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.finding import Finding, Size, StoredSteps
from holdfast.audits.membership import references, scores
from holdfast.audits.membership.references import Design, MembershipAudit, Signals, halves, others
from holdfast.audits.membership.report import Results, finding_of
from holdfast.audits.membership.scores import LARGEST
from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, PerExample
from holdfast.runs.engine.run import Run, Shards
from holdfast.runs.store.columns import IDS, Form, flag, whole
from holdfast.runs.store.forms import Count, Flag

PIECE = 1000
"""number of examples that the model is queried on in one step of a run"""
EXAMPLES, NETWORKS, SCORES = "examples", "networks", "scores"
"""names of the stages with the labels of the examples, with what each reference network says about them, and with the
score of each example"""
SEEDS, SENT = "seeds", "sent"
"""names of the documents that state whether a training function ignores its seed, and how many rows were sent"""

Query = Callable[[Batch], Signals]
"""function that returns what the model says about examples"""


def steps(how: MembershipAudit) -> tuple[str, ...]:
    """Return the names of the stages in their order."""
    return (EXAMPLES, *_queried(how.design), *([NETWORKS] if how.design.networks else []), SCORES)


def _queried(design: Design) -> list[str]:
    """Names of the stages with what the model says about examples."""
    return [] if design.members is None else [_queries(at) for at in range(0, design.n, PIECE)]


def _queries(first: int) -> str:
    return f"answers-{first}"


@dataclass(frozen=True)
class MembershipTarget:
    """One target, and what an attacker knows about it."""

    target: PerExample
    """signal of each example (n)"""
    right: Mask
    """whether the target predicts the label (n)"""
    member: Mask
    """whether the target was trained on the example (n), which the attacker does not know"""
    references: Signals | None = None
    inside: Tensor | None = None
    """examples that each reference network was trained on (networks, n)"""

    def attacks(self, *, labels: bool) -> dict[str, Callable[[], PerExample]]:
        """Return the functions that compute the scores of the attacks by name, the headline first. With `labels`, the
        target gives only labels.
        """
        known, inside, results = self.references, self.inside, dict[str, Callable[[], PerExample]]()
        if known is not None and inside is not None and not labels:
            given = (self.target, known.scaled_logit, inside)
            results["BaVarIA"] = partial(scores.bavaria, *given)
            results["LiRA online"] = partial(scores.lira_online, *given)
            results["LiRA offline"] = partial(scores.lira_offline, *given)
            results["RMIA"] = partial(scores.rmia, *given)
        if not labels:
            results["loss"] = partial(scores.loss, self.target)
        of_references = None if known is None else known.right
        results["label only"] = partial(scores.labels_only, self.right, of_references, inside)
        return {name: partial(_rounded, score) for name, score in results.items()}

    def headline(self, *, labels: bool) -> PerExample:
        """Return the scores of the attack that is the result."""
        return next(iter(self.attacks(labels=labels).values()))()


@dataclass(frozen=True)
class MembershipTargets:
    """The targets of an audit, and the same targets with halves that no network was trained on."""

    cases: Sequence[MembershipTarget]
    nulls: Sequence[MembershipTarget]
    labels: bool
    """whether the targets give labels only"""
    probabilities: bool
    """whether the targets give probabilities that are used as logits"""


def measure(run: Run, how: MembershipAudit, query: Query | None) -> None:
    """Take the steps of the audit but the scores, which follow from them. The executor of the run trains the reference
    networks, in shards of network numbers.

    Without `query` a training procedure is audited, otherwise the model that answers.
    """
    design = how.design

    def examples() -> Columns:
        group = torch.full((design.n,), -1)
        for place, mask in enumerate(design.groups.values()):
            group[mask] = place
        blind = references.blind_scores(how.examples, design.member, how.classes, design.rng.at("blind"))
        return {
            "id": design.places,
            "row": how.examples.ids.cpu(),
            "label": how.examples.y.cpu(),
            "group": group,
            "blind": blind,
        }

    run.stage(EXAMPLES, examples)
    if query is not None:
        for first in range(0, design.n, PIECE):
            rows = torch.arange(first, min(first + PIECE, design.n))
            run.stage(_queries(first), partial(_answers, query, how.examples, rows))
    if design.networks:
        _train(run, how)


class _Training(TypedDict):
    name: NotRequired[str]


class _Settings(TypedDict):
    networks: Size
    fpr: Annotated[float, Strict(), Field(gt=1e-9, lt=1)]
    members: Size | None
    groups: list[str]
    train: _Training | None


class _Seeds(TypedDict):
    ignored: Flag


class _Sent(TypedDict):
    rows: Count


def concluded(steps: StoredSteps) -> Finding:
    """Return the finding of an audit from its stored steps."""
    settings = steps.settings(_Settings)
    design, examples, found = _measured(steps, settings)
    columns = _per_example(design, examples, found)
    _refuse_other_scores(steps, columns)
    scored = [
        {name: score() for name, score in case.attacks(labels=found.labels).items()} for case in found.cases
    ]
    members = [case.member for case in found.cases]
    nulls = [scores.auc(case.headline(labels=found.labels), case.member) for case in found.nulls]
    first = found.cases[0]
    tail = None
    if design.members is not None and not found.labels:
        tail = scores.tail_estimate(first.target[first.member], first.target[~first.member], design.fpr)
    training = (settings["train"] or {}).get("name")
    finding = finding_of(
        design,
        Results(
            scored,
            members,
            columns,
            null_auc=sum(nulls) / len(nulls),
            blind_auc=scores.auc(examples["blind"], first.member),
            accuracy=_mean([float(case.right[case.member].double().mean()) for case in found.cases]),
            other_accuracy=_mean([float(case.right[~case.member].double().mean()) for case in found.cases]),
            tail=tail,
            labels=found.labels,
            probabilities=found.probabilities,
            rounded=not found.labels and any(references.is_rounded(case.target) for case in found.cases),
        ),
        ()
        if training is None or not steps.document(SEEDS, _Seeds)["ignored"]
        else (_same_network(training),),
    )
    sent = {} if steps.source.document(SENT) is None else {"rows_sent": steps.document(SENT, _Sent)["rows"]}
    return replace(finding, facts={**finding.facts, **sent}, pictures=steps.pictures(finding.pictures))


def scores_of(steps: StoredSteps) -> Columns:
    """Return the score of each example, from the stored steps before."""
    return _per_example(*_measured(steps, steps.settings(_Settings)))


def _same_network(training: str) -> str:
    return (
        f"{training} returns the same network for two seeds. Its random choices are then known to the attacker, and "
        "the rates may be too high for a training that does not fix them."
    )


def _measured(steps: StoredSteps, settings: _Settings) -> tuple[Design, Columns, MembershipTargets]:
    """The design of an audit, the columns of its examples, and its targets. Raises `TargetError` if steps contradict
    each other or the settings.
    """
    named = settings["groups"]
    examples = steps.columns(EXAMPLES, {**_OF_EXAMPLES, "group": whole("n", low=-1, high=len(named) - 1)})
    n, members = len(examples["id"]), settings["members"]
    if n < 2 or (members is not None and not 0 < members < n):
        raise steps.refuse(EXAMPLES, f"{n:,} examples", "members and non-members")
    networks = settings["networks"]
    if networks % 2 or (members is None and networks < 4):
        raise steps.refuse(NETWORKS, f"{networks} networks by the settings", "an even number of at least 4")
    references = _references(steps, networks, n) if networks else None
    groups = {name: examples["group"] == place for place, name in enumerate(named)}
    design = Design(n, networks, settings["fpr"], steps.manifest["seed"], members, groups)
    scores.refuse_few(design.fpr, n // 2 if members is None else n - members)
    if members is None:
        assert references is not None
        return design, examples, _of_procedure(design, references)
    return design, examples, _of_model(design, _answered(steps, design), references)


_OF_EXAMPLES = {"id": whole("n"), "row": IDS, "label": whole("n", low=-1), "blind": Form()}
_SIGNALS = {"labels": flag("m"), "probabilities": flag("m")}


def _references(steps: StoredSteps, networks: int, n: int) -> Signals:
    """Signals of the reference networks."""
    forms = {"phi": Form(("m", "n"), low=-LARGEST, high=LARGEST), "right": flag("m", "n"), **_SIGNALS}
    columns = steps.columns(NETWORKS, forms, m=networks, n=n)
    right, labels, probabilities = (columns[name] == 1 for name in ("right", "labels", "probabilities"))
    return Signals(columns["phi"], right, labels, probabilities)


def _answered(steps: StoredSteps, design: Design) -> Signals:
    """Signals of the audited model."""
    forms = {"phi": Form(("m",), low=-LARGEST, high=LARGEST), "right": flag("m"), **_SIGNALS}
    parts = []
    for place, name in enumerate(_queried(design)):
        columns = steps.columns(name, forms, m=min(PIECE, design.n - place * PIECE))
        labels, probabilities = (columns[name][:1] == 1 for name in ("labels", "probabilities"))
        parts.append(Signals(columns["phi"][None], columns["right"][None] == 1, labels, probabilities))
    return Signals.over_examples(parts)


def _of_procedure(design: Design, signals: Signals) -> MembershipTargets:
    """Every network is a target, compared with the others but that of the complementary half."""

    def cases(inside: Tensor) -> list[MembershipTarget]:
        return [
            MembershipTarget(
                signals.scaled_logit[k],
                signals.right[k],
                inside[k],
                signals.of(rest := others(k, design.networks)),
                inside[rest],
            )
            for k in range(design.networks)
        ]

    labels, probabilities = bool(signals.labels.all()), bool(signals.probabilities.all())
    return MembershipTargets(cases(design.inside()), cases(design.null()), labels, probabilities)


def _of_model(design: Design, signals: Signals, references: Signals | None) -> MembershipTargets:
    inside, null_inside = (None, None) if references is None else (design.inside(), design.null())
    case = MembershipTarget(signals.scaled_logit[0], signals.right[0], design.member, references, inside)
    untrained = halves(design.places, 2, design.rng.at("null target"))[0]
    null = replace(case, member=untrained, inside=null_inside)
    return MembershipTargets([case], [null], bool(signals.labels), bool(signals.probabilities))


def _answers(query: Query, examples: Batch, rows: Tensor) -> dict[str, Tensor]:
    signals = query(examples.take(rows))
    return {
        "id": rows,
        "phi": signals.scaled_logit[0],
        "right": signals.right[0].long(),
        "labels": torch.full((len(rows),), int(signals.labels)),
        "probabilities": torch.full((len(rows),), int(signals.probabilities)),
    }


def columns_of(networks: Sequence[int], signals: Signals) -> Columns:
    """Return the columns of a shard: what its networks say about all examples."""
    return {
        "id": torch.tensor(networks),
        "phi": signals.scaled_logit,
        "right": signals.right.long(),
        "labels": signals.labels.long(),
        "probabilities": signals.probabilities.long(),
    }


def _train(run: Run, how: MembershipAudit) -> None:
    """Train the reference networks in shards that are stored."""

    def report(done: Mapping[int, Columns], epochs: int) -> None:
        finished = how.epochs * sum(len(columns["id"]) for columns in done.values())
        run.report(NETWORKS, finished + epochs, how.epochs * how.design.networks, 0, 0)

    def joined(parts: Sequence[Columns]) -> Columns:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def shards() -> Shards:
        return Shards(lambda shard: None, run.shards.__getitem__, joined, report, timed=False)

    run.sharded_stage(NETWORKS, shards)


def _per_example(design: Design, examples: Columns, found: MembershipTargets) -> dict[str, Tensor]:
    """For each example, the mean score of the networks that were trained on it and of the others, and the share of the
    networks that were trained on it in which it is found.
    """
    headline = [case.headline(labels=found.labels) for case in found.cases]
    score, member = torch.stack(headline), torch.stack([case.member for case in found.cases])
    hit = torch.stack(
        [scores.found(each, mask, design.fpr) for each, mask in zip(score, member, strict=True)]
    )
    n = member.sum(0)
    return {
        "id": design.places,
        "row": examples["row"],
        "label": examples["label"],
        "trainings": n,
        "score": torch.where(member, score, 0.0).sum(0) / n,
        "score_outside": torch.where(member, 0.0, score).sum(0) / (~member).sum(0),
        "found": (hit & member).sum(0).double() / n,
    }


def _refuse_other_scores(steps: StoredSteps, expected: Columns) -> None:
    """Raise `TargetError` if the stored scores of the examples do not follow from the other steps."""
    forms = {name: Form(nan=True) if each.is_floating_point() else IDS for name, each in expected.items()}
    stored = steps.columns(SCORES, forms, n=len(expected["id"]))
    for name, each in expected.items():
        if not torch.allclose(stored[name].double(), each.double(), rtol=1e-6, atol=1e-9, equal_nan=True):
            raise steps.refuse(
                SCORES, f"another column {name!r} than follows from the signals", "that column"
            )


def _rounded(score: Callable[[], PerExample]) -> PerExample:
    """Scores in float32, so that equal examples have equal ones, whichever instructions computed the last digits."""
    return score().float().double()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
