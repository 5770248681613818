"""The worst errors of attacks on regressions beside the closed form, and certified intervals beside samples."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import holdfast
from benchmarks.record import Cells, Claim, Outcome

WHAT = "worst errors of attacks on regressions beside the closed form, and certified intervals beside samples"
MODELS, EXAMPLES, FEATURES, SAMPLES, EPS = 20, 40, 10, 10_000, 0.05
METHODS = ("ibp", "auto")


def subject(seed: int, *, linear: bool) -> tuple[nn.Module, NDArray[np.float32], NDArray[np.float32]]:
    """A random model, inputs at least `EPS` inside of the bounds, and noisy targets."""
    torch.manual_seed(seed)
    net: nn.Module = nn.Linear(FEATURES, 1)
    if not linear:
        net = nn.Sequential(
            nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1)
        )
    x = EPS + (1 - 2 * EPS) * torch.rand(EXAMPLES, FEATURES)
    y = net(x) + 0.05 * torch.randn(EXAMPLES, 1)
    return net.requires_grad_(False), x.numpy(), y.detach().numpy()


def sampled(net: nn.Module, x: Tensor) -> Tensor:
    """Outputs (samples, n) at corners of the balls, and between them."""
    signs = torch.randint(0, 2, (SAMPLES, *x.shape)) * 2.0 - 1
    shares = torch.rand(SAMPLES, len(x), 1).clamp_min(0.5)
    return torch.stack([net(x + EPS * each * share)[:, 0] for each, share in zip(signs, shares, strict=True)])


def measured() -> Outcome:
    table: list[Cells] = []
    farthest, n_outside = 0.0, 0
    for linear in (True, False):
        kind = "linear" if linear else "ReLU, 2 x 32"
        of_attacks, of_samples = [], []
        seen = []
        widths: dict[str, list[float]] = {method: [] for method in METHODS}
        for seed in range(MODELS):
            net, x, y = subject(seed, linear=linear)
            outputs = sampled(net, torch.tensor(x)).double()
            for method in METHODS:
                run = holdfast.certify(net, (x, y), f"linf:{EPS}", tolerance="0.1", method=method)
                evidence = run.evidence
                low, high = (evidence[f"certified_{end}"][:, 0] for end in ("low", "high"))
                reached = torch.cat((outputs, evidence["task.output"].double().t()))
                n_outside += int(((reached < low) | (reached > high)).sum())
                widths[method].append(float((high - low).mean()))
            seen.append(float((reached.amax(0) - reached.amin(0)).mean()))
            errors = (evidence["task.output"].double() - evidence["task.truth"].double()).abs()[:, 0]
            of_attacks.append(float(errors.mean()))
            of_samples.append(float((outputs - torch.tensor(y[:, 0])).abs().amax(0).mean()))
            if isinstance(net, nn.Linear):
                clean = (net(torch.tensor(x)) - torch.tensor(y)).double().abs()[:, 0]
                exact = clean + EPS * net.weight.double().abs().sum()
                farthest = max(farthest, float(((errors - exact).abs() / exact).max()))
        row: Cells = {"model": kind, "mean error, samples": mean(of_samples), "attacks": mean(of_attacks)}
        row |= {f"width of intervals, {method}": mean(widths[method]) for method in METHODS}
        table.append(row | {"width, samples and attacks": mean(seen)})
    claims = [
        Claim(
            "largest relative difference of an attacked error from the closed form <= 1e-5", farthest, 1e-5
        ),
        Claim("sampled and attacked outputs outside of certified intervals <= 0", float(n_outside), 0.0),
    ]
    config: Cells = {
        "models of each kind": MODELS,
        "examples": EXAMPLES,
        "features": FEATURES,
        "samples of each example": SAMPLES,
        "threat": f"linf:{EPS}",
    }
    return Outcome(table, claims, config)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
