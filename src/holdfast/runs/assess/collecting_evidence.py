"""Computes the evidence of a run from its stored artefacts, at the end of the run and when a stored run is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import AnswerCheck, Columns, Evidence, Seconds, in_table
from holdfast.doubts.answering import with_answers
from holdfast.runs.assess.served_runs import totals_to_json
from holdfast.runs.harness import (
    Context,
    StageKind,
    StageOutline,
    broken_by_suite,
    evidence_from,
    passes,
    worst_rows,
)
from holdfast.runs.store.folder import StoredStage
from holdfast.runs.stored.record import DOUBTS, Adapted, Record, doubt_from_json

TUNING = "fine-tuning"
"""Name of the doubt whether fine-tuning would achieve more than rotation."""


def counted(kind: StageKind, stage: StoredStage, by_stage: Mapping[str, Columns]) -> Columns | None:
    """Return the columns of a stage for all examples, or None if time ran out during a stage that is neither an attack
    of the suite nor a proof.

    If time ran out during an attack of the suite, the examples that it did not reach count as not attacked. Likewise
    nothing is proved about the examples that a method of certification did not reach.
    """
    if stage.reached is None:
        return stage.columns
    return _filled(kind, stage.columns, by_stage["clean"]) if kind.in_suite or kind.proves else None


def evidence_of(record: Record) -> Evidence:
    """Return the evidence of a run, computed from its record."""
    manifest, doubted, by_stage = record.manifest, record.doubted, record.columns
    spent, served = record.seconds.get(DOUBTS, Seconds()), {}
    if record.sent is not None:
        served = totals_to_json(record.sent)
    context = Context(
        model=manifest.model,
        data=manifest.data,
        notes=(*manifest.notes, *doubted.notes, *served.get("messages", ()), *_mixed(record.nodes)),
        details=tuple(manifest.details),
        doubts=doubted.doubts,
        batches=doubted.batches,
        doubts_cost=replace(doubted.cost, cpu_s=spent.cpu, wall_s=spent.wall),
        surrogates=tuple(manifest.surrogates),
        others=tuple(manifest.other_data),
        probes=doubted.probes,
    )
    if record.adapted is not None:
        context = _adapted(context, record, record.adapted)
    randomised = manifest.model["randomised"]
    evidence = evidence_from(manifest.outline, by_stage, record.seconds, context, randomised=randomised)
    return replace(_with_groups(evidence), served=served)


def _with_groups(evidence: Evidence) -> Evidence:
    """The evidence with the column `group`, if `run.json` states the groups of the examples."""
    stated = evidence.data.get("groups")
    if stated is None:
        return evidence
    from holdfast.io.data.example_groups import places_of_letters  # only for runs with groups

    group = torch.from_numpy(places_of_letters(stated["of"], len(stated["names"])))
    data = {**evidence.data, "groups": {name: stated[name] for name in ("column", "names", "absent")}}
    return replace(evidence, columns={**evidence.columns, "group": group}, data=data)


def _mixed(nodes: Sequence[Mapping[str, str]]) -> tuple[str, ...]:
    """Return a note on the nodes that differ from the process of the run, if there were some."""
    if not nodes:
        return ()
    shown = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in nodes)
    return (
        f"some shards were measured on nodes that differ (--mixed-nodes), so that last bits may differ: {shown}",
    )


def with_attackers(evidence: Evidence, table: Mapping[str, Any] | None) -> Evidence:
    """Add to the evidence what was measured about attackers of a model with rotation: the doubt, the verdict and the
    notes.

    Returns `evidence` unchanged if these measurements, `table`, are None or not complete.
    """
    if table is None or not table["complete"]:
        return evidence
    notes = (table["conclusion"], *table.get("notes", ()))
    fine_tuning_doubt = table["doubt"]
    doubts = () if fine_tuning_doubt is None else (doubt_from_json({"name": TUNING, **fine_tuning_doubt}),)
    return replace(evidence, doubts=(*evidence.doubts, *doubts), notes=(*evidence.notes, *notes))


def _adapted(context: Context, record: Record, adapted: Adapted) -> Context:
    """The context after the adaptive attacks: which doubts they answered, and their notes."""
    outline, by_stage = record.manifest.outline, record.columns
    order = [step.attack for step in outline.steps]  # a stored document has its keys in alphabetical order
    reasons = {
        arm: tuple(names)
        for arm, names in sorted(adapted.reasons.items(), key=lambda item: order.index(item[0]))
    }
    measured = [step for step in outline.steps if step.adaptive and step.name in by_stage]
    places = {step.attack: step.name for step in measured if step.kind.in_suite}
    checks = _answer_checks(measured, by_stage)
    results = {} if adapted.unfinished else {arm: by_stage[name] for arm, name in places.items()}
    clean = by_stage["clean"]
    robust = clean["correct"] & clean["eligible"] & ~broken_by_suite(outline.steps, by_stage)
    broken_by_probes = {id_ for ids in record.doubted.broken.values() for id_ in ids}
    broken_elsewhere = broken_by_probes & set(clean["id"][robust].tolist())
    return replace(
        context,
        doubts=with_answers(
            context.doubts,
            results,
            reasons,
            bypassed=bool(adapted.bypassed),
            survivor_broken=bool(broken_elsewhere),
            blind=adapted.no_detector_gradient,
            checks=checks,
        ),
        answer_checks=checks,
        notes=(*context.notes, *adapted.unfinished, *adapted.notes),
        remarks={
            name: (f"run because of {enumerated(reasons[arm])}", *_bypass_note(adapted, arm))
            for arm, name in places.items()
        },
    )


def _answer_checks(
    measured: Sequence[StageOutline], by_stage: Mapping[str, Columns]
) -> tuple[AnswerCheck, ...]:
    """The checks of the adaptive search; none if it was not run or not checked."""
    names = [step.name for step in measured if step.kind.name == "answer-checks"]
    if not names:
        return ()
    from holdfast.doubts.answer_checks import answer_checks  # only for runs with adaptive attacks

    changed = sum(
        int((by_stage[step.name]["changed"] > 0).sum())
        for step in measured
        if step.kind.in_suite and "changed" in by_stage[step.name]
    )
    return answer_checks(by_stage[names[0]], changed=changed)


def _bypass_note(adapted: Adapted, arm: str) -> tuple[str, ...]:
    bypassed = adapted.bypassed if arm != "Search" else []
    return (f"its gradient bypasses {enumerated(bypassed)}",) if bypassed else ()


def enumerated(names: Sequence[str]) -> str:
    """Return the names as one string, joined with commas and "and", such as `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def adversarial(record: Record) -> dict[str, Tensor]:
    """Return one stored adversarial input for each broken example, as the columns `id` and `x`.

    If several passes broke an example, the input is that of the first pass or, in a run that searches for the smallest
    change, that with the smallest change. Probes and other passes follow the attacks.
    """
    outline, by_stage = record.manifest.outline, record.columns
    attacks = [step.name for step in outline.steps if step.kind.in_suite]
    columns = [by_stage[name] for name in attacks if name in by_stage]
    counted = passes(outline, by_stage, record.doubted.probes)
    with_examples = [c for c in (*columns, *(passed.columns for passed in counted)) if "adversarial.id" in c]
    if not with_examples:
        return {}
    ids = torch.cat([columns["adversarial.id"] for columns in with_examples])
    rows = worst_rows(with_examples, "adversarial", smallest=outline.smallest)
    return {"id": ids[rows], "x": torch.cat([columns["adversarial.x"] for columns in with_examples])[rows]}


def _filled(kind: StageKind, columns: Columns, clean: Columns) -> dict[str, Tensor]:
    """The columns of the first examples, extended by those of examples that the stage was not run on."""
    unattacked_columns, n = kind.columns(clean), len(columns["id"])
    filled = {
        name: torch.cat([columns[name], values[n:]]) if n else values
        for name, values in unattacked_columns.items()
    }
    return filled | {name: values for name, values in columns.items() if in_table(name)}
