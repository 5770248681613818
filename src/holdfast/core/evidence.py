"""The type of the evidence of a run: measurements of each example with everything that is needed to repeat them.
Evidence contains no verdict.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import Tensor

from holdfast.core.catalogue import Arithmetic
from holdfast.core.threat import ThreatModel

Columns = Mapping[str, Tensor]
"""columns by name; each has one row for each example"""

PARTIAL = frozenset(("gallery", "adversarial", "transfer", "across", "geometry", "stateful", "undefined"))
"""names of the tables inside the columns of a stage: the column `gallery.x` is the column `x` of the table `gallery`"""

TRIGGERED = "triggered"
"""name of the column that states whether the trigger of a backdoor changed the class of an example"""


def in_table(column: str) -> bool:
    """Return whether a column of a stage belongs to a separate table, such as the gallery of broken examples, and not
    to the table of all examples.
    """
    return column.partition(".")[0] in PARTIAL


DoubtState = Literal["clear", "raised", "answered", "not measured", "not applicable"]


@dataclass(frozen=True)
class Doubt:
    """A reason why the measured robust accuracy may be too high, with the result of its test."""

    name: str
    """name of the doubt, as in `--accept-doubt NAME="why"`"""
    state: DoubtState
    statistic: float | None = None
    """measured value that is compared with the threshold; None if nothing was measured"""
    threshold: float | None = None
    """value beyond which the doubt is raised"""
    n: int = 0
    """number of examples that were measured"""
    message: str = ""
    """one sentence for the report, with the measured numbers"""


CheckState = Literal["passed", "failed", "not measured", "not applicable"]


@dataclass(frozen=True)
class AnswerCheck:
    """A check of the adaptive attack itself. If one is failed, the attack answers no doubt."""

    name: str
    state: CheckState
    statistic: float
    """measured value that is compared with the threshold"""
    threshold: float
    n: int
    """number of examples that were measured"""
    message: str
    """one sentence for the report, with the measured numbers"""


@dataclass(frozen=True)
class Seconds:
    """CPU time and wall-clock time of a step in seconds, summed over all attempts at the step."""

    cpu: float = 0.0
    wall: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Cost of a stage: numbers of forward passes, backward passes and queries, summed over examples, and the CPU time
    and wall-clock time in seconds.
    """

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
    """Number of examples that an attack skipped, because it broke none of the last group of examples, and an upper
    bound of the share of the skipped examples that it would have broken.
    """

    untried: int
    """number of examples that survived the previous attacks and on which this attack was not run"""
    at_most: float
    """largest fraction of them that the attack would break, with 95 % confidence, if they are no weaker than those
    attacked"""


@dataclass(frozen=True)
class Places:
    """Record of an attack, such as a patch, that tries the same change at several positions of an image and uses the
    position with the lowest margin.
    """

    tried: int
    """largest number of positions that were tried in an image"""
    surviving_at_random: int
    """number of examples that survive the change at one random position of each"""


@dataclass(frozen=True)
class Reuse:
    """Record of an attack with the stored adversarial inputs of an earlier run."""

    tried: int
    """number of correct examples with a stored input"""
    transferred: int
    """number of them that the stored input itself broke"""
    broke: int
    """number of them that were broken, by the stored input or in a search that begins with it"""
    queries: int
    """number of queries of the attack for the broken examples"""
    earlier_queries: int
    """number of queries of all attacks of the earlier run for the same examples"""


MethodState = Literal[
    "not reached",
    "run",
    "dropped",
    "needs gradients",
    "needs scores",
    "other norm",
    "randomised",
    "too few passes",
    "nothing to attack",
    "left out",
]
"""what became of a method of an adaptive search: it was not reached because every example was broken or the budget was
used, it was run on all surviving examples, it was dropped after a trial on a few examples, it was not applicable, with
the reason, or the settings leave it out"""


METHOD_STATES: tuple[MethodState, ...] = get_args(MethodState)
"""the states in the order of their numbers in columns"""


@dataclass(frozen=True)
class MethodRecord:
    """What one method of an adaptive search contributed, and its cost, summed over the examples."""

    name: str
    state: MethodState
    broke: int
    """number of examples that it broke and that no method before it had broken"""
    forwards: int
    backwards: int


@dataclass(frozen=True)
class SearchRecord:
    """Record of an adaptive search, which divides its budget among several methods."""

    methods: tuple[MethodRecord, ...]
    draws: int
    """largest number of passes over which a gradient was averaged until its sign was stable; 0 if none was"""
    raised: int
    """number of points at which the model raised an error, and which were left out"""
    changed: int
    """number of examples of which an input had another output after further queries"""


