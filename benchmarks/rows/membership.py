"""Membership inference on Location-30: scores with few and many references on the same networks, beside Privacy Meter's
function and ART's attack.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.absent import Absent
from benchmarks.networks import folder
from benchmarks.peers import peer, version
from benchmarks.record import Cells, Claim, Outcome
from holdfast.audits import membership_references
from holdfast.audits.membership_references import (
    ReferenceTraining,
    Signals,
    halves,
    joined,
    others,
    trained_signals,
)
from holdfast.core.draws import Draws

WHAT = "members of Location-30 that attacks find at 1 % false positives, with 2 to 63 reference networks"
NETWORKS, TOGETHER, TARGETS, OF_ART = 64, 16, 16, 4
POPULATION = 500
"""records that no network is trained on, which Privacy Meter's function needs"""
REFERENCES = (2, 4, 16, 62, 63)
FPR, HIDDEN = 0.01, 128

Attack = Callable[[Tensor, Tensor, Tensor], Tensor]
OURS = "BaVarIA"
ATTACKS: dict[str, Attack] = {
    OURS: membership_references.bavaria,
    "LiRA online": membership_references.lira_online,
    "LiRA offline": membership_references.lira_offline,
    "RMIA": membership_references.rmia,
    "RMIA, out only": partial(membership_references.rmia, converted=False),
}


def measured() -> Outcome:
    x, y = _location()
    n, rng = len(x) - POPULATION, Draws(0).at("membership")
    inside = torch.zeros(NETWORKS, len(x), dtype=torch.bool)
    inside[:, :n] = halves(torch.arange(n), NETWORKS, rng)
    started = time.process_time()
    parts = [range(first, first + TOGETHER) for first in range(0, NETWORKS, TOGETHER)]
    signals = joined([_trained(part, x, y, inside, rng) for part in parts])
    seconds = time.process_time() - started
    members, accuracy = inside[:, :n], (signals.right[:, :n] & ~inside[:, :n]).sum() / (~inside[:, :n]).sum()
    table: list[Cells] = []
    claims = [Claim(f"CPU seconds of {NETWORKS} networks <= 120", seconds, 120)]
    notes: list[str] = []
    theirs = _peer_rates(x, y, inside, signals, rng, notes)
    for k in REFERENCES:
        found = {
            name: _rates(attack, signals.scaled_logit[:, :n], members, k) for name, attack in ATTACKS.items()
        }
        table += [_row(name, k, *values) for name, values in found.items()]
        best = max(values[0] for name, values in found.items() if name != OURS)
        claims.append(
            Claim(
                f"{OURS} - best of LiRA and RMIA, {k} references >= -0.01",
                found[OURS][0] - best,
                -0.01,
                least=True,
            )
        )
    loss = _rates(
        lambda target, _references, _inside: membership_references.loss(target),
        signals.scaled_logit[:, :n],
        members,
        2,
    )
    table.append(_row("loss", 0, *loss))
    for name, (k, values) in theirs.items():
        table.append(_row(name, k, *values))
        ours = _rates(membership_references.bavaria, signals.scaled_logit[:, :n], members, k or 2)[0]
        claims.append(Claim(f"{OURS} - {name} >= 0", ours - values[0], 0.0, least=True))
    null = _null(signals.scaled_logit[:, :n], rng)
    claims += [
        Claim("AUC of the null control, 16 targets >= 0.47", null, 0.47, least=True),
        Claim("AUC of the null control, 16 targets <= 0.53", null, 0.53),
    ]
    config: Cells = {
        "networks": NETWORKS,
        "hidden": HIDDEN,
        "training": vars(ReferenceTraining()),
        "targets": TARGETS,
    }
    config |= {
        "records": n,
        "population": POPULATION,
        "fpr": FPR,
        "prior": vars(membership_references.Prior()),
        "seed": 0,
    }
    notes += [
        f"The networks classify {float(accuracy):.1%} of the records right that they were not trained on.",
        "With 63 references, the network of the complementary half is among them; otherwise it is left out.",
    ]
    return Outcome(table, claims, config, notes=notes)


def _location() -> tuple[Tensor, Tensor]:
    path = folder("HOLDFAST_DATA", "data") / "location30.npz"
    if not path.is_file():
        raise Absent(f"{path.name} is not at hand; HOLDFAST_DATA names its folder")
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["y"]).long()


def _net(place: int, features: int, classes: int) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(place)
        return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))


def _trained(part: Sequence[int], x: Tensor, y: Tensor, inside: Tensor, rng: Draws) -> Signals:
    nets = [_net(place, x.shape[1], int(y.max()) + 1) for place in part]
    draws = [rng.at("network", place) for place in part]
    return trained_signals(nets, x, y, inside[list(part)], ReferenceTraining(), draws)


