"""The audit of shared gradients: which inputs of a batch the gradient of its loss gives away, as in federated learning,
and what a network shows about its classes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import TypedDict

from holdfast.audits.finding import Finding, Images, Number, Picture, Size, StoredSteps, Table, in_unit_range
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.model import Classifier, evaluating
from holdfast.core.types import Inputs, Labels, PerExample
from holdfast.reports.words import percent
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, content_digest, flag, whole
from holdfast.statistics.intervals import CONFIDENCE, FEW, UNIT, Support, bonferroni, largest, mean

BatchNormMode = Literal["train", "eval"]
EXACT, ABOVE = "exactly_reconstructed", "psnr_above_mean_image"
"""names of the metrics"""
CLASSES = "classes"
"""name of the stage with the inversion of the classes"""
_HALF_LEVEL = 0.5 / 255
"""largest error of an exact reconstruction, as a share of the range: equal in 8 bits"""
_EQUAL = 2e-4
"""largest difference, as a share of the range, of two copies of an input in different units of a layer"""
_OUTSIDE = 1e-3
"""share of the range by which rounding can move a reconstructed input outside the bounds"""
_FIRING = 1e-5
"""gradient of a bias, relative to the largest one, below which a unit is not read"""
_MATCH = 1e-2
"""relative difference up to which the gradient of a bias is that of an example with a label"""
_SINGLE = 1e-4
"""the same for an example that one unit shows"""
_ROUNDED = 1e-4
"""the same after gradients are subtracted, whose rounding remains"""
_MOST_PSNR = 100.0
"""PSNR in dB above which differences are rounding"""
_RATE, _SMOOTH = 0.1, 1e-4
"""step of the optimisation as a share of the range, and weight of the total variation"""
_MAP_RATE, _CLASS_RATE, _CLASS_SMOOTH = 0.02, 0.05, 1e-3
MOST_EXAMPLES = 64
"""largest number of examples in a batch"""
SHOWN = 4
"""reconstructed inputs of each stage that are shown"""

Gradient = tuple[Tensor, ...]
"""gradient of each parameter"""


@dataclass(frozen=True)
class Protection:
    """Clipping and noise of a shared gradient, as in DP-SGD."""

    clip: float
    """norm to which the gradient of each example is clipped"""
    noise: float
    """standard deviation of the noise on the sum of the gradients, in multiples of `clip`"""


@dataclass(frozen=True)
class ReconstructionAudit:
    """Settings of the audit."""

    sizes: tuple[int, ...]
    """sizes of the batches"""
    batches: int
    """largest number of batches of each size"""
    steps: int
    """steps of the optimisation"""
    batch_norm: BatchNormMode
    """mode of the layers of batch normalisation while the gradient is computed; other layers are in eval mode"""
    protection: Protection | None
    """protection with which the gradients are shared as well"""
    n_classes: int
    inversion: bool
    """whether the classes are inverted"""
    shown: int
    """number of reconstructed inputs of each stage that are stored for the report"""
    seed: int

    def stages(self) -> Iterator[tuple[str, int, Protection | None]]:
        """Yield for each stage its name, the size of its batches, and the protection of their gradients."""
        for size in self.sizes:
            yield f"gradients-{size}", size, None
        if self.protection is not None:
            for size in self.sizes:
                yield f"protected-{size}", size, self.protection

    def steps_of_run(self) -> Iterator[str]:
        """Yield the names of the stages of the run."""
        for name, *_ in self.stages():
            yield name
        if self.inversion:
            yield CLASSES

    def refuse_unusable(self, model: Classifier, n: int, *, given: bool) -> None:
        """Raise `UsageError` for fewer examples than a batch needs, and for batch normalisation with clipping."""
        if max(self.sizes) > n:
            raise UsageError(
                f"batch_size is {max(self.sizes)}, and there are {n} examples; expected at most as many",
                Remedy("batch_size", ",".join(str(size) for size in self.sizes if size <= n) or n),
            )
        if last_layer(model, self.n_classes) is None:
            raise UsageError(
                "the network has no dense or convolutional layer with trained weights and one output for each class, "
                "from whose gradient labels are read"
            )
        normalised = any(isinstance(module, _BatchNorm) for module in model.modules())
        if self.protection is not None and self.batch_norm == "train" and normalised:
            raise UsageError(
                "clip needs the gradient of each example, which does not exist for batch normalisation in train mode",
                Remedy("batch_norm", "eval"),
                Remedy("clip", also=(Remedy("noise"),)),
            )
        if given and n > MOST_EXAMPLES:
            raise UsageError(
                f"the data have {n:,} examples, and are the batch of the gradient; at most {MOST_EXAMPLES} were "
                "expected"
            )


@dataclass(frozen=True)
class Observed:
    """What the attacker knows: the network, the shared gradient, and the mean and the variance of other inputs."""

    model: Classifier
    weights: Sequence[Tensor]
    gradient: Gradient
    size: int
    """number of examples in the batch"""
    prior: Inputs
    """mean of other inputs (1, …)"""
    variance: float
    """mean squared distance of a value from the prior"""
    protection: Protection | None
    classes: int


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructed inputs (n, …) of a batch, and their labels (n)."""

    x: Inputs
    y: Labels


