"""What a learner has answered is remembered, whatever happens to the file; and `quiz` where no chapter shows it."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from course_tasks import copies, exercises, progress
from course_tasks.authoring import kernels
from course_tasks.classroom import check, quiz
from course_tasks.exercises import Question
from course_tasks.install import ROOT
from course_tasks.tests.test_check import Hostile
from course_tasks.tests.test_install import read_only

RIGHT = "✅ 00-3: right. 1 of 4 in this chapter."
NOTES = """
import sys
from course_tasks import progress
for number in range(20):
    _, notice = progress.note("00", "exercises", f"{sys.argv[1]}-{number}", "right")
    assert not notice, notice
"""
CHECK = "from course_tasks.classroom import check; check('00-3', 'PENDING')"


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A learner's folder, which is not there yet."""
    monkeypatch.setenv("COURSE_MY_NOTEBOOKS", str(tmp_path / "my_notebooks"))
    return tmp_path / "my_notebooks"


def saved(mine):
    return json.loads((mine / "progress.json").read_text())


def test_every_answer_is_remembered_and_what_was_right_stays_right(mine, capsys):
    assert progress.read() == progress.empty()
    check("00-1", ...)
    check("00-2", 5)
    check("00-3", "PENDING")
    assert capsys.readouterr().out.splitlines()[-1] == RIGHT
    check("00-3", ...)
    check("00-2", ...)
    quiz("00-1", "...")
    quiz("00-2", "a")
    quiz("00-3", "A")
    quiz("00-3", "b")
    assert saved(mine) == progress.read()
    assert progress.read() == {
        "version": 1,
        "exercises": {"00-1": "open", "00-2": "open", "00-3": "right"},
        "quiz": {"00-1": "open", "00-2": "wrong", "00-3": "right"},
        "last": "00",
    }
    check("01-1", ...)
    assert saved(mine)["last"] == "01"
    assert [path.name for path in mine.iterdir()] == ["progress.json"]


def test_whoever_reads_the_file_while_it_is_written_finds_it_whole(mine):
    progress.note("00", "exercises", "00-1", "right")
    before = saved(mine)
    with (mine / "progress.json").open() as reader:
        progress.note("00", "exercises", "00-2", "right")
        assert json.load(reader) == before


def test_ten_kernels_at_once_lose_no_record(mine):
    command = [sys.executable, "-c", NOTES]
    kernels = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(10)]
    assert [kernel.wait(60) for kernel in kernels] == [0] * 10
    names = {f"{kernel}-{number}" for kernel in range(10) for number in range(20)}
    assert saved(mine)["exercises"] == dict.fromkeys(names, "right")


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"version": 2, "exercises": {}, "quiz": {}, "last": null}',
        b'{"version": 1, "exercises": {"00-1": []}, "quiz": {}, "last": null}',
        b'{"version": 1, "exercises": {}, "quiz": {}, "last": 5}',
        b'{"version": 1, "exercises": {}, "quiz": null, "last": null}',
    ],
)
def test_a_damaged_file_is_set_aside_and_the_verdict_comes_all_the_same(mine, capsys, damaged):
    mine.mkdir()
    for number in (1, 2):
        (mine / "progress.json").write_bytes(damaged)
        assert progress.read() == progress.empty()
        check("00-3", "PENDING")
        kept = mine / "old" / f"progress-{number}" / "progress.json"
        assert capsys.readouterr().out == (
            f"{RIGHT}\nYour progress file was damaged. It was moved to {kept}, and a new one was started.\n"
        )
        assert kept.read_bytes() == damaged
        assert saved(mine)["exercises"] == {"00-3": "right"}


def test_a_folder_in_the_place_of_the_file_is_set_aside(mine, capsys):
    (mine / "progress.json").mkdir(parents=True)
    quiz("00-3", ...)
    assert "Your progress file was damaged. It was moved to" in capsys.readouterr().out
    assert saved(mine)["quiz"] == {"00-3": "open"} and (mine / "old" / "progress-1" / "progress.json").is_dir()


def test_a_file_that_cannot_be_read_now_is_not_a_damaged_one(mine, capsys, monkeypatch):
    progress.note("00", "exercises", "00-1", "right")
    before = saved(mine)

    def no_file_left():
        raise OSError(errno.EMFILE, "Too many open files", str(mine / "progress.json"))

    with monkeypatch.context() as patch:
        patch.setattr(progress, "_read", no_file_left)
        check("00-3", "PENDING")
    assert "Your progress can't be saved: Too many open files" in capsys.readouterr().out
    assert saved(mine) == before and not (mine / "old").exists()


def test_where_nothing_can_be_saved_one_line_says_so(mine, capsys):
    mine.write_text("a file")
    check("00-3", "PENDING")
    assert capsys.readouterr().out == f"{RIGHT}\nYour progress can't be saved: Not a directory ({mine}).\n"
    assert mine.read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can write everywhere")
