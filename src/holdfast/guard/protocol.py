"""The interface between the server and the guard, and the guard without rules."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from holdfast.guard.decisions import Incoming, RequestDecision, RowDecision


class RequestGuard(Protocol):
    """Protocol of a guard: it decides about requests before and after the model was called."""

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decision about each request. The model is called with the inputs `x` of those with `answered`."""

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the decisions after the model returned the logits (n, classes) of each request, which are None for a
        request that the model does not answer. `features` are the outputs (n, …) of the layer that a detector needs;
        None if no detector needs any. `network` is the model for detectors that need further forward passes.
        """


class NoRules:
    """A guard without rules, which allows every request."""

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return decisions that allow all requests."""
        return [
            RequestDecision(each.request, each.principal, (RowDecision(),) * each.x.shape[0], x=each.x)
            for each in requests
        ]

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the decisions unchanged."""
        return list(decisions)
