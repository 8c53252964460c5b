"""The chapters' equipment: wait for a condition, run many tasks, ask a worker, follow a log, measure memory."""

import ast
import contextlib
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from celery import Celery
from celery.exceptions import TimeoutError as ResultTimeout
from executing import Source
from IPython import get_ipython
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from course_tasks import spans
from course_tasks.classroom.errors import ClassroomError
from course_tasks.correlation import correlation_id
from course_tasks.spans import FIELDS, Span

if TYPE_CHECKING:
    from celery.result import AsyncResult

T = TypeVar("T")

PAUSE = 0.02  # seconds between two looks at a condition
ANSWER = 1.0  # seconds for the first answer of a worker; then it is asked again, with twice the patience
QUESTIONS = (
    *("stats", "active", "reserved", "scheduled", "revoked", "registered", "active_queues"),
    *("conf", "report", "ping", "clock"),
)


class Spans(list[Span]):
    """Who ran some tasks and when: a list of spans, which also knows what they say about the worker.

    Example:
        >>> spans = run_tasks(client, "wait", args=(0.5,), count=4, queue="threads")
        >>> spans[0]
        {'pid': 4711, 'thread': 'ThreadPoolExecutor-0_0', 'start': ..., 'end': ..., 'delayed': 0.0, 'seconds': 0.5}
        >>> print(f"{spans.wall:.1f} s on {spans.slots} slots, {spans.speedup:.1f} times as fast as one by one")
        0.5 s on 4 slots, 4.0 times as fast as one by one
    """

    @property
    def wall(self) -> float:
        """The wall time: seconds from the start of the first task to the end of the last."""
        return spans.wall(self)

    @property
    def speedup(self) -> float:
        """How many times as fast this was as running the tasks one by one."""
        return spans.speedup(self)

    @property
    def slots(self) -> int:
        """How many slots ran a task: processes, threads, or places for greenlets."""
        return len(spans.slots(self))

    @property
    def at_once(self) -> int:
        """The largest number of tasks that were running at the same time."""
        return spans.at_once(self)


def wait_until(condition: Callable[[], T], seconds: float = 10, what: str = "") -> T:
    """Call a condition again and again until it returns something true.

    Args:
        condition: called with nothing, about fifty times a second. Its own errors pass through.
        seconds: how long to wait at most.
        what: what you are waiting for, for the error message. Without it, the message shows the condition.

    Returns:
        What the condition returned in the end.

    Raises:
        ClassroomError: it didn't return anything true in time, or can't be called.

    Example:
        >>> result = client.send_task("add_long", args=(1, 2, 5))
        >>> wait_until(lambda: result.state == "STARTED", what="the start of the task")
        True
    """
    if not callable(condition):
        advice = "wait_until takes a function, which it calls again and again: write `lambda:` before the condition"
        raise ClassroomError(f"{advice}, as in wait_until(lambda: result.ready()).")
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            about = f"for {what}, but it didn't happen" if what else f"in vain for this: {_condition(sys._getframe(1))}"
            raise ClassroomError(f"Waited {seconds:g} s {about}. Look at the log with %tail.")
        time.sleep(PAUSE)
    return found


def _condition(frame: FrameType) -> str:
    """What the call of `wait_until` in a frame waits for, as its author has written it."""
    call = Source.executing(frame)
    if not isinstance(call.node, ast.Call) or not call.node.args:
        return "its condition"
    condition = call.node.args[0]
    looked = condition.body if isinstance(condition, ast.Lambda) else condition
    return " ".join((ast.get_source_segment(call.source.text, looked) or "its condition").split())


