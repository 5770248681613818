"""Answers a batch of requests: limits of keys, audit, guard, model, and the scores of each request.

Each batch takes one reference to a network that is never modified, so that all of its requests are answered by the
same parameter set, and a swap never waits for a batch or changes one.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from holdfast.certifiers.patch_masks import MaskedVote
from holdfast.core.chain import canonical
from holdfast.core.model import Classifier
from holdfast.guard.rules import (
    Action,
    Incoming,
    Release,
    RequestDecision,
    RequestGuard,
    all_finite,
    all_scores,
    labels,
)
from holdfast.guard.state_in_memory import Charge
from holdfast.server.audit_chain import AuditKey, ChainFile, advice_for, answered, now, started, timed_record
from holdfast.server.keys import Quotas
from holdfast.server.requests import (
    REQUEST_FIELDS,
    REQUESTS,
    ErrorLog,
    Headers,
    Refused,
    forwarding,
    wait_first,
)
from holdfast.server.telemetry import Telemetry
from holdfast.server.traffic import Timing, no_timing

_AUDIT_FULL = "the audit log cannot be written, so no request is answered"
_MODEL = "the model failed"
_STATE_S = 1.0
"""seconds after which a client may send a request again that could not be checked"""
_OF_UPSTREAM = frozenset({502, 503})
"""status codes of a failed upstream server, which concern all requests of a batch"""
_SERVER_ERROR = 500
"""smallest status code of a failure of a server"""
_LOG = logging.getLogger(REQUESTS)
_ABSTAINS = "no prediction is returned for input {}"


@dataclass(frozen=True, eq=False)
class ServedSet:
    """A network that is never modified, with the name of its parameter set and its epoch of service."""

    model: Classifier
    name: str
    epoch: int = 0


@dataclass(frozen=True, eq=False)
class Job:
    """A request in a batch."""

    incoming: Incoming
    charge: Charge | None = None
    """what it takes from the limits of its key; None without limits"""
    digest: str = ""
    """digest of the inputs for the audit chain"""
    forwarded: Headers = ()
    """headers of the client that a proxy passes on"""
    begin_s: float = 0.0
    """time of `time.perf_counter` at which the headers had arrived"""


Features = tuple[Tensor, int]
"""outputs (rows, …) of the layer that the monitor observes for a whole batch, and the first row of a request"""


@dataclass(frozen=True, eq=False)
class Output:
    """What the model returned for the inputs of a request."""

    logits: Tensor
    features: Features | None = None
    certified: Tensor | None = None
    """(rows,) whether no patch can change the vote over masks; None for another model"""


@dataclass(frozen=True, eq=False)
class Answer:
    """The scores of a request, and the seconds by which its response is delayed."""

    scores: Tensor
    delay_s: float = 0.0
    certified: Tensor | None = None
    """as of `Output`"""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The end of a request: its scores, or why it is refused."""

    job: Job
    decision: RequestDecision | None = None
    answer: Answer | None = None
    refusal: Refused | None = None
    action: Action = Action.ALLOW
    """action of the decision, which is computed only once"""
    features: Features | None = None
    reached: bool = False
    """whether the model was called for the inputs"""


@dataclass(eq=False)
class ChainAudit:
    """The audit chain of a worker. After a failure to write in `end`, the records are written by the next call."""

    chain: ChainFile
    key: AuditKey
    _owed: list[bytes] = field(default_factory=list)

    def start(self, jobs: Sequence[Job]) -> None:
        """Record that requests have started. Raises `OSError` if they must not be answered."""
        time = now()
        self._add(
            [
                started(
                    job.incoming.request,
                    self.key.pseudonym(job.incoming.principal),
                    job.incoming.x.shape[0],
                    job.digest,
                    time,
                )
                for job in jobs
            ]
        )

    def end(self, outcomes: Sequence[Outcome], served: ServedSet) -> None:
        """Record the ends of requests. Raises `OSError` if their answers must not be returned."""
        time = now()
        try:
            self._add([_record(outcome, served, time) for outcome in outcomes])
        except OSError:
            # The requests were started and are refused now, which is recorded once the disk is writable again.
            self._owed += [
                canonical(timed_record("failed", request=outcome.job.incoming.request, reason="audit"))
                for outcome in outcomes
            ]
            raise

    def _add(self, records: Sequence[bytes]) -> None:
        self.chain.add_texts([*self._owed, *records])
        self._owed.clear()


