"""Certificates of models of numbers, pixels and several labels against closed forms, samples and attacks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import holdfast
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.pixels import sources
from holdfast.certifiers.protocol import HIGH, LOW, PIXELS
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, prepared_graph
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2, Linf
from holdfast.core.errors import UnsoundProof, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.threat import ThreatModel
from holdfast.runs.assess.certify import refuse_unsound
from holdfast.tasks.multilabel import Multilabel
from holdfast.tasks.regression import Regression
from holdfast.tasks.segmentation import Segmentation

ALL = (IBP(), CrownIBP(), Crown(), AlphaCrown(), BranchAndBound())
SAMPLES = 2_000


def of_task(net, task):
    model = Classifier(net.eval().requires_grad_(False), bounds=Bounds(0, 1))
    model.task = task
    return model


def batch_of(x, truth):
    return Batch(x, torch.zeros(len(x), dtype=torch.long), torch.arange(len(x)), truth=truth)


def proofs(prover, model, batch, constraint):
    return prover.ready(model, batch, ThreatModel(constraint))(batch)


def corners(x, eps, n=SAMPLES):
    """Inputs at corners of a ball, and between them."""
    signs = torch.randint(0, 2, (n, *x.shape)) * 2.0 - 1
    return (x + eps * signs * torch.rand(n, *(1,) * x.dim()).clamp_min(0.5)).clamp(0, 1)


def ascended(model, batch, eps, direction):
    """The outputs at the end of projected gradient steps in a direction of the outputs."""
    x = batch.x.clone()
    for _ in range(20):
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad((model(z) * direction).sum(), z)
        x = (z + eps / 4 * slope.sign()).clamp(batch.x - eps, batch.x + eps).clamp(0, 1)
    return model(x).detach()


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_intervals_of_a_linear_regression_are_those_of_the_closed_form(dtype, relative):
    torch.manual_seed(0)
    net = nn.Linear(6, 2, dtype=dtype)
    x = 0.2 + 0.6 * torch.rand(20, 6, dtype=dtype)
    truth = (net(x) + 0.05 * torch.randn(20, 2, dtype=dtype)).detach()
    model, batch = of_task(net, Regression(0.5, relative)), batch_of(x, truth)
    size = 0.5 * truth.abs() if relative else torch.full_like(truth, 0.5)
    for constraint, norm in ((Linf(0.07), 1), (L2(0.07), 2)):
        reach = 0.07 * net.weight.double().norm(norm, dim=1)
        exact = net(x).double().detach()
        for prover in ALL:
            found = proofs(prover, model, batch, constraint)
            low, high = found.of_task[LOW], found.of_task[HIGH]
            # interval arithmetic knows the box around a Euclidean ball only
            if norm == 1 or prover is not ALL[0]:
                torch.testing.assert_close(low, exact - reach, rtol=0, atol=2e-5)
                torch.testing.assert_close(high, exact + reach, rtol=0, atol=2e-5)
                worst = 1 - (((exact - truth).abs() + reach) / size).amax(1)
                torch.testing.assert_close(found.bound, worst, rtol=0, atol=2e-3 if relative else 1e-4)
            assert (low <= exact - reach).all()
            assert (high >= exact + reach).all()
            assert (found.certified == (found.bound > 0)).all()


def test_no_output_of_a_relu_regression_is_outside_of_its_interval():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.rand(3, 5)
    model, batch = of_task(net, Regression(0.02)), batch_of(x, net(x).detach())
    directions = torch.cat((torch.eye(2), -torch.eye(2)))
    steps = torch.stack([ascended(model, batch, 0.2, each) for each in directions])
    reached = torch.cat((net(corners(x, 0.2).flatten(0, 1)).view(SAMPLES, 3, 2), steps)).double()
    widths = []
    for prover in ALL:
        found = proofs(prover, model, batch, Linf(0.2))
        assert (found.of_task[LOW] <= reached.amin(0)).all()
        assert (found.of_task[HIGH] >= reached.amax(0)).all()
        lost = (reached - batch.truth.double()).abs().amax(2).amax(0) > 0.02
        assert not (found.certified & lost).any()
        widths.append(float((found.of_task[HIGH] - found.of_task[LOW]).mean()))
        if found.broken.any():
            wrong = (net(found.x_adv) - batch.truth).abs().amax(1) >= 0.02
            assert wrong[found.broken].all()
    assert widths[0] > widths[1] > widths[2]
    assert found.broken.any()  # branch and bound finds counterexamples


def test_labels_are_proved_one_by_one():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.rand(20, 5)
    truth = (net(x) > 0).long()
    model, batch = of_task(net, Multilabel()), batch_of(x, truth)
    logits = net(corners(x, 0.05).flatten(0, 1)).view(SAMPLES, 20, 3).detach()
    for prover in ALL:
        found = proofs(prover, model, batch, Linf(0.05))
        assert (logits.double() >= found.of_task[LOW]).all()
        assert (logits.double() <= found.of_task[HIGH]).all()
        assert (found.certified == (found.bound > 0)).all()
        assert 0 < found.certified.float().mean() < 1


class Shuffled(nn.Module):
    """A network whose scores are resized by a pixel shuffle, with a skip connection through nearest neighbours."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.last = nn.Conv2d(12, 12, 3, 2, 1)

    def forward(self, x):
        wide = F.relu(self.first(x))
        low = F.interpolate(F.relu(self.second(wide)), scale_factor=2.0)
        return F.pixel_shuffle(self.last(torch.cat((wide, low), 1)), 2)


