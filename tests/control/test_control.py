"""Environments, attackers and certificates of policies, compared with exact solutions and with gymnasium."""

import base64
import io
import zipfile
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.audits import control
from holdfast.audits.audit import open_audit
from holdfast.audits.control import ControlRun, Row, finding_of
from holdfast.control.attackers import (
    Ball,
    Directed,
    GreedyFlip,
    MaximalDifference,
    RandomNoise,
    Unattacked,
    View,
    episodes,
)
from holdfast.control.certification import certified_actions
from holdfast.control.environments import LQR, Box, CartPole, Discrete, Gymnasium, ignores_seed
from holdfast.control.hardening import Hardening, hardened
from holdfast.control.learning import PPO, learned_adversary
from holdfast.control.opening import open_environment, open_policy
from holdfast.control.policies import Network, Policy, policy_of
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.runs.documents.stored_runs import run_entry
from holdfast.threats.policies import Observations
from holdfast.verbs.settings import Assess, Certify, Harden
from onnx_networks import write_mlp

WEIGHTS = torch.tensor([0.0, 0.5, 2.0, 1.0])


def linear(weights: torch.Tensor = WEIGHTS) -> nn.Module:
    net = nn.Linear(len(weights), 1, bias=False)
    net.weight.data = weights[None].clone()
    return net


def view(policy: Policy, ball: Ball, n: int) -> View:
    return View(policy, None, ball, torch.arange(n), 0, Draws(0))


def box(eps: float, d: int = 4, norm: str = "linf") -> Ball:
    return Ball(norm, eps, torch.ones(d))


def states(n: int, *scales: float) -> torch.Tensor:
    return torch.randn(n, len(scales), generator=torch.Generator().manual_seed(0)) * torch.tensor(scales)


def test_cartpole_equals_that_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    peer, own = gymnasium.make("CartPole-v1").unwrapped, CartPole()
    for seed in range(20):
        start, _ = peer.reset(seed=seed)
        own.begin(torch.tensor(np.array(peer.state))[None])
        np.testing.assert_allclose(own.begin(torch.tensor(np.array(peer.state))[None])[0], start, atol=1e-6)
        actions = torch.randint(2, (200,), generator=torch.Generator().manual_seed(seed))
        for action in actions:
            expected, reward, ended, _, _ = peer.step(int(action))
            step = own.step(action[None])
            np.testing.assert_allclose(step.observations[0], expected, atol=1e-6)
            assert float(step.rewards) == reward and bool(step.ended) == ended
            if ended:
                break


def test_an_episode_is_a_function_of_its_seed():
    for environment in (CartPole(), LQR()):
        assert not ignores_seed(environment)
        together = environment.reset(torch.tensor([5, 7, 9]))
        assert torch.equal(environment.reset(torch.tensor([7]))[0], together[1])
        environment.restart(torch.tensor([True]), torch.tensor([9]))
        action = torch.zeros(1, dtype=torch.int64) if isinstance(environment, CartPole) else torch.zeros(1, 1)
        alone = environment.step(action).observations
        environment.reset(torch.tensor([5, 7, 9]))
        assert torch.equal(
            environment.step(action.repeat(3, *[1] * (action.dim() - 1))).observations[2], alone[0]
        )


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_and_certificates_of_a_linear_policy_are_exact(norm):
    policy, x, ball = (
        policy_of(linear(), CartPole(), "policy"),
        states(10_000, 1, 0.5, 0.1, 0.3),
        box(0.1, norm=norm),
    )
    dual = {"linf": 1, "l2": 2, "l1": float("inf")}[norm]
    flippable = (x.double() @ WEIGHTS.double()).abs() <= 0.1 * WEIGHTS.norm(p=dual)
    clean = policy.outputs(x).argmax(1)
    for attacker in (MaximalDifference(), GreedyFlip()):
        x_adv = attacker(x, view(policy, ball, len(x)))
        assert torch.equal(policy.outputs(x_adv).argmax(1) != clean, flippable)
        p = {"linf": float("inf"), "l2": 2, "l1": 1}[norm]
        assert (x_adv - x).norm(p=p, dim=1).max() <= 0.1 + 1e-6
    assert torch.equal(certified_actions(policy, x, ball).fixed, ~flippable)


