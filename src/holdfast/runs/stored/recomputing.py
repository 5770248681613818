"""Computes again what the documents of a finished run state about its columns, and refuses a document that differs.

The digests of a run show that its files belong together, but everyone can compute them. Therefore a verdict is accepted
only if it follows from the columns. No model is queried.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.core.catalogue import DOUBTS as BUNDLED
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UnsoundProof, UsageError
from holdfast.core.evidence import Columns, Doubt, Evidence
from holdfast.doubts.answering import arms, required_attacks
from holdfast.doubts.concluding import Findings, conclude
from holdfast.doubts.probing import doubt_test
from holdfast.doubts.protocol import MeasurementContext
from holdfast.gates.judging import Doubts, Judgement, exit_code, judge, judged_estimate
from holdfast.gates.rotation_effects import protection_verdict, with_effects
from holdfast.metrics.names import PAIRED
from holdfast.runs.assess.certify import refuse_unsound
from holdfast.runs.assess.collecting_evidence import ADAPTIVE, DOUBTS, ROTATION
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.identity import code_digest
from holdfast.runs.harness import FOUND, KINDS, PROBE, Outline, assemble, probe_passes, stage_passes
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.records import Chain
from holdfast.runs.stored.documents import VERDICT, doubt_from_json, judgement_from_json, outline_from_json
from holdfast.runs.stored.recomputing_columns import refuse_columns, refuse_other, shortened
from holdfast.statistics.absent_classes import classes_of
from holdfast.statistics.intervals import proportion

Json = Mapping[str, Any]


def refuse_other_stages(path: Path, manifest: Json, chain: Chain, adapted: Json | None) -> None:
    """Raise `TargetError` if the stages of a finished run in `run.json` are not those that its chain records, or if the
    name of a stage is not one of its kind.

    A finished run records every stage, also one that had no time; of the adaptive attacks, those that a doubt requires.
    """
    file, steps = path / MANIFEST, manifest["config"]["stages"]
    recorded = {link.content["name"] for link in chain.links if link.content["kind"] == "stage"}
    required = {} if adapted is None else adapted["reasons"]
    for step in steps:
        name, wave_of = step["name"], step["wave_of"]
        is_named = re.fullmatch(KINDS[step["kind"]].named, name)
        if not is_named or (wave_of and not re.fullmatch(re.escape(wave_of) + r"-wave-\d+", name)):
            raise TargetError(
                f"{str(file)!r} states the stage {shortened(name)} with the kind {step['kind']!r} and wave_of "
                f"{shortened(wave_of)}, but no stage has this name, kind and first wave; restore the run from a copy, "
                "or measure it again"
            )
        expected = not step["adaptive"] or step["attack"] in required
        if (name in recorded) != expected:
            raise TargetError(
                f"{str(file)!r} states the stage {shortened(name)}, which a finished run records "
                f"{'always' if expected else 'only if a raised doubt requires it'}, but the chain does "
                f"{'not ' if expected else ''}record it; restore the run from a copy, or measure it again"
            )
    names = [step["name"] for step in steps]
    unknown = sorted(recorded - {*names, FOUND})
    if unknown or len({*names}) < len(names):
        raise TargetError(
            f"{str(file)!r} states the stages {shortened(names)}, but the chain records {shortened(sorted(recorded))}; "
            "restore the run from a copy, or measure it again"
        )


def refuse_other_doubts(
    path: Path,
    manifest: Json,
    by_stage: Mapping[str, Columns],
    doubts_json: Json,
    adapted: Json | None = None,
) -> None:
    """Raise `TargetError` if the columns of a run contradict `run.json`, the document of the doubts, or `adapted`, that
    of the adaptive attacks.

    `by_stage` are the columns of the stages of the run in the folder `path`. Doubts are compared only if the code of
    this version wrote the run, since their thresholds differ between versions.
    """
    _refuse_manifest(path / MANIFEST, manifest, by_stage)
    refuse_columns(path, manifest, by_stage)
    _refuse_probes(path / f"{DOUBTS}.json", doubts_json, by_stage)
    findings = _findings(manifest, doubts_json, by_stage)
    if findings is not None:
        _refuse_broken(path / f"{DOUBTS}.json", doubts_json, findings)
    if manifest["digests"]["code"] != code_digest():
        return
    stored = tuple(doubt_from_json(doubt) for doubt in doubts_json["doubts"])
    if findings is not None:
        _refuse_doubts(path / f"{DOUBTS}.json", manifest, by_stage, stored, findings)
    if adapted is not None:
        _refuse_reasons(path / f"{ADAPTIVE}.json", manifest, stored, adapted)


def _refuse_manifest(file: Path, manifest: Json, by_stage: Mapping[str, Columns]) -> None:
    n = manifest["data"].get("n")
    if n is not None:
        refuse_other(file, "data.n", n, len(by_stage["clean"]["id"]))
    groups = manifest["data"].get("groups")
    refuse_other(file, "data.groups", groups is not None, "groups" in manifest["config"])
    if groups is not None:
        refuse_other(file, "data.groups.of", len(groups["of"]), len(by_stage["clean"]["id"]))
        refuse_other(
            file, "config.groups.digest", manifest["config"]["groups"]["digest"], digest(canonical(groups))
        )
    if "config" in manifest["digests"]:
        config = digest(canonical(manifest["config"]))
        refuse_other(file, "digests.config", manifest["digests"]["config"], config)


def _refuse_probes(file: Path, doubts_json: Json, by_stage: Mapping[str, Columns]) -> None:
    """Refuse probes that found more adversarial examples than they were run on, or that are not listed, so that these
    examples would not count.
    """
    found = by_stage.get(FOUND)
    if found is None:
        return
    tried = [n for _, n in doubts_json["probes"]]
    n_found = torch.bincount(found[PROBE], minlength=len(tried)).tolist()
    if len(n_found) > len(tried) or any(n > most for n, most in zip(n_found, tried, strict=True)):
        refuse_other(file, "probes", [list(probe) for probe in doubts_json["probes"]], n_found)


def _before_adaptive(outline: Outline, by_stage: Mapping[str, Columns]) -> dict[str, Columns]:
    """The columns of the stages that are measured before the doubts are decided."""
    later = {FOUND, *(step.name for step in outline.steps if step.adaptive)}
    return {name: columns for name, columns in by_stage.items() if name not in later}


def _suite_columns(outline: Outline, before: Mapping[str, Columns]) -> Columns:
    """The columns from which the doubts are concluded."""
    return {**assemble(outline, before), "is_probability": before["clean"]["is_probability"]}


def _findings(manifest: Json, doubts_json: Json, by_stage: Mapping[str, Columns]) -> Findings:
    """The doubts that the columns alone decide, and the examples that the suite missed."""
    outline = outline_from_json(manifest["config"])
    before = _before_adaptive(outline, by_stage)
    found = {FOUND: by_stage[FOUND]} if FOUND in by_stage else {}
    counted = (
        *stage_passes(outline, before),
        *probe_passes(outline, before | found, doubts_json["probes"]),
    )
    columns = _suite_columns(outline, before)
    broken = {passed.name: passed.columns["success"] for passed in counted}
    return conclude(
        {}, columns, MeasurementContext(outline.threat, classes=classes_of(manifest["model"])), broken
    )


def _applicable(manifest: Json, by_stage: Mapping[str, Columns]) -> set[str]:
    """Names of the doubts that cannot be `not applicable` in a run, whatever its probes returned."""
    outline = outline_from_json(manifest["config"])
    before = _before_adaptive(outline, by_stage)
    columns = _suite_columns(outline, before)
    doubts = conclude(
        {}, columns, MeasurementContext(outline.threat, suite="any", classes=classes_of(manifest["model"]))
    ).doubts
    decided_by = {"threat"} if manifest["model"]["randomised"] else {"threat", "randomness"}
    return {
        doubt.name
        for doubt in doubts
        if doubt.state != "not applicable" and doubt_test(doubt.name).inapplicable_by in decided_by
    }


def _refuse_broken(file: Path, doubts_json: Json, findings: Findings) -> None:
    computed = {name: ids.tolist() for name, ids in findings.missed.items()}
    for name in {**doubts_json["broken"], **computed}:
        refuse_other(file, f"broken.{name}", doubts_json["broken"].get(name), computed.get(name))


def _refuse_doubts(
    file: Path,
    manifest: Json,
    by_stage: Mapping[str, Columns],
    stored: Sequence[Doubt],
    findings: Findings,
) -> None:
    doubts, computed = manifest["config"]["doubts"], {doubt.name: doubt for doubt in findings.doubts}
    # those of other packages depend on what is installed
    names = [doubt.name for doubt in stored if doubt.name in BUNDLED]
    if doubts == "none":
        refuse_other(file, "doubts", names, [])
        return
    expected = BUNDLED if doubts == "all" and manifest["config"]["suite"] else computed
    of_runs = [name for name in BUNDLED if name in expected and doubt_test(name).conclude is not None]
    refuse_other(file, "doubts", names, of_runs)
    applicable = _applicable(manifest, by_stage)
    for place, doubt in enumerate(stored):
        test, again = doubt_test(doubt.name), computed.get(doubt.name)
        field = f"doubts[{place}].state ({doubt.name})"
        exceeded = doubt.statistic is not None and doubt.statistic > (doubt.threshold or 0.0)
        if test.recomputed == "above" and exceeded:
            refuse_other(file, field, doubt.state, "raised")
        if doubt.state == "clear" and doubt.statistic is None:
            refuse_other(file, field, doubt.state, "not measured")
        if doubt.state == "not applicable" and doubt.name in applicable:
            refuse_other(file, field, doubt.state, "not measured")
        limits, threshold = test.thresholds, doubt.threshold
        if limits and threshold is not None and threshold not in limits:
            refuse_other(file, f"doubts[{place}].threshold ({doubt.name})", threshold, limits[-1])
        if again is None:
            continue
        if test.recomputed == "from columns":
            for key in ("state", "statistic", "threshold", "n"):
                refuse_other(
                    file, f"doubts[{place}].{key} ({doubt.name})", getattr(doubt, key), getattr(again, key)
                )
        elif again.state == "raised":  # without the results of its probes
            refuse_other(file, field, doubt.state, "raised")


def _refuse_reasons(file: Path, manifest: Json, stored: Sequence[Doubt], adapted: Json) -> None:
    outline = outline_from_json(manifest["config"])
    members = {step.attack for step in outline.steps if step.adaptive}
    available = [arm for arm in arms(outline.threat.constraint) if arm.name in members]
    computed = {name: list(names) for name, names in required_attacks(available, stored).items()}
    refuse_other(file, "reasons", dict(adapted["reasons"]), computed)


def refuse_other_shares(path: Path, manifest: Json, table: Json, evidence: Evidence) -> None:
    """Raise `TargetError` if the success rate of an attacker of a model with rotation is not that of the inputs that it
    broke, if their number is not that of the columns, or if the effects of the rotation and the conclusion do not
    follow from these rates. The latter are compared only if this version wrote the run.
    """
    file, rows = path / f"{ROTATION}.json", table["rows"]
    if "n_correct" not in table and not rows:  # none was measured
        return
    correct = evidence["correct"][: table["n"]].bool()
    ids = evidence["id"][: table["n"]][correct].tolist()
    refuse_other(file, "n_correct", table["n_correct"], len(ids))
    for place, row in enumerate(rows):
        broken = torch.isin(torch.tensor(ids), torch.tensor(row["broken_ids"], dtype=torch.int64))
        share = None if row["share"] is None and not row["broken_ids"] else _share(broken)
        refuse_other(file, f"rows[{place}].share", row["share"], share)
    for place, row in enumerate(table["alternatives"]):
        for name in ("clean_accuracy", "stolen_set", "white_box"):
            if (stated := row.get(name)) is not None:
                n_broken = round(stated["value"] * stated["n"])
                computed = _share(torch.arange(stated["n"]) < n_broken)
                refuse_other(file, f"alternatives[{place}].{name}", stated, computed)
    if rows and table["complete"] and manifest["digests"]["code"] == code_digest():
        _refuse_effects(file, table)


def _share(mask: Tensor) -> dict[str, Any]:
    return dict(vars(proportion(mask)))


def _refuse_effects(file: Path, table: Json) -> None:
    """Compare the effects of a rotation, the conclusion and the doubt with the success rates of the attackers."""
    by_name = {row["alternative"]: row for row in table["alternatives"] if row.get("clean_accuracy")}
    white_box = by_name.get("static", {}).get("white_box")
    rows = with_effects(table["rows"], white_box)
    effects = [[row["effect"] for row in each] for each in (table["rows"], rows)]
    refuse_other(file, "effect", *effects)
    refuse_other(file, "conclusion", table["conclusion"], protection_verdict(rows, white_box))
    if table["doubt"] is not None and table["doubt"]["statistic"] is not None:
        tuned = by_name["adversarial fine-tuning"]["white_box"]
        for key, share in (("statistic", white_box), ("threshold", tuned)):
            refuse_other(file, f"doubt.{key}", table["doubt"][key], share["value"])


def refuse_broken_certificates(path: Path, evidence: Evidence) -> None:
    """Raise `TargetError` if a stored run certifies an example that one of its attacks broke. Such a run ends without a
    verdict.
    """
    try:
        refuse_unsound(evidence)
    except UnsoundProof as error:
        raise TargetError(
            f"{str(path)!r} has a verdict although its columns contradict its certificates; restore the run from a "
            "copy, or measure it again"
        ) from error


def refuse_other_verdict(path: Path, decided: Json, evidence: Evidence) -> None:
    """Raise `TargetError` if the columns of a run give another estimate, other open doubts, another verdict of a gate
    or another exit code than `decided`, the content of `verdict.json`.

    A gate that compares with a baseline, or with the given model of a training, is judged by the stored estimate, since
    the other run is not part of this one.
    """
    file = path / f"{VERDICT}.json"
    doubts = Doubts(evidence.doubts, decided["accepted_doubts"])
    verdicts = []
    for place, content in enumerate(decided["gates"]):
        stored = judgement_from_json(content)
        computed = _judged_again(file, stored, evidence, doubts)
        for key in ("value", "low", "high", "n"):
            values = (getattr(judgement.estimate, key) for judgement in (stored, computed))
            refuse_other(file, f"gates[{place}].estimate.{key}", *values)
        refuse_other(
            file, f"gates[{place}].open_doubts", list(stored.open_doubts), list(computed.open_doubts)
        )
        refuse_other(file, f"gates[{place}].verdict", stored.verdict, computed.verdict)
        verdicts.append(computed.verdict)
    refuse_other(file, "exit_code", decided["exit_code"], exit_code(verdicts))


def _judged_again(file: Path, stored: Judgement, evidence: Evidence, doubts: Doubts) -> Judgement:
    if stored.claim.metric in PAIRED or stored.claim.versus == "before":
        return judged_estimate(stored.claim, stored.estimate, doubts)
    try:
        return judge(stored.claim, evidence, doubts)
    except UsageError as error:
        raise TargetError(
            f"{str(file)!r} states a verdict that its columns do not contain: {error}; restore it from a copy"
        ) from error


def refuse_other_code(path: Path, decided: Json, judged: Result) -> None:
    """Raise `TargetError` if the exit code of a hardening is not that of the measurement of the new model."""
    refuse_other(path / f"{VERDICT}.json", "exit_code", decided["exit_code"], judged.exit_code)
