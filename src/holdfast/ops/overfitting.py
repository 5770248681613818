"""Guard against catastrophic overfitting, in which the network becomes robust to single-step attacks only.

Wong et al., "Fast is Better than Free: Revisiting Adversarial Training", ICLR 2020, arXiv:2001.03994, detect it and
stop the training; here the training returns to its state before and continues with more steps (our own).
"""

from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Inputs
from holdfast.ops.distributed import broadcast
from holdfast.ops.learner import Learner

RAISED = "raised"
"""name of the state tensor that counts how often the guard has increased the number of steps"""
MOST_RAISED = 3
"""largest number of increases; the guard does not check after the last one"""
HELD = 128
"""number of training examples that are used for the check and not for training"""
_STEPS = 10
_APART = 0.25  # largest accuracy difference between one step and ten: 5 to 10 points are normal, 50 show overfitting


@dataclass(frozen=True)
class OverfittingGuard:
    """Guard that compares a single-step attack with one of ten steps, on examples that are not used for training."""

    learner: Learner
    held: Batch
    every: int = 100
    """number of updates between checks"""

    @property
    def dearer(self) -> float:
        """Current cost of an update, in multiples of the cost of the two passes that a single step takes."""
        return 1 + int(self.learner.state[RAISED]) / 2

    def holds(self) -> bool:
        """Return whether ten steps break little more than one; if not, increase the number of steps of the attack in
        training.
        """
        raised = self.learner.state[RAISED]
        if int(raised) >= MOST_RAISED or broadcast(self._right(1) - self._right(_STEPS) <= _APART):
            return True
        raised.add_(1)
        return False

    def _right(self, steps: int) -> float:
        """Accuracy after `steps` attack steps, of total length 2.5 eps if there are several."""
        reach = 1.0 if steps == 1 else 2.5
        x: Inputs = self.learner.now.worst(self.held, Draws(0).at("guard"), steps=steps, reach=reach)
        with torch.no_grad():
            return float((self.learner.frozen(x).argmax(1) == self.held.y).double().mean())
