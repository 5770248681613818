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
    ProbeResults,
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
    results: ProbeResults,
    columns: Columns,
    circumstances: Circumstances,
    passes: Mapping[str, Mask] = NO_PASSES,
) -> Findings:
    """Return all doubts with their states, such as raised or clear, computed from the results of the probes and the
    columns of the suite.

    `columns` are those of the suite, with the clean `nan` and `is_probability`. `passes` are masks (n) of the examples
    that each pass or probe outside the suite broke, as evaluated by the harness. For a list of attacks (no suite), only
    the doubts in `FREE` are returned, and `not-exhausted` if a pass broke examples that survived the attacks.
    """
    fallen = missed_by_suite(columns, circumstances.threat, passes)
    case = _Case(results, columns, circumstances, fallen)
    names = DOUBTS if circumstances.suite else (*FREE, *(("not-exhausted",) if fallen else ()))
    return Findings(tuple(_CONCLUSIONS[name](case) for name in DOUBTS if name in names), fallen)


def missed_by_suite(columns: Columns, threat: ThreatModel, passes: Mapping[str, Mask]) -> dict[str, Ids]:
    """Return the ids of the examples that survive the suite but that a probe or another attack outside the suite broke,
    by the name of that attack.
    """
    surviving = surviving_examples(columns, threat)
    ids_by_pass = {name: columns["id"][broken & surviving] for name, broken in passes.items()}
    return {name: ids for name, ids in ids_by_pass.items() if len(ids)}


@dataclass(frozen=True)
class _Case:
    results: ProbeResults
    columns: Columns
    circumstances: Circumstances
    fallen: Mapping[str, Ids]

    def broken(self, probe: str, column: str = "broken") -> Mask | None:
        return self.results[probe].columns[column] if probe in self.results else None

    def absent(self, name: str, *probes: str) -> Doubt:
        """Return a doubt that could not be tested because its probes did not run, with the reason."""
        threat = self.circumstances.threat
        probed = probing_threat(threat, self.columns)
        if probed.constraint.eps == 0:
            return Doubt(name, "not applicable", message="eps is 0, so no input may change")
        for probe in PROBES:
            if probe.name in probes and not threat.gives(probe.needs):
                lacking = limit(threat, self.circumstances.access, probe.needs)
                reason = f"it needs access to {probe.needs}, and {lacking}"
                return Doubt(name, "not applicable", message=reason)
        if not set(probes) <= {probe.name for probe in probes_for(probed)} | {"again"}:
            return Doubt(name, "not applicable", message=f"there is no such attack under {probed.constraint}")
        return Doubt(name, "not measured", message="there was no example to measure it on")


def _judged(name: str, statistic: float, threshold: float, n: int, text: str, *, more: bool = True) -> Doubt:
    """Raised if the statistic is above the threshold and `more` is true, otherwise clear."""
    return Doubt(name, "raised" if statistic > threshold and more else "clear", statistic, threshold, n, text)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(mask: Mask) -> str:
    return _percent(float(mask.double().mean()))


def _zero_gradient(case: _Case) -> Doubt:
    name, first_dead = "zero-gradient", case.circumstances.first_gradient_dead
    if "gradients" in case.results:
        dead, flat = case.results["gradients"].columns["dead"], case.results["gradients"].columns["flat"]
        text = (
            "the gradient of the margin is zero or NaN, both at the clean input and at a random point, for "
            f"{int(dead.sum())} of {len(dead)} examples"
        )
        if flat.any():
            text += f"; only that of the cross-entropy is for {int(flat.sum())} more, because of saturation"
    elif first_dead is not None and len(first_dead):
        dead = first_dead
        text = (
            f"the first gradient of the attack is zero or NaN for {int(dead.sum())} of {len(dead)} examples"
        )
    else:
        return case.absent(name, "gradients")
    if case.circumstances.blind:
        text += (
            "; no gradient of the detector's score reaches any input, so attacks cannot evade it by gradients"
        )
        return Doubt(name, "raised", 1.0, at.ZERO_GRADIENTS, len(dead), text)
    return _judged(name, float(dead.double().mean()), at.ZERO_GRADIENTS, len(dead), text)


