"""The interface of a doubt: its test, the probes that measure something for it, its conclusion, and shared
thresholds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import torch
from torch import Tensor

from holdfast.attacks.costs import Passes, search_queries
from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.evidence import Columns, Doubt, DoubtState
from holdfast.core.model import Model
from holdfast.core.names import TaskName
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Ids, Mask, Rows

SAMPLE: Final = 128
"""largest number of examples for a probe"""
FORWARDS: Final = 300
"""largest number of forward passes of all probes for each example, without the searches and the new run of
`not-exhausted`"""
BACKWARDS: Final = 150
"""largest number of backward passes of all probes for each example, with the same exceptions"""
SEARCHES: Final = 1000
"""number of queries of the search of `black-box` for each example"""
FRESH_ROWS: Final = 32
"""number of surviving examples on which the suite is run again, those with the lowest margin"""

POINTS_BY_RIVAL: Final = 0.02
"""difference of success rates by which a weaker attack must exceed a stronger one to raise a doubt"""
P_BY_RIVAL: Final = 0.01
"""exact McNemar p-value below which this difference is significant"""
DISCORDANT: Final = 8
"""number of examples that one attack breaks and the other does not, below which the p-value cannot be so small"""
SEARCHED: Final = 500
"""least number of queries of a random search of the suite that settles what a shorter search of a probe would show"""
CHANGE: Final = 1e-4
"""relative change of the logits between two calls that raises a doubt; differences of about 1e-6 are normal for
different batch sizes"""


Run = Callable[[Model, Batch, ThreatModel, Draws], dict[str, Tensor]]
"""function that returns the columns of a probe for a batch; attacks return `broken`, the lowest `margin`, and its input
`x`"""

AGAIN = "again"
"""name of the probe that runs the suite once more"""


@dataclass(frozen=True)
class Probe:
    """A measurement or attack on a small number of examples, whose result decides whether doubts are raised."""

    name: str
    needs: Access
    run: Run
    on: Literal["correct", "surviving", "undecided", "closest"] = "correct"
    """examples that the probe runs on: a sample of the correct ones (`correct`), of the surviving ones (`surviving`) or
    of those of them that are not certified (`undecided`), or the surviving ones with the lowest margin (`closest`)"""
    breaks: bool = True
    """whether the inputs of the probe are inside the threat model, so that a broken example counts against the suite"""
    queries: int = 0
    """largest number of queries for an example; 0 if the probe respects the budget of the threat model"""
    voted: Run | None = None
    """variant for a randomised model, in which a majority of votes decides whether a final input is adversarial; None
    if the probe has no final inputs"""
    applies: Callable[[ThreatModel], bool] = lambda threat: threat.constraint.eps != 0
    """whether the probe is possible under a threat model that gives the access that it needs"""
    rows: Callable[[ThreatModel, int, Passes, int], int | None] | None = None
    """largest number of inputs that the probe sends to a server for a number of examples, from the threat model, that
    number, the batches and the number of votes for a final input; None for a probe that needs gradients"""
    order: int = 99
    """place of the probe among all: they run in the order of these numbers, and the new run of the suite is last"""
    most: int = SAMPLE
    """largest number of examples that the probe runs on"""
    settles: bool = False
    """whether the probe only serves to settle doubts together with the results of the suite"""


def probe_title(probe: str) -> str:
    """Return a description of a probe for use in a sentence, such as `the probe noise`."""
    return "a fresh pass of the suite" if probe == AGAIN else f"the probe {probe}"


@dataclass(frozen=True)
class Probed:
    """The result of a probe: its columns, and the row indices of the examples on which it was run."""

    rows: Rows
    columns: Columns


ProbeResults = Mapping[str, Probed]
"""examples and returned columns of each probe, by name of the probe"""


@dataclass(frozen=True)
class Outcome:
    """What an attack of the suite did, in all its waves together."""

    name: str
    broken: Mask
    """mask of the examples that it broke"""
    n: int
    """number of examples that it was run on"""
    n_last: int
    """number of examples of its last wave, or all of them if it has no waves; 0 if it was not run"""
    idle: bool
    """whether it was run, and broke none of the examples of its last wave"""
    passes: int
    """its forward and backward passes over all examples"""
    attack: Attack | None = None
    """the attack; None if it is known from a stored run alone"""


@dataclass(frozen=True)
class MeasurementContext:
    """Information on a run that decides doubts in addition to the columns of its attacks, such as its threat model."""

    threat: ThreatModel
    suite: str = ""
    """name and version of the suite; empty for a list of attacks, for which only `free` doubts are raised"""
    in_training: tuple[str, ...] = ()
    """names of the layers that were in train mode; the model was measured in eval mode"""
    first_gradient_dead: Mask | None = None
    """mask of the examples whose first gradient is zero or NaN, for a list of attacks; None if it was not recorded"""
    blind: bool = False
    """whether a detector's score has no gradient with respect to any input"""
    randomised: bool = False
    """whether the model is randomised, so that a single output proves nothing"""
    input: Doubt = Doubt("input", "not measured")
    """doubt whether the data fit the model, which is measured before the attacks"""
    access: Access = "gradients"
    """largest access that the model itself gives, regardless of what the threat model allows"""
    classes: int | None = None
    """number of classes of the model"""
    outcomes: tuple[Outcome, ...] = ()
    """what the attacks of the suite did, in their order; empty if nothing may be concluded from them: for a randomised
    model, if gradients vanish, and in a search for smallest changes"""
    repeated: tuple[str, ...] = ()
    """names of the attacks of the suite that the fresh pass of `not-exhausted` repeats"""
    task: TaskName | None = None
    """what the model returns, if it is not one score for each class"""


