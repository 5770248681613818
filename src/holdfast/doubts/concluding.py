"""Decides from the results of the probes whether each doubt is raised."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from holdfast.core.evidence import Columns, Doubt, DoubtState
from holdfast.core.names import suite_name
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Access, Ids, Mask, PerExample
from holdfast.doubts import thresholds as at
from holdfast.doubts.names import DOUBTS, FREE
from holdfast.doubts.probing import (
    AGAIN,
    PROBES,
    SEARCHES,
    Found,
    limit,
    probe_title,
    probes_for,
    probing_threat,
    surviving_examples,
    within_budget,
)
from holdfast.ops.statistics import against_majority, clopper_pearson, mcnemar

NO_PASSES: Mapping[str, Mask] = {}


@dataclass(frozen=True)
class Circumstances:
    """Information on a run that decides doubts in addition to the columns of its attacks, such as its threat model."""

    threat: ThreatModel
    suite: str = ""
    """name and version of the suite; empty for a list of attacks, for which only the doubts in `FREE` are raised"""
    in_training: tuple[str, ...] = ()
    """names of the layers that were in train mode; the model was measured in eval mode"""
    first_gradient_dead: Mask | None = None
    """mask of the examples whose first gradient is zero or NaN, for a list of attacks; None if it was not recorded"""
    blind: bool = False
    """whether a detector's score has no gradient with respect to any input"""
    randomised: bool = False
    """whether the model is randomised, so that a single output proves nothing"""
    input: Doubt = Doubt("input", "not measured")
    """doubt whether the data fit the model, which is measured before the attacks"""
    access: Access = "gradients"
    """largest access that the model itself gives, regardless of what the threat model allows"""


@dataclass(frozen=True)
class Findings:
    """All doubts of a run with their states, and the examples that the suite did not break but another attack did."""

    doubts: tuple[Doubt, ...]
    fallen: Mapping[str, Ids] = field(default_factory=dict)
    """ids of the examples that a probe or pass broke and the suite did not, by name of the probe or pass"""


def conclude(
    found: Found, columns: Columns, circumstances: Circumstances, passes: Mapping[str, Mask] = NO_PASSES
) -> Findings:
    """Return all doubts with their states, such as raised or clear, computed from the results of the probes and the
    columns of the suite.

    `columns` are those of the suite, with the clean `nan` and `is_probability`. `passes` are masks (n) of the examples
    that each pass or probe outside the suite broke, as evaluated by the harness. For a list of attacks (no suite), only
    the doubts in `FREE` are returned, and `not-exhausted` if a pass broke examples that survived the attacks.
    """
    fallen = missed_by_suite(columns, circumstances.threat, passes)
    case = _Case(found, columns, circumstances, fallen)
    names = DOUBTS if circumstances.suite else (*FREE, *(("not-exhausted",) if fallen else ()))
    return Findings(tuple(_CONCLUSIONS[name](case) for name in DOUBTS if name in names), fallen)


def missed_by_suite(columns: Columns, threat: ThreatModel, passes: Mapping[str, Mask]) -> dict[str, Ids]:
    """Return the ids of the examples that survive the suite but that a probe or another attack outside the suite broke,
    by the name of that attack.
    """
    left = surviving_examples(columns, threat)
    ids_by_pass = {name: columns["id"][broken & left] for name, broken in passes.items()}
    return {name: ids for name, ids in ids_by_pass.items() if len(ids)}


@dataclass(frozen=True)
class _Case:
    found: Found
    columns: Columns
    circumstances: Circumstances
    fallen: Mapping[str, Ids]

    def broken(self, probe: str, column: str = "broken") -> Mask | None:
        return self.found[probe].columns[column] if probe in self.found else None

    def absent(self, name: str, *probes: str) -> Doubt:
        """Return a doubt that could not be tested because its probes did not run, with the reason."""
        threat = self.circumstances.threat
        within = probing_threat(threat, self.columns)
        if within.constraint.eps == 0:
            return Doubt(name, "not applicable", says="eps is 0, so no input may change")
        for probe in PROBES:
            if probe.name in probes and not threat.gives(probe.needs):
                says = f"it needs access to {probe.needs}, and {limit(threat, self.circumstances.access, probe.needs)}"
                return Doubt(name, "not applicable", says=says)
        if not set(probes) <= {probe.name for probe in probes_for(within)} | {"again"}:
            return Doubt(name, "not applicable", says=f"there is no such attack under {within.constraint}")
        return Doubt(name, "not measured", says="there was no example to measure it on")


