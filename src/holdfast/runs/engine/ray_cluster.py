"""The connection to a Ray cluster: starts a local one, or connects to an existing one."""

import contextlib
import importlib.util
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

from holdfast.core.errors import RESUME, HoldfastError, Install, Remedy, TargetError, UsageError
from holdfast.runs.engine.progress import Notify, ignore

_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_SOCKET = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Number of bytes that Ray appends to its folder for the path of a socket."""
_LONGEST_SOCKET = 103
"""Largest number of bytes of such a path on every system; 107 on Linux."""


@contextmanager
def local_cluster(ray: ModuleType, workers: int, gpus: int | None) -> Iterator[Any]:
    """Start a cluster on this machine that requires a token, and yield what `ray.init` returns; it ends on exit.

    Ray opens ports on all network interfaces, so an environment that switches tokens off is refused. Without a token of
    the user, the cluster has one of its own, which is passed in the environment of its processes and written to no
    file. Files of the session are in a temporary folder, which is deleted on exit. Raises `UsageError` or
    `TargetError`.
    """
    mode = os.environ.pop("RAY_AUTH_MODE", "token")  # `token` is Ray's default
    if mode != "token":
        raise UsageError(
            f"RAY_AUTH_MODE is {mode!r}, with which every machine of the network could run code in the cluster that "
            "is started; unset it, or set it to token"
        )
    if (
        not any(os.environ.get(name) for name in _TOKEN_VARIABLES)
        and not Path.home().joinpath(".ray", "auth_token").is_file()
    ):
        os.environ["RAY_AUTH_TOKEN"] = _own_token()
    with ExitStack() as stack:
        try:
            # a short name, because paths of sockets are limited; its owner alone can enter it, unlike Ray's own folder
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="hf-", ignore_cleanup_errors=True)
            )
            session = Path(folder, "r")
            session.mkdir()
            stack.callback(shut_down, ray)
            # Ray puts the current folder on the import path of workers
            with own_signals(), quiet(), contextlib.chdir(session):
                context = ray.init(
                    address="local",
                    num_cpus=workers,
                    num_gpus=gpus,
                    include_dashboard=None,
                    log_to_driver=False,
                    logging_level="ERROR",
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(session),
                )
        except (ConnectionError, RuntimeError, OSError) as error:
            raise TargetError(f"Ray did not start on this machine: {error}{_shorter()}") from error
        yield context


def _shorter() -> str:
    """Return the remedy for a path of temporary folders that is too long for the sockets of Ray, otherwise nothing."""
    folder = Path(tempfile.gettempdir(), "hf-12345678", "r")
    if len(os.fsencode(folder)) + _SOCKET <= _LONGEST_SOCKET:
        return ""
    return (
        f". The path of temporary files, {tempfile.gettempdir()}, may be too long for its sockets; set TMPDIR to a "
        "shorter one, as in TMPDIR=/tmp"
    )


def shut_down(ray: ModuleType) -> None:
    """Close the connection to a cluster, and end the cluster if this process has started it."""
    with own_signals():
        ray.shutdown()


@cache
def _own_token() -> str:
    """Return a new token, the same for all clusters of this process: Ray reads its token once in a process."""
    return secrets.token_hex(32)


@contextmanager
def unchanged_process() -> Iterator[None]:
    """Context manager that restores the environment on exit; Ray changes it, also after an error."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name not in before and name.startswith("RAY_")]:
            del os.environ[name]
        for name, value in before.items():
            if name.startswith("RAY_"):
                os.environ[name] = value


