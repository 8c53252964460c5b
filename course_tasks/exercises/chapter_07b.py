"""The exercises of chapter 07b."""

import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache

import kombu
from celery import Celery
from celery.app.task import Context
from celery.worker.request import Request

from course_tasks.exercises import Exercise, Question, WrongAnswer, called

PATIENCE = 10  # seconds for two threads that only set a variable
NONE = object()  # in place of the value of a variable that has none


class _NoStock(Exception):
    """What a block fails with."""


class _Ended(BaseException):
    """What ends a block from outside, as SystemExit, CancelledError and GreenletExit do: none is an Exception."""


def _holding(answer: Callable) -> str | None:
    return copy_context().run(lambda: _in_a_block(answer) or _unset(answer) or _nested(answer) or _in_threads(answer))


def _in_a_block(answer: Callable) -> str | None:
    variable = ContextVar("variable", default="nobody")
    variable.set("ada-7")
    within = []

    def used(error: type[BaseException] | None) -> None:
        with answer(variable, "ben-8"):
            within.append(variable.get())
            if error:
                raise error

    called(used, None, case="for `with holding(variable, value):`, ")
    if within != ["ben-8"]:
        return f"in the block the value is {within[0]!r}, and should be the given one."
    if variable.get() != "ada-7":
        return f"after the block the value is {variable.get()!r}, and before it was 'ada-7'."
    for error, case in ((_NoStock, "a block that fails"), (_Ended, "a block that is ended by a BaseException")):
        try:
            called(used, error, case=f"for {case}, ")
        except WrongAnswer as wrong:
            if not isinstance(wrong.__cause__, error):
                raise
        else:
            return f"the error of {case} is hidden: it should come out of the `with` block."
        if variable.get() != "ada-7":
            also = ", such as SystemExit or a cancelled asyncio task" if error is _Ended else ""
            return f"after {case}{also}, the value is {variable.get()!r}, and before it was 'ada-7'."
    return None


def _unset(answer: Callable) -> str | None:
    """With a variable that has no value."""
    variable: ContextVar[str] = ContextVar("variable")

    def used() -> None:
        with answer(variable, "ben-8"):
            pass

    called(used, case="for a variable that has no value yet, ")
    if (value := variable.get(NONE)) is not NONE:
        return f"before the block the variable had no value at all, and after it the value is {value!r}."
    return None


def _nested(answer: Callable) -> str | None:
    variable = ContextVar("variable", default="nobody")
    found = []

    def used() -> None:
        with answer(variable, "ada-7"):
            with answer(variable, "ben-8"):
                found.append(variable.get())
            found.append(variable.get())
        found.append(variable.get())

    called(used, case="for a block inside another block, ")
    if found != ["ben-8", "ada-7", "nobody"]:
        return f"with one block inside another, the values are {found}, and should be ['ben-8', 'ada-7', 'nobody']."
    return None


def _in_threads(answer: Callable) -> str | None:
    """In two threads: the second one's block begins in the middle of the first one's, and ends after it."""
    variable = ContextVar("variable", default="nobody")
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    found: dict[str, tuple[str, str]] = {}
    errors: list[WrongAnswer] = []

    def used(id: str, begun: threading.Event, other: threading.Event) -> None:
        with answer(variable, id):
            begun.set()
            other.wait(PATIENCE)
            within = variable.get()
        found[id] = within, variable.get()

    def run(id: str, begun: threading.Event, other: threading.Event, ended: threading.Event) -> None:
        try:
            called(used, id, begun, other, case="with a block in each of two threads at the same time, ")
        except WrongAnswer as error:
            errors.append(error)
        begun.set()
        ended.set()

    def second() -> None:
        first_in.wait(PATIENCE)
        run("ben-8", second_in, first_out, threading.Event())

    threads = [threading.Thread(target=run, args=("ada-7", first_in, second_in, first_out))]
    threads.append(threading.Thread(target=second))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for id in ("ada-7", "ben-8"):
        if found[id] != (id, "nobody"):
            return f"with two threads, the one with {id!r} finds {found[id]}, and should find {(id, 'nobody')}."
    return None


@cache
def taken() -> frozenset[str]:
    """The names that Celery uses itself, as a header or for a task in the worker, where one's own value gets lost.

    Asked of the Celery that is installed, with a message and a request as it makes them.
    """
    app = Celery(set_as_current=False)

    @app.task(name="order")
    def order() -> None:
        """It is never run."""

    sent = app.amqp.as_task_v2("1f2e3d4c", "order")
    with kombu.Connection("memory://") as connection, connection.SimpleQueue("chapter-07b") as queue:
        queue.put(sent.body, headers=sent.headers, compression="gzip", **sent.properties)
        message = queue.get(timeout=PATIENCE)
    request = Request(message, app=app, task=order)
    return frozenset({*message.headers, *request.request_dict, *vars(Context)})


