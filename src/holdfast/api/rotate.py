"""Python functions for the steps of a rotation of parameter sets, with the names and defaults of the options of
`holdfast rotate`.

This module is `holdfast.rotate`. A pool is a folder; each step accepts its path, or the `pool` of an earlier result.
Every step stores what it has finished, so that a stopped step continues when it is called again.

    collected = holdfast.rotate.collect("net.py:make", "digits.npz", "linf:0.2", run="pool")
    holdfast.rotate.draw("pool", by="retraining", immunise=True, trust_code=True)
    if holdfast.rotate.admit("pool", trust_code=True).admitted:
        holdfast.rotate.swap("pool", why="the first")

`trust_code=True` is needed for a model at `file.py:factory`, because the address stored in the pool refers to code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.api import rotation_opening
from holdfast.api.checked_settings import DataReference, ModelReference
from holdfast.api.python_functions import verb_with
from holdfast.api.reading_settings import canonical_settings, given
from holdfast.api.resolve import folder_of
from holdfast.api.verb_settings import RotateSettings
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.rotation.pool.pool import Pool
from holdfast.rotation.steps import admit as admission
from holdfast.rotation.steps import collect as collection
from holdfast.rotation.steps import draw as drawing
from holdfast.rotation.steps import rotation_run as loop
from holdfast.rotation.steps import short_steps
from holdfast.rotation.steps import train as training
from holdfast.rotation.steps.admission_gates import Admission
from holdfast.rotation.steps.collect import Collected
from holdfast.rotation.steps.draw import By, Drawn, by_named
from holdfast.rotation.steps.generator_quality import TrainedGenerator
from holdfast.rotation.steps.rotation_run import Rotated
from holdfast.rotation.steps.short_steps import Exposed, Swapped
from holdfast.runs.engine.progress import Notify, Progress, ignore, silent
from holdfast.runs.store.append_log import Head
from holdfast.runs.stored.stored_runs import new_folder
from holdfast.settings.threats_and_attacks import ThreatLike

__all__ = ["admit", "collect", "draw", "expose", "head", "run", "status", "swap", "train"]

PoolLike = str | Path | Pool
"""Types of the argument `pool`: a pool, or the path of its folder."""
_OF_INPUTS = ("bounds", "mean", "std", "data_normalised")
_OF_GATES = ("gates", "accept_doubts")
_OPENED_AGAIN = ("device", "trust_code", "follow_links")
"""Settings with which a step opens the model of a pool again."""
Options = Mapping[str, Any]
"""Settings by name, with the names that follow `--set codec.` or `--set generator.` on the command line."""


@verb_with(RotateSettings, "budget", "seed", "initialisation", *_OF_INPUTS, "device")
def collect(
    model: str | Path | ModelReference,
    data: str | Path | DataReference,
    threat: ThreatLike = "linf:8/255",
    source: str | Options = "basins",
    recipe: str | Options = "card",
    *,
    fit: str | Path | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Collected:
    """Create or resume a pool: train parameter sets for the architecture of the model on the train split of `data`, and
    surrogate models for transfer attacks.

    `model`, `data` and `fit` are addresses, because a pool stores how its model and data are opened again. Results of
    `holdfast.open_model` and `holdfast.open_data` are addresses with further settings. `source` is the method that
    collects sets, and `recipe` the training method; each is a name, or settings with the name as `use`. `budget` is the
    wall-clock time for all trainings together, as in "20min". `run` is the folder of the pool, by default a new one,
    and `resume` continues the pool in it. `notify` is called with messages. Raises `UsageError` and `TargetError`.
    """
    path = folder_of(run, resume=resume)
    if isinstance(fit, DataReference):
        raise UsageError(
            "fit is a result of open_data, and a pool stores its address only; give the address, whose columns and "
            "arrays have the names of those of the data"
        )
    for name, given_object in (("model", model), ("data", data), ("fit", fit or "")):
        _refuse_object(name, given_object)
    checked = RotateSettings(
        **given(model=model, data=data, threat=threat, source=source, recipe=recipe, fit=fit, **settings)
    )
    path = path or new_folder("rotate", digest(canonical(canonical_settings(checked))))
    request = rotation_opening.collect_request(checked, path, resume=resume, expect_head=expect_head)
    return collection.collect(request, notify=notify, progress=progress)


@verb_with(RotateSettings, "codec", "generator", *_OPENED_AGAIN)
def train(
    pool: PoolLike,
    *,
    expect_head: str = "",
    notify: Notify = ignore,
    **settings: Any,
) -> TrainedGenerator:
    """Train the generator of a pool, a codec and a latent diffusion model, on the parameter sets that were collected.

    Settings are mappings, as in `generator={"regulariser": "hinge"}`. The new generator replaces an earlier one. Raises
    `Inconclusive` if encoding and decoding costs more than 0.3 points of accuracy. `trust_code` permits the execution
    of the code that builds the pool's model.
    """
    checked = RotateSettings(**given(**settings))
    request = rotation_opening.train_request(checked, _opened(pool, expect_head))
    return training.train(request, notify=notify)


@verb_with(RotateSettings, *_OPENED_AGAIN)
def draw(
    pool: PoolLike,
    *,
    sets: int | None = None,
    by: By | None = None,
    immunise: bool | Options = False,
    resume: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    **settings: Any,
) -> Drawn:
    """Add `sets` new parameter sets to the pool as candidates, by default eight. A candidate must be admitted before it
    can serve.

    `by` is "generator", the default if the pool has one, or "retraining", which trains from fresh random weights. If
    `immunise` is True, or a mapping of its settings such as `{"share": 0.25}`, each candidate is trained further
    against examples computed on stolen sets; if there are none, on the serving set or the bases. `resume` continues the
    last draw with its settings.
    """
    checked = RotateSettings(**given(**settings, immunise=None if isinstance(immunise, bool) else immunise))
    if sets is not None and (type(sets) is not int or sets < 1):
        raise UsageError(f"sets is {sets!r}; expected a number of candidates of at least 1")
    method = by_named(by)
    request = rotation_opening.draw_request(
        checked,
        _opened(pool, expect_head),
        sets=sets,
        by=method,
        immunising=immunise is not False,
        resume=resume,
    )
    return drawing.draw(request, notify=notify)


@verb_with(RotateSettings, *_OF_GATES, "n_judged", *_OPENED_AGAIN)
def admit(
    pool: PoolLike,
    *,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Admission:
    """Judge every candidate of the pool, and every admitted set that was not yet judged against all stolen sets.

    `gates` are conditions in addition to the usual ones. `accept_doubts` maps raised doubts that are accepted to
    reasons. `n_judged` is the number of held-out examples in the first measurement. The result contains the verdict on
    each set; its `exit_code` is 0 if a candidate was admitted and 4 if none was.
    """
    checked = RotateSettings(**given(**settings))
    request = rotation_opening.admit_request(checked, _opened(pool, expect_head))
    return admission.admit(request, notify=notify, progress=progress)


def swap(pool: PoolLike, *, why: str = "", unjudged: bool = False, expect_head: str = "") -> Swapped:
    """Make another admitted parameter set, chosen at random, the serving set of the pool, and retire the previous one.
    The reason `why` is recorded in the ledger.

    If `unjudged` is True and no other set waits, a set that was not judged against every stolen set is used. Raises
    `Inconclusive` if no set can serve.
    """
    return short_steps.swap(_opened(pool, expect_head), why, unjudged=unjudged)


def expose(pool: PoolLike, name: str, *, why: str, expect_head: str = "") -> Exposed:
    """Record that an attacker may have the parameter set `name`, with the reason `why`. The set never serves again
    after the next swap.
    """
    return short_steps.expose(_opened(pool, expect_head), name, why)


def status(pool: PoolLike, *, expect_head: str = "") -> dict[str, Any]:
    """Verify every entry of the ledger of a pool, and return the state of the pool and its parameter sets as a
    dictionary.
    """
    return short_steps.status(_opened(pool, expect_head))


def head(pool: PoolLike, *, expect_head: str = "") -> Head:
    """Return the number and the digest of the last entry of the ledger of a pool. Stored outside the pool, they show
    later whether entries were removed.

    If a later step is called with this digest as `expect_head`, it raises `TargetError` when the ledger does not
    contain that entry, as in an older copy of the folder.
    """
    return short_steps.head(_opened(pool, expect_head))


@verb_with(
    RotateSettings, "every", "min_waiting", *_OF_GATES, "n_judged", "codec", "generator", *_OPENED_AGAIN
)
def run(
    pool: PoolLike,
    *,
    by: By | None = None,
    immunise: bool | Options = False,
    once: bool = False,
    expect_head: str = "",
    notify: Notify = ignore,
    progress: Progress = silent,
    **settings: Any,
) -> Rotated:
    """Perform all steps of a rotation: finish the collection of the pool, train a generator if one is needed, and swap
    the serving set whenever a swap is due.

    `every` lists the conditions of a swap, as in `["50q/principal", "24h"]`; a stolen serving set is always replaced.
    `min_waiting` is the number of admitted sets that should wait for the next swaps. The function runs until Ctrl-C. It
    raises `Inconclusive` if no set is admitted and none waits. If `once` is True, it returns as soon as a set serves
    and enough sets wait. On the command line, this step also creates the pool.
    """
    checked = RotateSettings(**given(**settings, immunise=None if isinstance(immunise, bool) else immunise))
    method, opened = by_named(by), _opened(pool, expect_head)
    request = rotation_opening.run_request(
        checked,
        opened.path,
        pool=opened,
        by=method,
        immunising=immunise is not False,
        once=once,
        expect_head=expect_head,
    )
    return loop.run(request, notify=notify, progress=progress)


def _opened(pool: PoolLike, expect_head: str) -> Pool:
    """Open a pool, verify every entry of its ledger, and return it. Raises `UsageError` for an object that is no pool
    and no path.
    """
    if not isinstance(pool, str | Path | Pool):
        raise UsageError(f"pool is {kind_of(pool)}; give the path of its folder, as in 'pool/'")
    return Pool.open(pool.path if isinstance(pool, Pool) else Path(pool), expect_head=expect_head)


def _refuse_object(name: str, given_object: object) -> None:
    """Raise `UsageError` for a model or data given as an object; its message states how to give an address."""
    address = given_object
    if isinstance(given_object, ModelReference | DataReference):
        address = getattr(given_object, name)
    if isinstance(address, str | Path):
        return
    example = (
        "a function in a file that returns it, as in net.py:make, or a file such as weights.safetensors"
        if name == "model"
        else "a file with it, as written by numpy.savez('images.npz', x_train=x, y_train=y, x_test=x2, y_test=y2)"
    )
    raise UsageError(
        f"{name} is {kind_of(address)}, and a pool stores the address with which it is opened again; give "
        f"{example}"
    )
