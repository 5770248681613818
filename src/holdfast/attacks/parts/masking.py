"""Search for the parts of a network that mask its gradient, by a test of each module on the inputs that it gets."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from holdfast.core.through import Replacement, StraightThrough, Through, detoured

_MOVES = 0.01
"""Step along the gradient, as a share of the root mean square of the inputs."""
_LEAST = 1e-3
"""Root mean square that is assumed if all inputs are zero."""
_HONEST = (0.5, 2.0)
"""Range of the median ratio of measured to predicted change for an unmasked gradient, as for the doubt `shattered`."""


@dataclass(frozen=True)
class Masking:
    """The parts of a network that mask gradients, with the replacements that an adaptive attack uses to avoid them."""

    replacements: tuple[Replacement, ...] = ()
    steps: bool = False
    """whether the network contains roundings, inside modules or between them, whose gradient is replaced"""

    def __bool__(self) -> bool:
        return bool(self.replacements) or self.steps

    @property
    def descriptions(self) -> tuple[str, ...]:
        """Descriptions of the parts of a network whose gradient an adaptive attack replaces, for the report."""
        declared = "the stand-in that it declares"
        descriptions = [
            f"{replacement.name or 'the network'} ({_kind(replacement.module)}) by "
            f"{'the identity' if replacement.stand_in is None else declared}"
            for replacement in self.replacements
        ]
        return (*descriptions, *(["every rounding by the identity"] if self.steps else []))


def masking(net: nn.Module, x: Tensor) -> Masking:
    """Find the parts of a network whose gradient an adaptive attack replaces. These declare a replacement, or they have
    a zero or wrong gradient and do not change the shape of their input.

    Roundings are replaced first, because a stage without its roundings is closer to the original than the identity is.
    The tests use inputs like `x`. Cost: three forwards of the network, and for each module that preserves the shape
    three forwards and a backward.
    """
    modules = dict(net.named_modules())
    declared = [Replacement(name, m, m.backward) for name, m in modules.items() if isinstance(m, Through)]
    inside = {m for replacement in declared for m in replacement.module.modules()}
    with detoured(declared, steps=True) as counter:
        _slope(net, x)
    steps, replacements = counter.passed > 0, list[Replacement]()
    # inner modules first, so that an outer one is not replaced for a fault of an inner one
    for name, (module_input, module_output) in sorted(
        _shape_candidates(net, x).items(), key=lambda named: -named[0].count(".")
    ):
        module = modules[name]
        if module in inside or module_input.shape != module_output.shape:
            continue
        passed = any(
            replacement.module in set(module.modules()) for replacement in (*declared, *replacements)
        )
        with detoured((*declared, *replacements), steps=steps) as counter:
            if _masks(module, module_input, counter, slopes=not passed):
                replacements.append(Replacement(name, module))
    order = {name: position for position, name in enumerate(modules)}
    return Masking(
        tuple(sorted((*declared, *replacements), key=lambda replacement: order[replacement.name])), steps
    )


def _shape_candidates(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of each module that takes and returns one floating-point tensor."""
    recorded: dict[str, tuple[Tensor, Tensor]] = {}
    names = {module: name for name, module in net.named_modules()}

    def note(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        floats = [v for v in (*inputs, output) if isinstance(v, Tensor) and v.is_floating_point()]
        if len(inputs) == 1 and len(floats) == 2:
            recorded.setdefault(names[module], (floats[0].detach().clone(), floats[1].detach()))

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _masks(module: nn.Module, x: Tensor, counter: StraightThrough, *, slopes: bool) -> bool:
    """Whether a module's gradient is zero for most examples, or (with `slopes`) does not predict a small step."""
    slope, weights = _slope(module, x)
    useless = _dead(slope)
    if 2 * int(useless.sum()) > len(x):
        return True
    if counter.passed or not slopes:  # the gradient of a replacement does not predict small steps
        return False
    step = _MOVES * x.square().mean().sqrt().clamp_min(_LEAST) * slope.sign()
    predicted = (step * slope).flatten(1).sum(1)
    change = (weights * (_seeded(module, x + step) - _seeded(module, x))).flatten(1).sum(1)
    ratio = (change / predicted)[~useless]
    return not _HONEST[0] <= float(ratio.median()) <= _HONEST[1]


def _dead(slope: Tensor) -> Tensor:
    flat = slope.flatten(1)
    return (flat == 0).all(1) | ~flat.isfinite().all(1)


def _slope(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of a fixed combination of a module's outputs, and its weights; zero if the module cuts the graph."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = _seeded(module, leaf, grad=True)
        weights = torch.cos(torch.arange(output[0].numel(), device=x.device, dtype=x.dtype)).view_as(
            output[:1]
        )
        if not output.requires_grad:
            return torch.zeros_like(x), weights
        (slope,) = torch.autograd.grad((weights * output).sum(), leaf, materialize_grads=True)
    return slope, weights


def _seeded(module: nn.Module, x: Tensor, *, grad: bool = False) -> Tensor:
    """Output of a module with the same random numbers at every call."""
    with torch.random.fork_rng(), torch.set_grad_enabled(grad):
        torch.manual_seed(0)
        output: Tensor = module(x.clone())  # a module may change its input in place
        return output


def _kind(module: nn.Module) -> str:
    """Class or function name of a stage."""
    stage = module.stage if isinstance(module, Through) else module
    return str(getattr(stage, "__name__", type(stage).__name__))
