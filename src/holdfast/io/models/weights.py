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
from holdfast.io.files import content_of_file
from holdfast.io.models.archive import Weights, read_once, read_weights

METADATA_KEY = "holdfast"
"""Metadata key of Holdfast's safetensors files; its value is sorted JSON."""
WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""Prefixes that DataParallel, torch.compile and training scripts add to every name."""
_SHOWN = 4
_MOST_WRAPPERS = 8  # a file may repeat a prefix any number of times; real wrappers are few


def state_dict_content(path: Path) -> bytes:
    """Return the content of a file with weights.

    It is read once, so that its digest is that of the loaded bytes. It is not mapped: the process would end if the file
    was truncated in the meantime. Raises the errors of `read_once`, but safetensors have no limit of size.
    """
    if path.suffix != ".safetensors":
        return read_once(path, "weights file")
    return content_of_file(path, "weights file")


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
            f"{str(path)!r} is not a valid safetensors file: {error}; write or download it again"
        ) from error
    if not isinstance(metadata, dict):
        raise TargetError(
            f"{str(path)!r} has the {METADATA_KEY} metadata {text[:80]!r}; a JSON object was expected: write the file "
            "again"
        )
    refuse_metadata(path, metadata)
    return Weights(tensors, digest=hashlib.sha256(content).hexdigest()), metadata


def written(net: nn.Module, metadata: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file with the weights of the network and the given metadata."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in net.state_dict().items()}
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def digest_of_weights(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and values of the tensors of a network, in hex."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def refuse_misfit(make: Callable[[], nn.Module], weights: Weights, source: str, *, spare: int = 0) -> None:
    """Raise `TargetError` if the names or shapes of a network's tensors differ from those in a weights file, before
    memory is allocated for the network. Its number of parameters is limited as by `empty_network`.
    """
    _fitting(empty_network(make, weights, source, spare=spare), weights, source)


def empty_network(
    make: Callable[[], nn.Module], weights: Weights, source: str, *, spare: int = 0
) -> nn.Module:
    """Return the network that `make` builds, on the meta device, whose tensors have shapes and no memory.

    Building ends with a `TargetError` when the network has `spare` more parameters than the file has tensors, because a
    file or a configuration may request a network of any size. Errors of `make` are not caught.
    """
    limit, n = len(weights.tensors) + spare, 0
    thread = get_ident()

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal n
        if get_ident() != thread:  # the hook is called for networks of all threads
            return
        n += 1
        if n > limit:
            raise TargetError(
                f"the weights of {source} do not fit: it has {len(weights.tensors)} tensors, but its architecture has "
                "more. Check the architecture and its arguments (arch and model_args), or train and save it again"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        # Tensors on the meta device have shapes but no memory, so a file cannot request a network that fills the
        # memory.
        with torch.device("meta"):
            return make()
    finally:
        hook.remove()


def fit_weights(net: nn.Module, weights: Weights, source: str) -> tuple[str, ...]:
    """Load the tensors of a weights file into the network in place. Return notes on changed names for the report.

    Raises `TargetError`, with the names of the tensors, if some do not match or are not finite.
    """
    tensors, notes = _fitting(net, weights, source)
    net.load_state_dict(tensors)
    refuse_not_finite(net, source)
    return (*weights.notes, *notes)


def refuse_not_finite(net: nn.Module, source: str) -> None:
    """Raise `TargetError` if weights of a network are NaN or infinite."""
    # those of the network, because a number of 64 bits may be infinite in one of 32 bits
    broken = [
        name
        for name, value in net.state_dict().items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise TargetError(
            f"the weights of {source} contain NaN or infinity in {_listed(broken)}; train or save them again"
        )


def _fitting(net: nn.Module, weights: Weights, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by the names in the network, and notes.

    Raises `TargetError` with the names of the tensors that do not match.
    """
    expected = net.state_dict()
    tensors, notes = _unwrapped(weights.tensors, expected)
    # Checkpoints from before torch 0.4 lack the counter, which eval mode does not use.
    counters = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    tensors = {**{name: value for name, value in counters.items() if name not in tensors}, **tensors}
    problems = _problems(tensors, expected)
    if problems:
        raise TargetError(
            f"the weights of {source} do not fit {type(net).__name__}: {'; '.join(problems)}. Check the "
            "architecture and its arguments (arch and model_args), or rename the keys of the state dict if only the "
            "names differ"
        )
    return tensors, notes


def _unwrapped(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors without known prefixes of their names, and notes. If some names match, none is changed."""
    unwrapped: dict[str, Tensor] = dict(tensors)
    notes: list[str] = []
    while not expected.keys() & unwrapped.keys() and len(notes) < _MOST_WRAPPERS:
        prefixes = [
            prefix for prefix in WRAPPERS if unwrapped and all(name.startswith(prefix) for name in unwrapped)
        ]
        if not prefixes:
            return dict(tensors), []
        unwrapped = {name.removeprefix(prefixes[0]): value for name, value in unwrapped.items()}
        notes.append(f"the prefix {prefixes[0]!r} was removed from every name")
    return unwrapped, notes


def _problems(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    shapes += [  # copying them would drop the imaginary parts
        f"{name} is {tensors[name].dtype}, expected {expected[name].dtype}"
        for name in expected
        if name in tensors and tensors[name].is_complex() and not expected[name].is_complex()
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


def _are_integers(value: Any) -> bool:
    return isinstance(value, dict) and all(type(entry) is int for entry in value.values())


def _is_denoiser(value: Any) -> bool:
    sizes = _are_integers(value) and value.keys() == {"channels", "width", "depth"}
    return sizes and min(value.values()) >= 1 and value["depth"] >= 2


def _is_ensemble(value: Any) -> bool:
    known = isinstance(value, dict) and value.get("combine") in ("votes", "mean")
    known = known and value.get("output") in (None, "logit", "probability")
    return known and _is_count(value.get("members")) and isinstance(value.get("partitions", {}), dict)


def _are_names(value: Any) -> bool:
    texts = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    return texts and 1 <= len(value) <= MOST_CLASSES


_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "architecture": (lambda value: isinstance(value, str), "the name of an architecture"),
    "arguments": (_are_integers, "names with whole numbers"),
    "denoiser": (_is_denoiser, "channels, width and depth as whole numbers from 1, the depth from 2"),
    "ensemble": (_is_ensemble, "the number of members and how they are combined"),
    "int8": (_are_names, "the names of the layers of 8-bit integers"),
    "bounds": (_are_bounds, "two numbers, the smaller first,"),
    "mean": (_are_numbers, "a list of numbers"),
    "std": (lambda value: _are_numbers(value) and min(value) > 0, "a list of positive numbers"),
    "classes": (_is_count, f"a whole number from 1 to {MOST_CLASSES:,}"),
    "class_names": (_are_names, f"a list of at most {MOST_CLASSES:,} texts"),
    "output": (lambda value: value in ("logit", "probability"), "logit or probability"),
    "layout": (lambda value: value in ("chw", "hwc", "asis"), "chw, hwc or asis"),
}


def refuse_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise `TargetError` for the first known entry of a weights file's metadata whose value has a wrong type or is out
    of range.

    Entries that are not known are ignored.
    """
    for key, (fits, expected) in _FORMS.items():
        value = metadata.get(key)
        if value is not None and not fits(value):
            raise TargetError(
                f"in the metadata of {str(path)!r}, {key} is {_REPR.repr(value)}; {expected} was expected. Write the "
                "file again"
            )