def _record(outcome: Outcome, served: ServedSet, time: float) -> bytes:
    request, decision, refusal = outcome.job.incoming.request, outcome.decision, outcome.refusal
    if decision is not None and (refusal is None or refusal.cause == "guard"):
        status = 200 if refusal is None else refusal.status
        return answered(request, decision, outcome.action, status, served.name, served.epoch, time)
    notes = {"notes": dict(decision.notes)} if decision is not None and decision.notes else {}
    status = _SERVER_ERROR if refusal is None else refusal.status
    return canonical(timed_record("failed", request=request, status=status, **notes))


@dataclass(eq=False)
class Answerer:
    """Function from the jobs of a batch to their answers. It is called by one thread.

    `guard_fails_open` states whether requests are answered although the guard raised an error.
    """

    served: ServedSet
    """the serving set; a swap replaces the reference"""
    guard: RequestGuard
    audit: ChainAudit | None = None
    quotas: Quotas | None = None
    telemetry: Telemetry = field(default_factory=Telemetry)
    guard_fails_open: bool = False
    answered: Callable[[ServedSet, str, int], object] = lambda served, principal, rows: None
    """called with the set, the principal and the number of inputs of each answered request"""
    device: torch.device = torch.device("cpu")
    errors: ErrorLog = field(default_factory=ErrorLog)
    """log of errors for the operator"""
    progress: Callable[[], object] = lambda: None
    """called after each call of the model"""
    logged: Callable[[Sequence[Outcome]], object] = lambda outcomes: None
    """called with the outcomes of a batch, for the log of requests"""
    observed: Callable[[Sequence[Outcome], ServedSet], object] = lambda outcomes, served: None
    """called with the outcomes of a batch and the serving set, for the monitor"""
    features: Callable[[], Tensor | None] = lambda: None
    """function that returns what a layer returned in the last call of the model; None if no layer is observed"""
    release: Release = all_scores
    """function from the scores of the model to those that clients receive"""
    timing: Timing = no_timing
    """function that measures the time of each part"""

    def __call__(self, jobs: Sequence[Job]) -> list[Answer | Exception]:
        served = self.served
        quotas = self.quotas
        refusals = [None] * len(jobs) if quotas is None else quotas.take([job.charge for job in jobs])
        due = [job for job, refusal in zip(jobs, refusals, strict=True) if refusal is None]
        outcomes = iter(self._audited(due, served) if due else ())
        settled = [
            next(outcomes) if refusal is None else Outcome(job, refusal=refusal)
            for job, refusal in zip(jobs, refusals, strict=True)
        ]
        self._count(settled, served)
        self.logged(settled)
        self.observed(settled, served)
        return [self._returned(outcome) for outcome in settled]

    def _audited(self, jobs: Sequence[Job], served: ServedSet) -> list[Outcome]:
        if self.audit is None:
            return self._guarded(jobs, served)
        try:
            with self.timing("audit"):
                self.audit.start(jobs)
            outcomes = self._guarded(jobs, served)
            with self.timing("audit"):
                self.audit.end(outcomes, served)
        except OSError as error:
            cause = error.strerror or str(error)  # no traceback: the fault is that of the disk
            what = f"requests are refused, as the audit chain cannot be written: {cause}"
            self.errors(what, advice=advice_for(error))
            return [Outcome(job, refusal=wait_first(_AUDIT_FULL, 10.0, cause="audit")) for job in jobs]
        return outcomes

    def _guarded(self, jobs: Sequence[Job], served: ServedSet) -> list[Outcome]:
        """Return the outcome of each job after guard and model."""
        decisions = self._before(jobs)
        if decisions is None:
            return [_failed(job, "the guard failed", "guard") for job in jobs]
        passed = [(job, d) for job, d in zip(jobs, decisions, strict=True) if d.answered]
        outputs = self._answers(passed, served)
        scored = [
            (d, out.logits) for (_, d), out in zip(passed, outputs, strict=True) if isinstance(out, Output)
        ]
        after = iter(self._after([d for d, _ in scored], [out for _, out in scored], served))
        remaining = iter(outputs)
        outcomes = []
        for job, decision in zip(jobs, decisions, strict=True):
            if not decision.answered:
                outcomes.append(_decided(job, decision, None))
            elif isinstance(output := next(remaining), Refused):
                outcomes.append(Outcome(job, refusal=output, reached=True))
            else:
                outcomes.append(_decided(job, next(after), output))
        return outcomes

    def _before(self, jobs: Sequence[Job]) -> Sequence[RequestDecision] | None:
        incoming = [job.incoming for job in jobs]
        try:
            with self.timing("guard before"):
                return self.guard.before_many(incoming)
        except Exception as error:  # noqa: BLE001 - an error of the guard must not end the thread of the batches
            self._guard_failed(error)
            return _unguarded(incoming) if self.guard_fails_open else None

    def _after(
        self, decisions: Sequence[RequestDecision], outputs: Sequence[Tensor], served: ServedSet
    ) -> Sequence[RequestDecision]:
        if not decisions:
            return decisions
        try:
            with self.timing("guard after"):
                return self.guard.after_many(decisions, outputs, network=partial(self._logits, served))
        except Exception as error:  # noqa: BLE001 - as above
            self._guard_failed(error)
            reason = "the guard failed"
            return decisions if self.guard_fails_open else [replace(d, refusal=reason) for d in decisions]

    def _guard_failed(self, error: Exception) -> None:
        self.telemetry.count("holdfast_guard_failures_total")
        outcome = "answered without it" if self.guard_fails_open else "refused"
        self.errors(f"the guard failed, and requests are {outcome}", error)

    def _answers(
        self, passed: Sequence[tuple[Job, RequestDecision]], served: ServedSet
    ) -> list[Output | Refused]:
        """Return the logits of each request, with one call of the model for all requests with the same forwarded
        headers.
        """
        results: dict[int, Output | Refused] = {}
        groups: dict[Headers, list[int]] = {}
        for place, (job, _) in enumerate(passed):
            groups.setdefault(job.forwarded, []).append(place)
        for headers, places in groups.items():
            with forwarding(headers):
                outputs = self._outputs([_inputs(*passed[place]) for place in places], served)
            results.update(zip(places, outputs, strict=True))
        return [results[place] for place in range(len(passed))]

    def _outputs(self, inputs: Sequence[Tensor], served: ServedSet) -> list[Output | Refused]:
        """Return the logits of each request, or the refusal if the model raised an error or returned no finite
        numbers.
        """
        failure = Refused(500, _MODEL, (), "model")
        try:
            x = inputs[0] if len(inputs) == 1 else torch.cat(list(inputs))
            with torch.inference_mode():
                logits = self._logits(served, x)
                certified = self._certified(served, x, logits)
        except Exception as error:  # noqa: BLE001 - of the model, which may be any code
            refusal = error if isinstance(error, Refused) else failure
            if refusal.status >= _SERVER_ERROR:
                self.errors(
                    refusal.reason if refusal is error else _MODEL, None if refusal is error else error
                )
            if len(inputs) == 1 or refusal.status in _OF_UPSTREAM:
                return [refusal] * len(inputs)
            # The request that causes the error must not fail the others.
            return [self._outputs([x], served)[0] for x in inputs]
        sizes, features = [x.shape[0] for x in inputs], self.features()
        parts = torch.split(logits, sizes)
        if certified is not None:
            outputs = [
                Output(part, certified=rows)
                for part, rows in zip(parts, torch.split(certified, sizes), strict=True)
            ]
        elif features is None or len(features) != len(logits):  # of a network that calls itself several times
            outputs = [Output(part) for part in parts]
        else:
            outputs = [
                Output(part, (features, end - size))
                for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True)
            ]
        if all_finite(logits):
            return list(outputs)
        self.errors("the model returned NaN or infinite scores")
        return [output if all_finite(output.logits) else failure for output in outputs]

    def _logits(self, served: ServedSet, x: Tensor) -> Tensor:
        try:
            with self.timing("model"):
                logits: Tensor = served.model(x.to(self.device)).cpu()
        finally:  # an error ends the call as well
            self.progress()
        return logits

    def _certified(self, served: ServedSet, x: Tensor, logits: Tensor) -> Tensor | None:
        """Return for each input whether all pairs of masks agree on the vote; None for a model that is no vote."""
        vote = served.model.net
        if not isinstance(vote, MaskedVote):
            return None
        rows = []
        # one by one: each is as many forward passes as a large batch, and a sign of life of the worker
        for row, label in zip(
            x.to(self.device)[:, None], logits.argmax(1).to(self.device)[:, None], strict=True
        ):
            with self.timing("model"):
                rows.append(~vote.disagreeing(row, label)[0].any(1).cpu())
            self.progress()
        return torch.cat(rows)

    def _count(self, outcomes: Sequence[Outcome], served: ServedSet) -> None:
        """Count the outcomes of a batch for the metrics and for the pool."""
        rows = 0
        for outcome in outcomes:
            if outcome.answer is not None:
                n = outcome.answer.scores.shape[0]
                rows += n
                self.answered(served, outcome.job.incoming.principal, n)
        decided = [(each.decision, each.action) for each in outcomes if each.decision is not None]
        unchecked = sum(len(decision.rows) for decision, _ in decided if decision.unchecked)
        self.telemetry.count("holdfast_inputs_total", n=rows)
        self.telemetry.count("holdfast_guard_unchecked_total", n=unchecked)
        actions = Counter([action for decision, action in decided if not decision.unavailable])
        for action, n in actions.items():
            self.telemetry.count("holdfast_decisions_total", str(action), n=n)
        scores = [score for decision, _ in decided for row in decision.rows for score in row.scores]
        fired = Counter([(score.rule, score.mode.value) for score in scores if score.fired])
        for (rule, mode), n in fired.items():
            self.telemetry.count("holdfast_rule_fired_total", rule, mode, n=n)

    def _returned(self, outcome: Outcome) -> Answer | Exception:
        """Return an outcome as the batcher expects it, with what clients receive of the scores."""
        if outcome.answer is not None:
            return replace(outcome.answer, scores=self.release(outcome.answer.scores))
        assert outcome.refusal is not None
        return outcome.refusal