def measure(
    run: Run, model: Classifier, data: Batch, judge: Classifier | None, how: ReconstructionAudit,
    given: Gradient | None = None,
) -> Images:  # fmt: skip
    """Compute, share and invert gradients of batches of the data, and store what is recovered.

    `given` is a gradient that was shared of all of the data as one batch; otherwise gradients are computed.
    """
    pictures: dict[str, Tensor] = {}
    low, high = (float(torch.as_tensor(end).min()) for end in (model.bounds.low, model.bounds.high))

    for name, size, protection in how.stages():

        def measured(
            name: str = name, size: int = size, protection: Protection | None = protection
        ) -> Columns:
            columns: list[Columns] = []
            for place, batch in enumerate(_batches(data, size, how)):
                rng = Draws(how.seed).at("reconstruct", name, place)
                gradient = given
                if gradient is None:
                    gradient = shared(model, batch, how.batch_norm, protection, rng)
                with _mode(model, how.batch_norm):
                    observed = _observed(model, gradient, batch, data, protection, how)
                    found = reconstructed(observed, how.steps, rng)
                columns.append(_compared(judge, batch, found, observed))
            joined = {key: torch.cat([each[key] for each in columns]) for key in columns[0]}
            shown = joined.pop("reconstruction")[: how.shown]
            return {**joined, "reconstruction": shown}

        stored = run.stage(name, measured).columns
        reconstruction = stored["reconstruction"]
        rows = {int(row): place for place, row in enumerate(data.ids)}
        originals = data.x[[rows[int(row)] for row in stored["id"][: len(reconstruction)]]].cpu()
        pairs = torch.stack((originals, reconstruction), 1).flatten(0, 1)
        pictures[name] = in_unit_range(pairs, low, high)
    if how.inversion:
        stored = run.stage(CLASSES, lambda: _inverted_classes(model, data, judge, how)).columns
        pictures[CLASSES] = in_unit_range(stored["reconstruction"], low, high)
    return lambda: pictures


def _batches(data: Batch, size: int, how: ReconstructionAudit) -> Iterator[Batch]:
    """Yield batches of different examples, drawn by the seed; all of the data if they are one batch."""
    order = torch.arange(len(data), device=data.ids.device)
    if len(data) > size:
        order = Draws(how.seed).at("batches").bits(data.ids).argsort()
    for rows in torch.split(order, size)[: how.batches]:
        if len(rows) == size:
            yield data.take(rows)


def _observed(
    model: Classifier,
    gradient: Gradient,
    batch: Batch,
    data: Batch,
    protection: Protection | None,
    how: ReconstructionAudit,
) -> Observed:
    """What the attacker knows, with the mean of those of the data that are not in the batch."""
    others = data.x[~torch.isin(data.ids, batch.ids)]
    if not len(others):
        low, high = model.bounds.like(batch.x[:1])
        others = (low + high).expand_as(batch.x[:1]) / 2
    prior = others.mean(0, keepdim=True)
    variance = float((others - prior).square().mean()) or (model.bounds.width / 4) ** 2
    return Observed(
        model, trained_weights(model), gradient, len(batch), prior, variance, protection, how.n_classes
    )


def shared(
    model: Classifier, batch: Batch, mode: BatchNormMode, protection: Protection | None, rng: Draws
) -> Gradient:
    """Return the gradient of the mean cross-entropy of a batch with respect to all trained parameters, as a client
    shares it: with `protection`, the mean of the clipped gradients of its examples with noise.
    """
    weights = trained_weights(model)
    with _mode(model, mode):
        if protection is None:
            return _gradient(model, weights, batch.x, batch.y)
        total = _clipped(model, weights, batch.x, batch.y, protection.clip)
    deviation = protection.noise * protection.clip
    noisy = []
    for place, each in enumerate(total):
        ids = torch.arange(1, device=each.device)
        noisy.append(each + deviation / len(batch) * rng.at("noise", place).normal(ids, *each.shape)[0])
    return tuple(noisy)


