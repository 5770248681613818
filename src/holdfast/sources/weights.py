"""Loads the tensors of a weights file into a network, or reports which of them do not match it."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from reprlib import Repr
from threading import get_ident
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from holdfast.core.errors import TargetError
from holdfast.sources.archive import Weights, read_once, read_weights
from holdfast.sources.files import readable_file

METADATA_KEY = "holdfast"
"""Metadata key of Holdfast's safetensors files; its value is sorted JSON."""
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes that DataParallel, torch.compile and training scripts add to every name."""
_SHOWN = 4
_MOST_WRAPPERS = 8


def state_dict_content(path: Path) -> bytes:
    """Return the content of a file with weights.

    It is read once, so that its digest is that of the loaded bytes. It is not mapped: the process would end if the file
    was truncated in the meantime. Raises the errors of `read_once`, but safetensors have no limit of size.
    """
    if path.suffix != ".safetensors":
        return read_once(path, "weights file")
    return readable_file(path, "weights file").read_bytes()


def read_state_dict(path: Path, content: bytes) -> tuple[Weights, dict[str, Any]]:
    """Return the tensors in the `content` of a safetensors file or a `.pt` state dict, and Holdfast's metadata, which
    may be empty.
    """
    if path.suffix != ".safetensors":
        return read_weights(path, content), {}
    try:
        tensors = safetensors.torch.load(content)  # checks the header
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text = header.get("__metadata__", {}).get(METADATA_KEY, "{}")
        metadata = json.loads(text)
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise TargetError(
            f"{str(path)!r} is no readable safetensors file: {error}; write or download it again"
        ) from error
    if not isinstance(metadata, dict):
        raise TargetError(f"{str(path)!r} carries {METADATA_KEY} metadata that is no object: {text[:80]!r}")
    refuse_description(path, metadata)
    return Weights(tensors, digest=hashlib.sha256(content).hexdigest()), metadata


def written(net: nn.Module, described: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file with the weights of the network and the metadata `described`."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(described, sort_keys=True)})


def refuse_misfit(make: Callable[[], nn.Module], weights: Weights, source: str, *, spare: int = 0) -> None:
    """Raise `TargetError` if the names or shapes of a network's tensors differ from those in a weights file, before
    memory is allocated for the network.

    The network is built by `make` on the meta device. Building ends when it has `spare` more parameters than the file
    has tensors, because a file or a configuration may request a network of any size. Errors of `make` are not caught.
    """
    most, n = len(weights.tensors) + spare, 0
    thread = get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal n
        if get_ident() != thread:  # the hook is called for networks of all threads
            return
        n += 1
        if n > most:
            raise TargetError(
                f"the weights of {source} do not fit: it has {len(weights.tensors)} tensors and asks for a network "
                "with more. Check --arch and --model-args, or train and save it again"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            net = make()
    finally:
        hook.remove()
    _fitting(net, weights, source)


def fit_weights(net: nn.Module, weights: Weights, source: str) -> tuple[str, ...]:
    """Load the tensors of a weights file into the network in place. Return notes on changed names for the report.

    Raises `TargetError`, with the names of the tensors, if some do not match or are not finite.
    """
    tensors, notes = _fitting(net, weights, source)
    net.load_state_dict(tensors)
    broken = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise TargetError(
            f"the weights of {source} hold NaN or infinity in {_listed(broken)}; train or save them again"
        )
    return (*weights.notes, *notes)


def _fitting(net: nn.Module, weights: Weights, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the names in the network, and notes.

    Raises `TargetError` with the names of the tensors that do not match.
    """
    wanted = net.state_dict()
    tensors, notes = _unwrapped(weights.tensors, wanted)
    # Checkpoints from before torch 0.4 lack the counter, which eval mode does not use.
    counters = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    tensors = {**{name: value for name, value in counters.items() if name not in tensors}, **tensors}
    problems = _problems(tensors, wanted)
    if problems:
        raise TargetError(
            f"the weights of {source} do not fit {type(net).__name__}: {'; '.join(problems)}. Check --arch and "
            "--model-args, or rename the keys of the state dict if only the names differ"
        )
    return tensors, notes


def _unwrapped(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without known prefixes of their names, and notes. If some names match, none is changed."""
    now: dict[str, Tensor] = dict(tensors)
    notes: list[str] = []
    while not wanted.keys() & now.keys() and len(notes) < _MOST_WRAPPERS:
        around = [prefix for prefix in WRAPPERS if now and all(name.startswith(prefix) for name in now)]
        if not around:
            return dict(tensors), []
        now = {name.removeprefix(around[0]): value for name, value in now.items()}
        notes.append(f"the prefix {around[0]!r} was taken off every name")
    return now, notes


def _problems(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    return [
        f"{kind} {_listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape:", shapes))
        if names
    ]


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


MOST_CLASSES = 1_000_000
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 60


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 and math.isfinite(value)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _are_bounds(value: Any) -> bool:
    return _are_numbers(value) and len(value) == 2 and value[0] < value[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_CLASSES


def _are_whole(value: Any) -> bool:
    return isinstance(value, dict) and all(type(each) is int for each in value.values())


def _are_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return texts and 1 <= len(value) <= MOST_CLASSES


_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: isinstance(value, str), "the name of an architecture"),
    "arguments": (_are_whole, "names with whole numbers"),
    "bounds": (_are_bounds, "two numbers, the smaller first,"),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (lambda value: _are_numbers(value) and min(value) > 0, "a list of positive numbers"),
    "classes": (_is_count, f"a whole number from 1 to {MOST_CLASSES:,}"),
    "class_names": (_are_names, f"a list of at most {MOST_CLASSES:,} texts"),
    "output": (lambda value: value in ("logit", "probability"), "logit or probability"),
    "layout": (lambda value: value in ("chw", "hwc", "asis"), "chw, hwc or asis"),
}


def refuse_description(path: Path, said: Mapping[str, Any]) -> None:
    """Raise `TargetError` for the first known entry of a weights file's metadata whose value has a wrong type or is out
    of range.

    Entries that are not known are ignored.
    """
    for key, (fits, expected) in _FORMS.items():
        value = said.get(key)
        if value is not None and not fits(value):
            raise TargetError(
                f"{str(path)!r} says that {key} is {_REPR.repr(value)}; {expected} was expected. Write the file "
                "again, or give the network as --arch file.py:factory and leave the metadata out"
            )
