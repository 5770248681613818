"""Settings of a model behind a server."""

from holdfast.config.grammar import per_second, seconds
from holdfast.config.settings import AssessSettings
from holdfast.core.errors import UsageError
from holdfast.core.model import Classifier
from holdfast.sources.remote import Remote


def remote(settings: AssessSettings) -> Remote:
    """Return the options for requests to a model behind HTTP."""
    return Remote(
        tuple(settings.allow_hosts),
        tuple(settings.headers),
        settings.http_request,
        settings.http_response,
        settings.http_labels,
        settings.http_max_rows,
        seconds(settings.http_timeout, "http_timeout"),
        settings.http_retries,
        settings.http_concurrency,
        None if settings.http_rate is None else per_second(settings.http_rate),
        settings.max_queries,
        settings.on_refused,
    )


def refuse_unserved(settings: AssessSettings, model: Classifier) -> None:
    """Raise `UsageError` for settings about a server if the model is not behind one."""
    if model.remote:
        return
    if settings.max_queries is not None:
        raise UsageError(
            f"max_queries is {settings.max_queries}, which limits the rows sent to a server, and this model is not "
            "behind a server; a threat such as linf:8/255,queries=1000 limits the queries of each attack on each "
            "example"
        )
    if settings.keep_answers:
        raise UsageError(
            "keep_answers keeps the answers of a server, and this model is not behind a server; leave it out"
        )