def trained_weights(model: Classifier) -> list[Tensor]:
    """Return the parameters whose gradients are shared."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def open_gradient(path: str, model: Classifier) -> Gradient:
    """Return a gradient from a .safetensors file with a tensor for each parameter of the network, under its name.

    Raises `TargetError` for a file that cannot be read, and for names or shapes of another architecture.
    """
    from holdfast.io.models.weights import read_state_dict, state_dict_content

    stored = read_state_dict(Path(path), state_dict_content(Path(path)))[0].tensors
    assert isinstance(model.net, nn.Module)
    named = {name: weight for name, weight in model.net.named_parameters() if weight.requires_grad}
    wrong = [name for name, weight in named.items() if name in stored and stored[name].shape != weight.shape]
    if stored.keys() != named.keys() or wrong:
        differing = sorted(stored.keys() ^ named.keys()) or wrong
        raise TargetError(
            f"{path!r} is no gradient of this network: {', '.join(differing[:3])} differ in "
            f"{'shape' if wrong and stored.keys() == named.keys() else 'name'}; expected one tensor for each of "
            f"{', '.join(list(named)[:3])}{', …' if len(named) > 3 else ''}, with the shape of the parameter"
        )
    infinite = [name for name in named if not stored[name].isfinite().all()]
    if infinite:
        raise TargetError(f"{path!r} has values in {infinite[0]} that are not finite; expected numbers")
    device = next(iter(named.values())).device
    return tuple(stored[name].to(device) for name in named)


def notes_on(given: Gradient, model: Classifier, batch: Batch, mode: BatchNormMode) -> tuple[str, ...]:
    """Return a note for the report if a gradient is not that of a batch."""
    own = shared(model, batch, mode, None, Draws(0))
    apart = float(
        _norm([one - other for one, other in zip(given, own, strict=True)]) / _norm(own).clamp(min=1e-30)
    )
    if apart <= _MATCH:
        return ()
    note = (
        f"the gradient differs from that of the data by {apart:.2g} times its norm: the weights, the examples, their "
        "labels or the mode of batch normalisation were other ones, or it was changed before it was shared"
    )
    return (note,)


def digest_of(gradient: Gradient) -> str:
    """Return the SHA-256 of a gradient in hex."""
    return content_digest({str(place): each for place, each in enumerate(gradient)})


def _gradient(
    model: Classifier, weights: Sequence[Tensor], x: Inputs, y: Labels, *, graph: bool = False
) -> Gradient:
    loss = cross_entropy(model(x), y)
    return torch.autograd.grad(loss, weights, create_graph=graph, materialize_grads=True)


def _clipped(
    model: Classifier, weights: Sequence[Tensor], x: Inputs, y: Labels, clip: float, *, graph: bool = False
) -> Gradient:
    """Mean of the gradients of the examples, each clipped to a norm."""
    total = [torch.zeros_like(weight) for weight in weights]
    for place in range(len(x)):
        each = _gradient(model, weights, x[place : place + 1], y[place : place + 1], graph=graph)
        factor = (clip / (_norm(each) + 1e-12)).clamp(max=1.0)
        total = [sum_ + factor * part / len(x) for sum_, part in zip(total, each, strict=True)]
    return tuple(total)


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    return torch.stack([each.square().sum() for each in gradient]).sum().sqrt()


@contextmanager
def _mode(model: Classifier, mode: BatchNormMode) -> Iterator[None]:
    """Context manager in which the network is in eval mode, except batch normalisation with the mode `train`, whose
    running statistics are not changed.
    """
    norms = [module for module in model.modules() if mode == "train" and isinstance(module, _BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.train()
            norm.momentum, norm.num_batches_tracked = 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, counted) in zip(norms, kept, strict=True):
                norm.momentum, norm.num_batches_tracked = momentum, counted


def reconstructed(observed: Observed, steps: int, rng: Draws) -> Reconstruction:
    """Return the inputs of a batch that its gradient gives away, and their labels.

    The first dense layer with a bias gives inputs exactly: the gradient of a row of its weights, divided by that of
    its bias, is the input of the example on which the unit fires (Phong et al., IEEE TIFS 2018). An input
    that several units show is no mixture of examples. All others are found by optimisation (Geiping et al., NeurIPS
    2020, arXiv:2003.14053), and those of a gradient with noise by the most probable input (Balunović et al., ICLR
    2022, arXiv:2111.04706).
    """
    labels = labels_of(observed)
    if observed.protection is None:
        layer = first_dense(observed.model, observed.prior)
        if layer is not None:
            return _exact(observed, layer, labels)
    return _optimised(observed, labels, steps, rng)


def labels_of(observed: Observed) -> Labels:
    """Return the labels (n) of a batch by the gradient of the last layer, in increasing order.

    The gradient of the bias of a class is below 0 if an example of the class is not classified with certainty. Further
    examples are those of the lowest gradients after the mean effect of the examples found is subtracted (Wainakh et
    al., PETS 2022, arXiv:2105.09369). Without a bias, the sums of the rows of the weights take its place.
    """
    place = last_layer(observed.model, observed.classes)
    assert place is not None  # checked before the run
    rest = observed.gradient[place]
    rest = rest.clone() if rest.dim() == 1 else rest.flatten(1).sum(1)
    found = [int(label) for label in (rest < 0).nonzero()[:, 0]][: observed.size]
    if observed.size == 1:
        found = [int(rest.argmin())]
    effect = float(rest[rest < 0].sum()) * (1 + 1 / len(rest)) / observed.size
    for label in found:
        rest[label] -= effect
    while len(found) < observed.size:
        label = int(rest.argmin())
        found.append(label)
        rest[label] -= effect if effect < 0 else -1 / observed.size
    return torch.tensor(sorted(found), device=rest.device)


def last_layer(model: Classifier, classes: int) -> int | None:
    """Return the position among the trained parameters of the bias of the last layer with an output for each class, or
    of its weight if it has no bias; None if there is no such layer.
    """
    weights = trained_weights(model)
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear | nn.Conv2d) and len(module.weight) == classes:
            for parameter in (module.bias, module.weight):
                for place, weight in enumerate(weights):
                    if weight is parameter:
                        return place
    return None


@dataclass(frozen=True)
class _Layer:
    """A dense layer whose input is the input of the model, up to a scale and a shift of each value."""

    weight: int
    """position of its weight among the trained parameters; that of its bias is `bias`"""
    bias: int
    module: nn.Linear
    shift: Tensor
    """input of the layer (values,) where the input of the model is 0"""
    scale: Tensor
    """(values,)"""
    shape: tuple[int, ...]

    def inverse(self, z: Tensor) -> Inputs:
        """Return the inputs of the model for inputs (n, values) of the layer."""
        return ((z - self.shift) / self.scale).reshape(len(z), *self.shape)


def first_dense(model: Classifier, x: Inputs) -> _Layer | None:
    """Return the dense layer with a bias that sees the input of the model, or None. `x` is an input (1, …)."""
    weights = trained_weights(model)
    shape = tuple(x.shape[1:])
    probes = torch.stack(
        (
            torch.zeros_like(x[0]),
            torch.ones_like(x[0]),
            torch.linspace(0, 1, x[0].numel(), device=x.device).view(shape),
        )
    )
    for module in model.modules():
        own = dict(module.named_parameters())
        if not isinstance(module, nn.Linear) or "bias" not in own or module.in_features != x[0].numel():
            continue
        place = {id(weight): place for place, weight in enumerate(weights)}
        seen = _inputs_of(module, model, probes)
        if (
            len(seen) != 1
            or seen[0].shape != (3, module.in_features)
            or not {*map(id, own.values())} <= {*place}
        ):
            continue
        zero, one, other = seen[0]
        scale = one - zero
        if (scale.abs() > 0).all() and torch.allclose(zero + scale * probes[2].flatten(), other, atol=1e-4):
            return _Layer(place[id(module.weight)], place[id(module.bias)], module, zero, scale, shape)
    return None


def _inputs_of(layer: nn.Module, model: Classifier, x: Inputs) -> list[Tensor]:
    """The inputs of a layer in a forward pass: one for each call of the layer."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen


