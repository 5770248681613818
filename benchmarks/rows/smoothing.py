"""Randomised smoothing beside the procedure of Cohen et al. with 10,000 draws: images certified, and draws."""

import math
import time
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.special import betainc, betaincinv, betaln, ndtri

from benchmarks.hardened import dataset
from benchmarks.networks import CACHE
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome
from holdfast.certifiers.smoothing import Smoothing, miss_limit, numbered_noise, votes_of
from holdfast.core.batch import Batch
from holdfast.core.constraints import L2
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.io.models.architectures import mnist_cnn
from holdfast.io.models.composed import with_denoiser
from holdfast.io.models.models import open_model
from holdfast.recipes import Denoising, GaussianNoise
from holdfast.recipes.training.fit import Training
from holdfast.statistics.intervals import sequential_test

WHAT = "smoothing, MNIST L2, sigma 0.5, 500 images: those that Cohen's procedure certifies with 10,000 draws, and draws"
ROW, SIGMA, DRAWS, ALPHA, N = "smoothing", 0.5, 10_000, 0.001, 500
SELECTION = 100
"""draws of Cohen's procedure for the class, as in the paper"""
EPS = (0.25, 0.5, 0.75, 1.0, 1.25)
FEWEST = "fewest draws of any procedure"
BEYOND = (1.5,)
"""Where any procedure needs more draws than are allowed on average: see the note."""
SHARE, ALLOWED = 99.0, 3_333.0
RECIPE = GaussianNoise(sigma=SIGMA, training=Training(epochs=6, warmup=0.0))
FEW = 1_024
"""Rows that are classified at once."""
GIVEN, GIVEN_EPS, GAINED = "mnist-cnn", 0.5, 10.0
DENOISING = Denoising(sigma=SIGMA, width=16, training=Training(epochs=3, warmup=0.0, weight_decay=0.0))
DENOISED_ON = 20_000
"""Training images of the denoiser, which is many times as large as the network."""


def measured() -> Outcome:
    detail = {"network": part(ROW, "network", _trained)}
    detail |= {
        name: part(ROW, name, lambda name=name: _votes(name)) for name in ("same draws", "other draws")
    }
    detail |= {
        f"eps {eps:g}": part(ROW, f"eps {eps:g}", lambda eps=eps: _ours(eps)) for eps in (*EPS, *BEYOND)
    }
    detail |= {
        f"{GIVEN}, {name}": part(ROW, f"{GIVEN}, {name}", lambda name=name: _given(name))
        for name in ("as it is", "denoised")
    }
    cohen = {name: _cohen(detail[name]["measured"]) for name in ("same draws", "other draws")}
    table, claims = [], []
    for eps in (*EPS, *BEYOND):
        ours = detail[f"eps {eps:g}"]["measured"]
        certified = np.array(ours["certified"])
        theirs, other = (cohen[name] >= eps for name in ("same draws", "other draws"))
        share = float(100 * (certified & theirs).sum() / theirs.sum())
        draws = float(np.mean(ours["draws"]))
        fewest = math.ceil(math.log(ALPHA) / math.log1p(-miss_limit(eps, SIGMA)))
        again = float(100 * (other & theirs).sum() / theirs.sum())
        table.append(
            {"network": "trained with noise", "eps": eps, FEWEST: fewest,
             "certified": int(certified.sum()), "by Cohen's": int(theirs.sum()), "of these, %": round(share, 1),
             "by Cohen's on other draws": int(other.sum()), "of Cohen's, %": round(again, 1),
             "mean draws": round(draws), "broken": sum(ours["broken"]), "CPU s": ours["cpu_s"],
             **_alternatives(eps, detail["same draws"]["measured"])}
        )  # fmt: skip
        claims.append(
            Claim(
                f"eps {eps:g}: of the images that Cohen's certifies, % >= {SHARE:g}", share, SHARE, least=True
            )
        )
        if eps in EPS:
            claims.append(Claim(f"eps {eps:g}: mean draws <= {ALLOWED:g}", draws, ALLOWED))
    given = [detail[f"{GIVEN}, {name}"]["measured"] for name in ("as it is", "denoised")]
    for name, found in zip((GIVEN, f"{GIVEN}, denoised"), given, strict=True):
        table.append(
            {"network": name, "eps": GIVEN_EPS, "certified": sum(found["certified"]), "broken": sum(found["broken"]),
             "mean draws": round(float(np.mean(found["draws"]))), "CPU s": found["cpu_s"]}
        )  # fmt: skip
    gained = 100 * (sum(given[1]["certified"]) - sum(given[0]["certified"])) / N
    claims.append(
        Claim(
            f"{GIVEN}, denoised: points certified at eps {GIVEN_EPS:g} that the network alone has not >= {GAINED:g}",
            gained,
            GAINED,
            least=True,
        )
    )
    config: Cells = {
        "sigma": SIGMA, "draws": DRAWS, "failure probability": ALPHA, "images": N, "selection": SELECTION,
        "recipe": repr(RECIPE), "denoising": repr(DENOISING), "images for the denoiser": DENOISED_ON,
    }  # fmt: skip
    kept = {name: _short(kept) for name, kept in detail.items() if "draws" not in name}
    network = detail["network"]["measured"]
    seconds = detail["same draws"]["measured"]["cpu_s"]
    notes = [
        (
            f"the network was trained for six epochs in {network['cpu_s']:.0f} CPU s; Cohen's procedure takes "
            f"{DRAWS + SELECTION:,} draws an image and {seconds:.0f} CPU s for all images"
        ),
        (
            "Cohen's procedure estimates the probability on the same noise, so that both see the same votes; on other "
            "noise it certifies other images, as the two columns on other draws show"
        ),
        (
            f"at eps {BEYOND[0]:g} no procedure certifies with fewer than {table[len(EPS)][FEWEST]:,} draws, so that "
            "the mean is not required there"
        ),
        (
            "equal shares and betting: the same rule for giving up, with a Clopper-Pearson limit at the same looks, "
            "each with an equal share of the failure probability, and with a mixture martingale at every draw"
        ),
    ]
    return Outcome(table, claims, config, kept, notes)


