"""The exercises of chapter 07c."""

import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context

from course_tasks.exercises import Exercise, called

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
    record.correlation_id = "ada-7"
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
            "answer = '%(correlation_id)s %(levelname)s %(task_name)s: %(message)s'": "no field 'task_name'",
            "answer = '%(request_correlation_id)s %(levelname)s %(message)s'": "no field 'request_correlation_id'",
            "answer = '{correlation_id} {levelname} {message}'": "that is no format for a log",
            "answer = '%(levelname)s %(correlation_id)s %(message)s'": "and should be 'ada-7 INFO",
            "answer = '%(correlation_id)s %(message)s'": "in which INFO is missing",
        },
    ),
}