def _exact(observed: Observed, layer: _Layer, labels: Labels) -> Reconstruction:
    """The inputs that units of a dense layer show, and their labels.

    An input counts as found if the gradient of the bias of its units is the one that it has with some label. Its own
    gradient is then subtracted from the shared one, so that units that fired on it and on one other example show the
    other. Where examples depend on each other, as in batch normalisation, none is found in this way, and inputs that
    several units show are returned. What is still missing is the prior with a label that is left over.
    """
    model, size = observed.model, observed.size
    weight, bias = observed.gradient[layer.weight], observed.gradient[layer.bias]
    largest = float(bias.abs().max())
    least, x, y = _FIRING * largest, observed.prior[:0], labels[:0]
    found = True
    while found and len(x) < size:
        found = False
        for candidate, units in _shown(model, layer, weight, bias, least):
            single = len(units) == 1 < size  # one unit has some label by chance
            if len(x) == size or (single and found):
                break
            label, error = _label_of(model, layer, candidate, bias[units] * size, units)
            if error > (_SINGLE if single else _MATCH):
                continue
            own = [each / size for each in _of_layer(model, layer, candidate, label)]
            weight, bias = weight - own[0], bias - own[1]
            x, y, found = torch.cat((x, candidate)), torch.cat((y, label)), True
        least = _ROUNDED * largest
    if not len(x):
        repeated = [one for one, units in _shown(model, layer, weight, bias, least) if len(units) > 1]
        x = torch.cat((x, *repeated[:size]))
    left = labels.tolist()
    for label in y.tolist():
        if label in left:
            left.remove(label)
    rest = torch.tensor(left[: size - len(y)], dtype=torch.long, device=y.device)
    prior = observed.prior.expand(size - len(x), *layer.shape)
    return Reconstruction(torch.cat((x, prior)), torch.cat((y, rest)))


