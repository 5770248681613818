"""Opens a model at an address, of which `rotating:POOL` is the serving set of a pool, and a model that consists of
several others: an ensemble (`ensemble:`) or a mix of two networks (`mix:`).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from typing_extensions import TypedDict

from holdfast.core.chain import canonical, digest
from holdfast.core.errors import TRUST_CODE, Remedy, TargetError, UsageError, model_argument
from holdfast.core.model import Bounds, Classifier, Normalisation
from holdfast.core.types import ACCESS_ORDER
from holdfast.io.models.composed import Ensemble, Mixture
from holdfast.io.models.factories import converted_arguments
from holdfast.io.models.models import ROTATING, Declared, OpenedModel, open_model
from holdfast.io.remote.remote import Remote
from holdfast.reports.words import strict
from holdfast.runs.assess.request import DescribedModel
from holdfast.runs.store.columns import Count, Real, refuse_form
from holdfast.runs.store.files import POOL_MANIFEST
from holdfast.settings.grammar import COMBINATIONS, MIXED
from holdfast.settings.groups import Members
from holdfast.settings.values import SurrogateSettings
from holdfast.verbs.checked_settings import group_of
from holdfast.verbs.opening.declared import ends
from holdfast.verbs.settings import Opening

if TYPE_CHECKING:
    from holdfast.rotation.pool import Pool


_DETERMINED = ("arch", "model_args", "model_output", "classes", "bounds", "mean", "std")
"""Settings that the manifest of a pool determines, so that the user may not give them."""
_WITHOUT_TABLE = (
    "the robust accuracy is that under an attacker with the serving set (A5), which rotation does not change; add "
    "--adaptive for the table of attackers A0 to A6"
)


class _Settings(TypedDict, total=False):
    model: str | None
    arch: str | None
    model_output: str | None
    mean: list[Real] | None
    std: list[Real] | None
    model_args: dict[str, Any] | None
    bounds: tuple[Real, Real] | None
    classes: Count | None
    class_names: list[str] | None
    data_normalised: tuple[list[Real], list[Real]] | None


class _About(TypedDict, total=False):
    settings: _Settings
    model: dict[str, Any]


class _Manifest(TypedDict):
    """Model of the manifest of a pool, which may be untrusted."""

    about: _About


def pool_of(address: str | None) -> "Pool | None":
    """Return the rotation pool at an address of the form `rotating:FOLDER`, or None for any other address."""
    if address is None or not address.startswith(ROTATING):
        return None
    path = address.removeprefix(ROTATING)
    if not path:
        raise UsageError(f"{address!r} contains no folder; give that of a pool, as in {ROTATING}pool/")
    from holdfast.rotation.pool import Pool  # only for a pool, whose import takes long

    return Pool.open(Path(path))


def open_model_at(
    address: str, settings: Opening, declared: Declared, remote: Remote, *, adaptive: bool = False
) -> OpenedModel:
    """Open the model at an address, which may be that of a rotation pool. Raises `UsageError` or `TargetError` with
    advice.

    `adaptive` states whether the table of attackers of a pool is measured; if not, a note about it is added.
    """
    pool = pool_of(address)
    if pool is not None:
        return _serving(address, pool, settings, adaptive=adaptive)
    return open_model(
        address,
        arch=settings.arch,
        model_args=settings.model_args,
        declared=declared,
        trust_code=settings.trust_code,
        remote=remote,
    )


def refuse_code_in_pool(pool: "Pool", *, trust_code: bool) -> None:
    """Raise `UsageError` if the manifest of a rotation pool refers to Python code and the user has not consented to run
    it (`trust_code`).
    """
    settings = settings_of_pool(pool)
    for key in ("model", "arch"):
        value = settings.get(key)
        if value and ".py:" in str(value) and not trust_code:
            raise UsageError(
                f"{str(pool.path)!r} refers to code ({key}: {value}). Code from a pool is not run",
                TRUST_CODE,
            )


def _serving(address: str, pool: "Pool", settings: Opening, *, adaptive: bool) -> OpenedModel:
    """Return the serving set in the architecture that the pool names."""
    for key in _DETERMINED:
        if key in settings.model_fields_set and getattr(settings, key):
            raise UsageError(f"the pool {address!r} determines {key}, and {key} was given", Remedy(key))
    serving = pool.serving
    if serving is None:
        waits = f"{len(pool.ahead)} admitted sets wait" if pool.ahead else "no admitted set waits"
        step = "swap" if pool.ahead else "admit"
        raise UsageError(
            f"no set serves in {str(pool.path)!r} ({waits}), and the serving set is the one that is assessed; let a "
            f"set serve: holdfast rotate {step} {pool.shown}"
            + ("" if pool.ahead else f", then holdfast rotate swap {pool.shown}")
        )
    refuse_code_in_pool(pool, trust_code=settings.trust_code)
    architecture = open_architecture(
        pool.path,
        settings_of_pool(pool),
        pool.manifest["about"].get("model", {}),
        trust_code=settings.trust_code,
    )
    from holdfast.rotation import loaded

    model = loaded(architecture.model, pool.weights(serving.name), serving.name)
    card = {
        **architecture.architecture,
        "pool": pool.manifest["id"],
        "set": serving.name,
        "epoch": serving.epoch,
    }
    notes = () if adaptive else (_WITHOUT_TABLE,)
    files = {f"set {serving.name}": pool.ledger.member(serving.name).digest}
    return OpenedModel(model, address, "rotating", files, (*architecture.notes, *notes), card)


def open_architecture(
    path: Path, created: Mapping[str, Any], about: Mapping[str, Any], *, trust_code: bool
) -> OpenedModel:
    """Return the model with which a pool was created, from the settings `created` and the facts `about` the model in
    the manifest at `path`. The key of the pool is not needed.

    Raises `TargetError` if the model has changed.
    """
    ends, names, normalised = (created.get(key) for key in ("bounds", "class_names", "data_normalised"))
    opened = open_model(
        str(created["model"]),
        arch=created.get("arch"),
        model_args=created.get("model_args"),
        declared=Declared(
            None if ends in (None, [0.0, 1.0]) else Bounds(*ends),
            created.get("mean"),
            created.get("std"),
            created.get("classes"),
            created.get("model_output"),
            class_names=None if names is None else tuple(names),
            normalised=None if normalised is None else Normalisation(*(tuple(side) for side in normalised)),
        ),
        trust_code=trust_code,
    )
    for key in ("mean", "std", "classes"):
        value = strict(getattr(opened.model, key))
        if key in about and value != about[key]:
            raise TargetError(
                f"the model of {str(path)!r} had {key} {about[key]}, and {created['model']} has {value}; restore the "
                "earlier model"
            )
    return opened


def settings_of_pool(pool: "Pool") -> Mapping[str, Any]:
    """Return the settings with which a rotation pool was created, from its manifest. Raises `UsageError` if the
    manifest does not contain them.
    """
    # the manifest may come from elsewhere, so its form is checked before its values are used
    refuse_form(pool.path / POOL_MANIFEST, pool.manifest, _Manifest)
    settings: Mapping[str, Any] = pool.manifest["about"].get("settings", {})
    if not settings.get("model"):
        raise UsageError(
            f"{str(pool.path)!r} contains no address of its model, because it was created in Python; create one with "
            f"holdfast rotate collect, or assess rotation.loaded(model, pool.weights(name), name)"
        )
    return settings


_COMBINED = {
    "logits": "the mean of their logits",
    "mean": "the mean of their probabilities",
    "votes": "their votes, of which attacks use the gradient of the mean log-probabilities",
}


def open_members(
    address: str,
    settings: Opening,
    declared: Declared,
    open_member: Callable[[SurrogateSettings, Opening, str], DescribedModel],
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


def _entry(subject: DescribedModel) -> dict[str, Any]:
    return {**{key: subject.card[key] for key in ("name", "how")}, "digest": subject.digest}


def _common(subjects: Sequence[DescribedModel], declared: Declared) -> Declared:
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


def members_as_surrogates(subject: DescribedModel) -> tuple[DescribedModel, ...]:
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
        DescribedModel(_copy(member, subject.model), entry["digest"], {**entry, "member": True})
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
