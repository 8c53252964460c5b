"""Kernels that run a notebook as JupyterLab would: for recording, for measuring and for the tests."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient

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
        client = NotebookClient(
            notebook,
            km=manager,
            timeout=CELL_TIMEOUT,
            resources={"metadata": {"path": folder}},
            **settings,
        )
        with client.setup_kernel(env=kernel_environment()):
            yield client