def _shown(
    model: Classifier, layer: _Layer, weight: Tensor, bias: Tensor, least: float
) -> Iterator[tuple[Inputs, Tensor]]:
    """Yield the inputs (1, …) inside the bounds that units show, with these units; those of most units first."""
    firing = (bias.abs() > least).nonzero()[:, 0]
    shown = layer.inverse(weight[firing] / bias[firing, None])
    low, high = model.bounds.like(shown)
    width = model.bounds.width
    inside = ((shown >= low - _OUTSIDE * width) & (shown <= high + _OUTSIDE * width)).flatten(1).all(1)
    shown, firing = shown[inside], firing[inside]
    of_unit = _equal(shown, _EQUAL * width)
    for place in of_unit.bincount().argsort(descending=True, stable=True).tolist():
        same = of_unit == place
        best = bias[firing[same]].abs().argmax()  # the quotient with the smallest rounding
        one = shown[same][best][None]
        yield torch.minimum(torch.maximum(one, low), high), firing[same]


def _equal(shown: Inputs, tolerance: float) -> Tensor:
    """For each input (n, …) the number of its group of equal ones."""
    flat = shown.flatten(1)
    of = torch.full((len(flat),), -1, dtype=torch.long, device=flat.device)
    groups = 0
    for place in range(len(flat)):
        if int(of[place]) < 0:
            of[((flat - flat[place]).abs().amax(1) <= tolerance) & (of < 0)] = groups
            groups += 1
    return of


def _of_layer(model: Classifier, layer: _Layer, x: Inputs, y: Labels) -> Gradient:
    """The gradients of the weight and of the bias of the layer, for the loss of one example."""
    weights = trained_weights(model)
    return _gradient(model, [weights[layer.weight], weights[layer.bias]], x, y)


def _label_of(
    model: Classifier, layer: _Layer, x: Inputs, bias: Tensor, units: Tensor
) -> tuple[Labels, float]:
    """The label (1) with which the gradient of the bias of an example `x` (1, …) is most like the observed one at its
    units, and the relative difference that remains.
    """
    errors = (_of_labels(model, layer, x)[:, units] - bias).norm(dim=1) / bias.norm()
    error, label = errors.min(0)
    return label[None], float(error)


def _of_labels(model: Classifier, layer: _Layer, x: Inputs) -> Tensor:
    """The gradient (classes, units) of the bias of the layer for an example `x` (1, …) with each label."""
    outputs: list[Tensor] = []
    handle = layer.module.register_forward_hook(lambda _, inputs, output: outputs.append(output))
    logits = model(x)
    handle.remove()
    own = []
    for place in range(logits.shape[1]):
        loss = cross_entropy(logits, torch.tensor([place], device=x.device))
        own.append(torch.autograd.grad(loss, outputs[0], retain_graph=True)[0].flatten().detach())
    return torch.stack(own)


def _optimised(observed: Observed, labels: Labels, steps: int, rng: Draws) -> Reconstruction:
    """Inputs whose gradient is most similar to the shared one, with little total variation; for a gradient with noise,
    the most probable ones, if inputs are normal around the prior.
    """
    model, size, protection = observed.model, observed.size, observed.protection
    low, high = model.bounds.like(observed.prior)
    width = model.bounds.width
    start = observed.prior.expand(size, *observed.prior.shape[1:]).clone()
    if protection is None:
        ids = torch.arange(size, device=start.device)
        start = low + (high - low) * rng.at("start").uniform(ids, *start.shape[1:]).to(start.dtype)
    x = start.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=width * (_RATE if protection is None else _MAP_RATE))
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [3 * steps // 8, 5 * steps // 8, 7 * steps // 8]
    )
    best, found = math.inf, x.detach().clone()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _mismatch(observed, x, labels)
        (x.grad,) = torch.autograd.grad(loss, x)
        if (value := float(loss.detach())) < best:
            best, found = value, x.detach().clone()
        if protection is None:
            x.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            x.copy_(torch.minimum(torch.maximum(x, low), high))
    return Reconstruction(found, labels)