def _judged(name: str, statistic: float, threshold: float, n: int, says: str, *, more: bool = True) -> Doubt:
    """Raised if the statistic is above the threshold and `more` is true, otherwise clear."""
    return Doubt(name, "raised" if statistic > threshold and more else "clear", statistic, threshold, n, says)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(mask: Mask) -> str:
    return _percent(float(mask.double().mean()))


def _zero_gradient(case: _Case) -> Doubt:
    name, watched = "zero-gradient", case.circumstances.first_gradient_dead
    if "gradients" in case.found:
        dead, flat = case.found["gradients"].columns["dead"], case.found["gradients"].columns["flat"]
        says = (
            "the gradient of the margin is zero or NaN, both at the clean input and at a random point, for "
            f"{int(dead.sum())} of {len(dead)} examples"
        )
        if flat.any():
            says += f"; only that of the cross-entropy is for {int(flat.sum())} more, because of saturation"
    elif watched is not None and len(watched):
        dead = watched
        says = (
            f"the first gradient of the attack is zero or NaN for {int(dead.sum())} of {len(dead)} examples"
        )
    else:
        return case.absent(name, "gradients")
    if case.circumstances.blind:
        says += (
            "; no gradient of the detector's score reaches any input, so attacks cannot evade it by gradients"
        )
        return Doubt(name, "raised", 1.0, at.ZERO_GRADIENTS, len(dead), says)
    return _judged(name, float(dead.double().mean()), at.ZERO_GRADIENTS, len(dead), says)


def _probabilities(case: _Case) -> Doubt:
    rows, threat = case.columns["is_probability"], case.circumstances.threat
    if not threat.gives("scores"):
        says = f"{limit(threat, case.circumstances.access, 'scores')}, so the attacker sees no scores"
        return Doubt("probabilities", "not applicable", says=says)
    says = f"{int(rows.sum())} of {len(rows)} rows of the output are probabilities: they sum to 1 and none is negative"
    state: DoubtState = "raised" if bool(rows.all()) else "clear"
    return Doubt("probabilities", state, float(rows.double().mean()), 1.0, len(rows), says)


def _scale(case: _Case) -> Doubt:
    plain, small = case.broken("cross-entropy"), case.broken("small-cross-entropy")
    if plain is None or small is None:
        return case.absent("scale", "cross-entropy", "small-cross-entropy")
    test, n = mcnemar(small, plain), len(plain)
    says = (
        f"PGD-20 on the cross-entropy breaks {_share(plain)}, and with logits scaled to 1 % {_share(small)} (exact "
        f"McNemar p = {test.p:.2g})"
    )
    ahead = (test.only_first - test.only_second) / n
    return _judged("scale", ahead, at.POINTS_BY_SCALE, n, says, more=test.p < at.P_BY_RIVAL)


def _rival(case: _Case, name: str, weak: tuple[str, str], strong: tuple[str, str]) -> Doubt:
    """A doubt raised if a weaker attack beats a stronger one on the same sample; each is a probe and its title."""
    one, other = case.broken(weak[0]), case.broken(strong[0])
    if one is None or other is None:
        return case.absent(name, weak[0], strong[0])
    test, n = mcnemar(one, other), len(one)
    ahead = (test.only_first - test.only_second) / n
    says = (
        f"{weak[1]} breaks {_share(one)} of the sample, {strong[1]} "
        f"{_share(other)} (exact McNemar p = {test.p:.2g})"
    )
    return _judged(name, ahead, at.POINTS_BY_RIVAL, n, says, more=test.p < at.P_BY_RIVAL)


def _one_step(case: _Case) -> Doubt:
    return _rival(
        case, "one-step", ("one-step", "FGSM alone"), ("cross-entropy", "PGD-20 on the cross-entropy")
    )


def _black_box(case: _Case) -> Doubt:
    blind = f"Square with {within_budget(SEARCHES, case.circumstances.threat):,} queries"
    return _rival(case, "black-box", ("search", blind), ("margin", "PGD on the margin, twice 20 steps,"))


def _noise(case: _Case) -> Doubt:
    gone = case.broken("noise")
    if gone is None:
        return case.absent("noise", "noise")
    if case.circumstances.randomised:
        says = "the model is randomised, so that one of many outputs may be wrong for any input"
        return Doubt("noise", "not applicable", says=says)
    draws = within_budget(at.NOISE_DRAWS, case.circumstances.threat)
    says = f"{draws} random inputs break {int(gone.sum())} of {len(gone)} surviving examples"
    return _judged("noise", float(gone.double().mean()), at.NOISE, len(gone), says)


