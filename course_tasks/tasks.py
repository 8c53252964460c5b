"""The tasks that the chapters send. A producer needs only their names, which is why each has one of its own."""

import os
import threading
import time
from pathlib import Path

from celery.utils.log import get_task_logger

from course_tasks.celery import app
from course_tasks.spans import Span

logger = get_task_logger(__name__)


@app.task(name="add")
def add(x: float, y: float) -> float:
    """Return ``x + y``."""
    return x + y


@app.task(name="add_long")
def add_long(x: float, y: float, seconds: float = 5) -> float:
    """Return ``x + y`` after ``seconds`` seconds."""
    logger.info("adding %s and %s for %s s", x, y, seconds)
    time.sleep(seconds)
    return x + y


@app.task(name="divide")
def divide(x: float, y: float) -> float:
    """Return ``x / y``; ZeroDivisionError if ``y`` is 0."""
    return x / y


@app.task(name="notify", ignore_result=True)
def notify(text: str) -> None:
    """Write ``text`` to the log. Nobody waits for a result, so none is stored."""
    logger.info("notifying: %s", text)


@app.task(name="flaky", bind=True, max_retries=None)
def flaky(self, failures: int = 1, pause: float = 1) -> int:
    """Fail ``failures`` times, as a service does that is not up yet; return the number of attempts.

    Each failure is retried after ``pause`` seconds. Nothing limits the number of attempts, so that a lesson may choose
    it; a real task should have a limit (``max_retries``).
    """
    if self.request.retries < failures:
        raise self.retry(exc=ConnectionError("the service is not up yet"), countdown=pause)
    return self.request.retries + 1


@app.task(name="count_to", bind=True)
def count_to(self, total: int, pause: float = 0.1) -> int:
    """Count to ``total`` with a pause of ``pause`` seconds before each number, and report each as progress.

    The state is PROGRESS on the way, with ``{"done": n, "total": total}`` in the result's ``info``.
    """
    for done in range(1, total + 1):
        time.sleep(pause)
        self.update_state(state="PROGRESS", meta={"done": done, "total": total})
    return total


@app.task(name="whereami")
def whereami(seconds: float = 0) -> dict[str, int | str]:
    """Take ``seconds`` seconds, and return who ran this: ``pid``, ``parent_pid`` and the ``thread``'s name."""
    time.sleep(seconds)
    return {"pid": os.getpid(), "parent_pid": os.getppid(), "thread": threading.current_thread().name}


@app.task(name="wait")
def wait(seconds: float) -> Span:
    """Do nothing for ``seconds`` seconds, as a task does that waits for an answer from the network.

    Returns who ran it and when.
    """
    start = time.time()
    time.sleep(seconds)
    return _span(seconds, start)


@app.task(name="compute")
def compute(seconds: float) -> Span:
    """Use up ``seconds`` seconds of a processor's time, however long that takes on a busy machine.

    Returns who ran it and when.
    """
    start, delayed, end = time.time(), _delayed(), time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))
    return _span(seconds, start, _delayed() - delayed)


def _span(seconds: float, start: float, delayed: float = 0.0) -> Span:
    return {
        "pid": os.getpid(),
        "thread": threading.current_thread().name,
        "start": start,
        "end": time.time(),
        "delayed": delayed,
        "seconds": seconds,
    }


def _delayed() -> float:
    """Seconds that this thread was ready to run while others had the processors; 0 on systems other than Linux."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError:
        return 0.0
