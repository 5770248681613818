"""Small networks for segmentation and detection, which a weights file may refer to by name."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CANDIDATES = 100
"""Largest number of boxes of an image, as in torchvision and COCO."""
_SCORE = 0.05
"""Lowest score of a box that is returned, as in torchvision."""
_SAME = 0.5
"""Smallest IoU of two boxes of one label of which only that with the higher score is returned, as in torchvision."""
_STRIDE = 4
"""Distance in pixels between the cells of the detector."""
_PRIOR = -4.6
"""First bias of the logits of scores: a share of 0.01 of the cells has an object."""


def _convolution(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())


class _Pyramid(nn.Module):
    """Encoder and decoder with skip connections, from images to features with a half and a quarter of their height."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half, quarter, eighth = width, 2 * width, 3 * width
        self.first = nn.Sequential(
            nn.PixelUnshuffle(2), _convolution(4 * channels, half), _convolution(half, half)
        )
        self.second = nn.Sequential(
            nn.MaxPool2d(2), _convolution(half, quarter), _convolution(quarter, quarter)
        )
        self.third = nn.Sequential(
            nn.MaxPool2d(2), _convolution(quarter, eighth), _convolution(eighth, eighth)
        )
        self.to_quarter = _convolution(eighth + quarter, quarter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of half the height (n, width, h / 2, w / 2), and those of a quarter (n, 2 width, h / 4,
        w / 4), for images (n, channels, h, w).
        """
        half = self.first(x)
        quarter = self.second(half)
        wide = F.interpolate(self.third(quarter), scale_factor=2.0)
        return half, self.to_quarter(torch.cat((wide, quarter), 1))


class UNet(nn.Module):
    """Small U-Net for segmentation.

    The height and width of the images must be multiples of 8.
    Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015,
    arXiv:1505.04597. Differs from the paper: three levels from half the height of the image, batch norm and padding.
    """

    def __init__(self, channels: int = 3, classes: int = 6, width: int = 20) -> None:
        super().__init__()
        self.pyramid = _Pyramid(channels, width)
        self.to_half = _convolution(3 * width, 2 * width)
        self.head = nn.Sequential(nn.Conv2d(2 * width, 4 * classes, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the pixels (n, classes, h, w) for images (n, channels, h, w)."""
        half, quarter = self.pyramid(x)
        logits: Tensor = self.head(
            self.to_half(torch.cat((F.interpolate(quarter, scale_factor=2.0), half), 1))
        )
        return logits


class Detector(nn.Module):
    """Small detector without anchors, which is called like those of torchvision.

    The height and width of the images must be multiples of 8. Labels are from 1 to `classes`.
    Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv:1904.01355. Differs from the
    paper: one level, no centre-ness, the objects of a cell are those whose centre is at most one cell away, and the
    losses are the focal loss of the scores and one minus the generalized IoU of the boxes.
    """

    def __init__(self, channels: int = 3, classes: int = 5, width: int = 20) -> None:
        super().__init__()
        self.pyramid = _Pyramid(channels, width)
        self.tower = _convolution(2 * width, 2 * width)
        self.scores = nn.Conv2d(2 * width, classes, 3, 1, 1)
        self.edges = nn.Conv2d(2 * width, 4, 3, 1, 1)
        nn.init.constant_(self.scores.bias, _PRIOR)  # type: ignore[arg-type]
        nn.init.constant_(self.edges.bias, 2.0)  # type: ignore[arg-type]

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> list[dict[str, Tensor]] | dict[str, Tensor]:
        """Return for each image (channels, h, w) a dictionary of `boxes` (k, 4) with x1, y1, x2, y2 in pixels, `scores`
        (k) and `labels` (k), by descending scores. In training mode, return the losses `classification` and
        `bbox_regression` for `targets`, which have the `boxes` and `labels` of each image.

        Boxes and scores are differentiable. Raises `ValueError` in training mode without targets.
        """
        x = images if isinstance(images, Tensor) else torch.stack(list(images))
        features = self.tower(self.pyramid(x)[1])
        logits = self.scores(features).flatten(2).transpose(1, 2)
        edges = F.softplus(self.edges(features)).flatten(2).transpose(1, 2) * _STRIDE
        centres = _centres(features)
        boxes = torch.cat((centres - edges[..., :2], centres + edges[..., 2:]), 2)
        if not self.training:
            return detections(boxes, logits.sigmoid(), x.shape[2:])
        if targets is None:
            raise ValueError("in training mode, the detector needs targets")
        return _losses(boxes, logits, centres, targets)


def _centres(features: Tensor) -> Tensor:
    """Return the centres x, y of the cells (cells, 2) in pixels."""
    rows, columns = (
        (torch.arange(length, device=features.device, dtype=features.dtype) + 0.5) * _STRIDE
        for length in features.shape[2:]
    )
    return torch.cartesian_prod(rows, columns).flip(1)


def overlap(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas of the intersections and of the unions of boxes (…, 4), which are broadcast."""
    corners = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    common = (corners[1] - corners[0]).clamp(min=0).prod(-1)
    areas = [(each[..., 2:] - each[..., :2]).prod(-1) for each in (boxes, others)]
    return common, areas[0] + areas[1] - common


def detections(boxes: Tensor, scores: Tensor, size: Sequence[int]) -> list[dict[str, Tensor]]:
    """Return the detections of each image after non-maximum suppression, from boxes (n, cells, 4) and scores (n, cells,
    classes).
    """
    n, _, classes = scores.shape
    top, places = scores.flatten(1).topk(min(_CANDIDATES, scores[0].numel()), dim=1)
    boxes = boxes.gather(1, (places // classes)[..., None].expand(-1, -1, 4))
    height, width = size
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))
    labels = places % classes + 1
    with torch.no_grad():
        common, union = overlap(boxes[:, :, None], boxes[:, None])
        better = torch.ones_like(common, dtype=torch.bool).triu(1)  # rows are by descending scores
        suppresses = (common > _SAME * union) & (labels[:, :, None] == labels[:, None]) & better
        kept, previous = top >= _SCORE, None
        candidates = kept
        # Greedy suppression is the fixed point; each pass settles at least one more box.
        while previous is None or not torch.equal(kept, previous):
            previous = kept
            kept = candidates & ~(suppresses & kept[:, :, None]).any(1)
    return [
        {"boxes": boxes[i][kept[i]], "scores": top[i][kept[i]], "labels": labels[i][kept[i]]}
        for i in range(n)
    ]


def _losses(
    boxes: Tensor, logits: Tensor, centres: Tensor, targets: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    present = torch.zeros_like(logits)
    lost, found = logits.new_zeros(()), 0
    for i, target in enumerate(targets):
        true, labels = target["boxes"].to(boxes), target["labels"].long() - 1
        if not len(true):
            continue
        middles = (true[:, :2] + true[:, 2:]) / 2
        away = (centres[:, None] - middles).abs().amax(2)  # (cells, objects)
        cells = (away <= _STRIDE) & (away <= away.amin(1, keepdim=True))  # the nearest object of each cell
        cell, number = cells.nonzero(as_tuple=True)
        present[i, cell, labels[number]] = 1.0
        common, union = overlap(boxes[i, cell], true[number])
        hull = torch.maximum(boxes[i, cell, 2:], true[number, 2:]) - torch.minimum(
            boxes[i, cell, :2], true[number, :2]
        )
        area = hull.prod(1)
        lost = lost + (1 - common / union + (area - union) / area).sum()
        found += len(cell)
    entropy = F.binary_cross_entropy_with_logits(logits, present, reduction="none")
    wrong = (logits.sigmoid() - present).abs()
    focal = (0.25 + 0.5 * (1 - present)) * wrong**2 * entropy
    return {
        "classification": 4 * focal.sum() / max(found, 1),
        "bbox_regression": lost / max(found, 1),
    }
