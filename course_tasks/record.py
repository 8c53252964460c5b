"""Run notebooks and store their outputs, so that a second recording changes nothing."""

import argparse
import os
import platform
import re
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbval.plugin import coalesce_streams, get_sanitize_patterns

from course_tasks import servers

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
SANITIZE = Path(__file__).with_name("tests") / "sanitize.cfg"
CELL_TIMEOUT = 120  # seconds; far above what any cell takes
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = ("image/png", "image/jpeg", WIDGET)  # as nbval has it


@contextmanager
def kernel_manager(directory: str | None = None):
    """A manager for one kernel that is set up as JupyterLab does it, except for its sockets.

    Those are files in a directory of their own: TCP ports are picked first and bound later, and on a busy
    machine another process may take one in between. Nobody else can enter that directory, so messages need no
    signature; with it, a busy machine has seen a good one refused.

    Args:
        directory: where the sockets go; a fresh temporary directory by default.
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

    ipykernel captures a subprocess's output only outside pytest, and a worker of root's (containers, CI) begins with
    a warning that a learner's does not.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore:You're running the worker with superuser privileges"}
    environment.pop("PYTEST_CURRENT_TEST", None)
    return environment


@contextmanager
def workplace(directory: str | None = None):
    """A folder for one kernel in place of `notebooks/`, with an empty `scratch` for the files that a chapter writes.

    Two kernels at work in one `scratch` would overwrite each other's files.
    """
    with tempfile.TemporaryDirectory(prefix="course-", dir=directory) as folder:
        Path(folder, "scratch").mkdir()
        yield folder


@contextmanager
def executing(notebook: nbformat.NotebookNode, **settings):
    """A client whose kernel is running, in a workplace of its own, ready for `client.execute_cell`."""
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


def comparable(cell: nbformat.NotebookNode) -> list:
    """What nbval compares of a code cell's outputs, sanitised as it does.

    Where it is told to compare nothing, the order of lines may differ: those of a log, say, of tasks that overlap.
    """
    unordered = "nbval-ignore-output" in cell.metadata.get("tags", [])
    patterns = get_sanitize_patterns(SANITIZE.read_text())

    def sanitised(value):
        for pattern, replacement in patterns if isinstance(value, str) else ():
            value = re.sub(pattern, replacement, value)
        return sorted(value.splitlines()) if unordered and isinstance(value, str) else value

    found = []
    for output in coalesce_streams([nbformat.from_dict(output) for output in cell.outputs]) or []:
        if output.output_type == "stream":
            found.append((output.name, sanitised(output.text)))
        elif output.output_type == "error":
            found.append((output.ename, sanitised(output.evalue)))
        else:
            found.append({kind: sanitised(value) for kind, value in output.data.items() if kind not in NOT_COMPARED})
    return found


def _anonymous(value):
    """The value without this machine: its platform, its name, the place of the clone, and the ports in use."""
    if isinstance(value, str):
        for role, variable in servers.VARIABLES.items():
            port = urlsplit(os.environ[variable]).port
            value = value.replace(f"localhost:{port}/", f"localhost:{servers.DEFAULT_PORTS[role]}/")
        value = value.replace(platform.platform(), platform.system()).replace(str(ROOT), "/home/you/course")
        return value.replace(f"@{socket.gethostname()}", "@laptop")
    if isinstance(value, list):
        return [_anonymous(item) for item in value]
    return {key: _anonymous(item) for key, item in value.items()} if isinstance(value, dict) else value


def record(path: Path) -> list[int]:
    """Run a notebook from top to bottom and store its outputs, but keep a stored output that says the same.

    Args:
        path: the notebook; written only if something changed.

    Returns:
        The numbers of the code cells whose outputs are new.

    Raises:
        CellExecutionError: a cell failed that is not tagged `raises-exception`; nothing is written.
    """
    before = path.read_text()
    notebook = nbformat.reads(before, as_version=4)
    unrun = nbformat.reads(before, as_version=4)
    old = {cell.id: cell for cell in unrun.cells if cell.cell_type == "code"}
    with executing(notebook, record_timing=False, store_widget_state=False) as client:
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
    new = []
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), start=1):
        cell.outputs = [nbformat.from_dict(_anonymous(output)) for output in coalesce_streams(cell.outputs) or []]
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        stored = old[cell.id]
        if stored.execution_count is not None and comparable(stored) == comparable(cell):
            cell.outputs = stored.outputs
        else:
            new.append(number)
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET, None)  # without its kernel it is an error message
            if output.output_type == "execute_result":
                output.execution_count = number
    notebook.metadata = unrun.metadata
    if (after := nbformat.writes(notebook) + "\n") != before:
        path.write_text(after)
    return new


def main(arguments: list[str]) -> int:
    """Record the notebooks named, or all of them, on a pair of servers of their own; 0 if every one ran."""
    parser = argparse.ArgumentParser(prog="python3 -m course_tasks record", description=__doc__)
    parser.add_argument("notebook", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    failed = 0
    os.environ["COURSE_RECORDING"] = "1"
    with tempfile.TemporaryDirectory(prefix="course-") as directory:
        pair = servers.private(directory)
        for path in parser.parse_args(arguments).notebook:
            servers.flush(pair.broker, pair.backend)
            try:
                new = record(path)
                print(f"{path.name}: {'new outputs in cells ' + ', '.join(map(str, new)) if new else 'unchanged'}")
            except (OSError, ValueError, CellExecutionError) as error:
                failed = 1
                print(f"{path.name}: not recorded: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
