"""The correlation id: one id for all the tasks that a request causes, in each record that is logged about them.

`install(app)` where the app is made, in clients and workers alike; `correlation_id.set(new_id())` where a request
begins. All else follows: a message carries the id of whoever sent it, a task has the id of its message, and a worker
has it in all that it logs about either, even if the message never becomes a task.

These records have a ``-`` in place of the id:

- those of a thread or a greenlet that a task has started, unless it runs in a copy of the task's context,
  ``copy_context().run(function)``. An asyncio task does so by itself;
- those that a worker logs when it obeys remote control ("Tasks flagged as revoked"), about its child processes, after
  a task's end ("Process cleanup failed", "Exception raised outside body"), in its event loop ("Couldn't ack"), about a
  message that it can't decompress, and some at level DEBUG;
- those of beat: each task that it sends begins a trail of its own.

What a task prints becomes a record only if Celery redirects it (``worker_redirect_stdouts``, and no receiver of
``setup_logging``). Of a record with a traceback only the first line has the id; a formatter for JSON makes it one line.
"""

import contextlib
import functools
import logging
import os
import re
import uuid
from contextvars import ContextVar

from celery import Celery, Task, signals
from celery.worker.consumer import Consumer
from celery.worker.request import Request

correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)
# The id's name in messages and in log records. Not "correlation_id": a message has a property of that name, the task's
# id, which would win in the worker; and a log call of others with extra={"correlation_id": ...} would raise an error.
HEADER = "request_correlation_id"
FORMAT = "[%(asctime)s %(levelname)s %(request_correlation_id)s] %(message)s"
TASK_FORMAT = "[%(asctime)s %(levelname)s %(request_correlation_id)s] %(task_name)s[%(task_id).8s]: %(message)s"
# What may come from outside: a line break in it would forge lines of the log, and "-" is the sign for no id.
ACCEPTED = re.compile(r"\w[\w.-]{0,63}", re.ASCII)


def new_id(given: str | None = None) -> str:
    """The id for a new request: the one that its caller has ``given``, if it is fit for a log, else a new one."""
    return _fit(given) or uuid.uuid4().hex


def install(app: Celery) -> None:
    """Have messages carry the id, tasks take it over, and log records have it.

    Sets `app`'s ``worker_log_format`` and ``worker_task_log_format``, which show it (set them again after this for
    others), and ``worker_consumer``. All else is for the whole process, whatever its apps, loggers and handlers: each
    record has the attribute ``request_correlation_id``, as ``-`` where there is no id, for a format that names an
    attribute which a record does not have loses the line. A task with a class of its own for its requests keeps it;
    derive that class from `CorrelatedRequest`.
    """
    app.conf.update(worker_log_format=FORMAT, worker_task_log_format=TASK_FORMAT, worker_consumer=CorrelatedConsumer)
    Task.Request = CorrelatedRequest  # not app.Task's: a base class of one's own derives from this
    signals.before_task_publish.connect(_publish)
    signals.task_prerun.connect(_begin)
    signals.task_postrun.connect(_end)
    signals.worker_before_create_process.connect(_unformat)
    signals.worker_process_init.connect(_forget)
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _RecordFactory):
        logging.setLogRecordFactory(_RecordFactory(factory))


def _fit(given: object) -> str | None:
    """What is ``given``, if it is fit for a log."""
    return given if isinstance(given, str) and ACCEPTED.fullmatch(given) else None


def _id_of(headers: dict | None, *stand_ins: str | None) -> str | None:
    """The id in a message's headers; for want of one that is fit for a log, the first of the others, made fit."""
    stand_in = next((str(other) for other in stand_ins if other), None)
    return _fit((headers or {}).get(HEADER)) or (stand_in and re.sub(r"[^\w.-]", "_", stand_in, flags=re.ASCII)[:64])


def _publish(headers: dict, **_) -> None:
    """In the client, and in a task that sends others: the message takes the id along."""
    if current := correlation_id.get():
        headers.setdefault(HEADER, current)


def _begin(task, **_) -> None:
    """In whatever runs the task: its message's id is current. A task called in place keeps its caller's."""
    request = task.request
    caller = correlation_id.get() if request.is_eager else None
    current = _id_of(request.headers, caller, request.root_id, request.correlation_id, request.id)
    request.correlation_token = correlation_id.set(current)


def _end(task, **_) -> None:
    # reset, not set(None): a task called in place gives its caller's id back
    if token := task.request.get("correlation_token"):
        correlation_id.reset(token)


def _unformat(**_) -> None:
    """Before a child process: if it is spawned, as on macOS, it logs before it has imported all this."""
    os.environ.pop("_MP_FORK_LOGFORMAT_", None)


def _forget(**_) -> None:
    """In a child process: if it is forked while a message is taken, it has a copy of the message's id."""
    correlation_id.set(None)


class _RecordFactory:
    """Makes log records, each with the id that is current."""

    def __init__(self, factory):
        self.factory = factory

    def __call__(self, *args, **kwargs) -> logging.LogRecord:
        record = self.factory(*args, **kwargs)
        record.request_correlation_id = correlation_id.get() or "-"
        return record


@contextlib.contextmanager
def _current(id: str | None):
    """A block with this id, and afterwards the one from before."""
    token = correlation_id.set(id)
    try:
        yield
    finally:
        correlation_id.reset(token)


class CorrelatedConsumer(Consumer):
    """What takes the messages in a worker's main process, each with its id: "received", or that it can't be a task."""

    def create_task_handler(self, *args, **kwargs):
        """Wrap the function that Celery calls with each message."""
        handle = super().create_task_handler(*args, **kwargs)

        def with_id(message):
            headers, task_id = message.headers, message.properties.get("correlation_id")
            with _current(_id_of(headers, headers.get("root_id"), task_id, headers.get("id"))):
                return handle(message)

        return with_id


def _about_it(method):
    """The method of a request, with the request's id current: for what it logs and for the error callbacks it sends."""

    @functools.wraps(method)
    def with_id(self, *args, **kwargs):
        with _current(self.correlation):
            return method(self, *args, **kwargs)

    return with_id


class CorrelatedRequest(Request):
    """A task in the worker's main process, which logs about it from outside: timed out, lost, revoked, retried."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.correlation = correlation_id.get()  # that of the message which is being taken

    on_accepted = _about_it(Request.on_accepted)
    on_timeout = _about_it(Request.on_timeout)
    on_failure = _about_it(Request.on_failure)
    revoked = _about_it(Request.revoked)
    terminate = _about_it(Request.terminate)
    cancel = _about_it(Request.cancel)
