"""Tests in a limited process that a `.pt2` program of `torch.export` can be checked, loaded and run."""

from pathlib import Path

import torch

from holdfast.io.models.exported import loaded_program, refuse_code_in_program
from holdfast.io.sandbox.sandbox_main import is_out_of_memory

_ROWS = 2
"""Number of rows of the trial, if the batch size is free."""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Test that loading an exported program and running it once does not crash the process. Return an empty dictionary.

    Raises the errors of `refuse_code_in_program` and `loaded_program`.
    """
    assert content is not None, "the file is read once"
    refuse_code_in_program(path, content)
    net, sizes = loaded_program(path, content)
    rows = [sizes[0] or _ROWS, *(side or 1 for side in sizes[1:])]
    try:
        with torch.no_grad():
            net(torch.rand(rows))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        # one that a free side of 1 does not suit is run on the examples of the user
    return {}


def prepare() -> None:
    """Limit torch to one thread. The import of this module loads the libraries before the memory of the process is
    limited.
    """
    import torch.export.pt2_archive._package

    torch.set_num_threads(1)