def _mismatch(observed: Observed, x: Inputs, labels: Labels) -> Tensor:
    """How little inputs (n, …) explain the shared gradient."""
    width, protection = observed.model.bounds.width, observed.protection
    if protection is None:
        mine = _gradient(observed.model, observed.weights, x, labels, graph=True)
        one, other = (torch.cat([each.flatten() for each in part]) for part in (mine, observed.gradient))
        return 1 - cosine_similarity(one, other, dim=0) + _SMOOTH * _variation(x) / width
    mine = _clipped(observed.model, observed.weights, x, labels, protection.clip, graph=True)
    deviation = protection.noise * protection.clip / observed.size
    residual = _norm([one - other for one, other in zip(mine, observed.gradient, strict=True)])
    if not deviation:
        return residual / protection.clip
    apart = (x - observed.prior).square().sum()
    return residual.square() / (2 * deviation**2) + apart / (2 * observed.variance)


def _variation(x: Inputs) -> Tensor:
    """Mean difference of neighbouring pixels of images; 0 for other inputs."""
    if x.dim() != 4:
        return x.new_zeros(())
    return (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()


def _compared(judge: Classifier | None, batch: Batch, found: Reconstruction, observed: Observed) -> Columns:
    """Compare a batch with what was reconstructed, each input with one reconstruction, so that the errors are least."""
    from scipy.optimize import linear_sum_assignment

    width = observed.model.bounds.width
    errors = (batch.x[:, None] - found.x[None]).flatten(2).square().mean(2).cpu()
    _, columns = linear_sum_assignment(errors.numpy())
    order = torch.from_numpy(columns).to(batch.x.device)
    x = found.x[order]
    apart = (x - batch.x).flatten(1)
    measured = {
        "id": batch.ids.cpu(),
        "psnr": _psnr(apart, width),
        "prior": _psnr((observed.prior - batch.x).flatten(1), width),
        "exact": (apart.abs().amax(1) <= _HALF_LEVEL * width).long().cpu(),
        "label": batch.y.cpu(),
        "inferred": found.y[order].cpu(),
        "reconstruction": x.detach().cpu(),
    }
    if judge is not None:
        with torch.no_grad():
            measured |= {
                key: judge(each).argmax(1).cpu()
                for key, each in (("judged", x), ("judged_original", batch.x))
            }
    return measured


def _psnr(apart: Tensor, width: float) -> Tensor:
    error = apart.square().mean(1).double().cpu()
    return (10 * torch.log10(width**2 / error.clamp(min=1e-30))).clamp(max=_MOST_PSNR)


def _inverted_classes(
    model: Classifier, data: Batch, judge: Classifier | None, how: ReconstructionAudit
) -> Columns:
    """Inputs with the highest probability of each class, from the mean input on (Fredrikson et al., CCS 2015), and
    their distance to the nearest example of the class.
    """
    low, high = model.bounds.like(data.x[:1])
    width, y = model.bounds.width, torch.arange(how.n_classes, device=data.x.device)
    x = data.x.mean(0, keepdim=True).expand(len(y), *data.example_shape).clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=_CLASS_RATE * width)
    with evaluating(model):
        for _ in range(how.steps):
            loss = (
                cross_entropy(model(x), y, reduction="sum") + len(y) * _CLASS_SMOOTH * _variation(x) / width
            )
            (x.grad,) = torch.autograd.grad(loss, x)
            optimizer.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, low), high))
    x = x.detach()
    flat, nearest, typical = data.x.flatten(1), [], []
    with torch.no_grad(), evaluating(model):
        confidence = model(x).softmax(1)[range(len(y)), y]
    for label in y.tolist():
        own = flat[data.y == label]
        distance = (
            torch.cdist(torch.cat((x[label].flatten()[None], own)), own) / math.sqrt(flat.shape[1]) / width
        )
        nearest.append(float(distance[0].min()) if len(own) else math.inf)
        among = distance[1:].fill_diagonal_(math.inf)
        typical.append(float(among.min(1).values.median()) if len(own) > 1 else math.inf)
    measured = {
        "id": y.cpu(),
        "confidence": confidence.double().cpu(),
        "nearest": torch.tensor(nearest, dtype=torch.float64),
        "typical": torch.tensor(typical, dtype=torch.float64),
        "reconstruction": x.cpu()[: how.n_classes if how.shown else 0],
    }
    if judge is not None:
        with torch.no_grad():
            measured["judged"] = judge(x).argmax(1).cpu()
    return measured


