"""TriggerStamp: the trigger of a backdoor on every input, independent of the model.

Gu et al., "BadNets", 2017, arXiv:1708.06733.
"""

from dataclasses import dataclass
from typing import ClassVar

from holdfast.core.batch import Batch
from holdfast.core.constraints import Constraint
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Inputs
from holdfast.threats.triggers import Stamped


@dataclass(frozen=True)
class TriggerStamp:
    """Adds the trigger of the threat model to every input, without queries of the model."""

    needs: ClassVar[Access] = "none"

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        return refuse_no_trigger(threat.constraint).trigger.stamped(batch.x, model.bounds)


def refuse_no_trigger(constraint: Constraint) -> Stamped:
    """Return the constraint if it is that of a trigger. Otherwise raise `UsageError`."""
    if not isinstance(constraint, Stamped):
        raise UsageError(
            f"TriggerStamp adds the trigger of a file, and the threat is {constraint}; give a threat such as "
            "trigger:drill.trigger.npz"
        )
    return constraint
