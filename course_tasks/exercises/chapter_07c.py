"""The exercises of chapter 07c."""

import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context

from course_tasks.exercises import Exercise, Question, called

PATIENCE = 10  # seconds for a thread that only looks at a variable


def _start(answer: Callable) -> str | None:
    variable: ContextVar[str | None] = ContextVar("variable", default=None)
    seen, done = [], threading.Event()

    def look() -> None:
        seen.extend([variable.get(), threading.current_thread()])
        done.set()

    def call() -> str | None:
        variable.set("ada-7")
        called(answer, look)
        if not done.wait(PATIENCE):
            return "the function is never called. Is the thread started?"
        id, thread = seen
        if thread is threading.current_thread():
            return "the function is called in the thread that calls start, which has to wait for it."
        return None if id == "ada-7" else f"in the new thread the id is {id}: its context is empty."

    return copy_context().run(call)


def _format(answer: str) -> str | None:
    record = logging.LogRecord("celery", logging.INFO, "worker.py", 1, "card refused", None, None)
    record.request_correlation_id = "ada-7"
    try:
        formatter = logging.Formatter(answer)
    except ValueError as error:
        return f"that is no format for a log: {error}."
    try:
        line = formatter.format(record)
    except ValueError as error:
        field = str(error).rpartition(": ")[2]
        return f"the log would be empty: the main process's records have no field {field}."
    if line == "ada-7 INFO card refused":
        return None
    if missing := [part for part in ("ada-7", "INFO", "card refused") if part not in line]:
        return f"a line is {line!r}, in which {missing[0]} is missing."
    return f"a line is {line!r}, and should be 'ada-7 INFO card refused'."


THREADS = "import threading\n\n\ndef answer(function):\n"

EXERCISES = {
    "07c-1": Exercise(
        kind=Callable,
        judge=_start,
        wrong={
            THREADS + "    threading.Thread(target=function).start()": "the id is None",
            "from contextvars import copy_context\n\n\ndef answer(function):\n    copy_context().run(function)": (
                "in the thread that calls start"
            ),
            "from contextvars import copy_context\n"
            + THREADS
            + "    threading.Thread(target=lambda: copy_context().run(function)).start()": "its context is empty",
            THREADS + "    threading.Thread(function).start()": "your function raised AssertionError",
        },
    ),
    "07c-2": Exercise(
        kind=str,
        judge=_format,
        wrong={
            "answer = '%(request_correlation_id)s %(levelname)s %(task_name)s: %(message)s'": "no field 'task_name'",
            "answer = '%(correlation_id)s %(levelname)s %(message)s'": "no field 'correlation_id'",
            "answer = '{request_correlation_id} {levelname} {message}'": "that is no format for a log",
            "answer = '%(levelname)s %(request_correlation_id)s %(message)s'": "and should be 'ada-7 INFO",
            "answer = '%(request_correlation_id)s %(message)s'": "in which INFO is missing",
        },
    ),
}

QUIZ = {
    "07c-1": Question(
        right="b",
        wrong={
            "a": "then the tasks' own lines would be missing as well, because they are at level INFO.",
            "c": "this is the format of the task loggers, and their lines are the ones that are still there.",
            "d": "a message without the header doesn't make any line disappear. Another id takes its place.",
        },
    ),
    "07c-2": Question(
        right=("2", "two"),
        wrong={
            "26": "that is the number of tasks. The tasks of one order don't have different correlation ids.",
            "13": "that is the number of tasks of one order. They don't have different correlation ids.",
            "1": "nothing connects the two calls of `order`, so they can't have the same id.",
            "one": "nothing connects the two calls of `order`, so they can't have the same id.",
            "0": "the lines don't have `-` there. If a client gives no id, another one stands in.",
        },
        otherwise='answer with a number, for example "7".',
    ),
    "07c-3": Question(
        right="d",
        wrong={
            "a": "something else in the message has the same name, and it wins over the header.",
            "b": "the worker fills this field for every task that a Celery client sends.",
            "c": "the request's id travels in another header, `request_correlation_id`.",
        },
    ),
    "07c-4": Question(
        right="a",
        wrong={
            "b": "the child can't log any more, but it wasn't the only process that knew the task.",
            "c": "the new child process knows nothing about the tasks of the old one.",
            "d": (
                "the acknowledgement only tells the broker to forget the message. It says nothing about how the "
                "task ended."
            ),
        },
    ),
}
