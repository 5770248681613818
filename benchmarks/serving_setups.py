"""Servers of Holdfast that run in this process, and a process that sends requests to them."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Self

from benchmarks.load import Seen
from benchmarks.networks import network
from benchmarks.throughput import Contestant
from holdfast.core.model import Classifier
from holdfast.server.audit_chain import AuditKey
from holdfast.server.messages import LoadedModel
from holdfast.server.server_setup import LivePool, ServerSettings, ServerSetup, WorkerSetup
from holdfast.server.supervisor import Supervisor


class Loading:
    """Calls functions that send requests in a process of its own, because the supervisor runs in this one."""

    def __enter__(self) -> Self:
        self._process = ProcessPoolExecutor(1, get_context("spawn"))
        return self

    def __exit__(self, *error: object) -> None:
        self._process.shutdown()

    def __call__(self, load: Callable[..., Seen], *arguments: object, **settings: object) -> Seen:
        return self._process.submit(load, *arguments, **settings).result()


def loop_and_parser() -> str:
    """The event loop and the HTTP parser that servers of this environment use."""
    return ", ".join(name for name in ("uvloop", "httptools") if find_spec(name)) or "asyncio and h11"


def model(name: str) -> Classifier:
    """A network for the server. The bundled ones are classifiers already, and their layers keep their names: a monitor
    finds the layer of the embeddings by its name.
    """
    module = network(name).module
    return module if isinstance(module, Classifier) else Classifier(module)


def _opened(name: str) -> LoadedModel:
    return LoadedModel(model(name))


def setup(
    folder: Path,
    name: str,
    shape: tuple[int, ...],
    *,
    audited: bool = True,
    pool: LivePool | None = None,
    profile: bool = False,
    **more: object,
) -> ServerSetup:
    """The setup of a server of a network with one worker, whose audit is in a folder."""
    audit = folder / "audit" if audited else None
    settings = ServerSettings(
        port=0, max_latency="5s", audit=None if audit is None else str(audit), profile=profile
    )
    key = None if audit is None else AuditKey.of(audit)
    worker = WorkerSetup(partial(_opened, name), name, shape, settings, threads=1, audit_key=key, **more)
    return ServerSetup(worker, pool)


@contextmanager
def running(setup: ServerSetup) -> Iterator[Supervisor]:
    """Run a server."""
    server = Supervisor(setup)
    server.start()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@contextmanager
def ours(folder: Path, name: str, shape: tuple[int, ...], **settings: object) -> Iterator[Contestant]:
    """`holdfast serve` with a network, as a server of a comparison."""
    folder.mkdir()
    with running(setup(folder, name, shape, set_name="file", **settings)) as server:
        pid = server.status()["workers"][0]["pid"]
        yield Contestant(server.address[1], (pid,), f"/v2/models/{name}/infer")
