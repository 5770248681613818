"""Models that are hardened with a budget of CPU time in place of wall-clock time, so that other work on the machine
takes nothing from them.
"""

import time
from typing import Any

import torch
from torch import nn

from benchmarks.hardened import dataset
from holdfast.api.hardening import hardened
from holdfast.api.reading_settings import given
from holdfast.api.verb_settings import Harden
from holdfast.runs.assess.result import Result
from holdfast.runs.harden.hardened import Hardened


def hardened_in_cpu_time(
    model: str | nn.Module, data: str, threat: str, recipe: str | dict[str, Any], budget: str, **more: Any
) -> Hardened:
    """The result of a hardening on one thread, whose budget is CPU time."""
    settings = given(
        model=model,
        data=str(dataset(data)),
        threat=threat,
        recipe=recipe,
        budget=budget,
        device="cpu",
        **more,
    )
    torch.set_num_threads(1)
    return hardened(Harden(**settings), None, resume=False, command="", clock=time.process_time)


def standing(result: Result) -> list[bool]:
    """Which examples are right without an attack and after every attack of the suite."""
    mask: list[bool] = (result.evidence["correct"] & ~result.evidence["suite_success"]).tolist()
    return mask
