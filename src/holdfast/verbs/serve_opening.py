"""Converts the settings of `holdfast serve` to the setup of a server: workers, pool, keys, audit chains, and the model
of another server for `--proxy`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from holdfast.attacks.parts.images import inner
from holdfast.certifiers.patch_masks import PatchMasks
from holdfast.core.chain import canonical, digest
from holdfast.core.errors import UPSTREAM_KEY, Placeholder, Remedy, UsageError, model_argument
from holdfast.core.model import Classifier
from holdfast.core.threat import ThreatModel
from holdfast.guard.guard import GuardPipeline
from holdfast.guard.rules import Action, RequestGuard
from holdfast.io.models.models import ROTATING
from holdfast.io.models.transformers_folders import ProcessedClips
from holdfast.io.remote.remote import SCHEMES
from holdfast.monitoring.signals import Reference
from holdfast.rotation import AnswersPerPrincipal, Elapsed
from holdfast.rotation.pool import Pool
from holdfast.rotation.rotating_model import Trigger
from holdfast.runs.assess.certify import masked_subject
from holdfast.runs.assess.request import DescribedModel
from holdfast.server.audit_chain import AuditKey
from holdfast.server.keys import read_keys
from holdfast.server.messages import NAME_DIGITS, LoadedModel, no_rules
from holdfast.server.proxy import UpstreamAddress, UpstreamModel, read_upstream
from holdfast.server.server_setup import (
    HUNG_S,
    FlaggedInputs,
    LivePool,
    ServerSettings,
    ServerSetup,
    WorkerSetup,
)
from holdfast.settings.grammar import parse_every, seconds
from holdfast.settings.groups import InputSpace, ModelSource
from holdfast.settings.guard_settings import read_guard_settings
from holdfast.settings.serve_settings import RequestLimits
from holdfast.settings.values import InputKind, address_of
from holdfast.verbs.checked_settings import composed
from holdfast.verbs.monitor import live_reference
from holdfast.verbs.opening.declared import opening_of_symbols, range_of_all
from holdfast.verbs.opening.guard import input_storage, notes_of_file, open_guard, served_digest
from holdfast.verbs.opening.models import open_architecture, pool_of, refuse_code_in_pool, settings_of_pool
from holdfast.verbs.opening.plans import device_of
from holdfast.verbs.opening.resolve import open_subject
from holdfast.verbs.settings import Doctor, Monitor, Serve

_ADDRESS = re.compile(
    r"(?P<server>.*?)(?:/v2/models/(?P<name>[^/]+)(?P<version>/versions/[^/]+)?(?:/infer)?)?/*"
)


def open_upstream(settings: Serve) -> UpstreamModel:
    """Return the model of the server that `--proxy` names, under the name and the version at which it is served.

    Raises `UsageError` for settings of a model that the proxy does not open, and `TargetError` if that server does not
    answer.
    """
    assert settings.proxy is not None
    _refuse_settings_of_models(settings)
    match = _ADDRESS.fullmatch(settings.proxy)
    assert match is not None, "every part of the expression may be empty"
    name = None if match["name"] is None else match["name"] + (match["version"] or "")
    address = UpstreamAddress(
        match["server"],
        tuple(settings.upstream_headers),
        seconds(settings.upstream_timeout, "upstream_timeout"),
    )
    upstream = read_upstream(
        address,
        name or settings.name,
        shape=settings.input_shape or shape_of_guard(settings.guard),
        bounds=range_of_all(settings, "a proxy") if "bounds" in settings.model_fields_set else None,
        output=settings.upstream_output,
        max_rows=settings.max_rows,
    )
    signature = upstream.signature
    if settings.scores == "labels" and _returns_one_score(upstream):
        raise UsageError(
            "scores is labels, which needs a score for each class, and the upstream model returns one number; give a "
            "number of decimal digits, as in 2"
        )
    if settings.name is not None:
        signature = replace(signature, name=settings.name)
    if "model_version" in settings.model_fields_set:
        signature = replace(signature, version=settings.model_version)
    return replace(upstream, signature=signature)


def refuse_other_guard(pipeline: GuardPipeline, upstream: UpstreamModel, file: str) -> None:
    """Raise `UsageError` for a guard whose rules cannot be evaluated on the model of an upstream server."""
    dtype, expected = upstream.input_dtype, pipeline.schema.dtype
    if dtype != expected:
        raise UsageError(
            f"{file}: inputs.dtype is {_named(expected)}, and the upstream model takes {_named(dtype)}; correct it"
        )
    if upstream.of_labels and pipeline.detectors:
        raise UsageError(
            f"{file}: the rules {', '.join(pipeline.detectors)} need scores, and the upstream model returns class "
            "numbers; remove these rules",
            Remedy("upstream_output", Placeholder("NAME"), reason="if another output has scores"),
        )
    if _returns_one_score(upstream) and Action.LABEL_ONLY in pipeline.actions:
        raise UsageError(
            f"{file}: the action label_only needs a score for each class, and the upstream model returns one number; "
            "use another action"
        )
    if pipeline.detectors and upstream.probabilities is not None:
        returned = "probability" if upstream.probabilities else "logit"
        if pipeline.outputs != returned:
            raise UsageError(
                f"{file}: outputs is {pipeline.outputs}, and the upstream model returns "
                f"{'probabilities' if upstream.probabilities else 'logits'}; set outputs to {returned}"
            )


def _returns_one_score(upstream: UpstreamModel) -> bool:
    return upstream.signature.classes == 1 and not upstream.of_labels


def refuse_forwarded_keys(settings: Serve) -> None:
    """Raise `UsageError` if the keys of clients would be passed on to the upstream server."""
    names = [name.lower() for name in settings.forward_headers]
    if settings.keys is not None and "authorization" in names:
        raise UsageError(
            "forward_headers contains authorization, which contains the keys of this server; give the key of the "
            "upstream server",
            UPSTREAM_KEY,
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of_guard(file: str | None) -> tuple[int, ...] | None:
    """Return the shape of one input in a guard; None without a guard, or if it leaves sizes open."""
    if file is None:
        return None
    shape = read_guard_settings(Path(file)).inputs.shape
    sizes = [size for size in shape if size is not None]
    return tuple(sizes) if len(sizes) == len(shape) else None


def _refuse_settings_of_models(settings: Serve) -> None:
    """Raise `UsageError` for settings that belong to a model of this server."""
    if settings.model is not None:
        raise UsageError(
            f"proxy is {settings.proxy}, and the model {settings.model} was given, too; leave one out"
        )
    of_models = (
        "mean", "std", "data_normalised", "arch", "model_output", "classes", "sampling_rate", "masked_vote", "masks",
    )  # fmt: skip
    names = ["every"] if settings.every else []
    names += [key for key in of_models if getattr(settings, key) is not None]
    if names:
        raise UsageError(
            f"{', '.join(names)} belong to a model of this server, and the model is that of {settings.proxy}",
            Remedy(names[0], also=tuple(map(Remedy, names[1:]))),
        )


_BUNDLED_SHAPES = {"mnist-cnn": (1, 28, 28), "mnist-cnn-hardened": (1, 28, 28)}
"""Shapes of the inputs of the bundled classifiers."""
_UNNAMED = "model"
_HUNG_LATENCIES, _HUNG_TIMEOUTS = 10, 3
"""Multiples of --max-latency, and of the time in which an upstream server must answer a batch, after which a worker
that makes no progress is replaced."""


def server_setup(settings: Serve) -> ServerSetup:
    """Return the setup of a server from its settings.

    Raises `UsageError` and `TargetError`.
    """
    address, kind = address_of(settings.model), _kind(settings)
    _refuse_url(address)
    if kind != "numbers":
        _refuse_numeric(settings, kind)
    if settings.proxy is not None:
        refuse_forwarded_keys(settings)
    served = _served(settings, address, kind)
    guard, notes = _guard(settings, served)
    signature = None if served.upstream is None else served.upstream.signature
    if settings.keys is not None:
        read_keys(Path(settings.keys))  # to refuse an invalid file
    reference, renewed = _monitored(settings, served)
    worker = WorkerSetup(
        opening=served.opening,
        name=signature.name if signature is not None else settings.name or _name_of(address),
        shape=served.shape,
        # the examples of the monitor are opened here, and may be an object that cannot be sent to a worker
        settings=composed(ServerSettings, settings).model_copy(update={"monitor": None, "inputs": kind}),
        set_name=served.set_name,
        digest=served.digest,
        device=device_of(settings.device),
        threads=_threads(settings.workers),
        hung_s=_hung_s(settings, served),
        guard=guard,
        audit_key=None if settings.audit is None else AuditKey.of(Path(settings.audit)),
        signature=signature,
        monitor=reference,
    )
    version = settings.model_version if signature is None else signature.version
    single = {"single_operator": True} if settings.single_operator else {}
    return ServerSetup(
        worker,
        served.pool,
        {**served.about, "name": worker.name, "version": version, **single},
        reloadable=served.reloadable,
        opening=_settings_of(settings, served),
        renewed=renewed,
        candidate=None if served.model is None else partial(_candidate, worker, served.model),
        notes=(*notes, *(() if reference is None else reference.notes)),
        flagged=None if settings.guard is None else _flagged(Path(settings.guard)),
    )


def _kind(settings: Serve) -> InputKind:
    """Return the kind of the inputs, which the settings or the guard state. Raises `UsageError` if both differ."""
    if settings.guard is None:
        return settings.inputs or "numbers"
    of_guard = read_guard_settings(Path(settings.guard)).inputs.kind
    if settings.inputs not in (None, of_guard):
        raise UsageError(
            f"{settings.guard}: inputs.kind is {of_guard}, and the inputs of the model are {settings.inputs}; correct "
            "one of them"
        )
    return of_guard


def _refuse_numeric(settings: Serve, kind: InputKind) -> None:
    """Raise `UsageError` for settings of models whose inputs are numbers."""
    names = [
        name
        for name in ("proxy", "sampling_rate", "masked_vote", "monitor")
        if getattr(settings, name) is not None
    ]
    if names:
        raise UsageError(
            f"{', '.join(names)}: only for inputs of numbers, and the inputs are {kind}",
            Remedy(names[0], also=tuple(map(Remedy, names[1:]))),
        )
    if pool_of(address_of(settings.model)) is not None:
        raise UsageError(f"the model is a pool, whose inputs are numbers, and the inputs are {kind}")


def _refuse_url(address: str | None) -> None:
    if address is not None and address.partition(":")[0] in SCHEMES:
        raise UsageError(
            f"model is {address!r}, and no model is loaded from a URL; give a file, or forward the requests",
            Remedy("proxy", address),
        )


def _flagged(guard: Path) -> FlaggedInputs | None:
    settings = read_guard_settings(guard)
    stored = input_storage(settings, guard)
    return (
        None if stored is None else FlaggedInputs(stored, min(settings.inputs.low), max(settings.inputs.high))
    )


@dataclass(frozen=True)
class _Served:
    """What is served: how each worker opens it, the shape of its inputs, and its pool, if it is one."""

    opening: Callable[[], LoadedModel]
    shape: tuple[int, ...]
    set_name: str
    about: Mapping[str, str]
    pool: LivePool | None = None
    digest: str = ""
    """digest of the model; empty for a pool and for an upstream server"""
    guard_digest: str | None = None
    """digest of the model that a calibration of a guard names; None for a pool and for an upstream server"""
    reloadable: bool = False
    """whether the model is in a file"""
    model: Doctor | None = None
    """settings with which it is opened, if it is one file of weights or of a network"""
    opened: Doctor | None = None
    """settings with which a model without a pool and another server is opened"""
    upstream: UpstreamModel | None = None
    """the model of an upstream server"""

    def upstream_timeout_s(self, max_rows: int) -> float:
        """Return the seconds in which an upstream server must answer a batch, with several requests if it accepts only
        smaller ones; 0 without such a server.
        """
        if self.upstream is None:
            return 0.0
        return math.ceil(max_rows / (self.upstream.batch or max_rows)) * self.upstream.address.timeout_s


def _served(settings: Serve, address: str | None, kind: InputKind) -> _Served:
    if settings.proxy is not None:
        return _served_upstream(open_upstream(settings))
    pool, triggers = pool_of(address), _triggers(settings.every)
    refuse_other_votes(settings, of_pool=pool is not None)
    if pool is not None:
        return _served_pool(pool, triggers, settings.swaps_per_hour, trust_code=settings.trust_code)
    if triggers:
        raise UsageError(
            f"every is {', '.join(settings.every)}, and {address or 'the model'} is no pool, so "
            f"there is no other set; serve a pool with {ROTATING}FOLDER, or leave it out"
        )
    range_of_all(settings, "a server")
    shape = _shape(settings, kind)
    # only an ONNX file of numbers is opened with the shape; the guard of a server decides about requests, and is not a
    # part of the model
    opens_shape = kind == "numbers" and Path(address or "").suffix == ".onnx"
    unused = {"guard": None, **({} if opens_shape else {"input_shape": None})}
    model = composed(Doctor, settings).model_copy(update=unused)
    model = model if kind == "numbers" else opening_of_symbols(kind, model)
    masks = _masks(settings, shape)
    subject = _subject(model, masks)  # here, so that a mistake is reported before workers start
    _refuse_other_rate(subject.model, settings.sampling_rate)
    known = None if address is not None else (subject.digest, served_digest(subject))
    return _Served(
        partial(_opened, model, known, masks),
        shape,
        subject.digest[:NAME_DIGITS],
        {"model": subject.digest},
        digest=subject.digest,
        guard_digest=served_digest(subject),
        reloadable=address is not None,
        opened=model,
        # the vote is not in the file, so that no other file can be compared with it or adapted; files and texts neither
        model=model
        if address is not None and Path(address).is_file() and masks is None and kind == "numbers"
        else None,
    )


def refuse_other_votes(settings: Serve, *, of_pool: bool) -> None:
    """Raise `UsageError` for a vote over masks of the sets of a pool, and for one whose requests are monitored."""
    if settings.masked_vote is None or not (of_pool or settings.monitor is not None):
        return
    other = "the model is a pool" if of_pool else "a monitor compares the outputs of the model itself"
    monitor = () if of_pool else (Remedy("monitor"),)
    raise UsageError(f"masked_vote is {settings.masked_vote}, and {other}", Remedy("masked_vote"), *monitor)


def _refuse_other_rate(model: Classifier, sampling_rate: int | None) -> None:
    """Raise `UsageError` if the sampling rate of requests is not the one that a folder of transformers states."""
    net = inner(model).net
    if isinstance(net, ProcessedClips) and sampling_rate not in (None, net.sampling_rate):
        raise UsageError(
            f"sampling_rate is {sampling_rate}, and the feature extractor of the model takes {net.sampling_rate}",
            Remedy("sampling_rate", net.sampling_rate),
        )


def _served_upstream(upstream: UpstreamModel) -> _Served:
    signature, url = upstream.signature, upstream.address.url
    about = {"upstream": f"{url}{upstream.path}", "signature": repr(signature.metadata())}
    name = digest(canonical(about))[:16]
    opening = partial(_without_digest, upstream.opened)
    return _Served(opening, signature.shape, name, about, upstream=upstream)


def _served_pool(
    pool: Pool, triggers: Sequence[Trigger], swaps_per_hour: int, *, trust_code: bool
) -> _Served:
    refuse_code_in_pool(pool, trust_code=trust_code)
    architecture = partial(
        _architecture,
        str(pool.path),
        settings_of_pool(pool),
        pool.manifest["about"].get("model", {}),
        trust_code=trust_code,
    )
    live = LivePool(pool, architecture, triggers, swaps_per_hour)
    return _Served(
        partial(_without_digest, architecture),
        tuple(live.canaries.shape[1:]),
        "",
        {"pool": pool.manifest["id"]},
        live,
    )


def _guard(settings: Serve, served: _Served) -> tuple[Callable[[str | None], RequestGuard], tuple[str, ...]]:
    """Return the function that opens the guard in each worker, after a check that it suits the model, and notes about
    its rules.
    """
    file = settings.guard
    if file is None:
        return no_rules, ()
    opening = partial(_opened_guard, file, served.shape, served.upstream)
    pipeline = opening(served.guard_digest)
    if (
        settings.masked_vote is not None
        and isinstance(pipeline, GuardPipeline)
        and (pipeline.detectors or pipeline.defence)
    ):
        changed = (*pipeline.detectors, *(() if pipeline.defence is None else ("defence",)))
        raise UsageError(
            f"{file}: {', '.join(changed)} would judge or change what the vote over masks receives or returns, "
            "for which they were not calibrated; remove them"
        )
    return opening, notes_of_file(Path(file))


def _opened_guard(
    file: str, shape: tuple[int, ...], upstream: UpstreamModel | None, model: str | None
) -> RequestGuard:
    """Return the guard of a server whose model has inputs of this shape. Raises `UsageError` if it does not suit it, or
    if it was calibrated with another model.
    """
    pipeline = open_guard(Path(file), model, logits=upstream is None)
    sizes = pipeline.schema.shape
    if len(sizes) != len(shape) or any(
        size not in (None, actual) for size, actual in zip(sizes, shape, strict=True)
    ):
        raise UsageError(
            f"{file}: inputs.shape is {list(sizes)}, and the model takes {list(shape)}; correct one of them"
        )
    if pipeline.needs_features:
        raise UsageError(
            f"{file}: the rule mahalanobis needs features of an inner layer, which the server does not compute; set "
            "its setting on to logits"
        )
    if upstream is not None:
        refuse_other_guard(pipeline, upstream, file)
    return pipeline


def _hung_s(limits: RequestLimits, served: _Served) -> float:
    """Return the seconds without progress after which a worker is replaced."""
    latency_s = seconds(limits.max_latency, "max_latency")
    return max(
        HUNG_S, _HUNG_LATENCIES * latency_s, _HUNG_TIMEOUTS * served.upstream_timeout_s(limits.max_rows)
    )


def _triggers(texts: list[str]) -> tuple[Trigger, ...]:
    kinds = [parse_every(text) for text in texts]
    return tuple(
        AnswersPerPrincipal(int(size)) if kind == "answers" else Elapsed(size) for kind, size in kinds
    )


def _monitored(settings: Serve, served: _Served) -> tuple[Reference | None, Callable[[], Reference] | None]:
    """Return the reference of the monitor, and a function that returns it with the model that is in the file then. The
    sets of a pool, and models behind other servers, are compared by their inputs only.
    """
    if settings.monitor is None:
        return None, None
    opening = Monitor(reference=settings.monitor, device="cpu")
    if served.opened is not None:
        opening = composed(Monitor, served.opened).model_copy(
            update={"reference": settings.monitor, "data": None, "device": "cpu"}
        )
    reference = live_reference(opening)
    shape = tuple(reference.shape)
    if math.prod(shape) != math.prod(served.shape):
        raise UsageError(
            f"the examples {reference.name} of the monitor have the shape {shape}, and the model takes {served.shape}; "
            "give examples like those that the model receives"
        )
    if not served.reloadable:
        return reference, None
    return reference, partial(live_reference, opening, observer=reference.observer)


def _settings_of(settings: Serve, served: _Served) -> dict[str, Any]:
    """Return the settings with which a model in a file is opened, or the folder of the pool, and the file of the guard,
    with absolute paths; empty for another model.
    """
    guard = {} if settings.guard is None else {"guard": str(Path(settings.guard).resolve())}
    if served.pool is not None:
        return {"pool": str(served.pool.pool.path.resolve()), **guard}
    if served.model is None:
        return {}
    opening = {**ModelSource.model_fields, **InputSpace.model_fields}
    given = served.model.model_dump(mode="json", include=served.model.model_fields_set & opening.keys())
    about = {**given, "model": str(Path(str(served.model.model)).resolve())}
    if settings.arch is not None and ".py:" in settings.arch:
        file, _, function = settings.arch.rpartition(":")
        about["arch"] = f"{Path(file).resolve()}:{function}"
    return {**about, **guard}


def _candidate(worker: WorkerSetup, model: Doctor, file: str) -> WorkerSetup:
    """Return the setup of a worker that serves the model in another file, whose code is not run: the path is that of a
    request.
    """
    opening = partial(_opened, model.model_copy(update={"model": file, "trust_code": False}), None, None)
    return replace(worker, opening=opening, digest="")


@dataclass(frozen=True)
class _Masks:
    """The vote over masks that answers in place of the model."""

    method: PatchMasks
    threat: ThreatModel
    shape: tuple[int, ...]
    """shape of one input"""


def _masks(settings: Serve, shape: tuple[int, ...]) -> _Masks | None:
    if settings.masked_vote is None:
        return None
    method = PatchMasks() if settings.masks is None else PatchMasks(settings.masks)
    return _Masks(method, settings.masked_vote.opened(), shape)


def _subject(settings: Doctor, masks: _Masks | None) -> DescribedModel:
    """Return the opened model, or the vote over its masks. Raises `UsageError` if the patch does not fit."""
    subject = open_subject(settings)
    if masks is None:
        return subject
    return masked_subject(
        subject, masks.method.net(subject.model, torch.zeros(1, *masks.shape), masks.threat)
    )


def _opened(settings: Doctor, known: tuple[str, str] | None, masks: _Masks | None) -> LoadedModel:
    """Return the model with its digests, or with the known ones of a Python object, which cannot change."""
    subject = _subject(settings, masks)
    return LoadedModel(subject.model, *(known or (subject.digest, served_digest(subject))))


def _without_digest(opening: Callable[[], Classifier]) -> LoadedModel:
    """Return the network of a pool, or the model of an upstream server."""
    return LoadedModel(opening())


def _architecture(path: str, created: Any, about: Any, *, trust_code: bool) -> Classifier:
    """Return the network of a pool with the parameters of the file that it was created with."""
    return open_architecture(Path(path), created, about, trust_code=trust_code).model


def _shape(settings: Serve, kind: InputKind) -> tuple[int, ...]:
    """Return the shape of one input: the declared one, or that of the inputs of the guard in a file. Raises
    `UsageError` if it is not known, or if it is no length of files or texts.
    """
    shape = settings.input_shape or shape_of_guard(settings.guard)
    if kind != "numbers" and (shape is None or len(shape) != 1):
        unit = "bytes of a file" if kind == "files" else "characters of a text"
        given = "not known" if shape is None else f"{list(shape)}"
        raise UsageError(
            f"the largest number of {unit}, which requests are checked against, is {given}",
            model_argument("input_shape", Placeholder("N", "(N,)"), reason="as in 65536"),
        )
    if shape is not None:
        return tuple(shape)
    if settings.model in _BUNDLED_SHAPES:
        return _BUNDLED_SHAPES[settings.model]
    raise UsageError(
        "the shape of the inputs is not known, which requests are checked against",
        model_argument("input_shape", Placeholder("C,H,W", "(C, H, W)"), reason="as in 3,32,32"),
    )


def _name_of(address: str | None) -> str:
    """Return the name of a model in URLs, from its address."""
    if address is None:
        return _UNNAMED
    path = address.removeprefix(ROTATING)
    path = path.rsplit(":", 1)[0] if ".py:" in path else path
    kept = [
        letter if letter.isascii() and (letter.isalnum() or letter in "_.-") else "-"
        for letter in Path(path).stem
    ]
    return "".join(kept).strip("-._") or _UNNAMED


def _threads(workers: int) -> int | None:
    """Return the number of threads of the network in each worker; None for that of the environment."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, (os.cpu_count() or 1) // workers)
