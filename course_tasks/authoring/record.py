"""Run notebooks and store their outputs: `.venv/bin/python -m course_tasks.authoring.record [NOTEBOOK ...]`."""

import argparse
import os
import platform
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbval.plugin import coalesce_streams, get_sanitize_patterns

from course_tasks import servers
from course_tasks.authoring.kernels import NOTEBOOKS, executing, obituary
from course_tasks.install import ROOT

SANITIZE = Path(__file__).with_name("sanitize.cfg")
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_COMPARED = ("image/png", "image/jpeg", WIDGET)  # as nbval has it
ATTEMPTS = 5  # for a cell tagged `noisy`, which measures something that a busy machine may spoil
SLOWEST = 8  # times as long as written, at most
LASTING = re.compile(r"(?m)^(seconds = )(\d+(?:\.\d+)?)$")
WORDS_A_MINUTE, LINES_A_MINUTE, MINUTES_A_CELL, MINUTES_AN_EXERCISE, MINUTES_A_QUESTION = 100, 20, 0.3, 3, 1
MINUTES = re.compile(r"\d+ minutes to read and run, \d+ to practise")


def comparable(cell: nbformat.NotebookNode) -> list:
    """What nbval compares of a code cell's outputs, sanitised in the same way.

    In a cell tagged `nbval-ignore-output` the lines may come in any order, such as those of a log when tasks overlap.
    """
    unordered = "nbval-ignore-output" in cell.metadata.get("tags", [])
    patterns = get_sanitize_patterns(SANITIZE.read_text())

    def sanitised(value):
        for pattern, replacement in patterns if isinstance(value, str) else ():
            value = re.sub(pattern, replacement, value)
        return sorted(value.splitlines()) if unordered and isinstance(value, str) else value

    found: list[tuple | dict] = []
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


def _lasting(source: str, times: int) -> str:
    return LASTING.sub(lambda found: f"{found[1]}{times * float(found[2]):g}", source)


def attempts(cell: nbformat.NotebookNode) -> Iterator[int]:
    """Let a cell be run until it does not fail: once, or ATTEMPTS times if it is tagged `noisy`.

    What has to overlap must last longer than a busy machine takes to start it. So where a noisy cell says how long its
    tasks last in a line such as `seconds = 0.4`, each attempt takes twice as long as the last, up to eight times.

    Args:
        cell: the cell. Its source is that of the attempt, and as before in the end.

    Yields:
        How many attempts come after this one.
    """
    source, last = cell.source, (ATTEMPTS if "noisy" in cell.metadata.get("tags", []) else 1) - 1
    try:
        for number in range(last + 1):
            cell.source = _lasting(source, min(2**number, SLOWEST))
            yield last - number
    finally:
        cell.source = source


def execute(client: NotebookClient, cell: nbformat.NotebookNode, index: int) -> nbformat.NotebookNode:
    """Run a cell, a noisy one until it does not fail.

    Args:
        client: whose kernel runs it.
        cell: one of the cells of the client's notebook; its outputs are replaced.
        index: its place in the notebook.

    Returns:
        The cell.

    Raises:
        CellExecutionError: it failed each time.
        DeadKernelError: the kernel died in it.
    """
    assert client.km
    for left in attempts(cell):
        try:
            return client.execute_cell(cell, index)
        except DeadKernelError:
            raise DeadKernelError(f"cell {cell.id}: {obituary(client.km)}") from None
        except CellExecutionError:
            if not left:
                raise
    raise AssertionError("a cell has at least one attempt")


def words(text: str) -> int:
    """The number of words in markdown, without tables, code blocks, tags and the targets of links."""
    text = re.sub(r"(?m)^\|[^\n]*$|```.*?```|<[^>]*>|\]\([^)]*\)", " ", text, flags=re.DOTALL)
    return len(re.findall(r"[A-Za-z0-9_']+", text))


