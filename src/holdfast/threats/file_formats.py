"""Formats of files that leave some bytes free, with readers that check that a changed file is still opened.

The free bytes of a file are computed from its headers. Nothing is free in a file that is not of the format, that is
damaged, or that has a signature over its bytes. The sources are:

- pe: Microsoft, "PE Format", and the changes of Kreuk et al., "Deceiving End-to-End Deep Learning Malware Detectors
  using Adversarial Examples", 2018, arXiv:1802.04528 (slack, appended bytes), and of Demetrio et al., "Adversarial
  EXEmples", ACM TOPS 2021, arXiv:2008.07125 (DOS header and stub).
- zip: PKWARE, "APPNOTE.TXT", version 6.3.10.
- pdf: ISO 32000-1:2008, sections 7.2.3 (comments) and 7.5 (file structure).
"""

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from holdfast.core.errors import UsageError, importing

Span = tuple[int, int]
"""The first offset of some bytes, and the offset after the last."""


@dataclass(frozen=True)
class Free:
    """Bytes of a file that its format leaves free."""

    change: Sequence[Span] = ()
    """spans of bytes that may change"""
    insert: Sequence[int] = ()
    """offsets before which bytes may be inserted"""
    append: bool = False
    """whether bytes may be appended"""
    forbidden: bytes = b""
    """values that no new byte may have"""


@dataclass(frozen=True)
class FileFormat:
    """A format of files."""

    free: Callable[[bytes], Free]
    """function that returns the bytes of an unchanged file that are free; none for a file of another format"""
    digest: Callable[[bytes], str]
    """function that reads a file by a library and returns a digest of its content without the free bytes. Raises
    any exception for a file that is not opened, and `UsageError` if the library is not installed"""

    def fault(self, content: bytes, unchanged: bytes) -> str:
        """Return why a library does not open a changed file, or that it reads another content than in the unchanged
        file; empty if neither is the case.
        """
        digest, fault = _read(self.digest, content)
        if not fault and digest != _read_unchanged(self.digest, unchanged)[0]:
            return "bytes that are not free have changed"
        return fault


def _read(digest: Callable[[bytes], str], content: bytes) -> tuple[str, str]:
    """Return the digest of a file, and why it is not opened."""
    try:
        return digest(content), ""
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - libraries raise exceptions of many types for damaged files
        return "", str(error) or type(error).__name__


_read_unchanged = lru_cache(maxsize=16)(_read)
"""The same for unchanged files, each of which is compared with many changed ones."""


def _none_if_damaged(free: Callable[[bytes], Free]) -> Callable[[bytes], Free]:
    """Return a function that parses headers as one that returns nothing for headers that lead out of the file."""

    def checked(content: bytes) -> Free:
        try:
            return free(content)
        except struct.error:
            return Free()

    return checked


def _without(n: int, spans: Iterable[Span], used: Iterable[Span]) -> tuple[Span, ...]:
    """Return the parts of spans in a file of `n` bytes that are not used."""
    free = np.zeros(n + 2, bool)  # with a byte that is not free at each end
    for start, stop in spans:
        free[start + 1 : max(start, min(stop, n)) + 1] = True
    for start, stop in used:
        free[start + 1 : stop + 1] = False
    edges = np.flatnonzero(free[1:] != free[:-1]).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


_MOST_SECTIONS = 96
"""Largest number of sections in a COFF header that Windows loads."""
_NATIVE = 1
"""Subsystem of drivers, whose checksum Windows verifies."""
_SECTOR, _PAGE = 512, 4096
"""Windows rounds the offset of a section in the file down to sectors, and maps sections to pages."""