@dataclass(frozen=True)
class AttackRecord:
    """Record of one attack of a suite: its settings, the number of surviving examples before and after it, and its
    cost.
    """

    stage: str
    """position in the suite and prefix of columns, such as `1-apgd-ce`"""
    name: str
    """name of the algorithm, as in its paper"""
    settings: Mapping[str, Any]
    surviving_before: int
    surviving_after: int
    cost: Cost
    notes: tuple[str, ...] = ()
    """notes for the reader, such as a loss that was replaced because there are too few classes"""
    residual: Residual | None = None
    """number of skipped examples and the bound for them; None if the attack ran on all surviving examples"""
    adaptive: bool = False
    """whether a doubt required the attack, so that it does not count in the suite's own robust accuracy"""
    fits: int = 0
    """number of fits of an attack that is fitted, of which the best was used; 0 for other attacks"""
    places: Places | None = None
    """numbers about the positions of a change that is placed at the worst one of each image; None for other attacks"""
    search: SearchRecord | None = None
    """methods of an adaptive search; None for other attacks"""
    reuse: Reuse | None = None
    """numbers about the stored inputs of an earlier run; None for other attacks"""
    left: float | None = None
    """mean score that the attack left of an example, from 0 to 1, for another task than classes; None for classes"""


@dataclass(frozen=True)
class PassRecord:
    """Record of a measurement outside the suite, such as a probe, whose adversarial examples count for robust
    accuracy.
    """

    stage: str
    """name of the pass in tables, such as `curve-1-fmn` or `probe-noise`"""
    name: str
    """name of the pass in sentences"""
    tried: int
    """number of examples on which the pass was run; 0 for a probe that could not change the result, because the doubts
    that it tests were settled, or no example was left for it"""
    broke: int
    """number of examples that the pass broke and that no attack or earlier pass had broken"""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """settings of the attack of the pass; for a fresh pass of the suite, its `attacks`; empty for other probes"""


@dataclass(frozen=True)
class Table:
    """Table of the evidence whose rows are not the examples of the run, but other units such as broken examples for
    display. All columns have equal length.

    Raises `ValueError` if the columns have different lengths.
    """

    unit: str
    """description of a row, in the singular, such as `broken example`"""
    columns: Columns

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of a table have different lengths: {lengths}; expected equal ones")

    def __len__(self) -> int:
        return next((len(values) for values in self.columns.values()), 0)


@dataclass(frozen=True)
class ProofRecord:
    """Record of one method of certification: its settings, the number of examples that it was run on and that it
    decided, and its cost.
    """

    stage: str
    """name of the stage, such as `proof-1-ibp`"""
    name: str
    """name of the method, such as `crown`"""
    settings: Mapping[str, Any]
    tried: int
    """number of undecided examples on which the method was run"""
    certified: int
    broken: int
    """number of examples that a counterexample of the method broke, as judged by the original model"""
    confirmed: int
    """number of these counterexamples that the model misclassifies in double precision as well"""
    stopped: int
    """number of examples for which a time limit ended the search"""
    work: int
    """number of subproblems (boxes) whose bounds were computed"""
    cost: Cost
    batch: int | None = None
    """smallest number of examples that were processed at once because memory ran out; None if it did not"""
    after_attacks: bool = False
    """whether the method was run after the attacks of the suite"""
    arithmetic: Arithmetic | None = None
    """arithmetic that the certificates are about, for a method that bounds the operations of a network"""


Scope = Literal["every pass", "suite only"]
"""adversarial examples that a comparison of two runs counts"""


Ending = Literal["decided", "all measured", "out of time"]
"""Why a run with a condition ended: the attacks decided it, all examples were measured without a decision, or the time
budget ended before a decision."""


@dataclass(frozen=True)
class Looks:
    """How many examples a run measured until its condition was decided. The examples are in a random order, and the
    condition is judged after each of several blocks of them, by an interval that is valid at all these looks together.
    """

    condition: str
    """the condition, such as `robust_accuracy >= 0.4`"""
    look: int
    """number of the last look, from 1"""
    examples: int
    """number of examples at the last look"""
    of: int
    """number of all examples that could be measured"""
    ended: Ending | None
    """why no further look follows; None if one follows"""


