"""Log of requests: one record for each request about which the server has decided, without inputs and scores."""

import logging
import time
from collections.abc import Sequence

from holdfast.server.answering_requests import Outcome
from holdfast.server.audit_chain import AuditKey
from holdfast.server.error_log import REQUEST_FIELDS, REQUESTS

_SERVER_ERROR = 500
"""smallest status code of a failure of the server"""
_LOG = logging.getLogger(REQUESTS)


def log_requests(key: AuditKey | None, outcomes: Sequence[Outcome]) -> None:
    """Log the outcomes of a batch. With the key of an audit folder, principals have the pseudonyms of the audit chain,
    and otherwise the names of their keys.
    """
    if not _LOG.isEnabledFor(logging.INFO):
        return
    now = time.perf_counter()
    for outcome in outcomes:
        incoming, refusal, decision = outcome.job.incoming, outcome.refusal, outcome.decision
        rules = (
            {score.rule for row in decision.rows for score in row.scores if score.fired} if decision else ()
        )
        fields = {
            "request": incoming.request,
            "principal": incoming.principal if key is None else key.pseudonym(incoming.principal),
            "rows": len(incoming.x),
            "status": 200 if refusal is None else refusal.status,
            "action": str(outcome.action) if decision and not decision.unavailable else None,
            "rules": sorted(rules),
            "cause": "" if refusal is None else refusal.cause,
            "latency_s": round(now - outcome.job.begin_s, 6),
        }
        failed = refusal is not None and refusal.status >= _SERVER_ERROR
        level = logging.WARNING if failed else logging.INFO
        _LOG.log(level, "refused" if refusal else "answered", extra={REQUEST_FIELDS: fields})
