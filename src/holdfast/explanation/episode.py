"""Explains an attack on a policy: one episode without the attacker beside the same episode with the worst one."""

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from holdfast.audits.audit import AuditResult, open_audit
from holdfast.core.errors import UsageError
from holdfast.explanation.case import Explained, Figure
from holdfast.reports.tree import Picture
from holdfast.reports.words import plain
from holdfast.runs.store.columns import Form, validated_columns
from holdfast.runs.store.folder import read_chain, read_stage

_FRAMES = 60
"""largest number of frames of the film"""
_AFTER = 1.3
"""length of the film in multiples of the shorter episode"""
_WIDTH, _HEIGHT = 480, 200
_FRAME_MS = 100
_BLUE, _RED, _GREY = (33, 102, 172), (178, 24, 43), (140, 140, 140)
_CARTPOLE = "cartpole"
_VALUES = ("position", "velocity", "angle", "angular velocity")


def explain_episode(folder: Path) -> Explained:
    """Return the explanation of the assessment of a policy in a run folder, from its stored episodes.

    Raises `UsageError` for a run of another kind.
    """
    result = open_audit(folder)
    kind = result.content["kind"]
    if kind != "control":
        raise UsageError(
            f"{str(folder)!r} contains an audit of the kind {kind}, and episodes are stored by holdfast assess with a "
            "threat on observations, actions or parameters"
        )
    settings = result.content["config"]["settings"]
    worst = settings["rows"].index(result.facts["worst_attacker"])
    clean, attacked = (_episode(folder, settings["stages"][place]) for place in (0, worst))
    environment = str(result.content["data"]["name"])
    return _explained(result, environment, settings["rows"][worst], clean, attacked)


def _episode(folder: Path, stage: str) -> dict[str, Tensor]:
    stored = read_stage(folder, read_chain(folder, repair=False), stage)
    assert stored is not None  # `open_audit` has read it
    forms = {"state": Form(("t", "d")), "shown": Form(("t", "d")), "action": Form(("t", "a"))}
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
    same = min(lengths)
    moved = (attacked["action"][:same] != clean["action"][:same]).any(1).nonzero()[:, 0]
    first = (
        f"the first action differs in step {int(moved[0])}"
        if len(moved)
        else "no action of its steps differs"
    )
    d = clean["state"].shape[1]
    names = _VALUES if environment == _CARTPOLE else [f"value {place}" for place in range(d)]
    threat = result.content["config"]["settings"]["threat"]
    film = _film(environment, clean["state"], attacked["state"], attacker)
    shift = (attacked["shown"] - attacked["state"]).abs()
    figures = (
        Figure(
            "film",
            f"the episode takes {lengths[1]} steps under the attacker {attacker}, and {lengths[0]} without it",
            f"An animated picture of at most {_FRAMES} frames: the episode without the attacker above (blue), and "
            "the same episode with it below (red).",
            ("step", *(f"clean {name}" for name in names), *(f"attacked {name}" for name in names)),
            _rows(clean["state"], attacked["state"]),
            (Picture(film, f"One episode without (blue) and with (red) the attacker {attacker}"),),
            note="Both begin in the same state. The film repeats, and needs no script.",
        ),
        Figure(
            "perturbations",
            f"the attacker changes what the policy observes by at most {plain(float(shift.max()))} in one value",
            "Largest and mean absolute perturbation of each value of the observations in the attacked episode.",
            ("value", "largest", "mean"),
            tuple(
                (str(name), float(shift[:, place].max()), float(shift[:, place].mean()))
                for place, name in enumerate(names)
            ),
            tabular=True,
        ),
    )
    return Explained(
        f"{result.content['model']['name']} in {environment}",
        f"{first}; it takes {lengths[1]} steps under {attacker} and {lengths[0]} without an attacker ({threat})",
        figures,
        advice=(
            f"Train a policy that holds: holdfast harden MODEL {environment} --recipe robust-policy --threat {threat}.",
        ),
        notes=("The episode is the first of those that judge, and was not chosen by its result.",),
        facts=(
            ("model", f"{result.content['model']['name']}, digest {result.content['model']['digest'][:16]}"),
            ("environment", environment),
            ("threat", threat),
            ("seed", str(result.content["seed"])),
        ),
    )


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


def _film(environment: str, clean: Tensor, attacked: Tensor, attacker: str) -> str:
    """Return an animated PNG of both episodes as a data URL."""
    draw = _cart if environment == _CARTPOLE else _lines
    shorter, longest = sorted((len(clean), len(attacked)))
    longest = min(longest, round(_AFTER * shorter))
    every = max(1, -(-longest // _FRAMES))
    frames = []
    for step in range(0, longest, every):
        frame = Image.new("RGB", (_WIDTH, 2 * _HEIGHT), "white")
        canvas = ImageDraw.Draw(frame)
        for place, (states, colour, name) in enumerate(
            ((clean, _BLUE, "without attacker"), (attacked, _RED, attacker))
        ):
            at = min(step, len(states) - 1)
            ended = " (ended)" if step >= len(states) else ""
            top = place * _HEIGHT
            draw(canvas, states, at, top, colour)
            canvas.text((8, top + 6), f"{name}, step {at}{ended}", fill="black")
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(
        file, format="PNG", save_all=True, append_images=frames[1:], duration=_FRAME_MS, loop=0, optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _cart(
    canvas: ImageDraw.ImageDraw, states: Tensor, at: int, top: int, colour: tuple[int, int, int]
) -> None:
    """Draw a cart and its pole; the ends of the line are those of the track."""
    position, _, angle, _ = states[at].tolist()
    ground, pixels = top + _HEIGHT - 30, _WIDTH / 5.6  # 2.4 m to both sides, with a margin
    x = _WIDTH / 2 + position * pixels
    canvas.line(
        ((_WIDTH / 2 - 2.4 * pixels, ground + 12), (_WIDTH / 2 + 2.4 * pixels, ground + 12)),
        fill=_GREY,
        width=2,
    )
    canvas.rectangle((x - 24, ground - 12, x + 24, ground + 10), fill=colour)
    tip = (x + 100 * math.sin(angle), ground - 12 - 100 * math.cos(angle))
    canvas.line(((x, ground - 12), tip), fill="black", width=6)


def _lines(
    canvas: ImageDraw.ImageDraw, states: Tensor, at: int, top: int, colour: tuple[int, int, int]
) -> None:
    """Draw the values of the observations up to a step as lines."""
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