@contextmanager
def own_signals() -> Iterator[None]:
    """Context manager that restores the handlers of signals, which Ray replaces when it connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Context manager without the warnings of Ray on its own settings and on its connections."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


NODES = "nodes"
"""Kind of the document with the properties of nodes that differ from the process of the run."""
_FETCH_S = 600
"""Seconds in which a finished result must arrive from its node."""
Failure = Literal["memory", "lost", "unfetched", "full", "cancelled", "error"]
"""Reason why a task has no result: its worker was killed for memory, its worker or node is lost, the task could not
fetch an object of this process, the object store is full, it was cancelled, or it raised an exception."""
CONNECT_S = 10
"""Seconds in which an address must answer."""
_TRY_S = 2
"""Seconds of each of the three tries of Ray's client; the rest of `CONNECT_S` is for the first connection."""
_TLS = "RAY_USE_TLS"
_SETTINGS = {
    "RAY_ENABLE_AUTO_CONNECT": "0",  # after a lost connection, Ray would start a cluster of its own
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run`, Ray would send the current folder to all nodes
    "RAY_CLIENT_INITIAL_CONNECTION_TIMEOUT_S": str(_TRY_S),
    "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": str(_TRY_S),
}
"""Environment variables that Ray reads when it is imported, unless they are set already."""


@dataclass(frozen=True)
class RayOptions:
    """Options of a run on a Ray cluster: its address, what is sent to the nodes, and how many resources it uses."""

    address: str = ""
    """`ray://HOST:PORT`; empty for a cluster that is started on this machine"""
    ship: tuple[Path, ...] = ()
    """files and folders of code that are sent to the nodes"""
    gpus_per_worker: float | None = None
    """number of GPUs of each task, which may be a fraction; None for one if the run is on a GPU, else for none"""
    mixed_nodes: bool = False
    trust_network: bool = False
    timeout_s: float = 600.0
    """seconds to wait for enough free CPUs"""


def refuse_address(options: RayOptions) -> None:
    """Raise `UsageError` for an invalid address, and for one in a network that is neither encrypted nor trusted."""
    if not options.address:
        return
    parts = urlsplit(options.address)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    further = (parts.query, parts.fragment, parts.username, parts.password)
    if parts.scheme != "ray" or not host or not port or parts.path not in ("", "/") or any(further):
        raise UsageError(
            f"on is {options.address.rpartition('@')[2]!r}; expected local, ray, or ray://HOST:PORT without a user, as "
            "in ray://head:10001"
        )
    has_tls = os.environ.get(_TLS, "0").lower() in ("1", "true")
    if not _is_loopback(host) and not has_tls and not options.trust_network:
        raise UsageError(
            f"{options.address} is not on this machine, and connections of Ray are not encrypted: whoever reads or "
            f"changes them runs code in the job. Set {_TLS}=1 with Ray's certificates",
            Remedy(
                "trust_network", True, function="Ray", reason="if you trust every machine of that network"
            ),
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_missing_ray(*, client: bool = False) -> None:
    """Raise `UsageError`, with the command that installs it, if Ray or its client is not installed."""
    for module, name in (("ray", "Ray"), *([("grpc", "Ray's client")] if client else [])):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"a cluster needs {name}, which is not installed", Install("scale"))


def imported_ray() -> ModuleType:
    """Return the module `ray`. Raises `UsageError` if it is missing."""
    refuse_missing_ray()
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    from holdfast.runs.engine import ray_node

    ray.cloudpickle.register_pickle_by_value(ray_node)
    module: ModuleType = ray
    return module


@dataclass
class Cluster:
    """A connection to a cluster, with the operations that the executor needs."""

    ray: ModuleType
    local: bool
    """whether the cluster was started on this machine by this process"""
    dashboard: str = ""
    _functions: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def submit(self, function: Callable[..., bytes], arguments: Sequence[Any], **options: Any) -> Any:
        """Start a task, and return the reference to its result."""
        key = (function, *sorted((name, str(value)) for name, value in options.items()))
        with self._reachable():
            if key not in self._functions:
                remote = self.ray.remote(function)
                self._functions[key] = remote.options(max_retries=0, **options)
            return self._functions[key].remote(*arguments)

    def put(self, content: Any) -> Any:
        """Store bytes or arrays in the object store, and return their reference. Raises `TargetError` if it is full."""
        try:
            with self._reachable():
                return self.ray.put(content)
        except (self.ray.exceptions.ObjectStoreFullError, self.ray.exceptions.OutOfDiskError) as error:
            raise full() from error

    def finished(self, references: Sequence[Any], timeout_s: float) -> list[Any]:
        """Return references whose tasks have ended; waits at most `timeout_s` seconds for the first one."""
        with self._reachable():
            ready, _ = self.ray.wait(list(references), num_returns=1, timeout=timeout_s)
            more, _ = self.ray.wait(list(references), num_returns=len(references), timeout=0)
        return [*ready, *(each for each in more if each not in ready)]

    def result(self, reference: Any) -> bytes | Failure:
        """Return what a finished task returned, or why there is no result."""
        errors = self.ray.exceptions
        failures: Mapping[Failure, tuple[type[Exception], ...]] = {
            "memory": (errors.OutOfMemoryError,),
            "full": (errors.ObjectStoreFullError, errors.OutOfDiskError),
            "cancelled": (errors.TaskCancelledError,),
            "lost": (
                errors.WorkerCrashedError,
                errors.NodeDiedError,
                errors.ObjectLostError,
                errors.GetTimeoutError,
            ),
            "error": (errors.RayError,),  # an exception of the task, or one that cannot be unpickled
        }
        with self._reachable():
            try:
                content: bytes = self.ray.get(reference, timeout=_FETCH_S)
            except errors.RayError as error:
                if not self.ray.is_initialized():
                    raise
                if isinstance(error, errors.RayTaskError) and isinstance(error, errors.ObjectLostError):
                    return "unfetched"
                return next(failure for failure, kinds in failures.items() if isinstance(error, kinds))
        return content

    def cancel(self, references: Sequence[Any]) -> None:
        """Cancel tasks, and end the workers that run them. A task of a cluster that is lost has ended already."""
        for reference in references if self.ray.is_initialized() else ():
            with suppress(self.ray.exceptions.RayError, *self._connection_errors()):
                self.ray.cancel(reference, force=True)

    def nodes(self) -> list[dict[str, Any]]:
        """Return the nodes that are alive and have a CPU."""
        with self._reachable():
            nodes = self.ray.nodes()
        return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    def total(self, resource: str) -> float:
        """Return the amount of a resource, such as CPU, on all nodes."""
        with self._reachable():
            return float(self.ray.cluster_resources().get(resource, 0.0))

    def _connection_errors(self) -> tuple[type[Exception], ...]:
        """Return the classes of the errors with which Ray reports that the connection is lost."""
        kinds = ConnectionError, self.ray.exceptions.RaySystemError
        return (*kinds, sys.modules["grpc"].RpcError) if "grpc" in sys.modules else kinds

    @contextmanager
    def _reachable(self) -> Iterator[None]:
        """Context manager that raises `TargetError` if the connection to the cluster is lost."""
        try:
            if not self.ray.is_initialized():
                raise ConnectionError("it is closed")
            yield
        except HoldfastError:
            raise
        except Exception as error:  # a call to a cluster that is lost may fail in any way
            if self.ray.is_initialized() and not isinstance(error, self._connection_errors()):
                raise
            raise TargetError(
                f"the connection to the cluster was lost ({type(error).__name__}: {error}); look whether its head node "
                "runs, and then continue",
                RESUME,
            ) from error


def full() -> TargetError:
    """Return the error for an object store that is full."""
    return TargetError(
        "the object store of Ray is full, in memory and on disk; give it more memory (ray start "
        "--object-store-memory), or use fewer workers or smaller batches"
    )


_current: list[Cluster] = []
"""The connection of this process, while it is open."""


@contextmanager
def connected(options: RayOptions, workers: int, *, detail: Notify = ignore) -> Iterator[Cluster]:
    """Context manager that yields a connection to the cluster of the options, which is closed on exit.

    Inside of another such context, or if this process has called `ray.init`, the open connection is used and stays
    open. Raises `UsageError` or `TargetError` if there is no connection.
    """
    refuse_address(options)
    ray = imported_ray()
    if _current:
        yield _current[0]
        return
    with ExitStack() as stack:
        if ray.is_initialized():
            cluster = Cluster(ray, local=False)
        else:
            stack.enter_context(unchanged_process())
            start = _joined(ray, options) if options.address else _started(ray, workers, options)
            cluster = stack.enter_context(start)
            # messages of Ray and of its workers must not be part of a report on stdout
            stack.enter_context(redirect_stdout(sys.stderr))
        if cluster.dashboard:
            detail(f"dashboard of Ray: http://{cluster.dashboard}")
        _current.append(cluster)
        try:
            yield cluster
        finally:
            _current.clear()


@contextmanager
def _started(ray: ModuleType, workers: int, options: RayOptions) -> Iterator[Cluster]:
    """Start a cluster on this machine, which ends on exit. Raises `UsageError` or `TargetError`."""
    gpus = None if options.gpus_per_worker else 0  # None for all that Ray finds
    has_dashboard = importlib.util.find_spec("aiohttp_cors") is not None
    with local_cluster(ray, workers, gpus) as context:
        yield Cluster(ray, local=True, dashboard=str(context.dashboard_url or "") if has_dashboard else "")


@contextmanager
def _joined(ray: ModuleType, options: RayOptions) -> Iterator[Cluster]:
    """Connect to an existing cluster with Ray's client; the tasks of this process end on exit."""
    refuse_missing_ray(client=True)
    parts = urlsplit(options.address)
    assert parts.hostname is not None and parts.port is not None
    address = (
        f"[{parts.hostname}]:{parts.port}" if ":" in parts.hostname else f"{parts.hostname}:{parts.port}"
    )
    begun = time.monotonic()
    with ExitStack() as stack:
        try:
            stack.enter_context(quiet())  # the process of the run reports a lost connection itself
            _refuse_silence(parts.hostname, parts.port, CONNECT_S - 3 * _TRY_S)
            stack.callback(shut_down, ray)
            context = _client_context(ray, address)
        except RuntimeError as error:  # other versions of Ray or Python
            raise TargetError(
                f"{options.address} refused the connection: {error}. Install the same versions of Python and Ray here "
                "and on all nodes"
            ) from error
        except ray.exceptions.AuthenticationError as error:
            raise TargetError(
                f"{options.address} refused the connection: {error}. Ray reads its token from RAY_AUTH_TOKEN, "
                "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
            ) from error
        except OSError as error:
            raise _no_answer(options, begun, error) from error
        yield Cluster(ray, local=False, dashboard=str(context.dashboard_url or ""))


def _client_context(ray: ModuleType, address: str) -> Any:
    """Connect Ray's client to `HOST:PORT`, and return what `ray.init` returns."""
    with own_signals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ray.init(f"ray://{address}", log_to_driver=False, logging_level="ERROR")


def _refuse_silence(host: str, port: int, seconds: float) -> None:
    """Raise `OSError` if no connection to a port is accepted within a time, which includes the look-up of the name and
    all its addresses.
    """
    errors: list[OSError] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), seconds).close()
        except OSError as error:
            errors.append(error)

    # a thread, because a look-up has no time limit
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError("timed out")
    if errors:
        raise errors[0]


def _no_answer(options: RayOptions, begun: float, error: Exception) -> TargetError:
    return TargetError(
        f"{options.address} does not answer as a Ray cluster (after {time.monotonic() - begun:.0f} s: "
        f"{type(error).__name__}: {error}); look whether the head node runs ray start --head with "
        "--ray-client-server-port, whether the port is reachable from here, and whether RAY_AUTH_TOKEN is the token of "
        "the cluster"
    )
