"""A vision transformer on MNIST that is trained for five minutes, and what CROWN proves about it."""

import torch
from safetensors.torch import load_file

from benchmarks.hardened import made, spent
from benchmarks.networks import images
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.certified_training import cascade
from benchmarks.vision_transformer import VisionTransformer
from holdfast.certifiers.provers import IBP, Crown
from holdfast.core.batch import Batch
from holdfast.core.model import Classifier

WHAT = (
    "a vision transformer on MNIST, five minutes of adversarial training: certified at linf 0.02, 200 images"
)
ROW, SEED, N, TRAINED, THREAT, BUDGET, REQUIRED = (
    "certified-transformer",
    0,
    200,
    "linf:0.1",
    "linf:0.02",
    "5min",
    30.0,
)


def measured() -> Outcome:
    torch.manual_seed(SEED)
    net = VisionTransformer()
    card = made(
        ROW, "trained", net, "mnist", TRAINED, "fgsm-rs", BUDGET, suite="quick", n=N, seed=SEED, by_cpu=True
    )
    proofs = part(ROW, "proofs", _proved)
    shares, took = proofs["measured"], spent(card["measured"], by_cpu=True)
    table = [
        {"trained at": TRAINED, "certified at": THREAT, "training, CPU s": round(took["CPU s"]), **shares}
    ]
    claims = [Claim(f"certified, % >= {REQUIRED:g}", shares["certified, %"], REQUIRED, least=True)]
    config: Cells = {
        "data": "mnist",
        "n": N,
        "recipe": "fgsm-rs",
        "budget": BUDGET,
        "seed": SEED,
        "threads": 1,
    }
    return Outcome(table, claims, config, {"card": card, "proofs": proofs})


def _proved() -> Cells:
    net = VisionTransformer()
    net.load_state_dict(load_file(RUNS / ROW / "trained" / "model.safetensors"))
    x, y = images("mnist", N)
    model = Classifier(net).eval().requires_grad_(False)
    torch.set_num_threads(1)
    return cascade(model, Batch(x, y, torch.arange(N)), (IBP(), Crown()), threat=THREAT)
