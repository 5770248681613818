"""The audit of membership: an attacker's success in telling training examples from others, and its controls.

A training procedure is audited on networks that are trained on random halves of the data, each of which is the target
in turn. A given model is audited on its training examples and on others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from holdfast.audits.finding import Finding
from holdfast.audits.membership import controls, rates, scores
from holdfast.audits.membership.how import MembershipAudit
from holdfast.audits.membership.references import Signals, halves, others
from holdfast.audits.membership.report import Results, finding_of
from holdfast.core.batch import Batch
from holdfast.core.evidence import Columns
from holdfast.core.types import Mask, PerExample
from holdfast.runs.engine.run import Run, Shards

PIECE = 1000
"""number of examples that the model is queried on in one step of a run"""
NETWORKS, SCORES = "networks", "scores"
"""names of the stages with what each reference network says about the examples, and with the score of each example"""

Query = Callable[[Batch], Signals]
"""function that returns what the model says about examples"""


def steps(how: MembershipAudit) -> tuple[str, ...]:
    """Return the names of the stages in their order."""
    queried = [] if how.members is None else [_queries(at) for at in range(0, len(how.examples), PIECE)]
    return (*queried, *([NETWORKS] if how.networks else []), SCORES)


def _queries(first: int) -> str:
    return f"answers-{first}"


@dataclass(frozen=True)
class Case:
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

    def scores(self, *, labels: bool) -> dict[str, PerExample]:
        """Return the scores of all attacks by name, the headline first. With `labels`, the target gives only labels."""
        results: dict[str, PerExample] = {}
        known, inside = self.references, self.inside
        if known is not None and inside is not None and not labels:
            results["BaVarIA"] = scores.bavaria(self.target, known.phi, inside)
            results["LiRA online"] = scores.lira_online(self.target, known.phi, inside)
            results["LiRA offline"] = scores.lira_offline(self.target, known.phi, inside)
            results["RMIA"] = scores.rmia(self.target, known.phi, inside)
        if not labels:
            results["loss"] = scores.loss(self.target)
        results["label only"] = scores.labels_only(self.right, None if known is None else known.right, inside)
        return results


@dataclass(frozen=True)
class Measured:
    """The targets of an audit, and the same targets with halves that nobody was trained on."""

    cases: Sequence[Case]
    nulls: Sequence[Case]
    labels: bool
    """whether the targets give labels only"""
    probabilities: bool
    """whether the targets give probabilities that are used as logits"""


def membership_finding(
    run: Run, how: MembershipAudit, query: Query | None, notes: Sequence[str] = ()
) -> Finding:
    """Take the steps of the audit, and return its finding. `notes` are sentences about the reference networks, which
    the executor of the run trains, in shards of network numbers.

    Without `query` a training procedure is audited, otherwise the model that answers.
    """
    found = _of_procedure(run, how) if query is None else _of_model(run, how, query)
    scored = [case.scores(labels=found.labels) for case in found.cases]
    members = [case.member for case in found.cases]
    headline = [next(iter(each.values())) for each in scored]
    columns = run.stage(SCORES, partial(_per_example, how, headline, members)).columns
    nulls = [
        rates.auc(next(iter(case.scores(labels=found.labels).values())), case.member) for case in found.nulls
    ]
    first = found.cases[0]
    tail = None
    if how.members is not None and not found.labels:
        tail = scores.tail_estimate(first.target[first.member], first.target[~first.member], how.fpr)
    return finding_of(
        how,
        Results(
            scored,
            members,
            columns,
            null_auc=sum(nulls) / len(nulls),
            blind_auc=controls.blind_auc(how.examples, first.member, how.classes, how.rng.at("blind")),
            accuracy=_mean([float(case.right[case.member].double().mean()) for case in found.cases]),
            other_accuracy=_mean([float(case.right[~case.member].double().mean()) for case in found.cases]),
            tail=tail,
            labels=found.labels,
            probabilities=found.probabilities,
            rounded=not found.labels and any(controls.is_rounded(case.target) for case in found.cases),
        ),
        notes,
    )


def _of_procedure(run: Run, how: MembershipAudit) -> Measured:
    """Every network is a target, compared with the others but that of the complementary half."""
    signals = _trained(run, how)

    def cases(inside: Tensor) -> list[Case]:
        return [
            Case(
                signals.phi[k],
                signals.right[k],
                inside[k],
                signals.of(rest := others(k, how.networks)),
                inside[rest],
            )
            for k in range(how.networks)
        ]

    labels, probabilities = bool(signals.labels.all()), bool(signals.probabilities.all())
    return Measured(cases(how.inside()), cases(how.null()), labels, probabilities)


def _of_model(run: Run, how: MembershipAudit, query: Query) -> Measured:
    parts = []
    for first in range(0, len(how.examples), PIECE):
        rows = torch.arange(first, min(first + PIECE, len(how.examples)))
        parts.append(run.stage(_queries(first), partial(_answers, query, how.examples, rows)).columns)
    signals = Signals.over_examples([_answered(part) for part in parts])
    references = _trained(run, how) if how.networks else None
    case = Case(
        signals.phi[0], signals.right[0], how.member, references, None if references is None else how.inside()
    )
    nobody = halves(how.places, 2, how.rng.at("null target"))[0]
    null = replace(case, member=nobody, inside=None if references is None else how.null())
    return Measured([case], [null], bool(signals.labels), bool(signals.probabilities))


def _answers(query: Query, examples: Batch, rows: Tensor) -> dict[str, Tensor]:
    signals = query(examples.take(rows))
    return {
        "id": rows,
        "phi": signals.phi[0],
        "right": signals.right[0].long(),
        "labels": torch.full((len(rows),), int(signals.labels)),
        "probabilities": torch.full((len(rows),), int(signals.probabilities)),
    }


def _answered(columns: Columns) -> Signals:
    """Signals of the one model whose answers the columns contain."""
    labels, probabilities = (columns[name][:1] == 1 for name in ("labels", "probabilities"))
    return Signals(columns["phi"][None], columns["right"][None] == 1, labels, probabilities)


def columns_of(networks: Sequence[int], signals: Signals) -> Columns:
    """Return the columns of a shard: what its networks say about all examples."""
    return {
        "id": torch.tensor(networks),
        "phi": signals.phi,
        "right": signals.right.long(),
        "labels": signals.labels.long(),
        "probabilities": signals.probabilities.long(),
    }


def _trained(run: Run, how: MembershipAudit) -> Signals:
    """Signals of the reference networks, which are trained in shards that are stored."""

    def report(done: Mapping[int, Columns], epochs: int) -> None:
        finished = how.epochs * sum(len(columns["id"]) for columns in done.values())
        run.report(NETWORKS, finished + epochs, how.epochs * how.networks, 0, 0)

    def joined(parts: Sequence[Columns]) -> Columns:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def shards() -> Shards:
        return Shards(lambda shard: None, run.shards.__getitem__, joined, report, timed=False)

    columns = run.sharded_stage(NETWORKS, shards).columns
    right, labels, probabilities = (columns[name] == 1 for name in ("right", "labels", "probabilities"))
    return Signals(columns["phi"], right, labels, probabilities)


def _per_example(
    how: MembershipAudit, headline: Sequence[PerExample], members: Sequence[Mask]
) -> dict[str, Tensor]:
    """For each example, the mean score of the networks that were trained on it and of the others, and the share of the
    networks that were trained on it in which it is found.
    """
    score, member = torch.stack(list(headline)), torch.stack(list(members))
    hit = torch.stack(
        [rates.found(each, mask, how.fpr) for each, mask in zip(headline, members, strict=True)]
    )
    n = member.sum(0)
    return {
        "id": how.places,
        "row": how.examples.ids.cpu(),
        "label": how.examples.y.cpu(),
        "trainings": n,
        "score": torch.where(member, score, 0.0).sum(0) / n,
        "score_outside": torch.where(member, 0.0, score).sum(0) / (~member).sum(0),
        "found": (hit & member).sum(0).double() / n,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
