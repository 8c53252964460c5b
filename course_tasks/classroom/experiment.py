"""`Experiment`: choose a pool and tasks, run them on a real worker, compare the runs; in a widget or without it."""

import atexit
import contextlib
import html
import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import ipywidgets as widgets
from celery import Celery
from IPython import get_ipython
from kombu.pidbox import Mailbox
from redis import Redis
from redis.exceptions import RedisError

from course_tasks.celery import app as course
from course_tasks.classroom.broker_view import PRIORITIES
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.gantt import Gantt
from course_tasks.classroom.terminal import READY, Terminal, plain
from course_tasks.classroom.toolkit import Spans
from course_tasks.servers import VARIABLES

CHOICES = {"pool": ("solo", "prefork", "threads", "gevent", "eventlet"), "kind": ("wait", "compute")}
LIMITS = {"concurrency": (1, 50), "tasks": (1, 100), "seconds": (0.05, 5)}
LONGEST = 20  # seconds that a run may take, by its settings
PREFIX = "experiment-"  # of the names of its queues, which are those of its nodes too
COMMAND = (
    "python -m celery -A course_tasks worker --loglevel=INFO --pool={} --concurrency={} -Q {queue} -n {queue}@%h "
    "--without-mingle --without-gossip"
)
START, ANSWER, END = 60.0, 5.0, 10.0  # seconds for a worker to be ready, a server to answer, a worker to be killed
TIMES = ("broker_transport_options", "redis_socket_timeout", "result_backend_transport_options")
PIDBOX = "_kombu.binding.celery.pidbox"  # where kombu has the names of the workers' queues for orders
SHOWN = 4  # runs in the picture and the table
HERE = "Run this cell: the controls of an experiment will appear here, and later what it finds."
GOING = "A run is in progress. Wait for its end."
STYLE = "font-size:var(--jp-code-font-size);color:var(--jp-content-font-color1);"
CODE = STYLE + "white-space:pre-wrap;margin:0;padding:4px 10px;background:var(--jp-layout-color2)"
CELL = "padding:2px 10px;text-align:left;border-bottom:1px solid var(--jp-border-color2)"


@dataclass(frozen=True)
class Run:
    """What was asked for, the command of the worker that did it, and what its tasks returned."""

    pool: str
    concurrency: int
    tasks: int
    kind: str
    seconds: float
    command: str
    spans: Spans = field(repr=False)

    wall = property(lambda self: self.spans.wall, doc="Seconds from the first start to the last end.")
    speedup = property(lambda self: self.spans.speedup, doc="How many times as fast as on one idle slot.")
    slots = property(lambda self: self.spans.slots, doc="How many slots had a task.")

    def _chart(self) -> Gantt:
        return Gantt({f"{self.pool}, -c {self.concurrency}, {self.kind} {self.seconds:g} s": self.spans})

    def __repr__(self) -> str:
        return repr(self._chart())

    def _repr_html_(self) -> str:
        return self._chart()._repr_html_()


def check_settings(pool, concurrency, tasks, kind, seconds) -> None:
    """Raise a ClassroomError for the first setting that can't be used."""
    for name, value in {"pool": pool, "kind": kind}.items():
        if value not in CHOICES[name]:
            raise ClassroomError(f"{name} is one of {', '.join(CHOICES[name])}, not {value!r}.")
    for name, value in {"concurrency": concurrency, "tasks": tasks, "seconds": seconds}.items():
        low, high = LIMITS[name]
        whole = type(value) is int or (name == "seconds" and type(value) is float)
        if not whole or not low <= value <= high:
            number = "number" if name == "seconds" else "whole number"
            raise ClassroomError(f"{name} is a {number} from {low} to {high}, not {value!r}.")
    ways = 1 if kind == "compute" or pool == "solo" else concurrency
    if (least := math.ceil(tasks / ways) * seconds) > LONGEST:
        raise ClassroomError(f"That may take {least:g} s, and a run has {LONGEST}: choose fewer or shorter tasks.")


