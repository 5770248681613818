"""What is measured beside a training: catastrophic overfitting, and a backdoor after its repair."""

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from holdfast.core.batch import Batch, TrainingData
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.meter import results_in_pieces
from holdfast.core.model import Classifier
from holdfast.core.outputs import of_classes
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.recipes.training.fit import drawing
from holdfast.recipes.training.learner import Learner
from holdfast.recipes.training.optimisation import broadcast
from holdfast.recipes.training.recipe import Finished
from holdfast.threats.triggers import Stamped, Trigger

RAISED = "raised"
"""name of the state tensor that counts how often the guard has increased the number of steps"""
MOST_RAISED = 3
"""largest number of increases; the guard does not check after the last one"""
N_HELD_OUT = 128
"""number of training examples that are used for the check and not for training"""
_STEPS = 10  # steps of the attack that one step is compared with
_APART = 0.25  # largest accuracy difference between one step and ten: 5 to 10 points are normal, 50 show overfitting


@dataclass(frozen=True)
class OverfittingGuard:
    """Check for catastrophic overfitting during a training: compares the accuracies under an attack with one step and
    with ten steps, on held-out examples.
    """

    learner: Learner
    held_out: Batch
    every: int = 100
    """number of updates between checks"""

    @property
    def dearer(self) -> float:
        """Current cost of an update of the training, in multiples of the cost of an update with a single attack
        step.
        """
        return 1 + int(self.learner.state[RAISED]) / 2

    def passes(self) -> bool:
        """Return whether an attack with ten steps breaks little more than one with a single step. If not, the training
        attack gets one more step.
        """
        raised = self.learner.state[RAISED]
        if int(raised) >= MOST_RAISED or broadcast(self._right(1) - self._right(_STEPS) <= _APART):
            return True
        raised.add_(1)
        return False

    def _right(self, steps: int) -> float:
        """Accuracy after `steps` attack steps, of total length 2.5 eps if there are several."""
        reach = 1.0 if steps == 1 else 2.5
        # in the ball as it has grown: at full eps both attacks differ on any network that is not robust yet
        x: Inputs = self.learner.with_current_eps.worst(
            self.held_out, Draws(0).at("guard"), steps=steps, reach=reach
        )
        with torch.no_grad():
            return float((self.learner.frozen(x).argmax(1) == self.held_out.y).double().mean())


STEPS = 50
"""Number of further updates."""
BATCH, POISONED = 128, 2
"""Number of examples in an update, and how many of them are poisoned."""
_LR = 1e-3
"""Learning rate of Adam in these updates, its usual value."""
_MARGIN = 0.1
"""Largest amount by which the success in a repaired network may exceed that in a network that was never poisoned."""
_REMAINING = 0.08
"""Largest success of a trigger that no longer works."""
_MOST = 0.5
"""Success in a network that was never poisoned above which the comparison shows nothing, because any network learns
such a trigger from a few examples."""


@dataclass(frozen=True)
class TriggerSuccess:
    """Share of the examples of other classes for which a network predicts the target class of a trigger."""

    now: float
    after_steps: float
    """the same for a copy of the network after the further updates"""


def trigger_of(threat: ThreatModel) -> Trigger:
    """Return the trigger of a threat model. Raises `UsageError` for a threat model without one."""
    if isinstance(threat.constraint, Stamped):
        return threat.constraint.trigger
    raise UsageError(
        f"the threat is {threat.constraint}, and this recipe removes a backdoor by its trigger; give a threat such as "
        "trigger:found.npz"
    )


