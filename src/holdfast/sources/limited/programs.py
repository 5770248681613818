"""Judges, loads and runs one `.pt2` program of `torch.export`."""

from pathlib import Path

import torch

from holdfast.sources.exported import batch_size, loaded, refuse_code

_ROWS = 2
"""of the trial, where the batch is free"""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """The size of the batches that the program takes, None for any; raises as `refuse_code` and `loaded` do."""
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
        # one that a free side of 1 does not suit is run on the examples of the user
    return {"batch_size": size}


def prepare() -> None:
    """Import what loads a program, which takes memory by itself."""
    import torch.export.pt2_archive._package

    torch.set_num_threads(1)
