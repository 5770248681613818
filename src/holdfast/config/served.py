"""Settings of a model behind a server."""

from holdfast.config.grammar import per_second, seconds
from holdfast.config.groups import ServerLimits
from holdfast.config.references import ModelReference
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.sources.remote import Remote


def remote(reference: ModelReference) -> Remote:
    """Return the options for requests to a model behind HTTP."""
    inference, limits = reference.inference, reference.limits
    return Remote(
        tuple(inference.allow_hosts),
        tuple(inference.headers),
        inference.http_request,
        inference.http_response,
        inference.http_labels,
        inference.http_max_rows,
        seconds(inference.http_timeout, "http_timeout"),
        inference.http_retries,
        inference.http_concurrency,
        None if inference.http_rate is None else per_second(inference.http_rate),
        limits.max_queries,
        limits.on_refused,
    )


def refuse_unserved(limits: ServerLimits, model: Classifier) -> None:
    """Raise `UsageError` for limits of a server if the model is not behind one."""
    if model.remote:
        return
    if limits.max_queries is not None:
        raise UsageError(
            f"max_queries is {limits.max_queries}, which limits the rows sent to a server, and this model is not "
            "behind a server; a threat such as linf:8/255,queries=1000 limits the queries of each attack on each "
            "example"
        )
    if limits.keep_answers:
        raise UsageError(
            "keep_answers keeps the answers of a server, and this model is not behind a server; leave it out"
        )
