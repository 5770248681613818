"""Calls a served model on batches: rows are sent in HTTP requests, and the responses are counted and stored."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks.parts.images import inner
from holdfast.core.errors import InputRefused, Placeholder, QueriesSpent, TargetRefused, model_argument
from holdfast.core.meter import Purpose, current
from holdfast.core.model import Classifier
from holdfast.core.outputs import REFUSED, refused
from holdfast.io.files import LAYOUT
from holdfast.io.remote.http_client import Client, Sent, key_of, new_sent, status_line
from holdfast.io.remote.payloads import ServerAnswers, Shaped, Template
from holdfast.io.remote.remote import Remote

_OF_THE_VALUES = frozenset({400, 422})
"""Status codes that mean that the values of an input were rejected, not its size or type."""
_WEIGHT = 1 / 32
"""Weight of the last input in the moving average of the fraction of rejected inputs."""
_CHECK_AFTER = 8
"""Number of consecutive rejected inputs after which a clean input is sent, to check that it is still accepted."""


@dataclass(eq=False)
class _Origin:
    """The state of a rejected request that is larger than any accepted one, while its parts are sent again.

    Such a request may be too large, or contain an input that the server rejects.
    """

    left: int
    """number of rows for which the reason is not known yet"""
    refused: int
    """number of rows of the smallest rejected request"""
    most: int = 0
    """number of rows of the largest accepted request"""
    rejected: bool = False
    """whether a single input was rejected"""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Indices of the rows of one request."""

    rows: list[int]
    origin: _Origin | None = None


@dataclass(frozen=True, eq=False)
class _Task:
    """The inputs of one call, with the responses received so far."""

    x: Tensor
    purpose: Purpose
    keys: list[bytes]
    """digests of the inputs; empty if responses are not stored"""
    found: list[Tensor | None]
    waiting: deque[_Chunk] = field(default_factory=deque)