def test_the_interval_of_the_action_of_the_regulator_is_exact():
    gain, x, ball = LQR().gain().float(), states(1000, 0.3, 0.3), box(0.1, 2)
    policy = policy_of(linear(-gain[0]), LQR(), "policy")
    exact, clean = 0.1 * float(gain.abs().sum()), policy.outputs(x)
    reached = policy.outputs(MaximalDifference()(x, view(policy, ball, len(x))))
    assert float((reached - clean).abs().max()) == pytest.approx(exact, abs=1e-6)
    proved = certified_actions(policy, x, ball)
    assert exact - 1e-6 <= float((proved.high - clean).max()) <= exact + 3e-5  # with the rounding in float32
    for k in range(20):
        outputs = policy.outputs(x + ball.sample(Draws(k), torch.arange(len(x))))
        assert ((outputs >= proved.low) & (outputs <= proved.high)).all()


def test_no_attack_changes_a_certified_action_of_a_network():
    torch.manual_seed(0)
    network = Network(4, 3)
    policy = Policy(network.requires_grad_(False), replace(CartPole.actions, n=3))
    x, ball = states(300, 1, 1, 1, 1), box(0.05)
    proved, clean = certified_actions(policy, x, ball), policy.outputs(x).argmax(1)
    assert 0 < int(proved.fixed.sum()) < len(x)
    for attacker in (MaximalDifference(), GreedyFlip(), RandomNoise()):
        changed = policy.outputs(attacker(x, view(policy, ball, len(x)))).argmax(1) != clean
        assert not (changed & proved.fixed).any()


def test_greedy_flipping_is_not_the_worst_case():
    policy, ball, seeds = policy_of(linear(), CartPole(), "policy"), box(0.1), torch.arange(50)
    returns = {
        name: float(episodes(CartPole(), policy, attacker, ball, seeds, Draws(0)).returns.mean())
        for name, attacker in {
            "none": Unattacked(),
            "greedy": GreedyFlip(),
            "push": Directed(1, 0, 2),
        }.items()
    }
    assert returns["none"] == 500
    assert returns["greedy"] == pytest.approx(176, abs=20) and returns["push"] == pytest.approx(77, abs=15)


@pytest.mark.slow
def test_the_learned_adversary_is_stronger_than_rules():
    policy, ball = policy_of(linear(), CartPole(), "policy"), box(0.1)
    scale = torch.tensor([1.0, 0.7, 0.05, 0.2])
    adversary = learned_adversary(CartPole(), policy, ball, PPO(updates=30), Draws(0), scale=scale)
    assert (
        float(episodes(CartPole(), policy, adversary, ball, torch.arange(100), Draws(0)).returns.mean()) <= 92
    )


@pytest.mark.slow
def test_updates_that_weaken_an_adversary_are_not_used():
    policy, ball, seeds = policy_of(linear(), CartPole(), "policy"), box(0.1), torch.arange(20)
    harmful = PPO(updates=3, rows=16, horizon=64, learning_rate=5.0)
    scale = torch.tensor([1.0, 0.7, 0.05, 0.2])
    adversary = learned_adversary(CartPole(), policy, ball, harmful, Draws(0), scale=scale)
    assert float(episodes(CartPole(), policy, adversary, ball, seeds, Draws(0)).returns.mean()) < 100


