"""Joins the columns of shards to those of stages, and computes the worst case of each example over all attacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from holdfast.core.batch import Lookup, spread
from holdfast.core.catalogue import BY_OPERATIONS
from holdfast.core.evidence import (
    METHOD_STATES,
    AnswerCheck,
    AttackRecord,
    Columns,
    Cost,
    Doubt,
    Evidence,
    MethodRecord,
    MethodState,
    PassRecord,
    Places,
    ProofRecord,
    Residual,
    Reuse,
    SearchRecord,
    Seconds,
    Table,
    in_table,
)
from holdfast.core.tasks import CLEAN, LEFT, MEASURED
from holdfast.core.types import Ids, Mask, Rows
from holdfast.doubts.protocol import AGAIN, probe_title
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.kinds.attack import fit_stage_of
from holdfast.runs.harness.kinds.baseline import EARLIER_QUERIES
from holdfast.runs.harness.plan import Plan
from holdfast.runs.harness.stage import (
    Outline,
    Stage,
    StageKind,
    StageOutline,
    certified_in,
)
from holdfast.runs.harness.target import DISTANCES, GALLERY, LOST, NORMS, unattacked

_CONFIDENCE = 0.95  # of the bounds of all waves of an attack together


def due_examples(stage: Stage, plan: Plan, by_stage: Mapping[str, Columns]) -> Mask | None:
    """Return the mask of the examples that a stage is run on, or None for the clean stage, which is run on all
    examples.
    """
    due = stage.kind.due(stage, plan, by_stage)
    graded = f"{MEASURED}{LEFT}" in by_stage.get("clean", {}) and not stage.kind.proves
    if due is not None and (graded or plan.threat.constraint.judges_misclassified):
        # what is left of a score can be less; a misclassified image may be classified correctly when corrupted
        return torch.ones_like(due)
    return due


def only_tested(stage: Stage, plan: Plan, by_stage: Mapping[str, Columns]) -> Mask | None:
    """Return the mask of the certified examples, on which an attack of the suite is a short test of the certificates.
    None for other stages, and if every attack is run on every example.
    """
    complete = plan.full or plan.smallest or not stage.kind.in_suite
    return None if complete else certified_in(plan.stages(), by_stage)


def joined_waves(steps: Sequence[StageOutline], by_stage: Mapping[str, Columns]) -> dict[str, Columns]:
    """Return the columns of all stages. An attack that tried its examples in several waves has one entry, under the
    name of its first wave.
    """
    joined = dict(by_stage)
    for step in steps:
        if not step.wave_of or step.name not in by_stage:
            continue
        first, wave = joined[step.wave_of], joined.pop(step.name)
        joined[step.wave_of] = {
            name: _either(name, first, wave, wave["ran"]) for name in dict.fromkeys((*first, *wave))
        }
    return joined


def _either(name: str, first: Columns, wave: Columns, ran: Mask) -> Tensor:
    """One column of both: the value of the wave that ran on the example, or all stored inputs."""
    if name not in wave or name not in first:
        return wave[name] if name in wave else first[name]
    if len(first[name]) == len(ran) and not in_table(name):
        return torch.where(ran, wave[name], first[name])
    return torch.cat((first[name], wave[name]))


def untried_bound(n_unbroken: int, waves: int) -> float:
    """Return an upper bound, with 95 % confidence, on the fraction of untried examples that an attack would break if it
    broke none of the last `n_unbroken` examples.

    Any of the `waves` could be the last one by chance, so the error probability is divided
    among them.
    """
    most: float = 1 - ((1 - _CONFIDENCE) / waves) ** (1 / n_unbroken)
    return most


def residual(waves: Sequence[Columns], surviving: int) -> Residual | None:
    """Return the number of surviving examples that an attack has not tried, and an upper bound on the fraction of them
    that it would break.

    Returns None if the attack tried all of them.
    """
    ran = [int(columns["ran"].sum()) for columns in waves]
    untried, last = surviving - sum(ran), max((k for k, n in enumerate(ran) if n), default=0)
    # the bound needs a last wave that broke no example
    if untried <= 0 or not ran[last] or waves[last]["success"].any():
        return None
    return Residual(untried, untried_bound(ran[last], len(waves)))


def remark(waves: Sequence[Columns], risk: Residual | None) -> tuple[str, ...]:
    """Return a note in a tuple for an attack that stopped before it had tried all surviving examples; otherwise an
    empty tuple.

    `waves` has the columns of the successive groups of examples on which the attack was run. `risk` is the result of
    `residual` for them: the number of examples that were not tried, and the upper bound on the fraction of them that
    the attack would break. The note states both. Without a bound, that is if `risk` is None, the tuple is empty.
    """
    if risk is None:
        return ()
    ran = [int(columns["ran"].sum()) for columns in waves]
    tried, last = sum(ran), next(n for n in reversed(ran) if n)
    note = (
        f"it was run on {tried:,} of the {tried + risk.untried:,} robust examples, lowest margins "
        f"first. The last {last:,} all survived, so with 95 % confidence it would break at most "
        f"{100 * risk.at_most:.1f} % of the other {risk.untried:,}, if none of those is more likely to be broken"
    )
    return (note,)


FOUND = "found"
"""Name of the stage with the adversarial examples of the probes.

