"""Every law on every prover, and unsound provers that the laws catch."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from holdfast.certifiers.bounds.lipschitz import Lipschitz
from holdfast.certifiers.branching import AlphaCrown, BranchAndBound
from holdfast.certifiers.provers import IBP, Crown, CrownIBP, GraphProver
from holdfast.core.constraints import L1, L2, Linf
from holdfast.core.threat import ThreatModel
from holdfast.testing import proofs
from holdfast.testing.fakes import ReLUOracle, linear_problem, relu_problem
from holdfast.testing.proofs import ProverCase

TIGHT = {Linf: 0.9, L2: 0.9, L1: 0.5}
"""an L1 ball is relaxed where it is cut by the bounds of the inputs"""
CASES = [
    *(ProverCase(IBP(), norm) for norm in TIGHT),
    *(ProverCase(CrownIBP(), norm, tight=tight) for norm, tight in TIGHT.items()),
    *(ProverCase(Crown(), norm, tight=tight) for norm, tight in TIGHT.items()),
    *(ProverCase(AlphaCrown(steps=5), norm, tight=tight) for norm, tight in TIGHT.items()),
    *(ProverCase(BranchAndBound(timeout_s=5, steps=5), norm, tight=tight) for norm, tight in TIGHT.items()),
    ProverCase(Lipschitz(), L2, tight=0.9),
]


def one_norm_quickly(cases):
    """The cases as parameters of which all but the first of each prover are slow."""
    first = {type(case.prover): case for case in reversed(cases)}.values()
    return [
        pytest.param(case, marks=() if case in first else pytest.mark.slow, id=repr(case)) for case in cases
    ]


@pytest.mark.parametrize("law", proofs.PROVER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", one_norm_quickly(CASES))
def test_law(case, law):
    law(case)


@dataclass(frozen=True)
class Unsound(GraphProver):
    """CROWN with a planted error."""

    error: str
    name: ClassVar[str] = "unsound"

    def on(self, graph, model, threat):
        eps, norm = threat.constraint.eps, type(threat.constraint)
        if self.error == "radius":
            eps = 0.9 * eps
        prover = Crown().on(graph, model, ThreatModel(norm(eps)))

        def proofs(batch):
            proved = prover(batch)
            match self.error:
                case "offset":
                    bound = proved.bound + 1.0
                    return replace(proved, bound=bound, certified=bound > 0)
                case "counterexample":
                    return replace(proved, broken=~proved.certified)
                case "nan":
                    with torch.no_grad():
                        ok = ~(model(batch.x).argmax(1) != batch.y)
                    return replace(proved, certified=ok, bound=torch.where(ok, 1.0, -1.0).double())
                case "batch":
                    bound = proved.bound.amax().expand(len(batch)) if len(batch) else proved.bound
                    return replace(proved, bound=bound, certified=bound > 0)
                case _:
                    return proved

        return proofs


@pytest.mark.parametrize(
    "error, law",
    [
        ("radius", proofs.never_exceeds_the_exact_distance),
        ("radius", proofs.never_exceeds_a_successful_attack),
        ("offset", proofs.never_exceeds_the_exact_distance),
        ("offset", proofs.bounds_every_margin),
        ("offset", proofs.proves_in_float32),
        ("counterexample", proofs.breaks_only_by_real_counterexamples),
        ("nan", proofs.certifies_no_misclassified_example),
        ("batch", proofs.ignores_other_examples),
    ],
)
def test_the_laws_catch_an_unsound_prover(error, law):
    law(ProverCase(Crown(), Linf))
    with pytest.raises(AssertionError, match="unsound-linf: "):
        law(ProverCase(Unsound(error), Linf))


def test_exact_distances_of_relu_networks_are_those_of_linear_models():
    linear, batch = linear_problem(3, n=6, features=4)
    # a hidden layer that is always active changes nothing
    shifted = torch.eye(4, dtype=torch.float64)
    from_linear = ReLUOracle(
        (shifted, linear.weight), (torch.full((4,), 1.0).double(), linear.bias - linear.weight.sum(1))
    )
    for norm in (Linf(1.0), L2(1.0), L1(1.0)):
        expected = linear.distance(batch.x, batch.y, norm)
        torch.testing.assert_close(from_linear.distance(batch.x, batch.y, norm), expected)


def test_exact_distances_of_relu_networks_are_those_of_a_grid():
    relu, batch = relu_problem(0, features=2)
    side = torch.linspace(0, 1, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    predicted = relu(grid).argmax(1)
    for norm in (Linf(1.0), L2(1.0), L1(1.0)):
        exact = relu.distance(batch.x, batch.y, norm)
        for x, y, distance in zip(batch.x, batch.y, exact, strict=True):
            wrong = grid[predicted != y]
            nearest = float(norm.distance(wrong, x.expand_as(wrong)).amin())
            assert distance <= nearest <= distance + 2 / 300
