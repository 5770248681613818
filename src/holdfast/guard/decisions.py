"""Decisions of the guard about requests: what happens to each input, and the scores from which that follows."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import NamedTuple

from torch import Tensor


class Action(IntEnum):
    """What is done with an input, in order of severity. Between several actions, the most severe one is taken."""

    ALLOW = 0
    """the outputs of the model are returned"""
    FLAG = 1
    """like `ALLOW`, and the request is marked in the audit chain"""
    DELAY = 2
    """the response is delayed; also together with a more severe action that returns a response"""
    LABEL_ONLY = 3
    """the predicted class is returned, and no scores"""
    ABSTAIN = 4
    """no prediction is returned for the input"""
    BLOCK = 5
    """the request is refused"""

    def __str__(self) -> str:
        """Return the name of the action in configuration files and reports, as in `label_only`."""
        return self.name.lower()


class Mode(StrEnum):
    """What a rule of the guard may do."""

    OBSERVE = "observe"
    """it records its score"""
    SHADOW = "shadow"
    """it records its score, and the action that it would take"""
    ENFORCE = "enforce"
    """its action is taken"""


class Score(NamedTuple):
    """Result of one rule for one input. It is recorded, and never returned to a client."""

    rule: str
    value: float
    """score of the rule, larger for more suspicious inputs"""
    fired: bool
    """whether the score is above the threshold of the rule"""
    mode: Mode
    action: Action
    """action of the rule if it fires"""

    @property
    def taken(self) -> Action:
        """The action that is taken because of this score."""
        return self.action if self.fired and self.mode is Mode.ENFORCE else Action.ALLOW


@dataclass(frozen=True, slots=True)
class RowDecision:
    """Decision about one input of a request."""

    scores: tuple[Score, ...] = ()

    @property
    def action(self) -> Action:
        """The most severe action of the rules in mode `enforce`."""
        # a list of the few scores that fired, because this is computed for every input
        return max([score.taken for score in self.scores if score.fired], default=Action.ALLOW)

    @property
    def shadow(self) -> Action:
        """The most severe action of the rules in modes `shadow` and `enforce`, if all were enforced."""
        return max(
            (score.action for score in self.scores if score.fired and score.mode is not Mode.OBSERVE),
            default=Action.ALLOW,
        )


@dataclass(frozen=True)
class RequestDecision:
    """Decision about a request with one or more inputs."""

    request: str
    """identifier of the request, unique and unpredictable"""
    principal: str
    """name of the client, which the server assigns; empty if it has none"""
    rows: tuple[RowDecision, ...]
    """decision about each input"""
    refusal: str = ""
    """reason that a refused request is answered with, which discloses no score; empty if it is not refused"""
    delay_s: float = 0.0
    """seconds by which the response is delayed"""
    x: Tensor | None = field(default=None, repr=False)
    """inputs (n, *shape) after the input defences of the guard, which the model receives"""
    unchecked: bool = False
    """whether the query detector could not judge the inputs, because its state could not be reached"""
    unavailable: bool = False
    """whether the request is refused only for this reason: it is no detection, and the client may send it again later
    (status 503)"""
    notes: Mapping[str, object] = field(default_factory=dict)
    """further facts for the audit chain, such as that the shared state could not be reached"""

    @cached_property
    def action(self) -> Action:
        """The most severe action over all inputs."""
        return max([row.action for row in self.rows], default=Action.ALLOW)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The action for each input."""
        return tuple(row.action for row in self.rows)

    @property
    def answered(self) -> bool:
        """Whether the model is called for the request."""
        return self.action is not Action.BLOCK and not self.unavailable


@dataclass(frozen=True)
class Incoming:
    """A request before the guard has seen it."""

    x: Tensor
    """inputs (n, *shape)"""
    principal: str = ""
    request: str = field(default_factory=lambda: secrets.token_hex(16))
    sent: Tensor | None = field(default=None, repr=False)
    """inputs as the client sent them, if `x` was rounded to another data type"""
