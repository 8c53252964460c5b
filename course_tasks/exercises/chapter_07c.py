"""The exercises of chapter 07c."""

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path

from course_tasks.correlation import HEADER, correlation_id
from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project

PATIENCE = 10  # seconds for a thread that only looks at a variable
CUSTOMERS = 4
# what threads start with a copy of the context in, as builds of Python 3.14 without a GIL do
INHERITS = bool(getattr(sys.flags, "thread_inherit_context", False))


def _start(answer: Callable) -> str | None:
    seen: list[tuple[str | None, threading.Thread]] = []

    def look() -> None:
        seen.append((correlation_id.get(), threading.current_thread()))

    def call() -> str | None:
        for caller in ("ada-7", "ben-8", None):
            seen.clear()
            correlation_id.set(caller)
            before, deadline = {*threading.enumerate()}, time.monotonic() + PATIENCE
            called(answer, look)
            while not seen and {*threading.enumerate()} - before and time.monotonic() < deadline:
                time.sleep(0.005)
            if not seen:
                return "the function is never called. Is the thread started?"
            id, thread = seen[0]
            if thread is threading.current_thread():
                return "the function is called in the thread that calls start, not in a new one."
            if id != caller:
                return f"the caller's id is {caller!r}, and in the new thread it is {id!r}."
            if correlation_id.get() != caller:
                return f"the caller's id was {caller!r}, and after start it is {correlation_id.get()!r}."
        return None

    return copy_context().run(call)


def _format(answer: str) -> str | None:
    said: list[str] = []
    for id, level, message, args in (
        ("ada-7", "INFO", "card of %s refused", ("Ada",)),
        ("ben-8", "WARNING", "no lamp", None),
        ("ben-8", "WARNING", "no lamp", None),
    ):
        record = logging.LogRecord("celery", logging.getLevelName(level), "worker.py", 1, message, args, None)
        record.request_correlation_id = id
        record.created += 4000.5 * len(said)  # seconds
        record.relativeCreated += 4000.5 * len(said)
        record.msecs = 7 * len(said)
        try:
            line = logging.Formatter(answer).format(record)
        except (ValueError, TypeError) as error:
            field = str(error).rpartition(": ")[2]
            if "not found" in str(error):
                return f"these lines would be missing: the records of the main process have no field {field}."
            return f"that is no format for a log: {error}."
        said.append(line)
        parts = id, level, record.getMessage()
        if missing := [part for part in parts if part not in line]:
            return f"a line is {line!r}, in which {missing[0]!r} is missing."
        places = [line.index(part) for part in parts]
        if places != sorted(places):
            return f"a line is {line!r}. First comes the id, then the level, and then the message."
    if said[1] != said[2]:
        return f"a line is {said[2]!r}, in which a time is left."
    return None


def _mails(folder: str) -> str | None:
    probe = Path(folder) / "probe.py"
    orders = {f"customer{number}": f"order-{number}" for number in range(CUSTOMERS)}
    with Project(folder) as project:
        probe.write_text(PROBE)
        try:
            project.worker("celery -A probe worker --pool=threads --without-mingle --without-gossip")
        finally:
            probe.unlink()
        client = project.client()
        for customer, id in orders.items():
            client.send_task("order", args=(customer,), headers={HEADER: id}, ignore_result=True)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            lines = project.log().splitlines()
            mails = [line for line in lines if "mail to customer" in line]
            ended = [line for line in lines if " succeeded in " in line]
            failed = [line for line in lines if " raised unexpected: " in line]
            if failed or (len(ended) >= CUSTOMERS and len(mails) >= CUSTOMERS):
                break
            if any("Exception in thread" in line for line in lines):  # that mail will never come
                break
            time.sleep(0.02)
        if failed:
            return f"an order has failed: {failed[0].partition(' raised unexpected: ')[2]}."
    tasks = {line.partition("|")[0] for line in ended}  # the threads that run tasks
    for customer, id in orders.items():
        found = [line for line in mails if f"mail to {customer} refused" in line]
        if len(found) != 1:
            return f"the log should have one line `mail to {customer} refused`, and has {len(found)}."
        thread, _, line = found[0].partition("|")
        given = line.partition("]")[0].split()[-1]
        if given == "-":
            return f"the line about the mail to {customer} has no id: {line}."
        if given != id:
            return f"the mail to {customer} belongs to {id}, and its line has the id {given}."
        if thread in tasks:
            return "the mail is sent in the thread of the task, which has to wait for it."
    return None


# The project's app, with the name of its thread at the beginning of each line.
PROBE = """
from course_tasks.correlation import FORMAT
from shop import app

app.conf.worker_log_format = "%(threadName)s|" + FORMAT
"""
THREADS = "import threading\n\n\ndef answer(function):\n"
COPY = "from contextvars import copy_context\n"
MAIL = """%%writefile scratch/mails/mail.py
import logging
import threading
from contextvars import copy_context

from course_tasks.correlation import correlation_id

log = logging.getLogger("mail")

def send(customer):
    {}

def deliver(customer{}):
    {}log.warning("mail to %s refused", customer)
"""

