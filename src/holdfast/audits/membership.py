"""The audit of membership: an attack with reference networks, and its finding."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NotRequired

import torch
from pydantic import Field, Strict
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits import membership_references
from holdfast.audits.finding import (
    AuditVerdict,
    Curve,
    Finding,
    Line,
    Picture,
    Size,
    StoredSteps,
    Table,
    in_unit_range,
)
from holdfast.audits.membership_references import LARGEST, Design, MembershipAudit, Signals, halves, others
from holdfast.core.batch import Batch
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Inputs, Mask, PerExample
from holdfast.reports.words import percent
from holdfast.runs.engine.run import Run, Shards
from holdfast.runs.store.columns import IDS, Count, Flag, Form, flag, whole

METRIC = "membership_tpr_at_1_percent"
METRIC_FPR = 0.01
_RATES = (0.001, 0.01, 0.1)
_WEAK = ("loss", "label only")
"""attacks that need no reference networks; that they find nothing is no result"""
_SHOWN, _POINTS = 12, 41
_EXPOSED = "exposed"


@dataclass(frozen=True)
class Results:
    """What an audit measured."""

    scores: Sequence[Mapping[str, PerExample]]
    """for each target, the scores of each attack by name, the headline first"""
    members: Sequence[Mask]
    columns: Columns
    """the stored score of each example"""
    null_auc: float
    """area under the curve of the headline on two halves that no network was trained on"""
    blind_auc: float
    """area under the curve of a classifier without the model"""
    accuracy: float
    """accuracy of the targets on the examples that they were trained on"""
    other_accuracy: float
    tail: float | None
    labels: bool
    """whether the targets give labels only"""
    probabilities: bool
    """whether the targets give probabilities that are used as logits"""
    rounded: bool

    @property
    def headline(self) -> str:
        """Name of the attack whose rate is the result."""
        return next(iter(self.scores[0]))

    def rate(self, attack: str, fpr: float) -> Estimate:
        """Return the true-positive rate of an attack: the mean of several targets, or that of the only one."""
        if len(self.scores) == 1:
            return membership_references.tpr_of_one(self.scores[0][attack], self.members[0], fpr)
        return membership_references.mean_of_networks(self._of_each(attack, fpr))

    def auc(self, attack: str) -> float:
        """Return the mean area under the curve of an attack."""
        values = [
            membership_references.auc(s[attack], m) for s, m in zip(self.scores, self.members, strict=True)
        ]
        return sum(values) / len(values)

    def mean_rate(self, attack: str, fpr: float) -> float:
        """Return the mean true-positive rate of an attack over the targets."""
        values = self._of_each(attack, fpr)
        return sum(values) / len(values)

    def _of_each(self, attack: str, fpr: float) -> list[float]:
        return [
            membership_references.tpr(s[attack], m, fpr)
            for s, m in zip(self.scores, self.members, strict=True)
        ]


def finding_of(how: Design, results: Results, notes: Sequence[str]) -> Finding:
    """Return the finding: `flagged` if members are found more often than the false-positive rate, `unclear` if a
    control fails, or if a weak attack finds nothing.
    """
    rate = results.rate(results.headline, how.fpr)
    n_members = int(results.members[0].sum())
    n_others = how.n - n_members
    verdict, reasons = _judged(how, results, rate, membership_references.width(n_members, n_others))
    metrics = {}
    if n_others >= membership_references.needed(METRIC_FPR):
        metrics[METRIC] = results.rate(results.headline, METRIC_FPR)
    subject = "the training procedure" if how.members is None else "the model"
    headline = (
        f"an attacker ({results.headline}) finds {percent(rate.value)} of the training examples of {subject} "
        f"({percent(rate.low)} to {percent(rate.high)}) at a false-positive rate of {_percent(how.fpr)}"
    )
    if failed := _failed_control(results, membership_references.width(n_members, n_others)):
        headline = f"{failed}, so that no rate is stated"
    return Finding(
        verdict,
        headline,
        [*reasons, f"each target has {n_members:,} members and {n_others:,} non-members"],
        _facts(how, results, rate, n_members, n_others),
        metrics,
        (_attacks(how, results, n_others), *_exposed(results), *_by_group(how, results)),
        _pictures(results),
        (_curve(results, n_others),),
        _limits(how, results, notes),
    )


def _judged(how: Design, results: Results, rate: Estimate, width: float) -> tuple[AuditVerdict, list[str]]:
    allowed = f"allowed: {0.5 - width:.2f} to {0.5 + width:.2f}"
    reasons = [
        f"without the model, members and non-members are told apart with an AUC of {results.blind_auc:.3f}, {allowed}",
        f"on two halves that no network was trained on, the attack has an AUC of {results.null_auc:.3f}, {allowed}",
        f"the accuracy is {percent(results.accuracy)} on members and {percent(results.other_accuracy)} on non-members",
    ]
    verdict: AuditVerdict = "flagged" if rate.low > how.fpr else "not flagged"
    if verdict == "not flagged" and results.headline in _WEAK:
        verdict = "unclear"
        reasons.insert(
            0, f"{results.headline} finds few members of most models, also of those that reveal many"
        )
    if failed := _failed_control(results, width):
        verdict = "unclear"
        reasons.insert(0, f"{failed}, so that the rates do not measure membership")
    return verdict, reasons


def _failed_control(results: Results, width: float) -> str:
    """State which control failed; empty if none did."""
    if abs(results.null_auc - 0.5) > width:
        return "the attack finds members where there are none"
    return "members and non-members differ in kind" if abs(results.blind_auc - 0.5) > width else ""


def _facts(how: Design, results: Results, rate: Estimate, n_members: int, n_others: int) -> dict[str, object]:
    return {
        "audited": "procedure" if how.members is None else "model",
        "networks": how.networks,
        "references_of_each_target": how.networks - 2 if how.members is None else how.networks,
        "targets": len(results.scores),
        "members": n_members,
        "non_members": n_others,
        "fpr": how.fpr,
        "attack": results.headline,
        "tpr": rate.value,
        "tpr_low": rate.low,
        "tpr_high": rate.high,
        "attacks": {
            name: {"auc": results.auc(name), "tpr": results.mean_rate(name, how.fpr)}
            for name in results.scores[0]
        },
        "blind_auc": results.blind_auc,
        "null_auc": results.null_auc,
        "accuracy_members": results.accuracy,
        "accuracy_non_members": results.other_accuracy,
        "tail_estimate": results.tail,
        "labels_only": results.labels,
        "undeclared_probabilities": results.probabilities,
        "rounded": results.rounded,
    }


def _attacks(how: Design, results: Results, n_others: int) -> Table:
    shown = sorted({*_RATES, how.fpr})

    def cell(attack: str, fpr: float) -> str:
        if n_others < membership_references.needed(fpr):
            return f"needs {membership_references.needed(fpr):,} non-members"
        return percent(results.mean_rate(attack, fpr))

    note = "TPR is the share of the training examples that are found. The first attack is the result, chosen before."
    if results.tail is not None:
        note += f" The tail of the losses predicts that attacks with reference networks find {percent(results.tail)}."
    return Table(
        "Attacks",
        ("attack", "AUC", *(f"TPR at {_percent(fpr)} FPR" for fpr in shown)),
        [
            (name, round(results.auc(name), 3), *(cell(name, fpr) for fpr in shown))
            for name in results.scores[0]
        ],
        note,
    )


def _most_exposed(columns: Columns) -> list[int]:
    """Places of the members that are found most often, those with the largest scores first, without those that are not
    found.
    """
    score = torch.where(columns["trainings"] > 0, columns["score"], -torch.inf)
    by_score = score.argsort(descending=True, stable=True)
    often = torch.nan_to_num(columns["found"], nan=-1.0)[by_score].argsort(descending=True, stable=True)
    return [int(place) for place in by_score[often][:_SHOWN] if columns["found"][place] > 0]


def _exposed(results: Results) -> list[Table]:
    columns, places = results.columns, _most_exposed(results.columns)
    several = len(results.scores) > 1
    table = Table(
        "Most exposed training examples",
        ("row", "label", "found", "score as a member", *(["score otherwise"] if several else [])),
        [
            (
                int(columns["row"][k]),
                int(columns["label"][k]),
                percent(float(columns["found"][k]), 0),
                round(float(columns["score"][k]), 2),
                *([round(float(columns["score_outside"][k]), 2)] if several else []),
            )
            for k in places
        ],
        "Found is the share of the networks trained on the example in which it is found. The folder of the run has the "
        "scores of all examples.",
    )
    return [table] if places else []


def _by_group(how: Design, results: Results) -> list[Table]:
    columns = results.columns
    masks = dict(how.groups) or {
        str(label): columns["label"] == label for label in torch.unique(columns["label"]).tolist()
    }
    rows: list[tuple[str, int, str]] = []
    for name, mask in masks.items():
        inside = mask & (columns["trainings"] > 0)
        if inside.any():
            weights = columns["trainings"][inside].double()
            share = float((columns["found"][inside] * weights).sum() / weights.sum())
            rows.append((name, int(inside.sum()), percent(share)))
    title, heading = ("Groups", "group") if how.groups else ("Classes", "class")
    return [Table(title, (heading, "training examples", "found"), rows)]


def _pictures(results: Results) -> list[Picture]:
    columns, places = results.columns, _most_exposed(results.columns)
    captions = [
        f"row {int(columns['row'][k])}, label {int(columns['label'][k])}, found "
        f"{percent(float(columns['found'][k]), 0)}"
        for k in places
    ]
    return [Picture(_EXPOSED, "The most exposed training examples", captions)] if places else []


def images_of(x: Inputs, columns: Columns) -> dict[str, Tensor]:
    """Return the images of the most exposed training examples."""
    return {_EXPOSED: in_unit_range(x[_most_exposed(columns)], float(x.min()), float(x.max()))}


def _curve(results: Results, n_others: int) -> Curve:
    least = 10 ** math.ceil(math.log10(1 / n_others))
    grid = [10 ** (math.log10(least) * (1 - k / (_POINTS - 1))) for k in range(_POINTS)]
    usable = [fpr for fpr in grid if fpr * n_others >= 1]
    names = dict.fromkeys((results.headline, "loss" if not results.labels else results.headline))
    lines = [Line(name, [(fpr, results.mean_rate(name, fpr)) for fpr in usable]) for name in names]
    return Curve(
        "Share of the training examples that are found",
        "false-positive rate",
        "true-positive rate",
        [*lines, Line("chance", [(fpr, fpr) for fpr in usable])],
        least,
        f"Below {membership_references.EXPECTED / n_others:.2g}, "
        f"fewer than {membership_references.EXPECTED} false positives are expected.",
    )


def _limits(how: Design, results: Results, notes: Sequence[str]) -> list[str]:
    limits = [
        "A low rate is no proof of privacy: other attacks may find more. Only differential privacy bounds them."
    ]
    if how.members is None:
        limits.append(
            "The networks are trained on half of the data each; a network of all data may leak less."
        )
    elif not how.networks:
        limits.append(
            "No reference networks were used. Attacks with them usually find many more training examples: give "
            "references and train."
        )
    subject = "The networks give" if how.members is None else "The model gives"
    if results.labels:
        limits.append(
            f"{subject} labels only, so that only the attack on labels was measured; attacks that query many changed "
            "copies of an example find more."
        )
    if results.probabilities:
        limits.append(
            f"{subject} probabilities, which were used as logits, and this distorts the scores of the attacks; repeat "
            "the audit with the setting model_output: probability."
        )
    if results.rounded:
        limits.append(
            "Many examples have equal probabilities, as after rounding, which hides members from attacks on "
            "probabilities and not from others; audit the model before rounding."
        )
    return [*limits, *notes]


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


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
            results["BaVarIA"] = partial(membership_references.bavaria, *given)
            results["LiRA online"] = partial(membership_references.lira_online, *given)
            results["LiRA offline"] = partial(membership_references.lira_offline, *given)
            results["RMIA"] = partial(membership_references.rmia, *given)
        if not labels:
            results["loss"] = partial(membership_references.loss, self.target)
        of_references = None if known is None else known.right
        results["label only"] = partial(membership_references.labels_only, self.right, of_references, inside)
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
        blind = membership_references.blind_scores(
            how.examples, design.member, how.classes, design.rng.at("blind")
        )
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
    nulls = [
        membership_references.auc(case.headline(labels=found.labels), case.member) for case in found.nulls
    ]
    first = found.cases[0]
    tail = None
    if design.members is not None and not found.labels:
        tail = membership_references.tail_estimate(
            first.target[first.member], first.target[~first.member], design.fpr
        )
    training = (settings["train"] or {}).get("name")
    finding = finding_of(
        design,
        Results(
            scored,
            members,
            columns,
            null_auc=sum(nulls) / len(nulls),
            blind_auc=membership_references.auc(examples["blind"], first.member),
            accuracy=_mean([float(case.right[case.member].double().mean()) for case in found.cases]),
            other_accuracy=_mean([float(case.right[~case.member].double().mean()) for case in found.cases]),
            tail=tail,
            labels=found.labels,
            probabilities=found.probabilities,
            rounded=not found.labels
            and any(membership_references.is_rounded(case.target) for case in found.cases),
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
    membership_references.refuse_few(design.fpr, n // 2 if members is None else n - members)
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

    def report(done: Mapping[int, Columns], reports: int, _: int) -> None:
        finished = how.reports_per_network * sum(len(columns["id"]) for columns in done.values())
        run.report(NETWORKS, finished + reports, how.reports_per_network * how.design.networks, 0, 0)

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
        [
            membership_references.found(each, mask, design.fpr)
            for each, mask in zip(score, member, strict=True)
        ]
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
