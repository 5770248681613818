"""Functions that Ray sends by value to its worker processes.

They use only the standard library until the versions of the node were compared with those of the process of the run, so
that they also run on a node where Holdfast is missing or has another version. They return bytes, and raise only
exceptions of Ray, because Ray would pickle them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

STRICT = ("python", "torch", "holdfast")
"""Properties of a node that must equal those of the process of the run."""


def report(paths: Sequence[str], device: str, threads: int | None = None) -> dict[str, Any]:
    """Return the versions, the digest of the code, the threads and the device of this process.

    Entries of `paths` that are not on the import path yet are added at its end. If `threads` is given, torch uses that
    many threads from now on. If an entry cannot be determined, its value is the reason.
    """
    import os
    import platform
    import socket
    import sys

    sys.path.extend(path for path in paths if path not in sys.path)
    ray = sys.modules.get("ray")
    node = (
        ray.get_runtime_context().get_node_id()
        if threads and ray is not None and ray.is_initialized()
        else ""
    )
    found: dict[str, Any] = {
        "node": f"{socket.gethostname()} ({node[:12] or os.getpid()})",
        "python": platform.python_version(),
    }
    try:
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        found["torch"] = str(torch.__version__).partition("+")[0]
    except Exception as error:  # noqa: BLE001 - a broken installation may raise anything
        return {**found, "torch": f"{type(error).__name__}: {error}"}
    try:
        import holdfast

        found["holdfast"] = holdfast.__version__
        from holdfast.runs.engine.identity import node_properties

        return found | node_properties(device)
    except Exception as error:  # noqa: BLE001 - the same
        return {"holdfast": f"{type(error).__name__}: {error}", **found}


def fetched(reference: Any) -> Any:
    """Return an object of the object store, which the process of the run has put there."""
    import ray

    return ray.get(reference)


def report_as_bytes(paths: Sequence[str], device: str, stored: Sequence[Any]) -> bytes:
    """Return the report of this process, as JSON after the letter R.

    `stored` contains the reference of an object of the process of the run. If this node cannot fetch it, the exception
    of Ray is passed on, which says so.
    """
    import json

    fetched(stored[0])
    return b"R" + json.dumps(report(paths, device, 1)).encode()


def measured(
    expected: Mapping[str, str],
    paths: Sequence[str],
    device: str,
    setup: Sequence[Any],
    task: bytes,
    buffers: Sequence[Any],
    stored: bool,  # noqa: FBT001 - Ray passes arguments by position
) -> bytes:
    """Measure a shard, and return its columns as `holdfast.runs.engine.ray_worker.measured` does.

    `setup` contains the reference of the pickled setup, `task` is the pickled task, and `buffers` are its arrays or, if
    `stored`, the reference of these. If the versions of this node are not the `expected` ones, the report is returned
    after the letter N.
    """
    import json

    found = report(paths, device, 1)
    if any(found.get(name) != value for name, value in expected.items()):
        return b"N" + json.dumps(found).encode()
    from holdfast.runs.engine.ray_worker import measured as measured_here

    return measured_here(setup[0], task, buffers, found, stored=stored, fetched=fetched)
