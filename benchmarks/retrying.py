"""Clients that send varied requests at an even pace, and send a request again after a connection error or a 503."""

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.load import posted, prepared
from benchmarks.queries import film

ATTEMPTS, TIMEOUT_S, LONGEST_PAUSE_S = 12, 30.0, 2.0
"""Times that a request is sent, seconds until a response counts as lost, and the longest pause between two attempts."""
POPULAR, ATTACKED_FOR = 200, 200
"""Images that many clients send unchanged, and queries for an image before an attack begins on the next one."""
KINDS = {"different": 0.72, "popular": 0.1, "video": 0.1, "attack": 0.06, "invalid": 0.02}
"""Kinds of requests and their shares."""
_MOST_ROWS = 8
_REOPENED = 25
"""requests after which a client opens another connection, so that a new worker gets its share"""


@dataclass(frozen=True)
class Sent:
    """A request and the status codes that are no failures."""

    kind: str
    message: bytes
    expected: frozenset[int]
    content: bytes = b""
    """bytes of the inputs; empty for an invalid request"""


@dataclass
class Received:
    """What the clients received."""

    statuses: Counter[str] = field(default_factory=Counter)
    """number of last responses by kind of request and status"""
    connection_errors: int = 0
    timeouts: int = 0
    unavailable: int = 0
    """responses with status 503, after which the request was sent again"""
    without_retry_after: int = 0
    """of these, those that did not state when to send it again"""
    failures: list[str] = field(default_factory=list)
    answered: list[str] = field(default_factory=list)
    """digests of the inputs of the requests with status 200"""
    taken_s: list[float] = field(default_factory=list)
    """from the moment that a request was due to its last response"""

    def of_status(self, status: int) -> int:
        """Number of last responses with a status."""
        return sum(n for name, n in self.statuses.items() if name.endswith(f" {status}"))

    def quantile(self, q: float) -> float:
        """Quantile of the latency in milliseconds."""
        return float(1000 * torch.tensor(self.taken_s, dtype=torch.float64).quantile(q))


def collage(x: Tensor, rng: np.random.Generator, n: int) -> Tensor:
    """Different images (n, channels, height, width): the left half of one of `x` beside the right half of another, some
    mirrored.
    """
    half = x.shape[-1] // 2
    left, right = x[rng.integers(0, len(x), n)], x[rng.integers(0, len(x), n)]
    made = torch.cat((left[..., :half], right[..., half:]), -1)
    mirrored = torch.from_numpy(rng.random(n) < 0.5)
    made[mirrored] = made[mirrored].flip(-1)
    return made


def traffic(x: Tensor, path: str, keys: Sequence[str], seed: int) -> Iterator[Sent]:
    """Yield requests of all kinds without end, half of them in JSON and half with the inputs as bytes."""
    rng = np.random.default_rng(seed)
    attacked, n_attacks = x[0], 0
    frames: Iterator[Tensor] = iter(())
    while True:
        kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
        binary = bool(rng.random() < 0.5)
        headers = {"authorization": f"Bearer {keys[rng.integers(len(keys))]}"}
        if kind == "invalid":
            yield _invalid(path, headers, rng)
            continue
        if kind == "different":
            inputs = collage(x, rng, 1 if rng.random() < 0.9 else int(rng.integers(2, _MOST_ROWS + 1)))
        elif kind == "popular":
            inputs = x[rng.integers(0, POPULAR)][None]
        elif kind == "video":
            frame = next(frames, None)
            if frame is None:
                frames = iter(film(x[rng.integers(len(x))], rng).split(1))
                frame = next(frames)
            inputs = frame
        else:
            if n_attacks % ATTACKED_FOR == 0:
                attacked = x[rng.integers(len(x))]
            n_attacks += 1
            noise = 8 / 255 * torch.from_numpy(rng.choice([-1.0, 1.0], attacked.shape)).float()
            inputs = ((attacked + noise).clamp(0, 1) * 255).round()[None] / 255
        message = prepared(inputs, path, binary=binary, headers=headers)
        yield Sent(kind, message, frozenset({200, 422}), inputs.numpy().astype("<f4").tobytes())


def _invalid(path: str, headers: dict[str, str], rng: np.random.Generator) -> Sent:
    """A request that is refused before it reaches the guard."""
    tensor = {"name": "input", "shape": [1, 3, 32, 32], "datatype": "FP32"}
    bodies = (b'{"inputs": [', json.dumps({"inputs": [{**tensor, "data": [0.5] * 100}]}).encode(),
              json.dumps({"inputs": [{**tensor, "data": [2.0] * 3072}]}).encode())  # fmt: skip
    body = bodies[rng.integers(len(bodies))]
    return Sent(
        "invalid", posted(path, body, {"content-type": "application/json", **headers}), frozenset({400})
    )


async def steady(
    port: int,
    requests: Iterator[Sent],
    *,
    connections: int,
    seconds: float,
    rate: float,
    digest: Callable[[bytes], str],
) -> Received:
    """The last responses to `rate` requests a second over so many connections. `digest` is that of the audit."""
    received, number, begin = Received(), iter(range(10**9)), time.perf_counter()

    async def client() -> None:
        connection = _Connection(port)
        for sent_before in itertools.count(1):
            if sent_before % _REOPENED == 0:
                connection.close()
            due = begin + next(number) / rate
            if due - begin >= seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            sent = next(requests)
            status = await _answered(connection, sent.message, received)
            received.taken_s.append(time.perf_counter() - due)
            received.statuses[f"{sent.kind} {status}"] += 1
            if status not in sent.expected:
                received.failures.append(f"{sent.kind}: {status or 'no response'}")
            if status == 200:
                received.answered.append(digest(sent.content))
        connection.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return received


class _Connection:
    """A connection that is opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def exchange(self, message: bytes) -> tuple[int, dict[bytes, bytes]]:
        """Send a request, and return the status and the headers of its response. Raises `OSError` or `EOFError`."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(message)
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        await reader.readexactly(int(headers[b"content-length"]))
        if headers.get(b"connection") == b"close":
            self.close()
        return int(status[9:12]), headers

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _answered(connection: _Connection, message: bytes, received: Received) -> int:
    """The status of the last response to a request; 0 if there was none."""
    status, pause = 0, 0.1
    for _ in range(ATTEMPTS):
        wait = pause * random.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                status, headers = await connection.exchange(message)
        except TimeoutError:
            received.timeouts += 1
            connection.close()
        except (OSError, EOFError):
            received.connection_errors += 1
            connection.close()
        else:
            if status != 503:
                return status
            received.unavailable += 1
            received.without_retry_after += b"retry-after" not in headers
            wait = float(headers.get(b"retry-after", b"1"))
        await asyncio.sleep(wait)
    return status
