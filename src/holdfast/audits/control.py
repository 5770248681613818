"""The assessment of a policy in an environment: episodes under each attacker, and the returns that follow from them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, Strict
from torch import Tensor
from typing_extensions import TypedDict

from holdfast.audits.finding import Finding, Images, Number, Size, StoredSteps, Table
from holdfast.control.attackers import (
    Attacker,
    Ball,
    Episodes,
    GreedyFlip,
    MaximalDifference,
    RandomNoise,
    Unattacked,
    episodes,
)
from holdfast.control.environments import Box, Discrete, Environment, episode_seeds, ignores_seed
from holdfast.control.learning import (
    PPO,
    directed_push,
    learned_adversary,
    learned_critic,
    learned_sarsa,
    typical,
)
from holdfast.control.perturbed_actions import DirectedActions, RandomActions, learned_actions
from holdfast.control.policies import Policy
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.estimate import Estimate
from holdfast.core.evidence import Columns
from holdfast.core.types import Ids
from holdfast.reports.words import plain
from holdfast.runs.engine.run import Run
from holdfast.runs.store.columns import Form, flag, whole
from holdfast.statistics.intervals import CONFIDENCE, Support, bonferroni, mean
from holdfast.threats.policies import Actions, Observations, Parameters

ADVERSARY = PPO(updates=40)
"""training of a learned adversary, after which its return on the cart-pole no longer changes"""
ENVIRONMENT = "environment"
"""name of the document with properties of the environment"""
_TRAINED = 64
"""number of training episodes from which critics and the directed push are chosen"""
_MOST_BYTES = 4_000_000_000
"""largest size of the observations of the training episodes"""

_WHITE_BOX = (
    "Critics, the directed push and the learned adversary are trained on this policy, in other episodes than those "
    "that judge. The result is for an attacker who has the policy and the environment."
)

NONE, RANDOM, CRITIC, DIFFERENCE, GREEDY, DIRECTED, SARSA, LEARNED = (
    "none",
    "random",
    "critic",
    "maximal-action-difference",
    "greedy-flipping",
    "directed-push",
    "robust-sarsa",
    "learned-adversary",
)
"""Names of the stages, one for each attacker."""


@dataclass(frozen=True)
class ControlRun:
    """What an assessment of a policy measures."""

    environment: Environment
    policy: Policy
    threat: Observations | Actions | Parameters
    unit: str
    """unit of the size of the threat: `range`, `std`, or empty for that of the observations"""
    n: int
    """number of episodes that judge"""
    seed: int
    ppo: PPO = field(default_factory=lambda: ADVERSARY)
    """training of the learned adversary"""

    @property
    def rng(self) -> Draws:
        """Random numbers of the run."""
        return Draws(self.seed).at("control")

    def seeds(self, name: str, n: int) -> Ids:
        """Return the seeds of n episodes; those that judge and those of a training have different names."""
        return episode_seeds(self.rng.at("seeds", name), torch.arange(n))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in their order."""
        if isinstance(self.threat, Parameters):
            return (NONE, RANDOM, *(f"extreme-{k}" for k in range(len(self.extremes))))
        if isinstance(self.threat, Actions):
            return (NONE, RANDOM, DIRECTED, LEARNED)
        greedy = (GREEDY,) if isinstance(self.environment.actions, Discrete) else ()
        return (NONE, RANDOM, CRITIC, DIFFERENCE, *greedy, DIRECTED, SARSA, LEARNED)

    @property
    def extremes(self) -> list[dict[str, float]]:
        """Factors of the parameters at the corners of their ranges."""
        corners: list[dict[str, float]] = [{}]
        for name, change in self.threat.limits.items():
            assert isinstance(change, float)
            corners = [{**corner, name: factor} for corner in corners for factor in (1 - change, 1 + change)]
        return corners

    def refuse_unfit(self) -> None:
        """Raise `UsageError` for a threat that the environment does not have."""
        if isinstance(self.threat, Actions) and isinstance(self.environment.actions, Discrete):
            raise UsageError(
                f"the threat {self.threat} adds a perturbation to actions, and the actions of {self.environment.name} "
                "are the numbers of choices; give observations:linf:EPS"
            )
        if isinstance(self.threat, Parameters):
            self.environment.changed({name: torch.ones(1) for name in self.threat.limits})
        ends = self.environment.observations
        unbounded = int((~(ends.high - ends.low).isfinite()).sum())
        if self.unit == "range" and unbounded:
            raise UsageError(
                f"unit is range, and {unbounded} of {ends.size} values of the observations of {self.environment.name} "
                "have no bounds; give unit=std, the deviation in visited states"
            )
        n_bytes = 4 * _TRAINED * self.environment.limit * ends.size
        if n_bytes > _MOST_BYTES:
            raise UsageError(
                f"an observation of {self.environment.name} has {ends.size:,} values, and the observations of "
                f"{_TRAINED} training episodes of {self.environment.limit:,} steps would take {n_bytes / 1e9:.0f} GB; "
                f"at most {_MOST_BYTES / 1e9:.0f} GB are used: wrap the environment so that images are smaller or "
                "episodes shorter (ResizeObservation or TimeLimit of gymnasium)"
            )
        if self.unit not in ("", "range", "std"):
            raise UsageError(f"unit is {self.unit!r}; expected range or std for the observations of a policy")

    def ball(self) -> Ball:
        """Return the perturbations of the threat in the units of the observations or the actions."""
        if isinstance(self.threat, Parameters):
            return Ball.empty(self.environment.observations.size)
        size = self.environment.observations.size
        if isinstance(self.threat, Actions):
            assert isinstance(self.environment.actions, Box)
            size = self.environment.actions.size
        scale = torch.ones(size)
        if self.unit == "range":
            scale = (self.environment.observations.high - self.environment.observations.low) / 2
        if self.unit == "std":
            scale = self.visited().std(0).clamp_min(1e-9)
        return Ball(self.threat.norm, self.threat.size, scale)  # type: ignore[arg-type]  # the parser allows no others

    def visited(self) -> Tensor:
        """Return the observations (m, d) of unattacked training episodes."""
        still = Ball.empty(self.environment.observations.size)
        seeds = self.seeds("scale", _TRAINED)
        return episodes(
            self.environment, self.policy, Unattacked(), still, seeds, self.rng.at("scale"), keep=True
        ).visited