def _probabilities(case: _Case) -> Doubt:
    rows, threat = case.columns["is_probability"], case.circumstances.threat
    if not threat.gives("scores"):
        text = f"{limit(threat, case.circumstances.access, 'scores')}, so the attacker sees no scores"
        return Doubt("probabilities", "not applicable", message=text)
    text = f"{int(rows.sum())} of {len(rows)} rows of the output are probabilities: they sum to 1 and none is negative"
    state: DoubtState = "raised" if bool(rows.all()) else "clear"
    return Doubt("probabilities", state, float(rows.double().mean()), 1.0, len(rows), text)


def _scale(case: _Case) -> Doubt:
    unscaled, scaled_down = case.broken("cross-entropy"), case.broken("small-cross-entropy")
    if unscaled is None or scaled_down is None:
        return case.absent("scale", "cross-entropy", "small-cross-entropy")
    test, n = mcnemar(scaled_down, unscaled), len(unscaled)
    text = (
        f"PGD-20 on the cross-entropy breaks {_share(unscaled)}, and with logits scaled to 1 % "
        f"{_share(scaled_down)} (exact McNemar p = {test.p:.2g})"
    )
    ahead = (test.only_first - test.only_second) / n
    return _judged("scale", ahead, at.POINTS_BY_SCALE, n, text, more=test.p < at.P_BY_RIVAL)


def _rival(case: _Case, name: str, weak: tuple[str, str], strong: tuple[str, str]) -> Doubt:
    """A doubt raised if a weaker attack beats a stronger one on the same sample; each is a probe and its title."""
    weak_broken, strong_broken = case.broken(weak[0]), case.broken(strong[0])
    if weak_broken is None or strong_broken is None:
        return case.absent(name, weak[0], strong[0])
    test, n = mcnemar(weak_broken, strong_broken), len(weak_broken)
    ahead = (test.only_first - test.only_second) / n
    text = (
        f"{weak[1]} breaks {_share(weak_broken)} of the sample, {strong[1]} "
        f"{_share(strong_broken)} (exact McNemar p = {test.p:.2g})"
    )
    return _judged(name, ahead, at.POINTS_BY_RIVAL, n, text, more=test.p < at.P_BY_RIVAL)


def _one_step(case: _Case) -> Doubt:
    return _rival(
        case, "one-step", ("one-step", "FGSM alone"), ("cross-entropy", "PGD-20 on the cross-entropy")
    )


def _black_box(case: _Case) -> Doubt:
    blind = f"Square with {within_budget(SEARCHES, case.circumstances.threat):,} queries"
    return _rival(case, "black-box", ("search", blind), ("margin", "PGD on the margin, twice 20 steps,"))


def _noise(case: _Case) -> Doubt:
    broken = case.broken("noise")
    if broken is None:
        return case.absent("noise", "noise")
    if case.circumstances.randomised:
        text = "the model is randomised, so that one of many outputs may be wrong for any input"
        return Doubt("noise", "not applicable", message=text)
    draws = within_budget(at.NOISE_DRAWS, case.circumstances.threat)
    text = f"{draws} random inputs break {int(broken.sum())} of {len(broken)} surviving examples"
    return _judged("noise", float(broken.double().mean()), at.NOISE, len(broken), text)


def _not_exhausted(case: _Case) -> Doubt:
    name, again = "not-exhausted", case.broken("again")
    elsewhere_ids = {title: ids for title, ids in case.fallen.items() if title != probe_title(AGAIN)}
    if again is None and not elsewhere_ids and not any(probe in case.results for probe in _BREAKING):
        return case.absent(name, "again")
    n_elsewhere = torch.unique(
        torch.cat([torch.empty(0, dtype=torch.int64), *elsewhere_ids.values()])
    ).numel()
    fresh, n_fresh = (0, 0) if again is None else (int(again.sum()), len(again))
    texts = []
    if again is not None:
        texts.append(
            f"a fresh pass of the suite breaks {fresh} of the {n_fresh} surviving examples closest to the boundary"
        )
    if n_elsewhere:
        texts.append(
            f"{n_elsewhere} {('example' if n_elsewhere == 1 else 'examples')} that survived the suite "
            f"{('was' if n_elsewhere == 1 else 'were')} broken by {', '.join(sorted(elsewhere_ids))}"
        )
        # one example is a proof, since these attacks obey the threat model too
        return _judged(name, float(n_elsewhere), 0.0, n_fresh, "; ".join(texts))
    # `_judged` raises a doubt above its threshold, and `FRESH_BROKEN` examples are enough
    return _judged(name, float(fresh), float(at.FRESH_BROKEN - 1), n_fresh, "; ".join(texts))