Its columns are those of an attack, with one row for each example and probe.
"""
PROBE = "probe"
"""Name of the column with the index of the probe that found the adversarial example."""


@dataclass(frozen=True)
class Pass:
    """The adversarial examples of one attack or probe outside the suite, as the columns of an attack on
    all examples.
    """

    stage: str
    """name of the pass in tables, such as `curve-1-fmn` or `probe-noise`"""
    name: str
    """name of the pass in sentences"""
    columns: Columns
    tried: int
    """number of examples that the pass was run on"""
    settings: Mapping[str, Any]
    """settings of the attack of the pass, as in `PassRecord`"""


Probes = Sequence[tuple[str, int]]
"""Names of the probes whose adversarial examples count, each with the number of examples that it was run on. It is 0
for a probe that could not change the result, because the doubts that it tests were settled, or no example was left.

They are in the order of their indices in the column `PROBE` of the stage `FOUND`.
"""


def passes(plan: Outline, by_stage: Mapping[str, Columns], probes: Probes = ()) -> tuple[Pass, ...]:
    """Return the results of all attacks and probes outside the suite, restricted to adversarial examples inside the
    threat model.
    """
    return (*stage_passes(plan, by_stage), *probe_passes(plan, by_stage, probes))


def stage_passes(plan: Outline, by_stage: Mapping[str, Columns]) -> tuple[Pass, ...]:
    """Return the results of the attacks outside the suite that are stages of the plan, restricted to adversarial
    examples inside the threat model.
    """
    clean = by_stage["clean"]
    results = []
    for step in plan.steps:
        if step.kind.title and step.name in by_stage:
            columns = by_stage[step.name]
            name, tried = step.kind.title.format(step.attack), int(columns["ran"].sum())
            results.append(Pass(step.name, name, _inside(plan, clean, columns), tried, step.settings))
    return tuple(results)


def probe_passes(plan: Outline, by_stage: Mapping[str, Columns], probes: Probes) -> tuple[Pass, ...]:
    """Return the results of the probes, restricted to adversarial examples inside the threat model."""
    clean = by_stage["clean"]
    suite = [step for step in plan.steps if step.kind.in_suite and not step.adaptive and not step.wave_of]
    attacks = [{"name": step.attack, **step.settings} for step in suite if not step.kind.reuses]
    results = []
    for place, (probe, tried) in enumerate(probes):
        columns = _of_probe(clean, by_stage[FOUND], place) if FOUND in by_stage else unattacked(clean)
        settings = {"attacks": attacks} if probe == AGAIN else {}
        results.append(
            Pass(f"probe-{probe}", probe_title(probe), _inside(plan, clean, columns), tried, settings)
        )
    return tuple(results)


def _inside(plan: Outline, clean: Columns, columns: Columns) -> dict[str, Tensor]:
    """The columns of a pass, restricted to successes inside the threat model, including distances and stored inputs."""
    success = columns["success"] & clean["correct"] & clean["eligible"]
    if plan.threat.queries is not None:
        # a pass outside the suite may use more queries than the threat model permits
        success = success & (columns["queries"] <= plan.threat.queries)
    inside = dict(columns) | {"success": success}
    for name in (*DISTANCES, "right"):  # other inputs may be outside the threat model
        inside[name] = torch.where(success, columns[name], torch.inf)
    for name in clean:
        if name.startswith(MEASURED):
            inside[name] = torch.where(spread(success, columns[name]), columns[name], clean[name])
    for prefix in ("gallery.", "adversarial."):
        if f"{prefix}id" in columns:
            rows = torch.isin(columns[f"{prefix}id"], columns["id"][success])
            inside |= {name: values[rows] for name, values in columns.items() if name.startswith(prefix)}
    return inside


def _of_probe(clean: Columns, stage_columns: Columns, place: int) -> dict[str, Tensor]:
    """The rows of one probe, as columns of an attack on all examples."""
    of_place = stage_columns[PROBE] == place
    ids = stage_columns["id"][of_place]
    rows, columns = Lookup(clean["id"]).rows(ids), unattacked(clean)
    for name, values in stage_columns.items():
        if name in columns:
            columns[name][rows] = values[of_place]
    for prefix in ("gallery.", "adversarial."):
        if f"{prefix}id" in stage_columns:
            of_probe = stage_columns[f"{prefix}{PROBE}"] == place
            names = [name for name in stage_columns if name.startswith(prefix) and name != f"{prefix}{PROBE}"]
            columns |= {name: stage_columns[name][of_probe] for name in names}
    return columns


_NOT_IN_EVIDENCE = ("right", "is_probability")


@dataclass(frozen=True)
class Context:
    """The parts of the evidence that are not computed from the columns of stages, such as the description of the model
    and the doubts.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    details: tuple[str, ...] = ()
    doubts: tuple[Doubt, ...] = ()
    answer_checks: tuple[AnswerCheck, ...] = ()
    doubts_cost: Cost = Cost()
    probes: Probes = ()
    surrogates: tuple[Mapping[str, Any], ...] = ()
    others: tuple[Mapping[str, Any], ...] = ()
    remarks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """notes on each stage, by its name, in addition to the notes of the plan"""
    batches: Mapping[str, int] = field(default_factory=dict)
    """smallest number of examples that were processed at once, by stage, where memory ran out"""


