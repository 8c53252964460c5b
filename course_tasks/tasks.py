"""The tasks that the chapters send. A producer needs only their names, which is why each has one of its own."""

import time

from celery.utils.log import get_task_logger

from course_tasks.celery import app

logger = get_task_logger(__name__)


@app.task(name="add")
def add(x: float, y: float) -> float:
    """Return ``x + y``."""
    return x + y


@app.task(name="add_long")
def add_long(x: float, y: float, seconds: float = 5) -> float:
    """Return ``x + y`` after ``seconds`` seconds, passed in naps of a tenth of a second.

    A nap leaves the processor to others, and in a green pool the other tasks run.
    """
    logger.info("adding %s and %s for %s s", x, y, seconds)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(0.1, left))
    return x + y
