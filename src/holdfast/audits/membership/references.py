"""Reference networks of an audit of membership, the halves that they are trained on, and controls."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from holdfast.audits.membership.scores import scaled_logit
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import UsageError
from holdfast.core.outputs import OutputKind, are_probabilities, logits_of, of_classes
from holdfast.core.types import Ids, Inputs, Labels, Mask, PerExample

_WIDTH, _FEATURES, _FOLDS = 256, 512, 5
_RIDGE = 0.1  # of the number of training examples, in units of the variance of a feature
_DISTINCT, _COMPARED = 0.9, 5000


def width(members: int, non_members: int) -> float:
    """Return how far the area under the curve of a control may be from 1/2: 0.05, or three standard deviations of that
    of a random score if these are more.
    """
    return max(0.05, 3 * math.sqrt((members + non_members + 1) / (12 * members * non_members)))


def blind_scores(examples: Batch, member: Mask, classes: int, rng: Draws) -> PerExample:
    """Return the scores of a classifier that tells members from non-members by their inputs and labels alone, in
    five-fold cross-validation.

    It is a ridge regression on the inputs (a random projection of large ones), on random features of them, and on the
    labels. It does not use the audited model, so that what it finds is a difference between the data.
    """
    inputs = torch.nan_to_num(examples.x.flatten(1).double().cpu())
    if inputs.shape[1] > _WIDTH:
        dimensions = torch.arange(inputs.shape[1])
        inputs = inputs @ rng.at("projection").normal(dimensions, _WIDTH, dtype=torch.float64)
    inputs = _standardised(inputs)
    weights = rng.at("features").normal(torch.arange(inputs.shape[1]), _FEATURES, dtype=torch.float64)
    random = (
        inputs @ weights / math.sqrt(inputs.shape[1])
        + rng.at("shift").normal(torch.zeros(1, dtype=torch.int64), _FEATURES, dtype=torch.float64)
    ).relu()
    labels = torch.nn.functional.one_hot(examples.y.cpu(), classes).double()
    features = _standardised(torch.cat((inputs, random, labels), 1))
    folds = rng.at("fold").uniform(torch.arange(len(inputs))).argsort(stable=True) % _FOLDS
    target = member.double() - member.double().mean()
    score = torch.empty_like(target)
    for fold in range(_FOLDS):
        fitted = folds != fold
        a = features[fitted]
        gram = a.T @ a + _RIDGE * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
        score[~fitted] = features[~fitted] @ torch.linalg.solve(gram, a.T @ target[fitted])
    return score


def refuse_shared(members: Batch, non_members: Batch) -> None:
    """Raise `UsageError` if an input occurs among the members and among the non-members."""
    known = {print_: int(row) for print_, row in zip(members.fingerprints(), members.ids, strict=True)}
    both = [
        (known[print_], int(row))
        for print_, row in zip(non_members.fingerprints(), non_members.ids, strict=True)
        if print_ in known
    ]
    if both:
        raise UsageError(
            f"{len(both):,} of the {len(non_members):,} non-members are also among the members, such as row "
            f"{both[0][1]} (row {both[0][0]} of the members); remove them from the non-members"
        )


def first_copies(examples: Batch) -> Batch:
    """Return the examples without those whose input occurred before."""
    seen: set[bytes] = set()
    kept = []
    for row, print_ in enumerate(examples.fingerprints()):
        if print_ not in seen:
            seen.add(print_)
            kept.append(row)
    return (
        examples
        if len(kept) == len(examples)
        else examples.take(torch.tensor(kept, device=examples.x.device))
    )


def is_rounded(signal: PerExample) -> bool:
    """Return whether more than a tenth of the signals of distinct inputs are equal to another one. Sums of the same
    rounded probabilities differ in their last digits, so that signals are compared to five decimals, and only some:
    among very many, equal ones occur by chance.
    """
    some = signal[:_COMPARED].round(decimals=5)
    return len(torch.unique(some)) < _DISTINCT * len(some)


def are_labels(logits: Tensor) -> bool:
    """Return whether outputs (n, classes) contain only labels: each row has one value for the predicted class and one
    for all others.
    """
    top = logits.max(1, keepdim=True).values
    rest = torch.where(logits == top, -torch.inf, logits).max(1, keepdim=True).values
    two = ((logits == top) | (logits == rest)).all(1) & ((logits == top).sum(1) == 1)
    same = len(torch.unique(top)) == 1 and len(torch.unique(rest)) == 1
    return logits.shape[1] > 1 and same and bool(two.all())


def _standardised(features: Tensor) -> Tensor:
    return (features - features.mean(0)) / features.std(0, correction=0).clamp_min(1e-6)


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

    scaled_logit: Tensor
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
        return Signals(self.scaled_logit[rows], self.right[rows], self.labels[rows], self.probabilities[rows])

    @classmethod
    def over_examples(cls, parts: Sequence["Signals"]) -> "Signals":
        """Return the signals of the same networks about several groups of examples as those about one group."""
        return cls(
            torch.cat([part.scaled_logit for part in parts], 1),
            torch.cat([part.right for part in parts], 1),
            torch.stack([part.labels for part in parts]).all(0),
            torch.stack([part.probabilities for part in parts]).all(0),
        )


def signals_of(logits: Tensor, y: Labels, *, labels: bool = False) -> Signals:
    """Return the signals of one network from its logits (n, classes), with `labels` of one that gives labels only."""
    labels = labels or are_labels(logits)
    return Signals(
        scaled_logit(logits, y).cpu()[None],
        (logits.argmax(1) == y).cpu()[None],
        torch.tensor([labels]),
        torch.tensor([not labels and are_probabilities(logits)]),
    )


def joined(parts: Sequence[Signals]) -> Signals:
    """Return the signals of several groups of networks as those of one group."""
    return Signals(
        torch.cat([part.scaled_logit for part in parts]),
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


@dataclass(frozen=True)
class Design:
    """Which examples are members of which networks, and what is compared."""

    n: int
    """number of examples"""
    networks: int
    """number of reference networks, or of networks that are targets in turn"""
    fpr: float
    seed: int
    members: int | None = None
    """number of the first examples, those that the model was trained on; None if a training procedure is audited"""
    groups: Mapping[str, Mask] = field(default_factory=dict)
    """members of each group, by name, as a mask of the examples"""

    @property
    def rng(self) -> Draws:
        """Random numbers of the audit."""
        return Draws(self.seed).at("membership")

    @property
    def member(self) -> Mask:
        """Mask of the training examples of the model, or of the first network."""
        return self.inside()[0] if self.members is None else self.places < self.members

    @property
    def places(self) -> Tensor:
        """Positions of the examples, by which random numbers are drawn; ids may occur in two data sets."""
        return torch.arange(self.n)

    def inside(self) -> Tensor:
        """Return which examples each network is trained on."""
        return halves(self.places, self.networks, self.rng)

    def null(self) -> Tensor:
        """Return other halves, which no network was trained on."""
        return halves(self.places, max(self.networks, 2), self.rng.at("null"))


@dataclass(frozen=True)
class MembershipAudit:
    """What is audited, and how."""

    design: Design
    examples: Batch
    classes: int
    together: int = 2
    """number of networks that one shard trains; an even number"""
    epochs: int = 1
    """number of times that progress is reported for each network"""

    @property
    def shards(self) -> tuple[tuple[int, int], ...]:
        """For each shard, its first network and the network after its last one."""
        networks = self.design.networks
        firsts = range(0, networks, self.together)
        return tuple((first, min(first + self.together, networks)) for first in firsts)
