"""A client that costs little CPU: it sends prepared requests over open connections and times the responses."""

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch


@dataclass
class Seen:
    """Responses of one round."""

    taken_s: list[float] = field(default_factory=list)
    """from the moment that a request was due, or sent, to the end of its response"""
    bodies: list[tuple[int, float, float, bytes]] = field(default_factory=list)
    """number of the request, when it was sent and answered, and the body"""
    failed: int = 0
    wall_s: float = 0.0

    @property
    def per_second(self) -> float:
        """Responses in a second."""
        return len(self.taken_s) / self.wall_s

    def quantile(self, q: float) -> float:
        """Quantile of the latency in milliseconds."""
        return float(1000 * torch.tensor(self.taken_s, dtype=torch.float64).quantile(q))


def prepared(x: torch.Tensor, path: str, *, binary: bool, headers: Mapping[str, str] | None = None) -> bytes:
    """An HTTP request with the inputs `x`, in JSON or with the inputs as bytes, and with further headers."""
    tensor: dict[str, object] = {"name": "input", "shape": list(x.shape), "datatype": "FP32"}
    media, more = "application/json", dict[str, str]()
    if binary:
        tail = x.numpy().astype("<f4").tobytes()
        tensor["parameters"] = {"binary_data_size": len(tail)}
        head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        media, more = "application/octet-stream", {"inference-header-content-length": str(len(head))}
        body = head + tail
    else:
        # as few digits as the numbers have, as clients of images send them
        different, places = np.unique(x.flatten().numpy(), return_inverse=True)  # few in images of 8 bits
        numbers = [float(np.format_float_positional(v, unique=True)) for v in different]
        data = [numbers[place] for place in places]
        body = json.dumps({"inputs": [{**tensor, "data": data}]}).encode()
    return posted(path, body, {"content-type": media, **more, **(headers or {})})


def posted(path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
    """An HTTP request with a body and headers."""
    values = {"host": "localhost", **headers, "content-length": str(len(body))}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in values.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
) -> tuple[int, bytes]:
    writer.write(message)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return int(head[9:12]), await reader.readexactly(length)


def saturated(
    port: int, messages: list[bytes], *, connections: int, seconds: float, keep: bool = False
) -> Seen:
    """The responses to requests over so many connections, each of which sends the next request after the response."""
    return asyncio.run(_load(port, messages, connections, seconds, None, keep=keep))


def paced(port: int, messages: list[bytes], *, connections: int, seconds: float, rate: float) -> Seen:
    """The responses to `rate` requests a second, which are due at an even pace whatever happened to earlier ones."""
    return asyncio.run(_load(port, messages, connections, seconds, rate, keep=True))


async def _load(
    port: int, messages: list[bytes], connections: int, seconds: float, rate: float | None, *, keep: bool
) -> Seen:
    seen = Seen()
    begin = time.perf_counter()
    number = iter(range(10**9))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while True:
            k = next(number)
            due = time.perf_counter() if rate is None else begin + k / rate
            if due - begin >= seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter())) if rate is not None else None
            sent = time.time()
            status, body = await _exchange(reader, writer, messages[k % len(messages)])
            seen.taken_s.append(time.perf_counter() - due)
            seen.failed += status != 200
            if keep:
                seen.bodies.append((k % len(messages), sent, time.time(), body))
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    seen.wall_s = time.perf_counter() - begin
    return seen


def cpu_s(pid: int) -> float:
    """CPU time of a process in seconds, from Linux's /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
