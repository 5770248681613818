"""Audio networks that packages carry, under snr:40dB: `fast` beside a plain PGD loop, 100 clips each."""

from collections.abc import Callable
from functools import partial

import torch

import holdfast
from benchmarks.absent import Absent
from benchmarks.packaged_audio import RATE, Packaged, pitch, speakers, speech_activity
from benchmarks.parts import part
from benchmarks.peers import version
from benchmarks.record import Cells, Claim, Outcome
from benchmarks.rows.sound import STEPS, left, plain_pgd, right
from holdfast.core.batch import Batch
from holdfast.core.draws import Draws
from holdfast.core.model import Bounds, Classifier
from holdfast.threats.parsing import parse_threat

WHAT = "audio networks of packages, 100 clips each: share left by `fast`, by a plain PGD loop and by noise"
N, THREAT = 100, "snr:40dB"
MODELS: dict[str, Callable[[int], Packaged]] = {
    "silero_vad": speech_activity,
    "resemblyzer": speakers,
    "torchcrepe": pitch,
}


def _measured(name: str) -> Cells:
    """The shares of one network."""
    packaged, threat = MODELS[name](N), parse_threat(THREAT)
    model = Classifier(packaged.net, bounds=Bounds(-1.0, 1.0)).eval()
    batch = Batch(packaged.x, packaged.y, torch.arange(N))
    clips = holdfast.open_data((packaged.x, packaged.y), sampling_rate=RATE)
    assessed = holdfast.assess(packaged.net, clips, THREAT, "fast", doubts=False, device="cpu")
    robust = assessed.metrics["suite_robust_accuracy"]
    noise = threat.constraint.sample(batch, model.bounds, Draws(0).at("noise"))
    return {
        "package": name,
        "threat": THREAT,
        "clean, %": 100 * right(model, batch, batch.x).double().mean().item(),
        "noise, %": left(model, batch, threat, noise),
        "plain PGD-40, %": left(model, batch, threat, plain_pgd(model, batch, threat)),
        "fast, %": f"{100 * robust.value:.1f} ({100 * robust.low:.1f}–{100 * robust.high:.1f})",
        "lower end, %": 100 * robust.low,
        "backward passes": sum(attack.cost.backwards for attack in assessed.evidence.attacks),
        "difference from the package": packaged.difference,
        "of": packaged.compared,
    }


def measured() -> Outcome:
    table: list[Cells] = []
    notes: list[str] = []
    for name in MODELS:
        try:
            table.append(part("sound-packages", name, partial(_measured, name))["measured"])
        except Absent as why:
            notes.append(f"{name}: {why}; see benchmarks/packaged_audio.py")
    if not table:
        return Outcome([], [], {}, notes=notes)
    claims = [
        Claim(
            "largest difference from outputs of the packages <= 1e-4",
            max(row["difference from the package"] for row in table),
            1e-4,
        ),
        Claim(
            "fewest backward passes of the suite >= 1",
            min(row["backward passes"] for row in table),
            1,
            least=True,
        ),
        Claim(
            "left by plain PGD-40 - lower end of the interval of fast, points, worst >= 0",
            min(row["plain PGD-40, %"] - row["lower end, %"] for row in table),
            0,
            least=True,
        ),
    ]
    config = {"n": N, "threat": THREAT, "steps": STEPS, "versions": {name: version(name) for name in MODELS}}
    return Outcome(table, claims, config, notes=notes)
