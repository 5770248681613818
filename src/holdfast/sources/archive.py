"""Reads `.pt` state dicts of strangers without running them and without inflating them.

A denylist of pickled names does not hold, and `weights_only` alone inflates a 195 KB archive to 200 MB before it
fails. So the zip directory is judged first, in this process, without reading a member; then a process of its own,
under a limit of memory and CPU time, unpickles the tensors with `weights_only` and hands them back as safetensors.
"""

import io
import json
import stat
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import safetensors.torch
from torch import Tensor

from holdfast.core.errors import TargetError
from holdfast.sources.files import megabytes, readable_file

MAX_BYTES = 4 * 2**30
"""members of one archive, together; far above any classifier that fits the memory limit"""
MAX_MEMBERS = 100_000
"""torch stores one member a tensor"""
UNPACK_SECONDS = 300
"""wall time that reading one file may take"""
_ZIP_MAGIC = b"PK\x03\x04"
_SAVED_BY = (
    "torch.save stores members uncompressed, so this file was repacked. Save it again with "
    "torch.save(model.state_dict(), …) or as safetensors"
)
TRUST = (
    "If you trust the file, give --trust-code (Python: trust_code=True). It is safer to save model.state_dict() and "
    "give --arch, or to export a .pt2 program or ONNX, which run no code"
)
"""the advice for model files that run code"""
_UNPACKING = Path(__file__).with_name("unpacking.py")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, and what had to be done to find them."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    """said in the report: the nesting that was entered, entries that were left out"""


class CarriesCode(TargetError):
    """A model file that runs code when it is loaded, and that is not trusted."""


def read_once(path: Path, what: str) -> bytes:
    """The bytes of a file, so that those that are checked are those that are loaded; `what` names it in the error."""
    readable_file(path, what)
    if path.stat().st_size > MAX_BYTES:
        raise TargetError(
            f"{str(path)!r} has {megabytes(path.stat().st_size)}; at most {megabytes(MAX_BYTES)} is read"
        )
    return path.read_bytes()


def is_script(content: bytes) -> bool:
    """Whether the bytes of a file are an archive of TorchScript."""
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
    """Refuse a zip archive by its directory alone; nothing is inflated. A file that is no zip passes.

    With `content`, the bytes of the file that were read already, the file is not opened again. `saved_by` says how such
    files are written without compression. Raises `CarriesCode` for TorchScript.
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
        raise TargetError(f"{str(path)!r} holds {len(members)} members; at most {MAX_MEMBERS} were expected")
    if not trust_code and any(map(_is_code, members)):
        raise CarriesCode(
            f"{str(path)!r} is a TorchScript archive, which carries code that runs with the model. {TRUST}"
        )
    seen: set[str] = set()
    for member in members:
        _check_member(path, member, saved_by, trust_code=trust_code)
        if member.filename in seen:
            raise TargetError(f"{str(path)!r} holds {member.filename!r} twice; it was tampered with")
        seen.add(member.filename)
    total = sum(member.file_size for member in members)
    if total > max_bytes:
        raise TargetError(f"{str(path)!r} holds {megabytes(total)}; at most {megabytes(max_bytes)} is read")


def read_weights(path: Path, *, max_bytes: int = MAX_BYTES) -> Weights:
    """The tensors of a `.pt` state dict, unpickled elsewhere; costs about 1.5 s of CPU for the other process."""
    readable_file(path, "weights file")
    if path.stat().st_size > max_bytes:
        raise TargetError(
            f"{str(path)!r} has {megabytes(path.stat().st_size)}; at most {megabytes(max_bytes)} is read"
        )
    check_archive(path, max_bytes=max_bytes)
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        handed_back = Path(folder) / "weights.safetensors"
        notes = _unpack(path, handed_back)
        # A bytes copy: tensors mapped from a file that is about to vanish would keep it alive.
        return Weights(safetensors.torch.load(handed_back.read_bytes()), notes)


def _is_code(member: zipfile.ZipInfo) -> bool:
    return PurePosixPath(member.filename).name == "constants.pkl"


def _check_member(path: Path, member: zipfile.ZipInfo, saved_by: str, *, trust_code: bool) -> None:
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


def _unpacked(path: Path, handed_back: Path) -> subprocess.CompletedProcess[str]:
    """The process that unpickles under limits, when it has ended."""
    # -P: the script's own folder holds a package named onnx and must not come first on the path.
    command = [sys.executable, "-P", "-s", str(_UNPACKING), str(path.resolve()), str(handed_back)]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=UNPACK_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise TargetError(
            f"{str(path)!r} took more than {UNPACK_SECONDS} s to read and was given up"
        ) from error


def _unpack(path: Path, handed_back: Path) -> tuple[str, ...]:
    done = _unpacked(path, handed_back)
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TargetError(
            f"{str(path)!r} could not be read: the process that unpickles it under a memory limit ended with status "
            f"{done.returncode} ({last[0]}); it asks for far more memory than its size, or is damaged"
        ) from None
    if answer.get("code"):
        raise CarriesCode(f"{str(path)!r} {answer['error']} {TRUST}")
    if "error" in answer:
        raise TargetError(f"{str(path)!r} {answer['error']}")
    return tuple(answer["notes"])