_BREAKING = tuple(probe.name for probe in PROBES if probe.breaks)


def _transfer(case: _Case) -> Doubt:
    if not case.circumstances.threat.surrogates:
        return Doubt(
            "transfer", "not measured", message="no surrogate was declared; name one with --surrogate MODEL"
        )
    transferred = "a transfer attack from the surrogates"
    return _rival(
        case, "transfer", ("transfer", transferred), ("margin", "PGD on the margin, twice 20 steps,")
    )


def _whole_box(case: _Case) -> Doubt:
    broken = case.broken("whole-box")
    if broken is None:
        return case.absent("whole-box", "whole-box")
    surviving, n = int((~broken).sum()), len(broken)
    low, _ = clopper_pearson(surviving, n)
    text = f"with every legal input allowed, {surviving} of {n} examples survive (at least {_percent(low)})"
    return _judged("whole-box", low, at.WHOLE_BOX, n, text)


def _largest(values: PerExample) -> float:
    return float(values.max()) if len(values) else 0.0


def _randomness(case: _Case) -> Doubt:
    if "steadiness" not in case.results:
        return case.absent("randomness", "steadiness")
    moved = case.results["steadiness"].columns["repeat"]
    largest = _largest(moved)
    text = "two calls with the same input return the same logits"
    if largest > 0:
        text = f"two calls with the same input differ by at most {largest:.1g} of the largest logit"
    averaged = suite_name(case.circumstances.suite) == "rand"
    if largest > at.CHANGE:
        text += (
            "; the suite averages over draws" if averaged else "; use --suite rand, which averages over draws"
        )
    return _judged("randomness", largest, at.CHANGE, len(moved), text, more=not averaged)


