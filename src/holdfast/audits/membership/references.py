"""Reference networks of an audit of membership: the halves that they are trained on, and their training.

Networks of one architecture are trained as one network with batched weights (`torch.func.stack_module_state`) where
their layers allow it, else one after another.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from holdfast.audits.membership.controls import are_labels
from holdfast.audits.membership.signals import phi
from holdfast.core.draws import Draws
from holdfast.core.outputs import OutputKind, are_probabilities, logits_of, of_classes
from holdfast.core.types import Ids, Inputs, Labels

_PIECE = 512  # examples in one forward pass of all networks


def halves(ids: Ids, networks: int, rng: Draws) -> Tensor:
    """Return which examples each network is trained on, as a mask (networks, n), for an even number of networks.

    Networks 2k and 2k + 1 are trained on complementary random halves, so that each example is in exactly half of the
    networks.
    """
    masks = []
    for pair in range(networks // 2):
        order = rng.at("half", pair).uniform(ids, dtype=torch.float64).argsort(stable=True)
        inside = torch.zeros(len(ids), dtype=torch.bool)
        inside[order[: len(ids) // 2].cpu()] = True
        masks += [inside, ~inside]
    return torch.stack(masks)


def others(network: int, networks: int) -> list[int]:
    """Return the networks with which a network is compared: all others except that of the complementary half.

    With the complement, the number of networks that an example was trained in would state whether it is a member.
    """
    return [place for place in range(networks) if place // 2 != network // 2]


@dataclass(frozen=True)
class ReferenceTraining:
    """The training of networks without a training function: Adam on the cross-entropy."""

    epochs: int = 30
    lr: float = 1e-3
    batch: int = 64


@dataclass(frozen=True)
class Signals:
    """What networks say about examples."""

    phi: Tensor
    """logit of the probability of the label (networks, n), float64"""
    right: Tensor
    """whether the label has the largest score (networks, n)"""
    labels: Tensor
    """whether each network gives labels only (networks)"""
    probabilities: Tensor
    """whether each network gives probabilities that are used as logits (networks)"""

    def of(self, networks: Sequence[int]) -> "Signals":
        """Return the signals of some of the networks."""
        rows = list(networks)
        return Signals(self.phi[rows], self.right[rows], self.labels[rows], self.probabilities[rows])

    @classmethod
    def over_examples(cls, parts: Sequence["Signals"]) -> "Signals":
        """Return the signals of the same networks about several groups of examples as those about one group."""
        return cls(
            torch.cat([part.phi for part in parts], 1),
            torch.cat([part.right for part in parts], 1),
            torch.stack([part.labels for part in parts]).all(0),
            torch.stack([part.probabilities for part in parts]).all(0),
        )


def signals_of(logits: Tensor, y: Labels, *, labels: bool = False) -> Signals:
    """Return the signals of one network from its logits (n, classes), with `labels` of one that gives labels only."""
    labels = labels or are_labels(logits)
    return Signals(
        phi(logits, y).cpu()[None],
        (logits.argmax(1) == y).cpu()[None],
        torch.tensor([labels]),
        torch.tensor([not labels and are_probabilities(logits)]),
    )


def joined(parts: Sequence[Signals]) -> Signals:
    """Return the signals of several groups of networks as those of one group."""
    return Signals(
        torch.cat([part.phi for part in parts]),
        torch.cat([part.right for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.probabilities for part in parts]),
    )


def trained_signals(
    nets: Sequence[nn.Module],
    x: Inputs,
    y: Labels,
    inside: Tensor,
    how: ReferenceTraining,
    rng: Sequence[Draws],
    output: OutputKind | None = None,
    progress: Callable[[int], None] = lambda n: None,
) -> Signals:
    """Train each network on its examples in the mask `inside` (networks, n), and return what they say about all `x`.

    `progress` is called with the number of networks that are trained at once, after each of their epochs.
    """
    if batched(nets, x):
        return _fitted(list(nets), x, y, inside, how, rng, output, progress)
    return joined(
        [
            _fitted([net], x, y, inside[k : k + 1], how, rng[k : k + 1], output, progress)
            for k, net in enumerate(nets)
        ]
    )


def batched(nets: Sequence[nn.Module], x: Inputs) -> bool:
    """Return whether the networks can be run as one network with batched weights, in training and in eval mode."""
    if len(nets) == 1:
        return False
    try:
        copies = [deepcopy(net).train() for net in nets[:2]]
        forward, _ = _together(copies)
        with torch.no_grad():
            forward(torch.stack([x[:4], x[:4]]))
    except (
        RuntimeError,
        ValueError,
        TypeError,
    ):  # operations without a rule for batches, or layers with a state
        return False
    return not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in nets[0].modules())


def _fitted(
    nets: list[nn.Module],
    x: Inputs,
    y: Labels,
    inside: Tensor,
    how: ReferenceTraining,
    rng: Sequence[Draws],
    output: OutputKind | None,
    progress: Callable[[int], None],
) -> Signals:
    for net in nets:
        net.train()
    forward, parameters = _together(nets) if len(nets) > 1 else _alone(nets[0])
    optimizer = torch.optim.Adam(parameters, lr=how.lr, fused=True)
    finished = 0
    with torch.enable_grad():
        for epoch, rows in _batches(inside, how, rng, x.device):
            if epoch > finished:
                finished = epoch
                progress(len(nets))
            logits = of_classes(forward(x[rows]).flatten(0, 1), output)
            loss = cross_entropy(logits, y[rows].flatten(), reduction="sum") / rows.shape[1]
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    progress(len(nets))
    for net in nets:
        net.eval()
    parts = []
    with torch.no_grad():
        for start in range(0, len(x), _PIECE):
            piece, labels = x[start : start + _PIECE], y[start : start + _PIECE]
            outputs = forward(piece.expand(len(nets), *piece.shape))
            logits = of_classes(outputs.flatten(0, 1), output).view(len(nets), len(piece), -1)
            parts.append(joined([signals_of(each, labels) for each in logits]))
    return Signals.over_examples(parts)


def _batches(
    inside: Tensor, how: ReferenceTraining, rng: Sequence[Draws], device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """Epoch of each update, and the positions (networks, batch) of its examples. Networks have equally many examples,
    up to one.
    """
    members = [mask.nonzero()[:, 0] for mask in inside]
    n = min(map(len, members))
    size = min(how.batch, n)
    for epoch in range(how.epochs):
        orders = [
            rows[draws.at("order", epoch).uniform(rows, dtype=torch.float64).argsort(stable=True)]
            for rows, draws in zip(members, rng, strict=True)
        ]
        shuffled = torch.stack([order[:n] for order in orders]).to(device)
        for start in range(0, n - size + 1, size):
            yield epoch, shuffled[:, start : start + size]


Forward = Callable[[Tensor], Tensor]


def _together(nets: Sequence[nn.Module]) -> tuple[Forward, list[Tensor]]:
    """The outputs (networks, n, classes) of inputs (networks, n, *features), and the batched weights."""
    parameters, buffers = stack_module_state(list(nets))
    skeleton = nets[0]

    def one(weights: dict[str, Tensor], states: dict[str, Tensor], x: Tensor) -> Tensor:
        return _tensor(functional_call(skeleton, (weights, states), (x,)), skeleton)

    run = vmap(one, randomness="different")
    return lambda x: run(parameters, buffers, x), list(parameters.values())


def _tensor(outputs: object, net: nn.Module) -> Tensor:
    logits = logits_of(outputs, in_training=net.training)
    assert isinstance(logits, Tensor)
    return logits


def _alone(net: nn.Module) -> tuple[Forward, list[Tensor]]:
    def forward(x: Tensor) -> Tensor:
        return _tensor(net(x[0]), net)[None]

    return forward, [parameter.requires_grad_() for parameter in net.parameters()]
