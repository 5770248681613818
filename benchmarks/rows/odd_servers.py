"""`holdfast adapt` and `holdfast monitor` at addresses where something else than their server answers.

Each server is a thread on loopback that answers as a server of the bundled network until one of its answers, which is
odd.
"""

import gzip
import hashlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.networks import BUNDLED
from benchmarks.record import Cells, Claim, Outcome
from holdfast.adaptation.server_state import monitor_state
from holdfast.core.errors import HoldfastError
from holdfast.io.remote.operator_port import ANSWER_S, OperatorPort
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Adapt, Doctor

WHAT = "holdfast adapt and monitor at servers with odd, endless and absent answers: exit codes, times, files"
MODEL = "mnist-cnn"
LATEST_S, SPARE_S = 10.0, 5.0
"""Seconds after an odd answer in which the command must end, and beyond the limit of an answer that does not end."""
KEY = "hf_" + "k" * 43
GUARD = """\
schema_version: 1
inputs: {shape: [1, 28, 28]}
rules: {energy: {action: flag}}
"""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
ENDLESS_S = 120.0
"""Seconds after which a server gives up that sends something without an end."""
Json = dict[str, Any]
Send = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Odd:
    """A server with one odd answer."""

    kind: str
    name: str
    send: Send
    """sends the answer"""
    path: str = "/status"
    """path of the request that gets it"""
    key: bool = False
    """whether the client was given a key"""
    ends: bool = True
    """whether the answer ends"""


