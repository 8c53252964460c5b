"""The exercises of chapter 07b."""

from collections.abc import Callable
from contextvars import ContextVar

from celery.app.task import Context

from course_tasks.exercises import Exercise, Question, WrongAnswer, called

# What Celery puts into a message's headers itself, or into a task's request beside them.
TAKEN = {name for name in vars(Context) if not name.startswith("_")}
TAKEN |= {"argsrepr", "compression", "kwargsrepr", "lang", "task"}


class _NoStock(Exception):
    """What a block fails with."""


def _holding(answer: Callable) -> str | None:
    variable = ContextVar("variable", default="nobody")
    variable.set("ada-7")
    within = []

    def used(fails: bool) -> None:
        with answer(variable, "ben-8"):
            within.append(variable.get())
            if fails:
                raise _NoStock

    called(used, False, case="for `with holding(variable, value):`, ")
    if within != ["ben-8"]:
        return f"in the block the value is {within[0]!r}, and should be the given one."
    if variable.get() != "ada-7":
        return f"after the block the value is {variable.get()!r}, and before it was 'ada-7'."
    try:
        called(used, True, case="if the block fails, ")
    except WrongAnswer as error:
        if not isinstance(error.__cause__, _NoStock):
            raise
    else:
        return "it hides the error of a block that fails."
    return None if variable.get() == "ada-7" else f"after a block that fails, the value is {variable.get()!r}."


def _publish(answer: Callable) -> str | None:
    message = {"id": "1f2e3d4c", "task": "order", "root_id": "1f2e3d4c"}
    first, without = dict(message), dict(message)
    called(answer, first, "ada-7")
    names = [name for name, value in first.items() if message.get(name) != value]
    if taken := TAKEN.intersection(names):
        return f"the name {min(taken)} is taken: Celery's own value wins in the worker, or is lost."
    if [first[name] for name in names] != ["ada-7"]:
        return f"the headers should have the id under one new name, and are {first}."
    again = message | {names[0]: "ada-7"}
    called(answer, again, "ben-8", case="for a message that has an id, ")
    called(answer, without, None, case="with no id, ")
    if again[names[0]] != "ada-7":
        return "the message had an id, ada-7, and it is overwritten."
    return None if without == message else f"with no id the headers should stay as they are, and have become {without}."


MANAGER = "import contextlib\n\n\n@contextlib.contextmanager\ndef answer(variable, value):\n"

EXERCISES = {
    "07b-1": Exercise(
        kind=Callable,
        judge=_holding,
        wrong={
            MANAGER + "    variable.set(value)\n    yield\n    variable.set(None)": "after the block the value is None",
            MANAGER + "    token = variable.set(value)\n    yield\n    variable.reset(token)": (
                "after a block that fails"
            ),
            "def answer(variable, value):\n    variable.set(value)": "your function raised TypeError",
            MANAGER + "    yield": "in the block the value is 'ada-7'",
        },
    ),
    "07b-2": Exercise(
        kind=Callable,
        judge=_publish,
        wrong={
            "def answer(headers, id):\n    headers.setdefault('my_request_id', id)": "and have become",
            "def answer(headers, id):\n    if id:\n        headers['my_request_id'] = id": "it is overwritten",
            **{
                f"def answer(headers, id):\n    if id:\n        headers.setdefault({name!r}, id)": f"{name} is taken"
                for name in ("correlation_id", "timelimit", "args", "compression", "properties")
            },
            "def answer(headers, id):\n    if id:\n        headers = headers | {'my_request_id': id}": "one new name",
        },
    ),
}

QUIZ = {
    "07b-1": Question(
        right=("ada-7",),
        wrong={
            "None": "`None` would be the value after `set(None)`, or after `reset(outer)`.",
            "ben-8": "this value was set for the work in the middle, and that work is done.",
            "-": "`-` is what the log shows when there is no id. `get` returns the value of the variable itself.",
        },
        otherwise="the last line returns one of the values that the variable has had in the lines above, or `None`.",
    ),
    "07b-2": Question(
        right="c",
        wrong={
            "a": "`_end` runs when a task ends. Other tasks begin before that.",
            "b": "`-` appears where no id is set, but `_begin` sets one for each task.",
            "d": "all threads of a process can read and change its global variables, so there is no error.",
        },
    ),
    "07b-3": Question(
        right="b",
        wrong={
            "a": "then the task's own lines would not have `ada-7` either.",
            "c": "without the field, the line would not have the `-` either.",
            "d": "`_end` runs after the task, and this line is logged before the task.",
        },
    ),
    "07b-4": Question(
        right="a",
        wrong={
            "b": "`-` would be right for such a line, but it appears only when no id is current.",
            "c": "there is no next request yet, so nobody can know its id.",
            "d": "the record of each line has the field, so the line can be formatted.",
        },
    ),
}
