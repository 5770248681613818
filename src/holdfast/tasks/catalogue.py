"""The tasks by name."""

from collections.abc import Callable, Mapping
from typing import Any

from holdfast.core.names import TaskName
from holdfast.core.tasks import Task
from holdfast.tasks.detection import Detection
from holdfast.tasks.multilabel import Multilabel
from holdfast.tasks.regression import Regression
from holdfast.tasks.segmentation import Segmentation

_TASKS: Mapping[TaskName, Callable[..., Task]] = {
    kind.name: kind for kind in (Segmentation, Detection, Regression, Multilabel)
}


def task_of(card: Mapping[str, Any]) -> Task:
    """Return the task with the fields of a card (see `Task.card`)."""
    name: TaskName = card["name"]
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in card.items()}
    del fields["name"]
    return _TASKS[name](**fields)
