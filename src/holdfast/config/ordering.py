"""Converts settings to the inputs of a run: the opened model, the opened data, and the request."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from holdfast.attacks.corruption import Corruption
from holdfast.attacks.protocol import Learned
from holdfast.config import pooled
from holdfast.config.attacks import threat_model
from holdfast.config.expecting import (
    declared,
    ends,
    expected,
    names,
    normalisation,
    units_of_eps,
    unlabelled,
    with_found_properties,
)
from holdfast.config.grad_mode import differentiable
from holdfast.config.grammar import parse_threat, parse_transform, seconds
from holdfast.config.members import members_said
from holdfast.config.naming import chosen
from holdfast.config.served import refuse_unserved, remote
from holdfast.config.settings import AssessSettings
from holdfast.config.suites import DEFAULT_SUITE, usual_suite
from holdfast.config.values import SurrogateSettings
from holdfast.core.batch import Data
from holdfast.core.chain import canonical, digest
from holdfast.core.constraints import L0, L1, L2, Constraint, Linf
from holdfast.core.corruptions import Corruptions
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.evidence import Evidence
from holdfast.core.model import Bounds, Classifier
from holdfast.core.names import slug
from holdfast.core.skipped import DECAY, skipped
from holdfast.core.threat import ThreatModel
from holdfast.core.types import ACCESS_ORDER, Access
from holdfast.gates.grammar import parse as parse_gate
from holdfast.harness import MATRIX_ROWS, Member, Plan
from holdfast.harness.plan import DoubtsWanted, adaptive_members
from holdfast.ops.expectation import seen_through
from holdfast.reports.numbers import strict
from holdfast.sources.adapting import known_in_hand
from holdfast.sources.data import open_data
from holdfast.sources.models import Declared, open_model
from holdfast.sources.remote import SCHEMES
from holdfast.suites import curve, suite
from holdfast.verbs.request import AssessRequest, Subject

_USUAL = {"linf": "8/255", "l2": "0.5", "l1": "12", "l0": "10"}


def opened_subject(settings: AssessSettings) -> Subject:
    """Open the model at the address in the settings."""
    if settings.model is None:
        raise UsageError("model is missing; give an address, as in mnist-cnn or file.py:factory")
    properties = declared(settings)
    opened = pooled.open_from_pool(settings, properties, remote(settings))
    card = {"name": opened.name, "how": opened.how, "digest": opened.digest, "files": dict(opened.files)}
    card |= opened.architecture
    refuse_unserved(settings, opened.model)
    model, seen, notes = _seen(opened.model, settings.transform)
    return _subject(model, card | seen, (*opened.notes, *notes), properties)


def opened_surrogate(said: SurrogateSettings, settings: AssessSettings, target: Classifier) -> Subject:
    """Open a surrogate at its address, on which examples for `target` are computed."""
    if said.model.partition(":")[0] in SCHEMES:
        raise UsageError(
            f"the surrogate {said.model} is behind a server, and transfer examples are computed from gradients; give "
            f"its weights"
        )
    opened = open_model(
        said.model,
        arch=said.arch,
        model_args=said.model_args,
        declared=Declared(mean=said.mean, std=said.std, normalised=normalisation(settings)),
        trust_code=settings.trust_code,
    )
    card = {"name": opened.name, "how": opened.how, "digest": opened.digest}
    notes = opened.notes
    if said.skip is not None:
        share = DECAY if said.decay is None else said.decay
        net = skipped(opened.model.net, said.skip, decay=share)
        opened.model.net = net
        card["digest"] = digest(canonical([opened.digest, said.skip, share]))
        notes += (
            f"{share:g} of the gradient passes back through {said.skip}, {len(net.branches)} of its modules",
        )
    return _same_box(_subject(opened.model, card, notes), target)


def opened_surrogates(settings: AssessSettings, target: Classifier) -> tuple[Subject, ...]:
    """Open the surrogates in the settings."""
    return tuple(opened_surrogate(said, settings, target) for said in settings.surrogates)


def given_surrogate(net: nn.Module | Any, settings: AssessSettings, target: Classifier) -> Subject:
    """Return a surrogate given as a Python object. Its preprocessing is its own, or undoes that of the data."""
    return _same_box(_held(net, Declared(normalised=normalisation(settings))), target)


def _same_box(surrogate: Subject, target: Classifier) -> Subject:
    """Raise `UsageError` for a surrogate that declares other bounds than the target. The default is 0 to 1."""
    own, other = (ends(model.bounds) for model in (surrogate.model, target))
    if own not in (other, ends(Bounds())):
        raise UsageError(
            f"the surrogate {surrogate.card['name']} takes inputs from {own[0]:g} to {own[1]:g}, the model from "
            f"{other[0]:g} to {other[1]:g}; wrap it in a factory that rescales them"
        )
    return surrogate


def given_subject(net: nn.Module | Any, settings: AssessSettings) -> Subject:
    """Return a model given as a Python object, identified by its weights, its code and the objects it refers to."""
    return _held(net, declared(settings), settings.transform)


def _held(net: nn.Module | Any, said: Declared, transform: str | None = None) -> Subject:
    model = said.wrap(differentiable(net) if isinstance(net, nn.Module) else net)
    inner = model.net
    name, identity, notes = known_in_hand(inner)
    card = {"name": name, "how": "python", "digest": digest(canonical(identity))}
    model, seen, through = _seen(model, transform)
    return _subject(model, card | seen, (*notes, *through), said)


def _seen(model: Classifier, transform: str | None) -> tuple[Classifier, dict[str, Any], tuple[str, ...]]:
    """Return the model behind the named random transformations, with entries for its card and notes."""
    if transform is None:
        return model, {}, ()
    limits = parse_transform(transform)
    listed = ", ".join(f"{name} {far:g}" for name, far in limits.items())
    note = f"every input is transformed at random before the model, in both directions by up to {listed}"
    return seen_through(model, limits), {"seen_through": limits}, (note,)


def _subject(
    model: Classifier, card: Mapping[str, Any], notes: tuple[str, ...], declared: Declared | None = None
) -> Subject:
    properties = strict(
        {
            "bounds": [model.bounds.low, model.bounds.high],
            "mean": model.mean,
            "std": model.std,
            "classes": model.classes,
            "access": model.access,
            **({} if model.output is None else {"output": model.output}),
            **({} if model.layout is None else {"layout": model.layout}),
        }
    )
    identity = digest(canonical([card["digest"], properties, card.get("seen_through")]))
    shown = {**properties, "bounds": list(ends(model.bounds))}
    parameters = sum(weight.numel() for weight in model.parameters())
    normalised = None if declared is None else declared.normalised
    if normalised is not None:
        shown["data_normalised"] = str(normalised)
    units = units_of_eps(model, normalised)
    return Subject(model, identity, {**card, "parameters": parameters, **shown}, (*notes, *units))


def opened_data(settings: AssessSettings, model: Classifier, *, lenient: bool = False) -> Data:
    """Open the examples at the address in the settings.

    With `lenient`, examples that do not fit the model are accepted too.
    """
    if settings.data is None:
        raise UsageError("data is missing; give an address, as in mnist-mini or images.npz")
    return open_data(
        settings.data,
        split=settings.split,
        **names(settings),
        n=settings.n,
        sample=settings.sample,
        seed=settings.seed,
        expected=expected(settings, model, lenient=lenient),
    )


def open_all(settings: AssessSettings) -> tuple[Subject, Data, tuple[Subject, ...]]:
    """Open the model, the examples and the surrogates at the addresses in the settings."""
    subject = opened_subject(settings)
    surrogates = opened_surrogates(settings, subject.model)
    data = opened_data(settings, subject.model)
    return with_found_properties(subject, surrogates, data), data, surrogates


def examples_to_fit(plan: Plan) -> int:
    """Maximum number of examples on which an attack of the plan is learned, or 0 if none is learned.

    They are sampled at random, because files are often sorted by class.
    """
    return max((m.attack.examples for m in plan.members if isinstance(m.attack, Learned)), default=0)


def opened_fit(
    settings: AssessSettings, model: Classifier, plan: Plan, *, in_hand: bool = False
) -> Data | None:
    """Open the examples for attacks that are learned: those in `fit`, else the train split of the data.

    Returns None if no attack is learned and `fit` is not given.
    """
    address = settings.fit or (None if in_hand else settings.data)
    if address is None or not (examples_to_fit(plan) or settings.fit):
        return None
    elsewhere = settings.fit not in (None, settings.data)
    if not elsewhere and settings.split == "train":
        raise UsageError(
            f"attacks are fitted on the train split of {address!r}, which is also evaluated; give other examples with "
            f"--fit DATA"
        )
    wanted = partial(
        open_data,
        address,
        **names(settings),
        sample=examples_to_fit(plan) or 1,
        seed=settings.seed,
    )
    try:
        return wanted(split="train", expected=expected(settings, model))
    except (UsageError, TargetError) as error:
        if elsewhere:
            return wanted(expected=expected(settings, model))
        raise UsageError(
            f"{address!r} has no train split to fit attacks on ({error}); give other examples with --fit DATA"
        ) from error


def opened_across(settings: AssessSettings, model: Classifier) -> tuple[Data, ...]:
    """Open the data sets of the transfer between data sets. Their labels are not used, so their classes do not
    matter.
    """
    return tuple(opened_other(address, settings, model) for address in settings.across)


def opened_other(address: str, settings: AssessSettings, model: Classifier) -> Data:
    """Open one of them as a random sample by seed, because no more examples are used."""
    return open_data(
        address,
        **names(settings),
        sample=MATRIX_ROWS,
        seed=settings.seed,
        expected=unlabelled(settings, model),
    )


def order(
    settings: AssessSettings,
    *,
    members: tuple[Member, ...] | None = None,
    baseline: Evidence | None = None,
    device: str | None = None,
    target: Access = "gradients",
    command: str = "",
) -> AssessRequest:
    """Return the request of the settings. `members` replaces the suite, `device` that of the settings.

    `target` is the highest access that the model allows.
    """
    claims = tuple(parse_gate(gate) for gate in settings.gates)
    if baseline is None and any(claim.versus for claim in claims):
        raise UsageError(
            f"gate {next(c.text for c in claims if c.versus)!r} compares with another run; give it with --baseline RUN"
        )
    return AssessRequest(
        plan(settings, members, target),
        claims,
        baseline,
        settings.accept_doubts,
        settings.batch_size,
        time_budget_s=None if settings.time_budget is None else seconds(settings.time_budget, "time_budget"),
        workers=settings.workers,
        device=device_of(settings.device) if device is None else device,
        command=command,
    )


def plan(
    settings: AssessSettings, members: tuple[Member, ...] | None = None, target: Access = "gradients"
) -> Plan:
    """Return the attacks in order under the threat model. The access determines the default suite."""
    threat = threat_model(parse_threat(settings.threat))
    seen: Access = min(threat.access, target, key=ACCESS_ORDER.index)
    members = members or members_said(settings, threat.constraint)
    if members is not None:
        name, smallest = "", threat.constraint.eps == float("inf")
    else:
        named = str(settings.suite or "") or usual_suite(replace(parse_threat(settings.threat), access=seen))
        composed = suite(named, threat.constraint, seen)
        members = tuple(
            Member(name, attack, composed.waves.get(name, 0)) for name, attack in composed.attacks
        )
        name, smallest = str(composed), composed.smallest
    _refuse_endless(replace(threat, access=seen), settings, smallest=smallest)
    corrupting = isinstance(threat.constraint, Corruptions)
    in_ball = isinstance(threat.constraint, (Linf, L2, L1, L0))
    _refuse_strangers(members, settings, corrupting=corrupting)
    if settings.curve and not in_ball:
        raise UsageError(f"{settings.threat} has no eps, which --curve needs; leave --curve out")
    probing: DoubtsWanted = "all" if name and in_ball else "free"
    selected = _selected(members, settings.only, settings.skip)
    left_out = [member.name for member in members if member not in selected]
    if name and left_out:
        name += f" without {', '.join(left_out)}"
    return Plan(
        selected,
        threat,
        settings.seed,
        name,
        smallest=smallest,
        attacked=bool(name) and not smallest and in_ball,
        curve=_curve(threat.constraint) if settings.curve and not smallest else (),
        full=settings.full or corrupting,
        keep_adversarial=settings.save_adversarial,
        doubts=probing if settings.doubts else "none",
        adaptive=_adaptive(threat, settings, smallest=smallest, corrupting=corrupting),
    )


def _adaptive(
    threat: ThreatModel, settings: AssessSettings, *, smallest: bool, corrupting: bool
) -> tuple[Member, ...]:
    """Return the adaptive attacks, from which raised doubts select."""
    if not settings.adaptive:
        return ()
    if not settings.doubts:
        raise UsageError("adaptive attacks are chosen by the doubts that are raised; leave --no-doubts out")
    if smallest or corrupting:
        raise UsageError(
            f"adaptive attacks need an eps, and "
            f"{'the suite searches for the smallest change' if smallest else f'the threat is {settings.threat}'}; "
            f"leave --adaptive out, or choose a threat such as linf:8/255 and a suite such as {DEFAULT_SUITE}"
        )
    return adaptive_members(threat.constraint)


def _curve(constraint: Constraint) -> tuple[Member, ...]:
    return tuple(Member(*named) for named in curve(constraint))


def _refuse_endless(threat: ThreatModel, settings: AssessSettings, *, smallest: bool) -> None:
    """Raise `UsageError` for a threat without eps, unless the suite searches for the smallest change."""
    if threat.constraint.eps == float("inf") and not smallest:
        norm = type(threat.constraint).__name__.lower()
        choose = "choose the suite minimum-norm, or " if threat.gives("gradients") else ""
        raise UsageError(
            f"{settings.threat} has no eps, which means the smallest change: {choose}give an eps, as in "
            f"{norm}:{_USUAL[norm]}"
        )


def _refuse_strangers(members: Sequence[Member], settings: AssessSettings, *, corrupting: bool) -> None:
    """Raise `UsageError` for a mixture of corruptions with other attacks or threats."""
    for member in members:
        if isinstance(member.attack, Corruption) and not corrupting:
            raise UsageError(
                f"{member.name} is a common corruption, and the threat is {settings.threat}; "
                f"choose a threat such as corruptions:3, or another suite"
            )
        if corrupting and not isinstance(member.attack, Corruption):
            raise UsageError(
                f"{member.name} is not a common corruption, and the threat is {settings.threat}; "
                f"leave it out, or choose a threat such as linf:8/255"
            )


def _selected(members: tuple[Member, ...], only: Sequence[str], skip: Sequence[str]) -> tuple[Member, ...]:
    left = chosen([member.name for member in members], only, skip)
    return tuple(member for member in members if slug(member.name) in left)


def device_of(name: str) -> str:
    """Return the device. `auto` selects a GPU if there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device is {name!r}; expected auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is {name!r}, but this machine has {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    return name