@dataclass(frozen=True)
class Case:
    """What the conclusion of a doubt receives: the results of all probes, and the columns of the suite."""

    name: str
    """name of the doubt"""
    results: ProbeResults
    columns: Columns
    context: MeasurementContext
    missed: Mapping[str, Ids] = field(default_factory=dict)
    """ids of the examples that a probe or pass broke and the suite did not, by name of the probe or pass"""
    attacked: bool = False
    """whether a probe with inputs inside the threat model was run"""

    def broken(self, probe: Probe, column: str = "broken") -> Mask | None:
        """Return which examples a probe broke; None if it was not run."""
        return self.results[probe.name].columns[column] if probe.name in self.results else None

    @property
    def complete(self) -> bool:
        """Whether every correct example is broken by the suite or certified, so that no other attack breaks more. It is
        false if nothing may be concluded from the suite.
        """
        return bool(self.context.outcomes) and not undecided(self.columns).any()

    def idle(self, *, searches: int = 0) -> Outcome | None:
        """Return the last attack of the suite that uses gradients or, with `searches`, that makes at least so many
        queries in random searches, if it broke none of the examples of its last wave. Otherwise return None.
        """

        def counts(attack: Attack) -> bool:
            return search_queries(attack) >= searches if searches else attack.needs == "gradients"

        ran = [outcome for outcome in self.context.outcomes if outcome.n]
        alike = [outcome for outcome in ran if outcome.attack is not None and counts(outcome.attack)]
        return alike[-1] if alike and alike[-1].idle else None

    def judged(self, statistic: float, threshold: float, n: int, text: str, *, more: bool = True) -> Doubt:
        """Return the doubt, raised if the statistic is above the threshold and `more` is true, otherwise clear."""
        state: DoubtState = "raised" if statistic > threshold and more else "clear"
        return Doubt(self.name, state, statistic, threshold, n, text)

    def inapplicable(self, reason: str) -> Doubt:
        """Return the doubt as one that has no meaning for this run."""
        return Doubt(self.name, "not applicable", message=reason)

    def absent(self, *probes: Probe) -> Doubt:
        """Return the doubt as one that could not be tested because its probes did not run, with the reason."""
        threat = self.context.threat
        probed = probing_threat(threat, self.columns)
        if probed.constraint.eps == 0:
            return self.inapplicable("eps is 0, so no input may change")
        for probe in probes:
            if not threat.gives(probe.needs):
                lacking = limit(threat, self.context.access, probe.needs)
                return self.inapplicable(f"it needs access to {probe.needs}, and {lacking}")
        if not all(probe.applies(probed) for probe in probes):
            return self.inapplicable(f"there is no such attack under {probed.constraint}")
        return Doubt(self.name, "not measured", message="there was no example to measure it on")


