"""Augmentations of training images, which are computed for a whole batch at once on its device, and augmentations by a
function of the user.

Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019,
arXiv:1905.04899; with adversarial training Rebuffi et al., "Data Augmentation Can Improve Robustness", NeurIPS 2021,
arXiv:2111.05328. Differs from the papers: attacks target away from the label with the larger share of a mixed image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.attacks.parts.sounds import over_the_air
from holdfast.core.batch import Batch, spread
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.model import Bounds, raising
from holdfast.core.names import fraction_of, kind_of
from holdfast.core.types import Inputs, Labels
from holdfast.threats.signals import sound_of

NamedAugmentation = Literal["none", "shift", "crop-flip", "sounds"]
OwnAugmentation = Callable[[Inputs, Labels, torch.Generator], Inputs]
"""function of the user that returns augmented inputs, from the inputs and labels of a batch and a generator"""
Augmentation = NamedAugmentation | OwnAugmentation
_REACH = {"shift": 2, "crop-flip": 4}  # pixels; customary for digits and for photographs of 32 x 32


@dataclass(frozen=True)
class Moves:
    """Random shifts and flips, sampled for each image of a batch (n, channels, h, w)."""

    reach: int
    """largest shift in pixels"""
    down: Tensor
    """(n,) first row of the window on the padded image; `reach` for no shift"""
    right: Tensor
    """(n,) first column of the window on the padded image"""
    mirrored: Tensor | None
    """(n,) whether the image is flipped horizontally after the shift; None if no image is"""

    def of(self, x: Inputs) -> Inputs:
        """Return the images `x` with the shifts and flips applied. Pixels that a shift moves in from outside are
        zero.
        """
        return self._mirror(windows(x, self.reach, self.down, self.right))

    def back(self, x: Inputs, unseen: Inputs) -> Inputs:
        """Undo the shifts and flips of the images `x`. Pixels that a shift had moved out of an image are taken from
        `unseen`.
        """
        down, right = 2 * self.reach - self.down, 2 * self.reach - self.right
        inside = windows(torch.ones_like(x), self.reach, down, right).bool()
        return torch.where(inside, windows(self._mirror(x), self.reach, down, right), unseen)

    def _mirror(self, x: Inputs) -> Inputs:
        return x if self.mirrored is None else torch.where(self.mirrored[:, None, None, None], x.flip(3), x)


def refuse_augmentation(x: Inputs, how: Augmentation, cutmix: float) -> None:
    """Raise `UsageError` if an augmentation or CutMix is set, but the inputs `x` are not images (n, channels, h, w)."""
    shape = tuple(x.shape[1:])
    if how == "sounds":
        if len(shape) > 2 or cutmix:
            raise UsageError(
                f"augmentation 'sounds' is for clips without cutmix, and inputs have shape {shape}; use none"
            )
        return
    if isinstance(how, str) and how != "none" and len(shape) != 3:
        raise UsageError(f"augmentation {how!r} is for images, and inputs have shape {shape}; use none")
    if cutmix and len(shape) != 3:
        raise UsageError(
            f"cutmix is for images, and inputs have shape {shape}; leave recipe.training.cutmix out"
        )


def moves(batch: Batch, how: Augmentation, rng: Draws) -> Moves | None:
    """Sample random shifts and flips for each image of a batch (n, channels, h, w), or return None if the augmentation
    `how` is "none" or a function.
    """
    if how in ("none", "sounds") or not isinstance(how, str):
        return None
    refuse_augmentation(batch.x, how, 0.0)
    return drawn_moves(batch, _REACH[how], rng, flips=how == "crop-flip")


def drawn_moves(batch: Batch, reach: int, rng: Draws, *, flips: bool) -> Moves:
    """Sample a shift by up to `reach` pixels for each image of a batch and, with `flips`, whether it is flipped."""
    down, right = rng.at("shift").integers(batch.ids, 2 * reach + 1, 2).unbind(1)
    return Moves(reach, down, right, rng.at("flip").bits(batch.ids) < 0 if flips else None)


def augmented(batch: Batch, how: Augmentation, rng: Draws) -> Batch:
    """Return the batch with each image randomly shifted and flipped, or each clip behind a random shift, room, gain and
    noise, as the augmentation `how` states. The labels do not change.
    """
    if how == "sounds":
        return batch.at(_heard(batch.x, rng))
    sampled = moves(batch, how, rng)
    return batch if sampled is None else batch.at(sampled.of(batch.x))


_SOUNDS = {"shift_s": 0.05, "room": 0.5, "gain_db": 6.0}  # weaker than in a test over the air
_NOMINAL_RATE = 8000  # samples in a second of these limits; at a higher rate, shifts and rooms are shorter
_NOISE_DB = (20.0, 60.0)  # signal-to-noise ratios


def _heard(x: Inputs, rng: Draws) -> Inputs:
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(rng.at("sounds").key >> 1)
        noise = torch.randn_like(x)
        ratio = fraction_of(1.0) ** torch.empty(len(x), device=x.device, dtype=x.dtype).uniform_(*_NOISE_DB)
        size = torch.linalg.vector_norm(x.flatten(1), dim=1) / torch.linalg.vector_norm(
            noise.flatten(1), dim=1
        )
        noisy = x + noise * spread(ratio * size, x) * sound_of(x)
        return over_the_air(noisy, len(x), _SOUNDS, _NOMINAL_RATE).clamp(-1, 1)


def augmented_by(
    function: OwnAugmentation,
    batch: Batch,
    bounds: Bounds | None,
    rng: Draws,
    update: str = "the first update",
) -> Batch:
    """Return the batch with its inputs augmented by a function of the user, which receives copies of the inputs and a
    generator that is seeded from `rng`. `update` is the name of the update in messages.

    Raises `FunctionRaised` if the function raises an exception, and `UsageError` if it returns inputs of another shape
    or type, or outside of the `bounds` of the model.
    """
    generator = torch.Generator(batch.x.device).manual_seed(rng.at("augment").key >> 1)
    with raising("the function augment", f"in {update}", "correct the function"):
        x = function(batch.x.clone(), batch.y.clone(), generator)
    if not isinstance(x, Tensor):
        raise UsageError(f"augment returned {kind_of(x)}; the augmented inputs were expected as one tensor")
    if (x.shape, x.dtype, x.device) != (batch.x.shape, batch.x.dtype, batch.x.device):
        raise UsageError(
            f"augment returned inputs of shape {tuple(x.shape)} and type {x.dtype} on {x.device} for inputs of shape "
            f"{tuple(batch.x.shape)} and type {batch.x.dtype} on {batch.x.device}; return inputs of the same shape and "
            "type on the same device"
        )
    if bounds is not None and not torch.equal(bounds.clamp(x), x):  # NaN differs from itself
        low, high = bounds.like(x)
        raise UsageError(
            f"augment returned inputs from {float(x.min()):g} to {float(x.max()):g}, and the bounds of the model "
            f"are {float(low.min()):g} to {float(high.max()):g}; clamp the result, as in "
            f"x.clamp({float(low.min()):g}, {float(high.max()):g})"
        )
    return batch.at(x.detach())


def windows(x: Inputs, reach: int, down: Tensor, right: Tensor) -> Inputs:
    """Return shifted images: each image is padded with `reach` zeros on every side, and a window of its original size
    is cut out at row `down` and column `right`.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, (reach,) * 4)
    rows = down[:, None] + torch.arange(height, device=x.device)
    columns = right[:, None] + torch.arange(width, device=x.device)
    images = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[images, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def cut_and_mixed(batch: Batch, chance: float, rng: Draws) -> tuple[Batch, Batch, float]:
    """Apply the augmentation CutMix, which replaces a rectangle of each image by that of another image of the batch.

    Returns a batch with the labels that have the larger share of each image, a batch with the labels of the rest, and
    the fraction of an image that has the first labels. The box is the same for the whole batch. With a probability of 1
    - `chance` the batch is unchanged and the fraction is 1.
    """
    if not chance:
        return batch, batch, 1.0
    refuse_augmentation(batch.x, "none", chance)
    # one id for the whole batch, so that the box does not depend on the examples in it
    batch_id = torch.zeros(1, dtype=torch.int64, device=batch.x.device)
    u, area, down, right = rng.at("cutmix").uniform(batch_id, 4, dtype=torch.float64)[0].tolist()
    if u >= chance:
        return batch, batch, 1.0
    rows, columns = (_cut(size, at, area) for size, at in zip(batch.x.shape[2:], (down, right), strict=True))
    partner = batch.take(rng.at("partner").bits(batch.ids).argsort())
    x = batch.x.clone()
    x[:, :, rows, columns] = partner.x[:, :, rows, columns]
    height, width = x.shape[2:]
    partner_share = (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    by_label, by_partner_label = batch.at(x), batch.at(x).labelled(partner.y)
    return (
        (by_label, by_partner_label, 1 - partner_share)
        if partner_share <= 0.5
        else (by_partner_label, by_label, partner_share)
    )


def _cut(size: int, centre: float, area: float) -> slice:
    """Rows or columns of a box around `centre`, cut to the image; its side is the root of its area."""
    at, half = int(centre * size), int(size * math.sqrt(area)) // 2
    return slice(max(at - half, 0), min(at + half, size))
