"""Gradients of a model with respect to the rows of its embedding, and the bytes of a file that they belong to.

Ebrahimi et al., "HotFlip: White-Box Adversarial Examples for Text Classification", ACL 2018, arXiv:1712.06751, and for
bytes Kreuk et al., "Deceiving End-to-End Deep Learning Malware Detectors", 2018, arXiv:1802.04528.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATCHED = 16  # bytes that locate a run of tokens in a file
_LARGEST_SHIFT = 1  # of tokens, in which 0 may be the padding
_MOST_TOKENS = 1 << 14  # whose changes by all 256 values are computed
_SEARCHES = 256  # largest number of searches in a file, for models whose tokens are not its bytes


@dataclass(frozen=True)
class _Lookup:
    """Rows that a model looked up in one embedding."""

    tokens: Tensor
    """whole numbers, of any shape"""
    table: Tensor
    """the embedding, (values, size)"""
    rows: Tensor
    """the rows, (…, size), which are leaves of the graph"""


class EmbeddingGradients(TorchFunctionMode):
    """Context manager in which the rows that a model looks up in embeddings of at least 256 values get gradients."""

    def __init__(self) -> None:
        super().__init__()
        self._lookups: list[_Lookup] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call a function of torch, and note the calls of `embedding`."""
        y = func(*args, **(kwargs or {}))
        if func is F.embedding and len(args) > 1 and len(args[1]) >= 256:
            y = y.detach().requires_grad_()
            self._lookups.append(_Lookup(args[0].detach(), args[1], y))
        return y

    def gains(
        self, value: Tensor, content: bytes, movable: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the offsets of the movable bytes of a file that the model looked up, and for each the first-order
        change of a value (1,) if the byte has each of 256 values, (n, 256). The file must be the only example. Of very
        many bytes, those with the largest gradients are returned.

        Embeddings of which fewer tokens are bytes of the file than half of the most are left out, because they are of
        positions. Both results are empty if the model looked up no byte of the file, or has no gradients.
        """
        if not self._lookups or not value.requires_grad:
            return np.zeros(0, np.int64), np.zeros((0, 256))
        rows = [lookup.rows for lookup in self._lookups]
        gradients = torch.autograd.grad(value.sum(), rows, allow_unused=True, materialize_grads=True)
        # a model may look up a file in several parts
        by_table: dict[int, list[tuple[_Lookup, Tensor]]] = defaultdict(list)
        for lookup, gradient in zip(self._lookups, gradients, strict=True):
            by_table[lookup.table.data_ptr()].append((lookup, gradient))
        parts = [_changes(own, content, movable) for own in by_table.values()]
        most = max(n_located for n_located, _, _ in parts)
        chosen = [part for part in parts if part[0] >= most / 2]
        offsets, changes = (np.concatenate([part[k] for part in chosen]) for k in (1, 2))
        of_offset, row = np.unique(offsets, return_inverse=True)
        # a byte that the model reads several times has the sum of the changes
        summed = np.zeros((len(of_offset), 256))
        np.add.at(summed, row, changes)
        return of_offset, summed


def _changes(
    lookups: Sequence[tuple[_Lookup, Tensor]], content: bytes, movable: NDArray[np.bool_]
) -> tuple[int, NDArray[np.int64], NDArray[np.float64]]:
    """Return how many tokens are bytes of a file, the offsets of the movable ones, and the first-order changes if each
    has another value, (n, 256), from lookups in one embedding and the gradients of their rows.
    """
    tokens = torch.cat([lookup.tokens.flatten() for lookup, _ in lookups]).cpu().long()
    slopes = torch.cat([gradient.flatten(0, -2) for _, gradient in lookups]).cpu()
    table = lookups[0][0].table.detach().cpu()
    offsets, shift = located(tokens.numpy(), content)
    located_tokens = (offsets >= 0) & (shift + 256 <= len(table))
    at = torch.from_numpy(np.flatnonzero(located_tokens & movable[offsets]))
    if len(at) > _MOST_TOKENS:
        at = at[slopes[at].norm(dim=1).topk(_MOST_TOKENS).indices]
    changes = slopes[at] @ table[shift : shift + 256].T
    now = changes.gather(1, tokens[at][:, None] - shift)
    return int(located_tokens.sum()), offsets[at.numpy()], (changes - now).double().numpy()


def located(tokens: NDArray[np.int64], content: bytes) -> tuple[NDArray[np.int64], int]:
    """Return for each token the offset of its byte in a file, or -1, and the number by which tokens exceed bytes.

    Runs of tokens are searched in the file, because models read parts of a file, such as its first and its last bytes.

    >>> located(np.array([98, 99, 256, 120, 121]), b"-bcxy")
    (array([ 1,  2, -1,  3,  4]), 0)
    """
    found = [(_located(tokens - shift, content), shift) for shift in range(_LARGEST_SHIFT + 1)]
    return max(found, key=lambda each: int((each[0] >= 0).sum()))


def _located(values: NDArray[np.int64], content: bytes) -> NDArray[np.int64]:
    offsets, seen = np.full(len(values), -1), np.zeros(len(content), bool)
    is_byte = np.concatenate(([False], (values >= 0) & (values < 256), [False]))
    as_bytes = values.clip(0, 255).astype(np.uint8).tobytes()
    edges = np.flatnonzero(is_byte[1:] != is_byte[:-1]).tolist()
    searches = _SEARCHES
    for at, stop in zip(edges[::2], edges[1::2], strict=True):
        while at < stop and searches:
            searches -= 1
            first, n = _longest(as_bytes[at:stop], content)
            file = slice(first, first + n)
            # one value at places that are located already is a padding
            if not (seen[file].all() and len(set(content[file])) <= 1):
                offsets[at : at + n] = np.arange(first, first + n)
                seen[file] = True
            at += max(n, 1)
    return offsets


def _longest(run: bytes, content: bytes) -> tuple[int, int]:
    """Return the offset in a file of the longest beginning of a run of bytes, and its length; 0 if the first bytes of
    the run are not in the file.
    """
    first, n, values = 0, 0, np.frombuffer(run, np.uint8)
    while n < len(run) and (found := content.find(run[: max(n + 1, _MATCHED)])) >= 0:
        file = np.frombuffer(content, np.uint8)[found : found + len(run)]
        differ = np.flatnonzero(values[: len(file)] != file)
        first, n = found, int(differ[0]) if len(differ) else len(file)
    return first, n
