"""Attacks with coarse patterns: queries in which the blocks of a grid are brighter or darker than the image.

A few dozen of them show which blocks lower the margin. To the query detector (`queries.py`) they are different inputs
if the changes are large, as for digits. `fit` estimates a linear function from the signs of the blocks to the margin
and steps to its signs, like the gradients of groups of values of Bhagoji, He, Li & Song, "Practical black-box attacks
on deep neural networks using efficient query mechanisms", ECCV 2018, arXiv:1712.09491. `population` is a genetic
search over the signs, like that of Alzantot et al., "GenAttack: practical black-box attacks with gradient-free
optimization", GECCO 2019, arXiv:1805.11090.

With `adaptive`, the attack changes its patterns while most of them are rejected. Larger patterns are no near duplicates
of each other, and patterns that are confined to the surroundings of the content of an image look less unusual.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.norms import expect_eps, expect_norm
from holdfast.attacks.parts.squares import as_image
from holdfast.attacks.parts.walks import Answer, Example, Walk, follow
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Model
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Fraction, Inputs, Steps

_RIDGE = 1.0  # in numbers of patterns, so that weights are small while there are fewer patterns than blocks
_STYLES = ((1.0, False), (3.0, False), (1.0, True), (3.0, True))
"""Sizes of the patterns of a fit in multiples of eps, and whether they are confined, in the order in which an adaptive
attack tries them."""
_SURROUNDINGS = 5  # pixels; side of the squares around the content to which patterns are confined
_CONTENT = (
    0.1  # difference from the median from which a value is content, as a fraction of the range of the image
)
_EITHER = 0.5  # probability of the sign of each of two parents


@dataclass(frozen=True)
class CoarsePatterns:
    """Changes the blocks of a grid by eps or -eps, and finds the signs that lower the margin under Linf."""

    search: Literal["fit", "population"] = "fit"
    """how signs are chosen: by a linear fit of the margins, or by a genetic search"""
    adaptive: bool = False
    """whether size and place of the patterns change while most of them are rejected"""
    blocks: Steps = 7
    """number of blocks in each row and column of the grid, for each channel"""
    queries: Steps = 1000
    """largest number of queries for each example, rejected ones included; a smaller query budget of the threat model
    takes precedence"""
    every: Steps = 10
    """number of patterns between two trials of the fitted signs; size of a population"""
    mutation: Fraction = 0.05
    """fraction of the signs of a new member of a population that are drawn again"""
    attempts: Steps = 100
    """number of rejected queries in a row after which the attack gives up"""

    needs: ClassVar[Access] = "scores"
    batched: ClassVar[bool] = True

    def __call__(self, model: Model, batch: Batch, threat: ThreatModel, *, rng: Draws) -> Inputs:
        constraint = expect_eps(threat.constraint, self)
        norm = expect_norm(constraint, self, Linf)
        queries = min(self.queries, threat.queries or self.queries)
        walk = {"fit": self._fit, "population": self._population}[self.search]
        return follow(model, batch, norm, walk, queries, rng)

    def _fit(self, at: Example) -> Walk:
        style, failures, fit = 0, 0, _Fit()
        while failures < self.attempts:
            size, confined = _STYLES[style]
            signs = at.signs(self.every, *self._grid(at))
            values: list[Answer] = []
            for change in self._patterns(at, signs, confined=confined):
                values.append((yield at.box(at.x + size * change)))
                failures = failures + 1 if values[-1] is None else 0
            fit.add(size * signs, values)
            style = self._next(style, values.count(None))
            if fit.patterns:
                trial = -fit.weights().sign().reshape(signs[:1].shape)
                value = yield at.ball(at.x + self._patterns(at, trial, confined=confined)[0])
                failures = failures + 1 if value is None else 0

    def _population(self, at: Example) -> Walk:
        style, failures = 0, 0
        members: list[tuple[float, Tensor]] = []
        while failures < self.attempts:
            children = self._children(at, [signs for _, signs in members])
            values: list[Answer] = []
            for change in self._patterns(at, children, confined=_STYLES[style][1]):
                values.append((yield at.ball(at.x + change)))
                failures = failures + 1 if values[-1] is None else 0
            style = self._next(style, values.count(None))
            members += [
                (value, child) for value, child in zip(values, children, strict=True) if value is not None
            ]
            members = sorted(members, key=lambda member: member[0])[: self.every]

    def _children(self, at: Example, members: Sequence[Tensor]) -> Tensor:
        """Return the signs (every, channels, rows, columns) of the next patterns: mixtures of two members, preferably
        of the first ones, with a few new signs; or new signs, until there are enough members.
        """
        grid = self._grid(at)
        fresh, draws = at.signs(self.every, *grid), at.uniform(self.every, 3, *grid)
        if len(members) < self.every:
            return fresh
        parents = (len(members) * draws[:, 0].flatten(1)[:, [0, -1]] ** 2).long()
        first, second = torch.stack(list(members))[parents].unbind(1)
        inherited = torch.where(draws[:, 1] < _EITHER, first, second)
        return torch.where(draws[:, 2] < self.mutation, fresh, inherited)

    def _next(self, style: int, rejected: int) -> int:
        """The style of the next patterns after some of the last ones were rejected."""
        return (style + 1) % len(_STYLES) if self.adaptive and 2 * rejected > self.every else style

    def _grid(self, at: Example) -> tuple[int, int, int]:
        """Return channels, rows and columns of the blocks."""
        channels, height, width = as_image(at.x.shape)
        return channels, min(self.blocks, height), min(self.blocks, width)

    def _patterns(self, at: Example, signs: Tensor, *, confined: bool) -> Tensor:
        """The changes (n, *features) of an image with these signs (n, channels, rows, columns) of its blocks, of the
        size eps.
        """
        channels, height, width = as_image(at.x.shape)
        patterns = at.eps * F.interpolate(signs, size=(height, width), mode="nearest")
        if confined:
            image = at.x.reshape(channels, height, width)
            content = (image - image.median()).abs() > _CONTENT * (image.max() - image.min())
            patterns = patterns * F.max_pool2d(content.to(at.x.dtype), _SURROUNDINGS, 1, _SURROUNDINGS // 2)
        return patterns.reshape(-1, *at.x.shape)


@dataclass
class _Fit:
    """The ridge regression of margins on the blocks of patterns, in multiples of eps, from their sums."""

    patterns: int = 0
    products: Tensor = field(default_factory=lambda: torch.zeros(()))
    """sum of the outer products (d + 1, d + 1) of patterns, with a constant as the last number"""
    targets: Tensor = field(default_factory=lambda: torch.zeros(()))
    """sum of the patterns (d + 1), each multiplied by its margin"""

    def add(self, patterns: Tensor, values: Sequence[Answer]) -> None:
        """Add patterns (n, ...) and their margins (n), except rejected ones."""
        known = [row for row, value in enumerate(values) if value is not None]
        if known:
            rows = patterns[known].flatten(1)
            rows = torch.cat((rows, rows.new_ones(len(known), 1)), 1)
            self.patterns += len(known)
            self.products = self.products + rows.T @ rows
            self.targets = self.targets + rows.new_tensor([values[row] for row in known]) @ rows

    def weights(self) -> Tensor:
        """Return the weights (d) of the patterns."""
        ridge = _RIDGE * torch.eye(len(self.targets), dtype=self.targets.dtype)
        ridge[-1, -1] = 0  # of the constant
        solution: Tensor = torch.linalg.solve(self.products + ridge, self.targets)
        return solution[:-1]