class Served:
    """A callable that sends a batch to a model server and returns the scores or one-hot labels in the response.

    A request has at most `remote.max_rows` rows. A rejected request is halved until the server accepts it, which
    determines the largest number of rows of a request. Inputs of attacks that are rejected individually get logits with
    the value `REFUSED` or end the run, depending on `remote.on_refused`. `sent` counts the rows, and returns responses
    from earlier attempts of the run.
    """

    def __init__(
        self, client: Client, path: str, form: Shaped | Template, answers: ServerAnswers, remote: Remote
    ) -> None:
        self._client, self._path, self._form, self._answers, self.remote = client, path, form, answers, remote
        self._fixed = form.shape[0] if isinstance(form, Shaped) and form.shape and form.shape[0] > 0 else 0
        self._pool = ThreadPoolExecutor(remote.concurrency) if remote.concurrency > 1 else None
        self._control: Tensor | None = None
        """a clean input that the server accepted"""
        self.opening = 0
        """number of rows that were sent to determine how the data are interpreted"""
        self.begin(new_sent(remote.max_queries))

    def begin(self, sent: Sent) -> None:
        """Use `sent` as the counter of the rows that are sent to the server from now on."""
        self.sent = sent
        max_rows = max(self.remote.max_rows, self._fixed)
        self._limit = min(max_rows, sent.totals.most or max_rows)
        self._most = self._limit
        """number of rows of the next request; below the limit while the limit is being determined"""
        self._answered = self._streak = 0
        """number of rows of the largest accepted request, and number of rejected inputs since the last accepted one"""
        self._unconfirmed: list[tuple[Purpose, str, bytes]] = []
        """rejected inputs since the last accepted request, which may be due to a failure of the server"""
        self._rejecting = 0.0
        """moving average of the fraction of inputs that were rejected individually"""

    @property
    def at_once(self) -> int:
        """Largest number of rows, over all parallel requests, that may be sent to the server at the same time."""
        return self._limit * self.remote.concurrency

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits (n, classes) of `x` on its device. Rows of rejected inputs have the value `REFUSED`."""
        self._client.resume()  # an interrupted call has stopped the client
        rows, purpose = x.detach().cpu(), current()
        keys = [key_of(row) for row in rows] if self.sent.keeps else []
        answers: list[Tensor | None] = [None] * len(rows)
        if keys:
            answers = self.sent.recalled(purpose, keys)
            self._recall(rows, purpose, answers)
        if self._fixed and any(answer is None for answer in answers):  # a fixed batch is sent as a whole
            answers = [None] * len(rows)
        task = _Task(rows, purpose, keys, answers)
        missing = [row for row, answer in enumerate(answers) if answer is None]
        if missing:
            task.waiting.append(_Chunk(missing))
        self._settle(task)
        classes = self._answers.classes or 2
        # The mark of a rejected input is one value, which is expanded to all classes.
        rows_of_logits = [
            row_logits.double().expand(classes) for row_logits in task.found if row_logits is not None
        ]
        values = torch.stack(rows_of_logits) if rows_of_logits else torch.empty(0, classes)
        return values.to(x.device, x.dtype)

    def __deepcopy__(self, memo: dict[int, object]) -> "Served":
        """Return the object itself, because a connection cannot be copied."""
        return self

    def confirm(self) -> None:
        """Check that the server still accepts a clean input if it rejected the last attacked inputs.

        Raises `TargetRefused` if it is not accepted: then the rejections do not depend on the attacked inputs.
        """
        if not self._streak or self._control is None:
            return
        x = self._padded(self._control[None])
        try:
            answer = self._request(x)
        except InputRefused as error:
            self.sent.refused(current(), len(x))
            raise TargetRefused(
                f"the server rejects a clean input that it accepted before, so its rejections do not depend on the "
                f"attacked inputs: {error.message}"
            ) from error
        self._keep(current(), x, answer)
        self._confirmed()

    def _confirmed(self) -> None:
        """Record the unconfirmed inputs as rejected. As the server accepts other inputs, it rejected their values."""
        for purpose, status, key in self._unconfirmed:
            self.sent.rejected(purpose, status, key)
        self._unconfirmed, self._streak = [], 0

    def _recall(self, rows: Tensor, purpose: Purpose, answers: Sequence[Tensor | None]) -> None:
        """Process stored responses as if the server had just returned them."""
        for row, answer in zip(rows, answers, strict=True):
            if answer is None or refused(answer[None]).any():
                continue
            self._answers.recall(answer)
            if purpose.kind == "clean" and self._control is None:
                self._control = row.clone()

    def _settle(self, task: _Task) -> None:
        for chunk, answer in self._replies(task):
            if isinstance(answer, InputRefused):
                self._refuse(task, chunk, answer)
                continue
            x = self._padded(task.x[chunk.rows])
            values = self._keep(
                task.purpose, x, answer, [task.keys[row] for row in chunk.rows] if task.keys else []
            )
            # Without `strict`, because rows that fill up a fixed batch have values as well.
            for row, value in zip(chunk.rows, values, strict=False):
                task.found[row] = value
            if task.purpose.kind == "clean" and self._control is None:
                self._control = task.x[chunk.rows[0]].clone()
            self._confirmed()
            self._answered = max(self._answered, len(chunk.rows))
            self._rejecting *= (1 - _WEIGHT) ** len(chunk.rows)
            self._learn(chunk, answered=len(chunk.rows))

    def _keep(self, purpose: Purpose, x: Tensor, answer: Any, keys: Sequence[bytes] = ()) -> Tensor:
        values = self._answers.read(answer, x)
        if self.sent.keeps:
            keys = [*keys, *(key_of(row) for row in x[len(keys) :])]
        self.sent.answered(purpose, values, keys)
        return values

    def _refuse(self, task: _Task, chunk: _Chunk, error: InputRefused) -> None:
        """Halve a rejected request. If it is a single input, mark the input as rejected or raise the error."""
        n, rows = len(chunk.rows), self._fixed or len(chunk.rows)
        rejects = (
            self.remote.on_refused == "reject"
            and task.purpose.kind != "clean"
            and error.status in _OF_THE_VALUES
        )
        self.sent.refused(task.purpose, rows)
        if n == 1 and rejects:
            key = task.keys[chunk.rows[0]] if task.keys else b""
            self._unconfirmed.append((task.purpose, status_line(error.status), key))
            task.found[chunk.rows[0]] = torch.tensor([REFUSED])
            self._learn(chunk, rejected=True)
            self._streak += 1
            self._rejecting += _WEIGHT * (1 - self._rejecting)
            if self._streak % _CHECK_AFTER == 0:
                self.confirm()
            return
        if n == 1 or (self._fixed and not rejects):
            raise error
        origin = chunk.origin
        # Only a number of rows that was never accepted can be the reason.
        if n > self._answered and not self._fixed:
            self._most = n // 2
            origin = origin or _Origin(n, n)
            origin.refused = min(origin.refused, n)
        half = n // 2
        task.waiting.extendleft((_Chunk(chunk.rows[half:], origin), _Chunk(chunk.rows[:half], origin)))

    def _learn(self, chunk: _Chunk, *, answered: int = 0, rejected: bool = False) -> None:
        """Update the limit of rows from the result of a part of a rejected request."""
        origin = chunk.origin
        if origin is None:
            return
        origin.left -= len(chunk.rows)
        origin.most, origin.rejected = max(origin.most, answered), origin.rejected or rejected
        if origin.left:
            return
        if not origin.rejected:  # no input was rejected by itself, so the number of rows was the reason
            self._limit = origin.most
            self.sent.found_limit(origin.most, origin.refused)
        self._most = self._limit

    def _replies(self, task: _Task) -> Iterator[tuple[_Chunk, Any]]:
        """Yield each waiting chunk with its response or its `InputRefused`. Chunks may be added in the meantime."""
        flying: dict[Future[Any], _Chunk] = {}
        failure: BaseException | None = None
        try:
            while (task.waiting and failure is None) or flying:
                while task.waiting and failure is None and len(flying) < self.remote.concurrency:
                    chunk = self._next(task)
                    flying[self._submitted(self._padded(task.x[chunk.rows]))] = chunk
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    chunk, error = flying.pop(future), future.exception()
                    if isinstance(error, InputRefused) or error is None:
                        yield chunk, error or future.result()
                    else:
                        failure = failure or error
        except BaseException:  # after Ctrl-C, the other threads would still wait for their responses
            if flying:
                self._client.stop()
            raise
        if failure is not None:
            raise failure

    def _next(self, task: _Task) -> _Chunk:
        """Return the next chunk, within the limits of a request and of the rows that may still be sent.

        If many inputs are rejected, requests are so short that most contain none of them, as in group testing.
        """
        chunk, left = task.waiting.popleft(), self.sent.left()
        size = self._most
        if not self._fixed:
            size = min(size, left or size, max(1, int(1 / max(self._rejecting, 1 / size))))
        if len(chunk.rows) > size:
            task.waiting.appendleft(_Chunk(chunk.rows[size:], chunk.origin))
            chunk = _Chunk(chunk.rows[:size], chunk.origin)
        return chunk

    def _submitted(self, x: Tensor) -> "Future[Any]":
        """Return a future for the response. Without other threads it is complete on return."""
        if self._pool is not None:
            return self._pool.submit(self._request, x)
        future: Future[Any] = Future()
        try:
            future.set_result(self._request(x))
        except Exception as error:  # noqa: BLE001 - raised by the caller that takes the answer
            future.set_exception(error)
        return future

    def _request(self, x: Tensor) -> Any:
        return self._client.request(self._path, self._form.body(x), sent=self.sent, rows=len(x))

    def _padded(self, x: Tensor) -> Tensor:
        """Return the rows of a request. An incomplete fixed batch is filled with copies of a clean input."""
        short = self._fixed - len(x) if self._fixed else 0
        if short <= 0 or self._control is None:
            return x
        return torch.cat((x, self._control[None].expand(short, *x.shape[1:])))


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
            remedy = model_argument("http_max_rows", Placeholder("N"), reason="with the accepted number")
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