def join(shards: Sequence[Columns]) -> dict[str, Tensor]:
    """Concatenate the columns of the shards of one stage. Of the adversarial inputs to be shown in the report, only a
    dozen are kept: the first ones, or those that lost most.
    """
    names = sorted({name for columns in shards for name in columns})
    joined = {name: torch.cat([columns[name] for columns in shards if name in columns]) for name in names}
    kept: Rows | slice = slice(GALLERY)
    if f"gallery.{LOST}" in joined:
        kept = joined[f"gallery.{LOST}"].argsort(descending=True, stable=True)[:GALLERY]
    return {name: values[kept] if name.startswith("gallery.") else values for name, values in joined.items()}


def assemble(
    plan: Outline, by_stage: Mapping[str, Columns], counted: Sequence[Pass] = ()
) -> dict[str, Tensor]:
    """Return the columns of the evidence: the results for clean inputs, and for each example its worst case over all
    attacks.

    The worst case is over the attacks of the suite and the passes in `counted`.
    """
    by_stage = joined_waves(plan.steps, by_stage)
    clean = by_stage["clean"]
    columns = {
        f"{CLEAN}{name.removeprefix(MEASURED)}" if name.startswith(MEASURED) else name: values
        for name, values in clean.items()
        if name not in _NOT_IN_EVIDENCE
    }
    steps = [s for s in plan.steps if s.kind.in_suite and s.name in by_stage]
    attacks, pass_columns = (
        [by_stage[s.name] for s in steps],
        [counted_pass.columns for counted_pass in counted],
    )
    columns |= _worst_case(clean, attacks, pass_columns, smallest=plan.smallest)
    # adaptive attacks are not part of the suite, whose results are compared with published numbers
    suite = _worst_case(clean, [by_stage[s.name] for s in steps if not s.adaptive], smallest=plan.smallest)
    columns |= {f"suite_{name}": suite[name] for name in ("success", "right_probability")}
    curve = [by_stage[s.name] for s in plan.steps if s.kind.smallest and s.name in by_stage]
    if curve or plan.smallest:
        columns["distance"] = torch.stack([a["distance"] for a in (*attacks, *curve, *pass_columns)]).amin(0)
    for kind in dict.fromkeys(step.kind for step in plan.steps):
        columns |= kind.evidence(plan, by_stage, columns)
    return columns


