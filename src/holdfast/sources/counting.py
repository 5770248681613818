"""Counts the rows that are sent to a served model, and refuses those beyond a limit."""

from collections.abc import Callable

from torch import Tensor

from holdfast.core.errors import TargetError, TargetLost
from holdfast.core.model import Classifier
from holdfast.ops.expectation import inner

MOST = 64
"""Rows that a look at a served model sends at most; a server that takes larger batches only is sent one of them."""


class Counted:
    """Passes inputs on to a served model until `most` rows were sent; `rows` is how many were."""

    def __init__(self, net: Callable[[Tensor], Tensor], most: int) -> None:
        self._net, self.most, self.rows = net, most, 0

    @property
    def left(self) -> int:
        """How many rows may still be sent."""
        return self.most - self.rows

    def __call__(self, x: Tensor) -> Tensor:
        """What the model returns for `x` (n, *features); `TargetLost` where that would be too many rows."""
        if len(x) > self.left:
            raise TargetLost(
                f"{self.rows} rows were sent to the server, of at most {self.most} that doctor and --dry-run send, and "
                f"{len(x)} more are needed to find out how the data are read; declare it with --layout chw, hwc or asis"
            )
        try:
            found = self._net(x)
        except TargetError as error:
            if type(error) is not TargetError:  # else the request does not fit the server, and was not sent
                self.rows += len(x)
            raise
        self.rows += len(x)
        return found


def counted(model: Classifier) -> Counted | None:
    """What counts the rows that a served model is sent, from the first call of this function on; None for others."""
    if not model.remote:
        return None
    own = inner(model)
    if isinstance(own.net, Counted):
        return own.net
    own.net = Counted(own.net, max(MOST, 1 if own.batches is None else own.batches.size))
    return own.net


def rows_of_calls(model: Classifier, left: int, wanted: int, again: int) -> tuple[int, int]:
    """How many examples fit in a first call and in a second one, where so many rows are left; 0 where none do.

    The first has about `wanted` examples, or a whole batch of a server that takes no other; the second at most `again`.
    """
    size = 1 if model.batches is None else model.batches.size
    whole = left // size * size
    first = min(whole, wanted if size == 1 else max(size, MOST // 2 // size * size))
    second = min((whole - first) // size * size, first, again)
    return first, second
