"""The interface of a guard for servers and applications, and the guard without rules."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from holdfast.guard.decisions import Action, Incoming, RequestDecision, RowDecision


class RequestGuard(Protocol):
    """Protocol of a guard: it decides about requests before and after the model was called."""

    @property
    def actions(self) -> frozenset[Action]:
        """Actions of the rules in mode `enforce`."""
        return frozenset()

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decisions about several requests, with one call of each rule for all of them. The model is called
        with the inputs `x` of those with `answered`.

        The query detector receives the inputs in the order of the requests.
        """

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the decisions after the model returned the outputs (n, classes) of each request, with one call of each
        detector for all of them. `outputs` has None for a refused request, whose decision is unchanged. `features` are
        the outputs (n, …) of the layer that a detector needs; None if no detector needs any. `network` is the model for
        detectors that need further forward passes.
        """

    def before(self, x: Tensor, *, principal: str = "") -> RequestDecision:
        """Return the decision about the inputs (n, *shape) of one request before the model is called.

        The field `x` of the result contains the inputs for the model. A refused request, whose field `answered` is
        False, must not be given to the model.
        """
        return self.before_many([Incoming(x, principal)])[0]

    def after(
        self,
        decision: RequestDecision,
        outputs: Tensor,
        features: Tensor | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> RequestDecision:
        """Return the final decision about one request, given the outputs (n, classes) of the model.

        `features` (n, d) are the activations for the Mahalanobis distance on features, and `network` the function from
        inputs to outputs, for detectors that need further forward passes.
        """
        every = None if features is None else [features]
        return self.after_many([decision], [outputs], every, network=network)[0]


class NoRules(RequestGuard):
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
