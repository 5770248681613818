"""Train the single-step network: FGSM with random starts on MNIST, Linf 0.3.

Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020,
arXiv:2001.03994. Their MNIST settings: step 0.375 from a uniform start in the ball, Adam, learning
rate up to 0.005 and back to 0, batches of 100; 6 epochs, where they take 10. Single-step training leaves a rough
loss: gradient attacks stop early on it, restarts and Square go on. That is what it is here for.

    python -m benchmarks.single_step        # about a CPU minute; writes benchmarks/cache/
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.networks import CACHE, images, two_conv_two_fc

EPS, ALPHA, LR, BATCH = 0.3, 0.375, 5e-3, 100


def train(epochs: int = 6, seed: int = 0) -> torch.nn.Sequential:
    """The trained network, in eval mode; the same on the same machine for the same seed."""
    torch.manual_seed(seed)
    x, y = images("mnist", 60_000, split="train")
    net = two_conv_two_fc().train()
    adam = torch.optim.Adam(net.parameters(), lr=LR)
    per_epoch = len(x) // BATCH
    for epoch in range(epochs):
        order = torch.randperm(len(x))
        for i in range(per_epoch):
            adam.param_groups[0]["lr"] = float(
                np.interp(epoch + (i + 1) / per_epoch, [0, epochs * 2 // 5, epochs], [0, LR, 0])
            )
            pick = order[i * BATCH : (i + 1) * BATCH]
            clean, label = x[pick], y[pick]
            # as in the authors' code, the start may leave the box; clamped to it, training overfits catastrophically
            start = (clean + torch.empty_like(clean).uniform_(-EPS, EPS)).requires_grad_()
            gradient = torch.autograd.grad(F.cross_entropy(net(start), label), start)[0]
            delta = (start.detach() - clean + ALPHA * gradient.sign()).clamp_(-EPS, EPS)
            adam.zero_grad()
            F.cross_entropy(net((clean + delta).clamp_(0, 1)), label).backward()
            adam.step()
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    net = train(chosen.epochs, chosen.seed)
    CACHE.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), CACHE / "single_step.safetensors")
    x, y = images("mnist", 10_000)
    with torch.no_grad():
        print(f"clean accuracy {(net(x).argmax(1) == y).float().mean():.4f}")


if __name__ == "__main__":
    main()
