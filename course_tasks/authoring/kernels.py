"""Kernels that run a notebook as JupyterLab would: for recording, for measuring and for the tests."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

from course_tasks import servers
from course_tasks.copies import NOTEBOOKS as NOTEBOOKS

CELL_TIMEOUT = 120  # seconds; far above what any cell takes


@contextmanager
def kernel_manager(directory: str | None = None) -> Iterator[KernelManager]:
    """A manager for one kernel, which is set up as JupyterLab does it, except for its sockets.

    The sockets are files in a directory of their own, because TCP ports are picked first and bound later, and on a
    busy machine another process may take one in between. Nobody else can enter that directory, so messages need no
    signature. (With a signature, a busy machine has seen a good message refused.)

    Args:
        directory: where the sockets go; a fresh temporary directory by default.

    Yields:
        The manager, without a kernel yet. A kernel that it has at the end is killed.
    """
    with tempfile.TemporaryDirectory(prefix="kernel-", dir=directory) as sockets:
        manager = KernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
        manager.session.key = b""
        try:
            yield manager
        finally:
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)


@contextmanager
def ending_with_the_servers(manager: KernelManager) -> Iterator[None]:
    """Kill a manager's kernel when the broker or the backend ends: its cells might wait for them for minutes.

    Args:
        manager: of a kernel that has been started.

    Yields:
        Nothing; the kernel is watched until the end of the block.
    """
    over, kernel = threading.Event(), _process(manager)

    def watch() -> None:
        while not over.wait(1):
            if not servers.running():
                return kernel.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _process(manager: KernelManager) -> subprocess.Popen:
    return manager.provisioner.process  # type: ignore[union-attr] # it has a local one


def obituary(manager: KernelManager) -> str:
    """Say in a sentence of what a manager's kernel has died."""
    if not servers.running():
        return "The broker or the backend has ended, and so the kernel was ended."
    code = _process(manager).returncode
    if code != -signal.SIGKILL:
        return f"The kernel died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})."
    return "The kernel died (SIGKILL, as when the memory is full)."


def kernel_environment() -> dict[str, str]:
    """The environment for a kernel.

    It lacks pytest's mark, because ipykernel captures the output of a subprocess only outside pytest. It also silences
    the warning with which a worker begins when root runs it, as in CI: a learner doesn't see that.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:You're running the worker with superuser privileges"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return environment


@contextmanager
def workplace(directory: str | None = None) -> Iterator[str]:
    """A folder in place of `notebooks/` for one kernel, because two in one `scratch` overwrite each other's files.

    Args:
        directory: where it is made; the system's folder for temporary files by default.

    Yields:
        The folder's path. It has an empty `scratch` for the files that a chapter writes.
    """
    with tempfile.TemporaryDirectory(prefix="course-", dir=directory) as folder:
        Path(folder, "scratch").mkdir()
        yield folder


def notebook_client(notebook: nbformat.NotebookNode, manager: KernelManager, **settings) -> NotebookClient:
    """A client that executes a notebook's cells in a manager's kernel, and notices if that dies.

    Args:
        notebook: what the client executes.
        manager: of the kernel. It makes asynchronous clients from now on: with those that it usually makes, nbclient
            waits for ever for the next word of a kernel that has died.
        settings: more options of NotebookClient.

    Returns:
        The client.
    """
    manager.client_class = "jupyter_client.asynchronous.AsyncKernelClient"
    return NotebookClient(notebook, km=manager, timeout=CELL_TIMEOUT, **settings)


@contextmanager
def executing(notebook: nbformat.NotebookNode, **settings) -> Iterator[NotebookClient]:
    """Start a kernel for a notebook, in a workplace of its own.

    Args:
        notebook: what the client executes.
        settings: more options of NotebookClient.

    Yields:
        The client, ready for `client.execute_cell(cell, index)`.
    """
    with kernel_manager() as manager, workplace() as folder:
        client = notebook_client(notebook, manager, resources={"metadata": {"path": folder}}, **settings)
        with client.setup_kernel(env=kernel_environment()), ending_with_the_servers(manager):
            yield client