def _worst_case(
    clean: Columns, attacks: Sequence[Columns], passes: Sequence[Columns] = (), *, smallest: bool
) -> dict[str, Tensor]:
    """The first attack or pass that broke each example, or with `smallest` the one with the smallest change.

    Each distance is the smallest in its norm. Queries are those of the attacks.
    """
    n = len(clean["id"])
    success, broken_by = torch.zeros(n, dtype=torch.bool), torch.full((n,), -1, dtype=torch.int64)
    prediction, fresh, lowest = clean["prediction"].clone(), clean["right"].clone(), clean["right"].clone()
    queries, first = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    distances = {norm: torch.where(clean["correct"], torch.inf, 0.0).float() for norm in NORMS}
    nearest = torch.full((n,), torch.inf)
    worst = {name: values.clone() for name, values in clean.items() if name.startswith(MEASURED)}
    for k, columns in enumerate((*attacks, *passes)):
        if worst:
            less = columns["ran"] & (columns[f"{MEASURED}{LEFT}"] < worst[f"{MEASURED}{LEFT}"])
            for name, values in worst.items():
                values[less] = columns[name][less]
        new = columns["success"] & ~success
        # a result that was composed without a query of its own is known only after all queries
        first_query = torch.where(columns["first_success"] > 0, columns["first_success"], columns["queries"])
        first = torch.where(new, queries + first_query, first)
        if k < len(attacks):
            queries = queries + columns["queries"]
        if smallest:
            new = columns["success"] & (columns["distance"] < nearest)
            nearest = torch.where(new, columns["distance"], nearest)
        broken_by[new] = k
        prediction = torch.where(new, columns["prediction"], prediction)
        lower = columns["ran"] & (columns["right"] < lowest)
        fresh, lowest = (
            torch.where(lower, columns["right_fresh"], fresh),
            torch.where(lower, columns["right"], lowest),
        )
        success |= columns["success"]
        for norm, distance in distances.items():
            distances[norm] = torch.minimum(distance, columns[f"distance_{norm}"])
    return {
        "success": success,
        "broken_by": broken_by,
        "adversarial_prediction": prediction,
        "right_probability": fresh,
        "queries": queries,
        "first_success": first,
        **{f"distance_{norm}": values for norm, values in distances.items()},
        **worst,
    }


def evidence_from(
    plan: Outline,
    by_stage: Mapping[str, Columns],
    seconds: Mapping[str, Seconds],
    context: Context,
    *,
    randomised: bool,
) -> Evidence:
    """Return the evidence of a finished measurement, computed from the columns and the time of each stage, by name."""
    counted = passes(plan, by_stage, context.probes)
    columns = assemble(plan, by_stage, counted)
    if not randomised:
        # for a deterministic model, these are 0 or 1 and repeat `success`
        del columns["right_probability"], columns["suite_right_probability"]
    if plan.threat.goal is None:
        del columns["eligible"]
    tables = _gallery(plan, by_stage, counted)
    for kind in KINDS.values():
        tables |= kind.tables(by_stage)
    records, total = _attack_records(plan, by_stage, seconds, context.remarks, randomised=randomised)
    return Evidence(
        columns,
        plan.threat,
        plan.suite,
        records,
        plan.seed,
        doubts=context.doubts,
        answer_checks=context.answer_checks,
        model=context.model,
        data=context.data,
        notes=context.notes,
        details=context.details,
        cost=total + context.doubts_cost,
        doubts_cost=context.doubts_cost,
        passes=_counted(counted, columns["broken_by"] - len(records)),
        proofs=_proof_records(plan, by_stage, seconds, context.batches, randomised=randomised),
        tables=tables,
        surrogates=context.surrogates,
        others=context.others,
    )


