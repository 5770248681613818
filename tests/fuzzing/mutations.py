"""Strategies that damage a file: its bytes, the members of an archive behind their checksums, and its values."""

import gzip
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import yaml
from hypothesis import strategies as st

from fuzzing.encodings import chunks, from_ubj, opcode, opcodes, png, to_ubj
from fuzzing.files import CHAIN, File, good

Draw = Callable[[st.SearchStrategy[Any]], Any]
Way = Callable[[Draw, bytes], bytes]

_END = 300
"""bytes at both ends of a file, where headers and directories are, that are damaged as often as all others"""
_WHOLE = [
    0,
    1,
    -1,
    2,
    3,
    127,
    255,
    256,
    65535,
    10**6,
    *(sign * 2**k + d for k in (31, 32, 63, 64) for d in (-1, 0) for sign in (1, -1)),
]
_REAL = [0.5, -0.0, 1e-320, 1e38, 1e308, float("inf"), float("-inf"), float("nan")]
_WORDS = [
    "",
    " ",
    "\0",
    "x",
    "é\u202e\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "../../x",
    "0",
    "x" * 5000,
]
_NESTED: list[Any] = [None, True, False, [], {}, [[]], {"": 0}, [0, "a", None], [1e308] * 300]
_PIECES = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\x80",
    b"[" * 20_000,
    b'{"a":' * 2000,
    b"PK\5\6",
    b",",
    b'"',
    b"\n",
    b"0",
    b"9" * 400,
    b"1e999",
    b"-",
]
NUMBERS = st.sampled_from([*_WHOLE, 10**30, *_REAL]) | st.integers(-10, 300)
_GLOBALS = [
    b"torch\nFloatStorage",
    b"torch\nDoubleStorage",
    b"torch\nSize",
    b"torch._utils\n_rebuild_tensor_v2",
    b"torch._utils\n_rebuild_sparse_tensor",
    b"torch._utils\n_rebuild_parameter",
    b"torch._utils\n_rebuild_qtensor",
    b"collections\nOrderedDict",
    b"posix\nmkdir",
]
VALUES = NUMBERS | st.sampled_from(_WORDS) | st.sampled_from(_NESTED)


def _place(draw: Draw, n: int) -> int:
    ends = st.integers(0, min(n, _END)), st.integers(max(0, n - _END), n)
    return draw(st.one_of(st.integers(0, n), *ends))


def edited(draw: Draw, content: bytes) -> bytes:
    """The bytes with one to four edits."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 4)))):
        at, n = _place(draw, len(content)), draw(st.integers(1, 8) | st.integers(1, 200))
        before, piece, after = content[:at], content[at : at + n], content[at + n :]
        how = draw(st.sampled_from(("flip", "number", "insert", "delete", "double", "move", "end")))
        if how == "flip":
            content = (
                before + bytes(byte ^ draw(st.integers(1, 255)) for byte in piece[:1]) + piece[1:] + after
            )
        elif how == "number":
            number = draw(st.sampled_from(_WHOLE)) % 2**64
            bytewise = number.to_bytes(8, draw(st.sampled_from(("little", "big"))))[
                : draw(st.sampled_from((1, 2, 4, 8)))
            ]
            content = before + bytewise + content[at + len(bytewise) :]
        elif how == "insert":
            content = (
                before + draw(st.binary(min_size=1, max_size=8) | st.sampled_from(_PIECES)) + piece + after
            )
        elif how == "delete":
            content = before + after
        elif how == "double":
            content = before + piece * draw(st.sampled_from((2, 2, 50))) + after
        elif how == "move":
            other = _place(draw, len(content))
            content = before + content[other : other + n] + after
        else:
            content = before
    return content


def counted(draw: Draw, content: bytes) -> bytes:
    """Text with one to three of its numbers replaced."""
    for _ in range(draw(st.integers(1, 3))):
        found = list(re.finditer(rb"-?\d+(\.\d+)?", content))
        if found:
            match = found[draw(st.integers(0, len(found) - 1))]
            content = content[: match.start()] + str(draw(NUMBERS)).encode() + content[match.end() :]
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document with the keys or places in it."""
    for key in (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from _places(value[key])


def revalued(draw: Draw, document: Any) -> Any:
    """A document with one to three of its values replaced, removed, doubled or exchanged."""
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return deepcopy(draw(VALUES))
        inside, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(("replace", "replace", "replace", "remove", "double", "exchange", "wrap")))
        if how == "replace":
            inside[key] = deepcopy(draw(NUMBERS if isinstance(inside[key], int | float) else VALUES))
        elif how == "remove":
            del inside[key]
        elif how == "double" and isinstance(inside, list):
            inside.extend([inside[key]] * draw(st.sampled_from((1, 20))))
        elif how == "double":
            inside[draw(st.sampled_from(_WORDS))] = inside[key]
        elif how == "exchange":
            other, place = places[draw(st.integers(0, len(places) - 1))]
            inside[key] = deepcopy(other[place])
        else:
            inside[key] = [inside[key]]
    return document


def _json(draw: Draw, content: bytes) -> bytes:
    return json.dumps(revalued(draw, json.loads(content))).encode()


def _yaml(draw: Draw, content: bytes) -> bytes:
    return yaml.safe_dump(revalued(draw, yaml.safe_load(content)), allow_unicode=True).encode(
        "utf-8", "replace"
    )