def run_tasks(
    client: Celery, name: str, args: Sequence = (), count: int = 1, queue: str = "celery", timeout: float = 60
) -> Spans:
    """Send some tasks that are all alike, and wait for all of them.

    Args:
        client: the app to send with.
        name: of the task: "wait" or "compute", because these return who ran them and when.
        args: the arguments of each task.
        count: how many tasks to send.
        queue: where to send them.
        timeout: how many seconds to wait for all of them.

    Returns:
        The tasks' spans, in the order in which they were sent.

    Raises:
        ClassroomError: the client is none, a task failed or returned something else, nobody ran it in time, or a server
            is away.

    Example:
        >>> run_tasks(client, "wait", args=(0.5,), count=8, queue="threads").wall
        1.0034
    """
    _check(client)
    if type(count) is not int or count < 1:
        raise ClassroomError(f"count is how many tasks to send, 1 or more, not {count!r}.")
    with _servers_answer():
        results = [client.send_task(name, args=args, queue=queue) for _ in range(count)]
    return _collected(results, timeout, f"queue {queue!r}")


def collect(results: "Iterable[AsyncResult]", timeout: float = 60) -> Spans:
    """Wait for tasks that you have sent yourself.

    Args:
        results: what `send_task` returned, for the tasks "wait" and "compute".
        timeout: how many seconds to wait for all of them.

    Returns:
        The tasks' spans, in the order of their results.

    Raises:
        ClassroomError: a task failed or returned something else, nobody ran it in time, or a server is away.

    Example:
        >>> results = [client.send_task("wait", args=(0.5,)) for _ in range(4)]
        >>> broker.llen("celery")  # look at something while they run
        0
        >>> collect(results).at_once
        2
    """
    return _collected(list(results), timeout, "their queue")


def _collected(results: "list[AsyncResult]", timeout: float, place: str) -> Spans:
    if not results:
        raise ClassroomError("There is nothing to collect: the list of results is empty.")
    found, deadline = Spans(), time.monotonic() + timeout
    for result in results:
        try:
            with _servers_answer():
                value = result.get(timeout=max(deadline - time.monotonic(), 0.01), propagate=False)
        except ResultTimeout:
            done = f"Only {len(found)} of {len(results)} tasks were done after {timeout:g} s."
            raise ClassroomError(
                f"{done} Is a worker running that reads {place}? Look at its log with %tail."
            ) from None
        if result.state != "SUCCESS":
            error = f"{type(value).__name__}: {value}"
            raise ClassroomError(f"Task {result.id} ended as {result.state} ({error}). Look at the log with %tail.")
        if not (isinstance(value, dict) and value.keys() >= FIELDS):
            raise ClassroomError(f"Task {result.id} returned {value!r}. Only the tasks wait and compute return a span.")
        found.append(value)  # type: ignore[arg-type]
    return found


def _check(client: Celery) -> None:
    if not isinstance(client, Celery):
        raise ClassroomError(f"The first argument is the app to send with, such as client = Celery(), not {client!r}.")


@contextlib.contextmanager
def _servers_answer() -> Iterator[None]:
    """Turn the errors of servers that are away into one line."""
    try:
        yield
    except (OperationalError, RedisError, ConnectionError, RuntimeError) as error:  # the last one is the backend's
        trouble = " ".join(str(error).split())
        raise ClassroomError(f"The broker or the backend doesn't answer ({trouble}). Run %servers.") from None


def send_under(client: Celery, id: str, name: str, queue: str = "celery", **options: Any) -> "AsyncResult":
    """Send a task under a correlation id, as a web service does for a request.

    Args:
        client: the app to send with. `course_tasks.correlation.install` has prepared it.
        id: the correlation id. It is this program's id only while the task is sent.
        name: of the task.
        queue: where to send it.
        options: more options of `send_task`, such as `args` or `headers`.

    Returns:
        What `send_task` returns.

    Raises:
        ClassroomError: the client is none, or the broker or the backend is away.

    Example:
        >>> send_under(client, "ada-7", "order", queue="shop").get(timeout=10)
        'Thank you.'
    """
    _check(client)
    token = correlation_id.set(id)
    try:
        with _servers_answer():
            return client.send_task(name, queue=queue, **options)
    finally:
        correlation_id.reset(token)