def _inputs(job: Job, decision: RequestDecision) -> Tensor:
    return job.incoming.x if decision.x is None else decision.x


def _unguarded(requests: Sequence[Incoming]) -> list[RequestDecision]:
    return [RequestDecision(r.request, r.principal, (), x=r.x, notes={"guard": "failed"}) for r in requests]


def _failed(job: Job, reason: str, cause: str) -> Outcome:
    return Outcome(job, refusal=Refused(500, reason, (), cause))


def _decided(job: Job, decision: RequestDecision, output: Output | None) -> Outcome:
    """Return the outcome of a request from its final decision and the output of the model."""
    action, reached = decision.action, output is not None
    if decision.unavailable:
        return Outcome(job, decision, refusal=wait_first(decision.refusal, _STATE_S, cause="state"))
    if action is Action.BLOCK or decision.refusal or output is None:
        reason = decision.refusal or "the request is refused"
        return Outcome(
            job, decision, refusal=Refused(422, reason, (), "guard"), action=action, reached=reached
        )
    if action is Action.ABSTAIN:
        rows = [str(row) for row, each in enumerate(decision.actions) if each is Action.ABSTAIN]
        reason = _ABSTAINS.format(", ".join(rows))
        return Outcome(
            job, decision, refusal=Refused(422, reason, (), "guard"), action=action, reached=reached
        )
    logits = output.logits
    if action >= Action.LABEL_ONLY:
        labelled = [row for row, each in enumerate(decision.actions) if each is Action.LABEL_ONLY]
        logits = logits.clone()
        logits[labelled] = labels(logits[labelled])
    return Outcome(
        job,
        decision,
        Answer(logits, decision.delay_s, output.certified),
        action=action,
        features=output.features,
        reached=True,
    )


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
