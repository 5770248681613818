"""Double masking: certifies the vote of a classifier over masks that hide parts of an image, against patches.

Xiang, Mahloujifar & Mittal, "PatchCleanser: Certifiably Robust Defense against Adversarial Patches for Any Image
Classifier", USENIX Security 2022, arXiv:2108.09135. Every place of the patch lies inside a mask. The vote is the class
on which all pairs of one mask with the others agree, if there is such a mask, otherwise the class of most single masks.
If all pairs agree on the label at the clean image, they do so for the mask that hides a patch, and the vote is the
label. Differs from the paper: the masks divide the places of the threat among them, so that each place lies in exactly
one mask, and the sizes of masks differ by at most a pixel; equal votes are decided by the probabilities; the label has
to lead by more than the rounding errors of another batch; and images that are not certified are attacked at places
inside the masks of a pair that disagrees.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.ascent import cosine, gradient
from holdfast.attacks.parts.losses import margin, margin_loss
from holdfast.attacks.patch_attack import ascended, heaviest, noisy
from holdfast.certifiers.protocol import RANDOM, Proofs, on_top_of
from holdfast.certifiers.smoothing import NO_CLASS, votes_of
from holdfast.core.batch import Batch
from holdfast.core.catalogue import PATCH_MASKS
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.gradients import instead
from holdfast.core.meter import Room, in_room, lead_of
from holdfast.core.model import EVERY, Bounds, Classifier
from holdfast.core.outputs import SAME, change, scale
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Ids, Inputs, Labels, Logits, Mask, Rows, Steps
from holdfast.threats.transformations import Patch

_AT_ONCE = 128  # masked images of one call of the model: more are not faster on a CPU
_VALUES_AT_ONCE = 1 << 20
_AT_A_TIME = 8  # pairs of one mask that are compared before masks that disagreed are left out
_ROUNDING = 100.0  # units in the last place of the largest logit, by which the label has to lead
_SOFT = 4  # masks whose mean probabilities attacks follow: each patch is hidden by at most one of them
_PLACES, _STEPS, _REACH = 20, 10, 2.5  # of the attack, as of PatchAttack


def divided(places: range, parts: int) -> list[range]:
    """Return the places in `parts` ranges of almost equal length, or in ranges of one place if there are fewer.

    >>> divided(range(2, 7), 2)
    [range(2, 4), range(4, 7)]
    """
    parts = min(parts, len(places))
    edges = [places.start + len(places) * part // parts for part in range(parts + 1)]
    return [range(*each) for each in pairwise(edges)]


@dataclass(frozen=True)
class MaskSet:
    """The masks for the places of a patch in images of one shape: `per_axis` along each axis, or one for each place.

    A mask hides all patches of the places that it stands for, which are those of a rectangle, and nothing else. Raises
    `UsageError` if the patch does not fit into the images, or a mask hides all of an image.
    """

    patch: Patch
    shape: torch.Size
    """channels, height and width of an image"""
    per_axis: int

    def __post_init__(self) -> None:
        if not bool(self.masks.flatten(1).all(1).any()):
            return
        hidden = f"a mask of {self.shape[1]}x{self.shape[2]} hides the whole image"
        if max(map(len, self.patch.places(self.shape))) == 1:
            raise UsageError(
                f"the patch of {self.patch} is as large as the image, so that {hidden}; give a smaller one"
            )
        raise UsageError(f"masks is {self.per_axis} for {self.patch}, and {hidden}", Remedy("masks", MASKS))

    @cached_property
    def cells(self) -> tuple[list[range], list[range]]:
        """The rows and the columns of the places of each mask."""
        rows, columns = self.patch.places(self.shape)
        return divided(rows, self.per_axis), divided(columns, self.per_axis)

    @cached_property
    def masks(self) -> Tensor:
        """Masks of the hidden pixels, (masks, 1, height, width), by rows."""
        rows, columns = self.cells
        down = _covered(rows, self.patch.height, self.shape[1])
        right = _covered(columns, self.patch.width, self.shape[2])
        return (down[:, None, :, None] & right[None, :, None, :]).flatten(0, 1)[:, None]

    @cached_property
    def mask_of_place(self) -> Tensor:
        """The number of the mask that hides the patch at each place, (rows, columns) int64."""
        down, right = (
            torch.arange(len(cells)).repeat_interleave(torch.tensor([*map(len, cells)]))
            for cells in self.cells
        )
        return down[:, None] * len(self.cells[1]) + right

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest mask."""
        sides = (self.patch.height, self.patch.width)
        height, width = (
            max(map(len, cells)) - 1 + side for cells, side in zip(self.cells, sides, strict=True)
        )
        return height, width

    def drawn(self, ids: Ids, rng: Draws) -> Tensor:
        """Return two random masks of the set, which may be the same, for each id, as the mask of the pixels that one of
        them hides, (n, 1, height, width).
        """
        masks = self.masks.to(ids.device)
        first, second = (rng.at(name).integers(ids, len(masks)) for name in ("first", "second"))
        return masks[first] | masks[second]


