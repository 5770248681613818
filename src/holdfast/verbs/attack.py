"""The function `holdfast.attack`, which computes adversarial examples with any attack and evaluates them in the same
way as an assessment.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from holdfast.attacks.protocol import Attack
from holdfast.core.batch import Data, Lookup, array_of_files, decoded, decoded_files
from holdfast.core.errors import UsageError
from holdfast.core.names import kind_of
from holdfast.core.types import Inputs
from holdfast.io.data.arrays import Arrays, in_original_form
from holdfast.io.data.data import Selection
from holdfast.io.data.loaders import as_array
from holdfast.runs.assess import assess as assessing
from holdfast.runs.assess.result import Result
from holdfast.runs.engine.progress import Progress, silent
from holdfast.settings.grammar import is_suite_only
from holdfast.threats.domains import BYTES, TEXT
from holdfast.threats.parsing import threat_of
from holdfast.verbs.checked_settings import DataReference
from holdfast.verbs.configuration import given
from holdfast.verbs.opening.arguments import DataLike, ModelLike, verb_with
from holdfast.verbs.opening.declared import opened_threat, with_numbered_goal
from holdfast.verbs.opening.plans import SuiteLike, assess_request, members_given
from holdfast.verbs.opening.recipes import ThreatLike
from holdfast.verbs.opening.resolve import device_of_model, open_fit
from holdfast.verbs.settings import Assess

Array = Tensor | NDArray[Any]
"""Type of the results: a tensor if the inputs were a tensor, a loader or an address, else a numpy array."""


@dataclass(frozen=True)
class Attacked:
    """Results of `holdfast.attack` for n examples, in the order in which the examples were given."""

    x_adv: Array
    """(n, …): one input for each example, with the shape, layout, scale and float type of `x`

    It is the adversarial example if one was found, else the attack's best attempt. An example that is misclassified
    when clean keeps its input unchanged; so does, under a goal, an example whose label or clean prediction is the
    target.
    """
    success: Array
    """(n) bool: the model misclassifies `x_adv` (under a goal: predicts the target), inside the threat model"""
    distance: Array
    """(n) float: distance of `x_adv` from `x` in the norm and the units of the threat's eps; 0 if they are equal"""
    queries: Array
    """(n) int64: number of forward passes of the attack, without those that evaluate `x_adv`"""
    clean_correct: Array
    """(n) bool: the model classifies `x` correctly"""
    result: Result
    """result of the run, as `assess` returns it: metrics with confidence intervals, notes and costs"""

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about the interpretation of the results of an attack, such as that no gradient reaches the input."""
        return self.result.evidence.notes

    def __len__(self) -> int:
        return len(self.x_adv)

    def __repr__(self) -> str:
        attacks = ", ".join(record.name for record in self.result.attacks)
        n, wrong, succeeded = len(self), int((~self.clean_correct).sum()), int(self.success.sum())
        more = "".join(f"; {note}" for note in self.notes)
        clean = f"{wrong:,} of them misclassified when clean"
        threat = self.result.evidence.threat.text
        return f"<Attacked: {attacks} under {threat}; {succeeded:,} of {n:,} succeed, {clean}{more}>"


_OF_RUN = (
    "seed", "surrogates", "fit", "n", "sample", "bounds", "mean", "std", "data_normalised", "batch_size",
    "device",
)  # fmt: skip
"""Settings of `assess` that `attack` has as well; others are settings of the attack."""


@verb_with(Assess, *_OF_RUN)
def attack(
    model: ModelLike,
    x: DataLike,
    y: object = None,
    attack: SuiteLike | None = None,
    threat: ThreatLike = "linf:8/255",
    *,
    goal: int | str | None = None,
    queries: int | None = None,
    progress: Progress = silent,
    **others: Any,
) -> Attacked:
    """Compute adversarial examples for `x` (n, …) with labels `y` (n), and evaluate them on the model.

    `attack` is a name (`"pgd"`, `"cw"`, see `holdfast attacks`), a class or an instance of `holdfast.attacks`, such as
    `PGD(steps=100)`, or `{"use": "pgd", "steps": 100}`. Settings of one attack may also be given as further arguments,
    as in `attack(model, x, y, "pgd", steps=100)`. Several attacks, or the attacks of a suite such as
    `"autoattack"`, run in order, each on the examples that are still robust. `threat` is a string or a constraint, such
    as `holdfast.L2(0.5)`; without an eps (`"l2"`), a minimum-norm attack searches for the smallest change.

    `goal` is a target class for all examples, by number or name. `queries` is the largest number of forward passes of
    an attack for each example. Equal values of `seed` give equal examples; `assess` with the same attack and seed
    computes the same examples. Without `attack`, PGD is used under a norm, and the suite `fast` under any other threat,
    such as rules of a table. `y` is omitted if `x` is a loader or dataset of pairs, an address, or a result of
    `holdfast.open_data`. `fit` contains other examples, for attacks that are learned. `surrogates` are the models on
    which `Transfer` computes its examples. Every other argument has the same meaning as in `assess`.

    Mode, weights and gradients of the model are unchanged. Raises `UsageError` for an unknown name, and for an attack
    that cannot run under this threat or needs more access than the model gives.
    """
    settings_of_run = {key: others.pop(key) for key in _OF_RUN if key in others}
    if attack is None:
        of_norm = bool(others) or threat_of(threat, "attack(): threat").name in _NORMS
        attack = "pgd" if of_norm else "fast"
    attack = _with_settings(attack, others)
    class_name = goal if isinstance(goal, str) and not _WRITTEN_GOAL.fullmatch(goal) else None
    inputs, data = inputs_and_data(x, y)
    settings = Assess(
        **given(
            model=model,
            data=data,
            threat=_threat(threat, goal if class_name is None else None, queries),
            suite=attack if isinstance(attack, str) and is_suite_only(attack) else None,
            doubts=False,
            **settings_of_run,
        )
    )
    if settings.suite is None:
        constraint = opened_threat(settings).constraint
        settings = settings.model_copy(update={"suite": members_given(attack, constraint, "attack")})
    subject, examples, opened = settings.open()
    settings = with_numbered_goal(settings, subject.model, examples, class_name)
    device_of_run = device_of_model(settings, subject)
    request = assess_request(settings, device=device_of_run, target=subject.model.access)
    plan = replace(request.plan, alone=True, attacked=False)
    fit_data = open_fit(settings, subject.model, plan, examples)
    request = replace(request, plan=plan, surrogates=opened, fit=fit_data)
    result = assessing.assess(subject, examples, request, opening=settings.open, progress=progress)
    return _attacked(result, examples, inputs)


_NORMS = ("linf", "l2", "l1", "l0", "snr", "peak")
"""threats under which PGD can be used"""
_WRITTEN_GOAL = re.compile(r"untargeted|targeted:.*", re.DOTALL)
"""pattern of a goal in the syntax of a threat"""


def _with_settings(attack: SuiteLike, settings: Mapping[str, Any]) -> SuiteLike:
    """Return an attack that is given by name, as a class or as a mapping, with settings.

    Raises `UsageError` if there are settings, and `attack` is not one attack or has its settings already.
    """
    if not settings:
        return attack
    shown = ", ".join(settings)
    if isinstance(attack, str) and "," not in attack and not is_suite_only(attack):
        return {"use": attack, **settings}
    if isinstance(attack, Mapping):
        return {**attack, **settings}
    if isinstance(attack, type):
        return {"use": attack.__name__, **settings}
    if isinstance(attack, Attack):
        name = type(attack).__name__
        raise UsageError(
            f"attack is an object with its own settings, and {shown} is given beside it; give {name}({shown}=...)"
        )
    raise UsageError(
        f"{shown} is a setting of one attack, and attack is {attack!r}; name one attack, as in attack='pgd'"
    )


def inputs_and_data(x: DataLike, y: object) -> tuple[DataLike, DataLike]:
    """Return the inputs as they were given, and the data in a type that `assess` accepts."""
    if isinstance(x, tuple) and len(x) == 2 and y is None:
        x, y = x
    reference = x if isinstance(x, DataReference) else None
    inputs = x if reference is None else reference.data
    if reference is not None and y is None:
        if isinstance(inputs, tuple) and len(inputs) == 2:
            return inputs[0], reference
        return inputs, reference
    if y is not None:
        pair = (inputs, y)
        return inputs, pair if reference is None else reference.model_copy(update={"data": pair})
    if isinstance(inputs, Tensor | np.ndarray | list):
        raise UsageError(
            f"y is missing for inputs in {kind_of(x)}; give one label for each, as in attack(model, x, y)"
        )
    return inputs, inputs


def _threat(threat: ThreatLike, goal: int | str | None, queries: int | None) -> str:
    """Return the threat as a string, with the goal and the number of queries from the other arguments."""
    spec = threat_of(threat, "attack(): threat")
    text = str(spec)
    if goal is not None:
        if spec.goal is not None or spec.goal_name:
            raise UsageError(f"the goal is {goal!r}, and the threat {text} has one; leave one of them out")
        text += f",goal={goal if isinstance(goal, str) else _target(goal)}"
    if queries is not None:
        if queries < 1 or queries % 1:
            raise UsageError(
                f"queries is {queries}; expected a whole number of at least 1, as in queries=1000"
            )
        if spec.queries is not None:
            raise UsageError(f"queries is {queries}, and the threat {text} has them; leave one of them out")
        text += f",queries={queries}"
    return text


def _target(goal: int) -> str:
    try:
        number = index(goal)
    except (TypeError, ValueError):
        raise UsageError(
            f"goal is {kind_of(goal)}; expected the number of one class for all examples, as in goal=3"
        ) from None
    if number < 0:
        raise UsageError(f"goal is {number}; expected the number of a class, from 0 on, as in goal=3")
    return f"targeted:{number}"


def _attacked(result: Result, data: Data, inputs: object) -> Attacked:
    """Return the results of the run as an `Attacked`, with arrays of the type of the given inputs."""
    evidence, x = result.evidence, data.read(0, len(data)).x
    correct, success, goal = evidence["correct"], evidence["success"], evidence.threat.goal
    attempted = correct if goal is None else correct & evidence["eligible"]
    success = torch.where(attempted, success, ~correct if goal is None else evidence["prediction"] == goal)
    x_adv, stored = x.clone(), result.adversarial
    if stored:
        rows = Lookup(evidence["id"]).rows(stored["id"])
        attacked = attempted[rows]
        x_adv[rows[attacked]] = stored["x"][attacked].to(x)
    distance = evidence.threat.constraint.distance(x_adv.double(), x.double()).float()
    domain = evidence.threat.constraint.domain
    returned: Array
    if domain is TEXT:
        returned = np.array(decoded(x_adv), np.str_)
    elif domain is BYTES:
        returned = array_of_files(decoded_files(x_adv))
    else:
        returned = _as_given(data, x_adv, inputs)

    def as_inputs(column: Tensor) -> Array:
        return column.to(returned.device) if isinstance(returned, Tensor) else column.numpy()

    return Attacked(
        returned,
        as_inputs(success),
        as_inputs(distance),
        as_inputs(evidence["queries"]),
        as_inputs(correct),
        result,
    )


def _as_given(data: Data, x_adv: Inputs, given: object) -> Array:
    """Return inputs with the type and layout of the caller's object, or those of the model if `given` is no array."""
    arrays, rows = (data.whole, data.rows) if isinstance(data, Selection) else (data, None)
    if not isinstance(arrays, Arrays) or not isinstance(given, Tensor | np.ndarray | list):
        units = arrays.units if isinstance(arrays, Arrays) else None
        return x_adv if units is None else units.normalisation.done(x_adv)
    stored = as_array(given, "inputs")
    if rows is not None:
        arrays, stored = arrays.taken(rows), stored[list(rows)]
    returned = in_original_form(arrays, x_adv, stored)
    return torch.from_numpy(returned).to(given.device) if isinstance(given, Tensor) else returned
