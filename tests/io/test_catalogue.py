"""Data sets by name: fetched from a server on this machine, imported from a folder, read without pickle."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from holdfast.cli.catalogue import import_ as import_command
from holdfast.core.errors import TargetError, UsageError
from holdfast.io import data_catalogue
from holdfast.io.data.data import open_data
from holdfast.io.data_catalogue import CATALOGUE, RemoteFile, entry_of, listed_data_sets
from holdfast.io.remote.fetching import cifar_arrays, download, fetch, idx, import_folder

RNG = np.random.default_rng(0)


class Server:
    """Serves bytes by name on 127.0.0.1, and may break off after some of them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.break_after: int | None = None
        self.ranges = True
        self.asked: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        content = self.files.get(handler.path[1:])
        if content is None:
            handler.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        stop = len(content) if self.break_after is None else start + self.break_after
        handler.wfile.write(content[start:stop])

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


def digits() -> dict[str, np.ndarray]:
    return {
        "train-images-idx3-ubyte.gz": RNG.integers(0, 256, (6, 4, 5), dtype=np.uint8),
        "train-labels-idx1-ubyte.gz": np.arange(6, dtype=np.uint8),
        "t10k-images-idx3-ubyte.gz": RNG.integers(0, 256, (3, 4, 5), dtype=np.uint8),
        "t10k-labels-idx1-ubyte.gz": np.arange(3, dtype=np.uint8),
    }


def serve(server: Server, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, bytes]) -> None:
    """Put files on the server and let the catalogue's entry point at them."""
    server.files |= files
    remotes = tuple(RemoteFile(server.url(file), md5(content)) for file, content in files.items())
    changed = CATALOGUE | {name: dataclasses.replace(CATALOGUE[name], remotes=remotes)}
    for module in ("data_catalogue", "remote.fetching", "data.data"):
        monkeypatch.setattr(f"holdfast.io.{module}.CATALOGUE", changed)


