"""Environment steps of the cart-pole per CPU second, beside those of gymnasium, without a policy."""

import numpy as np
import torch

from benchmarks.absent import Absent
from benchmarks.meter import cpu_seconds
from benchmarks.record import Claim, Outcome
from holdfast.control.environments import CartPole

WHAT = "environment steps per CPU second at 1,024 episodes: the bundled cart-pole and gymnasium's"
EPISODES, STEPS, FEW, ROUNDS = 1024, 200, 10, 5


def measured() -> Outcome:
    try:
        import gymnasium
        from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
    except ModuleNotFoundError:
        raise Absent("gymnasium is not installed: pip install gymnasium") from None
    actions = torch.randint(2, (EPISODES,), generator=torch.Generator().manual_seed(0))
    own = CartPole()
    one_by_one = gymnasium.make_vec("CartPole-v1", num_envs=EPISODES, vectorization_mode="sync")
    together = CartPoleVectorEnv(num_envs=EPISODES)
    own.reset(torch.arange(EPISODES))
    for peer in (one_by_one, together):
        peer.reset(seed=0)
    as_array = np.asarray(actions)

    def ours() -> None:
        for _ in range(STEPS):
            step = own.step(actions)
            if step.ended.any():  # the others start ended episodes again too
                own.restart(step.ended, torch.arange(EPISODES))

    def peers(peer: object, steps: int) -> None:
        for _ in range(steps):
            peer.step(as_array)  # type: ignore[attr-defined]

    rates: dict[str, list[float]] = {"bundled": [], "SyncVectorEnv": [], "CartPoleVectorEnv": []}
    for _ in range(ROUNDS):  # in turn, because other processes change the speed of the machine
        rates["bundled"].append(EPISODES * STEPS / cpu_seconds(ours))
        rates["SyncVectorEnv"].append(EPISODES * FEW / cpu_seconds(lambda: peers(one_by_one, FEW)))
        rates["CartPoleVectorEnv"].append(EPISODES * STEPS / cpu_seconds(lambda: peers(together, STEPS)))
    ratio = {
        name: float(np.median([a / b for a, b in zip(rates["bundled"], rates[name], strict=True)]))
        for name in ("SyncVectorEnv", "CartPoleVectorEnv")
    }
    claims = [
        Claim("steps per CPU second / those of SyncVectorEnv >= 20", ratio["SyncVectorEnv"], 20, least=True),
        Claim(
            "steps per CPU second / those of CartPoleVectorEnv >= 0.5",
            ratio["CartPoleVectorEnv"],
            0.5,
            least=True,
        ),
    ]
    table = [{"environment": name, "steps per CPU s": float(np.median(each))} for name, each in rates.items()]
    return Outcome(
        table, claims, {"episodes": EPISODES, "gymnasium": gymnasium.__version__, "rounds": ROUNDS}
    )