def measure(settings: dict, begun: Callable[[str], None], done: Callable[[int], None]) -> Run:
    """Start a worker, have it run the tasks, end it, and leave nothing in the broker and the backend.

    Args:
        settings: the arguments of `Experiment.run`.
        begun: called with the worker's command when it starts.
        done: called with the number of tasks that are done: 0 when the worker is ready.

    Raises:
        ClassroomError: a setting can't be used, a server is away, or the worker has ended.
    """
    check_settings(**settings)
    queue, tasks, seconds = f"{PREFIX}{uuid.uuid4().hex[:6]}", settings["tasks"], settings["seconds"]
    command = COMMAND.format(settings["pool"], settings["concurrency"], queue=queue)
    try:
        with _connected(queue) as (server, client, sent), _working(queue, command, server) as terminal:

            def alive() -> None:
                server.ping()
                if not terminal.running:
                    last = next(filter(str.strip, map(plain, reversed(terminal.lines()))), "It wrote nothing.")
                    raise ClassroomError(f"The worker has ended. Its last line: {last.strip()}")

            begun(command)
            if not terminal.wait(lambda: terminal.ready_at is not None or not terminal.running, START):
                raise ClassroomError(f"The worker was not ready within {START:g} s.")
            alive()
            done(0)
            with client.connection_for_write() as connection:
                for _ in range(tasks):
                    task = client.send_task(settings["kind"], (seconds,), queue=queue, connection=connection)
                    sent.append(task.id)
            # a green pool may look for messages every 2 s only, and computing may have half a processor
            patience, spans = START + tasks * (4 * seconds + 3), []
            for _, meta in client.backend.get_many(sent, patience, interval=0.1, on_interval=alive):
                if meta["status"] != "SUCCESS":
                    raise ClassroomError(f"A task ended with {meta['status']}: {meta['result']!r}")
                spans.append(meta["result"])
                done(len(spans))
        return Run(**settings, command=command, spans=Spans(sorted(spans, key=lambda span: span["start"])))
    except ClassroomError:
        raise
    except Exception as error:  # of redis, kombu, celery or the system: whatever a server does that goes away
        trouble = " ".join(str(error).split()).rstrip(".")
        raise ClassroomError(f"The run broke off: {trouble}. Is %servers still right?") from None


@contextlib.contextmanager
def _connected(queue: str):
    """The broker, a client with the course's time limits, and a list for the ids of tasks.

    At the end neither leaves a connection behind, nor the tasks a result.
    """
    for role, variable in VARIABLES.items():
        try:
            options = {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER, "decode_responses": True}
            with Redis.from_url(os.environ[variable], **options) as server:
                server.ping()
        except (KeyError, ValueError, RedisError):
            raise ClassroomError(f"The {role} does not answer. Run %servers first.") from None
    client = Celery("experiment", set_as_current=False)
    client.conf.update({name: course.conf[name] for name in TIMES})
    # as long as a queue's name is that of a connection too, no other experiment clears it away
    with Redis.from_url(os.environ[VARIABLES["broker"]], client_name=queue, **options) as server:
        _sweep(server, client)
        sent: list[str] = []
        try:
            yield server, client, sent
        finally:
            with contextlib.suppress(RedisError):
                for name in sent:
                    client.backend.forget(name)
                client.backend.result_consumer.stop()
            client.backend.client.connection_pool.disconnect()
            client.close()


@contextlib.contextmanager
def _working(queue: str, command: str, server: Redis):
    """The worker at work. It is killed at the end, when all is done: a green pool's warm stop takes 4 s."""
    terminal = Terminal(queue, command, re.compile(READY))

    def end() -> None:
        terminal.order(b"k")
        terminal.wait(lambda: not terminal.running, END)
        with contextlib.suppress(RedisError):
            _clear(server, queue)

    atexit.register(end)
    try:
        yield terminal
    finally:
        end()
        atexit.unregister(end)