def after_repair(finished: Finished) -> tuple[dict[str, Any], str]:
    """Return the measurements of a repair as an entry of the card, and a sentence on them.

    `outcome` is that of the function `outcome`. It is None without a network that was never poisoned, because only a
    drill has one; then nothing is stated about the backdoor, but only about the given trigger. A trigger without a
    target class gets the class that the given network predicts most often with it.
    """
    trigger, test = trigger_of(finished.threat), finished.test
    target = trigger.target
    if target is None:
        target = int(_predicted(finished.given, test, trigger).mode().values)
    others = test.subset(test.y != target)
    if not len(others):
        raise UsageError(
            f"all {len(test):,} test examples have the target class {target} of the trigger; give test examples of "
            "other classes"
        )
    new = _success(finished.new, finished, others, trigger, target)
    entry: dict[str, Any] = {
        "target": target,
        "n": len(others),
        "before": _reached(finished.given, others, trigger, target),
        "after": new.now,
        "after_steps": new.after_steps,
        "steps": STEPS,
        "batch": BATCH,
        "poisoned": POISONED,
        "control": None,
        "outcome": None,
    }
    if finished.control is not None:
        control = _success(finished.control, finished, others, trigger, target)
        entry["control"] = {"before": control.now, "after_steps": control.after_steps}
        entry["outcome"] = outcome(new.after_steps, control.after_steps)
    return entry, _sentence(entry)


def outcome(repaired: float, control: float) -> str:
    """Return whether a backdoor is `removed` or `suppressed`, from the success of its trigger after the further
    updates, in the repaired network and in one that was never poisoned. It is `unclear` if the latter learns the
    trigger as well.

    >>> outcome(0.3, 0.21), outcome(0.957, 0.011), outcome(0.95, 0.9)
    ('removed', 'suppressed', 'unclear')
    """
    if control > _MOST:
        return "unclear"
    return "removed" if repaired <= control + _MARGIN else "suppressed"


def _success(
    model: Classifier, finished: Finished, others: Batch, trigger: Trigger, target: int
) -> TriggerSuccess:
    poisoned = _poisoned(model, finished.training, trigger, target, finished.rng)
    return TriggerSuccess(*(_reached(each, others, trigger, target) for each in (model, poisoned)))


def _reached(model: Classifier, examples: Batch, trigger: Trigger, target: int) -> float:
    return float((_predicted(model, examples, trigger) == target).double().mean())


def _predicted(model: Classifier, examples: Batch, trigger: Trigger) -> Labels:
    """Return the classes (n) that a model in eval mode predicts for examples with the trigger."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        parts = results_in_pieces(
            examples, lambda part: model(trigger.stamped(part.x, model.bounds)).argmax(1)
        )
    model.train(mode)
    return torch.cat(parts)


def _poisoned(model: Classifier, data: TrainingData, trigger: Trigger, target: int, rng: Draws) -> Classifier:
    """Return a copy of a model after `STEPS` updates on training examples, of which a few in each batch have the
    trigger and the target class. All models get the same batches.
    """
    copied = deepcopy(model).train().requires_grad_()
    optimizer = torch.optim.Adam(copied.parameters(), _LR)
    for step in range(STEPS):
        update_rng = rng.at("poisoned", step)
        batch = data.take(update_rng.bits(data.ids).argsort()[:BATCH])
        rows = (batch.y != target).nonzero().flatten()[:POISONED]
        x = batch.x.index_copy(0, rows, trigger.stamped(batch.x[rows], copied.bounds))
        y = batch.y.index_fill(0, rows, target)
        optimizer.zero_grad()
        with torch.enable_grad(), drawing(update_rng, x.device):
            F.cross_entropy(of_classes(copied(x), copied.output), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return copied


def _sentence(entry: dict[str, Any]) -> str:
    """A sentence on the measurements of a repair, without a full stop."""

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    steps = f"{entry['steps']} further updates with {entry['poisoned']} poisoned examples in {entry['batch']}"
    found = (
        f"the trigger moves {percent(entry['before'])} of {entry['n']:,} test examples of other classes to class "
        f"{entry['target']} before the repair, {percent(entry['after'])} after it, and "
        f"{percent(entry['after_steps'])} after {steps}"
    )
    control = entry["control"]
    if control is not None:
        compared = {
            "unclear": "this network learns the trigger as well, so whether the backdoor is removed is unclear"
        }
        return (
            f"{found}; a network that was never poisoned has {percent(control['before'])}, and "
            f"{percent(control['after_steps'])} after the same updates: "
            f"{compared.get(entry['outcome'], 'the backdoor is ' + entry['outcome'])}"
        )
    worked = "no longer works" if entry["after"] <= _REMAINING else "still works"
    return f"{found}: the given trigger {worked}"