@_none_if_damaged
def _free_of_pe(content: bytes) -> Free:
    """Return the DOS header but its first and last field, the DOS stub, the time stamp, the checksum, and the bytes
    between the headers and the first section and between the end of the data of a section and its end in the file.

    Nothing is free in a signed file, because the signature is over these bytes and those after the sections, and in a
    driver, whose checksum Windows verifies. Bytes after the sections may contain data of the program, such as an
    archive, and do not change.
    """
    (start,) = struct.unpack_from("<I", content, 0x3C)
    signature, n_sections, size = struct.unpack_from("<4s2xH12xH2x", content, start)
    optional = start + 24
    magic, alignment, headers, subsystem = struct.unpack_from("<H30xI24xI4xH", content, optional)
    wide = magic == 0x20B
    if content[:2] != b"MZ" or signature != b"PE\0\0" or not (wide or magic == 0x10B):
        return Free()
    n_directories, *numbers = struct.unpack_from("<I32I", content, optional + (108 if wide else 92))
    directories = list(zip(numbers[::2], numbers[1::2], strict=True))[:n_directories]
    signed = len(directories) > 4 and directories[4][1] > 0
    if signed or subsystem == _NATIVE or n_sections > _MOST_SECTIONS:
        return Free()
    table = optional + size
    sections = [struct.unpack_from("<8x4I", content, table + 40 * i) for i in range(n_sections)]
    sections = [section for section in sections if section[2] and section[3]]  # those with data in the file
    if any(at + length > len(content) for *_, length, at in sections):
        return Free()
    first = min([headers, *(at for *_, at in sections)])
    change = [
        (2, min(0x3C, start)),
        (0x40, start),
        (start + 8, start + 12),
        (optional + 64, optional + 68),
        (table + 40 * n_sections, first),
    ]
    used = [(at, at + length) for address, length in directories if (at := _offset(address, sections))]
    for virtual_size, _, length, at in sections:
        end = at + min(virtual_size or length, length)
        used.append((at, end))
        if at % _SECTOR == 0 and alignment >= _PAGE:
            change.append((end, at + length))
    return Free(_without(len(content), change, used), append=True)


def _offset(address: int, sections: Iterable[tuple[int, ...]]) -> int:
    """Return the offset in the file of an address in memory. That of the headers is the same in both."""
    return next(
        (
            at + address - first
            for virtual_size, first, length, at in sections
            if first <= address < first + max(virtual_size, length)
        ),
        address,
    )


def _digest_of_pe(content: bytes) -> str:
    """Return a digest of the type, the entry point, the sections with their data, and the imports."""
    pefile = importing("pefile", "files of the format pe are checked by the package pefile", "bytes")
    image = pefile.PE(data=content, fast_load=True)
    image.parse_data_directories([pefile.DIRECTORY_ENTRY["IMAGE_DIRECTORY_ENTRY_IMPORT"]])
    optional, read = image.OPTIONAL_HEADER, hashlib.sha256()
    parts: list[object] = [image.FILE_HEADER.Machine, optional.AddressOfEntryPoint, optional.ImageBase]
    for section in image.sections:
        size = section.Misc_VirtualSize
        parts.append((section.Name, section.VirtualAddress, size, section.Characteristics))
        read.update(section.get_data()[: size or None])
    for library in getattr(image, "DIRECTORY_ENTRY_IMPORT", ()):
        names = [(each.name, each.ordinal, each.address) for each in library.imports]
        parts.append((library.dll, names))
    read.update(repr(parts).encode())
    return read.hexdigest()


_READABLE_BYTES = 2**26
"""Largest number of bytes of the files in an archive together."""
_END, _ENTRY, _FILE = 22, 46, 30
"""Sizes of the end record, of the header of an entry in the central directory, and of the header before a file."""
_APK_SIGNATURE = b"APK Sig Block 42"
"""End of the signature of an Android package, which is before the central directory."""


@_none_if_damaged
def _free_of_zip(content: bytes) -> Free:
    """Return the times of the files, the comments, and, for an archive that begins with a file, its beginning.

    Other bytes before the first file are not free, because they may be a program that unpacks the archive. Encrypted
    files, whose check byte may be their time, other methods than deflation, ZIP64 and signed Android packages are not
    supported: nothing is free.
    """
    end = max(0, content.rfind(b"PK\5\6", max(0, len(content) - _END - 0xFFFF)))
    signature, disks, n, size, start, n_comment = struct.unpack_from("<4sI2xHIIH", content, end)
    directory = end - size
    prefix = directory - start
    wide = content.startswith(b"PK\6\7", max(0, end - 20))
    if (
        signature != b"PK\5\6"
        or prefix < 0
        or disks
        or wide
        or content.endswith(_APK_SIGNATURE, 0, directory)
    ):
        return Free()
    change, files, at = [(end + _END, end + _END + n_comment)], [], directory
    for _ in range(n):
        signature, flags, method, packed, *lengths, local = struct.unpack_from(
            "<4s4x2H8xI4x3H8xI", content, at
        )
        local += prefix
        start_of_file, n_name, n_extra = struct.unpack_from("<4s22x2H", content, local)
        headers = (signature, start_of_file) == (b"PK\1\2", b"PK\3\4")
        if not headers or flags & 1 or method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            return Free()
        files.append((local, local + _FILE + n_name + n_extra + packed))
        after = at + _ENTRY + sum(lengths)
        change += [(local + 10, local + 14), (at + 12, at + 16), (after - lengths[2], after)]
        at = after
    files.sort()
    ends = [0, *(stop for _, stop in files)]
    if (
        at != end
        or ends[-1] > directory
        or any(first < stop for (first, _), stop in zip(files, ends, strict=False))
    ):
        return Free()
    # OpenDocument and EPUB demand that a file of this name is at the beginning
    movable = content.startswith(b"PK\3\4") and not content.startswith(b"mimetype", _FILE)
    return Free(_without(len(content), change, ()), insert=(0,) if movable else (), append=True)


