"""Writes the pages of a folder of runs as static files, which a browser opens without a server."""

from pathlib import Path

from holdfast.core.errors import UsageError
from holdfast.runs.store.files import usable
from holdfast.viewer.pages import Site


def export(site: Site, folder: Path) -> int:
    """Write all pages of a site to a new or empty folder, and return their number. Raises `UsageError` if the folder
    contains files.
    """
    refuse_used(folder)
    site.shelf.check()
    n = 0
    for path in site.paths():
        file = folder / path if path.endswith((".css", ".csv")) else folder / path / "index.html"
        with usable(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(site.page(path).text, encoding="utf-8")
        n += 1
    return n


def refuse_used(folder: Path) -> None:
    """Raise `UsageError` if the folder of an export contains files, or is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"export is {str(folder)!r}, which contains files; a new or empty folder was expected"
        )
