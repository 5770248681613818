"""Opens what an audit of membership needs, and runs it: the model, both data sets, and the training of reference
networks, by a function of the user or as the card of a hardened model states.
"""

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.audits import membership_references
from holdfast.audits.audit import AuditRequest, AuditStart, PreparedAudit
from holdfast.audits.finding import Images, StoredSteps
from holdfast.audits.membership import (
    METRIC,
    METRIC_FPR,
    SCORES,
    SEEDS,
    SENT,
    columns_of,
    images_of,
    measure,
    scores_of,
    steps,
)
from holdfast.audits.membership_references import (
    Design,
    MembershipAudit,
    ReferenceTraining,
    Signals,
    first_copies,
    joined,
    refuse_shared,
    signals_of,
    trained_signals,
)
from holdfast.core.batch import Batch, Data
from holdfast.core.chain import canonical, digest
from holdfast.core.draws import Draws
from holdfast.core.errors import Placeholder, Remedy, TargetError, UsageError
from holdfast.core.evidence import Columns
from holdfast.core.meter import Room
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.core.types import Inputs, Labels
from holdfast.io.files import text_of_file
from holdfast.io.models.factories import TrainingFunction, open_training, refuse_other_classes
from holdfast.io.models.models import CARD
from holdfast.recipes.training.recipe import Recipe
from holdfast.rotation.collecting import rows_of, with_fresh_weights
from holdfast.runs.assess.executors import executor_of
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.assess.served_runs import attach, finish, journaled, served_by
from holdfast.runs.engine.run import Measure, Run
from holdfast.runs.harden.attempt_training import refuse_untrainable
from holdfast.threats.parsing import parse_threat
from holdfast.verbs.audit.membership import AuditMembership
from holdfast.verbs.opening import declared, resolve
from holdfast.verbs.opening.arguments import beside
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.recipes import build_recipe, functions_in, trained_by


@dataclass(frozen=True)
class CardTraining:
    """The training of a hardened model, repeated on other examples and from fresh weights."""

    name: str
    """path of the card"""
    digest: str
    """SHA-256 in hex of the recipe, its settings and the threat"""
    recipe: Recipe
    threat: ThreatModel

    def __call__(self, model: Classifier, x: Inputs, y: Labels, seed: int) -> Classifier:
        """Train a copy of `model` with fresh weights on the examples, and return it in eval mode."""
        rng = Draws(seed)
        trained = with_fresh_weights(model, rng.at("begin"), "own")
        examples = Batch(x, y, torch.arange(len(x), device=x.device))
        (last,) = deque(self.recipe(trained, examples, self.threat, rng=rng), maxlen=1)
        last.put_into(trained)
        return trained.eval()


Training = CardTraining | TrainingFunction
"""A training that an audit repeats."""


def open_any_training(train: object) -> Training:
    """Return a training that is given as a folder that `harden` wrote, or as a function (`FILE.py:F`)."""
    if isinstance(train, str) and (Path(train) / CARD).is_file():
        return open_card_training(train)
    return open_training(train)


def trained_like(training: Training, model: Classifier, x: Inputs, y: Labels, seed: int) -> Classifier:
    """Train a network on inputs, and return it as a classifier with the properties of `model`. A function of the user
    gets the inputs with the preprocessing of `model`.
    """
    if isinstance(training, CardTraining):
        refuse_untrainable(model)
        return training(model, x, y, seed)
    net = training(model.preprocess(x), y, seed)
    mean, std = (None if value is None else value.tolist() for value in (model.mean, model.std))
    trained = model.renormalised(mean, std).to(x.device)
    trained.net, trained.classes = net, None
    with torch.no_grad():
        logits = trained(x[:1])
    assert model.classes is not None
    refuse_other_classes(training.name, logits, model.classes)
    return trained


