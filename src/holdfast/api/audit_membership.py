"""Opens what an audit of membership needs, and runs it: the model, both data sets, and the training of networks."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast.api import expecting, resolve
from holdfast.api.audited_trainings import Training, open_any_training, trained_like
from holdfast.api.plans import device_of
from holdfast.api.reference_networks import FUNCTION_TOGETHER, TOGETHER, NetworkTraining, queried
from holdfast.api.references import beside
from holdfast.api.verb_settings import AuditMembership, composed
from holdfast.audits.audit import AuditRequest, AuditResult, audited
from holdfast.audits.finding import Finding
from holdfast.audits.membership import rates
from holdfast.audits.membership.audit import membership_finding, steps
from holdfast.audits.membership.controls import first_copies, refuse_shared
from holdfast.audits.membership.how import MembershipAudit
from holdfast.audits.membership.references import ReferenceTraining
from holdfast.audits.membership.report import METRIC, METRIC_FPR
from holdfast.core.batch import Batch, Data
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.runs.assess.executors import executor_of
from holdfast.runs.assess.request import Subject
from holdfast.runs.assess.served_runs import attach, finish, journaled, served_by
from holdfast.runs.engine.progress import Notify, Progress
from holdfast.runs.engine.run import Run
from holdfast.runs.harden.trainable import refuse_untrainable

_NETWORKS = 16
_PROBE = 64  # examples on which a training function is called twice


@dataclass(frozen=True)
class _Opened:
    subject: Subject
    examples: Batch
    names: dict[str, Any]
    """name, digest and number of the data"""
    members: int | None
    notes: tuple[str, ...]


def membership_audited(
    settings: AuditMembership,
    folder: Path | None,
    notify: Notify,
    command: str,
    *,
    resume: bool,
    progress: Progress,
) -> AuditResult:
    """Open the model and the data of an audit of membership, and take its steps."""
    networks = _networks(settings)
    settings.refuse_unusable_cluster(settings.workers, settings.model)
    training = None if settings.train is None else open_any_training(settings.train)
    with journaled(folder, resume=resume, keep=settings.keep_answers):
        opened = _opened(settings)
        model, device = opened.subject.model, torch.device(device_of(settings.device))
        served = served_by(model)
        if served is not None and networks and training is None:
            raise UsageError(
                "reference networks are trained like the model, and the model is behind a server; give the function "
                "that trains them",
                Remedy("train", Placeholder("FILE.py:F", "fit")),
            )
        model.to(device)
        examples = opened.examples.to(device)
        if model.classes is None and served is None:
            with torch.no_grad():
                model.classes = model(examples.first(1).x).shape[1]
        how = _how(settings, opened, examples, networks, training)
        _refuse_too_few(settings, how)
        request = _request(settings, opened, how, training, str(device), command)

        def audit(run: Run) -> Finding:
            attach(served)
            notes = () if training is None else _seed_notes(run, training, model, how)
            query = None if how.members is None else partial(queried, model)
            finding = membership_finding(run, how, query, notes)
            if served is None:
                return finding
            finish(served)
            return replace(finding, facts={**finding.facts, "rows_sent": served.sent.totals.rows.total()})

        work = NetworkTraining(model, how, training, ReferenceTraining(settings.epochs), str(device))
        if settings.workers is not None:
            work = work.in_memory()
        options = settings.ray_options(str(device))
        with executor_of(work, settings.workers, options, str(device), notify) as executor:
            return audited(
                request, audit, folder, resume=resume, progress=progress, notify=notify, executor=executor
            )


def _how(
    settings: AuditMembership, opened: _Opened, examples: Batch, networks: int, training: Training | None
) -> MembershipAudit:
    """Return what is audited, and how."""
    model = opened.subject.model
    if networks and training is None:
        refuse_untrainable(model)
    return MembershipAudit(
        examples,
        model.classes or int(examples.y.max()) + 1,
        networks,
        settings.fpr,
        settings.seed,
        opened.members,
        opened.names.pop("groups", {}),
        TOGETHER if training is None else FUNCTION_TOGETHER,
        settings.epochs if training is None else 1,
    )


def _networks(settings: AuditMembership) -> int:
    """Number of networks to train. Raises `UsageError` if the settings name neither way to audit, or too few."""
    given, of_model = settings.references, settings.non_members is not None
    if not of_model and given is None and settings.train is None:
        raise UsageError(
            "a model alone does not show what it was trained on; to audit this model, give examples that it was not "
            "trained on, and to audit its training procedure, the number of networks to train",
            Remedy("non_members", Placeholder("DATA")),
            Remedy("references", _NETWORKS),
        )
    if given is None and of_model and settings.train is None:
        if settings.workers is not None:
            raise UsageError(
                f"workers is {settings.workers}, which share the training of networks, and none are trained",
                Remedy("references", _NETWORKS),
                Remedy("workers"),
            )
        return 0
    if given is None:
        return _NETWORKS
    least = 2 if of_model else 4
    if given < least or given % 2:
        raise UsageError(
            f"references is {given}; expected an even number of at least {least}, because networks are trained on "
            "complementary halves" + ("" if of_model else ", and each is compared with the others"),
            Remedy("references", max(least, given + given % 2)),
        )
    return given


def _opened(settings: AuditMembership) -> _Opened:
    """Open the model and the data. Without non-members, further copies of an example are left out."""
    subject = resolve.open_seeded(settings)
    data, split_notes = resolve.open_training_examples(settings, subject.model)
    subject = expecting.with_found_properties(subject, (), data)
    if subject.model.rejects:
        raise UsageError("the model has a detector of its own; audit the network inside")
    examples, groups = data.read(0, len(data)), getattr(data, "groups", None)
    about: dict[str, Any] = {"name": data.name, "digest": data.digest, "n": len(data)}
    notes: tuple[str, ...] = (*subject.notes, *split_notes)
    members = None
    if settings.non_members is None:
        kept = first_copies(examples)
        if left_out := len(examples) - len(kept):
            notes += (f"{left_out:,} examples are copies of others, and were left out",)
        examples = kept
    else:
        other = _non_members(settings, subject.model, data)
        notes += expecting.notes_of(other)
        outside = other.read(0, len(other))
        if outside.example_shape != examples.example_shape:
            raise UsageError(
                f"non_members have the shape {outside.example_shape}, the members {examples.example_shape}; expected "
                "examples of the same kind"
            )
        refuse_shared(examples, outside)
        members = len(examples)
        examples = Batch(
            *(
                torch.cat(pair)
                for pair in ((examples.x, outside.x), (examples.y, outside.y), (examples.ids, outside.ids))
            )
        )
        about["non_members"] = {"name": other.name, "digest": other.digest, "n": len(other)}
    if groups is not None:
        places = torch.full((len(examples),), -1)
        rows = {
            int(row): int(place)
            for row, place in zip(data.read(0, len(data)).ids, groups.places, strict=True)
        }
        first = len(examples) if members is None else members
        places[:first] = torch.tensor([rows[int(row)] for row in examples.ids[:first]])
        about["groups"] = {name: places == place for place, name in enumerate(groups.names)}
    return _Opened(subject, examples, about, members, notes)


def _non_members(settings: AuditMembership, model: Classifier, first: Data) -> Data:
    source = beside(settings, settings.non_members)
    return resolve.open_expected(
        composed(AuditMembership, settings, source), expecting.expected(settings, model, source, first=first)
    )


def _refuse_too_few(settings: AuditMembership, how: MembershipAudit) -> None:
    n = len(how.examples)
    non_members = n // 2 if how.members is None else n - how.members
    rates.refuse_few(settings.fpr, non_members)
    if any(METRIC in gate for gate in settings.gates) and non_members < rates.needed(METRIC_FPR):
        raise UsageError(
            f"a gate is on {METRIC}, which needs {rates.needed(METRIC_FPR):,} non-members, and there are "
            f"{non_members:,}; give more of them, or leave the gate out and read the rate at --fpr"
        )


def _request(
    settings: AuditMembership,
    opened: _Opened,
    how: MembershipAudit,
    training: Training | None,
    device: str,
    command: str,
) -> AuditRequest:
    trained: Any = None
    if training is not None:
        trained = {"name": training.name, "digest": training.digest}
    elif how.networks:
        trained = vars(ReferenceTraining(settings.epochs))
    return AuditRequest(
        "membership",
        {
            "networks": how.networks,
            "fpr": how.fpr,
            "train": trained,
            "groups": {name: int(mask.sum()) for name, mask in how.groups.items()},
        },
        {**opened.subject.card, "digest": opened.subject.digest},
        opened.names,
        steps(how),
        tuple(settings.gates),
        settings.seed,
        device,
        command,
        opened.notes,
        how.shards,
    )


def _seed_notes(run: Run, training: Training, model: Classifier, how: MembershipAudit) -> tuple[str, ...]:
    """A sentence if a training function returns the same network for two seeds on a few examples."""

    def compared() -> dict[str, bool]:
        part = how.examples.first(_PROBE)
        first, second = (trained_like(training, model, part.x, part.y, seed).state_dict() for seed in (1, 2))
        return {"ignored": all(torch.equal(first[name], second[name]) for name in first)}

    if not run.document("seeds", compared)["ignored"]:
        return ()
    note = (
        f"{training.name} returns the same network for two seeds. Its random choices are then known to the attacker, "
        "and the rates may be too high for a training that does not fix them."
    )
    return (note,)
