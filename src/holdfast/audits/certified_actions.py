"""The certification of a policy: the share of visited states whose action cannot change, or intervals of actions."""

from functools import partial
from typing import Annotated

import torch
from pydantic import Field, Strict
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.control import ControlRun
from holdfast.audits.finding import Finding, Images, Size, StoredSteps, Table
from holdfast.control.attackers import GreedyFlip, Unattacked, View, episodes
from holdfast.control.certification import certified_actions
from holdfast.control.environments import Discrete
from holdfast.core.errors import UnsoundProof
from holdfast.core.evidence import Columns
from holdfast.reports.words import percent, plain
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, flag, whole
from holdfast.statistics.intervals import Support, bootstrap

STATES = "states"
"""name of the stage with what was proved about each visited state"""
_MOST_STATES = 20_000
"""number of visited states, of which those at equal distances in time are certified if there are more"""


def measure(run: Run, how: ControlRun) -> Images:
    """Certify the action of the policy in the states of unattacked episodes."""
    run.stage(STATES, partial(_columns, how))
    return dict


def _columns(how: ControlRun) -> Columns:
    ball, judged = how.ball(), how.seeds("judged", how.n)
    measured = episodes(
        how.environment, how.policy, Unattacked(), ball, judged, how.rng.at("certified"), keep=True
    )
    every = -(-len(measured.visited) // _MOST_STATES)
    x, episode = measured.visited[::every], measured.rows[::every]
    proved = certified_actions(how.policy, x, ball)
    with torch.no_grad():
        outputs = how.policy.outputs(x)
    columns = {"id": torch.arange(len(x)), "episode": episode, "fixed": proved.fixed.long()}
    if isinstance(how.policy.actions, Discrete):
        view = View(how.policy, None, ball, torch.arange(len(x)), 0, how.rng.at("flipped"))
        flipped = GreedyFlip()(x, view)
        with torch.no_grad():
            changed = how.policy.outputs(flipped).argmax(1) != outputs.argmax(1)
        if bool((changed & proved.fixed).any()):
            raise UnsoundProof(
                f"{int((changed & proved.fixed).sum())} certified actions were changed by an attack; please report this"
            )
        return columns | {"changed": changed.long(), "change": torch.zeros(len(x), dtype=torch.float64)}
    actions = how.policy.act(outputs)
    change = torch.maximum(proved.high - actions, actions - proved.low).amax(1)
    return columns | {"changed": torch.zeros_like(columns["fixed"]), "change": change.double()}


class _Settings(TypedDict):
    threat: str
    n: Annotated[Size, Field(ge=1)]
    discrete: Annotated[bool, Strict()]
    scaled: str


_FORMS = {"episode": whole("n", high=2**31), "fixed": flag("n"), "changed": flag("n"), "change": Form()}


def concluded(steps: StoredSteps) -> Finding:
    """Return the share of the visited states whose action cannot change."""
    settings = steps.settings(_Settings)
    columns = steps.columns(STATES, _FORMS)
    episode, fixed = columns["episode"], columns["fixed"] == 1
    if not len(fixed) or int(episode.max()) >= settings["n"]:
        raise steps.refuse(STATES, f"{len(fixed)} states", f"the states of {settings['n']} episodes")
    limits = (
        f"The size of the threat is {settings['scaled']}.",
        "The states are those of unattacked episodes. An attacker who changes one action leads the policy to others.",
    )
    if not settings["discrete"]:
        largest, middle = float(columns["change"].max()), float(columns["change"].median())
        text = f"no observation within {settings['threat']} changes an action by more than {plain(largest)}"
        table = Table(
            "Largest change of the action by an allowed observation, proved",
            ("states", "median", "largest"),
            [(len(fixed), middle, largest)],
        )
        rounded = (
            "Bounds contain the rounding of the policy in float32, so that they are wider than exact bounds by about "
            "1e-5 of the largest values that occur in the policy."
        )
        facts = {"largest_change": largest}
        return Finding("not flagged", text, tables=(table,), facts=facts, limits=(*limits, rounded))
    counts, sums = _per_episode(episode, settings["n"]), _per_episode(episode, settings["n"], fixed)
    share = bootstrap(
        lambda rows: sums[rows].sum(1) / counts[rows].sum(1).clamp_min(1),
        settings["n"],
        support=Support(0, 1),
    )
    changed = int((columns["changed"] == 1).sum())
    table = Table(
        "Visited states",
        ("action", "states", "share"),
        [
            ("cannot change (proved)", int(fixed.sum()), percent(share.value)),
            ("changed by an attack", changed, percent(changed / len(fixed))),
            (
                "unknown",
                len(fixed) - int(fixed.sum()) - changed,
                percent((len(fixed) - int(fixed.sum()) - changed) / len(fixed)),
            ),
        ],
        f"States of {settings['n']} unattacked episodes; the interval of the share is over episodes.",
    )
    return Finding(
        "not flagged",
        f"the action cannot change in {percent(share.value)} of the visited states ({settings['threat']})",
        metrics={"certified_actions": share},
        tables=(table,),
        facts={"states": len(fixed), "changed": changed},
        limits=limits,
    )


def _per_episode(episode: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    weights = torch.ones(len(episode)) if values is None else values.float()
    return torch.zeros(n, dtype=torch.float64).index_add_(0, episode, weights.double())
