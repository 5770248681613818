"""Computes again what follows from the files of a finished run, and refuses a run that recorded something else.

The judgements of the gates are not stored: `verdict.json` contains the conditions of the gates, the digest of each
judgement, and the digests of the files from which these were computed. No model is queried.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UnsoundProof, UsageError
from holdfast.core.evidence import Columns, Evidence
from holdfast.core.goal import Goal
from holdfast.gates.grammar import parse
from holdfast.gates.judging import Before, Doubts, Judgement, exit_code, judge, judged_estimate
from holdfast.metrics.names import PAIRED
from holdfast.reports.numbers import strict
from holdfast.runs.assess.certify import refuse_unsound
from holdfast.runs.assess.result import ATTACKED, Result
from holdfast.runs.store import columns as column_files
from holdfast.runs.store.files import MANIFEST
from holdfast.runs.store.folder import Chain
from holdfast.runs.stored.record import VERDICT, Decided, DecidedGate, Manifest

_DIGITS = 6
"""Significant digits of an estimate that are compared: other versions of libraries round the last ones differently."""
_COPY = "restore the run from a copy, or measure it again"


def files_of(chain: Chain) -> dict[str, str]:
    """Return the digests of the records of the files from which the verdict of a run is computed, by their names: of
    all in the chain but the verdict. A record contains the digest of the file, and whether time ran out.
    """
    recorded = (link.content for link in chain.links if link.content["kind"] != VERDICT)
    return {str(content["file"]): digest(canonical(content)) for content in recorded}


def refuse_other_files(path: Path, chain: Chain, computed_from: Mapping[str, str]) -> None:
    """Raise `TargetError` if a file in the chain of a run is not the one from which its verdict was computed."""
    files = files_of(chain)
    for name in sorted(files.keys() | computed_from.keys()):
        if files.get(name) != computed_from.get(name):
            raise TargetError(
                f"{str(path / name)!r} is not the file from which the verdict of the run was computed: the digest of "
                f"its record in the chain is not the one that {VERDICT}.json states; {_COPY}"
            )


def decided(
    judgements: Sequence[Judgement], accepted: Mapping[str, str], files: Mapping[str, str]
) -> Decided:
    """Return the content of `verdict.json` for the judged gates of a run, whose chain lists `files`."""
    return Decided(
        [
            DecidedGate(
                judgement.claim.text,
                _digest_of(judgement),
                strict(vars(judgement.estimate)) if _compares(judgement) else None,
                judgement.scope,
            )
            for judgement in judgements
        ],
        dict(accepted),
        exit_code(judgement.verdict for judgement in judgements),
        dict(files),
    )


def _compares(judgement: Judgement) -> bool:
    """Whether a gate compares with a measurement that is not part of the run: a baseline, or the given model of a
    training.
    """
    return judgement.claim.metric in PAIRED or judgement.claim.versus == "before"


def _digest_of(judgement: Judgement) -> str:
    estimate = judgement.estimate
    numbers = [f"{value:.{_DIGITS}g}" for value in (estimate.value, estimate.low, estimate.high)]
    return digest(canonical([*numbers, estimate.n, judgement.open_doubts, judgement.verdict]))


def judgements_of(gates: Sequence[DecidedGate], evidence: Evidence, doubts: Doubts) -> tuple[Judgement, ...]:
    """Return the judgements of the gates of a finished run. A gate that compares with a measurement outside the run is
    judged by its stored estimate. Raises `UsageError` if the metric of a gate was not measured.
    """
    return tuple(
        judge(parse(gate.condition), evidence, doubts)
        if gate.estimate is None
        else replace(judged_estimate(parse(gate.condition), gate.estimate, doubts), scope=gate.scope)
        for gate in gates
    )


def computed_gates(path: Path, stated: Decided, evidence: Evidence) -> tuple[Judgement, ...]:
    """Return the judgements that follow from the columns of a run. Raises `TargetError` if they are not those that the
    run recorded, as of an edited run, and of a run that another version of Holdfast judged otherwise.
    """
    file = path / f"{VERDICT}.json"
    try:
        refuse_unsound(evidence)
        judgements = judgements_of(stated.gates, evidence, Doubts(evidence.doubts, stated.accepted_doubts))
    except (UnsoundProof, UsageError) as error:
        raise TargetError(
            f"{str(file)!r} states a verdict that its columns do not give: {error}; {_COPY}"
        ) from error
    for gate, judgement in zip(stated.gates, judgements, strict=True):
        if gate.judgement != _digest_of(judgement):
            raise TargetError(
                f"{str(file)!r} states another judgement of the gate {gate.condition!r} than the columns of the run "
                f"give, which is {judgement}; {_COPY}, or open it with the version that wrote it"
            )
    refuse_other(file, "exit_code", stated.exit_code, exit_code(each.verdict for each in judgements))
    return judgements


def refuse_other(file: Path, name: str, stored: object, computed: object) -> None:
    """Raise `TargetError` if a field of a document is not the value that is computed from the run."""
    if stored != computed:
        raise TargetError(
            f"{str(file)!r} states {name} {stored!r:.100}, but the columns of the run give {computed!r:.100}; {_COPY}"
        )


def refuse_other_settings(path: Path, manifest: Manifest, n: int) -> None:
    """Raise `TargetError` if a digest in `run.json` is not that of its settings or of its groups of examples, or if its
    numbers of examples are not `n`.
    """
    file, groups = path / MANIFEST, manifest.data.get("groups")
    config: Mapping[str, Any] = dict(manifest.config)
    refuse_other(file, "data.n", manifest.data.get("n", n), n)
    refuse_other(file, "data.groups", groups is not None, "groups" in config)
    if groups is not None:
        refuse_other(file, "data.groups.of", len(groups["of"]), n)
        refuse_other(file, "config.groups.digest", config["groups"]["digest"], digest(canonical(groups)))
    refuse_other(file, "digests.config", manifest.digests["config"], digest(canonical(config)))


def refuse_other_worst_case(path: Path, expected: Columns) -> None:
    """Raise `TargetError` if a column of the file with the columns of the verdict is not the one that follows from the
    columns of the stages.
    """
    file = path / f"{ATTACKED}{column_files.SUFFIX}"
    stored = column_files.read(file).columns
    refuse_other(file, "columns", sorted(stored), sorted(expected))
    for name, values in expected.items():
        digests = (column_files.content_digest({name: column}) for column in (stored[name], values))
        refuse_other(file, f"column {name} with the digest", *digests)


def refuse_other_training(
    path: Path, manifest: Mapping[str, Any], card: Mapping[str, Any], before: Result, after: Result
) -> None:
    """Raise `TargetError` if the verdict of a hardening on its training does not follow from its two measurements."""
    from holdfast.runs.harden.hardened import verdict_entries  # only for hardenings

    goal = Goal(**manifest["config"].get("goals", {}).get(card["recipe"], {}))
    computed = strict(verdict_entries(before.evidence, after.evidence, goal))
    rounded = [_rounded({name: entries[name] for name in computed}) for entries in (card, computed)]
    refuse_other(path / "card.json", "the verdict on the training", *rounded)
    improvement = strict(vars(Before(before.evidence, goal).improvement(after.evidence)))
    for gate in after.gates:
        if gate.claim.versus == "before":
            stated = _rounded(strict(vars(gate.estimate)))
            refuse_other(path / "after" / f"{VERDICT}.json", "compared", stated, _rounded(improvement))


def _rounded(content: Any) -> Any:
    """Nested JSON with numbers as texts of the digits that are compared."""
    if isinstance(content, dict):
        return {name: _rounded(value) for name, value in content.items()}
    return f"{content:.{_DIGITS}g}" if isinstance(content, float) else content