def measure(run: Run, how: ControlRun, prefix: str = "") -> Images:
    """Take the steps of an assessment: the training of each attacker, and its episodes. The names of the steps begin
    with `prefix`.
    """
    run.document(prefix + ENVIRONMENT, lambda: {"ignores_seed": ignores_seed(how.environment)})
    ball, judged = how.ball(), how.seeds("judged", how.n)
    for stage in how.stages:
        run.report(prefix + stage, 0, how.n, 0, 0)
        run.stage(prefix + stage, partial(columns_of, how, stage, ball, judged))
    return dict


def _episodes(how: ControlRun, stage: str, ball: Ball, judged: Ids) -> Episodes:
    environment, policy, rng = how.environment, how.policy, how.rng.at(stage)
    still = Ball.empty(environment.observations.size)
    if isinstance(how.threat, Parameters) and stage != NONE:
        changed = environment.changed(_factors(how, stage, judged))
        return episodes(changed, policy, Unattacked(), still, judged, rng)
    if isinstance(how.threat, Actions) and stage != NONE:
        return episodes(
            environment, policy, Unattacked(), still, judged, rng, disturb=_on_actions(how, stage, ball, rng)
        )
    return episodes(environment, policy, attacker_of(how, stage, ball), ball, judged, rng)


def _factors(how: ControlRun, stage: str, judged: Ids) -> dict[str, Tensor]:
    n = len(judged)
    if stage != RANDOM:
        corner = how.extremes[int(stage.removeprefix("extreme-"))]
        return {name: torch.full((n,), factor) for name, factor in corner.items()}
    return {
        name: 1 + float(change) * (2 * how.rng.at("parameter", name).uniform(judged, 1)[:, 0] - 1)
        for name, change in how.threat.limits.items()
    }


