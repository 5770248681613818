"""Opens what an audit of privacy needs: the model, the examples and the training function."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from holdfast.api import expecting, resolve
from holdfast.api.audited_trainings import CardTraining, Training, open_any_training, trained_like
from holdfast.api.plans import device_of
from holdfast.api.verb_settings import AuditPrivacy
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.privacy.audit import LOSSES, PrivacyAudit, measure
from holdfast.core.errors import UsageError
from holdfast.core.remedies import Placeholder, Remedy
from holdfast.recipes.dp_sgd import DPSGD
from holdfast.statistics.group_privacy import row_budget


@contextmanager
def prepared_privacy(settings: AuditPrivacy, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the model, the data and the training function of an audit, and yield it."""
    if settings.train is None:
        raise UsageError(
            "train is missing: the audit trains a network with canaries, and needs the function that trains it",
            Remedy("train", Placeholder("FILE.py:F", "fit")),
        )
    training = open_any_training(settings.train)
    epsilon, delta = _claimed(settings, training)
    subject = resolve.open_seeded(settings)
    examples, split_notes = resolve.open_training_examples(settings, subject.model)
    subject = expecting.with_found_properties(subject, (), examples)
    device = torch.device(device_of(settings.device))
    data = examples.read(0, len(examples)).to(device)
    model = subject.model.to(device)
    if model.classes is None:
        model.classes = model(data.first(1).x).shape[1]
    equal_rows = row_budget(epsilon, delta, data.fingerprints()).equal_rows
    how = PrivacyAudit(
        epsilon, delta, settings.canaries, settings.canary, settings.guesses, equal_rows, settings.seed
    )
    how.refuse_unable(len(data), model.classes)
    request = AuditRequest(
        "privacy",
        {
            **{name: value for name, value in vars(how).items() if name != "seed"},
            "train": {"name": training.name, "digest": training.digest},
        },
        {**subject.card, "digest": subject.digest},
        {"name": examples.name, "digest": examples.digest, "n": len(data), "shape": data.example_shape},
        (LOSSES,),
        tuple(settings.gates),
        settings.seed,
        str(device),
        start.command,
        (*subject.notes, *split_notes),
    )
    train = partial(trained_like, training, model)
    yield PreparedAudit(request, lambda run: measure(run, train, data, model, how))


def _claimed(settings: AuditPrivacy, training: Training) -> tuple[float, float]:
    """Return the epsilon and the delta of the settings, and otherwise those in the card of a private training."""
    epsilon, delta = settings.epsilon, settings.delta
    if isinstance(training, CardTraining) and isinstance(training.recipe, DPSGD):
        epsilon = training.recipe.epsilon if epsilon is None else epsilon
        delta = delta if "delta" in settings.model_fields_set else training.recipe.delta
    if epsilon is None:
        raise UsageError(
            "epsilon is missing: the audit compares its bound with the epsilon that the training claims",
            Remedy("epsilon", Placeholder("X")),
        )
    return epsilon, delta
