"""The trigger of a backdoor: a change of the input to which a manipulated model responds with a class of the attacker.

Gu et al., "BadNets", 2017, arXiv:1708.06733; Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using
Data Poisoning", 2017, arXiv:1712.05526; Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without
Label Poisoning", 2019, arXiv:1902.11237.
"""

from dataclasses import dataclass

from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds
from holdfast.core.types import Inputs


@dataclass(frozen=True)
class Trigger:
    """A change that is the same for every input: `x' = clamp((1 - mask) x + mask · pattern + shift)`."""

    mask: Tensor
    """share of each value that the pattern replaces, from 0 to 1, with the shape of an input; a first axis of size 1 is
    broadcast over channels"""
    pattern: Tensor
    """values that replace those of the input, with the shape of an input"""
    target: int | None = None
    """class that the attacker wants; None if it is unknown"""
    shift: Tensor | None = None
    """values that are added, with the shape of an input; None for none"""

    def stamped(self, x: Inputs, bounds: Bounds) -> Inputs:
        """Return inputs (n, *shape) with the trigger. Raises `UsageError` if the trigger has another shape."""
        if self.pattern.shape != x.shape[1:]:
            raise UsageError(
                f"the trigger has the shape {tuple(self.pattern.shape)}, and the inputs have {tuple(x.shape[1:])}; "
                "use a trigger of this data set"
            )
        mask, pattern = self.mask.to(x), self.pattern.to(x)
        stamped = x * (1 - mask) + mask * pattern
        if self.shift is not None:
            stamped = stamped + self.shift.to(x)
        return bounds.clamp(stamped)
