"""Lookup of the positions of examples in a batch by their ids."""

import torch

from holdfast.core.types import Ids, Rows


class Lookup:
    """Index of a batch that maps the ids of examples to their positions. Repeated calls with the same tensor of ids use
    a cached result.
    """

    def __init__(self, ids: Ids) -> None:
        self._sorted, self._order = ids.sort()
        self._last: tuple[Ids, Rows] | None = None

    def rows(self, ids: Ids) -> Rows:
        """Return the position of each id in the batch. Raises `KeyError` with the first unknown id."""
        if self._last is None or self._last[0] is not ids:
            self._last = ids, self._found(ids)
        return self._last[1]

    def _found(self, ids: Ids) -> Rows:
        if not len(self._sorted):
            at, known = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        else:
            at = torch.searchsorted(self._sorted, ids.contiguous()).clamp_max_(len(self._sorted) - 1)
            known = self._sorted[at] == ids
        if not known.all():
            raise KeyError(int(ids[~known][0]))
        return self._order[at]