def _on_actions(
    how: ControlRun, stage: str, ball: Ball, rng: Draws
) -> Callable[[Tensor, Tensor, int], Tensor]:
    if stage == RANDOM:
        return RandomActions(ball, how.environment.actions, how.seeds("judged", how.n), rng)
    seeds = how.seeds("trained", _TRAINED)
    if stage == DIRECTED:
        return DirectedActions.chosen(how.environment, how.policy, ball, seeds, rng)
    return learned_actions(how.environment, how.policy, ball, how.ppo, rng, scale=typical(how.visited()))


def attacker_of(how: ControlRun, stage: str, ball: Ball) -> Attacker:
    """Return an attacker on observations by the name of its stage, trained on other episodes than those that judge."""
    rng, seeds = how.rng.at(stage), how.seeds("trained", _TRAINED)
    if stage in (CRITIC, SARSA):
        learned = learned_critic if stage == CRITIC else learned_sarsa
        return learned(how.environment, how.policy, seeds, how.rng.at("critics"))
    if stage == DIRECTED:
        return directed_push(how.environment, how.policy, ball, seeds, rng)
    if stage == LEARNED:
        scale = typical(how.visited())
        return learned_adversary(how.environment, how.policy, ball, how.ppo, rng, scale=scale)
    simple: Mapping[str, Callable[[], Attacker]] = {
        NONE: Unattacked,
        RANDOM: RandomNoise,
        DIFFERENCE: MaximalDifference,
        GREEDY: GreedyFlip,
    }
    return simple[stage]()


def columns_of(how: ControlRun, stage: str, ball: Ball, judged: Ids) -> Columns:
    """Return the episodes under an attacker, which is trained first: returns, lengths, and the steps of the first."""
    measured = _episodes(how, stage, ball, judged)
    _refuse_other_range(how.environment, measured.returns)
    return {
        "id": torch.arange(len(measured.returns)),
        "return": measured.returns,
        "length": measured.lengths,
        "cut": measured.cut.long(),
        **dict(zip(("state", "shown", "action"), measured.first, strict=True)),
    }


def _refuse_other_range(environment: Environment, returns: Tensor) -> None:
    """Raise `TargetError` if a return is outside of the range that the environment declares."""
    low, high = environment.returns
    rounding = _ROUNDING * returns.abs().max().item()
    for value in (returns.min().item(), returns.max().item()):
        if (low is not None and value < low - rounding) or (high is not None and value > high + rounding):
            raise TargetError(
                f"the attribute returns of {environment.name} is {(low, high)}, and an episode returned "
                f"{plain(value)}; a pair of the lowest and the highest return of an episode was expected, with None "
                "for an unknown one"
            )


_ROUNDING = 1e-4  # relative error of a return in float32


class Settings(TypedDict):
    """The settings of an assessment of a policy in `run.json`."""

    threat: str
    stages: Annotated[list[str], Field(min_length=1)]
    rows: list[str]
    """names of the attackers in the report"""
    n: Annotated[Size, Field(ge=1)]
    range: tuple[Number | None, Number | None]
    """lowest and highest possible return, where they are known"""
    limit: Annotated[Size, Field(ge=1)]
    limited: Annotated[bool, Strict()]
    """whether the environment has the limit itself"""
    scaled: str
    """unit of the size of the threat, as a sentence"""
    training: Mapping[str, Any]


class EnvironmentForm(TypedDict):
    """The document with properties of the environment."""

    ignores_seed: Annotated[bool, Strict()]


_FORMS = {"return": Form(), "length": whole("n", high=2**31), "cut": flag("n")}


