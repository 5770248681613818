"""What `auto` makes within a budget, beside a plain loop of PGD-7 with a tuned learning rate at equal CPU time."""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import holdfast
from benchmarks.absent import Absent
from benchmarks.hardened import Examples
from benchmarks.networks import images, network
from benchmarks.parts import part
from benchmarks.record import Cells, Claim, Outcome

WHAT = (
    "`auto` beside a plain loop of PGD-7 with a tuned learning rate at equal CPU time: own PGD with 50 steps"
)
ROW, STEPS, BATCH, JUDGED_STEPS = "harden-loop", 7, 128, 50


@dataclass(frozen=True)
class Track:
    """A data set with its network, an eps, the seconds of training and the learning rates of the loop."""

    name: str
    eps: float
    budget_s: int
    rates: tuple[float, ...]


TRACKS = (Track("digits 8 x 8", 0.15, 30, (1e-3, 3e-3, 1e-2)), Track("MNIST", 0.3, 180, (1e-3, 3e-3)))


def measured() -> Outcome:
    table: list[Cells] = []
    claims: list[Claim] = []
    detail: Cells = {}
    for track in TRACKS:
        auto = part(ROW, f"{track.name} auto", lambda track=track: _auto(track))
        cpu_s = auto["measured"]["CPU s"]
        loops = {
            f"loop, lr {lr:g}": part(ROW, f"{track.name} {lr:g}", lambda t=track, r=lr, s=cpu_s: _loop(t, r, s))
            for lr in track.rates
        }  # fmt: skip
        contestants = {"auto": auto, **loops}
        detail |= {f"{track.name}, {who}": found for who, found in contestants.items()}
        table += [{"data": track.name, "who": who, **found["measured"]} for who, found in contestants.items()]
        best = max(found["measured"]["robust, %"] for found in loops.values())
        claims.append(
            Claim(f"{track.name}: robust, % of auto - that of the best loop >= 0",
                  auto["measured"]["robust, %"] - best, 0, least=True)
        )  # fmt: skip
    config: Cells = {"tracks": [vars(track) for track in TRACKS], "steps": STEPS, "batch": BATCH,
                     "judged by steps": JUDGED_STEPS, "seed": 0}  # fmt: skip
    return Outcome(table, claims, config, detail, ["one seed"])


def _of(track: Track) -> tuple[nn.Module, Examples, Examples]:
    """The network to train, and the examples for training and for the measurement."""
    if track.name == "MNIST":
        return network("mnist-cnn").module, images("mnist", 60_000, "train"), images("mnist", 1_000)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Absent(f"digits of 8 x 8 pixels need scikit-learn ({error})") from error
    digits = load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1_437], order[1_437:]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1_024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return net, (x[train], y[train]), (x[test], y[test])


def _auto(track: Track) -> Cells:
    net, train, test = _of(track)
    found = holdfast.harden(
        net.requires_grad_(), test, f"linf:{track.eps}", budget=f"{track.budget_s}s", suite="quick", fit=train,
        doubts=False, device="cpu",
    )  # fmt: skip
    cost = found.card["cost"]
    cpu_s = cost["cpu_s"] * (
        1 + cost["planning_s"] / cost["wall_s"]
    )  # of the planning at the same share of the CPU
    cells = {"recipe": found.card["recipe"], "CPU s": cpu_s}
    return {**cells, **_judged(found.model, test, track.eps)}


def _loop(track: Track, lr: float, cpu_s: float) -> Cells:
    """The loop as papers write it, with a rate that falls along a line to 0 when the CPU time is over."""
    net, (x, y), test = _of(track)
    net = deepcopy(net).train().requires_grad_()
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    begin, rng = time.process_time(), torch.Generator().manual_seed(0)
    while (done := (time.process_time() - begin) / cpu_s) < 1:
        rows = torch.randint(len(x), (BATCH,), generator=rng)
        optimizer.param_groups[0]["lr"] = lr * (1 - done)
        x_adv = _attacked(net, x[rows], y[rows], track.eps, STEPS)
        optimizer.zero_grad()
        F.cross_entropy(net(x_adv), y[rows]).backward()
        optimizer.step()
    return {"recipe": "PGD-7", "CPU s": time.process_time() - begin, **_judged(net.eval(), test, track.eps)}


def _attacked(net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """Signed steps from a random start."""
    delta = torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(steps):
        delta.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net((x + delta).clamp(0, 1)), y), delta)
        delta = (delta.detach() + 2.5 * eps / steps * grad.sign()).clamp(-eps, eps)
    return (x + delta).clamp(0, 1)


def _judged(net: Callable[[Tensor], Tensor], test: Examples, eps: float) -> Cells:
    """Clean accuracy and that after PGD with 50 steps, in %."""
    torch.manual_seed(0)
    x, y = test
    with torch.no_grad():
        clean = net(x).argmax(1) == y
    x_adv = torch.cat(
        [_attacked(net, *rows, eps, JUDGED_STEPS) for rows in zip(x.split(250), y.split(250), strict=True)]
    )
    with torch.no_grad():
        robust = clean & (net(x_adv).argmax(1) == y)
    return {"clean, %": 100 * float(clean.float().mean()), "robust, %": 100 * float(robust.float().mean())}
