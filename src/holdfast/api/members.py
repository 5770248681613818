"""Opens a model that consists of several others: an ensemble (`ensemble:`) or a mix of two networks (`mixed:`)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from holdfast.api.checked_settings import group_of
from holdfast.api.expecting import ends
from holdfast.api.verb_settings import Opening
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds, Classifier
from holdfast.core.remedies import model_argument
from holdfast.core.types import ACCESS_ORDER
from holdfast.io.models.composed import Ensemble, Mixture
from holdfast.io.models.factories import converted_arguments
from holdfast.io.models.models import Declared, OpenedModel
from holdfast.runs.assess.request import Subject
from holdfast.settings.groups import Members
from holdfast.settings.naming import COMBINATIONS, MIXED
from holdfast.settings.values import SurrogateSettings

_COMBINED = {
    "logits": "the mean of their logits",
    "mean": "the mean of their probabilities",
    "votes": "their votes, of which attacks use the gradient of the mean log-probabilities",
}


def open_members(
    address: str,
    settings: Opening,
    declared: Declared,
    open_member: Callable[[SurrogateSettings, Opening, str], Subject],
) -> OpenedModel:
    """Open the members at an address `ensemble:` or `mixed:` with `open_member`, and return the model that consists of
    them.

    Its digest depends on the digests of the members and on how they are combined. Raises `UsageError` or `TargetError`
    if the members do not fit each other.
    """
    if declared.texts or declared.rules is not None:
        raise UsageError(
            f"the model is {address}, whose members are called with images or other numbers without rules, and the "
            "threat is on texts or on rows with rules; give one model"
        )
    if declared.input_shape is not None:
        raise UsageError(
            f"input_shape is for an .onnx file with free sizes, but the model is {address!r}",
            model_argument("input_shape"),
        )
    subjects = [open_member(member, settings, "member") for member in group_of(settings, Members).members]
    models = [subject.model for subject in subjects]
    entries = [_entry(subject) for subject in subjects]
    labels = [f"{place} ({entry['name']})" for place, entry in enumerate(entries, 1)]
    common = _common(subjects, declared)
    for model in models:
        model.output = model.output or declared.output
    net, how, combined = _network(address, models, labels, settings.model_args)
    model = common.wrap(net)
    access = min((member.access for member in models), key=ACCESS_ORDER.index)
    if access != "gradients":
        lowest = next(k for k, member in enumerate(models) if member.access == access)
        model.access, model.hides = access, f"the member {labels[lowest]} gives only {access}"
    if isinstance(net, Ensemble):
        net.declare(model)
    identity = digest(canonical([how, combined, [entry["digest"] for entry in entries]]))
    files = {f"member {label}": entry["digest"] for label, entry in zip(labels, entries, strict=True)}
    notes = tuple(
        f"the member {label}: {note}"
        for label, subject in zip(labels, subjects, strict=True)
        for note in subject.notes
    )
    listed = ", ".join(str(entry["name"]) for entry in entries)
    note = f"the model is {how} of {listed}: {_described(combined)}"
    return OpenedModel(
        model, address, how.split()[-1], {**files, how: identity}, (note, *notes), {"members": entries}
    )


def _network(
    address: str, models: Sequence[Classifier], labels: Sequence[str], arguments: Mapping[str, str]
) -> tuple[Ensemble | Mixture, str, Mapping[str, Any]]:
    """Return the network that consists of the members, its kind in words, and how they are combined."""
    if address == MIXED:
        accurate, robust = models

        def mix(weight: float = 0.8, scale: float = 0.5, power: float = 3.0, shift: float = 0.0) -> Mixture:
            return Mixture(
                accurate, robust, weight=weight, scale=scale, power=power, shift=shift, names=labels
            )

        mixture = mix(**converted_arguments(mix, arguments, MIXED))  # type: ignore[arg-type]
        return mixture, "a mix", mixture.parameters_of_mix
    combine = address.partition(":")[2] or COMBINATIONS[0]
    ensemble = Ensemble(models, combine=combine, straight=combine == "votes", names=labels)  # type: ignore[arg-type]
    return ensemble, "an ensemble", {"combine": combine}


def _described(combined: Mapping[str, Any]) -> str:
    if "combine" in combined:
        return _COMBINED[combined["combine"]]
    return "mixed probabilities with " + ", ".join(f"{name} {value:g}" for name, value in combined.items())


def _entry(subject: Subject) -> dict[str, Any]:
    return {**{key: subject.card[key] for key in ("name", "how")}, "digest": subject.digest}


def _common(subjects: Sequence[Subject], declared: Declared) -> Declared:
    """Return the properties that the members share. Raises `TargetError` if they have other bounds or classes."""
    given = None if declared.bounds is None else ends(declared.bounds)
    first = subjects[0]
    for subject in subjects:
        model, name = subject.model, subject.card["name"]
        if model.rejects:
            raise UsageError(
                f"the member {name} has a detector that rejects inputs; give the network without its detector"
            )
        bounds, expected = ends(model.bounds), given or ends(first.model.bounds)
        if bounds != expected and (given is None or bounds != ends(Bounds())):
            raise TargetError(
                f"the member {name} takes inputs from {bounds[0]:g} to {bounds[1]:g}, and "
                f"{'the bounds are' if given else 'the first member takes them'} from {expected[0]:g} to "
                f"{expected[1]:g}; wrap it in a factory that rescales them"
            )
        for what in ("classes", "class_names", "class_labels"):
            own, other = getattr(model, what), getattr(first.model, what)
            if own is not None and other is not None and own != other:
                raise TargetError(
                    f"the member {name} has {what.replace('_', ' ')} {own}, and the first one {other}; give members "
                    "with the same classes"
                )
    shared: dict[str, Any] = {
        what: getattr(declared, what)
        or next((v for s in subjects if (v := getattr(s.model, what)) is not None), None)
        for what in ("classes", "class_names", "class_labels")
    }
    bounds_of_all = declared.bounds or first.model.bounds
    return Declared(bounds=bounds_of_all, **shared)


def members_as_surrogates(subject: Subject) -> tuple[Subject, ...]:
    """Return the members of an opened model as surrogates, on which attacks are computed as well; none for another
    model, or if a member gives no gradients.

    They are other classifiers of the same networks, whose layout is determined separately.
    """
    entries = subject.card.get("members", ())
    if not entries or subject.model.access != "gradients":
        return ()
    # a guard or random transformations may be around the network
    net = next(part for part in subject.model.modules() if isinstance(part, Ensemble | Mixture))
    return tuple(
        Subject(_copy(member, subject.model), entry["digest"], {**entry, "member": True})
        for member, entry in zip(net.members, entries, strict=True)
    )


def _copy(member: nn.Module, whole: Classifier) -> Classifier:
    assert isinstance(member, Classifier)
    mean, std = (None if side is None else side.tolist() for side in (member.mean, member.std))
    copied = member.renormalised(mean, std)
    copied.bounds = whole.bounds if whole.units is None else member.bounds
    if whole.units is not None:
        whole.units.apply(copied)
    return copied
