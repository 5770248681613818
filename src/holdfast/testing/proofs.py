"""Tests of properties that every prover must have. Each function raises `AssertionError` with numbers if a prover does
not have the property.

The main law is: certified radius <= exact distance <= distance of any successful attack. Exact distances are those of
linear models (`holdfast.testing.fakes`) and of small ReLU networks (`holdfast.testing.fakes`). Other packages can run
the laws on their provers:

    @pytest.mark.parametrize("law", proofs.PROVER_LAWS)
    def test_law(law):
        law(ProverCase(MyProver(), Linf))
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from weakref import WeakKeyDictionary

import torch

from holdfast.attacks import FMN, PGD
from holdfast.certifiers.bounds.graph import Graph
from holdfast.certifiers.protocol import Proofs, Prover
from holdfast.certifiers.provers import GraphProver, prepared_graph
from holdfast.core.batch import Batch
from holdfast.core.constraints import L1, L2, Linf, allowed
from holdfast.core.draws import Draws
from holdfast.core.meter import margin
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import PerExample
from holdfast.testing.fakes import (
    LinearOracle,
    ReLUOracle,
    examples,
    labelled,
    linear_problem,
    network,
    relu_problem,
)
from holdfast.testing.laws import broken

_SIZES = {Linf: 0.03, L2: 0.15, L1: 0.6}
"""radius of each norm at which the networks of `holdfast.testing.fakes` have certified and broken examples"""
_ROUNDING = 1e-6
"""relative tolerance of comparisons of margins; the networks are in float64"""
_CHOICES = 1e-4
"""relative difference of bounds between batches: rounding may decide between two linear bounds that are equally good"""


_GRAPHS: WeakKeyDictionary[Classifier, Graph] = WeakKeyDictionary()
"""graphs of the models of the laws, whose weights and examples do not change"""


@dataclass(frozen=True)
class ProverCase:
    """A prover and a norm, for which the properties of provers are tested."""

    prover: Prover
    norm: type[Linf] | type[L2] | type[L1]
    tight: float = 0.1
    """an example of a linear model must be certified if eps is at most this fraction of its exact distance"""

    def __repr__(self) -> str:
        return f"{self.prover.name}-{self.norm.name}"

    def proofs(self, model: Classifier, batch: Batch, eps: float) -> Proofs:
        """Return what the prover proves about the examples of a batch within eps."""
        threat, prover = ThreatModel(self.norm(eps)), self.prover
        if not isinstance(prover, GraphProver) or "ready" in vars(type(prover)):
            return prover.ready(model, batch, threat)(batch)
        # to trace a network again for each eps would take most of the time of the laws
        if model not in _GRAPHS:
            _GRAPHS[model] = prepared_graph(model, batch)
        return prover.on(_GRAPHS[model], model, threat)(batch)


@dataclass(frozen=True)
class _Known:
    """A model and examples whose distances to the decision boundary are known."""

    description: str
    model: Classifier
    batch: Batch
    exact: PerExample


@cache
def _oracles() -> tuple[tuple[str, LinearOracle | ReLUOracle, Classifier, Batch], ...]:
    """Models with known distances, with a description and examples; the same ones for all provers and norms."""
    oracles: list[tuple[str, LinearOracle | ReLUOracle, Classifier, Batch]] = []
    for seed, classes in ((0, 2), (1, 3), (2, 10)):
        linear, batch = linear_problem(seed, n=8, classes=classes)
        oracles.append((f"a linear model of {classes} classes", linear, linear.classifier(), batch))
    for seed in range(3):
        relu, batch = relu_problem(seed)
        oracles.append((f"ReLU network {seed}", relu, relu.classifier(), batch))
    return tuple(oracles)


@cache
def _known(norm: Linf | L2 | L1) -> tuple[_Known, ...]:
    return tuple(
        _Known(description, model, batch, oracle.distance(batch.x, batch.y, norm))
        for description, oracle, model, batch in _oracles()
    )


def never_exceeds_the_exact_distance(case: ProverCase) -> None:
    """Check that no example is certified at an eps that is at least its exact distance to the decision boundary, on
    linear models and on small ReLU networks.

    As eps, the distances of every second example are used, slightly increased.
    """
    for known in _known(case.norm(1.0)):
        for distance in known.exact[known.exact < torch.inf].sort().values[::2].tolist():
            eps = 1.001 * distance + 1e-9
            proofs = case.proofs(known.model, known.batch, eps)
            wrong = proofs.certified & (known.exact <= eps)
            assert not wrong.any(), (
                f"{case}: certifies at eps {eps} examples of {known.description} whose exact distance is "
                f"{known.exact[wrong].tolist()}"
            )


def certifies_far_examples(case: ProverCase) -> None:
    """Check that the prover certifies examples of linear models whose exact distance is well above eps."""
    for known in _known(case.norm(1.0)):
        if "linear" not in known.description:
            continue
        eps = case.tight * float(known.exact.median())
        proofs = case.proofs(known.model, known.batch, eps)
        missed = ~proofs.certified & (known.exact >= eps / case.tight)
        assert not missed.any(), (
            f"{case}: does not certify at eps {eps} examples of {known.description} whose exact distance is "
            f"{known.exact[missed].tolist()}"
        )


def never_exceeds_a_successful_attack(case: ProverCase) -> None:
    """Check that no example is certified at an eps within which an attack succeeds, on networks whose exact distances
    are not known.
    """
    for seed in range(2):
        model, batch, _ = _unknown(case, seed)
        x_adv = FMN(steps=40)(model, batch, ThreatModel(case.norm()), rng=Draws(seed))
        distance = case.norm(1.0).distance(x_adv, batch.x)
        fooled = broken(model, batch, x_adv)
        assert fooled.all(), f"{case}: the attack leaves examples of an undefended network"
        for eps in distance.sort().values[::3].tolist():
            proofs = case.proofs(model, batch, 1.001 * eps + 1e-9)
            wrong = proofs.certified & (distance <= eps)
            assert not wrong.any(), (
                f"{case}: certifies at eps {eps} examples that an attack breaks at {distance[wrong].tolist()}"
            )


def bounds_every_margin(case: ProverCase) -> None:
    """Check that the margin of no input of the threat model is below the bound of its example: neither of random ones,
    nor of attacked ones.
    """
    for seed in range(2):
        model, batch, eps = _unknown(case, seed)
        constraint = case.norm(eps)
        bound = case.proofs(model, batch, eps).bound
        points = [constraint.sample(batch, model.bounds, Draws(seed).at("sample", k)) for k in range(20)]
        points.append(PGD(steps=20)(model, batch, ThreatModel(constraint), rng=Draws(seed)))
        for x in (batch.x, *points):
            with torch.no_grad():
                actual = margin(model(x), batch)
            below = actual < bound - _ROUNDING * (1 + bound.abs())
            assert not below.any(), (
                f"{case}: bounds margins by {bound[below].tolist()} that are {actual[below].tolist()} at an input of "
                "the threat model"
            )


def certifies_by_its_bound(case: ProverCase) -> None:
    """Check that the columns of the result fit each other: an example is certified exactly if its bound is positive,
    and is never certified and broken at once.
    """
    model, batch, eps = _unknown(case)
    for factor in (0.1, 1.0, 10.0):
        proofs = case.proofs(model, batch, factor * eps)
        assert torch.equal(proofs.certified, proofs.bound > 0), f"{case}: certifies without a positive bound"
        assert not (proofs.certified & proofs.broken).any(), f"{case}: certifies and breaks the same example"
        assert not proofs.bound.isnan().any(), f"{case}: returns NaN as a bound"


def breaks_only_by_real_counterexamples(case: ProverCase) -> None:
    """Check that each counterexample is an input of the threat model that the model misclassifies, and that the input
    of any other example is the clean one.
    """
    for known in _known(case.norm(1.0)):
        eps = 1.5 * float(known.exact.median())
        proofs = case.proofs(known.model, known.batch, eps)
        constraint = case.norm(eps)
        inside = allowed(constraint, proofs.x_adv, known.batch.x, known.model.bounds)
        assert inside.all(), f"{case}: a counterexample is outside of {constraint}"
        fooled = broken(known.model, known.batch, proofs.x_adv)
        assert fooled[proofs.broken].all(), f"{case}: a counterexample is classified correctly"
        unchanged = (proofs.x_adv == known.batch.x).flatten(1).all(1)
        assert unchanged[~proofs.broken].all(), f"{case}: changes an example without breaking it"


def certifies_no_misclassified_example(case: ProverCase) -> None:
    """Check that an example whose clean input is misclassified, or whose logits are NaN, is not certified, not even
    with a very small eps.
    """
    model, batch, _ = _unknown(case)
    wrong = batch.labelled((batch.y + 1) % 4)
    assert not case.proofs(model, wrong, 1e-6).certified.any(), f"{case}: certifies misclassified examples"
    undefined = batch.at(batch.x.clone())
    undefined.x[0] = torch.nan
    threat = ThreatModel(case.norm(1e-6))
    proofs = case.prover.ready(model, batch, threat)(undefined)
    assert not proofs.certified[0], f"{case}: certifies an example that is not a number"


def ignores_other_examples(case: ProverCase) -> None:
    """Check that what is proved about an example does not depend on the batch size, the order of the batch or its other
    examples, and that an empty batch is accepted. The bound of an example that a time limit ended may depend on time.
    """
    model, batch, eps = _unknown(case)
    ready = case.prover.ready(model, batch, ThreatModel(case.norm(eps)))
    together = ready(batch)
    order = torch.arange(len(batch)).flip(0)
    for name, parts in (
        ("batches of one", [ready(part) for part in batch.split(1)]),
        ("another order", [ready(batch.take(order[k : k + 4])) for k in range(0, len(batch), 4)]),
    ):
        bound, stopped = (torch.cat([getattr(part, each) for part in parts]) for each in ("bound", "stopped"))
        if name == "another order":
            bound, stopped = bound.flip(0), stopped.flip(0)
        difference = (bound - together.bound).abs().masked_fill(stopped | together.stopped, 0.0)
        assert (difference <= _CHOICES * (1 + together.bound.abs())).all(), (
            f"{case}: {name} changes the bounds by {difference.tolist()}"
        )
    empty = ready(batch.take(torch.zeros(0, dtype=torch.int64)))
    assert len(empty.certified) == len(empty.bound) == 0, f"{case}: proves something about no example"


def proves_in_float32(case: ProverCase) -> None:
    """Check that no example of a linear model in float32 is certified at its exact distance, where rounding decides."""
    for oracle, model, batch in _in_float32():
        for row, eps in enumerate(oracle.distance(batch.x, batch.y, case.norm(1.0)).tolist()):
            if eps < torch.inf:
                proofs = case.proofs(model, batch, eps)
                assert not proofs.certified[row], f"{case}: certifies an example at its exact distance {eps}"


@cache
def _in_float32() -> tuple[tuple[LinearOracle, Classifier, Batch], ...]:
    problems = [linear_problem(seed, n=3, dtype=torch.float32) for seed in range(3)]
    return tuple((oracle, oracle.classifier().requires_grad_(False), batch) for oracle, batch in problems)


def _unknown(case: ProverCase, seed: int = 0) -> tuple[Classifier, Batch, float]:
    """A small network, examples that it classifies correctly, and an eps at which some are certified."""
    return *_network(seed), _SIZES[case.norm]


@cache
def _network(seed: int) -> tuple[Classifier, Batch]:
    model = network(seed)
    return model, labelled(model, examples(seed, n=9))


PROVER_LAWS: tuple[Callable[[ProverCase], None], ...] = (
    never_exceeds_the_exact_distance,
    never_exceeds_a_successful_attack,
    bounds_every_margin,
    certifies_far_examples,
    certifies_by_its_bound,
    breaks_only_by_real_counterexamples,
    certifies_no_misclassified_example,
    ignores_other_examples,
    proves_in_float32,
)
"""all laws of provers, for `pytest.mark.parametrize`"""