@lru_cache(8)
def mask_set(patch: Patch, shape: torch.Size, per_axis: int) -> MaskSet:
    """Return the masks for the places of a patch, which are kept. Raises the errors of `MaskSet`."""
    return MaskSet(patch, shape, per_axis)


def _covered(cells: list[range], side: int, length: int) -> Tensor:
    """The pixels along an axis that patches with a side at the places of each range cover, (ranges, length)."""
    pixels = torch.arange(length)
    return torch.stack([(pixels >= cell.start) & (pixels < cell.stop - 1 + side) for cell in cells])


def hidden(x: Inputs, mask: Mask, bounds: Bounds) -> Inputs:
    """Return the images with the middle of the valid range at the pixels of a mask that broadcasts with them."""
    low, high = bounds.like(x)
    return torch.where(mask, (low + high) / 2, x)


class MaskedVote(nn.Module):
    """Classifier that predicts the class on which the predictions of a base classifier for masked images agree, as the
    module describes.

    Its logits have the vote as the largest, and the gradients of the mean probabilities under four of the masks, so
    that attacks on it are attacks on the defence. No patch under which it could change at a certified image exists.
    """

    def __init__(self, base: Classifier, mask_set: MaskSet) -> None:
        super().__init__()
        self.base, self.mask_set = base, mask_set
        self.masks: Tensor
        self.register_buffer("masks", mask_set.masks, persistent=False)

    def forward(self, x: Inputs) -> Logits:
        """Return the logarithm of the share of the votes of each class, (n, classes), to which less than a vote is
        added by the probabilities. If the pairs of a mask agree on a class, it has all votes.

        Cost: one forward of the base classifier for each mask, and if they disagree up to as many for each mask that is
        outvoted; four more with their backwards for a gradient.
        """
        with torch.no_grad():
            self._refuse_other_shape(x)
            single = self._single(x)
            soft = _mean_log_probabilities(single[:, self._followed(single.shape[1])])
            value = self._decided(x, votes_of(single.flatten(0, 1)).view(single.shape[:2]), soft)
        return instead(value, self.soft(x)) if torch.is_grad_enabled() and x.requires_grad else value

    def soft(self, x: Inputs) -> Logits:
        """Return the logarithm of the mean probabilities under four masks, (n, classes), which is differentiable."""
        self._refuse_other_shape(x)
        masks = self.masks[self._followed(len(self.masks))]
        logits = self.base(hidden(x[:, None], masks, self.base.bounds).flatten(0, 1))
        return _mean_log_probabilities(logits.view(len(x), len(masks), -1))

    def disagreeing(self, x: Inputs, y: Labels) -> tuple[Mask, Tensor]:
        """Return for each image the masks of a pair that does not agree on the label, (n, masks), and the number of
        masked images that were classified, (n,) int64.

        An image without such a mask is certified. It is no longer examined once a pair disagrees, so that further masks
        may disagree. The pairs that lead least with single masks come first.
        """
        leads = self._lead(self._single(x), y)
        disagree, masks = ~(leads > 0), leads.shape[1]
        work = torch.full_like(y, masks)
        first, second = torch.triu_indices(masks, masks, 1, device=x.device)
        order, done = (leads[:, first] + leads[:, second]).argsort(1), 0
        while done < len(first):
            rows = (~disagree.any(1)).nonzero()[:, 0]
            if not len(rows):
                break
            pairs = order[rows, done : done + max(1, _AT_ONCE // len(rows))]
            logits = self._logits(x, rows[:, None].expand_as(pairs), first[pairs], second[pairs])
            wrong = ~(self._lead(logits, y[rows]) > 0)
            for side in (first, second):
                row, at = wrong.nonzero().T
                disagree[rows[row], side[pairs[row, at]]] = True
            work[rows] += pairs.shape[1]
            done += pairs.shape[1]
        return disagree, work

    def refuse_random(self) -> None:
        """Raise `UsageError` if the base classifier returns other logits for the same image. Costs two forward passes
        of one image.
        """
        x = torch.rand(1, *self.mask_set.shape, generator=torch.Generator().manual_seed(0))
        x = self.base.bounds.clamp(x.to(self.masks.device))
        with torch.inference_mode():
            if bool((change(self.base(x), self.base(x)) > SAME).any()):
                raise UsageError(RANDOM)

    def _refuse_other_shape(self, x: Inputs) -> None:
        if x.shape[1:] != self.mask_set.shape:
            raise TargetError(
                f"the masks are for images of shape {tuple(self.mask_set.shape)}, and the inputs have shape "
                f"{tuple(x.shape[1:])}; give images of one shape"
            )

    @staticmethod
    def _followed(masks: int) -> slice:
        return slice(None, None, -(-masks // _SOFT))

    @staticmethod
    def _lead(logits: Logits, y: Labels) -> Tensor:
        """By how much the label leads in logits (n, k, classes) beyond the rounding errors of another batch."""
        flat, labels = logits.flatten(0, 1), y.repeat_interleave(logits.shape[1])
        rounding = _ROUNDING * torch.finfo(logits.dtype).eps * scale(flat)
        return (lead_of(flat, labels) - rounding).view(logits.shape[:2])

    def _single(self, x: Inputs) -> Logits:
        """The logits under each mask, (n, masks, classes)."""
        masks = torch.arange(len(self.masks), device=x.device).expand(len(x), -1)
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(masks)
        return self._logits(x, rows, masks, masks)

    def _logits(self, x: Inputs, rows: Rows, first: Tensor, second: Tensor) -> Logits:
        """The logits of images in given rows under two masks, (*rows.shape, classes), without gradients."""
        masks, shape = self.masks, rows.shape
        rows, first, second = rows.flatten(), first.flatten(), second.flatten()
        room = Room(max(1, min(_AT_ONCE, _VALUES_AT_ONCE // x[:1].numel())))
        parts: list[Logits] = []
        start = 0

        def classified(size: int) -> Logits:
            part = slice(start, start + size)
            mask = masks[first[part]] | masks[second[part]]
            logits: Logits = self.base(hidden(x[rows[part]], mask, self.base.bounds))
            return logits

        with torch.no_grad():
            while start < len(rows) or not parts:
                parts.append(in_room(classified, room, start, len(rows) - start))
                start += room.size
        logits = torch.cat(parts)
        return logits.view(*shape, logits.shape[1])

    def _decided(self, x: Inputs, predictions: Labels, soft: Logits) -> Logits:
        """The logits of the vote, from the prediction under each mask, (n, masks), and the mean log-probabilities."""
        n, masks = predictions.shape
        votes = torch.zeros(n, soft.shape[1] + 1, dtype=soft.dtype, device=x.device)
        # `NO_CLASS` is counted in the last column
        votes.scatter_add_(1, predictions % votes.shape[1], torch.ones_like(predictions, dtype=soft.dtype))
        votes, below_one = votes[:, :-1], 0.5 / (1 - soft.nan_to_num(-torch.inf))
        logits = ((votes + below_one) / (masks + 1)).log()
        best = logits.topk(2, dim=1)
        won = (best.values[:, 0] > best.values[:, 1])[:, None] & (predictions == best.indices[:, :1])
        rows, numbers = (~won & (predictions != NO_CLASS)).nonzero().T
        agreeing = self._agreeing(x, predictions, rows, numbers)
        chosen, unanimous = rows[agreeing], predictions[rows[agreeing], numbers[agreeing]]
        votes[chosen] = 0.0
        votes[chosen, unanimous] = float(masks)
        logits = ((votes + below_one) / (masks + 1)).log()
        return logits.masked_fill((predictions == NO_CLASS).all(1, keepdim=True), torch.nan)

    def _agreeing(self, x: Inputs, predictions: Labels, rows: Rows, numbers: Tensor) -> Mask:
        """Whether all pairs of a mask with the others agree on the prediction of this mask alone, for masks with given
        `numbers` of the images in given `rows`.
        """
        classes, masks = predictions[rows, numbers], predictions.shape[1]
        agreeing = torch.ones_like(rows, dtype=torch.bool)
        # masks with other predictions first, since pairs with them agree least
        key = (predictions[rows] == classes[:, None]).long()
        key[torch.arange(len(rows), device=x.device), numbers] = 2
        order = key.argsort(dim=1, stable=True)[:, : masks - 1]
        for start in range(0, masks - 1, _AT_A_TIME):
            left = agreeing.nonzero()[:, 0]
            if not len(left):
                break
            others = order[left, start : start + _AT_A_TIME]
            logits = self._logits(
                x, rows[left, None].expand_as(others), numbers[left, None].expand_as(others), others
            )
            labels = votes_of(logits.flatten(0, 1)).view(others.shape)
            agreeing[left] = (labels == classes[left, None]).all(1)
        return agreeing


def _mean_log_probabilities(logits: Logits) -> Logits:
    """The logarithm of the mean probabilities of logits (n, k, classes)."""
    summed: Logits = logits.log_softmax(2).logsumexp(1)
    return summed - torch.log(summed.new_tensor(float(logits.shape[1])))


MASKS = 6
"""Default number of masks along each axis, as in the paper."""


@dataclass(frozen=True)
class PatchMasks:
    """Double masking (PatchCleanser), which certifies the vote over masks against patches."""

    masks: Steps = MASKS
    """number of masks along each axis of an image; more of them hide less, and need more forward passes"""

    name: ClassVar[str] = PATCH_MASKS

    def ready(self, model: Classifier, sample: Batch, threat: ThreatModel) -> "ReadyPatchMasks":
        """Return the method for a frozen model in evaluation mode, which is the vote over masks of a classifier, or the
        classifier itself.

        Raises `UsageError` for another threat than patches, for a target class, if the patch does not fit into the
        images, and if a mask hides all of an image.
        """
        vote = model
        if not isinstance(model.net, MaskedVote):
            vote = on_top_of(model, self.net(model, sample.x, threat))
        assert isinstance(vote.net, MaskedVote)
        return ReadyPatchMasks(vote, vote.net)

    def net(self, base: Classifier, x: Inputs, threat: ThreatModel) -> MaskedVote:
        """Return the vote over masks of a classifier, for images in the shape of `x`. Raises the errors of `ready`."""
        patch = threat.constraint
        if not isinstance(patch, Patch):
            raise UsageError(
                f"the threat is {patch}, and {self.name} certifies patches in images",
                Remedy("threat", "patch:4x4"),
            )
        if threat.goal is not None:
            raise UsageError(
                f"the goal is class {threat.goal}, and a certificate excludes all wrong classes; leave goal= out"
            )
        masks = mask_set(patch.in_bounds(base.bounds), x.shape[1:], self.masks)
        return MaskedVote(base, masks).to(x.device)


@dataclass(frozen=True)
class ReadyPatchMasks:
    """Double masking of a model."""

    model: Classifier
    vote: MaskedVote

    def __call__(self, batch: Batch) -> Proofs:
        """Return what the masks show about the vote at the images of a batch.

        `certified`: all pairs of masks agree on the label, so that it is the vote for every patch of the threat.
        `broken`: the vote is wrong at `x_adv`, which an attack with gradients found at one of 20 places that are inside
        a mask of a pair that disagrees. `work` is the number of masked images that were classified for the certificate.
        """
        none = Proofs.none(batch)
        if not len(batch):
            return none
        disagree, work = self.vote.disagreeing(batch.x, batch.y)
        x_adv, broken = self._attacked(batch, disagree)
        return replace(none, certified=~disagree.any(1), work=work, x_adv=x_adv, broken=broken)

    def _attacked(self, batch: Batch, disagree: Mask) -> tuple[Inputs, Mask]:
        """Images with a patch, and for which of them the vote is wrong."""
        x_adv, broken, shape = batch.x.clone(), torch.zeros_like(disagree[:, 0]), batch.x.shape[1:]
        undecided = disagree.any(1).nonzero()[:, 0]
        if self.vote.base.access != "gradients" or not len(undecided):
            return x_adv, broken
        net, patch, rng = self.vote, self.vote.mask_set.patch, Draws(0).at(PATCH_MASKS)
        soft = Classifier(net.soft, bounds=net.base.bounds, batches=EVERY)
        mask_of_place = net.mask_set.mask_of_place.to(x_adv.device)
        weights = x_adv.new_full((len(batch), *mask_of_place.shape), -1.0)
        slope, _ = gradient(soft, batch.take(undecided), margin_loss)
        is_open = disagree[undecided][:, mask_of_place]
        weights[undecided] = torch.where(is_open, patch.sums(slope.abs().sum(1), shape), -1.0)
        for start in range(_PLACES):
            rows = (~broken & (weights.flatten(1).amax(1) >= 0)).nonzero()[:, 0]
            if not len(rows):
                break
            inside, part = patch.mask(batch.x[rows], heaviest(patch, weights, rows, shape)), batch.take(rows)
            x = _filled(soft, part, patch, inside, rng.at("place", start))
            with torch.no_grad():
                wrong = ~(margin(self.model(x), part) > 0)
            x_adv[rows[wrong]], broken[rows[wrong]] = x[wrong], True
        return x_adv, broken


def _filled(model: Classifier, batch: Batch, patch: Patch, inside: Mask, rng: Draws) -> Inputs:
    """Return the images with a patch at the pixels `inside`, found by gradient ascent from noise, in the nearest
    printable colours.
    """
    x = noisy(batch, inside, model.bounds, rng)
    for step in range(_STEPS):
        slope, _ = gradient(model, batch.at(patch.printed(x, inside)), margin_loss)
        x = ascended(x, slope, _REACH / _STEPS * cosine(step, _STEPS), batch, inside, model.bounds)
    return patch.printed(x, inside)
