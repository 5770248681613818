"""Explains an attack on a policy: one episode without the attacker beside the same episode with the worst one."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from holdfast.audits.audit import AuditResult, open_audit
from holdfast.core.catalogue import AUDITS
from holdfast.core.errors import UsageError
from holdfast.explanation.case import Explained, Figure, bars
from holdfast.reports.charts import LOOKS, series
from holdfast.reports.tree import Chart, Picture
from holdfast.reports.words import plain
from holdfast.runs.store.columns import Form, validated_columns
from holdfast.runs.store.folder import read_chain, read_stage
from holdfast.threats.parsing import parse_threat
from holdfast.threats.policies import Observations

_FRAMES = 60
"""largest number of frames of the film"""
_AFTER = 1.3
"""length of the film in multiples of the shorter episode"""
_WIDTH, _HEIGHT = 480, 200
_FRAME_MS, _LAST_MS = 100, 2000
_TEXT, _COLOURS = 20, 32
"""height of the letters in pixels, and number of colours"""
_BLUE, _RED, _GREY = (33, 102, 172), (178, 24, 43), (140, 140, 140)
_CARTPOLE = "cartpole"
_VALUES: Mapping[str, Sequence[str]] = {
    _CARTPOLE: ("position (m)", "velocity (m/s)", "angle (rad)", "angular velocity (rad/s)"),
    "lqr": ("position", "velocity"),
}
"""names of the values of an observation in bundled environments"""
_CART_KEY = (
    " The thin red line is the pole as the policy observes it, and the arrow the force that it chooses."
)
_DRAWN = 4
"""largest number of values of observations that are drawn over the steps"""


def explain_episode(folder: Path) -> Explained:
    """Return the explanation of the assessment of a policy in a run folder, from its stored episodes.

    Raises `UsageError` for a run of another kind.
    """
    result = open_audit(folder)
    kind = result.content["kind"]
    if kind != "control":
        noun = AUDITS[kind].noun
        raise UsageError(
            f"{str(folder)!r} is {f'the {noun} of a policy or a generator' if noun else f'an audit {kind}'}, "
            "which stores no episodes to explain; explain a run of holdfast assess with a threat on observations, "
            "actions or parameters"
        )
    settings = result.content["config"]["settings"]
    worst = settings["rows"].index(result.facts["worst_attacker"])
    clean, attacked = (_episode(folder, settings["stages"][place]) for place in (0, worst))
    environment = str(result.content["data"]["name"])
    return _explained(result, environment, settings["rows"][worst], clean, attacked)


def _episode(folder: Path, stage: str) -> dict[str, Tensor]:
    stored = read_stage(folder, read_chain(folder, repair=False), stage)
    assert stored is not None  # `open_audit` has read it
    forms = {
        "return": Form(),
        "state": Form(("t", "d"), rows=(1, 2**40)),
        "shown": Form(("t", "d")),
        "action": Form(("t", "a")),
    }
    validated_columns(str(folder / stage), stored.columns, forms, {})
    return {name: stored.columns[name].float() for name in forms}


def _explained(
    result: AuditResult,
    environment: str,
    attacker: str,
    clean: dict[str, Tensor],
    attacked: dict[str, Tensor],
) -> Explained:
    lengths = len(clean["state"]), len(attacked["state"])
    returns = float(clean["return"][0]), float(attacked["return"][0])
    same = min(lengths)
    moved = (attacked["action"][:same] != clean["action"][:same]).any(1).nonzero()[:, 0]
    first = (
        f"the actions differ from step {int(moved[0])} on"
        if len(moved)
        else "no action differs in the steps of both"
    )
    names = _VALUES.get(environment, [f"value {place}" for place in range(clean["state"].shape[1])])
    threat = result.content["config"]["settings"]["threat"]
    film = _film(environment, clean, attacked, attacker)
    figures = (
        Figure(
            "film",
            f"the episode takes {lengths[1]} steps under the attacker {attacker}, and {lengths[0]} without it",
            f"An animated picture of at most {_FRAMES} frames: the episode without the attacker above (blue), and "
            "the same episode with it below (red).",
            ("step", *(f"clean {name}" for name in names), *(f"attacked {name}" for name in names)),
            _rows(clean["state"], attacked["state"]),
            (Picture(film, f"One episode without (blue) and with (red) the attacker {attacker}"),),
            note="Both begin in the same state. The film repeats."
            + (_CART_KEY if environment == _CARTPOLE else ""),
            columns=1,
        ),
        _attackers(result, attacker),
        _states(clean, attacked, names),
        _perturbations(attacked, names),
    )
    return Explained(
        f"{result.content['model']['name']} in {environment}",
        f"the return of one episode is {plain(returns[1])} under {attacker}, and {plain(returns[0])} without an "
        f"attacker; {first} ({threat})",
        figures,
        advice=(
            f"Train a policy that holds: holdfast harden MODEL {environment} --recipe robust-policy --threat {threat}.",
        )
        if isinstance(parse_threat(threat).constraint, Observations)
        else (),
        notes=("The episode is the first of those that judge, and was not chosen by its result.",),
        facts=(
            ("model", f"{result.content['model']['name']}, digest {result.content['model']['digest'][:16]}"),
            ("environment", environment),
            ("threat", threat),
            ("seed", str(result.content["seed"])),
        ),
    )


def _attackers(result: AuditResult, attacker: str) -> Figure:
    """The mean return under each attacker."""
    means = result.facts["mean_returns"]
    unattacked, *others = means
    lowered = {
        name: max(means[unattacked] - means[name], 0.0) for name in sorted(others, key=means.__getitem__)
    }
    return Figure(
        "attackers",
        f"of all attackers, {attacker} lowers the mean return most: from {plain(means[unattacked])} to "
        f"{plain(means[attacker])}"
        if any(lowered.values())
        else f"no attacker lowers the mean return of {plain(means[unattacked])}",
        "Mean return under each attacker, lowest first; a bar is as long as the return that the attacker costs.",
        ("attacker", "mean return", "lowered by"),
        tuple((name, means[name], lost) for name, lost in lowered.items()),
        bars=bars(
            list(lowered),
            list(lowered.values()),
            [f"{plain(means[name])} ({plain(lost)} less)" for name, lost in lowered.items()],
        ),
        note="All attackers were measured in the same episodes.",
    )


def _states(clean: dict[str, Tensor], attacked: dict[str, Tensor], names: Sequence[str]) -> Figure:
    """The states of both episodes, and what the policy observed."""
    return Figure(
        "states",
        "the states of both episodes, and what the policy observes in the attacked one",
        f"The first {min(len(names), _DRAWN)} values of the state over the steps of both episodes.",
        (
            "step",
            *(f"observed {name}" for name in names),
            *(f"action {place}" for place in range(attacked["action"].shape[1])),
        ),
        tuple(
            (step, *observed, *action)
            for step, (observed, action) in enumerate(
                zip(attacked["shown"].tolist(), attacked["action"].tolist(), strict=True)
            )
        ),
        charts=_charts(clean, attacked, names),
    )


def _perturbations(attacked: dict[str, Tensor], names: Sequence[str]) -> Figure:
    """The size of the perturbations of each value."""
    shift = (attacked["shown"] - attacked["state"]).abs()
    return Figure(
        "perturbations",
        f"the attacker changes what the policy observes by at most {plain(float(shift.max()))} in one value",
        "Largest and mean absolute perturbation of each value of the observations in the attacked episode.",
        ("value", "largest", "mean"),
        tuple(
            (str(name), float(shift[:, place].max()), float(shift[:, place].mean()))
            for place, name in enumerate(names)
        ),
        tabular=True,
    )


def _charts(clean: dict[str, Tensor], attacked: dict[str, Tensor], names: Sequence[str]) -> tuple[Chart, ...]:
    """A chart of each of the first values over the steps of the film."""
    end = _end(clean["state"], attacked["state"])
    lines = (
        ("without attacker", clean["state"][:end]),
        ("with attacker", attacked["state"][:end]),
        ("observed by the policy with attacker", attacked["shown"][:end]),
    )
    key = ", ".join(f"{name} ({look} line)" for (name, _), look in zip(lines, LOOKS, strict=True))
    return tuple(
        Chart(
            series([(name, values[:, place].tolist()) for name, values in lines]),
            "step",
            f"{names[place]} over the steps of both episodes",
            f"{names[place]}: {key}",
        )
        for place in range(min(len(names), _DRAWN))
    )


def _end(clean: Tensor, attacked: Tensor) -> int:
    """The number of steps of the film."""
    shorter, longer = sorted((len(clean), len(attacked)))
    return min(longer, math.ceil(_AFTER * shorter))


def _rows(clean: Tensor, attacked: Tensor) -> tuple[tuple[Any, ...], ...]:
    length, d = max(len(clean), len(attacked)), clean.shape[1]
    missing = (None,) * d
    return tuple(
        (
            step,
            *(clean[step].tolist() if step < len(clean) else missing),
            *(attacked[step].tolist() if step < len(attacked) else missing),
        )
        for step in range(length)
    )


def _film(environment: str, clean: dict[str, Tensor], attacked: dict[str, Tensor], attacker: str) -> str:
    """Return an animated PNG of both episodes as a data URL."""
    draw = _cart if environment == _CARTPOLE else _lines
    end = _end(clean["state"], attacked["state"])
    font, frames = ImageFont.load_default(_TEXT), []
    palette: Image.Image | None = None
    for step in range(0, end, max(1, -(-end // _FRAMES))):
        frame = Image.new("RGB", (_WIDTH, 2 * _HEIGHT), "white")
        canvas = ImageDraw.Draw(frame)
        for place, (episode, colour, name) in enumerate(
            ((clean, _BLUE, "without attacker"), (attacked, _RED, attacker))
        ):
            n, top = len(episode["state"]), place * _HEIGHT
            at = min(step, n - 1)
            draw(canvas, episode, at, top, colour)
            text = f"{name}: ended after {n} steps" if step >= n else f"{name}: step {at}"
            canvas.text((10, top + 6), text, fill=colour, font=font)
        canvas.line(((0, _HEIGHT), (_WIDTH, _HEIGHT)), fill=_GREY)
        palette = palette or frame.quantize(_COLOURS)  # one palette, because animations have no others
        frames.append(frame.quantize(palette=palette, dither=Image.Dither.NONE))
    durations = [_FRAME_MS] * (len(frames) - 1) + [_LAST_MS]
    file = io.BytesIO()
    frames[0].save(file, format="PNG", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _cart(
    canvas: ImageDraw.ImageDraw, episode: dict[str, Tensor], at: int, top: int, colour: tuple[int, int, int]
) -> None:
    """Draw a cart, its pole, the pole as the policy observes it, and the force. The line ends where the track does."""
    position, _, angle, _ = episode["state"][at].tolist()
    ground, pixels = top + _HEIGHT - 30, _WIDTH / 5.6  # 2.4 m to both sides, with a margin
    x = _WIDTH / 2 + position * pixels
    ends = ((_WIDTH / 2 - 2.4 * pixels, ground + 12), (_WIDTH / 2 + 2.4 * pixels, ground + 12))
    canvas.line(ends, fill=_GREY, width=2)
    canvas.rectangle((x - 24, ground - 12, x + 24, ground + 10), fill=colour)
    for shown, pole, width in ((float(episode["shown"][at, 2]), _RED, 2), (angle, "black", 6)):
        tip = (x + 110 * math.sin(shown), ground - 12 - 110 * math.cos(shown))
        canvas.line(((x, ground - 12), tip), fill=pole, width=width)
    side = 1 if float(episode["action"][at, 0]) > 0 else -1
    head = x + side * 62
    canvas.line(((x + side * 28, ground), (head, ground)), fill="black", width=3)
    canvas.polygon(((head, ground - 6), (head, ground + 6), (head + side * 9, ground)), fill="black")


def _lines(
    canvas: ImageDraw.ImageDraw, episode: dict[str, Tensor], at: int, top: int, colour: tuple[int, int, int]
) -> None:
    """Draw the values of the observations up to a step as lines."""
    states = episode["state"]
    some = states[:, :8]
    low, high = float(some.min()), float(some.max())
    width = max(high - low, 1e-9)
    for place in range(some.shape[1]):
        points: Sequence[tuple[float, float]] = [
            (
                10 + (_WIDTH - 20) * step / max(len(states) - 1, 1),
                top + _HEIGHT - 15 - (_HEIGHT - 45) * (float(some[step, place]) - low) / width,
            )
            for step in range(at + 1)
        ]
        if len(points) > 1:
            canvas.line(points, fill=colour if place == 0 else _GREY, width=2)
