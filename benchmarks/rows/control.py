"""A linear policy of the cart-pole, and the linear-quadratic regulator, whose attacks and certificates are known."""

import torch
from torch import nn

from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits.control import DIRECTED, GREEDY, LEARNED, ControlRun, attacker_of
from holdfast.control.attackers import Ball, GreedyFlip, MaximalDifference, View, episodes
from holdfast.control.certification import certified_actions
from holdfast.control.environments import LQR, CartPole, Environment
from holdfast.control.policies import Policy, policy_of
from holdfast.core.draws import Draws
from holdfast.threats.policies import Observations

WHAT = "attackers and certificates of a linear policy of the cart-pole and of the linear-quadratic regulator"
EPS, EPISODES, STATES, SAMPLES = 0.1, 100, 10_000, 100
WEIGHTS = (0.0, 0.5, 2.0, 1.0)
MOST = {GREEDY: (176, 20), DIRECTED: (77, 15)}
"""mean return that others measured, and the largest difference from it"""


def linear(weights: torch.Tensor, environment: Environment) -> Policy:
    """The policy with one score or action, the product with the weights."""
    net = nn.Linear(len(weights), 1, bias=False)
    net.weight.data = weights[None].clone()
    return policy_of(net, environment, "linear")


def states(*scales: float) -> torch.Tensor:
    return torch.randn(STATES, len(scales), generator=torch.Generator().manual_seed(0)) * torch.tensor(scales)


def returns(policy: Policy, eps: float) -> Cells:
    """The mean return of a policy of the cart-pole under each attacker."""
    how = ControlRun(CartPole(), policy, Observations("linf", eps), "", EPISODES, 0)
    ball, seeds = how.ball(), how.seeds("judged", EPISODES)
    return {
        stage: float(
            episodes(
                how.environment, policy, attacker_of(how, stage, ball), ball, seeds, how.rng.at(stage)
            ).returns.mean()
        )
        for stage in how.stages
    }


def agreement() -> tuple[float, float]:
    """Shares of the states in which the attack and the certificate agree with `|w·s| <= eps |w|_1`."""
    weights = torch.tensor(WEIGHTS)
    policy, x, ball = linear(weights, CartPole()), states(1, 0.5, 0.1, 0.3), Ball("linf", EPS, torch.ones(4))
    flippable = (x.double() @ weights.double()).abs() <= EPS * float(weights.abs().sum())
    clean = policy.outputs(x).argmax(1)
    view = View(policy, None, ball, torch.arange(STATES), 0, Draws(0))
    agreed = [
        float(((policy.outputs(attack(x, view)).argmax(1) != clean) == flippable).double().mean())
        for attack in (MaximalDifference(), GreedyFlip())
    ]
    fixed = certified_actions(policy, x, ball).fixed
    return min(agreed), float((fixed == ~flippable).double().mean())


def regulator() -> tuple[float, float, int]:
    """The errors of the largest change that an attack reaches and of the certified one; sampled changes outside."""
    gain, x, ball = LQR().gain().float()[0], states(0.3, 0.3), Ball("linf", EPS, torch.ones(2))
    policy = linear(-gain, LQR())
    exact, clean = EPS * float(gain.double().abs().sum()), policy.outputs(x)
    view = View(policy, None, ball, torch.arange(STATES), 0, Draws(0))
    reached = float((policy.outputs(MaximalDifference()(x, view)) - clean).abs().max())
    proved = certified_actions(policy, x, ball)
    outside = 0
    for k in range(SAMPLES):
        noise = EPS * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(k)) - 1)
        outputs = policy.outputs(x + noise)
        outside += int(((outputs < proved.low) | (outputs > proved.high)).sum())
    return abs(reached - exact), float((proved.high - clean).max()) - exact, outside


def measured() -> Outcome:
    means = returns(linear(torch.tensor(WEIGHTS), CartPole()), EPS)
    attack, certificate = agreement()
    error, excess, outside = regulator()
    claims = []
    for stage, (known, most) in MOST.items():
        difference = abs(float(means[stage]) - known)
        claims.append(Claim(f"{stage}: difference from the mean return {known} <= {most}", difference, most))
    claims += [
        Claim("mean return under the learned adversary <= 92", float(means[LEARNED]), 92),
        Claim("share of states in which the attack is exact >= 1", attack, 1, least=True),
        Claim("share of states in which the certificate is exact >= 1", certificate, 1, least=True),
        Claim("regulator: error of the largest change of the action <= 1e-6", error, 1e-6),
        Claim("regulator: sampled changes outside of the certified interval <= 0", outside, 0),
    ]
    table: list[Cells] = [{"attacker": stage, "mean return": mean} for stage, mean in means.items()]
    config = {"weights": WEIGHTS, "eps": EPS, "episodes": EPISODES, "seed": 0, "states": STATES}
    notes = [
        f"the certified interval of the regulator is wider than exact by {excess:.1e}, the rounding in float32"
    ]
    return Outcome(table, claims, config, {}, notes)
