"""`record`, the tag `noisy`, and the minutes: what contributors rely on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from course_tasks.authoring import record
from course_tasks.install import ROOT

CODE, TEXT = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
COUNT = "runs = globals().get('runs', 0) + 1\nassert runs >= {}, f'{{runs}} of {{{}}} runs'\nprint('enough')"


def saved(path: Path, *cells) -> nbformat.NotebookNode:
    """Write a notebook with a title and these cells."""
    title = TEXT("# A title, 99 minutes to read and run, 99 to practise")
    notebook = nbformat.v4.new_notebook(cells=[title, *cells])
    path.write_text(nbformat.writes(notebook) + "\n")
    return notebook


def noisy(runs: int) -> nbformat.NotebookNode:
    """A cell that fails until it has been run so many times."""
    return CODE(COUNT.format(runs, runs), metadata={"tags": ["noisy"]})


def run_by_pytest(path: Path, *options, **variables) -> subprocess.CompletedProcess:
    """Run a notebook as CI does."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-n", "0", "-q", *options, path]
    environment = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("runs", [1, 5])
def test_a_noisy_cell_may_fail_four_times(pair, tmp_path, runs):
    saved(path := tmp_path / "noisy.ipynb", noisy(runs))
    assert len(record.record(path)) == 1
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "enough\n"
    done = run_by_pytest(path)
    assert done.returncode == 0, done.stdout


def test_a_noisy_cell_that_never_passes_fails(pair, tmp_path):
    saved(path := tmp_path / "false.ipynb", noisy(6))
    before = path.read_text()
    with pytest.raises(CellExecutionError, match="5 of 6 runs"):
        record.record(path)
    assert path.read_text() == before, "nothing is stored of a run that failed"
    done = run_by_pytest(path)
    assert done.returncode == 1 and "5 of 6 runs" in done.stdout


def test_each_attempt_of_a_noisy_cell_lasts_twice_as_long_as_the_last_and_eight_times_at_most(pair, tmp_path):
    kept = "lasted = globals().get('lasted', []) + [seconds]\nassert len(lasted) > 4, lasted\nprint(lasted)"
    cell = CODE(f"seconds = 0.4\n{kept}", metadata={"tags": ["noisy"]})
    saved(path := tmp_path / "slower.ipynb", cell)
    record.record(path)
    stored = nbformat.read(path, as_version=4).cells[1]
    assert stored.outputs[0].text == "[0.4, 0.8, 1.6, 3.2, 3.2]\n" and stored.source == cell.source
    done = run_by_pytest(path)
    assert done.returncode == 0, done.stdout


def test_a_cell_without_the_tag_has_one_attempt(pair, tmp_path):
    cell = noisy(2)
    cell.metadata = {}
    saved(path := tmp_path / "quiet.ipynb", cell)
    with pytest.raises(CellExecutionError, match="1 of 2 runs"):
        record.record(path)
    assert "1 of 2 runs" in run_by_pytest(path).stdout


def test_the_stored_outputs_are_those_of_one_run(pair, tmp_path):
    """A stored time of day must not be later than that of a cell below it, even if nbval finds both alike."""
    clock = "from datetime import datetime, UTC\nprint(datetime.now(UTC).isoformat())"
    cells = [CODE(clock), CODE("import os\nprint(os.environ['WORD'])"), CODE(clock)]
    saved(path := tmp_path / "times.ipynb", *cells)

    def outputs() -> list[str]:
        return [cell.outputs[0].text for cell in nbformat.read(path, as_version=4).cells[1:]]

    os.environ["WORD"] = "first"
    assert record.record(path) == [cell.id for cell in cells]
    before, first = path.read_text(), outputs()
    assert record.record(path) == []
    assert path.read_text() == before, "nothing differs, so nothing is stored"
    os.environ["WORD"] = "second"
    assert record.record(path) == [cells[1].id]
    assert outputs()[0] > first[0] and outputs()[2] > outputs()[0], "the cell that says the same is of this run, too"
    second = outputs()
    assert record.record(path, anew=True) == [] and outputs()[0] > second[0]
    del os.environ["WORD"]


def test_the_minutes_are_computed_from_words_lines_and_cells(pair, tmp_path):
    text = TEXT("word " * 1000 + "\n\n| a table | does not | count |\n\n```\nnor does code\n```")
    cells = [text, *[CODE("1") for _ in range(50)]]  # 10 + 50 x 0.3 + 50 / 20 minutes
    for kind in ("exercise", "check", "quiz"):
        cells.append(CODE("2", metadata={"tags": [f"{kind}-99-1"]}))
    notebook = saved(path := tmp_path / "long.ipynb", *cells)
    assert record.minutes(notebook) == "30 minutes to read and run, 5 to practise"
    record.record(path)
    assert "30 minutes to read and run, 5 to practise" in nbformat.read(path, as_version=4).cells[0].source


