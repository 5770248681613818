"""Reads `.pt` files with state dicts that may be untrusted, without running their code and without decompressing them.

A denylist of pickled names is not safe, and `weights_only` alone decompresses an archive of 195 KB to 200 MB before it
fails. Therefore this process first checks the zip directory without reading a member. Then a separate process, under
limits of memory and CPU time, unpickles the tensors with `weights_only` and writes them as safetensors.
"""

import hashlib
import io
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import safetensors.torch
from torch import Tensor

from holdfast.core.errors import CarriesCode, TargetError
from holdfast.core.remedies import TRUST_CODE
from holdfast.io.files import content_of_file, megabytes
from holdfast.io.limited.calling import read_under_limits
from holdfast.io.limited.limits import MEMORY, Limits, requested_memory
from holdfast.io.limited.weights import SAFER, WRITTEN

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
    try:
        with path.open("rb") if content is None else io.BytesIO(content) as file:
            if file.read(4) != _ZIP_MAGIC:
                return
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise TargetError(
            f"{str(path)!r} is a damaged or truncated archive: {error}; download it again"
        ) from error
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
