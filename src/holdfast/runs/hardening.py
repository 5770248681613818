"""The harden verb: measure, train a new model within a budget, choose it on held-out examples, and measure again."""

import hashlib
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from holdfast.attacks import PGD
from holdfast.core.batch import UNLABELLED, Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.checkpoint import Checkpoint
from holdfast.core.draws import Draws
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Classifier
from holdfast.core.names import threat_text
from holdfast.core.threat import ThreatModel
from holdfast.ops.losses import margin
from holdfast.recipes.protocol import Recipe
from holdfast.reports.card import document as as_markdown
from holdfast.reports.card import judged
from holdfast.reports.numbers import percent, strict
from holdfast.runs import training
from holdfast.runs.assess import assess
from holdfast.runs.identity import code_digest, hardware, versions
from holdfast.runs.order import Order, Progress, Subject, silent
from holdfast.runs.pace import pace, within
from holdfast.runs.repeating import repeatable, way_out
from holdfast.runs.result import Result
from holdfast.runs.signals import Stopper, stoppable
from holdfast.runs.training import BEST, LAST, Point
from holdfast.sources.weights import written
from holdfast.store.files import usable, write_atomically
from holdfast.store.folder import opened, planned
from holdfast.store.records import document

LOOK = PGD(steps=20)
"""What chooses the checkpoint: more steps than training takes, and another loss."""
_HELD_OUT, _LEAST_HELD_OUT = 1_000, 50
_EVERY = 10  # at most one training example in so many is held out


@dataclass(frozen=True)
class Wish:
    """What a hardening is asked for."""

    recipe: Recipe
    recipe_name: str
    settings: Mapping[str, Any]
    """of the recipe, as plain values"""
    threat: ThreatModel
    judge: Order
    """how the model is measured before and after"""
    budget_s: float | None = None
    """wall time of the training, its looks at held-out examples included; None goes by the recipe's epochs"""
    seed: int = 0
    device: str = "cpu"
    command: str = ""


@dataclass(frozen=True)
class Hardened:
    """A new model, how it was made, and what it is worth beside the one it was made from."""

    model: Classifier
    before: Result
    after: Result
    curve: tuple[Point, ...]
    card: Mapping[str, Any]
    """recipe, settings, plan, both measurements, cost and versions, in the types of strict JSON"""
    weights: bytes
    """the new model as a safetensors file"""
    folder: Path | None = None

    def write(self, folder: str | Path) -> Path:
        """Write `model.safetensors`, `card.md` and `card.json` into a folder, which is made where it is missing."""
        place = Path(folder)
        with usable(place):
            place.mkdir(parents=True, exist_ok=True)
            write_atomically(place / "model.safetensors", self.weights)
            write_atomically(place / "card.json", document(self.card))
            write_atomically(place / "card.md", as_markdown(self.card).encode())
        return place

    def __str__(self) -> str:
        sides = [self.card[side]["metrics"] for side in ("before", "after")]
        said = [
            f"{name} {percent(sides[0][name]['value'])} → {percent(sides[1][name]['value'])}"
            for name in sides[0]
        ]
        epoch = f"epoch {self.card['chosen']['epoch']} of {self.card['plan']['epochs']}"
        return f"{self.card['recipe']}: {', '.join(said)} ({epoch})"