def test_the_official_form_of_mnist_is_fetched_and_opened(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = digits()
    serve(server, monkeypatch, "mnist", {name: idx_bytes(array) for name, array in arrays.items()})
    seen: list[tuple[str, int, int]] = []
    path = fetch("mnist", progress=lambda *report: seen.append(report))
    assert path == data_catalogue.data_folder() / "mnist.npz"
    data = open_data("mnist")
    assert (data.read(0, 3).x[:, 0].numpy() * 255).round().astype(np.uint8).tolist() == arrays[
        "t10k-images-idx3-ubyte.gz"
    ].tolist()
    assert data.classes == tuple("0123456789")
    assert len(open_data("mnist", split="train")) == 6
    assert {file for file, *_ in seen} == set(arrays) and all(done <= total for _, done, total in seen)
    assert [entry.name for entry in data_catalogue.data_folder().iterdir() if entry.is_file()] == [
        "mnist.npz"
    ]
    n_requests = len(server.asked)
    fetch("mnist")
    assert len(server.asked) == n_requests


def cifar_archive() -> tuple[bytes, np.ndarray, np.ndarray]:
    rows = RNG.integers(0, 256, (12, 3073), dtype=np.uint8)
    rows[:, 0] %= 10
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for i, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
            content = rows[2 * i : 2 * i + 2].tobytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return file.getvalue(), images, rows[:, 0]


def test_the_binary_version_of_cifar_is_fetched(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    content, images, labels = cifar_archive()
    serve(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": content})
    fetch("cifar10")
    batch = open_data("cifar10").read(0, 2)
    assert batch.y.tolist() == labels[10:].tolist()
    assert np.array_equal((batch.x.permute(0, 2, 3, 1).numpy() * 255).round(), images[10:])


def test_an_interrupted_download_continues_at_its_last_byte(server: Server, tmp_path: Path) -> None:
    content = RNG.bytes(3_000_000)
    server.files["f.bin"] = content
    remote = RemoteFile(server.url("f.bin"), md5(content))
    server.break_after = 1_000_000
    with pytest.raises(TargetError, match="the next attempt continues"):
        download(remote, tmp_path / "f.bin")
    assert not (tmp_path / "f.bin").exists()
    kept = (tmp_path / "f.bin.part").stat().st_size
    assert kept == 1_000_000
    server.break_after = None
    download(remote, tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == content
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_server_without_ranges_sends_all_of_it_again(server: Server, tmp_path: Path) -> None:
    content = RNG.bytes(1000)
    server.files["f.bin"], server.ranges = content, False
    (tmp_path / "f.bin.part").write_bytes(content[:100])
    download(RemoteFile(server.url("f.bin"), md5(content)), tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == content


def test_a_wrong_checksum_is_refused_and_nothing_is_left(server: Server, tmp_path: Path) -> None:
    server.files["f.bin"] = b"something else"
    remote = RemoteFile(server.url("f.bin"), md5(b"what was published"))
    with pytest.raises(TargetError, match=f"md5 {md5(b'something else')}; {remote.md5} was expected"):
        download(remote, tmp_path / "f.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_complete_part_is_checked_and_taken(server: Server, tmp_path: Path) -> None:
    server.files["f.bin"] = b"all of it"
    (tmp_path / "f.bin.part").write_bytes(b"all of it")
    download(RemoteFile(server.url("f.bin"), md5(b"all of it")), tmp_path / "f.bin")
    assert (tmp_path / "f.bin").read_bytes() == b"all of it"


def test_a_failed_download_is_reported(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match="answered 404"):
        download(RemoteFile(server.url("gone"), md5(b"")), tmp_path / "gone")
    with pytest.raises(TargetError, match="cannot be reached"):
        download(RemoteFile("http://127.0.0.1:9/x", md5(b"")), tmp_path / "x")
    with pytest.raises(UsageError, match="no official mirror"):
        fetch("gtsrb")
    with pytest.raises(UsageError, match="did you mean 'mnist'"):
        fetch("mnits")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("HOLDFAST_DATA", str(tmp_path / "file"))
    with pytest.raises(TargetError, match="set HOLDFAST_DATA to another"):
        fetch("mnist")


# imports -----------------------------------------------------------------------------------------


def strips(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """An archive of lossless image strips, two images each."""
    blobs = []
    for start in range(0, len(images), 2):
        file = io.BytesIO()
        Image.fromarray(images[start : start + 2].reshape(-1, 32, 3)).save(file, "WEBP", lossless=True)
        blobs.append(file.getvalue())
    offsets = np.cumsum([0, *map(len, blobs)])
    np.savez(path, webp=np.frombuffer(b"".join(blobs), np.uint8), offsets=offsets, y=labels)


def test_a_folder_is_imported_in_whatever_form_it_holds(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    images, labels = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8), np.arange(6, dtype=np.uint8)
    for name, rows in {"train0": slice(0, 2), "train1": slice(2, 4), "test": slice(4, 6)}.items():
        strips(source / f"cifar10_{name}.npz", images[rows], labels[rows])
    official = {name: idx_bytes(array) for name, array in digits().items()}
    serve(server, monkeypatch, "mnist", official)
    for name, content in official.items():
        (source / name).write_bytes(content)
    np.savez(source / "gtsrb32.npz", x_test=images, y_test=labels)
    brought = {imported.name: imported for imported in import_folder(source)}
    # Fashion-MNIST publishes files of the same names as MNIST; the checksums tell them apart.
    assert set(brought) == {"cifar10", "mnist", "gtsrb"}
    assert server.asked == []
    batch = open_data("cifar10", split="train").read(0, 4)
    assert np.array_equal((batch.x.permute(0, 2, 3, 1).numpy() * 255).round(), images[:4])
    assert batch.y.tolist() == [0, 1, 2, 3]
    assert len(open_data("mnist")) == 3 and len(open_data("gtsrb")) == 6
    present = {row.name for row in listed_data_sets() if row.present}
    assert present == set(brought)
    assert not [path for path in data_catalogue.data_folder().iterdir() if path.name.startswith(".")]


def test_folders_that_cannot_be_imported_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(TargetError, match="is not a folder"):
        import_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TargetError, match=r"contains no known data set; one of the files mnist\.npz"):
        import_folder(tmp_path / "empty")
    assert not folder.exists()
    folder.mkdir()
    with pytest.raises(UsageError, match="is the data folder itself"):
        import_folder(folder)
    (tmp_path / "damaged").mkdir()
    for part in CATALOGUE["cifar10"].parts:
        np.savez(
            tmp_path / "damaged" / part,
            webp=np.zeros(9, np.uint8),
            offsets=np.array([0, 9]),
            y=np.zeros(1, int),
        )
    with pytest.raises(TargetError, match="row 0 of .*cannot be read as"):
        import_folder(tmp_path / "damaged")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": np.array([0.0, 50.0])},
        {"offsets": np.array([50, 0])},
        {"offsets": np.zeros((2, 2), int)},
        {"offsets": np.array([0])},
        {"webp": np.zeros(50, np.float32)},
        {"y": np.array(["a", "b"])},
        {"y": np.arange(3)},
        {"y": np.arange(1)},
        {"y": np.zeros(100_001, np.uint8)},
        {"height": 33},
        pytest.param({"height": 16_000, "width": 16_000}, marks=pytest.mark.slow),  # 256 million pixels
    ],
)
def test_archives_of_strips_that_are_not_as_expected_are_refused(
    changes, tmp_path: Path, folder: Path
) -> None:
    file = io.BytesIO()
    size = changes.pop("width", 32), changes.pop("height", 64)
    Image.new("RGB", size).save(file, "WEBP", lossless=True, method=0)
    blob = np.frombuffer(file.getvalue(), np.uint8)
    arrays = {"webp": blob, "offsets": np.array([0, len(blob)]), "y": np.arange(2)} | changes
    for part in CATALOGUE["cifar10"].parts:
        np.savez(tmp_path / part, **arrays)
    with pytest.raises(TargetError, match="get the file again|too large to decode"):
        import_folder(tmp_path)


def test_a_damaged_file_does_not_replace_an_imported_one(tmp_path: Path, folder: Path) -> None:
    np.savez(tmp_path / "gtsrb32.npz", x_test=RNG.random((2, 4)), y_test=np.arange(2))
    import_folder(tmp_path)
    before = (folder / "gtsrb32.npz").read_bytes()
    (tmp_path / "gtsrb32.npz").write_bytes(before[:100])
    with pytest.raises(TargetError, match="damaged or truncated"):
        import_folder(tmp_path)
    assert (folder / "gtsrb32.npz").read_bytes() == before


@pytest.mark.parametrize("cut", [2, 10, 60])
def test_damaged_official_files_are_named(tmp_path: Path, cut: int) -> None:
    (tmp_path / "f.gz").write_bytes(idx_bytes(RNG.integers(0, 256, (3, 5, 5), dtype=np.uint8))[:cut])
    with pytest.raises(TargetError, match="damaged or truncated"):
        idx(tmp_path / "f.gz")
    (tmp_path / "f.tar.gz").write_bytes(cifar_archive()[0][:cut])
    with pytest.raises(TargetError, match=r"damaged or truncated|lacks data_batch_1\.bin"):
        cifar_arrays(tmp_path / "f.tar.gz")


def test_an_idx_file_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.gz").write_bytes(gzip.compress(struct.pack(">HBBII", 0, 8, 2, 2**31, 2**31) + b"abc"))
    with pytest.raises(TargetError, match="has 3 values"):
        idx(tmp_path / "f.gz")


def test_entries_are_complete() -> None:
    for name, entry in CATALOGUE.items():
        assert entry.title and entry.licence and entry.cite
        assert bool(entry.remotes) == (entry.form is not None)
        assert all(len(remote.md5) == 32 for remote in entry.remotes)
        assert entry_of(name) is entry
    assert len({entry.file for entry in CATALOGUE.values()}) == len(CATALOGUE)


@pytest.mark.slow
def test_a_folder_of_real_data_is_imported(data_folder: Path) -> None:
    if not (data_folder / CATALOGUE["cifar10"].parts[0]).exists():
        pytest.skip("the folder of real data was imported already")
    names = {imported.name for imported in import_folder(data_folder)}
    assert names == set(CATALOGUE)
    cifar = open_data("cifar10", split="train")
    assert len(cifar) == 50_000 and len(open_data("cifar10")) == 10_000
    mean = np.concatenate(
        [cifar.read(i, i + 5000).x.mean((0, 2, 3)).numpy()[None] for i in range(0, 50_000, 5000)]
    )
    np.testing.assert_allclose(mean.mean(0), [0.49139968, 0.48215841, 0.44653091], atol=1e-5)


def test_the_help_of_the_import_names_all_files_that_it_reads():
    shown = " ".join(import_command.help.split())
    assert all(file in shown for entry in CATALOGUE.values() for file in (entry.file, *entry.parts))
    assert all(name in shown for name, entry in CATALOGUE.items() if entry.remotes)