def minutes(notebook: nbformat.NotebookNode) -> str:
    """How long a chapter takes, for its first cell: minutes to read and run it, and minutes to practise.

    The rule: 100 words or 20 lines of code a minute, because technical text in a second language is read slowly; 20
    seconds to run a cell and look at its output; three minutes for an exercise and one for a question of the quiz. The
    sums are rounded to five minutes.
    """
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    exercises = sum(tag.startswith("exercise-") for tag in tags)
    questions = sum(tag.startswith("quiz-") for tag in tags)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    read = words(text) / WORDS_A_MINUTE + len("\n".join(code).splitlines()) / LINES_A_MINUTE
    read += (len(code) - 2 * exercises - questions) * MINUTES_A_CELL
    practise = exercises * MINUTES_AN_EXERCISE + questions * MINUTES_A_QUESTION
    read, practise = (max(5, 5 * round(number / 5)) for number in (read, practise))
    return f"{read} minutes to read and run, {practise} to practise"


def record(path: Path, anew: bool = False) -> list[str]:
    """Run a notebook from top to bottom and store the outputs of that run.

    If nbval finds no difference between them and the stored ones, all of these stay as they are: a notebook has the
    outputs of one run. The minutes in its first cell are computed anew.

    Args:
        path: the notebook; written only if something changed.
        anew: store the outputs of this run in any case, for example because a cell's code has changed.

    Returns:
        The ids of the code cells whose outputs differ from the stored ones.

    Raises:
        CellExecutionError: a cell failed that is not tagged `raises-exception`; nothing is written.
        DeadKernelError: the kernel died; nothing is written.
    """
    before = path.read_text()
    notebook = nbformat.reads(before, as_version=4)
    unrun = nbformat.reads(before, as_version=4)
    with executing(notebook, record_timing=False, store_widget_state=False) as client:
        for index, cell in enumerate(notebook.cells):
            execute(client, cell, index)
    different = []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    stored = [cell for cell in unrun.cells if cell.cell_type == "code"]
    for number, (cell, old) in enumerate(zip(code, stored, strict=True), start=1):
        cell.outputs = [nbformat.from_dict(_anonymous(output)) for output in coalesce_streams(cell.outputs) or []]
        cell.execution_count = number
        cell.metadata.pop("execution", None)
        if old.execution_count != number or comparable(old) != comparable(cell):
            different.append(cell.id)
        for output in cell.outputs:
            output.get("data", {}).pop(WIDGET, None)  # without its kernel it is an error message
            if output.output_type == "execute_result":
                output.execution_count = number
    result = notebook if different or anew else unrun
    result.metadata = unrun.metadata
    result.cells[0].source = MINUTES.sub(minutes(result), result.cells[0].source)
    if (after := nbformat.writes(result) + "\n") != before:
        path.write_text(after)
    return different


def main(arguments: list[str]) -> int:
    """Record the notebooks named, or all of them, on a pair of servers of their own; 0 if every one ran."""
    parser = argparse.ArgumentParser(prog="python -m course_tasks.authoring.record", description=__doc__)
    parser.add_argument("notebook", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    parser.add_argument("--anew", action="store_true", help="store the outputs even if nbval finds no difference")
    options = parser.parse_args(arguments)
    failed = 0
    os.environ["COURSE_RECORDING"] = "1"
    with tempfile.TemporaryDirectory(prefix="course-") as directory:
        pair = servers.private(directory)
        os.environ["COURSE_MY_NOTEBOOKS"] = directory  # what is recorded is nobody's progress
        for path in options.notebook:
            try:
                servers.flush(pair.broker, pair.backend)
                different = record(path, options.anew)
                print(f"{path.name}: {'new outputs in ' + ', '.join(different) if different else 'the same outputs'}")
            except (OSError, ValueError, CellExecutionError, DeadKernelError, servers.ServerError) as error:
                failed = 1
                print(f"{path.name}: not recorded: {error}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