@dataclass(eq=False)
class Server:
    """A server with one odd answer, and the time at which it had sent it."""

    odd: Odd
    good: dict[str, Json]
    """its other answers"""
    answered_s: float | None = None
    received: list[bytes] = field(default_factory=list)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Context manager with the address of the server."""
        over = threading.Event()
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            listener.settimeout(0.2)
            thread = threading.Thread(target=self._accept, args=(listener, over))
            thread.start()
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                over.set()
                thread.join()

    def _accept(self, listener: socket.socket, over: threading.Event) -> None:
        while not over.is_set():
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(10.0)
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16) or b"\r\n\r\n"
            self.received.append(request)
            path = request.split(b" ")[1].decode()
            if path == self.odd.path:
                try:
                    self.odd.send(connection)
                finally:
                    self.answered_s = self.answered_s or time.monotonic()
                return
            connection.sendall(answer(json.dumps(self.good.get(path, {})).encode()))


def answer(content: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(content) + content


# --- what servers answer


def raw(content: bytes) -> Send:
    """Sends bytes, and closes the connection."""
    return lambda connection: connection.sendall(content)


def endless(piece: bytes, head: bytes = b"", pause_s: float = 0.2) -> Send:
    """Sends bytes again and again."""

    def send(connection: socket.socket) -> None:
        end = time.monotonic() + ENDLESS_S
        connection.sendall(head)
        while time.monotonic() < end:
            connection.sendall(piece)
            time.sleep(pause_s)

    return send


def silent(connection: socket.socket) -> None:
    connection.settimeout(ENDLESS_S)
    connection.recv(1)


def odd_transfers() -> list[Odd]:
    """Answers that are not HTTP, not JSON, too long or without an end."""
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    long, informational = HEAD + b"Content-Length: 100000000000\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"
    return [
        Odd("without an end", "silent", silent, ends=False),
        Odd("without an end", "one byte of the headers at a time", endless(b"H"), ends=False),
        Odd("without an end", "one header at a time", endless(b"X-A: b\r\n", HEAD), ends=False),
        Odd("without an end", "one byte of the content at a time", endless(b" ", long), ends=False),
        Odd("without an end", "one small chunk at a time", endless(b"1\r\n \r\n", chunked), ends=False),
        Odd("without an end", "one informational response at a time", endless(informational), ends=False),
        Odd("without an end", "silent for a key", silent, path="/session", key=True, ends=False),
        Odd("without an end", "silent to the first step", silent, path="/adaptation", ends=False),
        Odd("transfer", "headers without an end", endless(b"X-A: " + b"b" * 1000 + b"\r\n", HEAD, 0.0)),
        Odd("transfer", "informational responses without an end", endless(informational * 100, pause_s=0.0)),
        Odd("transfer", "content without an end", endless(b" " * 65536, HEAD + b"\r\n", 0.0)),
        Odd("transfer", "closed connection", raw(b"")),
        Odd("transfer", "no HTTP", raw(b"\x00\xff" * 100)),
        Odd("transfer", "cut off", raw(long + b"{}")),
        Odd("transfer", "invalid chunk", raw(chunked + b"zz\r\n{}\r\n")),
        Odd("transfer", "redirect", raw(answer(b"", b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n"))),
        Odd("transfer", "error page", raw(answer(b"<html>", b"HTTP/1.1 500 Oops\r\n"))),
        Odd("transfer", "odd reason", raw(answer(b'{"error": {"a": "\x1b]0;::error::"}}', b"HTTP/1.1 409 No\r\n"))),
        Odd("transfer", "no content", raw(b"HTTP/1.1 204 No Content\r\n\r\n")),
        Odd("transfer", "compressed", raw(answer(gzip.compress(b"{}"), HEAD + b"Content-Encoding: gzip\r\n"))),
        *(
            Odd("transfer", f"content {text[:20].decode('latin-1')!r}", raw(answer(text)))
            for text in (
                b"", b"[]", b'"status"', b"null", b"[" * 100_000, b'{"a": NaN}', b'{"model": "\\ud800"}', b"{}",
                b'{"sets": {"a": {"n": ' + b"9" * 5000 + b"}}}", b"\xff\xfe{}", b'{"a": 1e999}',
            )
        ),
    ]  # fmt: skip


def odd_states(good: Json, folder: Path) -> list[Odd]:
    """Answers in JSON of which one part is odd."""
    pool = {"set": "a", "reason": "", "settings": {"pool": str(folder)}}
    shared = folder / "shared"
    shared.mkdir(mode=0o777)
    shared.chmod(0o777)
    for name in (f"{MODEL}.safetensors", "guard.yaml"):
        (shared / name).write_bytes((folder / name).read_bytes())
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "guard.yaml").write_text(GUARD + "calibration: ../other.json\n")
    (folder / "raw").mkdir()
    (folder / "raw" / "guard.yaml").write_text(GUARD)
    (folder / "raw" / "guard.calibration.json").write_text('{"chosen": "content"}')
    changes: list[tuple[str, Any]] = [
        ("model", None), ("model.set", "../../x"), ("model.digest", 7), ("model.digest", "0" * 64),
        ("model.reload", "never"), ("model.reason", ["x"]), ("canary", ...), ("canary.state", "x"), ("pool", pool),
        ("workers", {"a": 1}), ("workers", [7]), ("sets", []), ("sets", {"a": {"requests": -1}}),
        ("sets", {"a": {"n": "x"}}), ("sets", {"a/b": {}}), ("sets", {f"s{k}": 1 for k in range(100_000)}),
        ("model.settings", []),
        *((f"model.settings.{key}", value) for key, value in (
            ("model", 7), ("model", "a\0.safetensors"), ("model", "@/dev/zero"),
            ("model", str(shared / f"{MODEL}.safetensors")), ("model", str(folder / "pipe.safetensors")),
            ("arch", "@/dev/zero"), ("arch", {"a": 1}), ("arch", "no-such-network"), ("class_names", "@/dev/zero"),
            ("bounds", "@/dev/zero"), ("bounds", [2, 1]), ("mean", "x"), ("std", [[0]]), ("classes", -3),
            ("model_args", "x"), ("guard", 7), ("guard", "/etc/passwd"), ("guard", "/dev/zero"),
            ("guard", str(folder / "absent.yaml")), ("guard", str(shared / "guard.yaml")),
            ("guard", str(folder / "elsewhere" / "guard.yaml")), ("guard", str(folder / "raw" / "guard.yaml")),
            ("guard", str(folder / "pipe.safetensors")),
        )),
    ]  # fmt: skip
    odd = [
        Odd(
            "state of a file",
            f"{place} is {str(value).replace(str(folder), '…')[:30]}",
            _json(_changed(good, place, value)),
        )
        for place, value in changes
    ]
    without = {key: value for key, value in good.items() if key not in ("model", "canary")}
    for text, state in {
        "no settings": {**pool, "settings": {}},
        "a number": 7,
        "the path is a number": {**pool, "settings": {"pool": 7}},
        "the folder is absent": {**pool, "settings": {"pool": str(folder / "absent")}},
        "the folder is no pool": pool,
        "others may write to the folder": {**pool, "settings": {"pool": str(shared)}},
        "the path is @FILE": {**pool, "settings": {"pool": "@/dev/zero"}},
        "the set is a list": {**pool, "set": []},
    }.items():
        odd.append(Odd("state of a pool", text, _json({**without, "pool": state})))
    alarms: dict[str, Any] = {"x": 1, "alarmed": 7, "tests": [{}]}
    odd += [
        Odd("state of the monitor", f"only {key}", _json({key: value}), path="/monitor")
        for key, value in alarms.items()
    ]
    odd.append(
        Odd(
            "without an end",
            "state of the monitor",
            endless(b" ", HEAD + b"\r\n"),
            path="/monitor",
            ends=False,
        )
    )
    for text, begun in {
        "no proof": {}, "nonce of the client": {"nonce": "0" * 32, "proof": "0" * 128},
        "odd nonce": {"nonce": "\x1b[2J", "proof": ""}, "proof is a list": {"nonce": "0" * 32, "proof": [1]},
    }.items():  # fmt: skip
        odd.append(Odd("session for a key", text, _json(begun), path="/session", key=True))
    return odd


def _json(content: object) -> Send:
    return raw(answer(json.dumps(content).encode()))


def _changed(good: Json, place: str, value: object) -> Json:
    """An answer with another value at one place, or without it."""
    changed: Json = json.loads(json.dumps(good))
    *way, last = place.split(".")
    parent = changed
    for name in way:
        parent = parent[name]
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    return changed


# --- the measurement


def measured() -> Outcome:
    with tempfile.TemporaryDirectory(prefix="holdfast-odd-") as place:
        folder, runs = Path(place) / "files", Path(place) / "runs"
        folder.mkdir()
        runs.mkdir()
        file = folder / f"{MODEL}.safetensors"
        file.write_bytes((BUNDLED / file.name).read_bytes())
        (folder / "guard.yaml").write_text(GUARD)
        os.mkfifo(folder / "pipe.safetensors")
        digest = open_subject(Doctor(model=str(file))).digest
        good: Json = {
            "workers": [{"set": digest[:16]}], "sets": {}, "canary": {"state": "none", "reason": ""},
            "model": {
                "set": digest[:16], "digest": digest, "reload": "none", "reason": "", "settings": {"model": str(file)},
            },
        }  # fmt: skip
        odd = [*odd_transfers(), *odd_states(good, folder)]
        before = _contents(folder)
        with ThreadPoolExecutor(len(odd)) as pool:
            rows = list(pool.map(lambda k: _row(odd[k], good, runs / str(k)), range(len(odd))))
        changed = sum(before.get(key) != value for key, value in _contents(folder).items())
        changed += len(before.keys() - _contents(folder).keys())
    ended = [row for row in rows if row["ends"]]
    claims = [
        Claim("servers >= 40", len(rows), 40, least=True),
        Claim("commands with another exit code than 3 <= 0", sum(row["exit"] != 3 for row in rows), 0),
        Claim(f"seconds after an odd answer <= {LATEST_S:g}", max(row["after s"] for row in ended), LATEST_S),
        Claim(
            f"seconds of an answer that does not end <= {ANSWER_S + SPARE_S:g}",
            max(row["s"] for row in rows if not row["ends"]),
            ANSWER_S + SPARE_S,
        ),
        Claim("files changed outside of the run folder <= 0", changed, 0),
        Claim("servers that received the key <= 0", sum(row["key received"] for row in rows), 0),
    ]
    notes = ["commands run at the same time, in threads of one process; the exit code is that of the error"]
    config: Cells = {"network": MODEL, "limit of an answer, s": ANSWER_S, "servers": len(rows)}
    return Outcome([_summary(kind, rows) for kind in _kinds(rows)], claims, config, {"servers": rows}, notes)


def _kinds(rows: list[Cells]) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


def _summary(kind: str, rows: list[Cells]) -> Cells:
    own = [row for row in rows if row["kind"] == kind]
    return {
        "odd answer": kind,
        "servers": len(own),
        "exit codes": ", ".join(sorted({str(row["exit"]) for row in own})),
        "longest, s": max(row["s"] for row in own),
        "longest after the answer, s": max(row["after s"] for row in own) if own[0]["ends"] else "",
    }


def _row(odd: Odd, good: Json, run: Path) -> Cells:
    server = Server(odd, {"/status": good})
    with server.listening() as url:
        begun = time.monotonic()
        error = _error(odd, url, run)
        ended = time.monotonic()
    answered = server.answered_s if odd.ends and server.answered_s is not None else begun
    return {
        "kind": odd.kind,
        "path": odd.path,
        "server": odd.name,
        "exit": error.exit_code if isinstance(error, HoldfastError) else 5,
        "ends": odd.ends,
        "s": ended - begun,
        "after s": max(0.0, ended - answered),
        "key received": any(KEY.encode() in request for request in server.received),
        "message": str(error).replace(str(run.parent.parent), "…").replace(url, "URL"),
    }


def _error(odd: Odd, url: str, run: Path) -> BaseException | None:
    try:
        key = KEY if odd.key else None
        if odd.path == "/monitor":  # what `holdfast monitor URL` and the trigger read
            monitor_state(OperatorPort(url, key))
        else:
            key_file = run.with_suffix(".key")
            key_file.write_text(KEY)
            key_file.chmod(0o600)
            given = {"key_file": str(key_file)} if odd.key else {}
            Adapt(server=url, data="mnist-mini", trigger="alarm", **given).run(run)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - each error is counted
        return error
    return None


def _contents(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else str(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }
