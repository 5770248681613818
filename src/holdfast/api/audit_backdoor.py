"""Opens the model and the data of `holdfast audit backdoor`."""

from collections.abc import Callable

from holdfast.api.verb_settings import AuditBackdoor
from holdfast.audits.audit import AuditRequest
from holdfast.audits.finding import Finding
from holdfast.runs.engine.progress import Notify
from holdfast.runs.engine.run import Run


def prepared_backdoor(
    settings: AuditBackdoor, notify: Notify, command: str
) -> tuple[AuditRequest, Callable[[Run], Finding]]:
    """Return the request of the audit, and the function that takes its steps."""
    raise NotImplementedError
