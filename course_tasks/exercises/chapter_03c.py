"""The exercises and the quiz of chapter 03c."""

from typing import Any

from celery import Celery
from celery.app.task import Task

from course_tasks.exercises import Exercise, Question, called

LONGEST, DAY, HOUR = 40 * 60, 24 * 60 * 60, 60 * 60  # seconds


def _bill(answer: Task) -> str | None:
    if answer.name != "bill":
        return f"its name is {answer.name}: without name= Celery makes one from the module and the function."
    survives_child = answer.reject_on_worker_lost or answer.retry_on_worker_lost
    if not answer.acks_late:
        too = "" if survives_child else ", and if its child process dies, too"
        return f"it is acknowledged before it runs, so it is lost if its worker is killed{too}."
    if not survives_child:
        return "it survives the death of the whole worker, but if only its child process dies, it fails."
    if answer.retry_on_worker_lost and answer.max_retries == 0:
        return "with max_retries=0, it isn't tried again if its child process dies."
    for customer in ("Ada", "Ben"):
        value = called(answer, customer, case=f'for bill("{customer}"), ')
        if value != customer:
            return f'bill("{customer}") returns {value!r}, and it should return the customer.'
    return None


def _reports(answer: Celery) -> str | None:
    settings = answer.conf
    options: dict[str, Any] = settings.broker_transport_options or {}
    timeout = options.get("visibility_timeout", HOUR)
    ahead = 1 if settings.worker_disable_prefetch else settings.worker_prefetch_multiplier
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        return f"the visibility timeout is {timeout!r}. It should be a number of seconds."
    minutes = f"the visibility timeout is {timeout / 60:g} minutes"
    if "visibility_timeout" not in options:
        minutes = "the visibility timeout is still the default, an hour: it isn't in broker_transport_options"
    if timeout <= LONGEST:
        return f"{minutes}, so the longest report is put back while it is being written."
    if not isinstance(ahead, int) or ahead < 1:
        return f"with a worker_prefetch_multiplier of {ahead!r}, a worker takes any number of messages ahead."
    if timeout <= ahead * LONGEST:
        return (
            f"{minutes}. A worker takes up to {ahead} messages for each process, and the last of them may wait for "
            f"{ahead - 1} others, so with its own 40 minutes it can take {ahead * 40} minutes."
        )
    if timeout + LONGEST > DAY:
        return f"{minutes}. If a worker dies, its reports are put back only after that time, which is too late."
    return None


BILL = "app = Celery('billing')\n\n\n@app.task({})\ndef bill(customer):\n    {}\n\n\nanswer = bill"
REPORTS = 'app = Celery("reports", broker="redis://localhost:6379/0")\n{}\nanswer = app'


def _with(*lines: str) -> str:
    return REPORTS.format("\n".join(lines))


EXERCISES = {
    "03c-1": Exercise(
        kind=Task,
        judge=_bill,
        wrong={
            BILL.format('name="bill"', "return customer"): "its child process dies, too",
            BILL.format('name="bill", acks_late=True', "return customer"): "if only its child process dies, it fails",
            BILL.format('name="bill", reject_on_worker_lost=True', "return customer"): "if its worker is killed.",
            BILL.format("acks_late=True, reject_on_worker_lost=True", "return customer"): "without name=",
            BILL.format('name="bill", acks_late=True, reject_on_worker_lost=True', "pass"): "returns None",
            BILL.format('name="bill", acks_late=True, reject_on_worker_lost=True', 'return "Ada"'): (
                "bill(\"Ben\") returns 'Ada'"
            ),
            "def bill(customer):\n    return customer\n\n\nanswer = bill": "should be a task",
        },
        right=(
            BILL.format('name="bill", bind=True, acks_late=True, retry_on_worker_lost=True', "return customer").replace(
                "(customer)", "(self, customer)"
            ),
            "app = Celery('billing')\napp.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)\n\n\n"
            "@app.task(name='bill')\ndef bill(customer):\n    return customer\n\n\nanswer = bill",
        ),
    ),
    "03c-2": Exercise(
        kind=Celery,
        judge=_reports,
        wrong={
            _with(): "is still the default, an hour",
            _with("app.conf.visibility_timeout = 14400"): "it isn't in broker_transport_options",
            _with('app.conf.broker_transport_options = {"visibility_timeout": 40}'): "while it is being written",
            _with('app.conf.broker_transport_options = {"visibility_timeout": 9000}'): "may wait for 3 others",
            _with('app.conf.broker_transport_options = {"visibility_timeout": 7 * 86400}'): "which is too late",
            _with('app.conf.broker_transport_options = {"visibility_timeout": "4h"}'): "should be a number of seconds",
            _with("app.conf.worker_prefetch_multiplier = 0"): "any number of messages ahead",
            'answer = {"visibility_timeout": 14400}': "this is a dictionary",
        },
        right=(
            _with("app.conf.worker_prefetch_multiplier = 1"),
            _with('app.conf["broker_transport_options"] = dict(visibility_timeout=12 * 3600.0)'),
            _with("app.conf.update(worker_disable_prefetch=True)"),
        ),
    ),
}

QUIZ = {
    "03c-1": Question(
        right="c",
        wrong={
            "a": "a worker stores `STARTED` when it begins a task. A task that waits for a worker is `PENDING`.",
            "b": "an expired record is gone, and the state would be `PENDING`.",
            "d": (
                "this happens to messages that are not acknowledged yet. By default, the message of a running task is."
            ),
        },
    ),
    "03c-2": Question(
        right="b",
        wrong={
            "a": "a warm stop does wait for the running task, but here it gets only ten seconds.",
            "c": (
                "a worker gives back messages that it hasn't acknowledged. By default, a running task's message "
                "isn't one of them."
            ),
            "d": "a process can't ignore SIGKILL, because the system itself ends the process.",
        },
    ),
    "03c-3": Question(
        right="d",
        wrong={
            "a": "the message was not acknowledged yet, so the broker still has a copy of it.",
            "b": "Celery doesn't know how far a function has come, so it can't go on in the middle of it.",
            "c": "the first worker had no time to store a state, and the second one doesn't watch over the first.",
        },
    ),
    "03c-4": Question(
        right="c",
        wrong={
            "a": "that needs one more option, `reject_on_worker_lost=True`.",
            "b": "the main process is alive and has acknowledged the message, so no copy is left.",
            "d": "the main process is still there, and it stores what has happened.",
        },
    ),
}
