"""pytest's set-up for the course: a pair of servers for each pytest process, and nbval with kernels like JupyterLab's.

Loaded by the `-p` in pyproject.toml, so that `pytest` on a test, on a notebook or on everything finds the same.
"""

import contextlib
import functools
import importlib
import math
import os
import queue
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import nbformat
import nbval.kernel
import nbval.plugin
import psutil
import pytest
from celery import Celery
from kombu import Connection, Message
from nbclient.exceptions import CellExecutionError, DeadKernelError
from redis import Redis
from xdist.scheduler import LoadScopeScheduling

from course_tasks import copies, exercises, servers
from course_tasks.authoring import kernels, record
from course_tasks.classroom import free_port
from course_tasks.classroom.toolkit import ask_worker
from course_tasks.exercises.project import Project

STACK = pytest.StashKey[contextlib.ExitStack]()
PAIR = pytest.StashKey[servers.Pair]()


class Kernel(nbval.kernel.RunningKernel):
    """nbval's own, which notices within a second or two that it has died, and knows where it came to its end."""

    ended = ""

    def get_message(self, stream, timeout=None):
        """The next message; raises queue.Empty after `timeout`, or DeadKernelError."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            try:
                return super().get_message(stream, max(0, min(1, deadline - time.monotonic())))
            except queue.Empty:
                if not self.is_alive():
                    raise DeadKernelError(kernels.obituary(self.km)) from None
                if time.monotonic() >= deadline:
                    raise


def pytest_configure(config) -> None:
    """Compare as sanitize.cfg says, unless another file is named; wait as long as a busy machine may need."""
    config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(record.SANITIZE)
    config.option.nbval_cell_timeout = kernels.CELL_TIMEOUT


def pytest_sessionstart(session) -> None:
    """Start the pair, in every process that runs tests (with xdist those are the workers)."""
    config = session.config
    if config.option.collectonly or (
        getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    ):
        return
    # A shell starts its background jobs deaf to SIGINT, and the tests' processes, which get it, would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stack = config.stash[STACK] = contextlib.ExitStack()
    directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="course-", ignore_cleanup_errors=True))
    os.environ["COURSE_MY_NOTEBOOKS"] = str(Path(directory, "my_notebooks"))  # no test touches what a learner has
    pair = config.stash[PAIR] = servers.private(Path(directory, "pair"))

    def start_kernel(startup_timeout=60, kernel_name="python3", **options):
        """nbval's own, but with JupyterLab's environment, sockets and files that can't clash, and an empty pair."""
        _empty(pair)
        manager = stack.enter_context(kernels.kernel_manager(directory))
        folder = options["cwd"] = stack.enter_context(kernels.workplace(directory))
        manager.start_kernel(env=kernels.kernel_environment() | {"COURSE_MY_NOTEBOOKS": folder}, **options)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=startup_timeout)
        stack.enter_context(kernels.ending_with_the_servers(manager))
        return manager, client

    nbval.kernel.start_new_kernel = start_kernel
    nbval.plugin.RunningKernel = Kernel


def pytest_sessionfinish(session) -> None:
    """Stop what pytest_sessionstart started."""
    if stack := session.config.stash.get(STACK, None):
        stack.close()


@pytest.hookimpl(tryfirst=True)  # else xdist's own takes the number of cores
def pytest_xdist_auto_num_workers(config) -> int:
    """How many processes `-n auto` starts: six, as they mostly wait; fewer on a small machine.

    Each has servers, a kernel and workers of its own, for which it needs about a gigabyte at most.
    """
    return max(1, min(6, 3 * (os.cpu_count() or 1), round(psutil.virtual_memory().total / 1e9)))


APART = ("test_claims", "test_install.py", "test_project.py")  # files whose tests have nothing in common


class Scheduling(LoadScopeScheduling):
    """A file's tests run in one process, those that run chapters in the browser in one of their own.

    There JupyterLab's scripts are compiled once. Of the files in APART, each test goes to whichever process is free.
    """

    def _split_scope(self, nodeid: str) -> str:
        if any(file in nodeid for file in APART):
            return nodeid
        return nodeid.partition("[")[0] if "test_run_all_in" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log) -> Scheduling:
    """What divides the tests among the processes."""
    return Scheduling(config, log)


