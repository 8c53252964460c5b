"""Runs a small project that a learner has mended: on servers of its own, as they would run it in a terminal."""

import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from celery import Celery, states
from celery.exceptions import TimeoutError
from celery.result import AsyncResult
from redis import Redis

from course_tasks.exercises import WrongAnswer

SUPERVISOR = Path(__file__).parents[1] / "classroom" / "supervisor.py"
SERVERS = """
import json, os, sys
from course_tasks import servers
servers.private(sys.argv[1])
print(json.dumps(dict(os.environ)), flush=True)
sys.stdin.read()
"""
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Project:
    """A learner's project at work, in a `with` block, at whose end all its processes and both servers are gone.

    The project gets a broker and a backend of its own, through the environment variables that Celery prefers to the
    URLs in the code. So nothing that it does reaches the notebook's servers. Threads may run several commands at once.

    Args:
        folder: where the project's files are.

    Attributes:
        broker: a client of the project's broker.
        backend: a client of the project's backend.
        environment: the variables that the project's programs have.

    Raises:
        WrongAnswer: there is no such folder.
    """

    broker: Redis
    backend: Redis
    environment: dict[str, str]

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise WrongAnswer(f"there is no folder {folder}. Run the cells that write the project first.")
        self._stack = contextlib.ExitStack()
        self._logs: list[Path] = []
        self._numbers = itertools.count()  # of logs

    def __enter__(self):
        with self._stack:
            self._home = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True))
            )
            servers = self._stack.enter_context(
                # they end when this pipe is closed, and so with this process, however it ends
                subprocess.Popen(
                    [sys.executable, "-c", SERVERS, self._home / "servers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert servers.stdout  # a pipe
            self.environment = json.loads(servers.stdout.readline())
            self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"
            urls = self.environment["CELERY_BROKER_URL"], self.environment["CELERY_RESULT_BACKEND"]
            self.broker, self.backend = (self._stack.enter_context(Redis.from_url(url)) for url in urls)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    def worker(self, *commands: str, seconds: float = 20) -> int:
        """Start a worker of the project, or a script that starts several, and wait until each says that it is ready.

        Args:
            commands: what to type in the project's folder, such as "celery -A shop worker --pool=solo". If these are
                several, they start at once. The log level is added, because only with INFO a worker says that it is
                ready.
            seconds: how long they may take to get ready.

        Returns:
            How many workers the commands have running.

        Raises:
            WrongAnswer: one of them ended, or did not get ready in time.
        """
        started = [(command, *self._start(f"{command} --loglevel=INFO")) for command in commands]
        self._logs += [log for _, _, log in started]
        deadline, total = time.monotonic() + seconds, 0
        for command, process, log in started:
            while not (ready := (text := _text(log)).count(" ready.\n")) or ready < (running := _workers(process)):
                if process.poll() is not None:
                    raise WrongAnswer(f"`{command}` ended before it was ready: {_end(text)}")
                if time.monotonic() > deadline:
                    raise WrongAnswer(f"`{command}` was not ready after {seconds:g} s: {_end(text)}")
                time.sleep(0.02)
            total += running
        return total

    def run(
        self, command: str, seconds: float = 20, name: str = "", hopeless: Callable[[], str | None] = lambda: None
    ) -> str:
        """Run a command to its end.

        Args:
            command: what to type in the project's folder, such as "python order.py".
            seconds: how long it may take.
            name: what to call it in a reason, if not by the whole command.
            hopeless: asked while it runs: a reason why its end is not worth waiting for, or None.

        Returns:
            What it printed.

        Raises:
            WrongAnswer: it failed, took longer, or was hopeless.
        """
        process, log = self._start(command)
        name, deadline = name or command, time.monotonic() + seconds
        while (code := process.poll()) is None:
            if reason := hopeless():
                raise WrongAnswer(reason)
            if time.monotonic() > deadline:
                raise WrongAnswer(f"`{name}` was still running after {seconds:g} s: {_end(_text(log))}")
            time.sleep(0.02)
        if code:
            raise WrongAnswer(f"`{name}` ended with an error: {_end(_text(log))}")
        return _text(log)

    def loaded(self, source: str, name: str, seconds: float = 20) -> Any:
        """Run a program of the judge's own, which imports the project's modules.

        Args:
            source: of the program. It prints a line of JSON at its end; Python may complain below it.
            name: what to call it in a reason, such as the name of the module.
            seconds: how long it may take.

        Returns:
            What was in the last line of JSON.

        Raises:
            WrongAnswer: it failed, as when a module of the project can't be imported.
        """
        said = self.run(f"python -c {shlex.quote(source)}", seconds, name)
        for line in reversed(said.splitlines()):
            with contextlib.suppress(ValueError):
                return json.loads(line)
        raise WrongAnswer(f"`{name}` ended too early: {_end(said)}")

    def log(self) -> str:
        """What all of the project's workers have written so far."""
        return "".join(map(_text, self._logs))

    def settled_log(self, seconds: float = 5) -> str:
        """The log, once it tells the end of every task that has ended. A worker's lines arrive after its results.

        Args:
            seconds: how long to wait at most, as for a worker that doesn't log the ends of its tasks.

        Returns:
            What `log` returns.
        """
        ids = [record["task_id"] for record in self._records() if record.get("status") in states.READY_STATES]
        ends = [re.compile(rf"\[{re.escape(id)}\]\s(?!received|retry)") for id in ids]
        deadline, log = time.monotonic() + seconds, self.log()
        while not all(end.search(log) for end in ends) and time.monotonic() < deadline:
            time.sleep(0.02)
            log = self.log()
        return log

    def results(self) -> list[Any]:
        """What the backend has stored as results of tasks, in any order; None for a task that failed or has no end."""
        return [record["result"] if record.get("status") == "SUCCESS" else None for record in self._records()]

    def client(self) -> Celery:
        """An app on the project's servers that has none of the project's code."""
        app = Celery(set_as_current=False)
        # this process's environment names other servers, and Celery prefers it to broker= and backend=
        app.conf.broker_read_url = app.conf.broker_write_url = self.environment["CELERY_BROKER_URL"]
        app.backend_cls = self.environment["CELERY_RESULT_BACKEND"]
        self._stack.callback(app.close)
        self._stack.callback(_unsubscribe, app)
        return app

    def _records(self) -> list[dict[str, Any]]:
        return [json.loads(self.backend.get(key) or "{}") for key in self.backend.keys("celery-task-meta-*")]

    def _start(self, command: str) -> tuple[subprocess.Popen, Path]:
        """Start a command in the project's folder. It ends with the `with` block, or with this process."""
        log = self._home / f"{next(self._numbers)}.log"
        process = subprocess.Popen(
            [sys.executable, "-I", SUPERVISOR, f"exec {command}", "single"],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=log.open("wb"),
            start_new_session=True,
        )
        self._stack.callback(_kill, process)
        return process, log


def ended(result: AsyncResult, seconds: float = 20) -> Any:
    """Wait for the end of a project's task.

    Args:
        result: what `send_task` returned.
        seconds: how long to wait at most.

    Returns:
        Its value, or the exception that it raised.

    Raises:
        WrongAnswer: it wasn't done in time.
    """
    try:
        return result.get(timeout=seconds, propagate=False)
    except TimeoutError:
        raise WrongAnswer(f"a task had no result after {seconds:g} seconds.") from None


def answers(client: Celery, question: str, number: int, seconds: float = 10) -> list[Any]:
    """Ask a project's workers a question, again until enough of them answer.

    Args:
        client: the project's client.
        question: such as "stats" or "active_queues".
        number: how many answers there should be, also of workers with the same name.
        seconds: how long to wait at most.

    Returns:
        The answers; fewer if some workers are silent.
    """
    found: list[Any] = []
    deadline = time.monotonic() + seconds
    with client.connection_for_write() as connection:
        while len(found) < number and time.monotonic() < deadline:  # a new worker may not hear the first question
            told = client.control.broadcast(question, reply=True, timeout=1, limit=number, connection=connection) or []
            found = max(found, [answer for each in told for answer in each.values()], key=len)
    return found


def _unsubscribe(app: Celery) -> None:
    """Let results outlive their backend: at its end, each of them would try for seconds to unsubscribe there."""
    if consumer := getattr(app.backend, "result_consumer", None):
        consumer.subscribed_to.clear()


def _workers(process: subprocess.Popen) -> int:
    """How many of a process's descendants are main processes of workers."""
    pids, parents = set(), []
    with contextlib.suppress(psutil.Error):
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended in the meantime
                words = each.cmdline()
                if "worker" in words and any(Path(word).name == "celery" for word in words):
                    pids.add(each.pid)
                    parents.append(each.ppid())
    return sum(parent not in pids for parent in parents)


def _kill(process: subprocess.Popen) -> None:
    assert process.stdin  # a pipe
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(b"k")
        process.stdin.close()
    process.wait()


def _text(log: Path) -> str:
    return ANSI.sub("", log.read_text(errors="replace")).replace("\r\n", "\n")


def _end(text: str) -> str:
    """The last line that says something, for a reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".") + "." if lines else "it wrote nothing."
