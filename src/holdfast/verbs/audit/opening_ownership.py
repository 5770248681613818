"""Opens the suspect, the controls and both sets of examples of `holdfast audit extraction` with a suspect."""

from functools import partial

import torch

from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.backdoor_controls import MIN_CONTROLS
from holdfast.audits.ownership import EXAMPLES, OwnershipRequest, measure
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import Placeholder, Remedy, UsageError
from holdfast.core.model import Classifier
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.settings.grammar import parse_surrogate
from holdfast.settings.groups import ExampleSelection
from holdfast.settings.values import SurrogateSettings
from holdfast.verbs.audit.extraction import AuditExtraction
from holdfast.verbs.audit.opening_models import control_training, controls_in
from holdfast.verbs.opening import declared, resolve
from holdfast.verbs.opening.arguments import beside
from holdfast.verbs.opening.plans import device_of


def prepared_ownership(settings: AuditExtraction, start: AuditStart) -> PreparedAudit:
    """Open the model, the suspect and the controls of an audit."""
    if settings.data is None:
        raise UsageError(
            "data is missing; give the training examples of the model", Remedy("data", Placeholder("DATA"))
        )
    subject = resolve.open_seeded(settings)
    model = subject.model
    if model.rejects:
        raise UsageError("the model has a detector of its own; audit the network inside")
    members, _ = resolve.open_training_examples(settings, model)
    outside = _outside(settings, model, members)
    subject = declared.with_found_properties(subject, (), members)
    suspect = _suspect(settings, subject)
    batch, untouched = _compared(settings, members, outside)
    n, controls, training = len(batch) // 2, None, None
    if settings.controls is not None or settings.train_controls is not None:
        refuse_untrainable(model)
    if settings.controls is not None:
        controls = controls_in(settings.controls)
    if settings.train_controls is not None:
        identity = [outside.digest, "without", sorted(batch.ids[n:].tolist())]
        training = control_training(settings, settings.train_controls, model, untouched, identity)
    device = torch.device(device_of(settings.device))
    model.to(device)
    request = OwnershipRequest(batch.to(device), n, suspect.model.to(device), controls, training)
    about = AuditRequest(
        "extraction",
        {
            "suspect": suspect.card["name"],
            "n": n,
            "controls": MIN_CONTROLS
            if training is not None
            else 0
            if controls is None
            else len(controls.files),
            "trained": training is not None,
        },
        {**subject.card, "digest": subject.digest, "suspect": suspect.digest},
        {
            "name": members.name,
            "digest": members.digest,
            "n": len(members),
            "outside": {"name": outside.name, "digest": outside.digest, "n": len(outside)},
            "controls": None if controls is None else digest(canonical(list(controls.digests))),
            "training": None if training is None else training.folder.name,
        },
        request.steps(),
        seed=settings.seed,
        device=str(device),
        notes=(*subject.notes, *declared.notes_of(members, outside)),
    )
    return PreparedAudit(about, partial(measure, model=model, request=request, notify=start.notify))


def _compared(settings: AuditExtraction, members: Data, outside: Data) -> tuple[Batch, Batch]:
    """Some training examples of the model with as many others after them, and the rest of the others, on which controls
    may be trained.
    """
    rng = Draws(settings.seed).at("ownership")
    inside, rest = (data.read(0, len(data)) for data in (members, outside))
    shared = set(inside.fingerprints())
    rest = rest.take(torch.tensor([each not in shared for each in rest.fingerprints()]))
    n = min(EXAMPLES, len(inside), len(rest) if settings.train_controls is None else len(rest) // 2)
    if n < 2:
        raise UsageError(
            f"{len(rest):,} examples of {outside.name} are not training examples of the model, and at least 4 "
            "others of the same kind are needed",
            Remedy("pool", Placeholder("DATA")),
        )
    inside = inside.take(rng.at("members").bits(inside.ids).argsort()[:n])
    order = rng.at("outside").bits(rest.ids).argsort()
    compared = rest.take(order[:n])
    x, y = torch.cat((inside.x, compared.x)), torch.cat((inside.y, compared.y))
    return Batch(x, y, torch.cat((inside.ids, compared.ids))), rest.take(order[n:])


def _outside(settings: AuditExtraction, model: Classifier, members: Data) -> Data:
    """Examples of the same kind as the training examples that the model was not trained on."""
    if settings.pool is not None:
        source = beside(settings, settings.pool)
        return resolve.open_beside(
            settings, source, declared.expected(settings, model, source, first=members)
        )
    if resolve.open_train_split(settings, model) is None:
        raise UsageError(
            "the training examples of the model are compared with others of the same kind, and the data have no test "
            "split",
            Remedy("pool", Placeholder("DATA")),
        )
    return resolve.open_examples(settings, model, selection=ExampleSelection())


def _suspect(settings: AuditExtraction, subject: DescribedModel) -> DescribedModel:
    """Open the suspect. Weights without an architecture have that of the model."""
    given = settings.suspect
    if isinstance(given, str):
        spec = SurrogateSettings.model_validate(parse_surrogate(given, "suspect"))
        if spec.arch is None and settings.arch is not None:
            own = {
                "arch": settings.arch,
                "model_args": settings.model_args,
                "mean": settings.mean,
                "std": settings.std,
            }
            spec = spec.model_copy(update=own)
        given = spec
    suspect = resolve.open_other(given, settings, "suspect")
    resolve.refuse_other_bounds(suspect, subject.model, "suspect")
    if suspect.digest == subject.digest:
        raise UsageError("the suspect is the model itself: its file has the same digest; give another model")
    return suspect
