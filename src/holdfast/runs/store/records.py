"""Reads and writes the hash chain of a run, `chain.jsonl`, and JSON documents."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.core.errors import TargetError
from holdfast.core.names import kind_of
from holdfast.core.remedies import RESUME
from holdfast.runs.store.append_log import AppendLog, LogForm
from holdfast.runs.store.files import MANIFEST, content_of
from holdfast.runs.store.forms import is_name

CHAIN = "chain.jsonl"
COLUMNS = ".safetensors"
"""Suffix of the names of column files and of files with weights."""


Chain = AppendLog
"""The hash chain of a run: a record for each file, oldest first."""


def read_chain(folder: Path, *, repair: bool) -> Chain:
    """Return the hash chain of the run in a folder. If `repair` is true, an incomplete last line, which may remain
    after a kill, is removed.

    Raises `TargetError` with the first invalid record.
    """
    chain = AppendLog(folder / CHAIN, _FORM)
    if repair:
        chain.repair()
    elif chain.read():
        raise TargetError(
            f"the last record of {str(folder / CHAIN)!r} is truncated; resuming removes it", RESUME
        )
    return chain


def _refuse_outside(content: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a record of a file outside the run folder or with a wrong name; runs may be untrusted."""
    kind, stage = content["kind"], content.get("name", "")
    of_stage = kind == "stage"
    has_valid_names = is_name(kind) and (is_name(stage) if of_stage else stage == "")
    files = [MANIFEST] if kind == "run" else [f"{stage if of_stage else kind}{COLUMNS}"]
    files += [] if of_stage or kind == "run" else [f"{kind}.json"]
    if not has_valid_names or content["file"] not in files or not isinstance(content["digest"], str):
        raise ValueError(content["file"])
    reached, splits = content.get("reached"), content.get("splits", [])
    if not isinstance(reached, int | None) or not isinstance(splits, list):
        raise ValueError(reached)


_FORM = LogForm(_refuse_outside)


def document(content: object) -> bytes:
    """Return JSON content as the bytes of a sorted and indented document. Equal content gives equal bytes."""
    return (json.dumps(content, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def read_document(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file. Raises `TargetError` if it is not a JSON object."""
    return parsed(path, content_of(path))


def parsed(path: Path, data: bytes) -> dict[str, Any]:
    """Return the JSON object that the bytes of a file contain. Raises `TargetError` for any other content, for an
    object with a repeated key, and for infinities and NaN, which strict JSON cannot contain.
    """
    try:
        content = json.loads(
            data, object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{str(path)!r} is not valid JSON: {error}; restore it from a copy") from error
    if not isinstance(content, dict):
        raise TargetError(f"{str(path)!r} contains {kind_of(content)}; an object was expected")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:60]} is not finite")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((repeated, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:60]!r} is repeated")
    return content
