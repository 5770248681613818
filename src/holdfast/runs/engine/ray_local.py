"""A Ray cluster that is started on this machine and ends with the process of the run."""

import contextlib
import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.core.errors import TargetError, UsageError

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
    if not any(os.environ.get(name) for name in _TOKEN_VARIABLES) and not _default_token().is_file():
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


def _default_token() -> Path:
    return Path.home() / ".ray" / "auth_token"


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