def _counted(counted: Sequence[Pass], broken_by: Tensor) -> tuple[PassRecord, ...]:
    """One record for each pass; `broken_by` is the index of the pass that broke an example, negative if none did."""
    return tuple(
        PassRecord(
            counted_pass.stage,
            counted_pass.name,
            counted_pass.tried,
            int((broken_by == k).sum()),
            counted_pass.settings,
        )
        for k, counted_pass in enumerate(counted)
    )


def _proof_records(
    plan: Outline,
    by_stage: Mapping[str, Columns],
    seconds: Mapping[str, Seconds],
    batches: Mapping[str, int],
    *,
    randomised: bool,
) -> tuple[ProofRecord, ...]:
    """The records of the methods of certification, in the order in which they ran."""
    records, attacks = [], 0
    for step in plan.steps:
        attacks += step.kind.in_suite and not step.adaptive
        if not step.kind.proves or step.name not in by_stage:
            continue
        columns = by_stage[step.name]
        records.append(
            ProofRecord(
                step.name,
                step.attack,
                step.settings,
                tried=int(columns["ran"].sum()),
                certified=int(columns["certified"].sum()),
                broken=int(columns["success"].sum()),
                confirmed=int(columns["confirmed"].sum()),
                stopped=int(columns["stopped"].sum()),
                work=int(columns["work"].sum()),
                cost=_cost(step.kind, columns, seconds.get(step.name), randomised=randomised),
                batch=batches.get(step.name),
                after_attacks=attacks > 0,
                # runs of earlier versions have no such setting
                arithmetic=step.settings.get("arithmetic", "exact") if step.attack in BY_OPERATIONS else None,
            )
        )
    return tuple(records)


def _attack_records(
    plan: Outline,
    by_stage: Mapping[str, Columns],
    seconds: Mapping[str, Seconds],
    remarks: Mapping[str, tuple[str, ...]],
    *,
    randomised: bool,
) -> tuple[tuple[AttackRecord, ...], Cost]:
    """The records of the attacks in their order, with waves combined, and the cost of all stages."""
    clean, records, total = by_stage["clean"], [], Cost()
    surviving = clean["correct"] & clean["eligible"]
    first = next((place for place, step in enumerate(plan.steps) if step.kind.in_suite), 0)
    certified = certified_in(plan.steps[:first], by_stage)  # no attack can break them
    costs = {
        step.name: _cost(step.kind, by_stage[step.name], seconds.get(step.name), randomised=randomised)
        for step in plan.steps
        if step.name in by_stage
    }
    for stage in plan.steps:
        names = [s.name for s in plan.steps if stage.name in (s.name, s.wave_of) and s.name in by_stage]
        if stage.wave_of or stage.kind.of_attack or not names:
            continue
        waves, learned = [by_stage[name] for name in names], fit_stage_of(stage.name)
        cost = sum((costs[name] for name in (*names, learned) if name in costs), Cost())
        total += cost
        if stage.kind.in_suite:
            survived = surviving & ~torch.stack([columns["success"] for columns in waves]).any(0)
            before, after = int(surviving.sum()), int(survived.sum())
            risky = [{**columns, "ran": columns["ran"] & ~certified} for columns in waves]
            risk = residual(risky, int((surviving & ~certified).sum())) if len(waves) > 1 else None
            places, search, reuse = _places(waves[0], surviving), _search(waves[0]), _reuse(waves[0])
            notes = (
                *stage.notes,
                *_learned(by_stage.get(learned)),
                *_placed(places),
                *remark(risky, risk),
                *_not_run(stage, risky),
                *_searched(search),
                *remarks.get(stage.name, ()),
            )
            fits = _fits(by_stage.get(learned))
            fields = (stage.name, stage.attack, stage.settings, before, after, cost, notes, risk)
            records.append(
                AttackRecord(
                    *fields,
                    adaptive=stage.adaptive,
                    fits=fits,
                    places=places,
                    search=search,
                    reuse=reuse,
                    left=_left(waves[0]),
                )
            )
            surviving = survived
    return tuple(records), total


