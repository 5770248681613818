"""Measurement of shards in a worker process of Ray (`ray_tasks.py`).

A result is a letter, the length of a JSON header, the header, and the columns as safetensors. The letters are those of
`worker.py`: C columns, L out of time, E error.
"""

import atexit
import json
import pickle
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import safetensors.torch

from holdfast.core.errors import HoldfastError, Remedy, UsageError, failure_to_json
from holdfast.core.meter import Room
from holdfast.runs.engine.run import Measure, OutOfTime

LENGTH = struct.Struct("<I")
"""Format of the number of bytes of the header."""


class Opened:
    """The model that this process has opened last, and the function that measures shards of its run."""

    def __init__(self) -> None:
        self.key, self.stack = "", ExitStack()
        self.measure: Measure | None = None

    def at(self, reference: Any, fetched: Callable[[Any], Any]) -> Measure:
        """Return the function that measures shards; a setup other than the last one is fetched and opened."""
        if self.measure is None or reference.hex() != self.key:
            self.close()
            # sent by the process of the run
            setup = pickle.loads(fetched(reference))  # noqa: S301
            self.measure = self.stack.enter_context(setup())
            self.key = reference.hex()
        return self.measure

    def close(self) -> None:
        """Close the model that is open."""
        self.key, self.measure = "", None
        self.stack.close()
        self.stack = ExitStack()


def _object_lost(error: Exception) -> bool:
    import ray

    return isinstance(error, ray.exceptions.ObjectLostError)


CURRENT = Opened()
"""The model that this worker process has open."""
atexit.register(CURRENT.close)


def measured(
    reference: Any,
    task: bytes,
    buffers: Sequence[Any],
    report: dict[str, Any],
    *,
    stored: bool,
    fetched: Callable[[Any], Any],
) -> bytes:
    """Measure a shard, and return its columns with the report of the node, or the reason why there are none.

    If `stored` is true, `buffers` contains the reference of the buffers in the object store, whose objects `fetched`
    returns.
    """
    cpu, splits = time.process_time(), list[dict[str, int]]()

    def header(**more: Any) -> bytes:
        content = {"node": report, "cpu_s": time.process_time() - cpu, "splits": splits, **more}
        written = json.dumps(content).encode()
        return LENGTH.pack(len(written)) + written

    try:
        measure = CURRENT.at(reference, fetched)
        if stored:
            buffers = fetched(buffers[0])
        # sent by the process of the run
        work, size, known, left_s = pickle.loads(task, buffers=buffers)  # noqa: S301
        room = Room(size, known, lambda row, half: splits.append({"row": row, "size": half}))
        columns = measure(work, room, time.perf_counter() + left_s)
    except OutOfTime:
        return b"L" + header()
    except HoldfastError as error:
        return b"E" + header(**failure_to_json(error))
    except ModuleNotFoundError as error:
        module = (error.name or "NAME").partition(".")[0]
        missing = UsageError(
            f"a worker cannot import {error.name}, which the model needs; send it, or install it on the nodes. A "
            "folder arrives as a package with its name",
            Remedy("ship", (f"{module}.py",), function="Ray", repeated=True),
        )
        return b"E" + header(**failure_to_json(missing))
    except Exception as error:
        if _object_lost(error):  # the process of the run stores the setup again
            raise
        message = f"a worker failed:\n{traceback.format_exc()}"
        return b"E" + header(**failure_to_json(HoldfastError(message)))
    content = {name: values.cpu().contiguous().clone() for name, values in columns.items()}
    return b"C" + header() + safetensors.torch.save(content)
