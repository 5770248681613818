"""The entry of files: magika on files of ten types that this module writes, within rules of each type."""

import html.parser
import io
import json
import random
import shutil
import struct
import wave
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pip
import torch
from PIL import Image
from safetensors.numpy import load_file

from benchmarks.field.entry import Broken, Effort, Entry
from holdfast.io.models.byte_models import reading_of
from holdfast.threats.byte_changes import ByteChanges, Places

COUNT, CHANGE, APPEND, QUERIES = 10, 16, 64, 1000
"""files of a type, and limits of the threat"""


WORDS = ("alpha", "beta", "gamma", "delta", "value", "index", "total", "name", "count")


def _words(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n))


def _program(rng: random.Random, k: int) -> bytes:
    """A program for Windows that pip carries, with other bytes at its end."""
    files = sorted((Path(pip.__file__).parent / "_vendor" / "distlib").glob("*.exe"))
    return files[k % len(files)].read_bytes() + bytes(rng.randrange(256) for _ in range(k // len(files) * 64))


def _archive(rng: random.Random, k: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.comment = b"written by a test"
        for name in range(2 + k % 4):
            writer.writestr(zipfile.ZipInfo(f"{name}.txt", (2026, 1, 1 + k, 0, 0, 0)), _words(rng, 80))
    return file.getvalue()


def _document(rng: random.Random, k: int) -> bytes:
    text = f"BT /F1 12 Tf 40 100 Td ({_words(rng, 8)}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >> % the catalogue of this file",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >> % its pages",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 4 0 R >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(text), text),
    ]
    content, offsets = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), []
    for number, each in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    start = len(content)
    content += b"xref\n0 5\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % at for at in offsets)
    return bytes(content + b"trailer\n<< /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start)


def _picture(kind: str) -> Callable[[random.Random, int], bytes]:
    def picture(rng: random.Random, k: int) -> bytes:
        file, pixels = (
            io.BytesIO(),
            np.random.default_rng(k).integers(0, 256, (24 + k, 24, 3), dtype=np.uint8),
        )
        Image.fromarray(pixels).save(file, kind)
        return file.getvalue()

    return picture


def _sound(rng: random.Random, k: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setparams((1, 2, 8000, 0, "NONE", ""))
        tone = np.sin(np.arange(1500) * (0.05 + 0.03 * k)) * 9000
        writer.writeframes(tone.astype("<i2").tobytes())
    return file.getvalue()


def _page(rng: random.Random, k: int) -> bytes:
    title = _words(rng, 3)
    lines = [f"<p>{_words(rng, 9)}</p>" for _ in range(3 + k)]
    comment = f"<!-- {_words(rng, 8)} -->"
    head = f"<!DOCTYPE html>\n{comment}\n<html><head><title>{title}</title></head><body>"
    return "\n".join((head, *lines, "</body></html>\n")).encode()


def _code(rng: random.Random, k: int) -> bytes:
    functions = "".join(
        f"def f{i}(x, y):\n    # {_words(rng, 5)}\n    return x * {i} + y\n\n\n" for i in range(3 + k % 5)
    )
    head = f"# {_words(rng, 8)}\nimport os\nimport sys\n\n\n"
    return f"{head}{functions}print(f0(1, 2), os.name)\n# {_words(rng, 3)}".encode()


def _record(rng: random.Random, k: int) -> bytes:
    values = {name: rng.randrange(1000) for name in ("count", "total", "index")}
    rows = [{"name": _words(rng, 1), "value": i} for i in range(3 + k)]
    return json.dumps({"note": _words(rng, 8), **values, "rows": rows}, indent=2).encode()


class _Tags(html.parser.HTMLParser):
    """Collects everything of a page but its comments."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[object] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.parts.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def _read_program(content: bytes) -> object:
    """Header and sections of a program, without slack."""
    (start,) = struct.unpack_from("<I", content, 0x3C)
    signature, machine, count, *_, optional, _flags = struct.unpack_from("<4sHHIIIHH", content, start)
    assert content[:2] == b"MZ"
    assert signature == b"PE\0\0"
    sections = [struct.unpack_from("<8sIIII", content, start + 24 + optional + 40 * k) for k in range(count)]
    return machine, [(s, content[s[4] : s[4] + min(s[1], s[3])]) for s in sections]


def _read_archive(content: bytes) -> object:
    with zipfile.ZipFile(io.BytesIO(content)) as reader:
        assert reader.testzip() is None
        return {name: reader.read(name) for name in reader.namelist()}


def _read_document(content: bytes) -> object:
    start = int(content[content.rindex(b"startxref") + 9 :].split()[0])
    lines = content[start:].split(b"\n")
    assert lines[0] == b"xref"
    offsets = [int(line[:10]) for line in lines[3 : 2 + int(lines[1].split()[1])]]
    objects = [content[at : content.index(b"endobj", at)] for at in offsets]
    return [each.split(b"%")[0] for each in objects]


def _read_picture(content: bytes) -> object:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).tobytes()


def _read_sound(content: bytes) -> object:
    with wave.open(io.BytesIO(content)) as reader:
        return reader.getparams(), len(reader.readframes(reader.getnframes()))


def _read_page(content: bytes) -> object:
    tags = _Tags()
    tags.feed(content.decode("ascii"))
    return tags.parts


def _read_code(content: bytes) -> object:
    import ast

    return ast.dump(ast.parse(content))


def _read_record(content: bytes) -> object:
    return {**json.loads(content), "note": ""}


TYPES: dict[
    str, tuple[Callable[[random.Random, int], bytes], Callable[[bytes], object], dict[str, object]]
] = {
    "pebin": (_program, _read_program, {"starts": "MZ", "format": "pe"}),
    "zip": (_archive, _read_archive, {"starts": "PK", "format": "zip"}),
    "pdf": (_document, _read_document, {"starts": "%PDF", "format": "pdf"}),
    "png": (_picture("PNG"), _read_picture, {"starts": "\\x89PNG", "append": True}),
    "gif": (_picture("GIF"), _read_picture, {"starts": "GIF8", "append": True}),
    "bmp": (_picture("BMP"), _read_picture, {"starts": "BM", "append": True}),
    "wav": (_sound, _read_sound, {"starts": "RIFF", "change": [[44, 3044]], "append": True}),
    "html": (_page, _read_page, {"starts": "<!DOCTYPE", "change": "<!-- ([a-z ]+) -->", "values": "[a-z ]"}),
    "python": (
        _code,
        _read_code,
        {"starts": "# ", "change": "# ([a-z ]+)", "append": True, "values": "[a-z ]"},
    ),
    "json": (_record, _read_record, {"starts": "{", "change": '"note": "([a-z ]+)"', "values": "[a-z ]"}),
}
"""of each type the writer, a reader that returns everything that a rule protects, and the rule"""


def _prepare(site: Path, folder: Path) -> None:
    source = site / "magika/models/standard_v3_3"
    shutil.copy(source / "model.onnx", folder / "magika.onnx")
    shutil.copy(source / "config.min.json", folder)
    for name, (write, _, _) in TYPES.items():
        (folder / "files" / name).mkdir(parents=True)
        for k in range(COUNT):
            (folder / "files" / name / f"{k}.bin").write_bytes(write(random.Random(f"{name} {k}"), k))
    rules = [rule for _, _, rule in TYPES.values()]
    (folder / "rules.json").write_text(json.dumps(rules))


def _contents(folder: Path) -> list[tuple[str, bytes]]:
    """Types and contents of the files in the order of their ids, in which the types take turns."""
    files = sorted((folder / "files").glob("*/*.bin"), key=lambda path: (path.name, path.parent.name))
    return [(path.parent.name, path.read_bytes()) for path in files]


def _refuse_broken_files(folder: Path, files: list[tuple[str, bytes]]) -> int:
    """Return the number of changed files. Raises `ValueError` for one that is outside the threat, or that the reader of
    its type does not open as the unchanged file.
    """
    stored = load_file(folder / "run" / "attacked.safetensors")
    for row, values in zip(stored["adversarial.id"].tolist(), stored["adversarial.x"], strict=True):
        kind, old = files[row]
        new = bytes((values[values > 0] - 1).astype(np.uint8))
        changed = sum(a != b for a, b in zip(old, new, strict=False))
        read = TYPES[kind][1]
        if changed > CHANGE or not 0 <= len(new) - len(old) <= APPEND or read(new) != read(old):
            raise ValueError(f"file {row} of the type {kind} is not as the threat allows, or is not opened")
    return len(stored["adversarial.id"])


def _independent(folder: Path, effort: Effort) -> Broken:
    """Random search on one file of every other type, with ten times the largest number of queries of Holdfast. All
    changed files are checked.
    """
    import onnxruntime

    files = _contents(folder)
    n_changed = _refuse_broken_files(folder, files)
    reading, names, _ = reading_of(folder / "magika.onnx", 2048)
    assert names is not None
    rules = json.dumps({"rules": json.loads((folder / "rules.json").read_text())})
    constraint = ByteChanges(CHANGE, APPEND, file="rules.json", content=rules)
    session = onnxruntime.InferenceSession(str(folder / "magika.onnx"), providers=["CPUExecutionProvider"])

    def margins(contents: list[bytes], label: int) -> np.ndarray:
        x = np.array([reading.values(content) for content in contents], np.int32)
        scores = session.run(None, {"bytes": x})[0]
        return scores[:, label] - np.delete(scores, label, 1).max(1)

    rows = [*range(0, len(TYPES), 2)]
    surviving = torch.zeros(len(rows), dtype=torch.bool)
    for k, row in enumerate(rows):
        kind, old = files[row]
        rng, label, places = np.random.default_rng(row), names.index(kind), constraint.places(old)
        best, lowest, queries = old, float(margins([old], label)[0]), 0
        while lowest > 0 and queries < 10 * QUERIES:
            trials = [_changed(rng, old, best, places) for _ in range(20)]
            found = margins(trials, label)
            best, lowest = min(
                zip((*trials, best), (*found, lowest), strict=True), key=lambda pair: float(pair[1])
            )
            queries += len(trials)
        surviving[k] = bool(lowest > 0)
    mine = load_file(folder / "run" / "attacked.safetensors")
    broken = (mine["success"] | ~mine["correct"])[rows].mean()
    return Broken(
        surviving,
        10 * QUERIES,
        f"all {n_changed} changed files are within the rules and opened by readers of the row; on the same "
        f"{len(rows)} files Holdfast changes the type of {100 * broken:.0f} %",
    )


def _changed(rng: np.random.Generator, old: bytes, best: bytes, places: Places) -> bytes:
    """The file with random values at random places, or half of them those of the best file."""
    new = bytearray(old if rng.random() < 0.5 else best)
    if len(places.change):
        chosen = rng.choice(places.change, min(CHANGE, len(places.change)), replace=False)
        differ = [at for at in range(len(old)) if new[at] != old[at]]
        for at in differ[: max(0, len(differ) + len(chosen) - CHANGE)]:
            new[at] = old[at]
        for at in chosen:
            new[at] = rng.choice(places.values)
    if places.append:
        tail = new[len(old) :] or bytes(rng.choice(places.values, APPEND))
        kept = bytes(a if rng.random() < 0.5 else int(rng.choice(places.values)) for a in tail)
        new[len(old) :] = kept
    return bytes(new)


_FILES = f"magika.onnx files --threat bytes:change={CHANGE},append={APPEND},file=rules.json,queries={QUERIES}"

ENTRIES = {
    "magika": Entry(
        "file types (magika)", "magika", "Apache-2.0", "true", _prepare, f"{_FILES} --save-adversarial",
        f"explain {_FILES} --index 40 -o why.html", _independent, versus="random bytes, 10 x the queries",
    )
}  # fmt: skip
"""The entry of this module by its name on the command line."""