def _left(columns: Columns) -> float | None:
    """Mean score that an attack left of the examples that it was run on; None for classes and without such examples."""
    left = columns.get(f"{MEASURED}{LEFT}")
    return float(left[columns["ran"]].double().mean()) if left is not None and columns["ran"].any() else None


def _not_run(stage: StageOutline, waves: Sequence[Columns]) -> tuple[str, ...]:
    """The note on an attack that was not run because the attack that it continues broke no example."""
    if not stage.after or any(columns["ran"].any() for columns in waves):
        return ()
    return (f"it was not run, because {stage.after} broke no example",)


def _fits(columns: Columns | None) -> int:
    """Number of fits of a learned attack, which is 1 if it is not stated; 0 if the attack is not learned."""
    if columns is None:
        return 0
    return int(columns["fits"][0]) if "fits" in columns else 1


def _learned(columns: Columns | None) -> tuple[str, ...]:
    """A note on the examples, the number of fits and the cost of a learned attack."""
    if columns is None:
        return ()
    n, fits = len(columns["id"]), _fits(columns)
    chose = int(columns["chose"].sum()) if fits > 1 else 0
    learned = n - chose or n
    note = f"learned on {learned:,} examples that are not judged"
    if fits > 1:
        selection = f"{chose:,} others" if chose < n else "the same"
        note += f", the best of {fits} fits, chosen on {selection}"
    return (f"{note}, with {int(columns['queries'].sum()):,} queries",)


def _places(columns: Columns, surviving: Tensor) -> Places | None:
    """The results of an attack at random places, if it chooses among several places."""
    if "places" not in columns or int(columns["places"].max()) <= 1:
        return None
    at_random = surviving & ~(columns["broken_at_random"] > 0)
    return Places(int(columns["places"].max()), int(at_random.sum()))


def _placed(places: Places | None) -> tuple[str, ...]:
    """A note on how places were chosen, and how many examples survive at a random place."""
    if places is None:
        return ()
    worst = f"judged at the worst of {places.tried:,} places of each image"
    return (f"{worst}; at one random place of each, {places.surviving_at_random:,} survive",)


def _reuse(columns: Columns) -> Reuse | None:
    """The numbers about stored inputs of an earlier run; None for other attacks."""
    if EARLIER_QUERIES not in columns:
        return None
    broke = columns["success"]
    as_stored = broke & (columns["backwards"] == 0)
    queries = (int(columns[name][broke].sum()) for name in ("queries", EARLIER_QUERIES))
    return Reuse(int(columns["ran"].sum()), int(as_stored.sum()), int(broke.sum()), *queries)


_MOST_FIRST: tuple[MethodState, ...] = (
    "run", "dropped", "nothing to attack", "not reached", "too few passes", "randomised", "other norm",
    "needs scores", "needs gradients", "left out",
)  # fmt: skip
"""states of a method, those in which it did most first; the first state of any shard is shown"""


