"""The guard: a pipeline of rules that decides about each request before and after the model; and its interface for
servers and applications.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from typing import Protocol

import torch
from torch import Tensor

from holdfast.core.errors import UsageError
from holdfast.core.outputs import OutputKind, of_classes
from holdfast.guard.detectors.outputs import Detector, Fitted, Observation
from holdfast.guard.detectors.queries import Fail
from holdfast.guard.rules import (
    QUERIES,
    RANGE,
    SCHEMA,
    Action,
    Basis,
    Incoming,
    InputDefence,
    InputSchema,
    Mode,
    ObservedRate,
    RequestDecision,
    RequestGuard,
    RowDecision,
    Rule,
    Score,
    all_finite,
)

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


@dataclass(slots=True, eq=False)
class _Draft:
    """A decision about a request while scores are added to it, from which the objects of the decision are created once.

    The fields are those of `RequestDecision`.
    """

    request: str
    principal: str
    x: Tensor
    rows: list[list[Score]]
    notes: dict[str, object] = field(default_factory=dict)
    action: Action = Action.ALLOW
    fired: bool = False
    """whether a rule fired"""
    delayed: bool = False
    """whether a rule delays the response"""
    refusal: str = ""
    delay_s: float = 0.0
    unchecked: bool = False
    unavailable: bool = False

    @classmethod
    def of(cls, made: RequestDecision) -> "_Draft":
        """Return the draft of a decision to which further scores are added: the one that it was created from, once."""
        drafted: _Draft | None = made.__dict__.pop("_draft", None)
        if drafted is not None:
            return drafted
        rows = [list(row.scores) for row in made.rows]
        draft = cls(made.request, made.principal, _x(made), rows, dict(made.notes), made.action)
        draft.fired = any(score.fired for row in rows for score in row)
        draft.refusal, draft.delay_s, draft.unchecked = made.refusal, made.delay_s, made.unchecked
        return draft

    @property
    def scored(self) -> bool:
        """Whether further rules before the model give the request a score."""
        return self.action is not Action.BLOCK and SCHEMA not in self.notes

    def add(self, scores: Iterator[Score]) -> None:
        """Add the next score to each input."""
        for row in self.rows:
            score = next(scores)
            row.append(score)
            if score.fired:
                self.fired, self.action = True, max(self.action, score.taken)
                self.delayed = self.delayed or score.taken is Action.DELAY

    def decision(self) -> RequestDecision:
        """Return the decision."""
        decision: RequestDecision = object.__new__(RequestDecision)
        # in one step: the constructor of a frozen dataclass takes three times as long; and with the cached property
        decision.__dict__.update(
            request=self.request,
            principal=self.principal,
            rows=tuple([RowDecision(tuple(row)) for row in self.rows]),
            refusal=self.refusal,
            delay_s=self.delay_s,
            x=self.x,
            unchecked=self.unchecked,
            unavailable=self.unavailable,
            notes=self.notes,
            action=self.action,
        )
        return decision


@dataclass(frozen=True)
class GuardPipeline(RequestGuard):
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

    @cached_property
    def _after(self) -> tuple[str, ...]:
        return tuple(name for name in self.rules if name in self.detectors)

    @cached_property
    def _ready(self) -> dict[str, Detector]:
        """The stateless detectors that are fitted or need no fit, by the names of their rules. The test of the protocol
        takes longer than the score of some detectors.
        """
        used = {name: self.detectors[name] for name in self._after}
        return {name: each for name, each in used.items() if not isinstance(each, Fitted) or each.fitted}

    @cached_property
    def _valid(self) -> Score | None:
        """The score of a valid input by the rule on shape and data type, if it is such that the rule does not fire."""
        score = self.rules[SCHEMA].score(0.0) if SCHEMA in self.rules else None
        return None if score is None or score.fired else score

    def before_many(self, requests: Sequence[Incoming]) -> list[RequestDecision]:
        """Return the decisions about several requests, with one call of each rule for all of them.

        The query detector receives the inputs in the order of the requests.
        """
        drafts = [self._with_schema(request) for request in requests]
        self._add_range(drafts)
        self._add_queries(drafts, [request.sent for request in requests])
        decisions = self._finished(drafts, final=False)
        if self.defence is not None:
            decisions = [
                replace(decision, x=self.defence(draft.x)) if decision.answered and draft.scored else decision
                for draft, decision in zip(drafts, decisions, strict=True)
            ]
        return decisions

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
        answered = [place for place, decision in enumerate(decisions) if decision.answered]
        drafts = [_Draft.of(decisions[place]) for place in answered]
        for place, draft in zip(answered, drafts, strict=True):
            _refuse_other_length(draft, outputs[place])
        for places in self._of_equal_shape(drafts) if self._after else ():
            scores = self.detected(
                self.observation(
                    _joined([drafts[k].x for k in places]),
                    _joined([outputs[answered[k]] for k in places]),
                    None if features is None else _joined([features[answered[k]] for k in places]),
                    network,
                )
            )
            for name, values in scores.items():
                _add([drafts[k] for k in places], self.rules[name], values)
        result = list(decisions)
        for place, decision in zip(answered, self._finished(drafts, final=True), strict=True):
            result[place] = decision
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

    def _with_schema(self, request: Incoming) -> _Draft:
        """The decision about a request after the rule on its shape and data type."""
        x, fault = request.x, self.schema.fault(request.x)
        if not fault and self._valid is not None:
            return _Draft(request.request, request.principal, x, [[self._valid] for _ in range(x.shape[0])])
        rule = self.rules.get(SCHEMA)
        draft = _Draft(
            request.request, request.principal, x, [[] for _ in range(x.shape[0] if x.dim() else 1)] or [[]]
        )
        if fault:
            draft.notes[SCHEMA] = fault
        if rule is not None:
            draft.add(repeat(rule.score(float(bool(fault)))))
        return draft

    def _add_range(self, drafts: Sequence[_Draft]) -> None:
        """Add the score of the rule on the range to all decisions about inputs of a valid shape and data type."""
        rule = self.rules.get(RANGE)
        if rule is None:
            return
        valid = [draft for draft in drafts if SCHEMA not in draft.notes]
        for places in self._of_equal_shape(valid):
            _add([valid[k] for k in places], rule, self.schema.excess(_joined([valid[k].x for k in places])))
        for draft in valid:
            fault = max([row[-1].value for row in draft.rows])
            if fault > rule.threshold:
                what = "NaN or infinity" if fault == torch.inf else "values outside the range"
                draft.notes[RANGE] = f"the inputs contain {what}; expected {self.schema.range_text}"

    def _add_queries(self, drafts: Sequence[_Draft], sent: Sequence[Tensor | None]) -> None:
        """Add the scores of the query detector to the decisions about requests that are not refused.

        Inputs with a wrong shape and inputs that are not finite are not added to its state. If the state cannot be
        reached, there are no scores.
        """
        rule, queries = self.rules.get(QUERIES), self.queries
        if rule is None or queries is None:
            return
        valid = [place for place, draft in enumerate(drafts) if draft.scored]
        for group in self._of_equal_shape([drafts[place] for place in valid]):
            places = [valid[k] for k in group]
            x = _joined([drafts[place].x for place in places])
            if not all_finite(x):  # one test for all requests, as nearly all inputs are finite
                places = [place for place in places if all_finite(drafts[place].x)]
                if not places:
                    continue
                x = _joined([drafts[place].x for place in places])
            counted = [drafts[place] for place in places]
            principals = [draft.principal for draft in counted for _ in draft.rows]
            exact = None
            if any(sent[place] is not None for place in places):
                exact = _joined([drafts[k].x if sent[k] is None else sent[k] for k in places])
            result = queries.score(x, principals, exact)
            if result.lost is None:
                _add(counted, rule, result.scores)
                continue
            refused = result.lost == "closed" and self.needs_state
            for draft in counted:
                draft.unchecked, draft.unavailable = True, refused
                draft.refusal = UNAVAILABLE_TEXT if refused else ""
                draft.notes[QUERIES] = LOST

    def _of_equal_shape(self, drafts: Sequence[_Draft]) -> list[list[int]]:
        """Divide requests into groups whose inputs have the same shape, and return their positions. There is one group,
        unless the schema leaves sizes open or inputs are files or texts.
        """
        if None not in self.schema.shape and self.schema.kind == "numbers":
            return [list(range(len(drafts)))] if drafts else []
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, draft in enumerate(drafts):
            groups.setdefault(tuple(draft.x.shape[1:]), []).append(place)
        return list(groups.values())

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
        scores = {name: detector(seen) for name, detector in self._ready.items()}
        if all_finite(seen.logits) and all(map(all_finite, scores.values())):  # as nearly always
            return scores
        faulty = ~(seen.logits < torch.inf).all(1)
        return {
            name: values.masked_fill(faulty, torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
            for name, values in scores.items()
        }

    def _finished(self, drafts: Sequence[_Draft], *, final: bool) -> list[RequestDecision]:
        """The decisions, with reasons of refusals and delays. Refusals, and all decisions if they are `final`, are
        counted, and their inputs are stored if they are to be.

        The calibrated rate is that of all rules together, so that inputs without one of them are not counted.
        """
        decisions, n, alarms = [], 0, 0
        for draft in drafts:
            if draft.action is Action.BLOCK and not draft.refusal:
                draft.refusal = self._reason(draft)
            elif draft.delayed:
                draft.delay_s = self.delay_s
            decision = draft.decision()
            if final or not decision.answered:
                n += 0 if draft.unchecked else len(draft.rows)
                alarms += self.alarms(decision) if draft.fired and not draft.unchecked else 0
                if draft.fired and self.stored is not None and not self.stored.add(decision):
                    notes = {**decision.notes, "stored": "the inputs could not be stored"}
                    decision = replace(decision, notes=notes)
            else:
                decision.__dict__["_draft"] = draft  # see `_Draft.of`
            decisions.append(decision)
        self.observed.add(n, alarms)
        return decisions

    def _reason(self, draft: _Draft) -> str:
        """The reason of a refusal for the client."""
        rules = {score.rule for row in draft.rows for score in row if score.taken is Action.BLOCK}
        return next((str(draft.notes[rule]) for rule in (SCHEMA, RANGE) if rule in rules), REFUSED_TEXT)


def _add(drafts: Sequence[_Draft], rule: Rule, values: Tensor) -> None:
    """Add the scores (n,) of a rule, one for each input, to the decisions about these requests."""
    numbers = values.tolist()
    scores = map(rule.score, numbers)
    if max(numbers) > rule.threshold:
        for draft in drafts:
            draft.add(scores)
        return
    for draft in drafts:
        for row in draft.rows:
            row.append(next(scores))


def _x(decision: RequestDecision) -> Tensor:
    assert decision.x is not None, "the guard makes no decision without inputs"
    return decision.x


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """The rows of several requests in one tensor."""
    given = [tensor for tensor in tensors if tensor is not None]
    return given[0] if len(given) == 1 else torch.cat(given)


def _refuse_other_length(draft: _Draft, outputs: Tensor | None) -> None:
    """Raise `UsageError` if the outputs do not have one row for each input of a request."""
    if outputs is None or outputs.shape[0] != len(draft.rows):
        n = "no outputs" if outputs is None else f"{len(outputs)} outputs"
        raise UsageError(
            f"the model returned {n} for a request with {len(draft.rows)} inputs; give one row for each"
        )