def _not_exhausted(case: _Case) -> Doubt:
    name, again = "not-exhausted", case.broken("again")
    others = {each: ids for each, ids in case.fallen.items() if each != probe_title(AGAIN)}
    if again is None and not others and not any(probe in case.found for probe in _BREAKING):
        return case.absent(name, "again")
    elsewhere = torch.unique(torch.cat([torch.empty(0, dtype=torch.int64), *others.values()])).numel()
    fresh, tried = (0, 0) if again is None else (int(again.sum()), len(again))
    says = []
    if again is not None:
        says.append(
            f"a fresh pass of the suite breaks {fresh} of the {tried} surviving examples closest to the boundary"
        )
    if elsewhere:
        says.append(
            f"{elsewhere} {('example' if elsewhere == 1 else 'examples')} that survived the suite "
            f"{('was' if elsewhere == 1 else 'were')} broken by {', '.join(sorted(others))}"
        )
        return _judged(name, float(elsewhere), 0.0, tried, "; ".join(says))
    return _judged(name, float(fresh), float(at.FRESH_BROKEN - 1), tried, "; ".join(says))


_BREAKING = tuple(probe.name for probe in PROBES if probe.breaks)


def _transfer(case: _Case) -> Doubt:
    if not case.circumstances.threat.surrogates:
        return Doubt(
            "transfer", "not measured", says="no surrogate was declared; name one with --surrogate MODEL"
        )
    transferred = "a transfer attack from the surrogates"
    return _rival(
        case, "transfer", ("transfer", transferred), ("margin", "PGD on the margin, twice 20 steps,")
    )


def _whole_box(case: _Case) -> Doubt:
    gone = case.broken("whole-box")
    if gone is None:
        return case.absent("whole-box", "whole-box")
    left, n = int((~gone).sum()), len(gone)
    low, _ = clopper_pearson(left, n)
    says = f"with every legal input allowed, {left} of {n} examples survive (at least {_percent(low)})"
    return _judged("whole-box", low, at.WHOLE_BOX, n, says)


def _largest(values: PerExample) -> float:
    return float(values.max()) if len(values) else 0.0


def _randomness(case: _Case) -> Doubt:
    if "steadiness" not in case.found:
        return case.absent("randomness", "steadiness")
    moved = case.found["steadiness"].columns["repeat"]
    largest = _largest(moved)
    says = f"two calls with the same input differ by at most {largest:.1g} of the largest logit"
    averaged = suite_name(case.circumstances.suite) == "rand"
    if largest > at.CHANGE:
        says += (
            "; the suite averages over draws" if averaged else "; use --suite rand, which averages over draws"
        )
    return _judged("randomness", largest, at.CHANGE, len(moved), says, more=not averaged)


def _state(case: _Case) -> Doubt:
    training = case.circumstances.in_training
    listed = ", ".join(training[:3]) + (" …" if len(training) > 3 else "")
    modes = f"layers were in training mode ({listed}), but measured in evaluation mode" if training else ""
    if "steadiness" not in case.found:
        state: DoubtState = "raised" if training else "clear"
        says = modes or "no layer was in training mode; order, batch and history were not tested"
        return Doubt("state", state, float(len(training)), 0.0, len(case.columns["id"]), says)
    seen = case.found["steadiness"].columns
    # for a randomised model, only calls with the same seed can show a dependence on the history
    random = _largest(seen["repeat"]) > at.CHANGE
    changes = {
        kind: _largest(seen[kind]) for kind in (("history",) if random else ("order", "batch", "history"))
    }
    worst = max(changes, key=lambda kind: changes[kind])
    says = (
        f"of {', '.join(changes)} the {worst} changes the logits most, by {changes[worst]:.1g} of the largest"
    )
    says = f"{modes}; {says}" if modes else says
    raised = bool(training) or changes[worst] > at.CHANGE
    return Doubt(
        "state", "raised" if raised else "clear", changes[worst], at.CHANGE, len(seen["repeat"]), says
    )


