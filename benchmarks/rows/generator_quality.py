"""The measures of `holdfast audit generator` for planted faults of samples of MNIST, beside torchmetrics."""

import itertools
import time
import warnings
from importlib import metadata

import torch
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.peers import peer
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.finding import penultimate
from holdfast.audits.generator.copies import Quality, copies, frechet_distance, kernel_distance, quality
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.io.data.data import open_data
from holdfast.io.data.layouts import DeclaredData
from holdfast.io.models.models import open_model

WHAT = "measures of planted faults in samples of MNIST: noise, a missing class, repeated images, copies"
TRAIN, N = 10_000, 4_000
"""numbers of training examples, and of samples and held-out examples"""


def measured() -> Outcome:
    training, test = _digits("train").first(TRAIN), _digits("test")
    held_out, other, labels = test.x[:N], test.x[N:], test.y[N:]
    random = Draws(0).at("generator-quality")
    started = time.process_time()
    model = open_model("mnist-cnn").model.eval()
    noise = random.at("noise").normal(torch.arange(N), *other.shape[1:])
    sets = {
        "held-out (floor)": held_out,
        "noise 0.1": (other[:N] + 0.1 * noise).clamp(0, 1),
        "a class missing": other[labels != 3][:N],
        "100 images repeated": other[:100].repeat(N // 100, 1, 1, 1),
        "5 classes only": other[labels < 5][:N],
        "training examples": training.x[:N],
    }
    reference, _ = penultimate(model, training.x)
    mean, deviation = reference.mean(0), reference.std(0)
    varying = deviation > 1e-6 * deviation.max()
    reference = ((reference - mean) / deviation)[:, varying]
    features = {name: ((penultimate(model, x)[0] - mean) / deviation)[:, varying] for name, x in sets.items()}
    results = {name: quality(each, reference) for name, each in features.items()}
    compared = {name: copies(x, training.x, held_out) for name, x in sets.items()}
    found = {name: each.rate.value + each.near.value for name, each in compared.items()}
    seconds = time.process_time() - started
    order = list(sets)[:-1]
    values = [results[name].frechet.value for name in order]
    ordered = all(earlier < later for earlier, later in itertools.pairwise(values))
    order_note = (
        "The order depends on the network: with a small network that was trained on the 10,000 images alone, as the "
        "audit trains one by default, noise of 0.1 had a larger Fréchet distance (6.9) than the missing class (5.5)."
    )
    notes = [
        f"{seconds:.0f} CPU seconds.",
        "The features are those of the bundled network mnist-cnn.",
        order_note,
    ]
    claims = [
        Claim("Fréchet distances in the expected order (1: yes)", float(ordered), 1, least=True),
        Claim("recall of 100 repeated images <= 0.01", results["100 images repeated"].recall.value, 0.01),
        Claim(
            "share of copies among training examples >= 0.99", found["training examples"], 0.99, least=True
        ),
        Claim("share of copies among held-out images <= 0.02", found["held-out (floor)"], 0.02),
        *_closed_form(),
        *_beside_torchmetrics(features["noise 0.1"], reference, notes),
    ]
    table = [_row(name, results[name], found[name]) for name in sets]
    config: Cells = {"training examples": TRAIN, "samples": N, "features": reference.shape[1], "seed": 0}
    return Outcome(table, claims, config, notes=notes)


def _digits(split: str) -> Batch:
    data = open_data("mnist", split=split, expected=DeclaredData(layout="chw", lenient=True))
    return data.read(0, len(data))


def _closed_form() -> list[Claim]:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(200_000, 4, generator=random), 1 + 2 * torch.randn(200_000, 4, generator=random)
    return [
        Claim(
            "error of the Fréchet distance of N(0, I) and N(1, 4 I) <= 0.1",
            abs(frechet_distance(a, b) - 8),
            0.1,
        )
    ]


def _beside_torchmetrics(features: Tensor, reference: Tensor, notes: list[str]) -> list[Claim]:
    """The relative differences to torchmetrics on the same features."""
    try:
        fids, kids = peer("torchmetrics.image.fid"), peer("torchmetrics.image.kid")
    except Absent as why:
        notes.append(str(why))
        return []
    net, n = _Features(features.shape[1]), len(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the memory of the features
        fid = fids.FrechetInceptionDistance(feature=net).set_dtype(torch.float64)
        kid = kids.KernelInceptionDistance(feature=net, subsets=1, subset_size=n)
    for metric in (fid, kid):
        metric.update(reference[:n], real=True)
        metric.update(features, real=False)
    notes.append(f"torchmetrics {metadata.version('torchmetrics')}, with the same features.")
    pairs = {
        "Fréchet distance": (frechet_distance(features, reference[:n]), float(fid.compute())),
        "KID": (kernel_distance(features, reference[:n]), float(kid.compute()[0])),
    }
    return [
        Claim(f"relative difference of the {name} to torchmetrics <= 0.001", abs(ours / theirs - 1), 1e-3)
        for name, (ours, theirs) in pairs.items()
    ]


class _Features(nn.Module):
    """Module that returns its inputs, which are features already."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.num_features = n

    def forward(self, x: Tensor) -> Tensor:
        return x


def _row(name: str, measures: Quality, copied: float) -> Cells:
    return {
        "samples": name,
        "Fréchet": round(measures.frechet.value, 2),
        "KID": round(measures.kid.value, 4),
        "precision": round(measures.precision.value, 3),
        "recall": round(measures.recall.value, 3),
        "coverage": round(measures.coverage.value, 3),
        "copies": round(copied, 4),
    }