# What takes longest comes first, so that no process is left with it at the end; of the chapters, the largest
LONGEST = (
    "test_run_all_in",
    "test_launcher",
    "ipynb::",
    "test_browser",
    "test_correlation",
    "test_terminal",
    "test_pair",
    "test_claims",
    "test_install",
    "test_experiment",
)


def pytest_collection_modifyitems(items) -> None:
    """Put the longest tests first, give nbval's cells more time, and noisy ones more attempts.

    nbval waits 5 s for a cell's outputs after its end and has no option for it: a busy machine needs more.
    """

    def rank(item) -> tuple[int, int]:
        place = next((at for at, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))
        return place, -item.path.stat().st_size if item.path.suffix == ".ipynb" else 0

    items.sort(key=rank)
    for item in items:
        if isinstance(item, nbval.plugin.IPyNbCell):
            item.output_timeout = 60
            item.runtest = functools.partial(run_until_it_passes, item, item.runtest)


def run_until_it_passes(item: nbval.plugin.IPyNbCell, runtest: Callable[[], None]) -> None:
    """Run a cell once, or a noisy one until it passes. The error is that of the last attempt.

    After a cell that has ended the kernel there is nothing left to run, and one failure says so.
    """
    kernel = item.parent.kernel
    if kernel.ended:
        pytest.skip(kernel.ended)
    try:
        for left in record.attempts(item.cell):
            try:
                return runtest()
            except nbval.plugin.NbCellError:
                if not left or item.parent.timed_out:
                    raise
    except DeadKernelError as error:
        item.raise_cell_error(str(error))
    except RuntimeError:  # nbval looks first whether the kernel is alive
        if kernel.is_alive():
            raise
        item.raise_cell_error(f"{kernels.obituary(kernel.km)} It was before this cell.")
    finally:
        if not kernel.is_alive():
            kernel.ended = f"the kernel has ended in {item.name}"


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    """A notebook's cells of a kind, "code" or "markdown"."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def tagged(path: Path) -> dict[str, nbformat.NotebookNode]:
    """The cells that have a tag, by tag."""
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        for tag in cell.metadata.get("tags", []):
            assert tag.startswith(("raises-", "wait-", "nbval-", "noisy")) or tag not in found, (
                f"two cells are tagged {tag}"
            )
            found[tag] = cell
    return found


def printed_solution(cell: nbformat.NotebookNode) -> str:
    """The code in the one fence of the folded solution; what comes after that belongs to the next exercise."""
    [folded] = re.findall(r"(?s)<summary>Solution</summary>(.*?)</details>", cell.source)
    [solution] = re.findall(r"(?s)```python\n(.*?)```", folded)
    return solution


def _writes(cell: nbformat.NotebookNode, project: str) -> bool:
    """Whether a cell writes a file of a broken project; never if there is none."""
    return bool(project) and cell.source.startswith(f"%%writefile {project}/")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Show what a failed cell wrote: nbval says of a stream that was not expected only that there is one."""
    report = yield
    if report.failed and isinstance(item, nbval.plugin.IPyNbCell):
        written = "".join(output.get("text", "") for output in item.test_outputs or ())
        report.sections.append(("What the cell wrote", written))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Let a learner come after nbval's cells, in the course's own notebooks."""
    report = yield
    if isinstance(collector, nbval.plugin.IPyNbFile) and collector.path.parent == kernels.NOTEBOOKS and report.passed:
        report.result.append(LearnerTriesEverything.from_parent(collector, name="a learner"))
    return report


class LearnerTriesEverything(pytest.Item):
    """Run the chapter for the second time in nbval's kernel, as Run All does, where a failed cell ends it.

    The outputs are the stored ones. Each answer is judged where it is asked for: left open, then each of the wrong
    ones, then the printed solution; and each quiz question likewise. In the end the chapter is complete, and the
    broker is left as it was.
    """

    def runtest(self) -> None:
        """Raise AssertionError or pytest's Failed where the chapter does not do so."""
        if self.parent.kernel.ended:
            pytest.skip(self.parent.kernel.ended)
        tags, judged = tagged(self.path), dict(exercises.all_of(copies.number(self.path.name)))
        asked = dict(exercises.quiz_of(copies.number(self.path.name)))
        notebook = nbformat.read(self.path, as_version=4)
        client = kernels.notebook_client(notebook, self.parent.kernel.km)
        client.start_new_kernel_client()

        def run(cell: nbformat.NotebookNode, source: str | None = None) -> nbformat.NotebookNode:
            """Run a cell, or something in its place; the cell with its outputs."""
            index = next(index for index, other in enumerate(notebook.cells) if other.id == cell.id)
            notebook.cells[index].source = source or cell.source
            try:
                return record.execute(client, notebook.cells[index], index)
            except (CellExecutionError, DeadKernelError) as error:
                pytest.fail(f"{cell.id} ends the learner's Run All: {error}")

        def verdict(check: nbformat.NotebookNode, source: str | None = None) -> str:
            return " ".join("".join(output.get("text", "") for output in run(check, source).outputs).split())

        def try_question(cell: nbformat.NotebookNode, name: str) -> None:
            """Answer a quiz question in every way that the chapter's module knows."""
            question = asked.pop(name)
            rights = [question.right] if isinstance(question.right, str) else question.right
            for wrong, reason in question.wrong.items():
                said = verdict(cell, f"quiz({name!r}, {wrong!r})")
                assert said.replace("`", "") == f"❌ quiz {name}: {reason}".replace("`", "")
            said = verdict(cell, f"quiz({name!r}, 'what?')")
            assert (
                said == f"❌ quiz {name}: {question.otherwise}".replace("`", "")
                or "is not one of the choices: a, b, c" in said
            )
            for right in rights:
                given = f" {right if question.case else right.upper()} "
                said = verdict(cell, f"quiz({name!r}, {given!r})")
                assert re.fullmatch(rf"✅ quiz {name}: right\. \S.{{30,}}", said), "right, and explained"

        # what follows a log or a queue would change outputs later on
        client.kc.execute("import os; os.environ['COURSE_RECORDING'] = '1'", silent=True)
        for cell in cells(self.path, "code"):
            again = run(cell)
            if cell.source == "%progress":
                [row] = re.findall(rf"(?m)^{copies.number(self.path.name)} .*", again.outputs[0].data["text/plain"])
                assert row.endswith("✅ complete, ▶ you are here"), row
                continue
            left = record.ATTEMPTS if "noisy" in cell.metadata.get("tags", []) else 1
            while record.comparable(again) != record.comparable(cell):
                assert (left := left - 1), f"{cell.id}, run for the second time: {record.comparable(again)}"
                again = run(cell)
            for tag in cell.metadata.get("tags", []):
                if tag.startswith("quiz-"):
                    try_question(cell, tag.removeprefix("quiz-"))
            [name] = [tag[6:] for tag in cell.metadata.get("tags", []) if tag.startswith("check-")] or [None]
            if name is None:
                continue
            place, exercise = tags[f"exercise-{name}"], judged.pop(name)
            assert verdict(cell).startswith(f"☐ {name}")
            project = [each for each in cells(self.path, "code") if _writes(each, exercise.project)]
            for wrong, reason in exercise.wrong.items():
                for each in project:
                    run(each)
                run(place, wrong)
                assert (said := verdict(cell)).startswith(f"❌ {name}: ") and reason in said, (wrong, said)
            for right in (printed_solution(tags[f"solution-{name}"]), *exercise.right):
                for each in project:
                    run(each)
                run(place, right)
                said = verdict(cell)
                assert re.fullmatch(rf"✅ {name}: right\. \d of \d in this chapter\.", said), (name, right, said)
        assert not judged, "an exercise that the chapter does not ask"
        assert not asked, "a quiz question that the chapter does not ask"

        client.kc.stop_channels()
        self.parent.kernel.stop()
        with Redis.from_url(self.config.stash[PAIR].broker) as broker:
            kept = [key for key in broker.scan_iter() if not key.startswith(b"_kombu.binding")]
            assert kept == [], "left in the broker"

    def reportinfo(self):
        """Where it is, and its heading in a report."""
        return self.path, None, f"{self.path.name}: {self.name}"

    def repr_failure(self, excinfo):
        """What pytest shows: it begins here, not in pytest's own lines."""
        excinfo.traceback = excinfo.traceback.cut(path=Path(__file__))
        return super().repr_failure(excinfo)


