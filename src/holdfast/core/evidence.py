"""Evidence: per-example measurements and everything needed to repeat them. It holds no verdict."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from holdfast.core.threat import ThreatModel

Columns = Mapping[str, Tensor]
"""Named columns, one row an example."""

PARTIAL = ("gallery.", "adversarial.", "transfer.", "across.")
"""How columns of a stage begin that hold some of its examples only, named by an `id` of their own."""

DoubtState = Literal["clear", "raised", "answered", "not measured", "not applicable"]


@dataclass(frozen=True)
class Doubt:
    """One reason for which the number might flatter the model, and what was found."""

    name: str
    """as in `--accept-doubt NAME="why"`"""
    state: DoubtState
    statistic: float | None = None
    """what was measured; None where nothing was"""
    threshold: float | None = None
    """raised beyond this"""
    n: int = 0
    """examples it was measured on"""
    says: str = ""
    """one sentence for the report, with the numbers"""


@dataclass(frozen=True)
class Cost:
    """What was asked of the model. Forwards, backwards and queries are sums over examples; times are of the process."""

    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.queries + other.queries,
            self.cpu_s + other.cpu_s,
            self.wall_s + other.wall_s,
        )


@dataclass(frozen=True)
class Residual:
    """What an attack in waves left alone, because the last wave all held."""

    untried: int
    """examples that stood and that it was not run on"""
    at_most: float
    """share of them that it would break at most, with 95 % confidence, if none is likelier to fall than those tried"""


@dataclass(frozen=True)
class Places:
    """Where an attack put the same change: it counts at the worst of the places of each image."""

    tried: int
    """places of each image, at most"""
    standing_at_random: int
    """examples that stand where each has it at one random place"""


@dataclass(frozen=True)
class AttackRecord:
    """One attack of a suite: its settings, how many stood before and after it, and what it cost."""

    stage: str
    """its place in the suite and its column prefix, such as `1-apgd-ce`"""
    name: str
    """the algorithm, as its paper spells it"""
    settings: Mapping[str, Any]
    standing_before: int
    standing_after: int
    cost: Cost
    notes: tuple[str, ...] = ()
    """what a reader must know, such as a loss that was replaced because there are too few classes"""
    residual: Residual | None = None
    """what it left alone and at what risk; None where it was run on all that stood"""
    adaptive: bool = False
    """whether a doubt called for it, so that it is no part of the suite's own number"""
    fits: int = 0
    """how many fits of a learned attack were made, of which the best was taken; 0 where it was not learned"""
    places: Places | None = None
    """of a change that is put at the worst place of each image; None where there is a single place"""


@dataclass(frozen=True)
class PassRecord:
    """A pass outside the suite whose adversarial examples inside the threat model count: a probe, a curve and so on."""

    stage: str
    """its name in tables, such as `curve-1-fmn` or `probe-noise`"""
    name: str
    """its name in sentences"""
    tried: int
    """examples that it was run on"""
    broke: int
    """examples that it broke and that neither an attack nor an earlier pass had broken"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """those of its attack; of a fresh pass of the suite, the `attacks`; of other probes none, which have no settings"""


Scope = Literal["every pass", "suite only"]
"""What a verdict counts: the adversarial examples of every pass, or, in runs of earlier versions, of the suite only."""


@dataclass(frozen=True)
class Evidence:
    """What was measured on each example, by which attacks, under which threat model.

    Columns of an assessment: `id`, `y`, `digest` (n, 32) and the clean `prediction`, `margin`, `confidence`, `entropy`,
    `probability_margin`, `correct`; the worst case over all attacks and passes `success`, `broken_by` (index of the
    first that succeeded into `attacks` followed by `passes`, in a minimum-norm run of the one that came closest; -1),
    `adversarial_prediction`, `distance_linf`, `distance_l2`, `distance_l1`, `distance_l0` (in pixels where the threat
    counts pixels, else in values; absent in a run of scope "suite only" under a threat that counts pixels, for it
    counted values; inf where nothing was found, 0 where the clean input is already wrong), `queries`, `first_success`
    (the query at which it fell, all of them where what fell was never asked about itself); of the fixed PGD-40 pass
    `attacked_prediction`, `attacked_confidence`, `attacked_entropy`, `attacked_probability_margin`; of minimum-norm
    attacks `distance`, the smallest over all successes in the threat's own norm, and `STAGE.distance`, that of one
    attack by the name of its stage, such as `1-fmn.distance`. Under a targeted goal `eligible` marks the examples that
    count, and `success` means that the target was reached. Of a model that rejects, `rejected` says which clean inputs,
    and a rejected one is predicted as -1; `score` is how far the detector's score is above the threshold, in its scale,
    and `class_margin` the margin of the network alone; `oblivious_score` and `aware_score` are the scores of attacked
    inputs that the network alone has wrong, of who knows of no detector and the lowest of who does (inf where there is
    none). For a randomised model `right_probability` is the share of
    fresh draws that were right under the worst case. `suite_success` and `suite_right_probability` are those of the
    suite's own attacks, without adaptive attacks and passes, for comparison with published numbers.
    """

    columns: Columns
    threat: ThreatModel
    suite: str
    """name and version, such as `standard@1`; empty for a list of attacks"""
    attacks: tuple[AttackRecord, ...]
    seed: int
    doubts: tuple[Doubt, ...] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cost: Cost = Cost()
    """all of it: clean pass, attacks, the fixed pass, doubts"""
    doubts_cost: Cost = Cost()
    passes: tuple[PassRecord, ...] = ()
    """the passes outside the suite whose adversarial examples are counted"""
    scope: Scope = "every pass"
    broken_elsewhere: int = 0
    """in a run of scope "suite only", examples that other passes broke and that are not counted"""
    gallery: Columns = field(default_factory=dict)
    """a few broken examples for people to look at: `id` (k), `x` and `x_adv` (k, *features)"""
    surrogates: tuple[Mapping[str, Any], ...] = ()
    """`name`, `how` and `digest` of each model that the attacker held of its own"""
    transfer: Columns = field(default_factory=dict)
    """of the transfer matrix: `id` (k), who was `right` (k, models) and then `wrong` (k, makers, models)

    The models are the target and each surrogate. The makers of examples are the same, the target only where its
    gradients may be seen; and where there are several surrogates, all of them together.
    """
    served: Mapping[str, Any] = field(default_factory=dict)
    """what the server of a served model was sent over all attempts at the run; empty for any other model

    `rows` that it answered or refused, split into `clean` (with the look at the model before the run), `attacks`,
    `doubts` and `judging`, padding included; `requests`; of the rows, those of `refused` requests; attacked inputs that
    were `rejected`, by status; what was `sent_again` (`rows`, `requests`, and `why`) and rows left `unanswered` by
    stops, which are not among `rows`; `max_rows` of a request where the server showed a limit, else None; and what it
    `says`, the same in sentences.
    """
    others: tuple[Mapping[str, Any], ...] = ()
    """`name`, `digest` and `n` of each data set that changes were carried to and from"""
    across: Columns = field(default_factory=dict)
    """what changes carried across data sets `turned`, and their `control`: (k, made on, put on)

    The data sets are that of the run and then the others, each by as many inputs.
    """

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(self.columns["id"])
