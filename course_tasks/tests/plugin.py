"""pytest's set-up for the course: a pair of servers for each pytest process, and nbval with kernels like JupyterLab's.

Loaded by the `-p` in pyproject.toml, so that `pytest` on a test, on a notebook or on everything finds the same.
"""

import contextlib
import random
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import nbval.kernel
import psutil
import pytest
from nbval.plugin import IPyNbCell
from redis import Redis
from xdist.scheduler import LoadScopeScheduling

from course_tasks import record, servers

STACK = pytest.StashKey[contextlib.ExitStack]()
PAIR = pytest.StashKey[servers.Pair]()


def pytest_configure(config) -> None:
    """Compare as sanitize.cfg says, unless another file is named; wait as long as a busy machine may need."""
    config.option.nbval_sanitize_with = config.option.nbval_sanitize_with or str(record.SANITIZE)
    config.option.nbval_cell_timeout = record.CELL_TIMEOUT


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
    pair = config.stash[PAIR] = servers.private(Path(directory, "pair"))

    def start_kernel(startup_timeout=60, kernel_name="python3", **options):
        """nbval's own, but with JupyterLab's environment, sockets and files that can't clash, and an empty pair."""
        _empty(pair)
        manager = stack.enter_context(record.kernel_manager(directory))
        options["cwd"] = stack.enter_context(record.workplace(directory))
        manager.start_kernel(env=record.kernel_environment(), **options)
        client = manager.client()
        client.start_channels()
        client.wait_for_ready(timeout=startup_timeout)
        return manager, client

    nbval.kernel.start_new_kernel = start_kernel


def pytest_sessionfinish(session) -> None:
    """Stop what pytest_sessionstart started."""
    if stack := session.config.stash.get(STACK, None):
        stack.close()


class Scheduling(LoadScopeScheduling):
    """A file's tests run in one process, but a chapter may be run through beside another one.

    In the browser all chapters are run by one process: JupyterLab's scripts are compiled once, then.
    """

    def _split_scope(self, nodeid: str) -> str:
        if "test_run_all_by" in nodeid:
            return nodeid
        return nodeid.partition("[")[0] if "test_run_all_in" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log) -> Scheduling:
    """What divides the tests among the processes."""
    return Scheduling(config, log)


# What takes longest comes first, so that no process is left with it at the end; of the chapters, the largest
LONGEST = (
    "test_run_all_in",
    "test_launcher",
    "test_run_all_by",
    "test_browser",
    "test_terminal",
    "test_correlation",
    "test_experiment",
)


def pytest_collection_modifyitems(items) -> None:
    """Put the longest tests first, and give nbval's cells more time.

    nbval waits 5 s for a cell's outputs after its end and has no option for it: a busy machine needs more.
    """
    sizes = {path.stem: path.stat().st_size for path in record.NOTEBOOKS.glob("*.ipynb")}

    def rank(item) -> tuple[int, int]:
        place = next((at for at, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))
        chapter = re.search(r"test_run_all_by\w+\[(.*)\]", item.nodeid)
        return place, -sizes[chapter[1]] if chapter else 0

    items.sort(key=rank)
    for item in items:
        if isinstance(item, IPyNbCell):
            item.output_timeout = 60


@pytest.fixture
def pair(request) -> servers.Pair:
    """This process's broker and backend, both empty."""
    _empty(request.config.stash[PAIR])
    return request.config.stash[PAIR]


def until(condition, what: str, seconds: float = 60):
    """Wait until `condition()` is true, and return what it is then; fail, naming `what`, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


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
    """Ports, no two alike, free on both loopback addresses, that the system gives to no outgoing connection."""
    for port in random.sample(range(15000, 32000), 1000):
        with contextlib.suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            if not listens(port, "::1"):
                yield port


def _empty(pair: servers.Pair) -> None:
    """Wait until nobody is connected any more (a worker on its way out may take a task), then empty both servers."""
    for url in (pair.broker, pair.backend):
        with Redis.from_url(url) as server:
            until(lambda: len(server.client_list()) == 1, f"everybody else has left {url}")
    servers.flush(pair.broker, pair.backend)
