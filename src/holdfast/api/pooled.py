"""Opens the model at an address. The address `rotating:POOL` opens the serving set of a rotation pool."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from holdfast.api.verb_settings import Opening
from holdfast.core.errors import TargetError, UsageError
from holdfast.core.model import Bounds
from holdfast.core.normalisation import Normalisation
from holdfast.core.remedies import TRUST_CODE, Remedy
from holdfast.io.models.models import ROTATING, Declared, OpenedModel, open_model
from holdfast.io.remote.remote import Remote
from holdfast.reports.numbers import strict
from holdfast.runs.store.files import POOL_MANIFEST
from holdfast.runs.store.forms import Count, Real, refuse_form

if TYPE_CHECKING:
    from holdfast.rotation.pool.pool import Pool

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
    from holdfast.rotation.pool.pool import Pool  # only for a pool, whose import takes long

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