@cache
def _images() -> Batch:
    whole = _split("test")
    return whole.take(torch.arange(N))


def _split(name: str) -> Batch:
    with np.load(dataset("mnist")) as file:
        x, y = file[f"x_{name}"], file[f"y_{name}"]
    return Batch(torch.from_numpy(x)[:, None] / 255, torch.from_numpy(y).long(), torch.arange(len(x)))


def _place() -> Any:
    return CACHE / "smoothing-mnist.pt"


def _trained() -> Cells:
    batch = _split("train")
    torch.manual_seed(0)
    net = Classifier(mnist_cnn())
    begun = time.process_time()
    *_, last = RECIPE(net, batch, ThreatModel(L2(1.0)), rng=Draws(0))
    last.put_into(net)
    _place().parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), _place())
    return {"cpu_s": round(time.process_time() - begun, 1), **last.measured}


@cache
def _network() -> Classifier:
    net = Classifier(mnist_cnn())
    net.load_state_dict(torch.load(_place(), weights_only=True))
    return net.eval().requires_grad_(False)


def _short(kept: Cells) -> Cells:
    """A part, with one line of text for all images."""
    measured = {
        name: " ".join(str(int(value)) for value in values) if isinstance(values, list) else values
        for name, values in kept["measured"].items()
    }
    return {**kept, "measured": measured}


def _given(name: str) -> Cells:
    """The bundled network, which was not trained with noise, alone or behind a denoiser."""
    model = open_model(GIVEN).model
    if name == "as it is":
        return _ours(GIVEN_EPS, model)
    assert isinstance(model.net, torch.nn.Module)
    torch.manual_seed(0)
    model.net = with_denoiser(model.net, {"channels": 1, "width": DENOISING.width, "depth": DENOISING.depth})
    begun = time.process_time()
    data = _split("train").take(torch.arange(DENOISED_ON))
    *_, last = DENOISING(model, data, ThreatModel(L2(GIVEN_EPS)), rng=Draws(0))
    last.put_into(model)
    spent = round(time.process_time() - begun, 1)
    return {"training, CPU s": spent, **_ours(GIVEN_EPS, model.eval())}


def _ours(eps: float, network: Classifier | None = None) -> Cells:
    images, how = _images(), Smoothing(SIGMA, DRAWS, ALPHA)
    begun = time.process_time()
    found = how.ready(network or _network(), images.take(torch.arange(8)), ThreatModel(L2(eps)))(images)
    return {
        "cpu_s": round(time.process_time() - begun, 1),
        "certified": found.certified.tolist(),
        "broken": found.broken.tolist(),
        "draws": found.work.tolist(),
    }


