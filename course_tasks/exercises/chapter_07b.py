"""The exercises of chapter 07b."""

from collections.abc import Callable
from contextvars import ContextVar

from course_tasks.exercises import Exercise

# What Celery puts into a message's headers itself, or into a task's request beside them.
TAKEN = {"argsrepr", "correlation_id", "delivery_info", "eta", "expires", "group", "group_index", "hostname", "id"}
TAKEN |= {"ignore_result", "kwargsrepr", "lang", "origin", "parent_id", "properties", "reply_to", "retries", "root_id"}
TAKEN |= {"shadow", "stamped_headers", "stamps", "task", "timelimit"}


def _holding(answer: Callable) -> str | None:
    variable = ContextVar("variable", default="nobody")
    variable.set("ada-7")
    try:
        with answer(variable, "ben-8"):
            if variable.get() != "ben-8":
                return f"in the block the value is {variable.get()!r}, and should be the given one."
    except Exception as error:
        return f"with holding(variable, value): raises {type(error).__name__}: {error}."
    if variable.get() != "ada-7":
        return f"after the block the value is {variable.get()!r}, and before it was 'ada-7'."
    try:
        with answer(variable, "ben-8"):
            raise ValueError("no stock")
    except ValueError:
        pass
    except Exception as error:
        return f"if the block fails, it raises {type(error).__name__}: {error}."
    else:
        return "it hides the error of a block that fails."
    return None if variable.get() == "ada-7" else f"after a block that fails, the value is {variable.get()!r}."


def _publish(answer: Callable) -> str | None:
    message = {"id": "1f2e3d4c", "task": "order", "root_id": "1f2e3d4c"}
    first, again, without = dict(message), {}, dict(message)
    try:
        answer(first, "ada-7")
        names = [name for name, value in first.items() if message.get(name) != value]
        if taken := TAKEN.intersection(names):
            return f"the name {min(taken)} is taken: Celery's own value wins in the worker, or is lost."
        if [first[name] for name in names] != ["ada-7"]:
            return f"the headers should have the id under one new name, and are {first}."
        again = message | {names[0]: "ada-7"}
        answer(again, "ben-8")
        answer(without, None)
    except Exception as error:
        return f"it raises {type(error).__name__}: {error}."
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
            "def answer(variable, value):\n    variable.set(value)": "raises TypeError",
            MANAGER + "    yield": "in the block the value is 'ada-7'",
        },
    ),
    "07b-2": Exercise(
        kind=Callable,
        judge=_publish,
        wrong={
            "def answer(headers, id):\n    headers.setdefault('my_request_id', id)": "and have become",
            "def answer(headers, id):\n    if id:\n        headers['my_request_id'] = id": "it is overwritten",
            "def answer(headers, id):\n    if id:\n        headers.setdefault('correlation_id', id)": "is taken",
            "def answer(headers, id):\n    if id:\n        headers = headers | {'my_request_id': id}": "one new name",
        },
    ),
}
