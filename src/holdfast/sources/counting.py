"""Counts the rows that are sent to a served model, and refuses those beyond a limit."""

from holdfast.core.model import Classifier
from holdfast.ops.expectation import inner
from holdfast.sources.sent import Sent
from holdfast.sources.served import Served

MOST = 64
"""Rows that a look at a served model sends at most; a server that takes larger batches only is sent one of them."""


class Look(Sent):
    """Counts the rows of a look at a served model, and refuses to send more than `most`."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most

    @property
    def rows(self) -> int:
        """How many rows were sent."""
        return self.totals.sent

    @property
    def remaining(self) -> int:
        """How many rows may still be sent."""
        return self.most - self.rows

    def spent(self, rows: int) -> str:
        """Why so many rows are not sent."""
        why = "to find out how the data are read; declare it with --layout chw, hwc or asis"
        if self.totals.refused:
            why = "because the server refuses so many at once; give --http-max-rows N with the number that it takes"
        return (
            f"doctor and --dry-run send at most {self.most} rows to a server; rows sent: {self.rows}, rows that are "
            f"needed as well: {rows}, {why}"
        )


def look_at(model: Classifier) -> Look | None:
    """What counts the rows that a served model is sent, from the first call of this function on; None for others."""
    net = inner(model).net
    if not isinstance(net, Served):
        return None
    if not isinstance(net.sent, Look):
        size = inner(model).batches
        most = max(MOST, 1 if size is None else size.size)
        net.begin(Look(min(most, net.remote.max_queries or most)))
    assert isinstance(net.sent, Look)
    return net.sent


def rows_of_calls(model: Classifier, left: int, wanted: int, again: int) -> tuple[int, int]:
    """How many examples fit in a first call and in a second one, where so many rows are left; 0 where none do.

    The first has about `wanted` examples, or a whole batch of a server that takes no other; the second at most `again`.
    """
    size = 1 if model.batches is None else model.batches.size
    whole = left // size * size
    first = min(whole, wanted if size == 1 else max(size, MOST // 2 // size * size))
    second = min((whole - first) // size * size, first, again)
    return first, second