@pytest.fixture
def pair(request) -> servers.Pair:
    """This process's broker and backend, both empty."""
    _empty(request.config.stash[PAIR])
    return request.config.stash[PAIR]


@pytest.fixture
def project(tmp_path):
    """An empty folder, and a broker and a backend for what is written there."""
    with Project(str(tmp_path)) as project:
        yield project


def lacking(what: str) -> NoReturn:
    """Skip for want of something that contributors have. Where COURSE_CI=1 promises all of that, fail."""
    if os.environ.get("COURSE_CI"):
        pytest.fail(f"COURSE_CI is set, but this machine lacks {what}", pytrace=False)
    pytest.skip(f"this machine lacks {what}", allow_module_level=True)


def needed(module: str) -> ModuleType:
    """Import a module that only `install --dev` brings."""
    try:
        return importlib.import_module(module)
    except ImportError:
        lacking(f"{module.partition('.')[0]}: python3 -m course_tasks install --dev")


def until(condition, what: str, seconds: float = 60):
    """Wait until `condition()` is true, and return what it is then; fail, naming `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def stands(chapter: str, *sentences: str) -> None:
    """Check that sentences are in a chapter's text still, whatever the line breaks."""
    text = " ".join("\n".join(cell.source for cell in cells(copies.chapters()[chapter], "markdown")).split())
    for sentence in sentences:
        assert " ".join(sentence.split()) in text, f"chapter {chapter} no longer says: {sentence}"