class Counter:
    """An environment of gymnasium's interface, whose episodes have five steps."""

    class Box:
        low, high, shape = np.full(2, -np.inf, np.float32), np.full(2, np.inf, np.float32), (2,)

    class Discrete:
        n = 2

    def __init__(self, *, reward: float = 1.0, seeded: bool = True) -> None:
        self.observation_space, self.action_space = self.Box(), self.Discrete()
        self.reward, self.seeded, self.drawn = reward, seeded, 0

    def reset(self, *, seed: int):
        self.drawn += 1
        self.time = 0
        self.start = seed % 7 if self.seeded else self.drawn
        return np.array([self.start, 0.0]), {}

    def step(self, action: int):
        self.time += 1
        return np.array([self.start, self.time]), self.reward * action, self.time == 5, False, {}


def one_step(environment: Gymnasium) -> None:
    environment.reset(torch.arange(1))
    environment.step(torch.tensor([1]))


def changed_counter(method: str, function) -> Counter:
    counter = Counter()
    setattr(counter, method, function)
    return counter


def test_an_environment_of_gymnasiums_interface_is_adapted():
    environment = Gymnasium(Counter, "counter")
    policy = policy_of(lambda x: (x[:, 1] >= 2).long(), environment, "policy")
    assert not policy.differentiable
    measured = episodes(environment, policy, Unattacked(), box(0.0, 2), torch.arange(4), Draws(0))
    assert environment.shape == () and not measured.cut.any()
    assert measured.returns.tolist() == [3.0] * 4 and measured.lengths.tolist() == [5] * 4


def test_an_episode_that_the_environment_truncates_is_cut():
    def truncated(action: int):
        return np.zeros(2), 1.0, False, True, {}

    environment = Gymnasium(partial(changed_counter, "step", truncated), "counter")
    policy = policy_of(lambda x: (x[:, 1] >= 2).long(), environment, "policy")
    measured = episodes(environment, policy, Unattacked(), box(0.0, 2), torch.arange(3), Draws(0))
    assert measured.cut.all() and measured.lengths.tolist() == [1] * 3


def test_an_exception_of_a_policy_in_an_episode_is_one_error_with_its_message():
    environment = Gymnasium(Counter, "counter")
    later = policy_of(lambda x: {0.0: torch.zeros(len(x), 2)}[float(x.detach()[0, 1])], environment, "policy")
    with pytest.raises(TargetError, match=r"policy was called .* \(2, 2\), and raised KeyError: 1\.0"):
        episodes(environment, later, Unattacked(), box(0.0, 2), torch.arange(2), Draws(0))


class OneAction(CartPole):
    """A cart that is only pushed to the left, so that no action is worse than another."""

    actions = Discrete(1)


@pytest.mark.parametrize("environment", [CartPole(), LQR(), OneAction()])
def test_worst_case_training_takes_scores_and_vectors(environment):
    d, ppo = environment.observations.size, PPO(rows=32, horizon=16, epochs=1)
    how = Hardening(method="worst-case", updates=3, ppo=ppo)
    *_, (progress, policy) = hardened(environment, box(0.1, d), how, Draws(0), scale=torch.ones(d))
    assert progress.update == 3
    assert policy.outputs(environment.reset(torch.arange(4))).isfinite().all()


def test_settings_of_a_hardening_out_of_range_and_gates_of_other_commands_are_refused():
    settings = {"model": linear(), "data": "cartpole", "threat": "observations:linf:0.1"}
    for recipe, message in (
        ({"population": 2}, "population is 2; expected at least 6"),
        ({"ppo": {"horizon": 0}}, "horizon is 0; expected at least 2"),
    ):
        with pytest.raises(UsageError, match=message):
            Harden(**settings, recipe={"use": "robust-policy", **recipe}).run()
    with pytest.raises(UsageError, match="no metric 'certified_actions'"):
        Assess(**settings, gates=["certified_actions >= 0.5"])
    assert Certify(**settings, gates=["certified_actions >= 0.5"]).gates
    with pytest.raises(UsageError, match="cost is not estimated"):
        Assess(**settings).estimate()
    with pytest.raises(UsageError, match="give threat='observations:linf:0.1'"):
        Certify(**{**settings, "threat": "parameters:mass=0.1"})