def _loss_spread(case: _Case) -> Doubt:
    """Compares the best loss with the worst untargeted one, since targeted losses are weaker in general."""
    untargeted = {
        "the cross-entropy": case.broken("cross-entropy"),
        "the margin": case.broken("margin", "once"),
        "the margin in probability": case.broken("probability-margin"),
    }
    losses = {name: mask for name, mask in untargeted.items() if mask is not None}
    if len(losses) < len(untargeted):
        return case.absent("loss-spread", "cross-entropy", "margin", "probability-margin")
    worst = min(losses, key=lambda name: int(losses[name].sum()))
    aimed = case.broken("runner-up")
    rivals = losses if aimed is None else {**losses, "the runner-up": aimed}
    best = max(rivals, key=lambda name: int(rivals[name].sum()))
    test, n = mcnemar(rivals[best], losses[worst]), len(losses[worst])
    says = (
        f"of PGD-20's losses {best} breaks {_share(rivals[best])} and {worst} {_share(losses[worst])} "
        f"(exact McNemar p = {test.p:.2g})"
    )
    if best == worst:
        says = f"with each of its untargeted losses PGD-20 breaks {_share(losses[worst])}"
    spread = (test.only_first - test.only_second) / n
    return _judged("loss-spread", spread, at.LOSS_SPREAD, n, says, more=test.p < at.P_BY_RIVAL)


def _shattered(case: _Case) -> Doubt:
    if "gradients" not in case.found or case.circumstances.threat.constraint.eps == 0:
        return case.absent("shattered", "gradients")
    ratios = case.found["gradients"].columns["ratio"].double()
    seen = ratios[~ratios.isnan()]
    if not len(seen):
        says = "no gradient is large enough for a measurement"
        return Doubt("shattered", "not measured", says=says)
    ratio, (low, high) = float(seen.median()), at.SLOPE_RATIO
    says = f"along the gradient the margin changes by {ratio:.2g} times the predicted amount (median)"
    state: DoubtState = "clear" if low <= ratio <= high else "raised"
    return Doubt("shattered", state, ratio, low if ratio < 1 else high, len(seen), says)


def _nan(case: _Case) -> Doubt:
    rows = case.columns["nan"]
    n = int(rows.sum())
    says = f"the model returned NaN for {n} of {len(rows)} clean inputs"
    for name, probed in case.found.items():
        wild = probed.columns.get("margin", torch.empty(0)) == -torch.inf
        if wild.any():
            n += int(wild.sum())
            says += f", and for {int(wild.sum())} inputs of the probe {name}"
    return _judged("nan", float(n), 0.0, len(rows), says)


def _chance(case: _Case) -> Doubt:
    correct, y = case.columns["correct"], case.columns["y"]
    if len(torch.unique(y)) < 2:
        says = "all examples have the same label, so that any accuracy may be that of a constant prediction"
        return Doubt("chance", "not applicable", says=says)
    result = against_majority(correct, y)
    says = (
        f"clean accuracy is {_share(correct)} (95 % interval {_percent(result.low)} to {_percent(result.high)}), and "
        f"always predicting the majority class is right for {_percent(result.majority)}"
    )
    state: DoubtState = "raised" if result.at_chance else "clear"
    return Doubt("chance", state, result.high, result.majority, len(y), says)


def _constant(case: _Case) -> Doubt:
    columns, n = case.columns, len(case.columns["id"])
    if n < 2:
        return Doubt("constant", "not measured", says="at least two examples are needed")
    if columns["nan"].any():
        return Doubt("constant", "not applicable", says="the model returned NaN")
    # margins for one label at a time, since a margin depends on the label
    groups = [columns["margin"][columns["y"] == label].double() for label in torch.unique(columns["y"])]
    size = max(float(columns["margin"].double().abs().max()), 1e-12)
    spread = max(float((group.max() - group.min()) / size) for group in groups)
    for name in ("confidence", "entropy"):
        values = columns[name].double()
        spread = max(spread, float(values.max() - values.min()))
    spread = float(f"{spread:.3g}")  # the last digits depend on the batches
    says = f"over {n:,} examples the outputs differ by {spread:.1g} of the largest margin"
    if not spread > at.CONSTANT:
        says = f"the outputs do not depend on the input: {says}"
    return Doubt("constant", "clear" if spread > at.CONSTANT else "raised", spread, at.CONSTANT, n, says)


def _input(case: _Case) -> Doubt:
    return case.circumstances.input


_CONCLUSIONS: Mapping[str, Callable[[_Case], Doubt]] = {
    "zero-gradient": _zero_gradient,
    "probabilities": _probabilities,
    "scale": _scale,
    "one-step": _one_step,
    "black-box": _black_box,
    "noise": _noise,
    "not-exhausted": _not_exhausted,
    "transfer": _transfer,
    "whole-box": _whole_box,
    "randomness": _randomness,
    "state": _state,
    "loss-spread": _loss_spread,
    "shattered": _shattered,
    "nan": _nan,
    "chance": _chance,
    "constant": _constant,
    "input": _input,
}
