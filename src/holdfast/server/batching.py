"""Batches of requests: one thread takes all requests that wait, and answers them with one call.

While a batch is computed, further requests wait and form the next one, so that batches grow with the load. As in
Crankshaw et al., "Clipper: A Low-Latency Online Prediction Serving System", NSDI 2017, arXiv:1612.03079, the largest
batch follows the measured time per input.
Differs from the paper: the limit is computed from a moving average instead of additive increase and multiplicative
decrease, and requests that would wait too long are refused.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from holdfast.server.requests import wait_first

Request = TypeVar("Request")
Response = TypeVar("Response")
_WEIGHT = 0.2
"""weight of the last batch in the moving average of the time per input"""
_QUEUED = 64
"""largest number of waiting inputs, in multiples of the largest batch; it bounds the memory of the queue"""


@dataclass(eq=False)
class _Waiting(Generic[Request, Response]):
    request: Request
    rows: int
    future: "asyncio.Future[Response]"


class Batcher(Generic[Request, Response]):
    """Queue of requests with a thread that answers them in batches.

    `answer` receives the requests of a batch and returns their responses in the same order, or an exception in the
    place of a response; an exception that it raises is that of all of its requests. A batch has at most `max_rows`
    inputs, and fewer if it would take longer than half of `max_latency_s`. A request that would wait for longer than
    `max_latency_s` is refused with status 503.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Request]], Sequence[Response | Exception]],
        *,
        max_rows: int,
        max_latency_s: float,
        seen: Callable[[int, float], object] = lambda rows, seconds: None,
    ) -> None:
        self._answer, self._seen = answer, seen
        self._max_rows, self._max_latency_s = max_rows, max_latency_s
        self._queue: deque[_Waiting[Request, Response]] = deque()
        self._arrived = threading.Condition()
        self._rows = self._running = 0
        self._row_s = 0.0
        self._progress_s: float | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waking: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of inputs that wait for a batch."""
        return self._rows

    async def submit(self, request: Request, rows: int) -> Response:
        """Return the response to a request with a number of inputs. Raises `Refused` if it would wait too long."""
        loop = self._loop = asyncio.get_running_loop()
        entry: _Waiting[Request, Response] = _Waiting(request, rows, loop.create_future())
        with self._arrived:
            wait_s = (self._rows + self._running) * self._row_s
            if self._closed or wait_s > self._max_latency_s or self._rows >= _QUEUED * self._max_rows:
                raise wait_first("the server is overloaded; send the request again later", wait_s)
            self._queue.append(entry)
            self._rows += rows
        if self._waking is not loop:  # once for all requests that the loop receives at a time
            self._waking = loop
            loop.call_soon(self._wake)
        return await entry.future

    def _wake(self) -> None:
        """Wake the thread. Called by the event loop."""
        self._waking = None
        with self._arrived:
            self._arrived.notify()

    @property
    def busy_s(self) -> float:
        """Seconds since the thread last made progress within a batch; 0 while it waits for requests."""
        progress_s = self._progress_s
        return 0.0 if progress_s is None else time.monotonic() - progress_s

    @property
    def row_s(self) -> float:
        """Moving average of the seconds per input; 0 before the first batch."""
        return self._row_s

    def progress(self) -> None:
        """Note that the function of the batches has made progress."""
        self._progress_s = time.monotonic()

    @property
    def largest(self) -> int:
        """Largest number of inputs of the next batch, from the measured time per input."""
        if not self._row_s:
            return self._max_rows
        return max(1, min(self._max_rows, int(self._max_latency_s / 2 / self._row_s)))

    def close(self) -> None:
        """Answer the requests that wait, and end the thread. Later requests are refused."""
        with self._arrived:
            self._closed = True
            self._arrived.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next():
            begin = time.perf_counter()
            rows = sum(entry.rows for entry in batch)
            responses: Sequence[Response | Exception]
            try:
                responses = self._answer([entry.request for entry in batch])
            except Exception as error:  # noqa: BLE001 - raised by the callers, which wait for it
                responses = [error] * len(batch)
            taken_s = time.perf_counter() - begin
            self._row_s += (taken_s / rows - self._row_s) * (_WEIGHT if self._row_s else 1.0)
            self._seen(rows, taken_s)
            # one call for all requests, because waking the loop is expensive
            if self._loop is not None and not self._loop.is_closed():
                pairs = [(entry.future, response) for entry, response in zip(batch, responses, strict=True)]
                self._loop.call_soon_threadsafe(_settle, pairs)

    def _next(self) -> list[_Waiting[Request, Response]]:
        """Return the requests of the next batch; none after the queue is closed and empty."""
        with self._arrived:
            self._running, self._progress_s = 0, None
            self._arrived.wait_for(lambda: self._queue or self._closed)
            batch: list[_Waiting[Request, Response]] = []
            rows, limit = 0, self.largest
            while self._queue and (not batch or rows + self._queue[0].rows <= limit):
                batch.append(self._queue.popleft())
                rows += batch[-1].rows
            self._rows -= rows
            self._running = rows
            self.progress()
            return batch


def _settle(pairs: Sequence[tuple["asyncio.Future[Response]", Response | Exception]]) -> None:
    for future, response in pairs:
        if future.done():  # cancelled, because the client closed the connection
            continue
        if isinstance(response, Exception):
            future.set_exception(response)
        else:
            future.set_result(response)
