"""Detectors of the literature, built in seconds: what they are worth under who does not know them, and who does."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.attacks import PGD
from holdfast.attacks.parts.losses import cross_entropy
from holdfast.core.batch import Batch
from holdfast.core.constraints import Linf
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.outputs import with_detector
from holdfast.core.threat import ThreatModel
from holdfast.doubts.gallery import undefended
from holdfast.doubts.gallery.item import digit_network, trained_on_digits
from holdfast.runs.assess.result import Result
from holdfast.statistics.intervals import threshold
from holdfast.verbs.functions import assess

WHAT = "detectors joined to a network: AUROC, true positives and robust accuracy with rejection, by who knows or not"
N, EPS, FITTED, CALIBRATED, FALSE_POSITIVES, SEED = 500, 0.3, 2000, 1000, 0.05, 0
BANDWIDTH = 4.0
"""Of the kernels, in units of the features."""


class Squeezing(nn.Module):
    """The largest change of the probabilities when an input is rounded to one bit, or smoothed by a median.

    Xu, Evans & Qi, "Feature squeezing: detecting adversarial examples in deep neural networks", NDSS 2018,
    arXiv:1704.01155, with the squeezers that it finds best for MNIST.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The L1 distance, (n)."""
        patches = F.unfold(F.pad(x, (1, 0, 1, 0), mode="reflect"), 2).view(len(x), 4, *x.shape[2:])
        smoothed = patches.sort(dim=1).values[:, 2:3]
        plain, *squeezed = (self.net(each).softmax(1) for each in (x, x.round(), smoothed))
        return torch.stack([(plain - each).abs().sum(1) for each in squeezed]).amax(0)


class Density(nn.Module):
    """How far the last hidden features lie from those of training digits of the predicted class.

    Feinman et al., "Detecting adversarial samples from artifacts", 2017, arXiv:1703.00410: minus the logarithm of a
    kernel density.
    """

    def __init__(self, net: nn.Module, digits: Batch) -> None:
        super().__init__()
        self.features, self.last = net[:-1], net[-1]
        self.register_buffer("known", self.features(digits.x).detach())
        self.register_buffer("labels", digits.y)

    def forward(self, x: Tensor) -> Tensor:
        """Minus the logarithm of the density, (n)."""
        features = self.features(x)
        foreign = self.last(features).argmax(1)[:, None] != self.labels
        kernels = -torch.cdist(features, self.known).square() / BANDWIDTH**2
        return -kernels.masked_fill(foreign, -torch.inf).logsumexp(1)


class Told(nn.Module):
    """How much likelier than a digit an input is what PGD makes of one, in logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """The second logit minus the first, (n)."""
        logits = self.net(x)
        return logits[:, 1] - logits[:, 0]


def told(net: nn.Module, digits: Batch) -> Told:
    """A second network, trained to tell digits from what PGD makes of them.

    Gong, Wang & Ku, "Adversarial and clean data are not twins", 2017, arXiv:1704.04960, after Metzen et al., "On
    detecting adversarial perturbations", ICLR 2017, arXiv:1702.04267.
    """
    attack = PGD(loss=cross_entropy, drop=False)
    made = attack(Classifier(net), digits, ThreatModel(Linf(EPS)), rng=Draws(SEED))
    x, y = torch.cat((digits.x, made.detach())), torch.arange(2).repeat_interleave(len(digits))
    return Told(trained_on_digits(_two_classes, Batch(x, y, torch.arange(len(x))), epochs=3, seed=SEED))


def _two_classes() -> nn.Module:
    net = digit_network()
    net[-1] = nn.Linear(64, 2)
    return net


def measured() -> Outcome:
    x, y = images("mnist", N)
    training, labels = images("mnist", FITTED + CALIBRATED, "train")
    digits = Batch(training[:FITTED], labels[:FITTED], torch.arange(FITTED))
    net = undefended(digits)
    detectors = {
        "squeezing": Squeezing(net),
        "density": Density(net, digits),
        "trained": told(net, digits),
    }
    bare = assess(net, (x, y), f"linf:{EPS:g}", "quick", seed=SEED, doubts=False)
    twin = bare.metrics["robust_accuracy"].value
    table: list[Cells] = []
    claims = []
    for name, detector in detectors.items():
        with torch.no_grad():
            limit = threshold(detector(training[FITTED:]), FALSE_POSITIVES)
        pair = with_detector(net, detector, limit)
        found = assess(pair, (x, y), f"linf:{EPS:g}", "quick", seed=SEED, adaptive=True)
        cells = {"detector": name, "twin": twin, **_cells(found)}
        table.append(cells)
        claims.append(
            Claim(f"{name}: robust accuracy - the bare network's <= 0.05", cells["robust"] - twin, 0.05)
        )
        claims.append(
            Claim(
                f"{name}: AUROC without knowledge - with it >= 0.02",
                cells["AUROC oblivious"] - cells["AUROC"],
                0.02,
                least=True,
            )
        )
    last = table[-1]
    claims += [
        Claim("trained: AUROC without knowledge >= 0.99", last["AUROC oblivious"], 0.99, least=True),
        Claim("trained: AUROC <= 0.60", last["AUROC"], 0.60),
    ]
    config: Cells = {"data": "mnist", "network": "of the gallery", "n": N, "eps": EPS, "fitted on": FITTED,
                     "calibrated on": CALIBRATED, "false positives": FALSE_POSITIVES, "seed": SEED}  # fmt: skip
    return Outcome(table, claims, config)


def _cells(found: Result) -> Cells:
    value = {name: estimate.value for name, estimate in found.metrics.items()}
    suite = found.attacks[0]
    return {
        "clean": value["clean_accuracy"],
        "rejected": value["rejection_rate"],
        "AUROC oblivious": value["oblivious_detection_auroc"],
        "AUROC": value["detection_auroc"],
        "TPR at 5 % oblivious": value["oblivious_detection_rate_at_5_percent"],
        "TPR at 5 %": value["detection_rate_at_5_percent"],
        "TPR at 1 % oblivious": value["oblivious_detection_rate_at_1_percent"],
        "TPR at 1 %": value["detection_rate_at_1_percent"],
        "after the suite": suite.surviving_after / N,
        "robust": value["robust_accuracy"],
        "attacks": ", ".join(record.name for record in found.attacks),
        "CPU s": found.cost.cpu_s,
    }
