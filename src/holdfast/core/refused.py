"""Handling of inputs that a served model rejects.

Their logits are infinite, which marks them. A rejected attacked input is not adversarial, as with a detector: it counts
as the label of its example.
"""

import torch
from torch import Tensor

from holdfast.core.batch import Batch
from holdfast.core.lookup import Lookup
from holdfast.core.meter import lead_of
from holdfast.core.model import Bounds, Model
from holdfast.core.outputs import refused
from holdfast.core.types import Ids, Inputs, Labels, Logits, PerExample

_LEAD = 1.0


def for_label(logits: Logits, y: Labels, lead: PerExample | float = _LEAD) -> Logits:
    """Return logits (n, classes) in which each input that the server rejected counts as classified with its label `y`,
    with the margin `lead`.
    """
    rows = refused(logits)
    if not rows.any():
        return logits
    held = torch.zeros_like(logits)
    held.scatter_(1, y[:, None], torch.as_tensor(lead, dtype=logits.dtype).expand(len(y))[:, None])
    return torch.where(rows[:, None], held, logits)


class Answering:
    """Wrapper of a served model for an attack on a batch. Inputs that the server rejects get logits with a large
    margin, so that the attack avoids them.

    The margin of a rejected input is the largest margin of any answer for its example so far, so that no attack moves
    there.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self._model, self._batch = model, batch
        self._lookup = Lookup(batch.ids)
        self._lead: Tensor | None = None

    @property
    def bounds(self) -> Bounds:
        """Lowest and highest valid values of the inputs of the model."""
        return self._model.bounds

    def __call__(self, x: Inputs, ids: Ids | None = None) -> Logits:
        """Return the logits (n, classes) of the inputs; those of rejected inputs are replaced."""
        rows = self._lookup.rows(self._batch.ids if ids is None else ids)
        logits = self._model(x, ids)
        y = self._batch.y[rows]
        if self._lead is None:
            self._lead = torch.full_like(self._batch.ids, _LEAD, dtype=logits.dtype)
        lead = lead_of(logits, y)  # NaN for a rejected row
        self._lead.scatter_reduce_(0, rows, lead.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), "amax")
        return for_label(logits, y, self._lead[rows])
