"""The tasks by name; a new task is one more line here. Ours."""

from droppeft.errors import DroppeftError
from droppeft.tasks.causal_lm import CausalLMTask
from droppeft.tasks.classification import ClassificationTask
from droppeft.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (ClassificationTask(), CausalLMTask())}
"""The tasks by the value of the setting ``task``."""


def task_named(name: str) -> Task:
    """Return a task.

    Raises:
        DroppeftError: there is none of this name.
    """
    if name not in TASKS:
        raise DroppeftError(f"task={name}: there is no such task; known are {', '.join(TASKS)}")
    return TASKS[name]