EXERCISES = {
    "07c-1": Exercise(
        kind=Callable,
        judge=_start,
        wrong={
            **(
                {}
                if INHERITS
                else {THREADS + "    threading.Thread(target=function).start()": "in the new thread it is None"}
            ),
            COPY + "\n\ndef answer(function):\n    copy_context().run(function)": "in the thread that calls start",
            **(
                {}
                if INHERITS
                else {
                    COPY + THREADS + "    threading.Thread(target=lambda: copy_context().run(function)).start()": (
                        "the caller's id is 'ada-7', and in the new thread it is None"
                    )
                }
            ),
            THREADS + "    threading.Thread(function).start()": "your function raised AssertionError",
            COPY + THREADS + "    threading.Thread(target=copy_context().run, args=(function,))": "never called",
            "from course_tasks.correlation import correlation_id\n" + THREADS + "    def run():\n"
            "        correlation_id.set('ada-7')\n        function()\n\n    threading.Thread(target=run).start()": (
                "the caller's id is 'ben-8', and in the new thread it is 'ada-7'"
            ),
            COPY
            + "from course_tasks.correlation import correlation_id\n"
            + THREADS
            + "    threading.Thread(target=copy_context().run, args=(function,)).start()\n"
            "    correlation_id.set('-')": "after start it is '-'",
        },
        right=(
            "from course_tasks.correlation import correlation_id\n" + THREADS + "    id = correlation_id.get()\n\n"
            "    def run():\n        correlation_id.set(id)\n        function()\n\n"
            "    threading.Thread(target=run, daemon=True).start()",
            COPY + "from concurrent.futures import ThreadPoolExecutor\n\n\ndef answer(function):\n"
            "    ThreadPoolExecutor(1).submit(copy_context().run, function)",
            COPY + "import threading\n\n\nclass Carried(threading.Thread):\n    def __init__(self, function):\n"
            "        super().__init__()\n        self.function, self.context = function, copy_context()\n\n"
            "    def run(self):\n        self.context.run(self.function)\n\n\n"
            "answer = lambda function: Carried(function).start()",
        ),
    ),
    "07c-2": Exercise(
        kind=str,
        judge=_format,
        wrong={
            "answer = '%(request_correlation_id)s %(levelname)s %(task_name)s: %(message)s'": "no field 'task_name'",
            "answer = '%(correlation_id)s %(levelname)s %(message)s'": "no field 'correlation_id'",
            "answer = '{request_correlation_id} {levelname} {message}'": "that is no format for a log",
            "answer = '%(levelname)s %(request_correlation_id)s %(message)s'": "First comes the id",
            "answer = '%(request_correlation_id)s %(message)s'": "in which 'INFO' is missing",
            "answer = '%(request_correlation_id)s %(levelname)s %(msg)s'": "in which 'card of Ada refused' is missing",
            "answer = '%(request_correlation_id)s %(levelname)s %(message)s (%(asctime)s)'": "a time is left",
            "answer = 'ada-7 INFO %(message)s'": "in which 'ben-8' is missing",
        },
        right=(
            "answer = '[%(request_correlation_id)-12s | %(levelname)-8s]\\t%(message)s'",
            "answer = ' - '.join(f'%({name})s' for name in ('request_correlation_id', 'levelname', 'message'))",
            "answer = 'id=%(request_correlation_id)s: %(levelname)s: %(message)s'",
        ),
    ),
    "07c-3": Exercise(
        kind=str,
        judge=_mails,
        project="scratch/mails",
        wrong={
            MAIL.format("threading.Thread(target=lambda: copy_context().run(deliver, customer)).start()", "", ""): (
                "has no id"
            ),
            MAIL.format("copy_context().run(deliver, customer)", "", ""): "in the thread of the task",
            MAIL.format(
                "threading.Thread(target=deliver, args=(customer,)).start()", "", 'correlation_id.set("order-0")\n    '
            ): "belongs to order-1",
            MAIL.format("threading.Thread(target=copy_context().run, args=(deliver,)).start()", "", ""): (
                "should have one line"
            ),
            MAIL.format("threading.Thread(target=copy_context.run, args=(deliver, customer)).start()", "", ""): (
                "an order has failed: AttributeError"
            ),
        },
        right=(
            MAIL.format(
                "threading.Thread(target=deliver, args=(customer, correlation_id.get())).start()",
                ", id",
                "correlation_id.set(id)\n    ",
            ),
            MAIL.format(
                "threading.Thread(target=lambda c: c.run(deliver, customer), args=[copy_context()]).start()", "", ""
            ),
        ),
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
            "22": "that is the number of tasks. The tasks of one order don't have different correlation ids.",
            "11": "that is the number of tasks of one order. They don't have different correlation ids.",
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
