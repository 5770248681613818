"""Tests in a limited process that a LightGBM model can be loaded and called; a damaged file may crash LightGBM."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise, takewhile
from pathlib import Path

import numpy as np

from holdfast.core.errors import TargetError

_MOST_FEATURES = 10_000_000
_SPLITS = ("split_feature", "threshold", "decision_type", "left_child", "right_child")
"""Properties of a tree with one entry for each inner node."""
_PARAMETERS, _END_OF_PARAMETERS = "parameters:", "end of parameters"
"""Lines around the training parameters."""


def read(path: Path, content: bytes | None, folder: Path) -> dict[str, object]:
    """Test that a LightGBM model can be loaded and called on two rows. Return an empty dictionary if this is possible,
    else raise `TargetError`.
    """
    assert content is not None, "the file is read once"
    try:
        refuse_invalid_trees(content.decode())
        _call_with_two_rows(content.decode())
    except MemoryError:
        raise
    except Exception as error:  # any error that a damaged file causes is reported in one line
        raise unreadable_lightgbm(path, str(error) or type(error).__name__) from error
    return {}


def unreadable_lightgbm(path: Path, reason: str) -> TargetError:
    """Return the error for a file that LightGBM cannot read, with the first line of the reason."""
    first_line = (reason.splitlines() or ["no message"])[0][:200]
    return TargetError(
        f"{str(path)!r} is no readable model of LightGBM: {first_line}; save it again with Booster.save_model, or "
        "download it again"
    )


def header_of(text: str) -> dict[str, str]:
    """Return the properties of a model before its first tree, such as `objective` and `max_feature_idx`."""
    return _properties(text.partition("\nTree=")[0])


def _properties(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in _lines(text) if "=" in line)


def _lines(text: str) -> list[str]:
    """Return the lines as LightGBM separates them. `str.splitlines` also separates at other characters."""
    return re.split("[\r\n]+", text)


def refuse_invalid_trees(text: str) -> None:
    """Raise `ValueError` for a model whose sizes do not fit its trees, or with a tree that has invalid nodes.

    LightGBM does not check this when it loads a file, and may later read outside of its memory for some rows.
    """
    if not text.startswith("tree\n"):
        raise ValueError("it does not begin with the line tree")
    if "\0" in text:
        raise ValueError("it contains the character NUL, at which LightGBM stops to read")
    _refuse_invalid_parameters(_lines(text))
    header = header_of(text)
    width, per_iteration = int(header["max_feature_idx"]) + 1, int(header["num_tree_per_iteration"])
    if not 0 < width <= _MOST_FEATURES or not 0 < per_iteration <= len(text):
        raise ValueError(f"it declares {width} features and {per_iteration} trees per iteration")
    if int(header["num_class"]) != per_iteration:
        raise ValueError(f"it has {header['num_class']} classes and {per_iteration} trees per iteration")
    trees = list(_trees(text, header))
    if not trees or len(trees) % per_iteration:
        raise ValueError(f"it has {len(trees)} trees, and a multiple of {per_iteration} was expected")
    for tree in trees:
        refuse_invalid_nodes(tree, width)


def _refuse_invalid_parameters(lines: Sequence[str]) -> None:
    """Raise `ValueError` for a training parameter without a value: LightGBM reads past the end of such a line."""
    if _PARAMETERS not in lines:
        return
    for line in takewhile(_END_OF_PARAMETERS.__ne__, lines[lines.index(_PARAMETERS) + 1 :]):
        if line and not re.fullmatch(r"\[[^:]+:[^:]+(:.*)?", line):
            raise ValueError(f"it has the parameter {line[:80]!r}; [name: value] was expected")


def _trees(text: str, header: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield the properties of each tree. Raises `ValueError` if the sizes in the header are not those of the trees."""
    content = text.encode()
    start = content.index(b"\nTree=") + 1
    sizes = [int(size) for size in header.get("tree_sizes", "").split()]
    for number, (begin, end) in enumerate(pairwise(accumulate(sizes, initial=start))):
        block = content[begin:end].decode()
        if end <= begin or not block.startswith(f"Tree={number}\n") or block.count("Tree=") != 1:
            raise ValueError(f"the size of tree {number} is not the one in its header")
        yield _properties(block)
    if text.count("\nTree=") != len(sizes):
        raise ValueError(f"it has {text.count(chr(10) + 'Tree=')} trees, and its header has {len(sizes)}")


def refuse_invalid_nodes(tree: Mapping[str, str], width: int) -> None:
    """Raise `ValueError` if a decision tree has a node with an invalid child, a repeated child, an invalid feature or
    invalid categories, or has linear models in its leaves.
    """
    if int(tree.get("is_linear", 0)):
        raise ValueError("a tree has linear models in its leaves, which are not supported")
    leaves, nodes = int(tree["num_leaves"]), int(tree["num_leaves"]) - 1
    if leaves < 1 or len(tree["leaf_value"].split()) != leaves:
        raise ValueError("a tree has another number of leaves than of values")
    if not nodes:
        return
    columns = {name: tree[name].split() for name in _SPLITS}
    if any(len(column) != nodes for column in columns.values()):
        raise ValueError("a tree has another number of nodes than of leaves")
    left, right = (np.array(columns[name], int) for name in ("left_child", "right_child"))
    children, parents = np.concatenate((left, right)), np.tile(np.arange(nodes), 2)
    inner = children >= 0
    if np.any(children < -leaves) or np.any(children >= nodes) or np.any(children[inner] <= parents[inner]):
        raise ValueError("a tree has nodes that lead nowhere")
    if len(np.unique(children)) < len(children):
        raise ValueError("a tree has a node with two parents")
    features = np.array(columns["split_feature"], int)
    if np.any((features < 0) | (features >= width)):
        raise ValueError("a tree looks at a feature that there is not")
    is_category = np.array(columns["decision_type"], int) & 1 == 1
    n_categories = int(tree["num_cat"])
    if is_category.any() or n_categories:
        places = np.array(columns["threshold"], float)[is_category]
        bounds = np.array(tree["cat_boundaries"].split(), int)
        n_words = len(tree["cat_threshold"].split())
        valid = len(bounds) == n_categories + 1 and bounds[0] == 0 and bounds[-1] == n_words
        if not valid or np.any(np.diff(bounds) < 0) or np.any((places < 0) | (places >= n_categories)):
            raise ValueError("a tree looks at categories that there are not")


def _call_with_two_rows(text: str) -> None:
    import lightgbm

    booster = lightgbm.Booster(model_str=text)
    rows = np.stack((np.zeros(booster.num_feature()), np.ones(booster.num_feature())))
    booster.predict(rows, raw_score=True, num_threads=1)


def prepare() -> None:
    """Import LightGBM before the memory of the process is limited."""
    import lightgbm  # noqa: F401