def settings_of(how: ControlRun) -> dict[str, Any]:
    """Return the settings of a run for `run.json`."""
    low, high = how.environment.returns
    unit = {
        "": "in the units of the observations",
        "range": "in half the declared range of each value of the observations",
        "std": "in the standard deviation of each value of the observations in "
        f"{_TRAINED} unattacked training episodes",
    }[how.unit]
    rows = [stage.replace("-", " ") for stage in how.stages]
    if isinstance(how.threat, Parameters):
        rows[2:] = [
            ", ".join(f"{name} {100 * (factor - 1):+.0f} %" for name, factor in corner.items())
            for corner in how.extremes
        ]
        unit = "relative to the parameter of the environment"
    if isinstance(how.threat, Actions):
        unit = "in the units of the actions"
    text = f"{how.threat}" + (f",unit={how.unit}" if how.unit else "")
    return {
        "threat": text,
        "stages": list(how.stages),
        "rows": rows,
        "n": how.n,
        "range": [low, high],
        "limit": how.environment.limit,
        "limited": how.environment.limited,
        "scaled": unit,
        "training": vars(how.ppo),
    }


@dataclass(frozen=True)
class Row:
    """The episodes under one attacker."""

    name: str
    returns: Tensor
    lengths: Tensor
    cut: Tensor
    estimate: Estimate


NOT_LEARNED, IGNORED_SEED, CUT = "adversary-did-not-learn", "seed-ignored", "episodes-without-end"
"""Names of the doubts, and the metrics that each concerns are in the facts of a finding."""


def concluded(steps: StoredSteps) -> Finding:
    """Return the lowest mean return over the attackers, from the stored returns of all episodes."""
    settings = steps.settings(Settings)
    document = steps.document(ENVIRONMENT, EnvironmentForm)
    return finding_of(settings, rows_of(steps, settings), ignored=document["ignores_seed"])


def rows_of(steps: StoredSteps, settings: Settings) -> list[Row]:
    """Return the episodes under each attacker, with the interval of their mean return."""
    measured = [steps.columns(stage, _FORMS) for stage in settings["stages"]]
    for stage, columns in zip(settings["stages"], measured, strict=True):
        if len(columns["return"]) != settings["n"]:
            raise steps.refuse(stage, f"{len(columns['return'])} episodes", f"{settings['n']} episodes")
    return rows_among(settings, measured)


def rows_among(settings: Settings, measured: Sequence[Mapping[str, Tensor]]) -> list[Row]:
    """Return the episodes under each attacker from the columns of the stages."""
    support = support_of(settings["range"], torch.cat([columns["return"] for columns in measured]))
    attacked = max(len(measured) - 1, 1)
    rows: list[Row] = []
    for name, columns in zip(settings["rows"], measured, strict=True):
        confidence = CONFIDENCE if not rows else bonferroni(CONFIDENCE, attacked)
        estimate = mean(columns["return"], confidence, support=support)
        rows.append(Row(name, columns["return"], columns["length"], columns["cut"] == 1, estimate))
    return rows


def support_of(declared: Sequence[float | None], every: Tensor) -> Support:
    """Return the range of returns that the intervals assume: the declared one, and beyond the measured returns by their
    spread or their largest size (1 if all are 0) where none is declared. Equal returns of few episodes would otherwise
    have no uncertainty.
    """
    low, high = every.min().item(), every.max().item()
    reach = max(high - low, abs(low), abs(high)) or 1.0
    lowest, highest = declared
    return Support(low - reach if lowest is None else lowest, high + reach if highest is None else highest)