def _state(case: _Case) -> Doubt:
    training = case.circumstances.in_training
    listed = ", ".join(training[:3]) + (" …" if len(training) > 3 else "")
    modes = (
        f"layers were in training mode ({listed}), but measured in evaluation mode: call model.eval() before the "
        "model is passed, or in its factory"
        if training
        else ""
    )
    if "steadiness" not in case.results:
        state: DoubtState = "raised" if training else "clear"
        text = modes or "no layer was in training mode; order, batch and history were not tested"
        return Doubt("state", state, float(len(training)), 0.0, len(case.columns["id"]), text)
    repeated = case.results["steadiness"].columns
    # for a randomised model, only calls with the same seed can show a dependence on the history
    random = _largest(repeated["repeat"]) > at.CHANGE
    changes = {
        kind: _largest(repeated[kind]) for kind in (("history",) if random else ("order", "batch", "history"))
    }
    worst = max(changes, key=lambda kind: changes[kind])
    text = f"the logits do not depend on {', '.join(changes)}"
    if changes[worst] > 0:
        text = f"of {', '.join(changes)} the {worst} changes the logits most, by {changes[worst]:.1g} of the largest"
    text = f"{modes}; {text}" if modes else text
    raised = bool(training) or changes[worst] > at.CHANGE
    return Doubt(
        "state", "raised" if raised else "clear", changes[worst], at.CHANGE, len(repeated["repeat"]), text
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
    runner_up = case.broken("runner-up")
    rivals = losses if runner_up is None else {**losses, "the runner-up": runner_up}
    best = max(rivals, key=lambda name: int(rivals[name].sum()))
    test, n = mcnemar(rivals[best], losses[worst]), len(losses[worst])
    text = (
        f"of PGD-20's losses {best} breaks {_share(rivals[best])} and {worst} {_share(losses[worst])} "
        f"(exact McNemar p = {test.p:.2g})"
    )
    if best == worst:
        text = f"with each of its untargeted losses PGD-20 breaks {_share(losses[worst])}"
    else:
        text += f"; more than {100 * at.LOSS_SPREAD:.0f} points with p < {at.P_BY_RIVAL} raise the doubt"
    spread = (test.only_first - test.only_second) / n
    return _judged("loss-spread", spread, at.LOSS_SPREAD, n, text, more=test.p < at.P_BY_RIVAL)


def _shattered(case: _Case) -> Doubt:
    if "gradients" not in case.results or case.circumstances.threat.constraint.eps == 0:
        return case.absent("shattered", "gradients")
    ratios = case.results["gradients"].columns["ratio"].double()
    resolved = ratios[~ratios.isnan()]
    if not len(resolved):
        text = "no gradient is large enough for a measurement"
        return Doubt("shattered", "not measured", message=text)
    ratio, (low, high) = float(resolved.median()), at.SLOPE_RATIO
    text = f"along the gradient the margin changes by {ratio:.2g} times the predicted amount (median)"
    state: DoubtState = "clear" if low <= ratio <= high else "raised"
    return Doubt("shattered", state, ratio, low if ratio < 1 else high, len(resolved), text)


def _nan(case: _Case) -> Doubt:
    rows = case.columns["nan"]
    n = int(rows.sum())
    text = f"the model returned NaN for {n} of {len(rows)} clean inputs"
    for name, probed in case.results.items():
        # probes store a margin of NaN as -inf
        is_nan = probed.columns.get("margin", torch.empty(0)) == -torch.inf
        if is_nan.any():
            n += int(is_nan.sum())
            text += f", and for {int(is_nan.sum())} inputs of the probe {name}"
    return _judged("nan", float(n), 0.0, len(rows), text)


def _chance(case: _Case) -> Doubt:
    correct, y = case.columns["correct"], case.columns["y"]
    if len(torch.unique(y)) < 2:
        text = "all examples have the same label, so that any accuracy may be that of a constant prediction"
        return Doubt("chance", "not applicable", message=text)
    result = against_majority(correct, y)
    text = (
        f"clean accuracy is {_share(correct)} (95 % interval {_percent(result.low)} to {_percent(result.high)}), and "
        f"always predicting the majority class is right for {_percent(result.majority)}"
    )
    state: DoubtState = "raised" if result.at_chance else "clear"
    return Doubt("chance", state, result.high, result.majority, len(y), text)


def _constant(case: _Case) -> Doubt:
    columns, n = case.columns, len(case.columns["id"])
    if n < 2:
        return Doubt("constant", "not measured", message="at least two examples are needed")
    if columns["nan"].any():
        return Doubt("constant", "not applicable", message="the model returned NaN")
    # margins for one label at a time, since a margin depends on the label
    margins, y = columns["margin"].double(), columns["y"]
    groups = [margins[y == label] for label in torch.unique(y)]
    size = max(float(margins.abs().max()), 1e-12)  # no division by 0 if all are 0
    spread = max(float((group.max() - group.min()) / size) for group in groups)
    for name in ("confidence", "entropy"):
        values = columns[name].double()
        spread = max(spread, float(values.max() - values.min()))
    if len(torch.unique(columns["prediction"])) > 1:
        # where another class is predicted, the scores of the two classes differ at least by the margin of a right
        # example, or by the lead of a class with a probability above 1/2; scores may be one-hot or symmetric, with
        # equal margins for all labels
        spread = max(spread, float(margins.max() / size), float(2 * columns["confidence"].double().max() - 1))
    elif len(groups) == 1 and columns["correct"].all() and not spread > at.CONSTANT:
        text = "all examples have the same label and are classified correctly, so that their outputs may be equal"
        return Doubt("constant", "not applicable", message=text)
    spread = float(f"{spread:.3g}")  # the last digits depend on the batches
    text = f"the outputs of {n:,} examples are equal"
    if spread > 0:
        text = f"over {n:,} examples the outputs differ by {spread:.1g} of the largest margin"
    if not spread > at.CONSTANT:
        text = f"the outputs do not depend on the input: {text}"
    return Doubt("constant", "clear" if spread > at.CONSTANT else "raised", spread, at.CONSTANT, n, text)


def _input(case: _Case) -> Doubt:
    return case.circumstances.input


THRESHOLDS: Mapping[str, tuple[float, ...]] = {
    "zero-gradient": (at.ZERO_GRADIENTS,),
    "scale": (at.POINTS_BY_SCALE,),
    **dict.fromkeys(("one-step", "black-box", "transfer"), (at.POINTS_BY_RIVAL,)),
    "noise": (at.NOISE,),
    "not-exhausted": (0.0, float(at.FRESH_BROKEN - 1)),
    "whole-box": (at.WHOLE_BOX,),
    "randomness": (at.CHANGE,),
    "state": (0.0, at.CHANGE),
    "loss-spread": (at.LOSS_SPREAD,),
    "shattered": at.SLOPE_RATIO,
    "nan": (0.0,),
}
"""Thresholds that a doubt may have, for the doubts whose threshold does not depend on the model or the data."""

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