def open_card_training(folder: str) -> CardTraining:
    """Return the training in the card of a hardened model. Raises `UsageError` if the card names a function."""
    path = Path(folder) / CARD
    spec = trained_by(str(path))
    if spec is None:
        raise UsageError(f"{str(path)!r} names no recipe; give a function, as in net.py:fit")
    for key, value in functions_in(spec).items():
        raise UsageError(
            f"recipe.training.{key} is {value} in {str(path)!r}, and code that a card names is not run; give a "
            "function that trains the network, as in net.py:fit"
        )
    threat = json.loads(text_of_file(path, "card")).get("threat")
    if not isinstance(threat, str):
        raise TargetError(
            f"{str(path)!r} states no threat of the training, but {threat!r:.80}; restore the card"
        )
    identity = digest(canonical({**spec, "threat": threat}))
    return CardTraining(str(path), identity, build_recipe(spec), parse_threat(threat).opened())


_NETWORKS = 16
_PROBE = 64  # examples on which a training function is called twice


@dataclass(frozen=True)
class _Opened:
    subject: DescribedModel
    examples: Batch
    names: dict[str, Any]
    """name, digest and number of the data"""
    members: int | None
    notes: tuple[str, ...]


@contextmanager
def prepared_membership(settings: AuditMembership, start: AuditStart) -> Iterator[PreparedAudit]:
    """Open the model and the data of an audit, and yield it with the executor that trains networks."""
    networks = _networks(settings)
    settings.refuse_unusable_cluster()
    training = None if settings.train is None else open_any_training(settings.train)
    with journaled(start.folder, resume=start.resume, keep=settings.keep_answers):
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
        request = _request(settings, opened, how, training, str(device))

        def audit(run: Run) -> Images:
            attach(served)
            if training is not None:
                _compare_seeds(run, training, model, how)
            measure(run, how, None if how.design.members is None else partial(queried, model))
            if served is not None:
                finish(served)
                run.document(SENT, lambda: {"rows": served.sent.totals.rows.total()})
            columns = run.stage(SCORES, lambda: scores_of(StoredSteps(request.manifest(), run.store))).columns
            return lambda: images_of(examples.x, columns)

        work = NetworkTraining(model, how, training, ReferenceTraining(settings.epochs), str(device))
        if settings.workers is not None:
            work = work.in_memory()
        options = settings.ray_options(str(device))
        with executor_of(work, settings.workers, options, str(device), start.notify) as executor:
            yield PreparedAudit(request, audit, executor=executor)