def _clear(server: Redis, queue: str) -> None:
    """Remove from the broker what a killed worker has left there, all of which has its queue's name."""
    for tag, message in server.hgetall("unacked").items():
        if json.loads(message)[2] == queue:
            server.hdel("unacked", tag)
            server.zrem("unacked_index", tag)
    keys = [f"_kombu.binding.{queue}", f"_kombu.binding_permanent.{queue}"]
    server.delete(*keys, *(f"{queue}{priority}" for priority in PRIORITIES))
    for member in server.smembers(PIDBOX):
        if f"\x16{queue}@" in member:
            server.srem(PIDBOX, member)


def _sweep(server: Redis, client: Celery) -> None:
    """Clear what experiments of killed kernels have left, but no queue that a worker answers for."""
    left = {key.rpartition(".")[2] for key in server.scan_iter(f"_kombu.binding*.{PREFIX}*")}
    left -= {connection["name"] for connection in server.client_list()}
    if left:
        with client.connection_for_write() as connection:  # not the pool's, which would stay open
            answers = Mailbox("celery", type="fanout", accept=["json"])(connection).multi_call("ping", timeout=1)
            nodes = {node for answer in answers for node in answer}
        for queue in left - {node.partition("@")[0] for node in nodes}:
            _clear(server, queue)


