"""Reference networks of an audit of membership, and scores of membership from their outputs."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy, logsigmoid

from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.errors import Remedy, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.outputs import OutputKind, are_probabilities, logits_of, of_classes
from holdfast.core.types import Ids, Inputs, Labels, Mask, PerExample
from holdfast.statistics.intervals import CONFIDENCE, bonferroni, clopper_pearson, upper_tail

LARGEST = 60.0
"""Largest absolute signal. Probabilities that are stored as floats may be exactly 0 or 1, whose logits are infinite."""


def scaled_logit(logits: Tensor, y: Labels) -> Tensor:
    """Return the logit of the probability of the label, `z_y - logsumexp(z_other)`, in float64.

    The logits have the shape (…, n, classes).
    """
    z = logits.double()
    labels = y.expand(z.shape[:-1])[..., None]
    own = z.gather(-1, labels)[..., 0]
    rest = z.scatter(-1, labels, -torch.inf).logsumexp(-1)
    return torch.nan_to_num(own - rest, nan=0.0, posinf=LARGEST, neginf=-LARGEST).clamp(-LARGEST, LARGEST)


PER_RECORD = 62
"""Number of reference networks from which LiRA estimates a variance for each example: those of 64 networks in
complementary pairs. With fewer networks, one variance of all examples is less noisy (the rule of LeakPro)."""
_LEAST_SD = 1e-6


def loss(target: PerExample) -> PerExample:
    """Return the log probability of the label, the attack of Yeom et al., "Privacy Risk in Machine Learning", CSF 2018,
    arXiv:1709.01604. Its order is that of the signal itself.
    """
    return logsigmoid(target)


def labels_only(right: PerExample, references: Tensor | None, inside: Tensor | None) -> PerExample:
    """Return whether the label is predicted (n), minus the share of the reference networks that predict it without
    having been trained on the example, if there are any.
    """
    if references is None or inside is None:
        return right.double()
    return right.double() - _mean(references.double(), ~inside)


def lira_online(target: PerExample, references: Tensor, inside: Tensor) -> PerExample:
    """Return the log ratio of the densities of two normal distributions, fitted to the networks that were trained on
    the example and to those that were not.

    Carlini et al., "Membership Inference Attacks From First Principles", S&P 2022, arXiv:2112.03570.
    """
    per_record = len(references) >= PER_RECORD
    densities = []
    for mask in (inside, ~inside):
        mean = _mean(references, mask)
        sd = _deviation(references, mask, mean, per_record=per_record)
        densities.append(-0.5 * ((target - mean) / sd) ** 2 - sd.log())
    return densities[0] - densities[1]


def lira_offline(target: PerExample, references: Tensor, inside: Tensor) -> PerExample:
    """Return how far the signal exceeds that of networks that were not trained on the example, in their standard
    deviations. The order is that of the probability in the paper of LiRA.
    """
    mean = _mean(references, ~inside)
    sd = _deviation(references, ~inside, mean, per_record=len(references) >= PER_RECORD)
    return (target - mean) / sd


def rmia(
    target: PerExample, references: Tensor, inside: Tensor, *, a: float = 0.3, converted: bool = True
) -> PerExample:
    """Return the log ratio of the probability of the label to its mean over networks with and without the example,
    which is estimated from networks without it: `((1 + a) mean_out + 1 - a) / 2`.

    Zarifzadeh et al., "Low-Cost High-Power Membership Inference Attacks", ICML 2024, arXiv:2312.03262. Its score, the
    share of a population with a smaller ratio (gamma = 1), increases with this ratio, because all examples are compared
    with the same population, so that this is its order without ties. If `converted`, networks that were trained on an
    example are used as well, by `out = (in + a - 1) / a`, as in the authors' code.
    """
    p = references.sigmoid()
    estimates = torch.where(inside, ((p + a - 1) / a).clamp(0, 1), p)
    out = estimates.mean(0) if converted else _mean(p, ~inside)
    return logsigmoid(target) - (((1 + a) * out + 1 - a) / 2).log()


@dataclass(frozen=True)
class Prior:
    """Normal-inverse-gamma prior of the mean and the variance of the signals of an example.

    The defaults were chosen among kappa 1, 2, 4 and alpha 2, 4, 8 on other networks than those of the benchmarks:
    networks of Location-30 with another seed, and networks of Fashion-MNIST. Kappa 2 was better on the first from four
    references on, and worse on the second with two.
    """

    kappa: float = 1.0
    """number of networks that the prior mean counts for"""
    alpha: float = 4.0
    """shape of the inverse-gamma prior of the variance"""


def bavaria(target: PerExample, references: Tensor, inside: Tensor, prior: Prior = Prior()) -> PerExample:
    """Return the log ratio of two Student-t densities: the predictive distributions of the signal of a network that was
    trained on the example, and of one that was not, after the signals of the reference networks.

    Brännvall, "Exponential-Family Membership Inference: From LiRA and RMIA to BaVarIA", 2026, arXiv:2603.11799.
    Differs from the paper: the prior of the signals with an example is centred on their mean over examples that have
    similar signals without it, and the reverse. Its variance is the mean square of the deviations from this centre
    over examples with similar centres.
    """
    densities = []
    for mask in (inside, ~inside):
        n = mask.sum(0).double()
        mean = _mean(references, mask)
        centre = _among_similar(_mean(references, ~mask), mean)
        spread = torch.where(mask, (references - centre) ** 2, 0.0).sum(0) / n.clamp_min(1)
        variance = _among_similar(centre, spread) * prior.kappa / (1 + prior.kappa)
        kappa, alpha = prior.kappa + n, prior.alpha + n / 2
        squares = torch.where(mask, (references - mean) ** 2, 0.0).sum(0)
        beta = (prior.alpha - 1) * variance + squares / 2
        beta = beta + prior.kappa * n * torch.where(n > 0, mean - centre, 0.0) ** 2 / (2 * kappa)
        scale = (beta * (kappa + 1) / (alpha * kappa)).sqrt().clamp_min(_LEAST_SD)
        location = torch.where(n > 0, (prior.kappa * centre + n * mean) / kappa, centre)
        densities.append(_student(target, 2 * alpha, location, scale))
    return densities[0] - densities[1]


def tail_estimate(members: PerExample, non_members: PerExample, fpr: float) -> float:
    """Return an estimate of the true-positive rate of attacks with reference networks at a false-positive rate, from
    the signals of one network: the share of non-members whose signal is lower than that of all members but `fpr`.

    "The Tail Tells All", 2025, arXiv:2510.19773.
    """
    return float((non_members < members.quantile(fpr)).double().mean())


_SIMILAR = 16
"""An example is similar to the 1/16 of all examples around it in an order, and at least to 50."""


def _among_similar(order: PerExample, values: PerExample) -> PerExample:
    """Running mean of values over the examples that are next to each other in the order of other values."""
    n = len(values)
    half = max(n // _SIMILAR, 50) // 2
    places = order.argsort(stable=True)
    sums = torch.cat((values.new_zeros(1), values[places].cumsum(0)))
    at = torch.arange(n)
    low, high = (at - half).clamp_min(0), (at + half + 1).clamp_max(n)
    result = torch.empty_like(values)
    result[places] = (sums[high] - sums[low]) / (high - low)
    return result


def _student(x: Tensor, freedom: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log density of a Student-t distribution."""
    z = (x - location) / scale
    normaliser = torch.lgamma((freedom + 1) / 2) - torch.lgamma(freedom / 2) - 0.5 * (freedom * math.pi).log()
    return normaliser - scale.log() - (freedom + 1) / 2 * torch.log1p(z * z / freedom)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the networks in a mask for each example; the mean of all values in the mask where there is none."""
    counts = mask.sum(0)
    overall = values[mask].mean() if mask.any() else values.mean()
    return torch.where(counts > 0, torch.where(mask, values, 0.0).sum(0) / counts.clamp_min(1), overall)


def _deviation(values: Tensor, mask: Tensor, mean: Tensor, *, per_record: bool) -> Tensor:
    if not per_record:
        return values[mask].std(correction=0).clamp_min(_LEAST_SD)
    squares = torch.where(mask, (values - mean) ** 2, 0.0).sum(0)
    return (squares / mask.sum(0).clamp_min(1)).sqrt().clamp_min(_LEAST_SD)


EXPECTED = 10
"""Number of false positives that a rate must expect. With fewer, the threshold depends on a few examples."""


def needed(fpr: float) -> int:
    """Return the number of non-members that a false-positive rate needs."""
    return math.ceil(EXPECTED / fpr - 1e-9)


def refuse_few(fpr: float, non_members: int) -> None:
    """Raise `UsageError` if a false-positive rate expects fewer than ten false positives among the non-members."""
    if non_members >= needed(fpr):
        return
    message = (
        f"fpr is {fpr:g}, which expects {fpr * non_members:.3g} false positives among {non_members:,} non-members; "
        f"at least {EXPECTED} are needed, so {needed(fpr):,} non-members"
    )
    possible = next(
        (rate for rate in (0.01, 0.02, 0.05, 0.1) if rate > fpr and needed(rate) <= non_members), None
    )
    if possible is None:
        raise UsageError(message)
    raise UsageError(message, Remedy("fpr", possible, reason="with these data"))


def threshold(score: PerExample, member: Mask, fpr: float) -> float:
    """Return the threshold that at most the share `fpr` of the non-members exceed."""
    return _ranked(score[~member], math.floor(fpr * int((~member).sum()) + 1e-9))


def found(score: PerExample, member: Mask, fpr: float) -> Mask:
    """Return which examples have a score above the threshold."""
    return score > threshold(score, member, fpr)


def tpr(score: PerExample, member: Mask, fpr: float) -> float:
    """Return the share of the members that are found."""
    return float(found(score, member, fpr)[member].double().mean())


def auc(score: PerExample, member: Mask) -> float:
    """Return the area under the curve: the probability that a member has a larger score than a non-member, where a tie
    counts half.
    """
    _, places, counts = torch.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[places]
    m, n = int(member.sum()), int((~member).sum())
    return float(ranks[member].sum() - m * (m + 1) / 2) / (m * n)


def tpr_of_one(score: PerExample, member: Mask, fpr: float, confidence: float = CONFIDENCE) -> Estimate:
    """Return the true-positive rate of one network with an interval that covers the choice of the members and of the
    non-members.

    Its ends are one-sided Clopper-Pearson bounds at two thresholds, of which one has a false-positive rate of at most
    `fpr` with high confidence, the other one of at least `fpr`. Each of the four bounds has a quarter of the error.
    """
    tail = (1 - confidence) / 4
    non_members, members = score[~member], score[member]
    n, m = len(non_members), len(members)
    rank = math.floor(fpr * n)
    lower = next((k for k in range(rank, -1, -1) if 1 - upper_tail(k + 1, n, fpr) <= tail), None)
    upper = next((k for k in range(rank, n) if upper_tail(k + 1, n, fpr) <= tail), n)
    confidence = bonferroni(confidence, 2)
    low = 0.0
    if lower is not None:
        low = clopper_pearson(int((members > _ranked(non_members, lower)).sum()), m, confidence)[0]
    high = clopper_pearson(int((members > _ranked(non_members, upper)).sum()), m, confidence)[1]
    value = tpr(score, member, fpr)
    return Estimate(value, min(low, value), max(high, value), m)


def mean_of_networks(values: Sequence[float]) -> Estimate:
    """Return the mean of a rate over networks, with a Student-t interval, in which networks are the sample."""
    from scipy.special import stdtrit

    each = torch.tensor(values, dtype=torch.float64)
    n, mean = len(each), float(each.mean())
    if n == 1:
        return Estimate(mean, 0.0, 1.0, 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * float(each.std()) / math.sqrt(n)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), n)


def _ranked(values: PerExample, rank: int) -> float:
    """The value that `rank` others exceed or equal; -inf if there are not so many."""
    if rank >= len(values):
        return -math.inf
    return float(values.sort(descending=True).values[rank])


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
    """Inputs of a membership audit: the examples, which networks are trained on which of them, and the division of the
    trainings into shards.
    """

    design: Design
    examples: Batch
    """examples of which the audit tests whether they were in the training set"""
    classes: int
    """number of classes of the model"""
    together: int = 2
    """number of networks that one shard trains; an even number"""
    reports_per_network: int = 1
    """number of times that progress is reported while one network is trained: the number of its epochs, or 1 if a
    function of the user trains it"""

    @property
    def shards(self) -> tuple[tuple[int, int], ...]:
        """For each shard, its first network and the network after its last one."""
        networks = self.design.networks
        firsts = range(0, networks, self.together)
        return tuple((first, min(first + self.together, networks)) for first in firsts)