def ask_worker(client: Celery, name: str, question: str = "stats", seconds: float = 10) -> Any:
    """Ask one worker a question, as `celery inspect` does, until it answers.

    A worker that has only just said "ready." may not hear the first question, so it is asked again.

    Args:
        client: an app on the worker's broker.
        name: the worker's node name. Without an @, this machine's name is added: "w1" is `w1@laptop` here.
        question: a method of `client.control.inspect()` such as "stats", "active", "reserved" or "active_queues".
        seconds: how long to wait for an answer at most.

    Returns:
        The worker's answer. Which kind of thing that is depends on the question; "stats" gives a dictionary.

    Raises:
        ClassroomError: the client is none, there is no such question, nobody answers, or the broker is away.

    Example:
        >>> ask_worker(client, "w1")["pool"]["max-concurrency"]
        2
        >>> ask_worker(client, "w1", "active")
        []
    """
    _check(client)
    if question not in QUESTIONS:
        raise ClassroomError(f"A worker has no answer to {question!r}. You can ask for {', '.join(QUESTIONS)}.")
    node = name if "@" in name else f"{name}@{socket.gethostname()}"
    deadline = time.monotonic() + seconds
    with _servers_answer(), client.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, timeout=seconds)  # else Celery would try to connect for ever
        patience = ANSWER
        while (left := deadline - (begin := time.monotonic())) > 0:
            patience = min(patience, left)
            asked = client.control.inspect([node], timeout=patience, connection=connection, limit=1)
            if answers := getattr(asked, question)():
                return answers[node]
            # What ends the wait early is a late answer to the question before, which Celery drops. If the next question
            # came at once, the answer to this one would be too late in the same way.
            time.sleep(max(0, begin + patience - time.monotonic()))
            patience *= 2
    raise ClassroomError(
        f"No worker called {node} has answered within {seconds:g} s. Is it running? (A solo worker "
        "can't answer while it runs a task, and a gevent or eventlet worker while a task computes.)"
    )


def follow_log(name: str, text: str | re.Pattern[str], times: int = 1, seconds: float = 20) -> list[str]:
    """Wait until a text appears in a terminal cell's log. `%tail NAME --until TEXT` does the same and prints it.

    Args:
        name: of the terminal, as in `%%terminal NAME`.
        text: what to wait for. Give a compiled regular expression if there are several possibilities.
        times: in how many lines it has to appear.
        seconds: how long to wait at most.

    Returns:
        The lines that are new since the last look, up to the last one that was waited for.

    Raises:
        ClassroomError: there is no such terminal, or the text didn't appear often enough.

    Example:
        >>> follow_log("worker", " succeeded in ", times=2)[-1]
        '[12:00:01 INFO] Task add[0d0d8a2e] succeeded in 0.001s: 9'
    """
    shell = get_ipython()
    tail = shell.find_line_magic("tail") if shell else None
    if tail is None:
        raise ClassroomError("follow_log follows a notebook's terminal cells. Run the notebook's first cell first.")
    return tail.__self__.follow(name, text, times, seconds)


def memory(pid: int) -> float:
    """How much memory a process has for itself.

    Args:
        pid: the number of the process.

    Returns:
        Megabytes that it shares with no other process (USS). Where the system doesn't tell that about other
        processes, as on macOS, all the memory that it has in use (RSS).

    Raises:
        ClassroomError: there is no such process.

    Example:
        >>> memory(ask_worker(client, "w1")["pid"])
        48.2
    """
    try:
        process = psutil.Process(int(pid))
        try:
            return process.memory_full_info().uss / 1e6
        except psutil.AccessDenied:
            return process.memory_info().rss / 1e6
    except (psutil.NoSuchProcess, ValueError, TypeError):
        raise ClassroomError(f"There is no process {pid!r}. Has it ended?") from None


def free_port() -> int:
    """Find a TCP port that nothing uses.

    Returns:
        A port of 127.0.0.1 that was free a moment ago. It is below 32768, because the system gives the ports from
        there on to outgoing connections, and one of those might take it before you use it.

    Raises:
        ClassroomError: there is none.

    Example:
        >>> os.environ["PORT"] = str(free_port())
    """
    for port in random.sample(range(15000, 32000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ClassroomError("This machine has no free TCP port from 15000 to 32000. Stop what listens there.")
