"""Joins the columns of shards to those of stages, computes the worst case of each example over all attacks, and creates
the evidence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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
    SearchRecord,
    Seconds,
    Table,
)
from holdfast.core.lookup import Lookup
from holdfast.core.types import Ids, Rows
from holdfast.runs.harness.kinds import KINDS
from holdfast.runs.harness.kinds.fit import fit_stage_of
from holdfast.runs.harness.outside_suite import Pass, Probes, passes
from holdfast.runs.harness.stage import Outline, StageKind, certified_in
from holdfast.runs.harness.verdict import GALLERY, NORMS
from holdfast.runs.harness.waves import joined_waves, remark, residual

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
    """Concatenate the columns of the shards of one stage. Of the adversarial inputs to be shown in the report, only the
    first dozen are kept.
    """
    names = sorted({name for columns in shards for name in columns})
    joined = {name: torch.cat([columns[name] for columns in shards if name in columns]) for name in names}
    return {
        name: values[:GALLERY] if name.startswith("gallery.") else values for name, values in joined.items()
    }


def assemble(
    plan: Outline, by_stage: Mapping[str, Columns], counted: Sequence[Pass] = ()
) -> dict[str, Tensor]:
    """Return the columns of the evidence: the results for clean inputs, and for each example its worst case over all
    attacks.

    The worst case is over the attacks of the suite and the passes in `counted`.
    """
    by_stage = joined_waves(plan.steps, by_stage)
    clean = by_stage["clean"]
    columns = {name: values for name, values in clean.items() if name not in _NOT_IN_EVIDENCE}
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
    for k, columns in enumerate((*attacks, *passes)):
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
            places, search = _places(waves[0], surviving), _search(waves[0])
            notes = (
                *stage.notes,
                *_learned(by_stage.get(learned)),
                *_placed(places),
                *remark(risky, risk),
                *_searched(search),
                *remarks.get(stage.name, ()),
            )
            fits = _fits(by_stage.get(learned))
            fields = (stage.name, stage.attack, stage.settings, before, after, cost, notes, risk)
            records.append(
                AttackRecord(*fields, adaptive=stage.adaptive, fits=fits, places=places, search=search)
            )
            surviving = survived
    return tuple(records), total


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
    """The table of the first dozen broken examples in source order, each with the input of its worst case."""
    attacks = [by_stage[s.name] for s in plan.steps if s.kind.in_suite and s.name in by_stage]
    with_gallery = [
        c for c in (*attacks, *(counted_pass.columns for counted_pass in counted)) if "gallery.id" in c
    ]
    if not with_gallery:
        return {}
    chosen = worst_rows(with_gallery, "gallery", smallest=plan.smallest)[:GALLERY]
    columns = {
        name: torch.cat([c[f"gallery.{name}"] for c in with_gallery])[chosen] for name in ("id", "x", "x_adv")
    }
    return {"gallery": Table("broken example", columns)}


def worst_rows(attacks: Sequence[Columns], kind: str, *, smallest: bool) -> Rows:
    """Return, for each example, the row index of its worst case among the stored inputs of several attacks. The indices
    are ordered by the id of the example.

    The worst case is the first attack that broke the example or, with `smallest`, the smallest change. If no attack
    broke the example, it is the first stored input. `kind` is the prefix of the columns with the stored inputs.
    """
    ids = torch.cat([columns[f"{kind}.id"] for columns in attacks])
    order_keys = [
        _of_stored("distance", columns, kind) if smallest else ~_of_stored("success", columns, kind)
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
