"""Whether a worker can answer requests: checks that are repeated in the background, and what probes are answered.

A check needs no request, so that a probe is answered truthfully by a server without any.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from holdfast.guard.detectors.queries import QueryState, Wanted
from holdfast.server.audit_chain import ChainFile
from holdfast.server.error_log import shown

Reason = Literal["audit", "state", "quota", "model", "workers", "draining"]
REASONS: Mapping[Reason, str] = {
    "audit": "the audit log cannot be written",
    "state": "the state of the query detector cannot be reached",
    "quota": "the limits of the keys cannot be checked",
    "model": "the model fails on every input",
    "workers": "no worker process has started",
    "draining": "the server is draining",
}
"""Why a server refuses every request, as its clients may know it"""
_EVERY_S = 0.75
"""seconds between two runs of a check"""
_LATE_S = 0.6
"""seconds after which a check that has not ended counts as failed, as while another process locks a database"""


@dataclass(eq=False)
class Check:
    """A check that a thread of its own repeats, because a disk or a database may let it wait."""

    reason: Reason
    fault: Callable[[], str]
    """returns what is wrong, for the operator; empty if nothing is"""
    late_s: float = _LATE_S
    """seconds after which a run that has not ended counts as failed"""
    refuses: bool = True
    """whether every request is refused while it fails"""
    found: str = ""
    """result of the last run"""
    _began_s: float = math.inf

    @property
    def failure(self) -> str:
        """What is wrong; empty if nothing is."""
        waited_s = time.monotonic() - self._began_s
        return self.found or (f"no answer for {waited_s:.1f} s" if waited_s > self.late_s else "")

    def run(self) -> None:
        """Run the check once."""
        self._began_s = time.monotonic()
        try:
            self.found = self.fault()
        except Exception as error:  # noqa: BLE001 - of a model or a library; the thread must go on
            self.found = f"{type(error).__name__}: {shown(str(error))}"
        self._began_s = math.inf

    def repeat(self) -> None:
        """Run the check as long as the process runs."""
        while True:
            self.run()
            time.sleep(_EVERY_S)


def audit_fault(chain: ChainFile) -> str:
    """Return why an audit chain cannot be written; empty if it can."""
    try:
        chain.refuse_full_disk()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def state_fault(state: QueryState) -> str:
    """Return why a shared state cannot be written; empty if it can."""
    nothing = Wanted(np.empty((0, 0), np.uint64), (), ())
    return "" if state.exchange(nothing, time.time(), lambda view: None) else state.health.error


@dataclass(eq=False)
class ModelTest:
    """Function that tests the model with one input after requests for which it failed, whose inputs may be the cause.
    It returns what is wrong, which is empty if nothing is, or raises the error of the model.
    """

    failed: Callable[[], float]
    """returns the number of these requests"""
    answers: Callable[[], bool]
    """calls the model, and returns whether its scores are finite"""
    _tested: float = 0.0
    _failing: bool = False

    def __call__(self) -> str:
        failed = self.failed()
        if failed > self._tested or self._failing:
            self._tested, self._failing = failed, True
            if not self.answers():
                return "it returned NaN or infinite scores"
            self._failing = False
        return ""


@dataclass(eq=False)
class Readiness:
    """The checks of a worker, and whether its server drains."""

    checks: Sequence[Check] = ()
    draining: bool = False
    """whether the server ends, so that a load balancer is to send no further requests"""
    probed_s: float = field(default=-math.inf, init=False)
    """time of the last probe"""

    def start(self) -> None:
        """Run every check once, and then repeat each in a thread."""
        for check in self.checks:
            check.run()
            threading.Thread(target=check.repeat, name=check.reason, daemon=True).start()

    @property
    def failures(self) -> dict[Reason, str]:
        """Why every request is refused, with details for the operator, by reason."""
        return {check.reason: check.failure for check in self.checks if check.refuses and check.failure}

    def probe(self) -> str:
        """Return why requests are not answered, as clients may know it, and note the time. It is empty if they are."""
        self.probed_s = time.monotonic()
        draining: tuple[Reason, ...] = ("draining",) if self.draining else ()
        return "; ".join(REASONS[reason] for reason in (*draining, *self.failures))

    @property
    def unprobed_s(self) -> float | None:
        """Seconds since the last probe; None before the first one."""
        return None if self.probed_s == -math.inf else time.monotonic() - self.probed_s