def _member(draw: Draw, content: bytes) -> bytes:
    """An archive with one member damaged, renamed, left out or doubled."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        chosen = draw(st.integers(0, len(old.infolist()) - 1))
        how = draw(st.sampled_from(("damage",) * 8 + ("rename", "leave", "empty")))
        for k, member in enumerate(old.infolist()):
            name, held = member.filename, old.read(member)
            if k == chosen and how == "leave":
                continue
            if k == chosen and how == "rename":
                name = draw(
                    st.sampled_from(
                        [each.filename + "_" for each in old.infolist()] + ["../x", "/x", "x/constants.pkl"]
                    )
                )
            elif k == chosen:
                held = b"" if how == "empty" else damaged(draw, name, held)
            new.writestr(name, held, member.compress_type)
    return out.getvalue()


def _gzipped(draw: Draw, content: bytes) -> bytes:
    return gzip.compress(damaged(draw, "", gzip.decompress(content)), mtime=0)


def _headed(draw: Draw, content: bytes) -> bytes:
    """A safetensors file whose header is damaged and has its length all the same."""
    (n,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + n])
    about = header.get("__metadata__", {}).get("holdfast")
    if about and draw(st.booleans()):
        header["__metadata__"]["holdfast"] = json.dumps(revalued(draw, json.loads(about)))
    else:
        header = revalued(draw, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + n :]


def _chunk(draw: Draw, content: bytes) -> bytes:
    """A PNG with one chunk damaged and its checksum right."""
    found = chunks(content)
    chosen = draw(st.integers(0, len(found) - 1))
    kind, held = found[chosen]
    inflates = kind == b"IDAT" and draw(st.booleans())
    found[chosen] = (
        kind,
        zlib.compress(edited(draw, zlib.decompress(held))) if inflates else edited(draw, held),
    )
    return png(found)


def _ubj(draw: Draw, content: bytes) -> bytes:
    return to_ubj(revalued(draw, from_ubj(content)))


def _pickle(draw: Draw, content: bytes) -> bytes:
    """A pickle with one to three of its opcodes replaced."""
    found = opcodes(content)
    for _ in range(draw(st.integers(1, 3))):
        chosen = draw(st.integers(0, len(found) - 1))
        name, _ = found[chosen]
        if name == "GLOBAL":
            new = b"c" + draw(st.sampled_from(_GLOBALS)) + b"\n"
        elif "INT" in name or "LONG" in name or "UNICODE" in name or "NEW" in name:
            new = opcode(draw(VALUES if "UNICODE" in name else NUMBERS))
        else:
            _, new = found[draw(st.integers(0, len(found) - 1))]
        found[chosen] = name, new
    return b"".join(code for _, code in found)


def _fields(message: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every message of a protocol buffer with its fields that are set, and their values."""
    for field, value in message.ListFields():
        yield message, field, value
        held = value if hasattr(value, "append") or hasattr(value, "add") else [value]
        for inner in held:
            if hasattr(inner, "ListFields"):
                yield from _fields(inner)


def _onnx(draw: Draw, content: bytes) -> bytes:
    """An ONNX file with one to three of its fields replaced, cleared or doubled."""
    import onnx

    model = onnx.load_from_string(content)
    for _ in range(draw(st.integers(1, 3))):
        fields = list(_fields(model))
        message, field, value = fields[draw(st.integers(0, len(fields) - 1))]
        how = draw(st.sampled_from(("replace",) * 4 + ("clear",)))
        if how == "clear":
            message.ClearField(field.name)
        elif hasattr(value, "add"):
            value.add().CopyFrom(value[draw(st.integers(0, len(value) - 1))])
        elif hasattr(value, "append"):
            value[draw(st.integers(0, len(value) - 1))] = _scalar(draw, field, value[0])
        elif not hasattr(value, "ListFields"):
            setattr(message, field.name, _scalar(draw, field, value))
    return bytes(model.SerializeToString())


def _scalar(draw: Draw, field: Any, value: Any) -> Any:
    if isinstance(value, str):
        return draw(
            st.sampled_from([*_WORDS, "y", "x", "own", "Act", "Loop", "Reshape", "Expand", "Tile", "Range"])
        )
    if isinstance(value, bytes):
        return edited(draw, value)
    if isinstance(value, float):
        return draw(st.sampled_from([*_REAL, 0.0, -1.0]))
    bits = 63 if field.cpp_type == field.CPPTYPE_INT64 else 31
    return draw(st.integers(0, 20) | st.sampled_from([n for n in _WHOLE if -(2**bits) <= n < 2**bits]))


def _ways(name: str, content: bytes) -> Sequence[Way]:
    """How a file can be damaged, besides its bytes."""
    if content[:4] == b"PK\3\4":
        return [_member]
    if content[:2] == b"\x1f\x8b":
        return [_gzipped]
    if content[:4] == b"\x89PNG":
        return [_chunk]
    if name.endswith(".safetensors"):
        return [_headed]
    if name.endswith(".onnx"):
        return [_onnx]
    if name.endswith(".ubj"):
        return [_ubj]
    if name.endswith((".pkl", ".pt")):
        return [_pickle]
    if name.endswith(".json") or content[:1] == b"{":
        return [_json, _json, counted]
    if name.endswith(".yaml") and b"!!" not in content:
        return [_yaml, counted]
    return [counted]


def damaged(draw: Draw, name: str, content: bytes) -> bytes:
    """The content of a file, damaged in one of the ways of its format."""
    ways = _ways(name, content)
    way = draw(st.sampled_from([edited, *ways, *ways, *ways]))
    try:
        return way(draw, content)
    except (ValueError, RecursionError):  # bytes that only look like a format, as in a member of an archive
        return edited(draw, content)


@st.composite
def mutations(draw: Draw, form: str) -> File:
    """One of the good files of a format, damaged."""
    files = good(form)
    file = files[draw(st.integers(0, len(files) - 1))]
    content = damaged(draw, file.name, file.content)
    return File(file.name, content, form == "run" and file.name != CHAIN and draw(st.booleans()))
