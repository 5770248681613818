"""Where examples stand among others, found by their ids."""

import torch

from holdfast.core.types import Ids, Rows


class Lookup:
    """Finds rows of a batch by id, whatever their order."""

    def __init__(self, ids: Ids) -> None:
        self._sorted, self._order = ids.sort()

    def rows(self, ids: Ids) -> Rows:
        """The row of each id; `KeyError` with the first that is not here."""
        if not len(self._sorted):
            at, known = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        else:
            at = torch.searchsorted(self._sorted, ids.contiguous()).clamp_max_(len(self._sorted) - 1)
            known = self._sorted[at] == ids
        if not known.all():
            raise KeyError(int(ids[~known][0]))
        return self._order[at]
