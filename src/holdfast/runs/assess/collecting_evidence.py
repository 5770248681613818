"""Computes the evidence of a run from its stored artefacts, at the end of the run and when a stored run is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from holdfast.core.evidence import AnswerCheck, Columns, Cost, Evidence, Seconds, in_table
from holdfast.doubts.answering import with_answers
from holdfast.io.remote.sent import Totals
from holdfast.runs.assess.served_runs import totals_to_json
from holdfast.runs.harness import (
    Context,
    Outline,
    Pass,
    StageKind,
    StageOutline,
    broken_by_suite,
    evidence_from,
    passes,
    worst_rows,
)
from holdfast.runs.store.folder import StoredStage
from holdfast.runs.stored.documents import doubt_from_json, outline_from_json

DOUBTS = "doubts"
"""Name of the document with the doubts, and of the random stream and the timing of the probes."""
ADAPTIVE = "adaptive"
"""Name of the document that lists which adaptive attacks ran, and why."""
ROTATION = "rotation"
"""Name of the document with the table of attackers of a model with rotation."""
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


def evidence_of(
    manifest: Mapping[str, Any],
    by_stage: Mapping[str, Columns],
    doubts_json: Mapping[str, Any],
    seconds: Mapping[str, Seconds],
    adapted: Mapping[str, Any] | None = None,
    sent: Totals | None = None,
    nodes: Mapping[str, Any] | None = None,
) -> Evidence:
    """Return the evidence of a run, computed from its manifest, the columns of its stages and its doubts.

    `manifest` is the content of `run.json`, `by_stage` the columns of each stage, `doubts_json` the document of the
    doubts, `adapted` that of the adaptive attacks, and `seconds` the times of the stages. `sent` counts what a run on a
    served model sent to the server. `nodes` is the document of the nodes of a cluster that differ.
    """
    spent, served = seconds.get(DOUBTS, Seconds()), {} if sent is None else totals_to_json(sent)
    cost = doubts_json["cost"]
    context = Context(
        model=manifest["model"],
        data=manifest["data"],
        notes=(*manifest["notes"], *doubts_json["notes"], *served.get("messages", ()), *_mixed(nodes)),
        details=tuple(manifest["details"]),
        doubts=tuple(doubt_from_json(doubt) for doubt in doubts_json["doubts"]),
        batches=doubts_json.get("batches", {}),
        doubts_cost=Cost(cost["forwards"], cost["backwards"], cost["queries"], spent.cpu, spent.wall),
        surrogates=tuple(manifest["surrogates"]),
        others=tuple(manifest["other_data"]),
        probes=doubts_json["probes"],
    )
    outline = outline_from_json(manifest["config"])
    if adapted is not None:
        context = _adapted(context, outline, by_stage, doubts_json, adapted)
    evidence = evidence_from(outline, by_stage, seconds, context, randomised=manifest["model"]["randomised"])
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


def _mixed(nodes: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return a note on the nodes that differ from the process of the run, if there were some."""
    if nodes is None:
        return ()
    shown = "; ".join(", ".join(f"{key} {value}" for key, value in each.items()) for each in nodes["nodes"])
    return (
        f"some shards were measured on nodes that differ (--mixed-nodes), so that last bits may differ: {shown}",
    )


def counted_passes(
    manifest: Mapping[str, Any], by_stage: Mapping[str, Columns], doubts_json: Mapping[str, Any]
) -> tuple[Pass, ...]:
    """Return the measurements outside the suite, such as probes, whose adversarial examples count towards robust
    accuracy.
    """
    return passes(outline_from_json(manifest["config"]), by_stage, doubts_json["probes"])


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


def _adapted(
    context: Context,
    outline: Outline,
    by_stage: Mapping[str, Columns],
    doubts_json: Mapping[str, Any],
    adapted: Mapping[str, Any],
) -> Context:
    """The context after the adaptive attacks: which doubts they answered, and their notes."""
    order = [step.attack for step in outline.steps]  # a stored document has its keys in alphabetical order
    reasons = {
        arm: tuple(names)
        for arm, names in sorted(adapted["reasons"].items(), key=lambda item: order.index(item[0]))
    }
    measured = [step for step in outline.steps if step.adaptive and step.name in by_stage]
    places = {step.attack: step.name for step in measured if step.kind.in_suite}
    checks = _answer_checks(measured, by_stage)
    results = {} if adapted["unfinished"] else {arm: by_stage[name] for arm, name in places.items()}
    clean = by_stage["clean"]
    robust = clean["correct"] & clean["eligible"] & ~broken_by_suite(outline.steps, by_stage)
    broken_by_probes = {id_ for ids in doubts_json["broken"].values() for id_ in ids}
    broken_elsewhere = broken_by_probes & set(clean["id"][robust].tolist())
    return replace(
        context,
        doubts=with_answers(
            context.doubts,
            results,
            reasons,
            bypassed=bool(adapted["bypassed"]),
            survivor_broken=bool(broken_elsewhere),
            blind=adapted["no_detector_gradient"],
            checks=checks,
        ),
        answer_checks=checks,
        notes=(*context.notes, *adapted["unfinished"], *adapted["notes"]),
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


def _bypass_note(adapted: Mapping[str, Any], arm: str) -> tuple[str, ...]:
    bypassed = adapted["bypassed"] if arm != "Search" else []
    return (f"its gradient bypasses {enumerated(bypassed)}",) if bypassed else ()


def enumerated(names: Sequence[str]) -> str:
    """Return the names as one string, joined with commas and "and", such as `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def adversarial(
    by_stage: Mapping[str, Columns], stages: Sequence[str], counted: Sequence[Pass], *, smallest: bool
) -> dict[str, Tensor]:
    """Return one stored adversarial input for each broken example, as the columns `id` and `x`.

    If several passes broke an example, the input is that of the first pass or, with `smallest`, that with the smallest
    change. `stages` are the names of the attacks in their order; the passes in `counted` follow them.
    """
    columns = [by_stage[name] for name in stages if name in by_stage]
    with_examples = [c for c in (*columns, *(passed.columns for passed in counted)) if "adversarial.id" in c]
    if not with_examples:
        return {}
    ids = torch.cat([columns["adversarial.id"] for columns in with_examples])
    rows = worst_rows(with_examples, "adversarial", smallest=smallest)
    return {"id": ids[rows], "x": torch.cat([columns["adversarial.x"] for columns in with_examples])[rows]}


def _filled(kind: StageKind, columns: Columns, clean: Columns) -> dict[str, Tensor]:
    """The columns of the first examples, extended by those of examples that the stage was not run on."""
    unattacked_columns, n = kind.columns(clean), len(columns["id"])
    filled = {
        name: torch.cat([columns[name], values[n:]]) if n else values
        for name, values in unattacked_columns.items()
    }
    return filled | {name: values for name, values in columns.items() if in_table(name)}
