"""Reads weights files that may be untrusted, and loads their tensors into a network."""

import hashlib
import io
import json
import math
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from reprlib import Repr
from threading import get_ident
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from holdfast.core.errors import TRUST_CODE, CarriesCode, TargetError
from holdfast.io.files import content_of_file, megabytes, refusing
from holdfast.io.sandbox.calling import read_under_limits
from holdfast.io.sandbox.sandbox_main import MEMORY, Limits, requested_memory
from holdfast.io.sandbox.weights import SAFER, WRITTEN

MAX_BYTES = 4 * 2**30
"""Largest total size in bytes of the members of an archive. Any classifier that fits the memory limit is much
smaller.
"""
MAX_MEMBERS = 100_000
"""Largest number of members of an archive; torch stores one member for each tensor."""
LIMITS = Limits(copies=5, spare_bytes=512 * 2**20)
"""Limits of the process that unpickles a state dict."""
RAISE_LIMIT = f"if you trust it, raise the limit with {MEMORY}=16GB"
"""Advice for a file that is larger than a limit that the user can raise."""
_ZIP_MAGIC = b"PK\x03\x04"
_SAVED_BY = (
    "torch.save stores members uncompressed, so this file was repacked. Save it again with "
    "torch.save(model.state_dict(), …) or as safetensors"
)


@dataclass(frozen=True)
class Weights:
    """Tensors of a weights file by name, with notes for the report on where the file contains them."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    """notes for the report: nested dictionaries that were entered, and entries that were left out"""
    digest: str = ""
    """SHA-256 of the file, in hex"""


def read_once(path: Path, what: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a file. Raises `TargetError` if it cannot be read, or is larger than `max_bytes` and
    than `HOLDFAST_READ_MEMORY`.

    The file is read once, so that the bytes that are checked are those that are loaded. `what` describes the file in
    error messages.
    """
    return content_of_file(path, what, most=max(max_bytes, requested_memory()), advice=RAISE_LIMIT)


def is_script(content: bytes) -> bool:
    """Return whether the bytes of a file are a TorchScript archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return any(_is_code(member) for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError):
        return False


def check_archive(
    path: Path,
    content: bytes | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    trust_code: bool = False,
    saved_by: str = _SAVED_BY,
) -> None:
    """Check the list of members of a zip archive before it is loaded, without decompressing anything. A file that is
    not a zip archive is accepted.

    `content` is the content of the file if it was already read; then the file is not opened again. `saved_by` is the
    advice on how to write such files without compression. Raises `CarriesCode` for TorchScript, and `TargetError` for
    other archives that are not accepted.
    """
    damage = (zipfile.BadZipFile, NotImplementedError, ValueError, OSError)
    with (
        refusing(f"{str(path)!r} is a damaged or truncated archive", damage, "download it again"),
        path.open("rb") if content is None else io.BytesIO(content) as file,
    ):
        if file.read(4) != _ZIP_MAGIC:
            return
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise TargetError(
            f"{str(path)!r} holds {len(members):,} members; at most {MAX_MEMBERS:,} are read: save it as safetensors"
        )
    if not trust_code and any(map(_is_code, members)):
        raise CarriesCode(
            f"{str(path)!r} is a TorchScript archive, which carries code that runs with the model. {SAFER}",
            TRUST_CODE,
        )
    names: set[str] = set()
    for member in members:
        _check_member(path, member, saved_by, trust_code=trust_code)
        if member.filename in names:
            raise TargetError(f"{str(path)!r} holds {member.filename!r} twice; it was tampered with")
        names.add(member.filename)
    total, max_bytes = sum(member.file_size for member in members), max(max_bytes, requested_memory())
    if total > max_bytes:
        raise TargetError(
            f"{str(path)!r} holds {megabytes(total)}; at most {megabytes(max_bytes)} is read. If you trust it, raise "
            f"the limit with {MEMORY}=16GB"
        )


def read_weights(path: Path, content: bytes | None = None, *, max_bytes: int = MAX_BYTES) -> Weights:
    """Return the tensors of a state dict in a `.pt` file that may be untrusted. `content` is the content of the file if
    it was already read.

    It is unpickled in a separate process, which costs about 1.5 s of CPU time.
    """
    if content is None:
        content = read_once(
            path, "weights file", max_bytes=max_bytes
        )  # the checked bytes are the loaded ones
    check_archive(path, content, max_bytes=max_bytes)
    with read_under_limits("weights", path, LIMITS, content=content) as (result, folder):
        # A copy of the bytes: tensors mapped from the file would keep it alive after its removal.
        tensors = safetensors.torch.load((folder / WRITTEN).read_bytes())
    return Weights(tensors, tuple(result["notes"]), hashlib.sha256(content).hexdigest())


def _is_code(member: zipfile.ZipInfo) -> bool:
    return PurePosixPath(member.filename).name == "constants.pkl"


def _check_member(path: Path, member: zipfile.ZipInfo, saved_by: str, *, trust_code: bool) -> None:
    # A backslash separates folders on Windows, so it is treated as a separator everywhere.
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in member.filename:
        raise TargetError(
            f"{str(path)!r} holds a member named {member.filename!r}, which leads out of the archive"
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise TargetError(
            f"{str(path)!r} holds {member.filename!r}, a symbolic link; only plain members are read"
        )
    if member.flag_bits & 0x1:
        raise TargetError(f"{str(path)!r} holds {member.filename!r} encrypted; only plain members are read")
    if trust_code:
        return  # torch.jit.save compresses code, and the sum of all sizes is bounded
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise TargetError(
            f"{str(path)!r} holds {member.filename!r} compressed ({megabytes(member.compress_size)} that would inflate "
            f"to {megabytes(member.file_size)}); nothing was inflated: {saved_by}"
        )


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
    damage = (safetensors.SafetensorError, ValueError, OSError, RecursionError)
    with refusing(f"{str(path)!r} is not a valid safetensors file", damage, "write or download it again"):
        tensors = safetensors.torch.load(content)  # checks the header
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        text = header.get("__metadata__", {}).get(METADATA_KEY, "{}")
        metadata = json.loads(text)
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