def split_of(data: Batch, seed: int) -> tuple[Batch, Batch]:
    """Training examples and held-out ones, all with labels; which are held out depends on the seed alone."""
    known = data.y != UNLABELLED
    labelled = int(known.sum())
    n = min(_HELD_OUT, labelled // _EVERY)
    if n < _LEAST_HELD_OUT:
        raise UsageError(
            f"{labelled} training examples leave {n} to choose the checkpoint by; at least "
            f"{_LEAST_HELD_OUT * _EVERY} are needed"
        )
    order = Draws(seed).at("held out").bits(data.ids).argsort()
    order = torch.cat((order[known[order]], order[~known[order]]))
    held, rest = order[:n].sort().values, order[n:].sort().values
    return data.take(rest), data.take(held)


def looked_at(model: Classifier, held: Batch, threat: ThreatModel) -> tuple[float, float]:
    """Accuracy on the held-out examples, and under the attack that chooses."""
    was = model.training
    model.eval()
    right, stands = 0, 0
    for some in held.split(256):
        with torch.no_grad():
            correct = margin(model(some.x), some) > 0
        right += int(correct.sum())
        left = some.take(correct)
        if len(left):
            x_adv = LOOK(model, left, threat, rng=Draws(0).at("look"))
            with torch.no_grad():
                stands += int((margin(model(x_adv), left) > 0).sum())
    model.train(was)
    return right / len(held), stands / len(held)


def harden(
    subject: Subject,
    data: Batch,
    test: Data,
    wish: Wish,
    *,
    run: Path,
    resume: bool = False,
    progress: Progress = silent,
) -> Hardened:
    """Train a copy of the model that holds under the threat, in a folder that a stopped run goes on in."""
    _refuse_untrainable(subject.model)
    device = torch.device(wish.device)
    rest, held = (part.to(device) for part in split_of(data, wish.seed))
    model = deepcopy(subject.model).to(device)
    # it refuses here what it cannot learn from, before anything is measured; nothing is trained until it is iterated
    wish.recipe(model, rest, wish.threat, rng=Draws(wish.seed))
    known = planned(run)
    plan = known["plan"] if known else _plan(wish, model, rest, held)
    manifest = _manifest(subject, data, test, wish, plan, device)
    again = way_out(wish.command, run)
    with stoppable(again) as stopper, opened(run, manifest, _about(wish), resume=resume) as folder:
        judge = replace(wish.judge, device=wish.device)
        before = assess(subject, test, judge, run=run / "before", resume=True, progress=progress)
        curve = _trained(folder.path / "checkpoints", plan["epochs"], wish, model, rest, held, stopper)
        best = training.kept(folder.path / "checkpoints", BEST)
        assert best is not None
        new = deepcopy(subject.model)
        best.checkpoint.put_into(new)
        name = f"{subject.card.get('name', 'model')}, {wish.recipe_name}"
        hardened = replace(
            subject, model=new.eval(), digest=_digest(best.checkpoint), card={**subject.card, "name": name}
        )
        after = assess(hardened, test, judge, run=run / "after", resume=True, progress=progress)
        assert isinstance(new.net, nn.Module)  # anything else was refused
        weights = written(new.net, _described(subject, manifest))
        card = _card(wish, manifest, hardened, (before, after), curve, best.curve[-1])
        with stopper.finishing():
            folder.record("card", card)
    return Hardened(new, before, after, curve, card, weights, run)


def _described(subject: Subject, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights file says of itself: how it is opened, and the digest of what made it."""
    known = {key: subject.card[key] for key in ("architecture", "arguments") if key in subject.card}
    said = {
        key: subject.card[key]
        for key in ("bounds", "mean", "std", "classes")
        if subject.card.get(key) is not None
    }
    return {**known, **said, "training": digest(canonical([manifest["digests"], manifest["plan"]]))}


def _card(
    wish: Wish,
    manifest: Mapping[str, Any],
    hardened: Subject,
    sides: tuple[Result, Result],
    curve: tuple[Point, ...],
    chosen: Point,
) -> dict[str, Any]:
    summaries = [side.summary() for side in sides]
    arch = "" if "architecture" in hardened.card else " --arch file.py:factory"
    found: dict[str, Any] = strict(
        {
            "name": hardened.card["name"],
            "recipe": wish.recipe_name,
            "settings": wish.settings,
            "threat": threat_text(str(wish.threat.constraint), None, "gradients", None),
            "plan": manifest["plan"],
            "seed": wish.seed,
            "before": judged(summaries[0]),
            "after": judged(summaries[1]),
            "chosen": chosen.to_json(),
            "curve": [point.to_json() for point in curve],
            "cost": {name: sum(getattr(point, name) for point in curve) for name in ("cpu_s", "wall_s")},
            "model": dict(hardened.card),
            "data": manifest["data"],
            "versions": manifest["versions"],
            "hardware": manifest["hardware"],
            "command": repeatable(wish.command),
            "opened_by": f"holdfast assess model.safetensors {manifest['data']['name']}{arch}",
        }
    )
    return found


def _refuse_untrainable(model: Classifier) -> None:
    if not isinstance(model.net, nn.Module) or not any(True for _ in model.parameters()):
        raise TargetError("the model has no parameters to train; give a network, as in net.py:make")
    if model.access != "gradients":
        raise TargetError(
            f"the model gives {model.access} and no gradients, so it cannot be trained; {model.hides}"
        )
    frozen = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    if len(frozen) == sum(1 for _ in model.parameters()):
        raise UsageError(
            f"all {len(frozen)} parameters are frozen; set requires_grad where the factory builds it"
        )


def _plan(wish: Wish, model: Classifier, rest: Batch, held: Batch) -> dict[str, Any]:
    """Epochs, and the pace that they were planned by."""
    epochs = wish.recipe.training.epochs
    if wish.budget_s is None:
        return {"epochs": epochs, "stages": _STAGES}
    found = pace(wish.recipe, model, rest, wish.threat, lambda net: looked_at(net, held, wish.threat))
    return {
        "epochs": within(wish.budget_s, found),
        "budget_s": wish.budget_s,
        "update_s": found.update,
        "epoch_s": found.epoch,
        "stages": _STAGES,
    }


def _trained(
    place: Path, epochs: int, wish: Wish, model: Classifier, rest: Batch, held: Batch, stopper: Stopper
) -> tuple[Point, ...]:
    """The curve over all epochs; the checkpoints of the last and of the best are in their files."""
    recipe: Any = replace(wish.recipe, training=replace(wish.recipe.training, epochs=epochs))  # type: ignore[type-var]
    last = training.kept(place, LAST)
    curve = () if last is None else last.curve
    highest = max((_score(point) for point in curve), default=(-1.0, -1.0))
    shown = deepcopy(model)
    cpu, wall = time.process_time(), time.perf_counter()
    after = None if last is None else last.checkpoint
    if _stale(curve, wish.recipe.training.patience):
        return curve
    for checkpoint in recipe(model, rest, wish.threat, rng=Draws(wish.seed), after=after):
        checkpoint.put_into(shown)
        clean, robust = looked_at(shown, held, wish.threat)
        now = time.process_time(), time.perf_counter()
        measured = dict(checkpoint.measured)
        point = Point(
            checkpoint.epoch, **measured, clean=clean, robust=robust, cpu_s=now[0] - cpu, wall_s=now[1] - wall
        )
        cpu, wall = now
        curve = (*curve, point)
        with stopper.finishing():
            if _score(point) > highest:
                highest = _score(point)
                training.keep(place, BEST, checkpoint, curve)
            training.keep(place, LAST, checkpoint, curve)
        if _stale(curve, wish.recipe.training.patience):
            break
    return curve


def _stale(curve: tuple[Point, ...], patience: int) -> bool:
    """Whether so many epochs have passed since the held-out robust accuracy was last better than ever; never for 0."""
    heights = [point.robust for point in curve]
    return bool(patience and heights) and len(heights) - 1 - heights.index(max(heights)) >= patience


def _score(point: Point) -> tuple[float, float]:
    return point.robust, point.clean


def _digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over the new weights, in hex."""
    sha = hashlib.sha256()
    for name, value in sorted(checkpoint.tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


_STAGES = ["before", "training", "after"]


def _manifest(
    subject: Subject, data: Batch, test: Data, wish: Wish, plan: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    constraint = wish.threat.constraint
    config = strict(
        {
            "recipe": wish.recipe_name,
            "settings": wish.settings,
            "threat": {"norm": type(constraint).__name__, "eps": constraint.eps},
            "suite": wish.recipe_name,
            "budget_s": wish.budget_s,
            "seed": wish.seed,
        }
    )
    return {
        "verb": "harden",
        "digests": {
            "config": digest(canonical(config)),
            "model": subject.digest,
            "data": digest(canonical([test.digest, digest_of(data)])),
            "code": code_digest(),
        },
        "config": config,
        "model": strict(dict(subject.card)),
        "data": {"name": test.name, "n": len(test)},
        "versions": versions(),
        "hardware": hardware(device),
        "seed": wish.seed,
        "plan": dict(plan),
    }


def digest_of(data: Batch) -> str:
    """SHA-256 over inputs and labels, in hex."""
    sha = hashlib.sha256(data.x.cpu().contiguous().numpy().tobytes())
    sha.update(data.y.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def _about(wish: Wish) -> dict[str, Any]:
    return {"created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "command": repeatable(wish.command)}