def test_unusable_environments_and_policies_are_refused_with_what_was_expected():
    assert ignores_seed(Gymnasium(lambda: Counter(seeded=False), "counter"))
    broken = Gymnasium(lambda: Counter(reward=float("nan")), "counter")
    broken.reset(torch.arange(1))
    with pytest.raises(TargetError, match="reward nan"):
        broken.step(torch.tensor([1]))
    with pytest.raises(TargetError, match="no reset"):
        open_environment(object)
    for method, function, message in (
        ("step", lambda action: (np.zeros(2), 1.0, False, {}), "returned 4 values"),
        ("step", lambda action: (np.full(2, np.inf), 1.0, False, False, {}), "2 that are not finite"),
        ("step", lambda: None, "step of counter raised TypeError"),
        ("reset", lambda *, seed: np.zeros(2), "a pair of the observation"),
        ("reset", lambda: None, "does not accept reset"),
    ):
        with pytest.raises(TargetError, match=message):
            one_step(Gymnasium(partial(changed_counter, method, function), "counter"))
    for made, message in (
        (nn.Linear(3, 2), r"whose shape is \(2, 4\)"),
        (nn.Linear(4, 3), r"scores of shape \(2, 3\)"),
        (lambda x: torch.full((len(x),), 2), r"the actions \[2, 2\]"),
        (lambda x: torch.full((len(x), 2), torch.nan), "not finite"),
    ):
        with pytest.raises(TargetError, match=message):
            policy_of(made, CartPole(), "policy")
    with pytest.raises(UsageError, match="actions of cartpole are the numbers"):
        holdfast.assess(linear(), "cartpole", "actions:linf:0.1")
    with pytest.raises(UsageError, match="unit is range, and 2 of 4"):
        holdfast.assess(linear(), "cartpole", "observations:linf:0.1,unit=range")
    with pytest.raises(UsageError, match="may contain a pickled policy"):
        open_policy("policy.pt", CartPole(), {}, trust_code=False)


def test_actions_that_leave_the_space_later_are_refused_or_moved_to_its_bounds():
    later = policy_of(lambda x: (x[:, 1] >= 2).long() * 2, Gymnasium(Counter, "counter"), "policy")
    with pytest.raises(TargetError, match="the action 2"):
        episodes(Gymnasium(Counter, "counter"), later, Unattacked(), box(0.0, 2), torch.arange(2), Draws(0))
    bounded = LQR()
    bounded.actions = Box(-torch.ones(1), torch.ones(1))
    opened = open_policy(linear(torch.tensor([9.0, 9.0])), bounded, {}, trust_code=False)
    assert "outside of the bounds" in opened.notes[0]
    assert opened.value.act(torch.tensor([[9.0]])).tolist() == [[1.0]]


def test_images_are_read_in_their_shape_and_refused_only_if_they_need_too_much_memory():
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))

    class Screen(Counter):
        def __init__(self, size: int = 2):
            super().__init__()
            self.observation_space.shape = (size, size, 3)
            self.observation_space.low = self.observation_space.high = np.zeros((size, size, 3))

        def reset(self, *, seed):
            super().reset(seed=seed)
            return np.full(self.observation_space.shape, seed % 7), {}

        def step(self, action):
            _, *others = super().step(action)
            return np.full(self.observation_space.shape, self.time), *others

    environment = Gymnasium(Screen, "screen")
    policy = policy_of(network, environment, "policy")
    measured = episodes(environment, policy, GreedyFlip(), box(0.1, 12), torch.arange(2), Draws(0))
    assert measured.lengths.tolist() == [5, 5]
    large = ControlRun(Gymnasium(partial(Screen, 200), "screen"), policy, Observations("linf", 1.0), "", 2, 0)
    with pytest.raises(UsageError, match="would take 31 GB"):
        large.refuse_unfit()