def _chosen(target: int, references: int) -> list[int]:
    """References of a target: complementary pairs after its own, or all networks but the target itself."""
    if references == NETWORKS - 1:
        return [place for place in range(NETWORKS) if place != target]
    rest = others(target, NETWORKS)
    start = target // 2 * 2
    return [rest[(start + place) % len(rest)] for place in range(references)]


def _rates(attack: Attack, scaled_logit: Tensor, inside: Tensor, references: int) -> tuple[float, float]:
    """Mean TPR and mean AUC over the targets."""
    found, areas = [], []
    for target in range(TARGETS):
        used = _chosen(target, references)
        score = attack(scaled_logit[target], scaled_logit[used], inside[used])
        found.append(membership_references.tpr(score, inside[target], FPR))
        areas.append(membership_references.auc(score, inside[target]))
    return statistics.mean(found), statistics.mean(areas)


def _null(scaled_logit: Tensor, rng: Draws) -> float:
    """Mean AUC over the targets on two halves that no network was trained on."""
    null = halves(torch.arange(scaled_logit.shape[1]), NETWORKS, rng.at("null"))
    return _rates(membership_references.bavaria, scaled_logit, null, NETWORKS - 2)[1]


def _peer_rates(
    x: Tensor, y: Tensor, inside: Tensor, signals: Signals, rng: Draws, notes: list[str]
) -> dict[str, tuple[int, tuple[float, float]]]:
    """For each peer that is at hand, its number of references, its mean TPR and its mean AUC."""
    results: dict[str, tuple[int, tuple[float, float]]] = {}
    try:
        run_rmia = peer("modules.mia.attacks.rmia").run_rmia
        for k in (2, 62):
            results[f"Privacy Meter, {k} references"] = (k, _privacy_meter(run_rmia, inside, signals, k))
        notes.append(f"Privacy Meter: {version('modules')}.")
    except Absent as why:
        notes.append(str(why))
    try:
        results["ART, half of the labels"] = (0, _art(peer("art"), x, y, inside, rng))
        notes.append(f"ART: {version('art')}, black box with a random forest, {OF_ART} targets.")
    except Absent as why:
        notes.append(str(why))
    return results


def _privacy_meter(run_rmia: Any, inside: Tensor, signals: Signals, references: int) -> tuple[float, float]:
    p, n, found, areas = signals.scaled_logit.sigmoid().numpy(), len(inside[0]) - POPULATION, [], []
    for target in range(TARGETS):
        used = _chosen(target, references)
        score = torch.from_numpy(
            run_rmia(
                p[target, :n], p[used, :n].T, inside[used, :n].numpy().T, p[target, n:], p[used, n:].T, 0.3
            )
        )
        found.append(membership_references.tpr(score, inside[target, :n], FPR))
        areas.append(membership_references.auc(score, inside[target, :n]))
    return statistics.mean(found), statistics.mean(areas)


def _art(art: Any, x: Tensor, y: Tensor, inside: Tensor, rng: Draws) -> tuple[float, float]:
    """ART's attack learns from the true membership of half of the records, and is measured on the others."""
    from art.attacks.inference.membership_inference import MembershipInferenceBlackBox
    from art.estimators.classification import PyTorchClassifier

    n, found, areas = len(x) - POPULATION, [], []
    for target in range(OF_ART):
        net = _net(target, x.shape[1], int(y.max()) + 1)
        draws = [rng.at("network", target)]
        trained_signals([net], x, y, inside[target : target + 1], ReferenceTraining(), draws)
        wrapped = PyTorchClassifier(net.eval(), nn.CrossEntropyLoss(), (x.shape[1],), int(y.max()) + 1)
        known = rng.at("art", target).uniform(torch.arange(n)) < 0.5
        member = inside[target, :n]
        attack = MembershipInferenceBlackBox(wrapped, attack_model_type="rf")
        sides = [(x[:n][known & side].numpy(), y[:n][known & side].numpy()) for side in (member, ~member)]
        attack.fit(*sides[0], *sides[1])
        score = attack.infer(x[:n][~known].numpy(), y[:n][~known].numpy(), probabilities=True)
        likely = torch.from_numpy(np.asarray(score, dtype=np.float64)).reshape(int((~known).sum()), -1)[:, -1]
        found.append(membership_references.tpr(likely, member[~known], FPR))
        areas.append(membership_references.auc(likely, member[~known]))
    return statistics.mean(found), statistics.mean(areas)


def _row(attack: str, references: int, tpr: float, auc: float) -> Cells:
    return {"attack": attack, "references": references, "TPR at 1 %": tpr, "AUC": auc}
