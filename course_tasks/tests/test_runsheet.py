"""`runsheet`: what it says is what the notebooks say, and its clock is right."""

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mistune
import nbformat
import pytest

from course_tasks import copies, exercises, runsheet
from course_tasks.install import ROOT

TIMES = [90, 120, 240, 480]
CHAPTERS = copies.chapters()
FRAME = {"Set-up", "Exercises", "What you can say now", "The map of the course"}
LINE = re.compile(r"\| (\d+):(\d\d)\u2013(\d+):(\d\d) \| (.*?) \| (.*?) \| (.*?) \|")
times = pytest.mark.parametrize("minutes", TIMES)


def command(*options, folder: Path = ROOT, **variables) -> subprocess.CompletedProcess:
    """Run the command as on a machine where nothing is installed: with a Python that sees no installed package."""
    start = [sys.executable, "-S", "-m", "course_tasks", "runsheet", *options]
    return subprocess.run(start, cwd=folder, capture_output=True, env=os.environ | variables, timeout=60)


@functools.cache
def sheet(minutes: int) -> str:
    done = command("--minutes", str(minutes))
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode()


def plan(minutes: int) -> list[tuple[int, int, str, str, str]]:
    """The lines of the plan: start, end, what, minutes together, and what is said about the exercises."""
    return [
        (60 * int(row[0]) + int(row[1]), 60 * int(row[2]) + int(row[3]), *row[4:])
        for row in LINE.findall(sheet(minutes))
    ]


def sections(minutes: int) -> dict[str, str]:
    """What the sheet says about each chapter that it has, by the chapter's number."""
    parts = re.split(r"(?m)^## [\d:]+\u2013[\d:]+ · ", sheet(minutes))[1:]
    return {part.split()[0]: part for part in parts}


