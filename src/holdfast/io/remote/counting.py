"""Counts the rows that an inspection, such as `holdfast doctor`, sends to a served model, and stops it when a limit is
reached.
"""

from holdfast.attacks.parts.expectation import inner
from holdfast.core.errors import QueriesSpent
from holdfast.core.model import Classifier
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.io.models.declarations import LAYOUT
from holdfast.io.remote.sent import Sent
from holdfast.io.remote.served_model import Served

MOST = 64
"""Largest number of rows that an inspection sends to a served model.

A server that accepts only larger batches is sent one batch.
"""


class InspectionCounter(Sent):
    """Counter of the rows that an inspection, such as `holdfast doctor`, sends to a served model. At most `most` rows
    are sent.
    """

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.most = most

    @property
    def rows(self) -> int:
        """Number of rows that the inspection has sent to the served model so far."""
        return self.totals.sent

    @property
    def remaining(self) -> int:
        """Number of rows that the inspection may still send to the served model."""
        return self.most - self.rows

    def spent(self, rows: int) -> QueriesSpent:
        """Return the error that explains why an inspection does not send `rows` further rows to the served model."""
        reason, remedy = "to determine the layout of the data", LAYOUT
        if self.totals.refused:
            reason = "because the server rejects so many per request"
            remedy = Remedy(
                "http_max_rows", Placeholder("N"), function="open_model", reason="with the accepted number"
            )
        return QueriesSpent(
            f"doctor and a dry run send at most {self.most} rows to a server; rows sent: {self.rows}, rows that are "
            f"needed as well: {rows}, {reason}",
            remedy,
            limit=self.most,
        )


def inspection_counter(model: Classifier) -> InspectionCounter | None:
    """Return the counter of the rows that an inspection sends to a served model, or None for a model that is not behind
    a server.

    The first call creates the counter, later calls return it.
    """
    net = inner(model).net
    if not isinstance(net, Served):
        return None
    if not isinstance(net.sent, InspectionCounter):
        size = inner(model).batches
        most = max(MOST, 1 if size is None else size.size)
        net.begin(InspectionCounter(min(most, net.remote.max_queries or most)))
    assert isinstance(net.sent, InspectionCounter)
    return net.sent


def rows_of_calls(model: Classifier, limit: int, wanted: int, again: int) -> tuple[int, int]:
    """Return how many examples the first and the second call of a model may have if at most `limit` rows may be sent. A
    number is 0 if the call is not possible.

    The first call has about `wanted` examples, or a whole batch if the server accepts only whole batches. The second
    call has at most `again` examples.
    """
    size = 1 if model.batches is None else model.batches.size
    available = limit // size * size
    first = min(available, wanted if size == 1 else max(size, MOST // 2 // size * size))
    second = min((available - first) // size * size, first, again)
    return first, second