DYING = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
SERVERS_END = """
import json, os, signal, time
state = json.load(open(os.environ["COURSE_RUNTIME"] + "/pair.json"))
os.kill(state["servers"]["broker"], signal.SIGKILL)
time.sleep(100)
"""
DEAD = r"The kernel died \(SIGKILL, as when the memory is full\)\."
WITH_THE_SERVERS = r"The broker or the backend has ended, and so the kernel was ended\."
# a learner comes only in the course's own folder of notebooks, so that is the test's
HERE = "import os, pathlib; from course_tasks.authoring import kernels\n"
HERE += "kernels.NOTEBOOKS = pathlib.Path(os.environ['NOTEBOOKS'])\n"


def with_a_learner(path: Path, plugin: str = "") -> str:
    """What pytest says of a notebook, run with a learner as if it were a chapter."""
    path.with_name("here.py").write_text(HERE + plugin)
    variables = {"PYTHONPATH": str(path.parent), "NOTEBOOKS": str(path.parent)}
    said = run_by_pytest(path, "-p", "here", "-rs", "--color=no", "--durations=3", "--durations-min=60", **variables)
    return said.stdout + said.stderr


@pytest.mark.parametrize("source, why", [(DYING, DEAD), (SERVERS_END, WITH_THE_SERVERS)], ids=["kernel", "servers"])
def test_a_kernel_that_dies_is_one_failure_at_once_which_says_so(pair, tmp_path, source, why):
    saved(path := tmp_path / "00_dying.ipynb", CODE("1"), CODE(source), CODE("2"), CODE("3"))
    said = with_a_learner(path)
    assert len(re.findall(why, said)) == 1, said
    assert re.search(rf"Cell 1: {why}", said)
    assert re.search(r"SKIPPED .*: the kernel has ended in Cell 1", said)
    assert re.search(r"\n1 failed, 1 passed, 3 skipped in ", said)
    assert "call " not in said, "no call took a minute"
    for word in ("Traceback", "Error:", "plugin exception"):
        assert word not in said, said


def test_a_kernel_that_dies_between_two_cells_is_one_failure(pair, tmp_path):
    soon = f"import threading\nthreading.Timer(0.1, lambda: exec({DYING!r})).start()"
    saved(path := tmp_path / "00_dying.ipynb", CODE(soon), CODE("import time; time.sleep(60)"), CODE("3"))
    said = with_a_learner(path)
    assert re.search(rf"Cell 1: {DEAD}", said), said
    assert "1 failed, 1 passed, 2 skipped" in said, said


def test_a_kernel_that_dies_under_the_learner_is_one_line(pair, tmp_path):
    saved(path := tmp_path / "00_dying.ipynb", CODE(f"if 'again' in globals():\n    exec({DYING!r})\nagain = True"))
    said = with_a_learner(path)
    assert re.search(rf"ends the learner's Run All: cell [\w-]+: {DEAD}", said)
    assert "1 failed, 1 passed in " in said and "Traceback" not in said


IMPATIENT = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    config.option.nbval_cell_timeout = 1
    for item in items:
        item.output_timeout = 1
"""


@pytest.mark.parametrize("tags", [["noisy"], []])
def test_a_noisy_cell_may_have_other_outputs_for_the_learner_too_but_not_each_time(pair, tmp_path, tags):
    spoilt = "runs = globals().get('runs', 0) + 1\nprint('spoilt' if runs == 2 else 'as ever')"
    saved(path := tmp_path / "00_noisy.ipynb", CODE(spoilt, metadata={"tags": tags}))
    record.record(path)
    said = with_a_learner(path)
    assert ("an exercise that the chapter does not ask" in said) == bool(tags), "that is further down"
    assert bool(re.search(r"run for the second time: .*spoilt", said)) != bool(tags)


def test_a_cell_that_can_not_be_interrupted_leaves_no_second_failure(pair, tmp_path):
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(1000)"
    saved(path := tmp_path / "00_deaf.ipynb", CODE(deaf), CODE("2"))
    said = with_a_learner(path, IMPATIENT)
    assert "Cell 0: Timeout of 1 seconds exceeded" in said and "1 failed, 2 skipped in " in said
    assert re.search(r"SKIPPED .*: the kernel has ended in Cell 0", said)


@pytest.mark.parametrize("source, why", [(DYING, DEAD), (SERVERS_END, WITH_THE_SERVERS)], ids=["kernel", "servers"])
def test_record_says_in_one_line_that_the_kernel_died(tmp_path, source, why):
    saved(path := tmp_path / "dying.ipynb", CODE("1"), cell := CODE(source))
    before = path.read_text()
    command = [sys.executable, "-m", "course_tasks.authoring.record", path, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and path.read_text() == before
    said = [line for line in done.stderr.splitlines() if line.startswith("dying.ipynb")]
    assert re.fullmatch(rf"dying\.ipynb: not recorded: cell {cell.id}: {why}", said[0]), done.stderr
    assert len(said) == 2 and "Traceback" not in done.stderr
