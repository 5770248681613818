"""Double masking on traffic signs: the vote over masks of the network before and after training with masks, attacks on
certified signs, and the CPU time of a certificate beside its masked forward passes.
"""

import math
import statistics
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.meter import cpu_seconds
from benchmarks.parts import RUNS, part
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.traffic_signs import CLASSES, build, signs, trained
from holdfast.attacks import PatchAttack
from holdfast.certifiers.patch_masks import PatchMasks, ReadyPatchMasks, hidden
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.recipes import MaskedPatches
from holdfast.recipes.training.fit import Training
from holdfast.threats.transformations import Patch

WHAT = (
    "masks against patches of 4x4 pixels on traffic signs: certified signs, and attacks inside certificates"
)
ROW, N, ATTACKED, SEED, PAIRS = "patch-masks", 500, 12, 0, 9
THREAT, HOW = ThreatModel(Patch(4, 4)), PatchMasks()


def views(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Return the signs as other cameras show them: turned by up to 10 degrees, scaled by up to 15 %, shifted by up to 2
    pixels, and with another brightness and contrast. The tracks of the test split are not those of the train split.
    """

    def draw(size: float, *axes: int) -> Tensor:
        return size * (2 * torch.rand(len(x), *axes, generator=generator) - 1)

    angle, scale, shift = draw(math.radians(10)), 1 + draw(0.15), draw(2 / 16, 2)
    rows = (
        (angle.cos() * scale, -angle.sin() * scale, shift[:, 0]),
        (angle.sin() * scale, angle.cos() * scale, shift[:, 1]),
    )
    grid = F.affine_grid(
        torch.stack([torch.stack(row, 1) for row in rows], 1), list(x.shape), align_corners=False
    )
    turned = F.grid_sample(x, grid, padding_mode="border", align_corners=False) * draw(0.4, 1, 1, 1).exp()
    mean = turned.mean((1, 2, 3), keepdim=True)
    return (mean + (turned - mean) * draw(0.3, 1, 1, 1).exp()).clamp(0, 1)


RECIPE = MaskedPatches(tries=3, clean=0.0, training=Training(epochs=25, augment=views))
_SHOWN = ("n", "network, %", "vote, %", "certified, %", "masked forwards", "CPU s")
ATTACKS = {
    "PatchAttack, 200 places, 1 step": PatchAttack(places=200, steps=1),
    "PatchAttack, 20 places, 10 steps": PatchAttack(),
}


def measured() -> Outcome:
    training = part(ROW, "training", _train)
    names = ("given", "masked-patches")
    parts = {name: part(ROW, name, partial(_certified, name)) for name in names}
    attacks = part(ROW, "attacks", partial(_attacked, parts[names[1]]["measured"]["ids"]))
    cpu = part(ROW, "cpu", _cpu)
    table: list[Cells] = [
        {"recipe": "" if name == "given" else name}
        | {key: value for key, value in each["measured"].items() if key in _SHOWN}
        for name, each in parts.items()
    ]
    detail = {"training": training, **parts, "attacks": attacks, "cpu": cpu}
    before, after = (each["measured"] for each in parts.values())
    claims = [
        Claim("certified after masked-patches, % >= 55", after["certified, %"], 55.0, least=True),
        Claim("lost clean accuracy, the given network to the vote of the new one, points <= 3",
              before["network, %"] - after["vote, %"], 3.0),
        Claim("certified signs that an attack breaks <= 0", sum(row["broken"] for row in attacks["measured"]), 0),
        Claim("CPU of a certificate over that of its masked forwards <= 1.2", cpu["measured"]["ratio"], 1.2),
    ]  # fmt: skip
    config: Cells = {
        "threat": str(THREAT.constraint),
        "masks": HOW.masks,
        "n": N,
        "seed": SEED,
        "recipe": repr(replace(RECIPE, training=replace(RECIPE.training, augment="none"))),
        "augment": "views",
    }
    notes = [
        f"{row['attack']} on {row['certified signs']} certified signs: {row['broken']} broken, {row['CPU s']:.0f} CPU s"
        for row in attacks["measured"]
    ]
    return Outcome(table, claims, config, detail, notes + _by_kind(after["ids"]))


def _by_kind(ids: list[int]) -> list[str]:
    """How many signs of each kind are certified: two masks can hide the digit or the symbol of the first two kinds."""
    batch, kinds = _batch("test", N), {"speed limits": [*range(9)], "warning triangles": [11, *range(18, 32)]}
    named = {label for labels in kinds.values() for label in labels}
    kinds["other signs"] = [label for label in range(CLASSES) if label not in named]
    certified, notes = torch.isin(batch.ids, torch.tensor(ids)), []
    for kind, labels in kinds.items():
        of_kind = torch.isin(batch.y, torch.tensor(labels))
        notes.append(f"{kind}: {int((certified & of_kind).sum())} of {int(of_kind.sum())} certified")
    return notes


def _batch(split: str, n: int | None = None) -> Batch:
    """A split, or a random sample of it: the signs of a class follow each other in the file."""
    x, y = signs(split)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(SEED))[:n]
    return Batch(x[rows], y[rows], torch.arange(len(rows)))


def _train() -> Cells:
    model, train = Classifier(trained()), _batch("train")

    def fit() -> None:
        *_, last = RECIPE(model, train, THREAT, rng=Draws(SEED))
        last.put_into(model)

    seconds = cpu_seconds(fit)
    file = RUNS / ROW / "weights.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    assert isinstance(model.net, torch.nn.Module)
    save_file(model.net.state_dict(), file)
    return {"CPU s": seconds}


def _ready(name: str) -> ReadyPatchMasks:
    net = trained()
    if name != "given":
        net = build().eval()
        net.load_state_dict(load_file(RUNS / ROW / "weights.safetensors"))
    model = Classifier(net).eval().requires_grad_(requires_grad=False)
    return HOW.ready(model, _batch("test", 1), THREAT)


def _certified(name: str) -> dict[str, object]:
    """Certified signs, and the accuracy of the network on the whole split and of its vote on the signs."""
    ready, every, batch = _ready(name), _batch("test"), _batch("test", N)
    with torch.no_grad():
        network = ready.vote.base(every.x).argmax(1) == every.y
        right = torch.cat([ready.model(piece.x).argmax(1) == piece.y for piece in batch.split(16)])
    certified: list[Tensor] = []
    work: list[Tensor] = []

    def certify() -> None:
        for piece in batch.take(right).split(16):
            disagree, classified = ready.vote.disagreeing(piece.x, piece.y)
            certified.append(piece.ids[~disagree.any(1)])
            work.append(classified)

    seconds = cpu_seconds(certify)
    ids = torch.cat(certified).tolist()
    share = 100.0 / len(batch)
    return {
        "network": name,
        "n": N,
        "network, %": 100 * float(network.double().mean()),
        "vote, %": share * int(right.sum()),
        "certified, %": share * len(ids),
        "masked forwards": float(torch.cat(work).double().mean()),
        "CPU s": seconds,
        "ids": ids,
    }


def _attacked(ids: list[int]) -> list[Cells]:
    """Attacks on the vote at certified signs."""
    ready, batch = _ready("masked-patches"), _batch("test", N)
    inside = batch.take(torch.tensor(ids[:ATTACKED]))
    rows: list[Cells] = []
    for name, attack in ATTACKS.items():
        found: list[Tensor] = []
        seconds = cpu_seconds(
            lambda attack=attack, found=found: found.append(
                attack(ready.model, inside, THREAT, rng=Draws(SEED))
            )
        )  # type: ignore[misc]
        with torch.no_grad():
            broken = int((ready.model(found[0]).argmax(1) != inside.y).sum())
        rows.append({"attack": name, "certified signs": len(inside), "broken": broken, "CPU s": seconds})
    return rows


def _cpu() -> Cells:
    """Median ratio of alternated pairs, for one certified sign: the certificate, and its masked forwards alone."""
    ready, batch = _ready("masked-patches"), _batch("test", N)
    one = next(piece for piece in batch.split(1) if not ready.vote.disagreeing(piece.x, piece.y)[0].any())
    masks = len(ready.vote.masks)
    first, second = torch.triu_indices(masks, masks)
    hides = (ready.vote.masks[first] | ready.vote.masks[second]).split(128)
    copies = [hidden(one.x, each, ready.vote.base.bounds) for each in hides]

    def forwards() -> None:
        with torch.no_grad():
            for x in copies:
                ready.vote.base(x)

    ratios = [cpu_seconds(lambda: ready(one)) / cpu_seconds(forwards) for _ in range(PAIRS)]
    return {
        "one sign": "certificate over its masked forwards",
        "forwards": len(first),
        "ratio": statistics.median(ratios),
    }