@dataclass(frozen=True)
class DoubtTest:
    """The test of one doubt, and its explanation: the object `TEST` of its module in `holdfast.doubts`."""

    title: str
    """condition under which it is raised, in few words, for readers of reports"""
    meaning: str = ""
    """what the condition means for the measured robust accuracy"""
    advice: str = ""
    """what readers of a report can do"""
    advice_for_probabilities: str = ""
    """advice if the model is declared to return probabilities; empty if it is the same"""
    conclude: Callable[[Case], Doubt] | None = None
    """function that decides the state of the doubt; None if the verbs of a rotation decide it"""
    probes: tuple[Probe, ...] = ()
    """probes whose results the doubt uses; doubts may share them"""
    settled: Callable[[Case], Doubt | None] | None = None
    """function that returns the doubt if the attacks of the suite and the earlier probes decide it, so that no further
    probe is run for it; None if only its probes can"""
    of_suite: Callable[[Mapping[int, Attack]], Probe] | None = None
    """function that returns a probe for attacks of the suite, by their places in it"""
    thresholds: tuple[float, ...] = ()
    """thresholds that the doubt may have; empty if they depend on the model or the data"""
    free: bool = False
    """whether the doubt costs at most a few forward passes; a list of attacks raises only these"""
    of_strength: bool = False
    """whether the doubt implies that stronger attacks would break more: robust accuracy may be lower, but not higher"""
    meaningless: int = 0
    """rank among the doubts under which robust accuracy has no meaning, the most informative one first; 0 for others"""
    needs_surrogate: bool = False
    """whether the doubt is measured only with a surrogate of the attacker"""
    answered_by: tuple[Literal["bypass", "search", "average"], ...] = ()
    """adaptive attacks that answer the doubt: those whose gradients bypass stages that mask them, a search without
    gradients, or those that average over the outputs of a randomised model"""
    unanswered_if: Literal["never", "dead", "not bypassed", "survivor broken"] = "never"
    """when these attacks do not answer it: the gradients of the attacks are zero too, no stage was bypassed and no
    gradient averaged, or an example that a probe broke survives"""
    served_probe: str = ""
    """name of the probe that decides the doubt for a model behind a server, unless something else raises it"""


def percent(share: float) -> str:
    """Return a fraction as text, such as `12.5 %`."""
    return f"{100 * share:.1f} %"


def share(mask: Mask) -> str:
    """Return the fraction of true values as text, such as `12.5 %`."""
    return percent(float(mask.double().mean()))


def largest(values: Tensor) -> float:
    """Return the largest of some values (n), or 0 if there are none."""
    return float(values.max()) if len(values) else 0.0


def undecided(columns: Columns) -> Mask:
    """Return the mask of the examples that attacks may still break: the correct ones that are neither broken nor
    certified.
    """
    correct, certified = columns["correct"], torch.zeros_like(columns["correct"])
    remaining: Mask = correct & columns.get("eligible", correct) & ~columns["success"]
    return remaining & ~columns.get("certified", certified)


def probing_threat(threat: ThreatModel, columns: Columns) -> ThreatModel:
    """Return the threat model of a run with a finite radius eps, which probes need.

    A finite eps is unchanged. The infinite eps of a minimum-norm run is replaced by the median distance of the
    adversarial examples in `columns` of examples that the model classifies correctly; it is 0 if there are none.
    """
    constraint = threat.constraint
    if constraint.eps == torch.inf:
        distances = columns["distance"][columns["correct"] & columns["distance"].isfinite()]
        constraint = constraint.resized(float(distances.median()) if len(distances) else 0.0)
    return replace(threat, constraint=constraint)


def limit(threat: ThreatModel, access: Access, needed: Access) -> str:
    """Return in words why a probe lacks the access that it needs, such as gradients: the model or the threat model does
    not provide it.
    """
    if not replace(threat, access=access).gives(needed):
        return f"the model gives {access} only"
    return f"the threat model allows {('no access' if threat.access == 'none' else f'access to {threat.access} only')}"


def within_budget(n: int, threat: ThreatModel) -> int:
    """Return `n` queries, or the largest number of queries that the threat model permits if that is smaller."""
    return n if threat.queries is None else min(n, threat.queries)