def source(number: str) -> str:
    """A chapter's markdown."""
    cells = nbformat.read(CHAPTERS[number], as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def stated(number: str) -> tuple[int, int]:
    """The minutes in a chapter's first cell."""
    together, practise = re.findall(r"(\d+) minutes to read and run, (\d+) to practise", source(number))[0]
    return int(together), int(practise)


def words(text: str) -> str:
    """Letters and digits alone, so that line breaks and marks make no difference."""
    unlinked = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|(?<!`)</?\w[^>`]*>", r"\1", text)
    return " ".join(re.findall(r"\w+", unlinked.casefold()))


@times
def test_the_clock_is_right(minutes):
    rows = plan(minutes)
    assert [start for start, *_ in rows] == [0, *(end for _, end, *_ in rows[:-1])]
    assert rows[-1][1] == minutes
    assert len(rows) == sheet(minutes).count("\u2013") - len(sections(minutes)), "a line of the plan is not understood"
    begun = 0
    for start, end, what, together, practise in rows:
        if what in ("Break", "Lunch") or what.startswith("Questions"):
            assert end > start and together == practise == ""
        elif practise.isdigit():
            assert (int(together), int(practise)) == stated(what.split()[0])
            assert end - start == int(together) + int(practise)
        else:
            begun += 1
            read, _ = stated(what.split()[0])
            assert 15 <= end - start <= read
            assert together == (str(read) if end - start == read else f"the first {end - start}: stop at any heading")
            assert practise == "on the way home"
    assert begun <= 1
    free = sum(end - start for start, end, what, *_ in rows if what.startswith("Questions"))
    # in 15 minutes more, and with a break before them, one more chapter could begin
    assert 0 <= free - max(5, minutes // 12) < 25


@times
def test_nobody_sits_too_long(minutes):
    without_break, lunches = 0, []
    for start, end, what, together, _ in plan(minutes):
        if what in ("Break", "Lunch"):
            assert without_break, "a break after nothing"
            assert end - start == (60 if what == "Lunch" else 10)
            lunches += [start] if what == "Lunch" else []
            without_break = 0
        elif together:
            without_break += end - start
            assert without_break <= 90
    assert without_break, "a break before nothing"
    assert len(lunches) == (minutes == 480) and all(150 <= start <= 300 for start in lunches)


@times
def test_the_order_is_the_courses_and_numbered_chapters_come_before_lettered_ones(minutes):
    taught = [what.split()[0] for _, _, what, together, _ in plan(minutes) if together]
    assert list(sections(minutes)) == taught == sorted(taught)
    numbered = [number for number in CHAPTERS if number.isdigit()]
    assert [number for number in taught if number.isdigit()] == numbered[: sum(map(str.isdigit, taught))]
    if lettered := [number for number in taught if not number.isdigit()]:
        assert set(numbered) <= set(taught)
        assert lettered == [number for number in CHAPTERS if not number.isdigit()][: len(lettered)]
    [home] = re.findall(r"\*\*For the way home:\*\* (.*)\.", sheet(minutes))
    left = {number: sum(stated(number)) for number in CHAPTERS}
    for start, end, what, together, _ in plan(minutes):
        left[what.split()[0]] = left.get(what.split()[0], 0) - (end - start) if together else 0
    said = {line.split()[0]: int(re.search(r"(\d+) minutes", line)[1]) for line in home.split("), ")}
    assert said == {number: more for number, more in left.items() if more}


@times
def test_the_script_is_the_chapters_headings(minutes):
    for number, section in sections(minutes).items():
        assert source(number).startswith(f"# {section.splitlines()[0]}\n")
        headings = [heading for heading in re.findall(r"(?m)^## (.*)$", source(number)) if heading not in FRAME]
        assert re.findall(r"(?m)^\d+\. \*\*(.*)\*\*$", section) == headings


@times
def test_every_prediction_goal_exercise_and_claim_of_a_chapter_is_in_its_section(minutes):
    for number, section in sections(minutes).items():
        said, text = words(section), source(number)
        predictions = re.findall(r"(?ms)\*\*Predict:\*\*(.*?)(?=^[^>]|^$|\Z)", text)
        assert len(predictions) == section.count("**Ask:**") == section.count("**Answer:**") >= 2
        goals = re.findall(r"(?m)^- (.*)$", text.partition("**By the end you can**")[2].partition("**Why")[0])
        claims = re.findall(r"(?m)^- (.*)$", text.partition("## What you can say now")[2].partition("**Quiz**")[0])
        assert len(goals) >= 2 and len(claims) >= 2
        for piece in (*predictions, *goals, *claims):
            assert words(piece) in said, piece
        asked = re.findall(r"(?m)^### Exercise (\S+) (\((?:core|optional)\b.*)", text)
        assert len(asked) >= 2
        assert re.findall(r"(?m)^- \*\*(\S+)\*\* \*(.*?)\* \S", section) == asked
        assert ("### Exercises\n" in section) == any(
            what.split()[0] == number and practise.isdigit() for _, _, what, _, practise in plan(minutes)
        )


@times
def test_every_wrong_answer_of_the_quiz_is_there_with_its_reason(minutes):
    for number, section in sections(minutes).items():
        questions = exercises.quiz_of(number)
        assert section.count("**Right:**") == len(questions)
        assert section.count("**Wrong:**") == sum(len(question.wrong) for question in questions.values())
        for name, question in questions.items():
            part = section.partition("### Quiz")[2].partition(f"\n{name.partition('-')[2]}. ")[2]
            asked = source(number).partition(f"### Question {name.partition('-')[2]}\n")[2].partition("<details>")[0]
            right = question.right if isinstance(question.right, str) else question.right[0]
            assert re.search(rf"\*\*Right:\*\* `?{re.escape(right)}", part)
            assert words(asked.partition("\n- **a)**")[0]).startswith(words(part.partition("\n    - **Right")[0]))
            for wrong, reason in question.wrong.items():
                assert re.search(rf"\*\*Wrong:\*\* `?{re.escape(wrong)}[`)].*\*No:\* ", part), wrong
                assert words(reason) in words(part)


def test_an_answer_is_what_stands_below_the_prediction_before_the_next_heading():
    def chapter(*cells):
        return runsheet.Chapter("99", "99", 20, 10, list(cells))

    def code(source, text, kind="text/plain"):
        output = {"output_type": "execute_result", "data": {kind: text, "text/plain": text}}
        return {"cell_type": "code", "source": source, "outputs": [output] if text else []}

    def text(source):
        return {"cell_type": "markdown", "source": source}

    def script(*cells):
        return "\n".join(runsheet._script(list(runsheet._blocks(chapter(*cells)))))

    ask = text("## One\n\n> **Predict:** how many?\n\nSend them.")
    below = script(ask, code("x = 1\nlen(sent)", "3"), text("Three, as the queue says:\n\n1. one\n2. two\n\nMore."))
    assert below.startswith(
        "1. **One**\n    - **Ask:** How many?\n    - **Screen:**\n\n      ```text\n      >>> len(sent)\n      3\n"
    )
    assert below.endswith("\n      ```\n\n    - **Answer:** Three, as the queue says: (1) one (2) two")
    assert "The screen shows it." in script(ask, code("len(sent)", "3"), text("## Two\n\nThree."))
    later = script(ask, code("x", ""), text("## Two\n\nThree."))
    assert "(It comes later in the chapter.)" in later and "Three" not in later
    picture = script(ask, code("Gantt()", "3 tasks", "text/html"), text("| a | table |\n\n<b>no</b>\n\nThree."))
    assert "Screen" not in picture and picture.endswith("**Answer:** Three.")
    long = script(*[ask, code("len(sent)", "3"), text("Three.")] * 11)
    [whole] = mistune.create_markdown(renderer=None)(long)
    assert whole["type"] == "list" and len(whole["children"]) == 11, "the eleventh is in the same list as the first"


@times
def test_the_markdown_is_well_formed(minutes):
    tokens = mistune.create_markdown(renderer=None, plugins=["table"])(sheet(minutes))
    kinds = [token["type"] for token in tokens]
    assert kinds.count("table") == 1

    def leaves(some):
        for token in some:
            yield from leaves(token.get("children", [])) if "children" in token else [token]

    for leaf in leaves(tokens):
        if leaf["type"] == "text":
            found = re.search(r"^\s*(?:[-|•] |\d+\. )|\*\*|`|\]\(|</?\w", leaf["raw"])
            assert not found, f"not understood as Markdown: {leaf['raw']}"
    [table] = [token for token in tokens if token["type"] == "table"]
    rows = [table["children"][0], *table["children"][1]["children"]]
    assert [len(row["children"]) for row in rows] == [4] * (len(plan(minutes)) + 1)
    titles = [leaf["raw"] for leaf in leaves(token for token in tokens if token["type"] == "heading")]
    assert sum(title.startswith("Script") for title in titles) == len(sections(minutes))
    lists = [token for token in tokens if token["type"] == "list" and token["attrs"]["ordered"]]
    assert len(lists) == 2 * len(sections(minutes)), "a script and a quiz for each chapter, in one piece each"


def test_without_a_time_the_sheet_is_for_two_hours():
    assert command().stdout.decode() == sheet(120)


LEAST = sum(stated("00")) + 5


@pytest.mark.parametrize("minutes", [LEAST, LEAST + 1, 59, 61, 100, 359, 360, 600])
def test_any_time_will_do(minutes):
    test_the_clock_is_right(minutes)
    test_the_order_is_the_courses_and_numbered_chapters_come_before_lettered_ones(minutes)


WRONG = {
    ("--minutes",): "expected one argument",
    ("--minutes", "two"): "takes a number, not 'two'",
    ("--minutes=",): "takes a number, not ''",
    ("--minutes", "1.5"): "takes a number, not '1.5'",
    ("--minutes", "10"): "takes a number from",
    ("--minutes", "-120"): "takes a number from",
    ("--minutes", "100000"): "takes a number from",
    ("120",): "unrecognized arguments: 120",
    ("--hours", "2"): "unrecognized arguments: --hours 2",
}


@pytest.mark.parametrize("options", WRONG)
def test_a_wrong_time_gets_one_line(options):
    done = command(*options)
    assert done.returncode == 1 and not done.stdout
    assert re.fullmatch(rf"course_tasks: runsheet: .*{re.escape(WRONG[options])}.*\n", done.stderr.decode())


def test_help_is_the_courses_own():
    assert b"runsheet [--minutes 120]" in command("--help").stdout


def test_it_is_utf_8_whatever_the_terminal_speaks():
    assert command("--minutes", "480", PYTHONIOENCODING="ascii").stdout.decode() == sheet(480)


def test_whoever_reads_only_the_first_line_gets_no_error():
    line = f"{shlex.quote(sys.executable)} -S -m course_tasks runsheet --minutes 480 | head -n 1"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("# Run sheet") and not done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's disk that is always full")
def test_a_full_disk_gets_one_line():
    line = f"{shlex.quote(sys.executable)} -S -m course_tasks runsheet > /dev/full"
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "can't be written: No space left" in done.stderr


DAMAGES = {
    "<<<<<<< HEAD\n{}": "notebooks/00_welcome.ipynb is damaged",
    '{"cells": []}': "notebooks/00_welcome.ipynb is damaged",
    '{"cells": [{"cell_type": "markdown", "source": "# 00 Untimed"}]}': "how many minutes it takes",
}


@pytest.mark.parametrize("text", DAMAGES)
def test_a_chapter_that_cant_be_read_is_named(tmp_path, text):
    ignored = shutil.ignore_patterns("__pycache__", "tests", "scratch")
    for folder in ("course_tasks", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "notebooks" / "00_welcome.ipynb").write_text(text)
    done = command(folder=tmp_path)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1 and not done.stdout
    assert DAMAGES[text] in done.stderr.decode()