def _search(columns: Columns) -> SearchRecord | None:
    """What the methods of an adaptive search did; None for other attacks."""
    if "raised" not in columns or not columns["ran"].any():
        return None
    ran, methods = (
        columns["ran"],
        [name.removesuffix(".state") for name in columns if name.endswith(".state")],
    )

    def total(name: str) -> int:
        return int(columns[name].sum())

    def record(name: str) -> MethodRecord:
        # a method may be run on one shard and not be reached on another
        states = {METHOD_STATES[state] for state in columns[f"{name}.state"][ran].tolist()}
        state = next(state for state in _MOST_FIRST if state in states)
        counts = (total(f"{name}.{value}") for value in ("broke", "forwards", "backwards"))
        return MethodRecord(name, state, *counts)

    return SearchRecord(
        # those that broke most first; stored columns are in alphabetical order
        tuple(sorted(map(record, methods), key=lambda each: (-each.broke, each.name))),
        int(columns["draws"].max()),
        total("raised"),
        total("changed"),
    )


def _searched(search: SearchRecord | None) -> tuple[str, ...]:
    """Notes on a model that raised errors or changed its outputs during an adaptive search."""
    notes = []
    if search is not None and search.raised:
        notes.append(
            f"the model raised an error at {search.raised:,} points, without which the search continued"
        )
    if search is not None and search.changed:
        notes.append(
            f"the model answers from earlier queries: an input of {search.changed:,} examples had another output later"
        )
    return tuple(notes)


def _cost(kind: StageKind, columns: Columns, seconds: Seconds | None, *, randomised: bool) -> Cost:
    """The cost of a stage, with its time."""
    duration = seconds or Seconds()
    return kind.cost(columns, randomised=randomised) + Cost(cpu_s=duration.cpu, wall_s=duration.wall)


def _gallery(plan: Outline, by_stage: Mapping[str, Columns], counted: Sequence[Pass]) -> dict[str, Table]:
    """The table of the first dozen broken examples in source order, each with the input of its worst case. With another
    task than classes, they are those that lost most of their score, most first.
    """
    attacks = [by_stage[s.name] for s in plan.steps if s.kind.in_suite and s.name in by_stage]
    with_gallery = [
        c for c in (*attacks, *(counted_pass.columns for counted_pass in counted)) if "gallery.id" in c
    ]
    if not with_gallery:
        return {}
    names = ["id", "x", "x_adv"]
    chosen = worst_rows(with_gallery, "gallery", smallest=plan.smallest)
    if all(f"gallery.{LOST}" in c for c in with_gallery):
        names += [LOST, "truth", "clean", "output"]
        lost = torch.cat([c[f"gallery.{LOST}"] for c in with_gallery])[chosen]
        chosen = chosen[lost.argsort(descending=True, stable=True)]
    columns = {
        name: torch.cat([c[f"gallery.{name}"] for c in with_gallery])[chosen[:GALLERY]] for name in names
    }
    return {"gallery": Table("broken example", columns)}


def worst_rows(attacks: Sequence[Columns], kind: str, *, smallest: bool) -> Rows:
    """Return, for each example, the row index of its worst case among the stored inputs of several attacks. The indices
    are ordered by the id of the example.

    The worst case is the first attack that broke the example or, with `smallest`, the smallest change. If no attack
    broke the example, it is the first stored input. With another task than classes, it is the input that left least of
    the score. `kind` is the prefix of the columns with the stored inputs.
    """
    ids = torch.cat([columns[f"{kind}.id"] for columns in attacks])
    left = f"{MEASURED}{LEFT}"
    order_keys = [
        _of_stored(left, columns, kind)
        if left in columns
        else _of_stored("distance", columns, kind)
        if smallest
        else ~_of_stored("success", columns, kind)
        for columns in attacks
    ]
    # stable, so that the earlier attack comes first among equals
    worst = torch.cat(order_keys).argsort(stable=True)
    return worst[first_of_each(ids[worst])]


def _of_stored(name: str, columns: Columns, kind: str) -> Tensor:
    """A column, restricted to the stored inputs of an attack."""
    return columns[name][Lookup(columns["id"]).rows(columns[f"{kind}.id"])]


def first_of_each(ids: Ids) -> Rows:
    """Return the index of the first occurrence of each distinct id, ordered by id."""
    order = ids.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = ids[order][1:] != ids[order][:-1]
    return order[first]
