"""Free bytes of files by their format, and the readers that open a changed file."""

import io
import struct
import sys
import time
import zipfile

import numpy as np
import pytest

from files_of_formats import archive, pdf, pe
from holdfast.core.errors import Install, UsageError
from holdfast.threats.byte_changes import Rule
from holdfast.threats.file_formats import FORMATS, Free

pytest.importorskip("pefile")
pytest.importorskip("pypdf")
FILES = {"pe": pe(), "zip": archive(), "pdf": pdf()}
EACH = pytest.mark.parametrize("kind", FILES)


def offsets(free):
    return [offset for span in free.change for offset in range(*span)]


def changed(content, free, rng, n_appended=0, inserted=b""):
    """Return the file with new values at a random share of its free bytes, and with further bytes."""
    allowed = [value for value in range(256) if value not in free.forbidden]
    new = bytearray(content)
    for offset in offsets(free):
        if rng.random() < 0.5:
            new[offset] = rng.choice(allowed)
    new += bytes(rng.choice(allowed, n_appended).astype(np.uint8))
    return inserted + bytes(new)


@EACH
def test_random_changes_of_free_bytes_are_opened(kind):
    """Also at the same time as appended bytes, and before an archive."""
    file_format, content, rng = FORMATS[kind], FILES[kind], np.random.default_rng(0)
    free = file_format.free(content)
    assert free.append and offsets(free)
    assert file_format.fault(content, content) == ""
    for i in range(60):
        inserted = rng.bytes(i % 7) if free.insert else b""
        new = changed(content, free, rng, n_appended=(i % 5) * 200, inserted=inserted)
        assert file_format.fault(new, content) == "", new
    for value in {0, 10, 13, 37, 40, 255} - set(free.forbidden):
        new = bytearray(content)
        for offset in offsets(free):
            new[offset] = value
        assert file_format.fault(bytes(new), content) == "", value


@EACH
def test_change_of_any_other_byte_of_the_content_is_noticed(kind):
    """Of the code of a program, of a file in an archive, and of a page."""
    content, at = FILES[kind], {"pe": 0x205, "zip": 40, "pdf": FILES["pdf"].index(b"(text)") + 1}[kind]
    assert at not in offsets(FORMATS[kind].free(content))
    for value in (content[at] ^ 1, content[at] ^ 128):
        new = bytearray(content)
        new[at] = value
        assert FORMATS[kind].fault(bytes(new), content)


def test_free_bytes_of_a_program_are_those_of_its_headers_and_its_slack():
    content = FILES["pe"]
    stamp, checksum, first, second = (0x88, 0x8C), (0xD8, 0xDC), (0x210, 0x400), (0x400 + 110, 0x600)
    expected = ((2, 0x3C), (0x40, 0x80), stamp, checksum, (0x1D8, 0x200), first, second)
    assert FORMATS["pe"].free(content) == Free(expected, append=True)
    bound = bytearray(content)
    struct.pack_into("<II", bound, 0x98 + 112 + 8 * 11, 0x1E0, 8)  # bound imports after the table of sections
    assert FORMATS["pe"].free(bytes(bound)).change[4:6] == ((0x1D8, 0x1E0), (0x1E8, 0x200))


def test_free_bytes_of_an_archive_are_times_and_comments():
    content = FILES["zip"]
    free = FORMATS["zip"].free(content)
    values = bytearray(content)
    for start, stop in free.change:
        values[start:stop] = bytes(stop - start)
    assert b"of the archive" not in values and b"of a file" not in values
    assert sum(stop - start for start, stop in free.change) == 2 * 8 + 2 * len(b"of a file") + len(
        b"of the archive"
    )
    assert free.insert == (0,)


def test_free_bytes_of_a_document_are_comments_outside_of_strings_and_streams():
    content = FILES["pdf"]
    free = FORMATS["pdf"].free(content)
    assert [content[slice(*span)] for span in free.change] == [b"\xe2\xe3\xcf\xd3", b" free"]


@pytest.mark.parametrize(
    "kind, content",
    [
        ("pe", pe(certificates=64)),  # signed
        ("pe", pe(subsystem=1)),  # a driver
        ("zip", archive(method=zipfile.ZIP_BZIP2)),
        ("zip", archive().replace(b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0")),  # encrypted
        ("zip", archive(names=()) + b"PK\6\7".ljust(20, b"\0") + archive(names=())[-36:]),  # ZIP64
        ("pdf", pdf(extra=b"/ByteRange [0 1 2 3] ")),  # signed
        ("pdf", pdf(extra=b"/Name (without an end ")),
    ],
)
def test_nothing_is_free_in_files_of_other_kinds(kind, content):
    assert FORMATS[kind].free(content) == Free()


def test_a_program_before_an_archive_and_the_first_file_of_a_book_stay_in_place():
    program = FORMATS["zip"].free(b"#!/usr/bin/env python3\n" + FILES["zip"])
    book = FORMATS["zip"].free(archive(names=("mimetype", "a")))
    assert program.change and book.change
    assert not program.insert and not book.insert and min(offsets(program)) > 22


def test_new_bytes_of_a_document_are_no_ends_of_lines():
    """An end of a line would end a comment."""
    assert set(range(256)) - set(Rule(format="pdf").places(FILES["pdf"]).values.tolist()) == {10, 13}
    assert set(Rule(format="pdf", values=r"[\n -~]").places(FILES["pdf"]).values.tolist()) == set(
        range(32, 127)
    )


def test_end_of_a_document_stays_in_its_last_1024_bytes():
    assert FORMATS["pdf"].fault(FILES["pdf"] + b"." * 1000, FILES["pdf"]) == ""
    assert "%%EOF" in FORMATS["pdf"].fault(FILES["pdf"] + b"." * 1020, FILES["pdf"])


def test_archives_of_more_than_the_limit_are_not_unpacked():
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as writer:
        for i in range(5):
            writer.writestr(f"{i}", bytes(2**24))
    assert "67,108,864 bytes" in FORMATS["zip"].fault(file.getvalue(), archive())


@EACH
def test_damaged_and_foreign_files_raise_nothing(kind, monkeypatch):
    """Truncated files, files of other formats and random bytes have no free bytes; no file takes long."""
    monkeypatch.setattr("gc.collect", lambda: 0)  # pefile calls it, which takes a second among many objects
    file_format, content, rng = FORMATS[kind], FILES[kind], np.random.default_rng(0)
    foreign = [
        b"",
        *(other for name, other in FILES.items() if name != kind),
        *map(rng.bytes, range(1, 600, 40)),
    ]
    # the file is complete before a line at its end, and where bytes after the end record are not needed
    whole = {"pe": len(content), "zip": len(content) - len(b"of the archive"), "pdf": len(content) - 1}[kind]
    for each in [*(content[:n] for n in range(whole)), *foreign]:
        assert file_format.free(each) == Free()
    damaged = []
    for _ in range(300):
        new = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            new[rng.integers(len(new))] = rng.choice((0, 1, 127, 255, rng.integers(256)))
        damaged.append(bytes(new))
    started = time.process_time()
    for each in [*damaged, *foreign]:
        assert all(0 <= start < stop <= len(each) for start, stop in file_format.free(each).change)
        file_format.fault(each, content)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind, package", [("pe", "pefile"), ("pdf", "pypdf")])
def test_package_that_is_not_installed_is_named(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=package) as error:
        FORMATS[kind].fault(FILES[kind], FILES[kind])
    assert error.value.remedy == Install("bytes")