class _Settings(TypedDict):
    sizes: Annotated[list[Annotated[Size, Field(ge=1)]], Field(min_length=1)]
    batches: Size
    steps: Size
    batch_norm: BatchNormMode
    clip: Number | None
    noise: Number | None
    inversion: bool
    judge: bool
    exact_layer: bool
    judge_digest: NotRequired[str]
    gradient_digest: NotRequired[str]
    n_classes: Size


_PSNR = Form(low=-200, high=_MOST_PSNR)


def concluded(steps: StoredSteps) -> Finding:
    """Return how much of the batches their gradients give away."""
    settings = steps.settings(_Settings)
    protection = None if settings["clip"] is None else Protection(settings["clip"], settings["noise"] or 0.0)
    how = ReconstructionAudit(
        tuple(settings["sizes"]), settings["batches"], settings["steps"], settings["batch_norm"], protection,
        settings["n_classes"], settings["inversion"], 0, steps.manifest["seed"],
    )  # fmt: skip
    label = whole("n", high=max(settings["n_classes"] - 1, 0))
    forms = {
        "psnr": _PSNR,
        "prior": _PSNR,
        "exact": flag("n"),
        "label": label,
        "inferred": label,
    }
    if settings["judge"]:
        forms |= {"judged": label, "judged_original": label}
    is_given = "gradient_digest" in settings
    rows = []
    for name, size, part in how.stages():
        rows.append(_Row(name, size, part is not None, is_given, steps.columns(name, forms)))
        if len(rows[-1].columns["exact"]) % size:
            raise steps.refuse(name, "a part of a batch", f"batches of {size}")
    classes = None
    if how.inversion:
        some = Form(low=0, infinite=True)
        of_classes = {"confidence": Form(low=0, high=1), "nearest": some, "typical": some}
        if settings["judge"]:
            of_classes["judged"] = label
        classes = steps.columns(CLASSES, of_classes, n=how.n_classes)
    return _finding(settings, rows, classes, steps)


@dataclass(frozen=True)
class _Row:
    """What was recovered from the gradients of batches of one size."""

    name: str
    size: int
    protected: bool
    is_given: bool
    """whether the gradient is one that was shared, and not one of those of the data"""
    columns: Columns

    @property
    def batches(self) -> int:
        return len(self.columns["exact"]) // self.size

    def exact(self, confidence: float = CONFIDENCE) -> Estimate:
        """Share of the examples that are reconstructed exactly."""
        return self._mean(self.columns["exact"], confidence, UNIT)

    def gain(self, confidence: float = CONFIDENCE) -> Estimate:
        """PSNR above that of the mean image in dB."""
        apart = self.columns["psnr"] - self.columns["prior"]
        return self._mean(apart, confidence, Support(-_MOST_PSNR, _MOST_PSNR))

    def _mean(self, values: PerExample, confidence: float, support: Support) -> Estimate:
        """The mean, whose interval resamples batches, because the examples of a batch are reconstructed together. A
        gradient that was given is no sample of others, and its interval is the value.
        """
        of_batches = values.double().view(-1, self.size).mean(1)
        if self.is_given:
            value = float(of_batches.mean())
            return Estimate(value, value, value, 1)
        return mean(of_batches, confidence, support=support)

    @property
    def labels(self) -> float:
        """Share of the labels of the batches that are recovered, in any order."""
        labels = (self.columns[key].long().view(-1, self.size) for key in ("label", "inferred"))
        classes = int(max(self.columns[key].max() for key in ("label", "inferred"))) + 1
        counts = [one_hot(each, classes).sum(1) for each in labels]
        return int(torch.minimum(*counts).sum()) / (self.batches * self.size)

    def shown(self) -> tuple[str | float | int, ...]:
        columns, gain = self.columns, self.gain()
        judged = [
            percent(float((columns[key] == columns["label"]).double().mean()))
            for key in ("judged", "judged_original")
            if key in columns
        ]
        return (
            self.size,
            "protected" if self.protected else "plain",
            self.batches,
            percent(self.exact().value),
            percent(self.labels),
            f"{float(columns['psnr'].mean()):.1f}",
            _decibels(gain),
            *judged,
        )


