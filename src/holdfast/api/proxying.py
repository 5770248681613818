"""Opens the model of another server for `holdfast serve --proxy`, and compares it with the guard."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from holdfast.api.expecting import range_of_all
from holdfast.api.verb_settings import Serve
from holdfast.core.errors import UsageError
from holdfast.core.remedies import UPSTREAM_KEY, Placeholder, Remedy
from holdfast.guard.decisions import Action
from holdfast.guard.guard import GuardPipeline
from holdfast.server.proxy import UpstreamModel, read_upstream
from holdfast.server.upstream import UpstreamAddress
from holdfast.settings.grammar import seconds
from holdfast.settings.guard_settings import read_guard_settings

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
    of_models = ("mean", "std", "data_normalised", "arch", "model_output", "classes")
    names = ["every"] if settings.every else []
    names += [key for key in of_models if getattr(settings, key) is not None]
    if names:
        raise UsageError(
            f"{', '.join(names)} belong to a model of this server, and the model is that of {settings.proxy}",
            Remedy(names[0], also=tuple(map(Remedy, names[1:]))),
        )