@dataclass(frozen=True)
class Evidence:
    """Evidence of a run: measurements of each example, together with the attacks, the threat model, the model and the
    data.

    `columns` are the table of the examples, `tables` are all others, and the other fields are the header. A
    measurement of something else, such as a certificate, an episode or a generated sample, is a further table, which
    the kind of its stage adds (see `holdfast.runs.harness.stage.StageKind`).

    Columns of an assessment: `id`, `y`, `digest` (n, 32) and the clean `prediction`, `margin`, `confidence`, `entropy`,
    `probability_margin`, `correct`. The worst case over all attacks and passes: `success`; `broken_by` (index into
    `attacks` followed by `passes` of the first that succeeded, in a minimum-norm run of the closest one; -1 for none);
    `adversarial_prediction`; `distance_linf`, `distance_l2`, `distance_l1`, `distance_l0` (inf if no adversarial
    example was found, 0 if the clean input is misclassified; `distance_l0` counts pixels if the threat does, else
    values); `queries`; `first_success` (number of the query that broke the example; the number of all its queries if
    the successful input was never queried itself). The fixed PGD-40 pass: `attacked_prediction`, `attacked_confidence`,
    `attacked_entropy`, `attacked_probability_margin`. Minimum-norm attacks: `distance`, the smallest over all successes
    in the threat's own norm, and `STAGE.distance`, that of one attack, such as `1-fmn.distance`. Under a targeted goal
    `eligible` marks the examples that count, and `success` means that the target was reached. A trigger: `triggered`
    marks the examples that reach its target class with it, or without a target change their class. A model that
    rejects: `rejected` marks rejected clean inputs, whose prediction is -1; `score` is the detector's score minus its
    threshold, in units of its scale; `class_margin` is the margin of the network alone; `oblivious_score` and
    `aware_score` are scores of attacked inputs that the network alone misclassifies: of an attack without knowledge of
    the detector, and the lowest of the attacks with it (inf if there is none). A randomised model: `right_probability`
    is the share of new evaluations that are correct in the worst case. `suite_success` and `suite_right_probability`
    are those of the suite's own attacks, without adaptive attacks and passes, for comparison with published results.
    Certification: `certified` marks examples for which it is proved that no input of the threat model is misclassified;
    `certified_by` (index into `proofs` of the method, -1 for none); `certified_bound`, the largest proved lower bound
    of the margin over the threat model (-inf if there is none); `certified_radius`, the eps at which the example is
    certified, 0 if it is not; under changes of the training set it is the largest number of changes that is certified,
    also above eps and where it is below; `attacked` marks the examples on which at least one attack was run. Randomised
    smoothing: `certified_radius` is a lower confidence limit, also above eps and where it is below; `abstained` marks
    examples whose prediction the draws do not show, and `contradicted` those that a certificate and an attack
    contradict, which count as broken. Other tasks than classes: `certified_low` and `certified_high` (n, k), the proved
    interval of each output of a regression, or of each logit of several labels on the side that counts; and
    `certified_pixels` (n, classes), the numbers of pixels that are right for every input of the threat model. `group`
    is the index of the group of each example in `data["groups"]["names"]`, if there are groups.
    """

    columns: Columns
    threat: ThreatModel
    suite: str
    """name and version of the suite, such as `standard@1`; empty for a list of attacks"""
    attacks: tuple[AttackRecord, ...]
    seed: int
    doubts: tuple[Doubt, ...] = ()
    answer_checks: tuple[AnswerCheck, ...] = ()
    """checks of the adaptive attack, whose results answer no doubt if one is failed; empty if none was made"""
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """notes that are needed to understand the numbers"""
    details: tuple[str, ...] = ()
    """descriptions of the optimisations of the model's copy that attacks query; they do not change its outputs"""
    cost: Cost = Cost()
    """total cost: clean pass, attacks, fixed PGD-40 pass and doubts"""
    doubts_cost: Cost = Cost()
    passes: tuple[PassRecord, ...] = ()
    """records of the passes outside the suite whose adversarial examples are counted"""
    proofs: tuple[ProofRecord, ...] = ()
    """records of the methods of certification, in the order in which they ran; empty if nothing was certified"""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """further tables, by name, such as those of `gallery`, `transfer`, `across`, `geometry` and `stateful`"""
    surrogates: tuple[Mapping[str, Any], ...] = ()
    """`name`, `how` and `digest` of each surrogate model of the attacker"""
    served: Mapping[str, Any] = field(default_factory=dict)
    """counts of the requests to a served model over all attempts at the run; empty for any other model

    `rows` that the server answered or rejected, divided into `clean` (with the first examination of the model),
    `attacks`, `doubts` and `judging`, with padding; `requests`; rows of `refused` requests; attacked inputs that were
    `rejected`, by status; repeated requests as `retried` (`rows`, `requests` and `reasons`); rows left `unanswered`
    when a run stopped, which are not included in `rows`; `max_rows` of a request if the server showed a limit, else
    None; and the sentences `messages` with the same content."""
    others: tuple[Mapping[str, Any], ...] = ()
    """`name`, `digest` and `n` of each further data set, between which and that of the run changes were transferred"""
    looks: Looks | None = None
    """how many examples were measured until a condition was decided; None for a run on all examples"""

    @property
    def gallery(self) -> Columns:
        """Table of some broken examples for display: `id` (k), clean inputs `x` and attacked inputs `x_adv` (k,
        *features). It is empty if there are none.
        """
        return self._table("gallery")

    @property
    def transfer(self) -> Columns:
        """Table of the transfer of adversarial examples between models. `right` (k, models) marks models that are
        correct on the clean input, and `wrong` (k, makers, models) models that an example computed on a maker breaks.

        `id` (k) contains the ids of the examples. The models are the target and each surrogate. The makers are the
        models on which the examples are computed: the target only if the attacker has its gradients, each surrogate,
        and all surrogates together if there are several. Empty if transfer was not measured.
        """
        return self._table("transfer")

    @property
    def across(self) -> Columns:
        """Table of changes that were computed on one data set and applied to another: which inputs they break,
        `turned`, and a control measurement, `control`, both (k, source, destination).

        The data sets are that of the run and then the others, with the same number of inputs each. Empty if transfer
        was not measured.
        """
        return self._table("across")

    def _table(self, name: str) -> Columns:
        return self.tables[name].columns if name in self.tables else {}

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    def __len__(self) -> int:
        return len(self.columns["id"])