def _finding(
    settings: _Settings, rows: Sequence[_Row], classes: Columns | None, steps: StoredSteps
) -> Finding:
    judged_rows = [row for row in rows if row.protected] or list(rows)
    confidence = bonferroni(CONFIDENCE, 2 * len(judged_rows))  # of both metrics of each row
    exact = largest([row.exact(confidence) for row in judged_rows])
    above = largest([row.gain(confidence) for row in judged_rows])
    worst = max(judged_rows, key=lambda row: (row.exact().value, row.gain(confidence).low))
    of = f"a batch of {worst.size}" if worst.size > 1 else "one example"
    how = " with clipping and noise" if worst.protected else ""
    method = (
        "the gradient of a dense layer with a bias that sees the input itself gives inputs exactly"
        if settings["exact_layer"]
        else f"no dense layer with a bias sees the input itself: inputs were found by {settings['steps']} steps of "
        "optimisation"
    )
    if worst.protected:
        method = f"protected gradients were inverted by {settings['steps']} steps of optimisation"
    return Finding(
        "flagged" if above.low > 0 or exact.value > 0 else "not flagged",
        f"the gradient of {of}{how} gives {percent(worst.exact().value)} of the inputs exactly, and inputs whose PSNR "
        f"in dB is above that of the mean image by {_decibels(worst.gain(confidence))}",
        [method],
        _facts(rows),
        {EXACT: exact, ABOVE: above},
        tables=(_batch_table(rows), *(() if classes is None else (_class_table(classes),))),
        pictures=steps.pictures(_pictures(rows, classes)),
        limits=(
            (
                f"The gradients are those of one step, with batch normalisation in {settings['batch_norm']} mode, "
                "and other layers are in eval mode. Updates of several steps reveal less or more."
            ),
            "The attacker knows the weights and the size of the batch. Other attacks may find more.",
            *(
                (f"There are fewer than {FEW} batches of a size, so that its intervals are wide.",)
                if not worst.is_given and min(row.batches for row in rows) < FEW
                else ()
            ),
        ),
    )


def _facts(rows: Sequence[_Row]) -> dict[str, object]:
    return {
        row.name: {
            "batch_size": row.size,
            "protected": row.protected,
            "batches": row.batches,
            "exactly_reconstructed": row.exact().value,
            "labels": row.labels,
            "psnr": float(row.columns["psnr"].mean()),
            "psnr_of_mean_image": float(row.columns["prior"].mean()),
            "psnr_above_mean_image": vars(row.gain()),
        }
        for row in rows
    }


def _batch_table(rows: Sequence[_Row]) -> Table:
    judged = "judged" in rows[0].columns
    of_judge = (
        " Judged: the share of the reconstructions that the judge classifies right, and of the originals."
    )
    return Table(
        "Gradients of batches",
        (
            *("size", "gradient", "batches", "exact", "labels", "PSNR", "above mean image"),
            *(("judged", "originals") if judged else ()),
        ),
        [row.shown() for row in rows],
        "Exact: equal in 8 bits. PSNR is in dB. The mean image is that of the examples outside the batch, which an "
        "attacker without the gradient may know, or the middle of the range if there are none. Each interval has "
        f"95 %.{of_judge if judged else ''}",
    )


def _pictures(rows: Sequence[_Row], classes: Columns | None) -> list[Picture]:
    pictures = [
        Picture(
            row.name,
            f"Batches of {row.size}: examples, each beside what its "
            f"{'protected ' if row.protected else ''}gradient gives away",
            [text for psnr in row.columns["psnr"][:SHOWN].tolist() for text in ("example", f"{psnr:.1f} dB")],
            together=2,
        )
        for row in rows
    ]  # fmt: skip
    if classes is not None:
        captions = [f"class {label}" for label in range(len(classes["confidence"]))]
        pictures.append(Picture(CLASSES, "Inputs with the highest probability of each class", captions))
    return pictures


def _decibels(gain: Estimate) -> str:
    return f"{gain.value:+.1f}" + (f" ({gain.low:+.1f} to {gain.high:+.1f})" if gain.low < gain.high else "")


def _class_table(classes: Columns) -> Table:
    judged = ("label by the judge",) if "judged" in classes else ()
    rows: list[tuple[str | int, ...]] = []
    for label in range(len(classes["confidence"])):
        values = [f"{float(classes[key][label]):.3f}" for key in ("nearest", "typical")]
        by_judge = [int(classes["judged"][label])] if judged else []
        rows.append((label, percent(float(classes["confidence"][label])), *values, *by_judge))
    return Table(
        "Inversion of the classes",
        ("class", "probability", "nearest example", "among examples", *judged),
        rows,
        "The distance of the inverted input to the nearest example of the class, and the median distance of an example "
        "to its nearest: root mean squared differences as a share of the range.",
    )
