"""Double masking against exhaustive patches and against an evaluation of all pairs of masks one by one."""

from itertools import product

import pytest
import torch
from torch import nn

from holdfast.certifiers.patch_masks import MaskSet, PatchMasks
from holdfast.certifiers.protocol import Proofs
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf, allowed
from holdfast.core.errors import UsageError
from holdfast.core.meter import margin
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.threats.parsing import parse_threat
from holdfast.threats.transformations import Patch

BOUNDS = Bounds(-0.5, 1.0)


def linear(shape=(1, 6, 6), classes=3, seed=0):
    """A linear model, whose label often leads by little."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), classes, bias=False))
    return Classifier(net, bounds=BOUNDS).eval().requires_grad_(requires_grad=False)


def images(model, n=30, shape=(1, 6, 6), seed=1):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) * 1.5 - 0.5
    return Batch(x, model(x).argmax(1), torch.arange(n))


def masked(x, *rectangles):
    """An image with rectangles of the middle value, (first row, row behind, first column, column behind)."""
    x = x.clone()
    for top, bottom, left, right in rectangles:
        x[:, top:bottom, left:right] = 0.25
    return x


def rectangles_of(patch, shape, parts):
    """The masks for all places in an image, written out."""

    def edges(free):
        k = min(parts, free)
        return [(free * i // k, free * (i + 1) // k) for i in range(k)]

    rows, columns = edges(shape[1] - patch.height + 1), edges(shape[2] - patch.width + 1)
    return [(a, b - 1 + patch.height, c, d - 1 + patch.width) for (a, b), (c, d) in product(rows, columns)]


def defended(model, x, rectangles):
    """The prediction of PatchCleanser for one image, as in algorithm 1 of the paper."""

    def label(*chosen):
        return int(model(masked(x, *chosen)[None]).argmax(1))

    first = [label(each) for each in rectangles]
    majority = max(set(first), key=first.count)
    for each, minority in zip(rectangles, first, strict=True):
        if minority != majority and all(label(each, other) == minority for other in rectangles):
            return minority
    return majority if first.count(majority) > len(first) / 2 else None  # equal votes are decided otherwise


PLACES = [
    "patch:2x2,within=0:1-5:6",
    "patch:3x1,at=centre,jitter=1",
    "patch:1x2,within=1:1-4:5",
    "patch:2x2,at=0:3",
]


@pytest.mark.parametrize("threat", PLACES)
@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_every_place_of_the_patch_is_hidden_by_its_mask_and_by_no_other(threat, parts):
    patch, shape = parse_threat(threat).opened().constraint, torch.Size((2, 6, 7))
    masks = MaskSet(patch, shape, parts)
    rows, columns = patch.places(shape)
    for (i, row), (j, column) in product(enumerate(rows), enumerate(columns)):
        inside = patch.mask(torch.zeros(1, *shape), (torch.tensor([row]), torch.tensor([column])))
        hides = (masks.masks | ~inside).flatten(1).all(1)
        assert hides.nonzero()[:, 0].tolist() == [int(masks.mask_of_place[i, j])]
    sides = masks.masks.any(3).sum(2).max(), masks.masks.any(2).sum(2).max()
    assert masks.size == sides


@pytest.mark.parametrize("size", [(2, 1), (2, 2)])
@pytest.mark.parametrize("parts", [2, 3])
def test_no_patch_of_any_content_at_any_place_changes_the_vote_at_certified_images(size, parts):
    model, patch = linear(), Patch(*size)
    batch, threat = images(model), ThreatModel(patch)
    ready = PatchMasks(parts).ready(model, batch, threat)
    proofs = ready(batch)
    rectangles = rectangles_of(patch, (1, 6, 6), parts)
    broken = torch.zeros(len(batch), dtype=torch.bool)
    # the extreme contents contain the worst ones of a linear model
    contents = torch.tensor(list(product((-0.5, 1.0), repeat=size[0] * size[1]))).view(-1, *size)
    for row, x in enumerate(batch.x):
        copies = []
        for top, left in product(range(7 - size[0]), range(7 - size[1])):
            attacked = x.repeat(len(contents), 1, 1, 1)
            attacked[:, 0, top : top + size[0], left : left + size[1]] = contents
            copies.append(attacked)
        attacked = torch.cat(copies)
        votes = ready.model(attacked).argmax(1)
        broken[row] = (votes != batch.y[row]).any()
        for index in range(0, len(attacked), 61):
            reference = defended(model, attacked[index], rectangles)
            assert reference is None or reference == int(votes[index])
    assert proofs.certified.any() and broken.any()
    assert not (proofs.certified & broken).any()
    assert not (proofs.broken & ~broken).any()


@pytest.mark.parametrize(("shape", "size"), [((1, 6, 6), (2, 2)), ((3, 5, 8), (1, 3))])
def test_the_certificate_is_that_of_all_pairs_of_masks_evaluated_one_by_one(shape, size):
    model = linear(shape)
    batch, patch = images(model, shape=shape), Patch(*size)
    proofs = PatchMasks(3).ready(model, batch, ThreatModel(patch))(batch)
    rectangles = rectangles_of(patch, shape, 3)
    for x, y, certified, work in zip(batch.x, batch.y, proofs.certified, proofs.work, strict=True):
        labels = [
            int(model(masked(x, first, second)[None]).argmax(1))
            for first, second in product(rectangles, repeat=2)
        ]
        assert certified == (set(labels) == {int(y)})
        n = len(rectangles)
        assert n <= work <= n * (n + 1) // 2
        assert not certified or work == n * (n + 1) // 2
    assert proofs.certified.any() and not proofs.certified.all()


def test_counterexamples_are_inside_the_threat_and_change_the_vote():
    model = linear()
    batch, threat = images(model), parse_threat("patch:2x2,within=0:0-4:4").opened()
    ready = PatchMasks(2).ready(model, batch, threat)
    proofs = ready(batch)
    assert proofs.broken.any() and not (proofs.broken & proofs.certified).any()
    assert allowed(threat.constraint, proofs.x_adv, batch.x, BOUNDS).all()
    votes = ready.model(proofs.x_adv).argmax(1)
    assert (votes != batch.y)[proofs.broken].all()
    assert torch.equal(proofs.x_adv[~proofs.broken], batch.x[~proofs.broken])


def test_verdicts_do_not_depend_on_the_batch():
    model = linear()
    batch = images(model)
    ready = PatchMasks(3).ready(model, batch, ThreatModel(Patch(2, 2)))
    whole, parts = ready(batch), Proofs.joined([ready(part) for part in batch.split(7)])
    assert torch.equal(whole.certified, parts.certified)
    assert not ready(batch.take(torch.arange(0))).certified.any()


def test_a_label_that_leads_by_rounding_errors_only_is_not_certified():
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2, bias=False)).requires_grad_(requires_grad=False)
    net[1].weight[0], net[1].weight[1] = 1.0, 1.0
    net[1].weight[1, 0] += 1e-6
    model = Classifier(net, bounds=BOUNDS)
    batch = Batch(torch.full((1, 1, 6, 6), 0.5), torch.tensor([1]), torch.arange(1))
    threat = parse_threat("patch:1x1,within=3:3-5:5").opened()
    assert not PatchMasks(2).ready(model, batch, threat)(batch).certified
    net[1].weight[1, 0] += 1.0
    assert PatchMasks(2).ready(model, batch, threat)(batch).certified


def test_a_patch_for_which_the_model_has_no_prediction_does_not_change_the_vote():
    def scores(x):
        none = (x.flatten(1) > 0.9).any(1, keepdim=True)
        return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1).masked_fill(none, torch.nan)

    model = Classifier(scores, access="scores")
    batch = Batch(torch.full((1, 1, 6, 6), 0.3), torch.tensor([0]), torch.arange(1))
    ready = PatchMasks(3).ready(model, batch, ThreatModel(Patch(2, 2)))
    attacked = batch.x.clone()
    attacked[:, :, 2:4, 2:4] = 1.0
    assert ready(batch).certified and margin(ready.model(attacked), batch) > 0
    assert ready.model(torch.ones_like(batch.x)).isnan().all()


def test_equal_votes_do_not_outvote_the_label_at_certified_images():
    """A model that predicts class 1, as surely as class 0 elsewhere, if a bright patch is in the left half."""

    def scores(x):
        left = (x[:, :, :, :3].flatten(1) > 0.9).any(1).float()
        return torch.stack([1 - left, left], 1)

    model = Classifier(scores, access="scores")
    batch = Batch(torch.full((1, 1, 6, 6), 0.3), torch.tensor([0]), torch.arange(1))
    ready = PatchMasks(2).ready(model, batch, parse_threat("patch:1x1,within=0:0-0:5").opened())
    attacked = batch.x.clone()
    attacked[:, :, 0, 0] = 1.0
    assert ready(batch).certified and margin(ready.model(attacked), batch) > 0


def test_broken_images_have_patches_in_printable_colours_in_the_units_of_the_model():
    model = linear()
    batch, threat = images(model), parse_threat("patch:2x2,printable=default,shape=circle").opened()
    proofs = PatchMasks(2).ready(model, batch, threat)(batch)
    patch = threat.constraint.in_bounds(model.bounds)
    assert proofs.broken.any()
    assert (patch.distance(proofs.x_adv, batch.x)[proofs.broken] == 1).all()


@pytest.mark.parametrize("access", ["scores", "labels"])
def test_a_model_without_gradients_is_certified_and_not_attacked(access):
    model = linear()
    batch, threat = images(model), ThreatModel(Patch(2, 2))
    usual = PatchMasks(2).ready(model, batch, threat)(batch)
    model.access = access
    proofs = PatchMasks(2).ready(model, batch, threat)(batch)
    assert torch.equal(proofs.certified, usual.certified)
    assert usual.broken.any() and not proofs.broken.any()


@pytest.mark.parametrize(
    ("parts", "threat", "message"),
    [
        (2, ThreatModel(Linf(0.1)), "certifies patches in images"),
        (2, ThreatModel(Patch(2, 2), goal=1), "excludes all wrong classes"),
        (2, ThreatModel(Patch(7, 2)), "does not fit into images of 6x6"),
        (2, ThreatModel(Patch(6, 6)), "is as large as the image"),
        (1, ThreatModel(Patch(2, 2)), "masks is 1 .* hides the whole image"),
    ],
)
def test_what_it_does_not_cover_is_refused(parts, threat, message):
    model = linear()
    with pytest.raises(UsageError, match=message):
        PatchMasks(parts).ready(model, images(model), threat)


def test_inputs_that_are_no_images_are_refused():
    model = Classifier(nn.Linear(4, 2))
    batch = Batch(torch.rand(2, 4), torch.zeros(2, dtype=torch.long), torch.arange(2))
    with pytest.raises(UsageError, match="needs images"):
        PatchMasks().ready(model, batch, ThreatModel(Patch(2, 2)))
