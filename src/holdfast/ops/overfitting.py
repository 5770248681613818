"""The guard against catastrophic overfitting: a network that learns to mislead a single step, and nothing else.

Wong et al., "Fast is Better than Free: Revisiting Adversarial Training", ICLR 2020, arXiv:2001.03994, saw it and
stopped there; here the training goes back to before and on with more steps (our own).
"""

from dataclasses import dataclass

import torch

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.types import Inputs
from holdfast.ops.distributed import broadcast
from holdfast.ops.learner import Learner

RAISED = "raised"
"""Name of the state that counts how often the guard has asked for more steps."""
MOST_RAISED = 3
"""How often it may ask for more; whether that was enough is for others to judge."""
HELD = 128
"""Training examples that it looks at, and that nothing is trained on."""
_STEPS = 10
_APART = 0.25  # of the examples: between one step and ten lie 5 to 10 points on networks that hold, and 50 on others


@dataclass(frozen=True)
class OverfittingGuard:
    """Compares one step with ten on examples that are not trained on."""

    learner: Learner
    held: Batch
    every: int = 100
    """updates between looks"""

    @property
    def dearer(self) -> float:
        """Passes of an update by now, in multiples of the two that a single step takes."""
        return 1 + int(self.learner.state[RAISED]) / 2

    def holds(self) -> bool:
        """Whether ten steps break little more than one; if not, more steps are asked for from here on."""
        raised = self.learner.state[RAISED]
        if int(raised) >= MOST_RAISED or broadcast(self._right(1) - self._right(_STEPS) <= _APART):
            return True
        raised.add_(1)
        return False

    def _right(self, steps: int) -> float:
        """Share that is right after so many steps, 2.5 eps long together if there are more than one."""
        reach = 1.0 if steps == 1 else 2.5
        x: Inputs = self.learner.now.worst(self.held, Draws(0).at("guard"), steps=steps, reach=reach)
        with torch.no_grad():
            return float((self.learner.frozen(x).argmax(1) == self.held.y).double().mean())