SEGMENTERS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, 1, 1)),
    "resized": lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 3, 3, 1, 1)),
    "one logit": lambda: nn.Sequential(nn.Conv2d(1, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 1, 3, 1, 1)),
    "residual": lambda: nn.Sequential(nn.Conv2d(1, 3, 1), holdfast_residual()),
    "shuffled": Shuffled,
}


def holdfast_residual():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 3, 1, 1)

        def forward(self, x):
            return x + F.relu(self.inner(x))

    return Residual()


@pytest.mark.parametrize("name", SEGMENTERS)
def test_no_attacked_pixel_contradicts_a_proof(name):
    torch.manual_seed(3)
    x = torch.rand(3, 1, 12, 12)
    model = of_task(SEGMENTERS[name](), Segmentation())
    scores = model(x)
    truth = scores.argmax(1)
    truth[:, 0], truth[0, 3] = -1, (truth[0, 3] + 1) % scores.shape[1]
    batch, eps = batch_of(x, truth), 0.02
    right = (model(corners(x, eps, 500).flatten(0, 1)).argmax(1).view(500, 3, 12, 12) == truth).all(0)
    one_hot = F.one_hot(truth.clamp_min(0), scores.shape[1]).movedim(-1, 1)
    right &= ascended(model, batch, eps, -one_hot).argmax(1) == truth
    right &= ascended(model, batch, eps, 1 - one_hot).argmax(1) == truth
    totals = []
    for prover in (IBP(), CrownIBP(), Crown()):
        found = proofs(prover, model, batch, Linf(eps))
        for image in range(3):
            for label in range(scores.shape[1]):
                held = int((right[image] & (truth[image] == label)).sum())
                assert int(found.of_task[PIXELS][image, label]) <= held
        assert (found.bound <= model.task.lead(scores, truth)).all()
        totals.append(int(found.of_task[PIXELS].sum()))
    assert 0 < totals[0] <= totals[1] <= totals[2]


def test_single_pixels_that_are_proved_keep_their_class():
    """Each pixel alone counts, so that a proof about another pixel cannot make up for a wrong one."""
    torch.manual_seed(4)
    x = torch.rand(1, 1, 8, 8)
    model = of_task(Shuffled(), Segmentation())
    y, eps = model(x).argmax(1), 0.03
    seen = model(corners(x, eps, 500).flatten(0, 1)).argmax(1)
    ready = CrownIBP().ready(model, batch_of(x, y), ThreatModel(Linf(eps)))
    for place in range(0, 64, 3):
        truth = torch.full_like(y, -1)
        truth.view(-1)[place] = y.view(-1)[place]
        found = ready(batch_of(x, truth))
        proved = bool(found.of_task[PIXELS].sum())
        assert not proved or bool((seen.view(500, -1)[:, place] == y.view(-1)[place]).all())
        assert bool(found.certified) == proved


def test_scores_before_a_pixel_shuffle_are_found():
    graph = prepared_graph(of_task(Shuffled(), Segmentation()), batch_of(torch.rand(3, 1, 8, 8), None))
    index, source = sources(graph)
    assert index < graph.output
    values = graph.values(torch.rand(1, 1, 8, 8))
    torch.testing.assert_close(values[index][0].flatten()[source], values[-1][0])


