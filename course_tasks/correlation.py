"""The correlation id: one id for a request, in every line that any worker logs about a task the request caused.

`install(app)` where the app is made, in clients and workers alike; `correlation_id.set(new_id())` where a request
begins. All else follows: a message carries the id of whoever sent it, and a task has the id of its message.
"""

import functools
import logging
import re
import uuid
import weakref
from contextvars import ContextVar

from celery import Celery, signals
from celery.worker.request import Request

correlation_id: ContextVar[str | None] = ContextVar("correlation_id", default=None)
# Not "correlation_id": a message has a property of that name, the task's id, which would win in the worker.
HEADER = "request_correlation_id"
FORMAT = "[%(asctime)s %(levelname)s %(correlation_id)s] %(message)s"
TASK_FORMAT = "[%(asctime)s %(levelname)s %(correlation_id)s] %(task_name)s[%(task_id).8s]: %(message)s"
# What may come from outside: a line break in it would forge lines of the log.
ACCEPTED = re.compile(r"[\w.-]{1,64}", re.ASCII)
# The requests that the worker's main process knows, by their task's ids.
_known: weakref.WeakValueDictionary[str, Request] = weakref.WeakValueDictionary()


def new_id(given: str | None = None) -> str:
    """The id for a new request: the one that its caller has ``given``, if it is fit for a log, else a new one."""
    return given if given and ACCEPTED.fullmatch(given) else uuid.uuid4().hex


def install(app: Celery) -> None:
    """Have `app`'s messages carry the id, its tasks take it over, and every log record have it.

    Sets `worker_log_format` and `worker_task_log_format`, which show it; set them again after this for others.
    Records have the attribute in the whole process, as ``-`` where there is no id: a format that names an attribute
    which a record does not have loses the line.
    """
    app.Task.Request = CorrelatedRequest
    app.conf.update(worker_log_format=FORMAT, worker_task_log_format=TASK_FORMAT)
    signals.before_task_publish.connect(_publish)
    signals.task_prerun.connect(_begin)
    signals.task_postrun.connect(_end)
    factory = logging.getLogRecordFactory()
    if not isinstance(factory, _RecordFactory):
        logging.setLogRecordFactory(_RecordFactory(factory))


def _publish(headers: dict, **_) -> None:
    """In the client, and in a task that sends others: the message takes the id along."""
    if current := correlation_id.get():
        headers.setdefault(HEADER, current)


def _begin(task, **_) -> None:
    """In whatever runs the task: its message's id is current. A task called in place keeps its caller's."""
    request = task.request
    current = request.get(HEADER) or (request.is_eager and correlation_id.get()) or request.root_id
    request.correlation_token = correlation_id.set(current)


def _end(task, **_) -> None:
    # reset, not set(None): a task called in place gives its caller's id back
    correlation_id.reset(task.request.correlation_token)


class _RecordFactory:
    """Makes log records, each with the id that is current, or that of the task which the line is about."""

    def __init__(self, factory):
        self.factory = factory

    def __call__(self, *args, **kwargs) -> logging.LogRecord:
        record = self.factory(*args, **kwargs)
        record.correlation_id = correlation_id.get() or _of_known_task(record) or "-"
        return record


def _of_known_task(record: logging.LogRecord) -> str | None:
    """The id for a line like "Task ... received", which the main process logs when no request is current."""
    about = record.args.get("id") if isinstance(record.args, dict) else None
    request = _known.get(about) if isinstance(about, str) else None
    return request and request.correlation


def _about_it(method):
    """The method of a request, with the request's id current: for what it logs and for the error callbacks it sends."""

    @functools.wraps(method)
    def with_id(self, *args, **kwargs):
        token = correlation_id.set(self.correlation)
        try:
            return method(self, *args, **kwargs)
        finally:
            correlation_id.reset(token)

    return with_id


class CorrelatedRequest(Request):
    """A task in the worker's main process, which logs about it from outside: received, timed out, revoked, retried."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.correlation = self.request_dict.get(HEADER) or self.root_id
        _known[self.id] = self

    on_accepted = _about_it(Request.on_accepted)
    on_timeout = _about_it(Request.on_timeout)
    on_failure = _about_it(Request.on_failure)
    revoked = _about_it(Request.revoked)
    terminate = _about_it(Request.terminate)
    cancel = _about_it(Request.cancel)
