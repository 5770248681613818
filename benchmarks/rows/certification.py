"""Certificates of networks that others trained: how many examples are decided, and what each method costs."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.networks import images, network
from benchmarks.record import Cells, Claim, Outcome
from holdfast import Batch, Classifier, Linf, ThreatModel
from holdfast.attacks.pgd import PGD
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, GraphProver, prepared_graph
from holdfast.core.draws import Draws

WHAT = (
    "certificates of mnist_kw01 at linf 0.1, 10,000 images, and of a CIFAR network with normalisation inside"
)
N, TIMEOUT_S = 10_000, 30.0
CIFAR_N = 100
MINUTES, CORES = 15.0, 2
UNDECIDED, IBP_S = 10, 2.0
ATTACK = PGD(restarts=5)
"""Short attack on the images that the quick methods leave undecided, before the slow ones, where `auto` attacks."""


def measured() -> Outcome:
    return outcome(N, CIFAR_N)


def outcome(n: int, cifar_n: int) -> Outcome:
    """The row, with so many images of MNIST and of CIFAR-10."""
    kw01, x, y = _opened("mnist_kw01", n)
    threat = ThreatModel(Linf(0.1))
    cascade = (IBP(), Crown(TIMEOUT_S), ATTACK, AlphaCrown(TIMEOUT_S), BranchAndBound(TIMEOUT_S))
    rows, undecided, seconds = _cascade("mnist_kw01", kw01, x, y, threat, cascade)
    cifar, x, y = _opened("cifar_cnn_a_adv", cifar_n)
    more, _, _ = _cascade("cifar_cnn_a_adv", cifar, x, y, ThreatModel(Linf(2 / 255)), (Crown(),))
    claims = [
        Claim(f"undecided images of mnist_kw01 <= {UNDECIDED}", undecided, UNDECIDED),
        Claim(f"CPU minutes of all images <= {MINUTES * CORES:g}", seconds / 60, MINUTES * CORES),
        Claim(f"CPU seconds of IBP on all images <= {IBP_S:g}", rows[1]["cpu s"], IBP_S),
        Claim(
            "images certified by CROWN with normalisation inside >= 1", more[-1]["certified"], 1, least=True
        ),
    ]
    config = {
        "n": n,
        "cifar_n": cifar_n,
        "timeout_s": TIMEOUT_S,
        "threats": ["linf:0.1", "linf:2/255"],
        "threads": 1,
    }
    return Outcome([*rows, *more], claims, config)


def _opened(name: str, n: int) -> tuple[Classifier, Tensor, Tensor]:
    found = network(name)
    x, y = images(found.data, n)
    module = found.module if isinstance(found.module, Classifier) else Classifier(found.module)
    return module.eval().requires_grad_(False), x, y


def _right(model: Classifier, x: Tensor, y: Tensor) -> Batch:
    """The examples that the model classifies correctly."""
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(500)]) == y
    return Batch(x, y, torch.arange(len(x))).take(right)


def _cascade(
    name: str,
    model: Classifier,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    methods: Sequence[GraphProver | PGD],
) -> tuple[list[Cells], int, float]:
    """A line for the clean model and one for each method on what the methods before it left, the number of undecided
    examples, and the CPU seconds.
    """
    batch, seconds = _right(model, x, y), 0.0
    lines: list[Cells] = [{"network": name, "method": "clean", "n": len(x), "undecided": len(batch)}]
    for method in methods:
        if not len(batch):
            break
        if isinstance(method, PGD):
            line = _attacked(method, model, batch, threat)
        else:
            line = _timed(method, model, batch, threat)
        batch = line.pop("left")
        seconds += line["cpu s"]
        lines.append({"network": name, **line, "undecided": len(batch)})
    return lines, len(batch), seconds


def _timed(prover: GraphProver, model: Classifier, batch: Batch, threat: ThreatModel) -> Cells:
    ready = prover.on(prepared_graph(model, batch), model, threat)
    start = time.process_time()
    proofs = ready(batch)
    spent = time.process_time() - start
    return {
        "method": prover.name,
        "n": len(batch),
        "certified": int(proofs.certified.sum()),
        "broken": int(proofs.broken.sum()),
        "cpu s": spent,
        "ms an image": 1000 * spent / max(len(batch), 1),
        "left": batch.take(~proofs.certified & ~proofs.broken),
    }


def _attacked(attack: PGD, model: Classifier, batch: Batch, threat: ThreatModel) -> Cells:
    start = time.process_time()
    x_adv = attack(model, batch, threat, rng=Draws(0))
    with torch.no_grad():
        broken = model(x_adv).argmax(1) != batch.y
    spent = time.process_time() - start
    return {
        "method": f"PGD, {attack.restarts} restarts",
        "n": len(batch),
        "certified": 0,
        "broken": int(broken.sum()),
        "cpu s": spent,
        "ms an image": 1000 * spent / max(len(batch), 1),
        "left": batch.take(~broken),
    }