def test_single_outputs_of_onnx_are_scores_of_two_actions_or_actions(tmp_path):
    write_mlp(tmp_path / "policy.onnx", [(np.full((1, 2), 0.3, np.float32), np.zeros(1, np.float32))])
    x = states(20, 1, 1)
    actions = open_policy(str(tmp_path / "policy.onnx"), LQR(), {}, trust_code=False).value.outputs(x)
    torch.testing.assert_close(actions[:, 0], 0.3 * x.sum(1))


def test_an_id_of_gymnasium_is_opened_and_an_unknown_one_refused():
    pytest.importorskip("gymnasium")
    environment = open_environment("Acrobot-v1").value
    assert environment.limit == 500 and not ignores_seed(environment)
    with pytest.raises(UsageError, match="there is no environment 'Acrobot-v9'"):
        open_environment("Acrobot-v9")
    with pytest.raises(UsageError, match="'Acrobot-v1' is an environment of gymnasium"):
        holdfast.assess(nn.Linear(6, 3), "Acrobot-v1", "linf:0.1")


def test_a_policy_with_memory_carries_its_state():
    def later(x, memory):
        return (memory[:, 0] >= 3).long(), memory + 1

    policy = policy_of((later, torch.zeros(1)), Gymnasium(Counter, "counter"), "policy")
    environment = Gymnasium(Counter, "counter")
    measured = episodes(environment, policy, Unattacked(), box(0.0, 2), torch.arange(4), Draws(0))
    assert measured.returns.tolist() == [2.0] * 4
    with pytest.raises(UsageError, match="memory"):
        certified_actions(policy, states(5, 1, 1), box(0.1, 2))


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_the_weights_of_an_archive_are_read_without_its_code(tmp_path, algorithm):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)]
    names = ["mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net"]
    if algorithm == "dqn":
        names = [f"q_net.q_net.{place}" for place in (0, 2, 4)]
    content = {
        f"{name}.{key}": value
        for name, layer in zip(names, layers, strict=True)
        for key, value in layer.state_dict().items()
    }
    weights, path = io.BytesIO(), tmp_path / "policy.zip"
    torch.save(content, weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data", "not read")
        archive.writestr("policy.pth", weights.getvalue())
    opened = open_policy(str(path), CartPole(), {}, trust_code=False)
    activation = nn.ReLU() if algorithm == "dqn" else nn.Tanh()
    expected = nn.Sequential(layers[0], activation, layers[1], activation, layers[2])
    x = states(50, 1, 1, 1, 1)
    torch.testing.assert_close(opened.value.outputs(x), expected(x))
    np.savez(tmp_path / "stats.npz", mean=np.ones(4), var=np.full(4, 4.0))
    torch.save(content | {"features_extractor.cnn.0.weight": torch.zeros(1)}, of_images := io.BytesIO())
    with zipfile.ZipFile(tmp_path / "cnn.zip", "w") as archive:
        archive.writestr("policy.pth", of_images.getvalue())
    with pytest.raises(TargetError, match="include features_extractor"):
        open_policy(str(tmp_path / "cnn.zip"), CartPole(), {}, trust_code=False)
    scaled = open_policy(str(path), CartPole(), {"normalise": str(tmp_path / "stats.npz")}, trust_code=False)
    torch.testing.assert_close(scaled.value.outputs(x), expected((x - 1) / 2))


def found(returns: dict[str, float], *, limited: bool = True, ignored: bool = False):
    rows = [
        Row(
            name,
            torch.full((5,), value),
            torch.full((5,), 9),
            torch.ones(5) == 1,
            Estimate(value, value, value, 5),
        )
        for name, value in returns.items()
    ]
    settings = {
        "threat": "observations:linf:0.1",
        "n": 5,
        "range": [None, 20.0],
        "limit": 9,
        "limited": limited,
        "scaled": "in units",
    }
    return finding_of(settings, rows, ignored=ignored)


def test_doubts_are_raised_where_returns_may_mislead():
    learned = {"none": 9.0, "greedy flipping": 5.0, "learned adversary": 3.0}
    assert not found(learned).facts["doubts"] and found(learned).verdict == "flagged"
    assert "declares no lowest return" in found(learned).limits[1]
    assert [*found(learned | {"learned adversary": 5.0}).facts["doubts"]] == ["adversary-did-not-learn"]
    pushed = {"none": 9.0, "greedy flipping": 9.0, "directed push": 5.0, "learned adversary": 9.0}
    assert [*found(pushed).facts["doubts"]] == ["adversary-did-not-learn"]
    assert not found(dict.fromkeys(learned, 9.0)).facts["doubts"]  # a policy that holds
    assert found(dict.fromkeys(learned, 9.0)).headline.startswith("no attacker lowers the mean return of 9")
    assert [*found(learned, limited=False).facts["doubts"]] == ["episodes-without-end"]
    assert [*found(learned, ignored=True).facts["doubts"]] == ["seed-ignored"]
    assert found(learned, ignored=True).verdict == "unclear"


def test_equal_returns_of_few_episodes_do_not_prove_a_return():
    settings = Assess(model=linear(), data="cartpole", threat="parameters:mass=0.1", n=3)
    how = ControlRun(CartPole(), policy_of(linear(), CartPole(), ""), settings.threat.constraint, "", 3, 0)
    same = {"return": torch.full((3,), 500.0), "length": torch.full((3,), 500), "cut": torch.zeros(3)}
    undeclared = {**control.settings_of(how), "range": [None, None], "rows": ["none", "random"]}
    for row in control.rows_among(undeclared, [same, same]):
        assert row.estimate.low < 200 and row.estimate.high > 800
    without_rewards = {**same, "return": torch.zeros(3)}
    assert control.rows_among(undeclared, [without_rewards] * 2)[0].estimate.low < 0


def test_an_environment_of_gymnasiums_interface_declares_its_returns():
    def declared(returns: object) -> Counter:
        counter = Counter()
        counter.returns = returns
        return counter

    assert Gymnasium(Counter, "counter").returns == (None, None)
    assert Gymnasium(partial(declared, (0, None)), "counter").returns == (0.0, None)
    for wrong in (5, (1, 0), ("a", "b"), (float("nan"), 1)):
        with pytest.raises(TargetError, match="a pair of the lowest and the highest return"):
            Gymnasium(partial(declared, wrong), "counter")


def test_a_return_outside_of_the_declared_range_is_refused():
    class Declared(CartPole):
        returns = (0.0, 100.0)

    settings = Assess(model=linear(), data="cartpole", threat="parameters:mass=0.1", n=3)
    policy = policy_of(linear(), CartPole(), "")
    how = ControlRun(Declared(), policy, settings.threat.constraint, "", 3, 0)
    with pytest.raises(TargetError, match=r"is \(0.0, 100.0\), and an episode returned 500"):
        control.columns_of(how, control.NONE, how.ball(), how.seeds("judged", 3))


def test_parameters_of_the_environment_are_changed_to_their_extremes():
    settings = Assess(model=linear(), data="cartpole", threat="parameters:mass=0.5,length=0.5", n=10)
    result = settings.run()
    names = [row[0] for row in result.content["tables"][0]["rows"]]
    assert len(names) == 6 and "mass -50 %, length +50 %" in names


@pytest.mark.slow
def test_an_assessment_is_resumed_verified_and_gated(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "ADVERSARY", PPO(updates=2, rows=16, horizon=16))
    policy = linear(-LQR().gain().float()[0])
    arguments = {"model": policy, "data": "lqr", "threat": "actions:linf:0.2", "n": 20}
    arguments["gates"] = ["clean_return >= -1000"]
    first = Assess(**arguments).run(tmp_path / "run")
    assert first.exit_code == 0
    assert first.metrics["worst_return"].value < first.metrics["clean_return"].value
    again = Assess(**arguments).run(tmp_path / "run", resume=True)
    assert again.facts == first.facts == open_audit(tmp_path / "run").facts
    assert run_entry(tmp_path / "run").verb == "assess" and str(first).startswith("No significant loss: ")
    other = Assess(**{**arguments, "model": linear(torch.tensor([-0.5, -0.5]))}).run(tmp_path / "other")
    compared = holdfast.compare(tmp_path / "run", tmp_path / "other")
    change = compared.summary()["paired"]["none"]
    assert change["second"] == pytest.approx(other.metrics["clean_return"].value)
    assert change["difference"] == pytest.approx(change["second"] - change["first"])
    assert change["low"] < change["difference"] < change["high"] < 0
    assert "lowest of both" in compared.text()
    Assess(**{**arguments, "seed": 1}).run(tmp_path / "seeded")
    with pytest.raises(UsageError, match="the same environment and the same seed"):
        holdfast.compare(tmp_path / "run", tmp_path / "seeded")
    Certify(model=policy, data="lqr", threat="observations:linf:0.1", n=5).run(tmp_path / "certified")
    with pytest.raises(TargetError, match="has no returns of a policy"):
        holdfast.compare(tmp_path / "run", tmp_path / "certified")
    with pytest.raises(UsageError, match="the certification of a policy .* which stores no episodes"):
        holdfast.explain(tmp_path / "certified")
    with pytest.raises(UsageError, match="index is 3, and"):
        holdfast.explain(tmp_path / "run", index=3)
    explained = holdfast.explain(tmp_path / "run")
    assert explained.names == ("film", "attackers", "states", "perturbations")
    film = base64.b64decode(explained["film"].pictures[0].url.partition(",")[2])
    assert b"acTL" in film  # the chunk of an animation
    assert "<script" not in explained.page()


@pytest.mark.slow
def test_a_hardened_policy_is_written_opened_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "ADVERSARY", PPO(updates=2, rows=16, horizon=16))
    recipe = {"use": "robust-policy", "rounds": 1, "generations": 2, "population": 8}
    settings = {
        "model": linear(-LQR().gain().float()[0]),
        "data": "lqr",
        "n": 5,
        "threat": "observations:linf:0.1",
    }
    result = Harden(**settings, recipe=recipe).run(tmp_path / "run")
    result.write(tmp_path / "new")
    opened = open_policy(str(tmp_path / "new"), LQR(), {}, trust_code=False).value
    x = states(10, 1, 1)
    assert torch.equal(opened.outputs(x), result.model.outputs(x))
    assert open_audit(tmp_path / "run").facts == result.after.facts