def _digest_of_zip(content: bytes) -> str:
    """Return a digest of the names and contents of the files in an archive, whose checksums are compared."""
    read, remaining = hashlib.sha256(), _READABLE_BYTES
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for entry in archive.infolist():
            read.update(repr((entry.filename, entry.file_size, entry.CRC, entry.external_attr)).encode())
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"the method {entry.compress_type} of {entry.filename!r} is not supported")
            with archive.open(entry) as file:
                while piece := file.read(2**16):
                    remaining -= len(piece)
                    if remaining < 0:
                        raise ValueError(f"its files have more than {_READABLE_BYTES:,} bytes")
                    read.update(piece)
    return read.hexdigest()


_TOKEN = re.compile(rb"%[^\r\n]+|\(|(?<![^\s>])stream\r?\n")
"""Comment, beginning of a string, or beginning of a stream."""
_IN_STRING = re.compile(rb"\\.|[()]", re.DOTALL)
_END_OF_STREAM = re.compile(rb"endstream\s+endobj")
_MARKERS = (b"%PDF-", b"%%EOF")
"""Comments that are parts of the structure of a file."""
_LAST_BYTES = 1024
"""Number of bytes at the end of a file in which Acrobat requires %%EOF (Adobe, "PDF Reference", version 1.7,
appendix H, note 18)."""
_MOST_OBJECTS = 100_000
"""Largest number of objects of a file that are compared."""


def _free_of_pdf(content: bytes) -> Free:
    """Return the comments outside of strings and streams, without their ends of lines. This includes the comment after
    the header whose bytes state that the file is binary.

    Bytes may be appended, and the reader checks that %%EOF remains in the last 1,024 bytes. Inserted bytes would move
    objects, whose offsets are in the file. Nothing is free in a signed file.
    """
    complete = content.startswith(b"%PDF-") and b"%%EOF" in content[-_LAST_BYTES:]
    if not complete or b"/ByteRange" in content:
        return Free()
    comments, at = [], 0
    while token := _TOKEN.search(content, at):
        at = token.end()
        if token[0] == b"(":
            at = _end_of_string(content, at)
        elif token[0].startswith(b"stream"):
            ending = _END_OF_STREAM.search(content, at)
            at = ending.end() if ending else -1
        elif not token[0].startswith(_MARKERS):
            comments.append((token.start() + 1, at))
        if at < 0:
            return Free()
    return Free(comments, append=True, forbidden=b"\r\n")


def _end_of_string(content: bytes, at: int) -> int:
    """Return the offset after a string in parentheses, which may contain others; -1 if it does not end."""
    depth = 1
    for mark in _IN_STRING.finditer(content, at):
        depth += {b"(": 1, b")": -1}.get(mark[0], 0)
        if not depth:
            return mark.end()
    return -1


def _digest_of_pdf(content: bytes) -> str:
    """Return a digest of the number of pages and of all objects that can be reached."""
    pypdf = importing("pypdf", "files of the format pdf are checked by the package pypdf", "bytes")
    if b"%%EOF" not in content[-_LAST_BYTES:]:
        raise ValueError(f"%%EOF is not in its last {_LAST_BYTES:,} bytes")
    reader = pypdf.PdfReader(io.BytesIO(content), strict=True)
    if reader.is_encrypted:
        raise ValueError("it is encrypted")
    read = hashlib.sha256(str(len(reader.pages)).encode())
    waiting: list[Any] = [reader.trailer]
    references: set[tuple[int, int]] = set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, pypdf.generic.IndirectObject):
            if (part.idnum, part.generation) in references:
                continue
            references.add((part.idnum, part.generation))
            if len(references) > _MOST_OBJECTS:
                raise ValueError(f"it has more than {_MOST_OBJECTS:,} objects")
            part = reader.get_object(part)
            written = io.BytesIO()
            part.write_to_stream(written)
            read.update(written.getbuffer())
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
    return read.hexdigest()


FORMATS: Final[Mapping[str, FileFormat]] = {
    "pe": FileFormat(_free_of_pe, _digest_of_pe),
    "zip": FileFormat(_free_of_zip, _digest_of_zip),
    "pdf": FileFormat(_free_of_pdf, _digest_of_pdf),
}
"""Formats by name."""