def test_the_lowest_mean_iou_is_that_of_the_worst_assignment():
    task, draws = Segmentation(), np.random.default_rng(0)
    for _ in range(20):
        truth = torch.tensor(draws.integers(0, 3, 5))
        proved = torch.tensor(draws.random(5) < 0.5)
        numbers = [torch.bincount(each, minlength=3)[None] for each in (truth[proved], truth)]
        least = 1.0
        for code in range(3 ** int((~proved).sum())):
            predicted = truth.clone()
            predicted[~proved] = torch.tensor([code // 3**k % 3 for k in range(int((~proved).sum()))])
            scores = F.one_hot(predicted, 3).double().t()[None, :, None]
            least = min(least, float(task.lead(scores, truth[None, None])))
        assert float(task.lowest_lead(*numbers)) == pytest.approx(least, abs=1e-5)


def houses(n=40):
    draws = np.random.default_rng(0)
    x = (0.2 + 0.6 * draws.random((n, 4))).astype(np.float32)
    return x, (x @ np.array([1.0, -2.0, 3.0, 0.5]) + 10 + draws.normal(0, 0.02, n)).astype(np.float32)


def linear():
    net = nn.Linear(4, 1).requires_grad_(False)
    net.weight.copy_(torch.tensor([[1.0, -2.0, 3.0, 0.5]]))
    net.bias.fill_(10.0)
    return net


def test_certified_and_attacked_errors_of_a_linear_model_agree():
    run = holdfast.certify(linear(), houses(), threat="linf:0.05", tolerance="0.34")
    metrics = run.metrics
    assert metrics["certified_accuracy"].value == metrics["robust_accuracy"].value
    assert 0 < metrics["certified_accuracy"].value < 1
    certified, attacked = (metrics[f"{of}mean_absolute_error"].value for of in ("certified_", ""))
    assert attacked <= certified == pytest.approx(attacked, abs=1e-4)
    assert run.evidence.proofs[1].tried == 0  # nothing is left for branch and bound
    shifted = {**run.evidence.columns, LOW: run.evidence[LOW] + 0.01}
    with pytest.raises(UnsoundProof, match=r"outputs of \d+ of 40 examples"):
        refuse_unsound(replace(run.evidence, columns=shifted))


def test_a_certified_segmentation_has_the_share_of_proved_pixels():
    torch.manual_seed(5)
    net, x = SEGMENTERS["plain"]().requires_grad_(False), torch.rand(4, 1, 12, 12)
    y = net(x).argmax(1).numpy().astype(np.uint8)
    run = holdfast.certify(net, (x.numpy(), y), threat="linf:0.02", gates=["certified_pixel_accuracy >= 0.1"])
    proved = run.metrics["certified_pixel_accuracy"].value
    assert proved == run.evidence[PIXELS].sum() / y.size
    assert 0 < proved <= run.metrics["pixel_accuracy"].value
    wrong = {**run.evidence.columns, PIXELS: run.evidence["task.pixels"][..., 2] + 1}
    with pytest.raises(UnsoundProof, match="outputs of 4 of 4"):
        refuse_unsound(replace(run.evidence, columns=wrong))


def test_the_share_of_certified_labels_is_that_of_the_closed_form():
    x = np.array([[0.9, 0.1, 0.8], [0.4, 0.9, 0.45], [0.2, 0.8, 0.1]] * 4, np.float32)
    net = nn.Linear(3, 3).requires_grad_(False)
    net.weight.copy_(10 * torch.eye(3))
    net.bias.fill_(-5.0)
    run = holdfast.certify(net, (x, (x > 0.5).astype(np.int64)), threat="linf:0.12", task="multilabel")
    # both values near 0.5, of one example in three, can change
    assert run.metrics["certified_label_accuracy"].value == pytest.approx(1 - 2 / 9)
    assert run.metrics["certified_accuracy"].value == pytest.approx(2 / 3)


def test_methods_without_a_meaning_for_a_task_are_refused():
    x = np.full((4, 1, 8, 8), 0.3, np.float32)
    boxes = np.array([[[2.0, 2.0, 6.0, 6.0, 0, 0]]] * 4, np.float32)
    masks = np.zeros((4, 8, 8), np.uint8)

    def detector(images):
        return [
            {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0)} for _ in images
        ]

    plain = SEGMENTERS["plain"]()
    cases = [
        (detector, (x, boxes), {"task": "detection"}, "nothing is proved: no bounds pass through"),
        (linear(), houses(), {"tolerance": "1", "method": "smoothing", "sigma": 0.1, "threat": "l2:0.1"}, "smoothing"),
        (linear(), houses(), {"tolerance": "1", "method": "lipschitz", "threat": "l2:0.1"}, "lipschitz"),
        (linear(), houses(), {"tolerance": "1", "method": "trees"}, "the method trees proves nothing"),
        (plain, (x, masks), {"method": "branch-and-bound"}, "branch-and-bound proves nothing"),
        (plain, (x, masks), {"threat": "linf:0.1,goal=map:1"}, "leave goal=map:1 out"),
        (plain, (x, masks), {"threat": "patch:2x2"}, "patch-masks proves nothing"),
        (linear(), houses(), {"tolerance": "1", "geometry": 2}, "the boundary between classes"),
    ]  # fmt: skip
    for net, data, settings, message in cases:
        with pytest.raises(UsageError, match=message):
            holdfast.certify(net, data, **{"threat": "linf:0.1", **settings})
