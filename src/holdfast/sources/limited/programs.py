"""Checks, loads and runs one `.pt2` program of `torch.export`."""

from pathlib import Path

import torch

from holdfast.sources.exported import batch_size, loaded, refuse_code

_ROWS = 2
"""number of rows of the trial, if the batch size is free"""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Return the batch size that the program takes, None for any. Raises the errors of `refuse_code` and `loaded`."""
    assert content is not None, "the file is read once"
    refuse_code(path, content)
    net, sizes = loaded(path, content)
    size = batch_size(net, sizes)
    rows = [size or sizes[0] or _ROWS, *(side or 1 for side in sizes[1:])]
    try:
        with torch.no_grad():
            net(torch.rand(rows))
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        # a program that does not take a free size of 1 is run on the examples of the user
    return {"batch_size": size}


def prepare() -> None:
    """Limit torch to one thread. Importing this module loads the libraries before memory is limited."""
    import torch.export.pt2_archive._package

    torch.set_num_threads(1)