@pytest.mark.parametrize("how", ["a read-only folder", "a full disk"])
def test_what_was_saved_stays_when_nothing_more_can_be(mine, how):
    progress.note("00", "exercises", "00-1", "right")
    before = saved(mine)
    with read_only(mine) as prefix:
        wanted = "Permission denied"
        if how == "a full disk":
            if not shutil.which("prlimit"):
                pytest.skip("needs prlimit")
            mine.chmod(0o755)
            prefix, wanted = ["prlimit", "--fsize=10"], "File too large"
        done = subprocess.run([*prefix, sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    line = r"✅ 00-3: right\. 2 of 4 in this chapter\.\n"
    assert re.fullmatch(rf"{line}Your progress can't be saved: {wanted}.*\.\n", done.stdout)
    assert saved(mine) == before and [path.name for path in mine.iterdir()] == ["progress.json"]


def test_the_map_shows_every_chapter_and_where_the_learner_stopped(mine, monkeypatch):
    for name in exercises.all_of("01"):
        progress.note("01", "exercises", name, "right")
    for name in exercises.quiz_of("01"):
        progress.note("01", "quiz", name, "right")
    monkeypatch.setenv("JPY_SESSION_NAME", str(mine / "05b_pool_limits.ipynb"))  # as Jupyter Server sets it
    cells = [nbformat.v4.new_code_cell(source) for source in ("%load_ext course_tasks.classroom", "%progress")]
    with kernels.executing(nbformat.v4.new_notebook(cells=cells)) as client:
        for index, cell in enumerate(cells):
            client.execute_cell(cell, index)
    [output] = cells[1].outputs
    heading, *rows = output.data["text/plain"].splitlines()
    assert heading.split() == ["Chapter", "Exercises", "Quiz", "State"]
    assert [row.split()[0] for row in rows] == list(copies.chapters())
    marked = {row.split()[0]: row.split("  ")[-1].strip() for row in rows if re.search("[✅▶]", row)}
    assert marked == {"01": "✅ complete", "05b": "▶ you are here"}
    page = output.data["text/html"]
    links = re.findall(r'<th scope="row"[^>]*><a href="([^"]+)">', page)
    assert links == [path.name for path in copies.chapters().values()]
    assert page.count('<th scope="col"') == 4 and page.count("<tr") == page.count("</tr>") == len(rows) + 1
    assert "✅ complete" in page and "▶ you are here" in page


@pytest.mark.parametrize(
    "question, answer, line",
    [
        ("00-9", "a", f"There is no quiz question '00-9'. {exercises.RENAMED}"),
        (None, "a", f"There is no quiz question None. {exercises.RENAMED}"),
        ("00-1", ..., "☐ quiz 00-1: still to do. Put your answer in place of the dots, and run this cell again."),
        ("00-1", " … ", "☐ quiz 00-1: still to do. Put your answer in place of the dots, and run this cell again."),
        ("00-1", "x", "❌ quiz 00-1: 'x' is not one of the choices: a, b, c."),
        ("00-1", 5, '❌ quiz 00-1: an answer is a text in quotes, such as "a". This is a whole number.'),
        ("00-1", Hostile, "❌ quiz 00-1: your answer could not be judged: RuntimeError: do not touch"),
        ("00-1", " C) ", "❌ quiz 00-1: no worker has seen the task yet,"),
        ("00-1", "B.", "✅ quiz 00-1: right. send_task had already"),
        ("00-4", "The  Backend", "✅ quiz 00-4: right. The worker stores the result there"),
    ],
)
def test_quiz_prints_a_verdict_and_never_raises(mine, capsys, question, answer, line):
    quiz(question, answer() if answer is Hostile else answer)
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).startswith(line) and max(map(len, printed.splitlines())) <= 90


def test_a_short_text_is_judged_whatever_its_capitals_and_blanks():
    question = Question(right=("noeviction", "no eviction"), wrong={"Allkeys-lru": "it evicts."}, otherwise="no.")
    for right in ("noeviction", " No  Eviction ", "`noeviction`", "noeviction."):
        assert question.judge(right) is None
    assert question.judge("AllKeys-LRU") == "it evicts."
    assert question.judge("evict") == "no."


def test_without_the_notebook_a_right_answer_is_right_without_its_explanation(mine, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(copies, "NOTEBOOKS", tmp_path)
    for damaged in (None, "", "{}", '{"cells": [{"cell_type": "markdown", "source": "<details>"}]}'):
        if damaged is not None:
            (tmp_path / "00_welcome.ipynb").write_text(damaged)
        quiz("00-1", "b")
        assert capsys.readouterr().out == "✅ quiz 00-1: right.\n"