def finding_of(settings: Settings, rows: list[Row], *, ignored: bool) -> Finding:
    """Return what the episodes under all attackers show."""
    clean, attacked = rows[0], rows[1:]
    worst = min(attacked, key=lambda row: row.estimate.value)
    # the strongest attacker may be another one than the lowest of these episodes
    lowest = replace(
        worst.estimate,
        low=min(row.estimate.low for row in attacked),
        high=min(row.estimate.high for row in attacked),
    )
    doubts, reasons = _doubts(settings, rows, ignored=ignored)
    harmful = lowest.high < clean.estimate.low
    verdict = "unclear" if ignored else "flagged" if harmful else "not flagged"
    lost = clean.estimate.value - worst.estimate.value
    share = (
        f", {100 * lost / abs(clean.estimate.value):.0f} % less" if clean.estimate.value and lost > 0 else ""
    )
    return Finding(
        verdict,  # type: ignore[arg-type]  # one of its literals
        (
            f"the mean return is {plain(worst.estimate.value)} under the attacker {worst.name}, and "
            f"{plain(clean.estimate.value)} without one{share} ({settings['threat']})"
            if lost > 0
            else f"no attacker lowers the mean return of {plain(clean.estimate.value)} ({settings['threat']})"
        ),
        reasons,
        {
            "worst_attacker": worst.name,
            "mean_returns": {row.name: row.estimate.value for row in rows},
            "doubts": doubts,
        },
        metrics={"worst_return": lowest, "clean_return": clean.estimate},
        tables=(
            Table(
                "Return under each attacker, lowest first",
                ("attacker", "mean return", "interval", "lowest", "median", "mean length", "cut"),
                [_shown(row) for row in (*sorted(attacked, key=lambda row: row.estimate.value), clean)],
                f"{settings['n']} episodes with the same seeds for each attacker. The intervals are bootstrap "
                "intervals (BCa) at 95 % for all attackers together (Bonferroni). "
                f"{int(clean.cut.sum())} unattacked episodes were cut: by their environment, or by the limit of "
                f"{settings['limit']} steps.",
            ),
        ),
        limits=(
            f"The size of the threat is {settings['scaled']}.",
            *_assumed(settings, rows),
            "The lowest mean return over these attackers is an upper bound of that under the strongest one.",
            _WHITE_BOX,
        ),
    )


def _assumed(settings: Settings, rows: list[Row]) -> Iterator[str]:
    """A sentence on the range of returns that the intervals assume, if the environment does not declare it."""
    if None in settings["range"]:
        support = support_of(settings["range"], torch.cat([row.returns for row in rows]))
        missing = [
            name for name, end in zip(("lowest", "highest"), settings["range"], strict=True) if end is None
        ]
        yield (
            f"The environment declares no {' and no '.join(missing)} return, which is assumed from the measured "
            f"returns and as much again. The intervals hold only if no return is outside of {plain(support.low)} to "
            f"{plain(support.high)}. The attribute returns = (lowest, highest) of the environment declares the range."
        )


def _shown(row: Row) -> tuple[str | float | int, ...]:
    estimate = row.estimate
    return (
        row.name,
        round(estimate.value, 2),
        f"{plain(round(estimate.low, 1))} to {plain(round(estimate.high, 1))}",
        float(row.returns.min()),
        float(row.returns.median()),
        round(float(row.lengths.double().mean()), 1),
        int(row.cut.sum()),
    )


def _doubts(settings: Settings, rows: list[Row], *, ignored: bool) -> tuple[dict[str, list[str]], list[str]]:
    """The metrics that each raised doubt concerns, and a sentence for each doubt."""
    doubts: dict[str, list[str]] = {}
    reasons = []
    by_name = {row.name: row for row in rows}
    learned, clean = by_name.get("learned adversary"), rows[0].estimate.value
    others = [row for row in rows[1:] if row is not learned]
    rule = min(others, key=lambda row: row.estimate.value, default=None)
    if learned is not None and rule is not None and learned.estimate.value >= rule.estimate.value < clean:
        doubts[NOT_LEARNED] = ["worst_return"]
        reasons.append(
            f"The learned adversary did not learn: its mean return of {plain(learned.estimate.value)} is not below "
            f"that of {rule.name}, {plain(rule.estimate.value)}, so that the lowest return may be too high."
        )
    if ignored:
        doubts[IGNORED_SEED] = ["worst_return", "clean_return"]
        reasons.append("The environment ignores its seed: attackers were not compared on the same episodes.")
    cut = sum(int((row.cut & (row.lengths >= settings["limit"])).sum()) for row in rows)
    if cut and not settings["limited"]:
        doubts[CUT] = ["worst_return", "clean_return"]
        reasons.append(
            f"The environment has no limit, and {cut} episodes were cut after {settings['limit']} steps: their returns "
            "are those of the first steps."
        )
    return doubts, reasons
