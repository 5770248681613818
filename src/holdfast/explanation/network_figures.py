"""Figures of a network: its loss along an attack, and the layer where the features of clean and of adversarial inputs
part.

Athalye, Carlini & Wagner, "Obfuscated gradients give a false sense of security", ICML 2018, arXiv:1802.00420, for
plateaus of the loss as a sign of masked gradients.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from holdfast.attacks.parts.expectation import inner
from holdfast.attacks.parts.losses import margin, margin_loss
from holdfast.certifiers.slices import beside
from holdfast.core.batch import Batch
from holdfast.core.per_example import spread
from holdfast.core.types import Inputs
from holdfast.explanation.attacked import Attacked
from holdfast.explanation.explained import Bar, Cell, Figure, bars
from holdfast.explanation.wording import percent
from holdfast.reports.numbers import plain
from holdfast.reports.words import amount
from holdfast.runs.harness import Target

_LINES = 16  # examples of the loss surface
_STEPS = 33  # points on each line
_FLAT = 1e-3
"""share of the range of the loss below which a step counts as flat"""
_PLATEAU, _CLIFF = 0.5, 0.3
"""shares of flat steps, and of the range in one step, from which a loss surface is a plateau with cliffs"""
_MASKING = ("zero-gradient", "shattered", "loss-spread", "black-box", "noise")
"""doubts that are about masked gradients"""


def surface_figure(case: Attacked, doubts: Mapping[str, str]) -> tuple[Figure, bool]:
    """The loss along the change and a random direction, and whether it is smooth."""
    rows_of = ((case.distance > 0) & (case.predicted == case.batch.y)).nonzero()[:, 0][:_LINES]
    chosen = case.batch.take(rows_of)
    eps = case.threat.constraint.eps
    gradient_step = _signed_step(case, chosen, eps)
    flats, cliffs, table = [], [], list[tuple[Cell, ...]]()
    random = beside(
        gradient_step, case.rng.at("surface").normal(chosen.ids, *chosen.x.shape[1:], dtype=chosen.x.dtype)
    )
    places = torch.linspace(0, 1.5, _STEPS)
    for row in range(len(chosen)):
        for name, direction in (("attack", gradient_step[row]), ("random", random[row])):
            points = case.target.bare.bounds.clamp(
                chosen.x[row] + spread(places.to(chosen.x), chosen.x) * direction
            )
            one = Batch(points, chosen.y[row].expand(_STEPS), chosen.ids[row].expand(_STEPS))
            loss = -margin(case.target.judged_logits(case.target.logits(points), one.y), one).double()
            steps = loss.diff().abs()
            extent = float((loss.max() - loss.min()).clamp_min(1e-12))
            still = float(steps.max()) <= 1e-9
            flats.append(1.0 if still else float((steps <= _FLAT * extent).double().mean()))
            cliffs.append(0.0 if still else float(steps.max()) / extent)
            table += [
                (int(chosen.ids[row]), name, float(p), float(v)) for p, v in zip(places, loss, strict=True)
            ]
    flat = sorted(flats)[len(flats) // 2] if flats else 0.0
    cliff = sorted(cliffs)[len(cliffs) // 2] if cliffs else 0.0
    smooth = not (flat >= _PLATEAU and (cliff >= _CLIFF or flat >= 1 - 1e-9))
    raised = [name for name in _MASKING if doubts.get(name) == "raised"]
    title = (
        "The loss changes smoothly along the attack"
        if smooth
        else "The loss has plateaus with cliffs, a sign of masking"
    )
    text = (
        f"Median over {amount(len(chosen), 'examples')} and two directions: {percent(flat)} of the steps are flat, and "
        f"the largest step is {percent(cliff)} of the range."
    )
    note = text
    if doubts:
        note += f" Doubts of the run about masking that are raised: {', '.join(raised) or 'none'}."
    shown = tuple(
        Bar(name, value, percent(value)) for name, value in (("flat steps", flat), ("largest step", cliff))
    )
    headings = ("example", "direction", "distance in eps", "loss (minus the margin)")
    reason = "" if smooth else f"{title}: attacks by gradients may miss changes."
    return Figure(
        "surface", title, text, headings, tuple(table), bars=shown, note=note, reason=reason
    ), smooth


def _signed_step(case: Attacked, chosen: Batch, eps: float) -> Inputs:
    """The change of the size eps in the direction of the gradient; of the found change if the gradient is zero."""
    x = chosen.x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = margin_loss(case.target.bare(x), chosen).sum()
    (grad,) = torch.autograd.grad(loss, x, materialize_grads=True, allow_unused=True)
    constraint = case.threat.constraint
    if constraint.counts_changes:
        return grad.sign() * case.target.bare.bounds.width * 0.1
    step = constraint.steepest(grad, chosen.x, case.target.bare.bounds)
    zero = grad.flatten(1).abs().amax(1) == 0
    sizes = constraint.distance(step, torch.zeros_like(step)).clamp_min(1e-12)
    scaled = step * spread((eps if math.isfinite(eps) else 1.0) / sizes, step)
    random = case.rng.at("flat").signs(chosen.ids, *chosen.x.shape[1:], dtype=chosen.x.dtype) * eps
    return torch.where(spread(zero, scaled), random, scaled)


def layer_figures(case: Attacked, notes: list[str]) -> list[Figure]:
    """The relative change of the outputs of each layer by the attack and by noise of the same size."""
    net = inner(case.target.bare).net
    rows_of = (case.found & (case.distance > 0)).nonzero()[:, 0][:64]
    leaves = (
        [(name, m) for name, m in net.named_modules() if name and not [*m.children()]]
        if isinstance(net, nn.Module)
        else []
    )
    if len(leaves) < 2 or not len(rows_of):
        notes.append(
            "The layers are not compared, because the network has no named layers or nothing was broken."
        )
        return []
    x, x_adv = case.batch.x[rows_of], case.x_adv[rows_of]
    delta = (x_adv - x).flatten(1)
    order = case.rng.at("layers").uniform(case.batch.ids[rows_of], delta.shape[1]).argsort(1)
    signs = case.rng.at("signs").signs(case.batch.ids[rows_of], delta.shape[1], dtype=x.dtype)
    noise = case.target.bare.bounds.clamp(x + (delta.gather(1, order) * signs).view_as(x))
    outputs = [_outputs(case.target, leaves, points) for points in (x, x_adv, noise)]
    rows: list[tuple[str, float, float, float]] = []
    for name in outputs[0]:
        clean, changed, noisy = (each[name].flatten(1).double() for each in outputs)
        size = clean.norm(dim=1).clamp_min(1e-12)
        a, b = (float(((v - clean).norm(dim=1) / size).mean()) for v in (changed, noisy))
        rows.append((name, a, b, a / max(b, 1e-12)))
    if not rows:
        return []
    first = next((row for row in rows if row[3] >= 2), None)
    most = max(rows, key=lambda row: row[3])
    if first is None:
        title = f"The attack moves no features twice as far as noise (at most {most[3]:.2g} times, at layer {most[0]})"
    else:
        title = (
            f"Layer {first[0]} is the first whose features the attack moves at least twice as far as noise "
            f"({first[3]:.2g} times)"
        )
    text = (
        f"Relative change of the outputs of each layer, {amount(len(rows_of), 'examples')}: by the attack, by noise of "
        "the same size, and their ratio."
    )
    shown = bars([row[0] for row in rows], [row[3] for row in rows], [plain(row[3], 2) for row in rows])
    headings = ("layer", "change by the attack", "change by noise", "ratio")
    reason = "" if first is None else f"{title}."
    return [Figure("layers", title, text, headings, tuple(rows), bars=shown, note=text, reason=reason)]


def _outputs(target: Target, leaves: list[tuple[str, nn.Module]], x: Inputs) -> dict[str, Tensor]:
    """The outputs of the layers for some inputs, by the names of the layers."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and len(output) == len(x):
                kept[name] = output.detach()

        return hook

    hooks = [module.register_forward_hook(keep(name)) for name, module in leaves]  # type: ignore[arg-type]
    try:
        target.logits(x)
    finally:
        for hook in hooks:
            hook.remove()
    return kept