def _publish(answer: Callable) -> str | None:
    message = {"id": "1f2e3d4c", "task": "order", "root_id": "1f2e3d4c"}
    first, without = dict(message), dict(message)
    called(answer, first, "ada-7")
    if gone := message.keys() - first.keys():
        return f"the header {min(gone)} is gone from the message, and Celery needs it."
    names = [name for name, value in first.items() if message.get(name) != value]
    if used := taken().intersection(names):
        return f"the name {min(used)} is taken: Celery uses it itself, so in the worker one of the two values is lost."
    if [first[name] for name in names] != ["ada-7"]:
        return f"the headers should have the id under one new name, and are {first}."
    if not isinstance(names[0], str) or not names[0].strip():
        return f"the name of a header should be a text, and this is {names[0]!r}."
    again = message | {names[0]: "ada-7"}
    called(answer, again, "ben-8", case="for a message that has an id, ")
    called(answer, without, None, case="with no id, ")
    if again[names[0]] != "ada-7":
        return "the message had an id, ada-7, and it is overwritten."
    return None if without == message else f"with no id the headers should stay as they are, and have become {without}."


MANAGER = "import contextlib\n\n\n@contextlib.contextmanager\ndef answer(variable, value):\n"
CLASS = """class answer:
    def __init__(self, variable, value):
        self.variable, self.value = variable, value

    def __enter__(self):
        {token} = self.variable.set(self.value)

    def __exit__(self, *error):
        self.variable.reset({token})
"""
LAZY = "    token = variable.set(value)\n    try:\n        yield\n    except {}:\n        variable.reset(token)\n"
OLD = "    old = variable.get({})\n    variable.set(value)\n    try:\n        yield\n    finally:\n"
OLD += "        variable.set(old)"
PUBLISH = "def answer(headers, id):\n    if id:\n        headers.setdefault({!r}, id)"

EXERCISES = {
    "07b-1": Exercise(
        kind=Callable,
        judge=_holding,
        wrong={
            MANAGER + "    variable.set(value)\n    yield\n    variable.set(None)": "after the block the value is None",
            MANAGER + "    token = variable.set(value)\n    yield\n    variable.reset(token)": (
                "after a block that fails, the value is"
            ),
            "def answer(variable, value):\n    variable.set(value)": "your function raised TypeError",
            MANAGER + "    yield": "in the block the value is 'ada-7'",
            MANAGER + LAZY.format("Exception") + "        raise\n    else:\n        variable.reset(token)": (
                "such as SystemExit or a cancelled asyncio task"
            ),
            MANAGER + LAZY.format("BaseException") + "    else:\n        variable.reset(token)": (
                "the error of a block that fails is hidden"
            ),
            MANAGER + OLD.format(""): "for a variable that has no value yet, your function raised LookupError",
            MANAGER + OLD.format("None"): "and after it the value is None",
            CLASS.format(token="answer.token"): "for a block inside another block, your function raised RuntimeError",
            "tokens = []\n" + MANAGER + "    tokens.append(variable.set(value))\n    try:\n        yield\n"
            "    finally:\n        variable.reset(tokens.pop(0))": "with one block inside another, the values are",
            # the last one of a list serves nested blocks, but with threads it is another thread's
            "tokens = []\n"
            + CLASS.format(token="token")
            .replace("token =", "tokens.append(")
            .replace(".set(self.value)", ".set(self.value))")
            .replace("reset(token)", "reset(tokens.pop())"): "in each of two threads",
        },
        right=(
            CLASS.format(token="self.token"),
            "from contextlib import ExitStack, contextmanager\n\n\n@contextmanager\ndef answer(variable, value):\n"
            "    with ExitStack() as stack:\n        stack.callback(variable.reset, variable.set(value))\n"
            "        yield variable",
            MANAGER + LAZY.format("BaseException") + "        raise\n    else:\n        variable.reset(token)",
        ),
    ),
    "07b-2": Exercise(
        kind=Callable,
        judge=_publish,
        wrong={
            "def answer(headers, id):\n    headers.setdefault('my_request_id', id)": "and have become",
            "def answer(headers, id):\n    if id:\n        headers['my_request_id'] = id": "it is overwritten",
            **{
                PUBLISH.format(name): f"the name {name} is taken"
                for name in (
                    *("correlation_id", "timelimit", "args", "compression", "properties", "chord", "callbacks"),
                    *("errbacks", "children", "is_eager", "called_directly", "hostname", "stamps", "lang"),
                )
            },
            "def answer(headers, id):\n    if id:\n        headers = headers | {'my_request_id': id}": "one new name",
            "def answer(headers, id):\n    if id:\n        headers.clear()\n        headers['my_id'] = id": (
                "the header id is gone"
            ),
            PUBLISH.format(7): "should be a text, and this is 7",
        },
        right=(
            "def answer(headers, id):\n    if id is not None and 'X-Shop-Request' not in headers:\n"
            "        headers |= {'X-Shop-Request': id}",
            "answer = lambda headers, id: id and headers.update({'traceparent': headers.get('traceparent', id)})",
        ),
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