def _how(
    settings: AuditMembership, opened: _Opened, examples: Batch, networks: int, training: Training | None
) -> MembershipAudit:
    """Return the inputs of the audit. Raises `TargetError` or `UsageError` for a model that cannot be trained."""
    model = opened.subject.model
    if networks and training is None:
        refuse_untrainable(model)
    groups = opened.names.pop("groups", {})
    return MembershipAudit(
        Design(len(examples), networks, settings.fpr, settings.seed, opened.members, groups),
        examples,
        model.classes or int(examples.y.max()) + 1,
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
    subject = declared.with_found_properties(subject, (), data)
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
        notes += declared.notes_of(other)
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
    return resolve.open_beside(settings, source, declared.expected(settings, model, source, first=first))


def _refuse_too_few(settings: AuditMembership, how: MembershipAudit) -> None:
    n, members = how.design.n, how.design.members
    non_members = n // 2 if members is None else n - members
    membership_references.refuse_few(settings.fpr, non_members)
    if any(METRIC in gate for gate in settings.gates) and non_members < membership_references.needed(
        METRIC_FPR
    ):
        raise UsageError(
            f"a gate is on {METRIC}, which needs {membership_references.needed(METRIC_FPR):,} non-members, and "
            f"there are {non_members:,}; give more of them, or leave the gate out and read the rate at --fpr"
        )


def _request(
    settings: AuditMembership,
    opened: _Opened,
    how: MembershipAudit,
    training: Training | None,
    device: str,
) -> AuditRequest:
    trained: Any = None
    if training is not None:
        trained = {"name": training.name, "digest": training.digest}
    elif how.design.networks:
        trained = vars(ReferenceTraining(settings.epochs))
    return AuditRequest(
        "membership",
        {
            "networks": how.design.networks,
            "fpr": how.design.fpr,
            "members": how.design.members,
            "train": trained,
            "groups": list(how.design.groups),
        },
        {**opened.subject.card, "digest": opened.subject.digest},
        opened.names,
        steps(how),
        seed=settings.seed,
        device=device,
        notes=opened.notes,
        shards=how.shards,
    )


def _compare_seeds(run: Run, training: Training, model: Classifier, how: MembershipAudit) -> None:
    """Store whether a training function returns the same network for two seeds on a few examples."""

    def compared() -> dict[str, bool]:
        part = rows_of(how.examples, _PROBE, how.design.rng.at("seeds"))
        first, second = (trained_like(training, model, part.x, part.y, seed).state_dict() for seed in (1, 2))
        return {"ignored": all(torch.equal(first[name], second[name]) for name in first)}

    run.document(SEEDS, compared)


TOGETHER, FUNCTION_TOGETHER = 8, 2
"""numbers of networks that one shard trains: as one network with batched weights, or by a function one after another"""


@dataclass(frozen=True)
class NetworkTraining:
    """The training of the networks of an audit: by a function or the card of the user, or that of the audit."""

    model: Classifier
    how: MembershipAudit
    training: Training | None
    default: ReferenceTraining
    device: str

    @contextmanager
    def opened(self) -> Iterator[Measure]:
        """Yield the function that trains the networks of a shard, on the device."""
        here = replace(
            self,
            model=self.model.to(self.device),
            how=replace(self.how, examples=self.how.examples.to(torch.device(self.device))),
        )
        yield here.measured

    def in_memory(self) -> "NetworkTraining":
        """Return the same training with copies of the model and the examples in main memory, from which they are sent
        to workers.
        """
        examples = self.how.examples.to(torch.device("cpu"))
        return replace(self, model=deepcopy(self.model).cpu(), how=replace(self.how, examples=examples))

    def measured(self, shard: tuple[int, int], room: Room, until: float) -> Columns:
        """Train the networks of a shard, and return what they say about all examples."""
        networks, how = range(*shard), self.how
        inside = how.design.inside()[list(networks)]
        if self.training is not None:
            return columns_of(networks, self._called(self.training, networks, inside, room))
        draws = [how.design.rng.at("network").at(network) for network in networks]
        fresh = [with_fresh_weights(self.model, each.at("begin"), "own").net for each in draws]
        nets = [net for net in fresh if isinstance(net, nn.Module)]
        x, y, output = self.model.preprocess(how.examples.x), how.examples.y, self.model.output
        signals = trained_signals(nets, x, y, inside, self.default, draws, output, room.progress)
        return columns_of(networks, signals)

    def _called(self, training: Training, networks: Sequence[int], inside: Tensor, room: Room) -> Signals:
        results, how = [], self.how
        for network, mask in zip(networks, inside, strict=True):
            part = how.examples.take(mask)
            seed = how.design.rng.at("network").at(network).seed
            trained = trained_like(training, self.model, part.x, part.y, seed)
            results.append(queried(trained, how.examples))
            room.progress(1)
        return joined(results)


def queried(model: Classifier, batch: Batch) -> Signals:
    """Return what the model says about examples, in pieces. A server limits the rows of its requests itself."""
    with torch.no_grad():
        logits = torch.cat([model(piece.x) for piece in batch.split(256)])
    if (largest := int(batch.y.max())) >= logits.shape[1]:
        raise UsageError(
            f"the data have the label {largest}, and the model has {logits.shape[1]} classes; expected labels from 0 "
            f"to {logits.shape[1] - 1}"
        )
    return signals_of(logits, batch.y, labels=model.access == "labels")