def test_the_interval_of_the_worst_return_ends_at_the_lowest_end_of_all_attackers():
    settings = {
        "threat": "observations:linf:0.1",
        "n": 5,
        "range": [0.0, 9.0],
        "limit": 9,
        "limited": True,
        "scaled": "",
    }
    rows = [
        Row(
            name,
            torch.full((5,), 3.0),
            torch.full((5,), 9),
            torch.ones(5) == 1,
            Estimate(value, low, high, 5),
        )
        for name, value, low, high in (("none", 9.0, 9.0, 9.0), ("a", 3.0, 2.9, 3.1), ("b", 3.2, 1.0, 6.0))
    ]
    worst = finding_of(settings, rows, ignored=False).metrics["worst_return"]
    assert (worst.value, worst.low, worst.high) == (3.0, 1.0, 3.1)


@pytest.mark.parametrize("condition", ["access=none", "queries=100"])
def test_a_condition_that_the_attackers_of_a_policy_do_not_keep_is_refused(condition):
    with pytest.raises(UsageError, match="leave access and queries out"):
        holdfast.assess(lambda x: x[:, :1], "cartpole", f"observations:linf:0.1,{condition}", n=2)


class Sine(nn.Sequential):
    def forward(self, x):
        return super().forward(x).sin()


def test_a_network_with_a_forward_of_its_own_is_not_taken_for_linear():
    assert policy_of(nn.Sequential(nn.Linear(4, 2)), CartPole(), "linear").affine() is not None
    assert policy_of(Sine(nn.Linear(4, 2)), CartPole(), "sine").affine() is None
