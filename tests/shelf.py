"""Finished runs that tests read: each is made once for all processes of the tests, under a lock."""

import contextlib
import hashlib
import shutil
from pathlib import Path


class Shelf:
    """A folder with finished runs and pools."""

    def __init__(self, root):
        root.mkdir(exist_ok=True)
        self.root = root
        self._opened = {}

    def folder(self, name, make):
        """The folder of this name, which `make` fills if no process has done so. A test that changes it copies it."""
        place, done = self.root / name, self.root / f"{name}.done"
        with _locked(self.root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir()
                make(place)
                done.write_text(content_digest(place))
        self._opened[place] = done.read_text()
        return place

    def refuse_changes(self):
        """Fail if a test has changed one of the folders."""
        for place, digest in self._opened.items():
            assert content_digest(place) == digest, f"a test has changed {place}; it must change a copy"


def content_digest(folder):
    """SHA-256 over the names and the contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path.relative_to(folder)).encode())
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # one process at a time where files cannot be locked
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
