"""`record`, the tag `noisy`, and the minutes: what contributors rely on."""

import os
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


def run_by_pytest(path: Path) -> subprocess.CompletedProcess:
    """Run a notebook as CI does."""
    command = [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-n", "0", "-q", path]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


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
