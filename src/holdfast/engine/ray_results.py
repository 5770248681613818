"""Results of tasks of a Ray cluster, which are received as bytes.

Ray's own `ray.get` unpickles what a worker sends, which may run code. Here only results that a worker returned as bytes
are read, and all others are reported by the number or the name that Ray gives the error.
"""

import io
import pickle
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

_FETCH_S = 600
"""Seconds in which a finished result must arrive from its node."""
Failure = Literal["memory", "lost", "full", "cancelled", "unreadable"]
"""Reason why a task has no result: its worker was killed for memory, its worker or node is lost, the object store is
full, it was cancelled, or its result was not bytes."""


def result_of(client: Any, reference: Any) -> bytes | Failure:
    """Return the bytes that a finished task returned, or the failure.

    `client` is the connection of Ray's client, or None for a direct connection.
    """
    return _direct_result(reference) if client is None else _client_result(client, reference)


_FAILURES: Mapping[str, Failure] = {
    "OUT_OF_MEMORY": "memory",
    "OutOfMemoryError": "memory",
    "WORKER_DIED": "lost",
    "WorkerCrashedError": "lost",
    "NODE_DIED": "lost",
    "NodeDiedError": "lost",
    "WORKER_STARTUP_FAILED": "lost",
    "OBJECT_LOST": "lost",
    "ObjectLostError": "lost",
    "OBJECT_DELETED": "lost",
    "OBJECT_FREED": "lost",
    "OBJECT_FETCH_TIMED_OUT": "lost",
    "ObjectFetchTimedOutError": "lost",
    "ObjectReconstructionFailedError": "lost",
    "OWNER_DIED": "lost",
    "OwnerDiedError": "lost",
    "OUT_OF_DISK_ERROR": "full",
    "OutOfDiskError": "full",
    "ObjectStoreFullError": "full",
    "TASK_CANCELLED": "cancelled",
    "TaskCancelledError": "cancelled",
}
"""The failure that an error of Ray means. Keys are names of error codes, which direct connections use, and names of
error classes, which Ray's client sends."""


def _failure(name: str) -> Failure:
    return "lost" if name.startswith("OBJECT_UNRECONSTRUCTABLE") else _FAILURES.get(name, "unreadable")


def _direct_result(reference: Any) -> bytes | Failure:
    from ray._private.worker import global_worker
    from ray.core.generated.common_pb2 import ErrorType
    from ray.exceptions import GetTimeoutError

    try:
        ((content, kind, *_),) = global_worker.core_worker.get_objects([reference], _FETCH_S * 1000)
    except GetTimeoutError:
        return "lost"
    first = (kind or b"").split(b",")[0]
    if first == b"RAW":
        return b"" if content is None else bytes(content.to_pybytes())
    if first.isdigit() and int(first) in ErrorType.values():
        return _failure(ErrorType.Name(int(first)))
    return "unreadable"


def client_of(ray: ModuleType) -> Any:
    """Return the connection of Ray's client, or None if this process is connected directly or not at all."""
    if "ray.util.client" not in sys.modules or not ray.util.client.ray.is_connected():
        return None
    return ray.util.client.ray.get_context().client_worker


class _Inert:
    """Placeholder for the objects in a pickled error. It ignores its arguments."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _Primitive(pickle.Unpickler):
    """Unpickler that creates numbers, text, bytes and containers only.

    If `named` is true, errors of Ray are accepted as well: each is replaced with an inert object, and its name is kept.
    """

    def __init__(self, content: bytes, *, named: bool = False) -> None:
        super().__init__(io.BytesIO(content))
        self.named, self.names = named, list[str]()

    def find_class(self, module: str, name: str) -> Any:
        """Return an inert class for an error of Ray. Raises `UnpicklingError` for anything else."""
        if not self.named or module != "ray.exceptions":
            raise pickle.UnpicklingError(f"{module}.{name} is not accepted from a worker")
        self.names.append(name)
        return type(name, (_Inert,), {})


def bytes_in_pickle(content: bytes) -> bytes | None:
    """Return the bytes in the pickle of a list with one bytes object, or None for any other pickle, of which nothing is
    run.
    """
    try:
        match _Primitive(content).load():
            case [bytes(value)]:
                return value
    except Exception:  # noqa: BLE001 - a damaged pickle raises errors of many classes
        return None
    return None


def error_in_pickle(content: bytes) -> str:
    """Return the name of the error of Ray in a pickle, or an empty string for any other pickle, of which nothing is
    run.
    """
    unpickler = _Primitive(content, named=True)
    try:
        found = unpickler.load()
    except Exception:  # noqa: BLE001 - the same
        return ""
    return type(found).__name__ if isinstance(found, _Inert) else ""


def _client_result(client: Any, reference: Any) -> bytes | Failure:
    from ray.core.generated import ray_client_pb2

    request = ray_client_pb2.GetRequest(ids=[reference.id], timeout=_FETCH_S)
    content = bytearray()
    for chunk in client._get_object_iterator(request, metadata=client.metadata):
        if not chunk.valid:
            return _failure(error_in_pickle(chunk.error))
        content.extend(chunk.data)
    found = bytes_in_pickle(bytes(content))
    return "unreadable" if found is None else found
