"""Shared gradients of 784-512-10 on MNIST: the inputs that they give away, also with the noise of DP-SGD."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import holdfast
from benchmarks.networks import images
from benchmarks.record import Cells, Claim, Outcome
from holdfast.recipes import DPSGD

WHAT = "shared gradients of 784-512-10 on MNIST: exact reconstructions, and those of gradients with noise"
SIZES, BATCHES, NOISY_BATCHES, N, TRAINING = (1, 4, 8, 16, 32), 40, 20, 2000, 60_000
EXACT = {1: 100.0, 4: 100.0, 8: 95.0}
"""least share of the images of the untrained network, by the size of the batch"""
EPSILON, MOST_GAIN = 2.0, 0.5


def measured() -> Outcome:
    x, y = images("mnist", N)
    noise = DPSGD(epsilon=EPSILON).noise(TRAINING)
    table: list[Cells] = []
    claims: list[Claim] = []
    for name, net in (("untrained", network()), ("trained", trained(*images("mnist", N, "train")))):
        found = holdfast.audit.reconstruct(net, (x, y), batch_size=SIZES, batches=BATCHES)
        noisy = holdfast.audit.reconstruct(
            net, (x, y), batch_size=(1,), batches=NOISY_BATCHES, clip=1.0, noise=noise
        )
        rows = [*found.facts.values(), noisy.facts["protected-1"]]
        for row in rows:
            gain = row["psnr_above_mean_image"]
            table.append(
                {
                    "network": name,
                    "batch": row["batch_size"],
                    "noise": noise if row["protected"] else 0.0,
                    "batches": row["batches"],
                    "exact, %": 100 * row["exactly_reconstructed"],
                    "labels, %": 100 * row["labels"],
                    "PSNR, dB": row["psnr"],
                    "above the mean image, dB": gain["value"],
                }
            )
        gain = table[-1]["above the mean image, dB"]
        claims.append(
            Claim(
                f"{name}, noise of epsilon {EPSILON:g}: PSNR above the mean image, dB <= {MOST_GAIN}",
                gain,
                MOST_GAIN,
            )
        )
    claims += [
        Claim(f"untrained, batch {row['batch']}: exact, % >= {EXACT[row['batch']]:g}",
              row["exact, %"], EXACT[row["batch"]], least=True)
        for row in table if row["network"] == "untrained" and not row["noise"] and row["batch"] in EXACT
    ]  # fmt: skip
    return Outcome(table, claims, {"n": N, "noise": noise, "seed": 0}, {}, [])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10))


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """The network after ten epochs on other images."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()
