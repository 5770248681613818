"""Guard against catastrophic overfitting, in which a network in training becomes robust only to attacks with a single
step.

Wong et al., "Fast is Better than Free: Revisiting Adversarial Training", ICLR 2020, arXiv:2001.03994, detect it and
stop the training; here the training returns to its state before and continues with more steps (our own).
"""

from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Inputs
from holdfast.recipes.training.distributed import broadcast
from holdfast.recipes.training.learner import Learner

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
