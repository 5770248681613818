"""Schemas of `run.json` and of the other JSON documents of a run. The files are validated against them when they are
read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from holdfast.core.errors import Interrupted, TargetError
from holdfast.core.evidence import DoubtState
from holdfast.core.types import Access
from holdfast.harness import KINDS
from holdfast.store.forms import (
    anything,
    count,
    distinct,
    flag,
    list_of,
    mapped,
    maybe,
    name,
    one_of,
    real,
    record,
    text,
    whole,
)


def _kind(value: object, where: str) -> None:
    """Schema of the name of a kind of stages, also of one that was added after the import."""
    one_of(*KINDS)(value, where)


_STEP = record(
    {
        "name": name,
        "kind": _kind,
        "attack": text,
        "settings": mapped(anything),
        "notes": list_of(text),
        "wave_of": text,
        "adaptive": flag,
    }
)
_THREAT = record(
    {
        "norm": text,
        "eps": real,
        "per": maybe(text),
        "limits": mapped(anything),
        "goal": maybe(whole),
        "access": one_of(*get_args(Access)),
        "queries": maybe(count),
    },
    {"unit": text},
)
_OTHER = record({"name": text, "digest": text}, {"n": count})
_DATA = record(
    {"name": text}, {"n": count, "classes": maybe(list_of(text)), "shape": list_of(count), "digest": text}
)
ASSESSED = record(
    {
        "verb": text,
        "digests": mapped(text),
        "config": record(
            {
                "stages": distinct(_STEP, "name"),
                "threat": _THREAT,
                "seed": whole,
                "suite": text,
                "minimum_norm": flag,
            }
        ),
        "model": record({"randomised": flag}, {"name": text}),
        "data": _DATA,
        "notes": list_of(text),
        "versions": mapped(text),
        "hardware": text,
        "details": list_of(text),
        "surrogates": list_of(_OTHER),
        "other_data": list_of(_OTHER),
    }
)
"""Schema of the file `run.json` of an assessment."""
LISTED = record(
    {
        "verb": text,
        "config": record({"threat": record({"norm": text, "eps": real}, {"unit": text}), "suite": text}),
        "model": record({}, {"name": text}),
        "data": record({}, {"name": text}),
        "plan": record({"stages": distinct(name)}),
    }
)
"""Schema of those parts of `run.json` that the list of runs shows; it fits the runs of all verbs."""
_ESTIMATE = record({"value": real, "low": real, "high": real, "n": count})
_GATE = record(
    {
        "condition": text,
        "estimate": _ESTIMATE,
        "verdict": one_of("pass", "fail", "unclear"),
        "open_doubts": list_of(text),
    },
    {"scope": text},
)
_CODE = one_of(0, 1, 4)
DECIDED = record({"gates": list_of(_GATE), "accepted_doubts": mapped(text), "exit_code": _CODE})
"""Schema of the file `verdict.json` of an assessment."""
JUDGED = record({"verdict_of": one_of("after"), "exit_code": _CODE})
"""Schema of `verdict.json` of a hardening, whose verdict is that of the inner run that measured the new model."""
HEAD = record({"chain": text})
"""Schema of a document with the chain digest of an inner run."""
_DOUBT = record(
    {
        "name": text,
        "state": one_of(*get_args(DoubtState)),
        "statistic": maybe(real),
        "threshold": maybe(real),
        "n": count,
        "message": text,
    }
)
DOUBTED = record(
    {
        "cost": record(dict.fromkeys(("forwards", "backwards", "queries"), real)),
        "doubts": list_of(_DOUBT),
        "notes": list_of(text),
        "broken": mapped(list_of(whole)),
    },
    {"batches": mapped(count)},
)
"""Schema of the file `doubts.json`."""


DIFFERING = record({"nodes": list_of(mapped(text))})
"""Schema of the file `nodes.json`."""


@contextmanager
def consistent(path: Path) -> Iterator[None]:
    """Context manager that raises `TargetError` if the files of a run contradict each other.

    Each file may be valid alone and still not match the others, such as a column that is missing or too short.
    """
    try:
        yield
    except (TargetError, Interrupted, OSError):
        raise
    except Exception as error:
        raise TargetError(
            f"the files of the run in {str(path)!r} are inconsistent ({type(error).__name__}: {error}); restore it "
            "from a copy, or see holdfast verify"
        ) from error