class Experiment:
    """A widget that runs tasks on workers and compares the runs; `run` does the same without the widget."""

    def __init__(self):
        self.runs: list[Run] = []
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None
        self._ended = 0.0  # when the last run was over
        # JupyterLab takes the arrow keys and many letters from all but text fields: a drop-down list and a slider
        # can't be used with the keyboard there
        choice, number, fraction = widgets.ToggleButtons, widgets.BoundedIntText, widgets.BoundedFloatText
        wide = {"style": {"description_width": "6em", "button_width": "7em"}}
        narrow = {"style": {"description_width": "initial"}, "layout": {"width": "max-content"}}
        most = {name: high for name, (_, high) in LIMITS.items()}
        self.controls = {
            "pool": choice(description="Pool", options=CHOICES["pool"], value="threads", **wide),
            "kind": choice(description="Kind of task", options=CHOICES["kind"], **wide),
            "concurrency": number(4, description="Concurrency", min=1, max=most["concurrency"], **narrow),
            "tasks": number(10, description="Tasks", min=1, max=most["tasks"], **narrow),
            "seconds": fraction(0.2, description="Seconds each", min=0.05, max=most["seconds"], step=0.05, **narrow),
        }
        for control in self.controls.values():
            control.observe(self._chosen, "value")
        self.button = widgets.Button(description="Run", button_style="primary")
        self.button.on_click(self._clicked)
        self.progress = widgets.IntProgress(description="Progress")
        self.status, self._command, self._result = (widgets.HTML() for _ in range(3))
        self._chosen()
        wrap = {"flex_flow": "row wrap", "align_items": "center"}
        pool, kind, *numbers = self.controls.values()
        rows = [widgets.Box(row, layout=wrap) for row in (numbers, [self.button, self.progress, self.status])]
        self.widget = widgets.VBox([pool, kind, *rows, self._command, self._result])

    def __repr__(self) -> str:
        return HERE

    def _repr_mimebundle_(self, **_) -> dict:
        # a saved widget is an error message when its kernel has gone: `record` stores the text alone
        text = {"text/plain": HERE, "text/html": f'<p style="{STYLE}">{HERE}</p>'}
        return self.widget._repr_mimebundle_() | text

    def run(self, pool="threads", concurrency=4, tasks=10, kind="wait", seconds=0.2) -> Run:
        """Run `tasks` tasks of a kind on a worker of a pool, wait for them, and add the run to `runs`.

        Args:
            pool: solo, prefork, threads, gevent or eventlet.
            concurrency: how many slots the worker is given.
            tasks: how many tasks it gets.
            kind: "wait" or "compute".
            seconds: how long each waits, or how much of a processor's time it uses up.

        Raises:
            ClassroomError: a run is in progress, a setting can't be used, or the servers or the worker are lost.
        """
        if not self._busy.acquire(blocking=False):
            raise ClassroomError(GOING)
        return self._run(dict(pool=pool, concurrency=concurrency, tasks=tasks, kind=kind, seconds=seconds))

    def join(self, timeout: float = 120) -> None:
        """Wait until the run that a click began is over; a ClassroomError if it is not after `timeout` seconds."""
        if self._thread:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise ClassroomError(f"The run is not over after {timeout:g} s.")

    def _settings(self) -> dict:
        return {name: control.value for name, control in self.controls.items()}

    def _chosen(self, _=None) -> None:
        """Say what is chosen: a screen reader is not told which button of a row is pressed. Empty the bar."""
        if not self._busy.locked():
            self.progress.value = 0
            text = "Chosen: {tasks} x {kind} for {seconds:g} s, on {pool} with concurrency {concurrency}."
            self._say(text.format(**self._settings()))

    def _clicked(self, _) -> None:
        if self._late():
            self._say("This click came while a run was in progress. Nothing was started.")
        elif not self._busy.acquire(blocking=False):
            self._say(GOING)
        else:
            self._thread = threading.Thread(target=self._try, args=[self._settings()], name="experiment", daemon=True)
            atexit.register(self._thread.join, END)  # a kernel that restarts in the middle lets it clear up
            self._thread.start()

    def _late(self) -> bool:
        """Whether the click had to wait for the end of a cell, in which the last run was."""
        parent: dict = getattr(getattr(get_ipython(), "kernel", None), "get_parent", dict)()
        header = parent.get("header", {})
        return header.get("msg_type") == "comm_msg" and header["date"].timestamp() < self._ended

    def _try(self, settings: dict) -> None:
        with contextlib.suppress(ClassroomError):  # the widget says it
            self._run(settings)
        atexit.unregister(threading.current_thread().join)

    def _run(self, settings: dict) -> Run:
        """Run, and show it; the caller has taken `_busy`."""

        def begun(command: str) -> None:
            self.progress.max, self.progress.value = settings["tasks"], 0
            self._command.value = f'The worker, to try in a terminal:<pre style="{CODE}">{html.escape(command)}</pre>'
            self._say("The worker starts ...")

        def done(number: int) -> None:
            self.progress.value = number
            self._say(f"{number} of {settings['tasks']} tasks done")

        try:
            self.button.description = "Running ..."
            run = measure(settings, begun, done)
            self.runs.append(run)
            self._result.value = self._compared()
            self._say(f"Run {len(self.runs)} is over: {run.wall:.2f} s, {run.speedup:.1f} x, slots used: {run.slots}.")
            return run
        except BaseException as error:
            self._say(str(error) or "The run was interrupted.")
            raise
        finally:
            self.button.description = "Run"
            self._ended = time.time()
            self._busy.release()

    def _say(self, text: str) -> None:
        self.status.value = f'<div role="status" style="{STYLE}">{html.escape(text)}</div>'

    def _compared(self) -> str:
        """The last runs: a chart each, on one scale, and a table."""
        runs = {number: run for number, run in enumerate(self.runs, start=1) if number > len(self.runs) - SHOWN}
        panels = {f"{number}: {run.pool} -c {run.concurrency}, {run.kind}": run.spans for number, run in runs.items()}
        heads = ["run", "pool", "concurrency", "tasks", "kind", "seconds", "wall time", "speed-up", "slots used"]
        rows = ["".join(f'<th scope="col" style="{CELL}">{head}</th>' for head in heads)]
        for number, run in runs.items():
            cells = [number, run.pool, run.concurrency, run.tasks, run.kind, f"{run.seconds:g}"]
            cells += [f"{run.wall:.2f} s", f"{run.speedup:.1f} x", run.slots]
            rows.append("".join(f'<td style="{CELL}">{cell}</td>' for cell in cells))
        table = "".join(f"<tr>{row}</tr>" for row in rows)
        chart = Gantt(panels, columns=min(2, len(panels)))
        return f'{chart._repr_html_()}<table style="{STYLE}border-collapse:collapse">{table}</table>'