def _votes(name: str) -> Cells:
    """The class that is most frequent in draws of its own, and which of the other draws are misses of it and of the
    label, as hexadecimal text.
    """
    images, rng = _images(), Smoothing(SIGMA).rng if name == "same draws" else Draws(1).at("other")
    begun = time.process_time()
    classes, misses = [], []
    for i in range(N):
        chosen = _predicted(i, Draws(2).at("selection", name), SELECTION).bincount().argmax()
        votes = _predicted(i, rng, DRAWS)
        classes.append(int(chosen))
        misses.append(np.packbits((votes != images.y[i]).numpy()).tobytes().hex())
    return {"cpu_s": round(time.process_time() - begun, 1), "classes": classes, "misses": misses}


def _predicted(i: int, rng: Draws, n: int) -> torch.Tensor:
    images, votes = _images(), []
    for start in range(0, n, FEW):
        numbers = torch.arange(start, min(start + FEW, n))
        x = images.x[i : i + 1].expand(len(numbers), *images.x.shape[1:])
        noise = numbered_noise(rng, images.ids[i].expand(len(numbers)), numbers, x)
        votes.append(votes_of(_network()(x + SIGMA * noise)))
    return torch.cat(votes)


def _missed(kept: Cells) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Which draws of each image are misses of its label, (images, draws)."""
    rows = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:DRAWS] for text in kept["misses"]]
    return np.stack(rows)


def _cohen(kept: Cells) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Radii that CERTIFY of Cohen et al. returns, 0 for another class than the label and where it abstains."""
    hits = DRAWS - _missed(kept).sum(1, dtype=np.int64)
    right = np.array(kept["classes"]) == _images().y.numpy()
    low = np.where(hits, betaincinv(np.maximum(hits, 1), DRAWS - hits + 1, ALPHA), 0.0)
    low = np.where(hits == DRAWS, ALPHA ** (1 / DRAWS), low)
    radii = np.where(right & (low > 0.5), SIGMA * ndtri(low), 0.0)
    return np.asarray(radii, np.float64)


def _alternatives(eps: float, kept: Cells) -> Cells:
    """Images certified and mean draws of two other sequential procedures, on the same draws."""
    limit, misses = miss_limit(eps, SIGMA), _missed(kept).cumsum(1, dtype=np.int64)
    test = sequential_test(limit, DRAWS, ALPHA)
    at, n = np.array(test.looks), np.arange(1, DRAWS + 1)
    share = ALPHA / sum(n >= 0 for n in test.proves)
    equal = np.array([_most(k, limit, share) for k in at])
    betting = [_betting(int(k), limit) for k in n]
    cells: Cells = {}
    for name, looks, proves in (("equal shares", at, equal), ("betting", n, np.array(betting))):
        seen = misses[:, looks - 1]
        proved = seen <= proves
        given_up = np.zeros_like(proved)
        given_up[:, np.searchsorted(looks, at)] = misses[:, at - 1] >= np.array(test.gives_up)
        ended = proved | given_up
        ended[:, -1] = True
        first = ended.argmax(1)
        certified = proved[np.arange(len(seen)), first]
        cells |= {
            f"{name}: certified": int(certified.sum()),
            f"{name}: mean draws": round(float(looks[first].mean())),
        }
    return cells


def _most(n: int, limit: float, alpha: float) -> int:
    """The largest number of misses whose upper Clopper-Pearson limit is at most `limit`; -1 if there is none."""
    counts = np.arange(n)
    return int((betaincinv(counts + 1, n - counts, 1 - alpha) <= limit).sum()) - 1


def _betting(n: int, limit: float) -> int:
    """The largest number of misses at which the mixture over all smaller probabilities of a miss reaches 1 / alpha."""
    low, high = -1, n
    while low < high:
        j = (low + high + 1) // 2
        with np.errstate(divide="ignore"):
            mixed = betaln(j + 1, n - j + 1) + np.log(betainc(j + 1, n - j + 1, limit)) - math.log(limit)
        wealth = mixed - j * math.log(limit) - (n - j) * math.log1p(-limit)
        low, high = (j, high) if wealth >= -math.log(ALPHA) else (low, j - 1)
    return low
