"""Encodings that are taken apart and put together again: what is within a checksum, a length or an opcode."""

import pickletools
import struct
import zlib
from collections.abc import Iterable
from typing import Any

_NUMBERS = {b"i": ">b", b"U": ">B", b"I": ">h", b"l": ">i", b"L": ">q", b"d": ">f", b"D": ">d"}
"""types of numbers in Universal Binary JSON"""
_WORDS = {b"T": True, b"F": False, b"Z": None}


class Typed(list[Any]):
    """An array in Universal Binary JSON whose numbers all have the type `kind`."""

    kind: bytes = b""


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, n: int) -> bytes:
        self.at += n
        return self.content[self.at - n : self.at]

    def number(self, kind: bytes) -> Any:
        form = _NUMBERS[kind]
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number(self.take(1))).decode()

    def value(self, kind: bytes) -> Any:
        if kind in _NUMBERS:
            return self.number(kind)
        if kind in _WORDS:
            return _WORDS[kind]
        if kind == b"S":
            return self.text()
        return self.mapping() if kind == b"{" else self.array()

    def mapping(self) -> dict[str, Any]:
        found = {}
        while self.content[self.at : self.at + 1] != b"}":
            name = self.text()
            found[name] = self.value(self.take(1))
        self.at += 1
        return found

    def array(self) -> list[Any]:
        found = Typed()
        if self.content[self.at : self.at + 1] == b"$":
            found.kind = self.take(2)[1:]
        if self.content[self.at : self.at + 1] == b"#":
            self.at += 1
            n = self.number(self.take(1))
            found.extend(self.value(found.kind or self.take(1)) for _ in range(n))
            return found if found.kind else list(found)
        while (kind := self.take(1)) != b"]":
            found.append(self.value(kind))
        return list(found)


def from_ubj(content: bytes) -> Any:
    """The document in Universal Binary JSON; `ValueError` where it is none."""
    reader = _Reader(content)
    try:
        return reader.value(reader.take(1))
    except (KeyError, struct.error, IndexError) as error:
        raise ValueError("no document") from error


def _text(text: str) -> bytes:
    content = text.encode(errors="replace")
    return b"L" + struct.pack(">q", len(content)) + content


def to_ubj(value: Any) -> bytes:
    """A document in Universal Binary JSON."""
    for kind, word in _WORDS.items():
        if value is word:
            return kind
    if isinstance(value, str):
        return b"S" + _text(value)
    if isinstance(value, float):
        return b"D" + struct.pack(">d", value)
    if isinstance(value, int):
        return b"L" + struct.pack(">Q", value % 2**64)
    if isinstance(value, dict):
        return b"{" + b"".join(_text(str(name)) + to_ubj(held) for name, held in value.items()) + b"}"
    length = b"#L" + struct.pack(">q", len(value))
    if isinstance(value, Typed):
        try:
            packed = b"".join(struct.pack(_NUMBERS[value.kind], number) for number in value)
        except (struct.error, OverflowError):
            pass  # one does not fit its type
        else:
            return b"[$" + value.kind + length + packed
    return b"[" + length + b"".join(map(to_ubj, value))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG: what kind each is, and its content."""
    found, at = [], 8
    while at < len(png):
        (n,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + n]))
        at += 12 + n
    return found


def png(found: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG of chunks, each with its length and its checksum."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(held)) + kind + held + struct.pack(">I", zlib.crc32(kind + held))
        for kind, held in found
    )


def opcodes(pickled: bytes) -> list[tuple[str, bytes]]:
    """The opcodes of a pickle with their names; `ValueError` where it is none."""
    found = [(code.name, at) for code, _, at in pickletools.genops(pickled) if at is not None]
    ends = [*(at for _, at in found[1:]), len(pickled)]
    return [(name, pickled[at:end]) for (name, at), end in zip(found, ends, strict=True)]


def opcode(value: object) -> bytes:
    """The opcode that pushes a number, a text, or anything else as None."""
    if isinstance(value, str):
        content = value.encode(errors="replace")
        return b"X" + struct.pack("<I", len(content)) + content
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, int):
        content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(content)]) + content
    return b"N"
