"""The guard: a pipeline of rules that decides about each request before and after the model.

The order is: schema (shape and data type), range, query detector, defence of the inputs, the model, and the stateless
detectors. Each rule has a mode and an action; see `holdfast.guard.decisions`. A rule that was neither calibrated nor
has a given threshold or radius only reports.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.outputs import OutputKind, of_classes
from holdfast.guard.decisions import Action, Incoming, Mode, RequestDecision, RowDecision
from holdfast.guard.detectors.detector_protocol import Detector, Fitted, Observation
from holdfast.guard.detectors.query_clusters import Fail
from holdfast.guard.observed import ObservedRate
from holdfast.guard.rules import QUERIES, RANGE, SCHEMA, Basis, InputDefence, InputSchema, Rule

REFUSED_TEXT = "the request was refused"
"""reason for a client whose request a detector blocks; it does not disclose which one"""
UNAVAILABLE_TEXT = "the service cannot check requests at the moment; send the request again later"
"""reason for a client whose request is refused because the state of the query detector could not be reached"""
LOST = "the state of the query detector could not be reached"
"""note about such a request for the audit"""


@dataclass(frozen=True)
class QueryResult:
    """Scores of the query detector for some queries."""

    scores: Tensor
    """scores (n,)"""
    lost: Fail | None = None
    """what happens to the queries because the state could not be reached, so that the scores mean nothing; None if it
    was reached"""


class InputStore(Protocol):
    """Protocol of the storage of the inputs of clients."""

    def add(self, decision: RequestDecision) -> bool:
        """Store the inputs of a request on which a rule fired, and return whether they could be stored."""


class QueryScorer(Protocol):
    """Protocol of the stateful query detector."""

    def score(self, x: Tensor, principals: Sequence[str], sent: Tensor | None = None) -> QueryResult:
        """Return for each query (n, *shape), in order, how suspicious it is given all queries before it, and add the
        queries to the state. `sent` are the queries as they were sent, if `x` was rounded.
        """


@dataclass(frozen=True)
class GuardPipeline:
    """The rules of a guard in their order, with the state of the query detector.

    Scores are recorded in the decisions, and must not be returned to clients.
    """

    schema: InputSchema
    """shape, data type and range of valid inputs"""
    rules: Mapping[str, Rule]
    """mode, action and threshold of each rule, by name"""
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    """the stateless detectors by the names of their rules"""
    defence: InputDefence | None = None
    """squeezes of the inputs before the model"""
    queries: QueryScorer | None = None
    """the stateful query detector"""
    outputs: OutputKind = "logit"
    """what the model returns: logits or probabilities"""
    delay_s: float = 1.0
    """seconds by which the action `delay` delays a response"""
    observed: ObservedRate = field(default_factory=ObservedRate)
    """how often the calibrated rules have fired"""
    stored: InputStore | None = None
    """storage of the inputs on which a rule fired; None if no inputs are stored"""

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():
            if name not in (SCHEMA, RANGE, QUERIES) and name not in self.detectors:
                raise UsageError(f"the rule {name!r} has no detector; give one, or remove the rule")
            if name == QUERIES and self.queries is None:
                raise UsageError("the rule 'queries' needs a query detector; give one, or remove the rule")
            if rule.action is Action.DELAY and self.delay_s <= 0:
                raise UsageError(f"the action of {name} is delay, and delay_s is {self.delay_s:g}; give more")

    @property
    def needs_network(self) -> bool:
        """Whether a detector needs further forward passes, so that `after` needs the network."""
        return any("network" in self.detectors[name].needs for name in self._after)

    @property
    def needs_features(self) -> bool:
        """Whether a detector needs the features of an inner layer, which `after` then needs."""
        return any("features" in self.detectors[name].needs for name in self._after)

    @property
    def actions(self) -> frozenset[Action]:
        """Actions of the rules in mode `enforce`."""
        return frozenset(rule.action for rule in self.rules.values() if rule.mode is Mode.ENFORCE)

    @property
    def needs_state(self) -> bool:
        """Whether the query detector may change answers, so that requests are refused if its state is lost. A rule that
        never changes an answer refuses no request either.
        """
        rule = self.rules.get(QUERIES)
        return rule is not None and rule.mode is Mode.ENFORCE and rule.action > Action.FLAG

    @property
    def unfitted(self) -> tuple[str, ...]:
        """Names of the rules that only report, because neither a calibration nor the settings decide when they fire."""
        return tuple(name for name, rule in self.rules.items() if rule.basis is Basis.UNFITTED)

    @property
    def calibrated(self) -> tuple[str, ...]:
        """Names of the rules whose combined decision is calibrated: the query detector and the stateless detectors."""
        return tuple(name for name in self.rules if name not in (SCHEMA, RANGE))

    @property
    def _after(self) -> tuple[str, ...]:
        return tuple(name for name in self.rules if name in self.detectors)

    def before(self, x: Tensor, *, principal: str = "") -> RequestDecision:
        """Return the decision about the inputs (n, *shape) of one request before the model is called.

        The field `x` of the result contains the inputs for the model. A refused request, whose field `answered` is
        False, must not be given to the model.
        """
        return self.before_many([Incoming(x, principal)])[0]

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decisions about several requests, with one call of each rule for all of them.

        The query detector receives the inputs in the order of the requests.
        """
        decisions = [self._with_schema(request) for request in requests]
        self._add_range(decisions)
        self._add_queries(decisions, [request.sent for request in requests])
        final = [self._finished(decision) for decision in decisions]
        for place, decision in enumerate(final):
            if not decision.answered:
                final[place] = self._recorded(decision)
            elif self.defence is not None and SCHEMA not in decision.notes:
                final[place] = replace(decision, x=self.defence(_x(decision)))
        return final

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

    def after_many(
        self,
        decisions: Sequence[RequestDecision],
        outputs: Sequence[Tensor | None],
        features: Sequence[Tensor | None] | None = None,
        *,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> list[RequestDecision]:
        """Return the final decisions about several requests, with one call of each detector for all of them.

        `outputs` has one tensor for each decision, and None for a refused request, whose decision is unchanged.
        """
        result = list(decisions)
        answered = [place for place, decision in enumerate(decisions) if decision.answered]
        for place in answered:
            _refuse_other_length(decisions[place], outputs[place])
        for places in self._of_equal_shape(result, answered) if self._after else ():
            scores = self.detected(
                self.observation(
                    _joined(result, places),
                    _concatenated([outputs[place] for place in places]),
                    None if features is None else _concatenated([features[place] for place in places]),
                    network,
                )
            )
            for name, values in scores.items():
                self._add(result, places, self.rules[name], values)
        for place in answered:
            result[place] = self._recorded(self._finished(result[place]))
        return result

    def alarms(self, decision: RequestDecision) -> int:
        """Return the number of inputs of a request for which a calibrated rule fired, whatever its mode."""
        names = self.calibrated
        return sum(any(s.fired and s.rule in names for s in row.scores) for row in decision.rows)

    def logits_of(self, outputs: Tensor) -> Tensor:
        """Return outputs of the model as float logits (n, classes). Probabilities become their logarithms, and a single
        column becomes two classes.
        """
        return of_classes(outputs if outputs.is_floating_point() else outputs.float(), self.outputs)

    def _with_schema(self, request: Incoming) -> RequestDecision:
        """The decision about a request after the rule on its shape and data type."""
        fault, rule = self.schema.fault(request.x), self.rules.get(SCHEMA)
        scores = () if rule is None else (rule.score(float(bool(fault))),)
        rows = (RowDecision(scores),) * max(len(request.x) if request.x.dim() else 1, 1)
        notes = {SCHEMA: fault} if fault else {}
        return RequestDecision(request.request, request.principal, rows, x=request.x, notes=notes)

    def _add_range(self, decisions: list[RequestDecision]) -> None:
        """Add the score of the rule on the range to all decisions about inputs of a valid shape and data type."""
        rule = self.rules.get(RANGE)
        if rule is None:
            return
        valid = [place for place, decision in enumerate(decisions) if SCHEMA not in decision.notes]
        for places in self._of_equal_shape(decisions, valid):
            self._add(decisions, places, rule, self.schema.excess(_joined(decisions, places)))
        for place in valid:
            fault = max(row.scores[-1].value for row in decisions[place].rows)
            if fault > rule.threshold:
                what = "NaN or infinity" if fault == torch.inf else "values outside the range"
                message = f"the inputs contain {what}; expected {self.schema.range_text}"
                notes = {**decisions[place].notes, RANGE: message}
                decisions[place] = replace(decisions[place], notes=notes)

    def _add_queries(self, decisions: list[RequestDecision], sent: Sequence[Tensor | None]) -> None:
        """Add the scores of the query detector to the decisions about requests that are not refused.

        Inputs with a wrong shape and inputs that are not finite are not added to its state. If the state cannot be
        reached, there are no scores.
        """
        rule, queries = self.rules.get(QUERIES), self.queries
        if rule is None or queries is None:
            return
        valid = [
            place
            for place, decision in enumerate(decisions)
            if decision.answered and SCHEMA not in decision.notes
        ]
        for places in self._of_equal_shape(decisions, valid):
            x = _joined(decisions, places)
            if not bool(x.isfinite().all()):  # one test for all requests, as nearly all inputs are finite
                places = [place for place in places if bool(_x(decisions[place]).isfinite().all())]
                if not places:
                    continue
                x = _joined(decisions, places)
            principals = [decisions[place].principal for place in places for _ in decisions[place].rows]
            rounded = any(sent[place] is not None for place in places)
            exact = [_x(decisions[place]) if sent[place] is None else sent[place] for place in places]
            result = queries.score(x, principals, _concatenated(exact) if rounded else None)
            if result.lost is None:
                self._add(decisions, places, rule, result.scores)
                continue
            refused = result.lost == "closed" and self.needs_state
            for place in places:
                decisions[place] = replace(
                    decisions[place],
                    unchecked=True,
                    unavailable=refused,
                    refusal=UNAVAILABLE_TEXT if refused else "",
                    notes={**decisions[place].notes, QUERIES: LOST},
                )

    def _of_equal_shape(self, decisions: Sequence[RequestDecision], places: Sequence[int]) -> list[list[int]]:
        """Divide requests into groups whose inputs have the same shape. There is one group, unless the schema leaves
        sizes open.
        """
        if None not in self.schema.shape:
            return [list(places)] if places else []
        groups: dict[tuple[int, ...], list[int]] = {}
        for place in places:
            groups.setdefault(tuple(_x(decisions[place]).shape[1:]), []).append(place)
        return list(groups.values())

    def _add(
        self, decisions: list[RequestDecision], places: Sequence[int], rule: Rule, values: Tensor
    ) -> None:
        """Add the scores (n,) of a rule, one for each input, to the decisions about these requests."""
        scores = iter(values.tolist())
        for place in places:
            rows = tuple(
                RowDecision((*row.scores, rule.score(next(scores)))) for row in decisions[place].rows
            )
            decisions[place] = replace(decisions[place], rows=rows)

    def observation(
        self,
        x: Tensor,
        outputs: Tensor,
        features: Tensor | None = None,
        network: Callable[[Tensor], Tensor] | None = None,
    ) -> Observation:
        """Return inputs and outputs of the model in the form that detectors take."""
        function = None if network is None else lambda rows: self.logits_of(network(rows))
        return Observation(x, self.logits_of(outputs), features, function)

    @torch.no_grad()
    def detected(self, seen: Observation) -> dict[str, Tensor]:
        """Return the scores (n,) of each stateless detector by the name of its rule. Detectors that are not fitted have
        none.

        The score is infinite if the logits contain NaN or plus infinity, so that a faulty model raises an alarm.
        """
        faulty = ~(seen.logits < torch.inf).all(1)
        detectors = {name: self.detectors[name] for name in self._after}
        scores = {
            name: detector(seen)
            for name, detector in detectors.items()
            if not isinstance(detector, Fitted) or detector.fitted
        }
        return {
            name: score.masked_fill(faulty, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
            for name, score in scores.items()
        }

    def _finished(self, decision: RequestDecision) -> RequestDecision:
        """The decision with the reason of a refusal, and with the delay of the response."""
        action = decision.action
        if action is Action.ALLOW:
            return decision
        if action is Action.BLOCK and not decision.refusal:
            rules = {s.rule for row in decision.rows for s in row.scores if s.taken is Action.BLOCK}
            reasons = [str(decision.notes[rule]) for rule in (SCHEMA, RANGE) if rule in rules]
            reason = reasons[0] if reasons else REFUSED_TEXT
            return replace(decision, refusal=reason)
        delayed = any(s.taken is Action.DELAY for row in decision.rows for s in row.scores)
        return replace(decision, delay_s=self.delay_s) if delayed else decision

    def _recorded(self, decision: RequestDecision) -> RequestDecision:
        """The final decision, after it was counted and its inputs were stored if they are to be.

        The calibrated rate is that of all rules together, so that inputs without one of them are not counted.
        """
        if not decision.unchecked:
            self.observed.add(len(decision.rows), self.alarms(decision))
        if self.stored is not None and not self.stored.add(decision):
            return replace(decision, notes={**decision.notes, "stored": "the inputs could not be stored"})
        return decision


def _x(decision: RequestDecision) -> Tensor:
    assert decision.x is not None, "the guard makes no decision without inputs"
    return decision.x


def _joined(decisions: Sequence[RequestDecision], places: Sequence[int]) -> Tensor:
    """The inputs of several requests in one tensor."""
    return _concatenated([_x(decisions[place]) for place in places])


def _concatenated(tensors: Sequence[Tensor | None]) -> Tensor:
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0] if len(given) == 1 else torch.cat(given)


def _refuse_other_length(decision: RequestDecision, outputs: Tensor | None) -> None:
    """Raise `UsageError` if the outputs do not have one row for each input of a request."""
    if outputs is None or len(outputs) != len(decision.rows):
        n = "no outputs" if outputs is None else f"{len(outputs)} outputs"
        raise UsageError(
            f"the model returned {n} for a request with {len(decision.rows)} inputs; give one row for each"
        )