def logged(project: Project, text: str) -> None:
    """Wait for a text in the log of the project's workers."""
    until(lambda: text in project.log(), f"{text!r} in the log:\n{project.log()}", seconds=20)


def node_stats(client: Celery, name: str) -> dict:
    """What a worker says about itself."""
    return ask_worker(client, name, seconds=60)


def accepted(client: Celery, name: str) -> None:
    """Wait until a worker knows that a task of its has begun. A child's log line can come before that, and a cold stop
    in between takes the task for one that waits."""
    until(lambda: ask_worker(client, name, "active", seconds=60), f"{name} runs a task")


def taken(app: Celery, task: str) -> Message:
    """A message that asks for a task under the id 1f2e, as a worker gets it, here from a broker in this process."""
    with Connection("memory://") as connection, connection.SimpleQueue(task) as simple:
        sent = app.amqp.as_task_v2("1f2e", task)
        simple.put(sent.body, headers=sent.headers, **sent.properties)
        return simple.get(timeout=5)


def processes(text: str, among: Iterable[psutil.Process] | None = None) -> list[psutil.Process]:
    """The processes that have `text` in their command lines: of this machine, or of those given. Zombies are none."""
    found = []
    for process in psutil.process_iter() if among is None else among:
        with contextlib.suppress(psutil.Error):  # it has ended in the meantime
            if text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether anything listens on a TCP port of a loopback address."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5):
        return True
    return False


def free_ports() -> Iterator[int]:
    """Ports as `free_port` gives them, no two alike, and free on the IPv6 loopback address too."""
    given = set()
    while True:
        port = free_port()
        if port not in given and not listens(port, "::1"):
            given.add(port)
            yield port


def _empty(pair: servers.Pair) -> None:
    """Wait until nobody is connected any more (a worker on its way out may take a task), then empty both servers."""
    for url in (pair.broker, pair.backend):
        with Redis.from_url(url) as server:
            try:
                until(lambda: len(server.client_list()) == 1, f"everybody else has left {servers.without_secrets(url)}")
            except AssertionError:
                pytest.fail("\n".join(f"still there: {other}" for other in server.client_list()))
    servers.flush(pair.broker, pair.backend)
