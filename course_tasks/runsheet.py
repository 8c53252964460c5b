"""`runsheet`: what an instructor needs in the hand for a given time, made from the notebooks themselves.

Standard library only: the command works before anything is installed. For the same reason the quiz, which the
chapters' modules in `exercises/` have beside their judges, is read from the source and not imported.
"""

import argparse
import ast
import errno
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from course_tasks import copies
from course_tasks.install import ROOT, Problem

LONGEST_BLOCK = 90  # minutes without a break
BREAK, LUNCH, LUNCH_FROM = 10, 60, 360  # minutes; the last: from how long a course on, one of its breaks is for lunch
FREE = 12  # at least one minute in twelve stays free for questions and delays
LEAST_START = 15  # a chapter that doesn't fit is begun if there are so many minutes left
MOST = 600  # minutes of a course; more is not for one day
FRAME = ("Set-up", "Exercises", "What you can say now", "The map of the course")  # every chapter's; not its script
TO = "\N{EN DASH}"
INDENT = "    "  # as much as an item needs whose number has two digits
SHORT = 6  # lines; a longer output is for the projector


@dataclass(frozen=True)
class Chapter:
    """A chapter as an instructor sees it.

    Attributes:
        number: "05b" for example.
        title: its heading, with the number.
        together: minutes to read and run it.
        practise: minutes for its exercises and its quiz.
        cells: of the notebook.
    """

    number: str
    title: str
    together: int
    practise: int
    cells: list[dict[str, Any]]

    @property
    def minutes(self) -> int:
        """What the whole chapter takes."""
        return self.together + self.practise


@dataclass(frozen=True)
class Item:
    """A line of the plan.

    Attributes:
        minutes: how long it takes.
        what: what it is, for the table.
        chapter: what is taught in it, if it is no break.
    """

    minutes: int
    what: str
    chapter: Chapter | None = None

    @property
    def is_whole(self) -> bool:
        """Whether there is time for all of the chapter."""
        return self.chapter is not None and self.minutes == self.chapter.minutes


def main(options: list[str]) -> None:
    """Print the run sheet, as Markdown in UTF-8.

    Args:
        options: of the command line.

    Raises:
        Problem: the options are wrong, or a chapter can't be read.
    """
    sheet = make(_minutes(options))
    try:
        sys.stdout.buffer.write(sheet.encode())
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries once more at its end
        if error.errno != errno.EPIPE:  # `| head` has seen enough
            raise Problem(f"The run sheet can't be written: {copies.reason(error)}.") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(f"runsheet: {message}. For example: python3 -m course_tasks runsheet --minutes 120")


def _minutes(options: list[str]) -> int:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--minutes", default="120")
    minutes = parser.parse_args(options).minutes
    if not re.fullmatch(r"-?[0-9]{1,9}", minutes):
        parser.error(f"--minutes takes a number, not {minutes!r}")
    return int(minutes)


def make(minutes: int) -> str:
    """Make the run sheet of a course.

    Args:
        minutes: how long the course is.

    Returns:
        The sheet as Markdown.

    Raises:
        Problem: the time is too short or too long, or a chapter can't be read.
    """
    known = [_chapter(number, path) for number, path in copies.chapters().items()]
    least = next(time for time in range(MOST) if known[0].minutes + _free(time) <= time)
    if not least <= minutes <= MOST:
        raise Problem(
            f"runsheet: --minutes takes a number from {least} to {MOST}, not {minutes}. "
            f"Chapter {known[0].number} alone takes {known[0].minutes} minutes, and some stay free for questions."
        )
    lines = [f"# Run sheet: learn Celery in {minutes} minutes", "", "## The plan", ""]
    lines += ["| Time | What | Minutes together | Exercises and quiz |", "|---|---|---|---|"]
    sections: list[str] = []
    taught: dict[str, int] = {}
    now = 0
    for item in _plan(known, minutes):
        clock, now = f"{_clock(now)}{TO}{_clock(now + item.minutes)}", now + item.minutes
        lines.append(f"| {clock} | {item.what} | {' | '.join(_shares(item))} |")
        if item.chapter:
            taught[item.chapter.number] = item.minutes
            sections += ["", f"## {clock} · {item.chapter.title}", "", *_section(item.chapter, item.is_whole)]
    home = []
    for chapter in known:
        left = chapter.minutes - taught.get(chapter.number, 0)
        rest = "the last " if chapter.number in taught else ""
        home += [f"{chapter.title.partition(':')[0]} ({rest}{left} minutes)"] if left else []
    lines += ["", f"**For the way home:** {', '.join(home) or 'nothing, for this is the whole course'}."]
    return "\n".join([*lines, "", _INTRODUCTION.format(minutes=minutes), *sections]) + "\n"


_INTRODUCTION = """\
## How to use this sheet

`python3 -m course_tasks runsheet --minutes {minutes}` has made it from the notebooks. The minutes are those in each
chapter's first cell. *Teaching it*, in README.md, says what to prepare the day before and how to set up the projector.

- The headings are your script: say each one aloud before you run its cells.
- **Ask** for the prediction, and let everybody write it down, before you run the cell. **Screen** is what the recorded
  run has shown there, and **answer** what the chapter says right below it.
- Nobody can know what your room will predict. The usual wrong answers in this sheet are those of each chapter's quiz,
  with what to say to each.
- *Core* exercises are for everybody, *optional* ones for those who are done early.
- `reference.md`, beside the chapters, is the page to keep: every term, and what to check if a task does not run."""


def _clock(minutes: int) -> str:
    return f"{minutes // 60}:{minutes % 60:02}"


def _shares(item: Item) -> tuple[str, str]:
    """How an item's minutes are divided, for the table."""
    if item.chapter is None:
        return "", ""
    if item.is_whole:
        return str(item.chapter.together), str(item.chapter.practise)
    begun = f"the first {item.minutes}: stop at any heading" if item.minutes < item.chapter.together else item.minutes
    return str(begun), "on the way home"


def _free(minutes: int) -> int:
    return max(5, minutes // FREE)


def _plan(known: list[Chapter], minutes: int) -> list[Item]:
    """What is taught and when: first the chapters with a plain number, as many as fit, then those with a letter."""
    chosen: list[Item] = []
    for chapter in sorted(known, key=lambda chapter: (not chapter.number.isdigit(), chapter.number)):
        lengths = (chapter.minutes, *range(chapter.together, LEAST_START - 1, -1))
        items = (Item(length, chapter.title, chapter) for length in lengths)
        fitting = next((item for item in items if _left([*chosen, item], minutes) >= 0), None)
        chosen += [fitting] if fitting else []
        if not fitting or not fitting.is_whole:
            break
    blocks = _blocks_of(chosen)
    pauses = _pauses(blocks, minutes)
    spare = _left(chosen, minutes) + _free(minutes)
    share = spare // len(blocks) // 5 * 5
    plan: list[Item] = []
    for number, block in enumerate(blocks):
        plan += block
        free = share if number < len(pauses) else spare - share * len(pauses)
        plan += [Item(free, "Questions, and time for those who are behind")] if free else []
        if number < len(pauses):
            plan.append(Item(pauses[number], "Lunch" if pauses[number] == LUNCH else "Break"))
    return plan


def _left(chosen: list[Item], minutes: int) -> int:
    """The minutes that a choice leaves, beside its breaks and what stays free in any case."""
    pauses = _pauses(_blocks_of(chosen), minutes)
    return minutes - _free(minutes) - sum(item.minutes for item in chosen) - sum(pauses)


def _blocks_of(chosen: list[Item]) -> list[list[Item]]:
    """The chapters in the order of the course, divided where a break is due."""
    blocks: list[list[Item]] = []
    for item in sorted(chosen, key=lambda item: item.what):
        if not blocks or sum(other.minutes for other in blocks[-1]) + item.minutes > LONGEST_BLOCK:
            blocks.append([])
        blocks[-1].append(item)
    return blocks


def _pauses(blocks: list[list[Item]], minutes: int) -> list[int]:
    """How long the break after each block is, except after the last. The one nearest to the middle may be for lunch."""
    pauses = [BREAK] * (len(blocks) - 1)
    if pauses and minutes >= LUNCH_FROM:
        taught = list(itertools.accumulate(sum(item.minutes for item in block) for block in blocks))
        pauses[min(range(len(pauses)), key=lambda at: abs(taught[at] - taught[-1] / 2))] = LUNCH
    return pauses


def _chapter(number: str, path: Path) -> Chapter:
    """Read a chapter. Raises Problem if it can't be read, or doesn't say how long it takes."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            cell["source"] = "".join(cell["source"])
        first = cells[0]["source"]
    except (OSError, ValueError, LookupError, TypeError):
        place = copies.shown(path)
        raise Problem(f"{place} is damaged. Move it away, and get it again with: git checkout {place}") from None
    title = re.match(r"# (.+)", first)
    times = re.search(r"(\d+) minutes to read and run, (\d+) to practise", first)
    if not title or not times:
        place = copies.shown(path)
        raise Problem(f"{place} doesn't say in its first cell what it is called and how many minutes it takes.")
    return Chapter(number, title[1], int(times[1]), int(times[2]), cells)


def _section(chapter: Chapter, whole: bool) -> Iterator[str]:
    """The lines of the sheet about a chapter."""
    blocks = list(_blocks(chapter))
    yield from ("By the end, everyone can", "", *_items(_after(chapter.cells[0]["source"], "**By the end you can**")))
    yield from ("", "### Script", "", *_script(blocks))
    yield from ("", "### Exercises" if whole else "### Exercises, for the way home", "", *_exercises(blocks))
    yield from ("", "### Quiz: the usual wrong answers, and what to say", "", *_questions(chapter))
    yield from ("", "### Before you go on", "", *_seen(chapter.cells), "Everyone can say", "")
    yield from _items(_after(_prose(chapter), "## What you can say now"))


def _blocks(chapter: Chapter) -> Iterator[tuple[str, str]]:
    """A chapter in pieces: a kind ("##", "###", "predict", "prose", "list", "code") and the text.

    What is folded, fenced code, tables, pictures and notes are left out. The text of code is what it has printed.
    """
    for cell in chapter.cells:
        if cell["cell_type"] == "code":
            yield "code", _printed(cell)
            continue
        text = re.sub(r"(?s)<details>.*?</details>|```.*?```", "", cell["source"])
        for block in re.split(r"\n\s*\n", re.sub(r"(?m)^(#+ .*)$", r"\n\n\1\n\n", text)):
            block = block.strip()
            mark = re.match(r"(###?) (.*)", block)
            if mark:
                yield mark[1], _plain(mark[2])
            elif "**Predict:**" in block:
                yield "predict", _plain(re.sub(r"(?m)^> ?", "", block).partition("**Predict:**")[2])
            elif re.match(r"- |\d+\. ", block):
                yield "list", _plain(re.sub(r"(?m)^(\d+)\. ", r"(\1) ", re.sub(r"(?m)^- ", "• ", block)))
            elif block and not re.match(r"[|>!#<]", block):
                yield "prose", _plain(block)


def _script(blocks: list[tuple[str, str]]) -> Iterator[str]:
    """The headings, numbered, each with its predictions."""
    number = 0
    for at, (kind, text) in enumerate(blocks):
        if kind == "##" and text not in FRAME:
            number += 1
            yield f"{number}. **{text}**"
        elif kind == "predict":
            screen, answer = _answer(blocks[at + 1 :])
            yield f"{INDENT}- **Ask:** {text[:1].upper()}{text[1:]}"
            if screen:
                yield from _shown(f"{INDENT}- **Screen:**", screen, f"{INDENT}  ")
            elsewhere = "(The screen shows it.)" if screen else "(It comes later in the chapter.)"
            yield f"{INDENT}- **Answer:** {answer or elsewhere}"


def _answer(following: list[tuple[str, str]]) -> tuple[str, str]:
    """What follows a prediction, up to the next heading: the last short thing printed, and the first paragraph."""
    screen, has_run = "", False
    for at, (kind, text) in enumerate(following):
        if kind in ("##", "###", "predict"):
            break
        if kind == "code":
            screen, has_run = text or screen, True
        elif has_run:
            more = following[at + 1] if text.endswith(":") else ("", "")
            return screen, f"{text} {more[1]}" if more[0] == "list" else text
    return screen, ""


def _exercises(blocks: list[tuple[str, str]]) -> Iterator[str]:
    for at, (kind, text) in enumerate(blocks):
        if kind == "###" and text.startswith("Exercise "):
            name, _, level = text.removeprefix("Exercise ").partition(" ")
            asked = next((text for kind, text in blocks[at + 1 :] if kind == "prose"), "")
            yield f"- **{name}** *{level}* {asked}"


def _questions(chapter: Chapter) -> Iterator[str]:
    """The questions of the quiz: each with its right answer, and with its wrong ones and why they are wrong."""
    known = _quiz(chapter.number)
    for number, text in re.findall(r"(?ms)^### Question (\d+)\n+(.*?)(?=^#|<details>|\0|\Z)", _prose(chapter)):
        choices = {letter: _plain(choice) for letter, choice in re.findall(r"(?m)^- \*\*([a-z])\)\*\* (.*)$", text)}
        question = known.get(f"{chapter.number}-{number}")
        if not question:
            continue
        right = [question["right"]] if isinstance(question["right"], str) else question["right"]
        yield f"{number}. {_plain(re.split(r'(?m)^- [*][*]a[)]', text)[0])}"
        yield f"{INDENT}- **Right:** {_choice(right[0], choices)}"
        for wrong, reason in question["wrong"].items():
            yield f"{INDENT}- **Wrong:** {_choice(wrong, choices)} *No:* {_plain(reason)}"


def _choice(answer: str, choices: dict[str, str]) -> str:
    return f"{answer}) {choices[answer]}" if answer in choices else f"`{answer}`."


def _quiz(number: str) -> dict[str, dict[str, Any]]:
    """The right and the wrong answers of a chapter's quiz by question, from the source of its module."""
    path = ROOT / "course_tasks" / "exercises" / f"chapter_{number}.py"
    if not path.exists():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "QUIZ" and isinstance(node.value, ast.Dict):
            return {
                ast.literal_eval(name): {
                    keyword.arg: ast.literal_eval(keyword.value)
                    for keyword in question.keywords
                    if keyword.arg in ("right", "wrong")
                }
                for name, question in zip(node.value.keys, node.value.values, strict=True)
                if name and isinstance(question, ast.Call)
            }
    return {}


def _seen(cells: list[dict[str, Any]]) -> Iterator[str]:
    """The last short output before the exercises: whoever has it has run what comes before."""
    last = ""
    for cell in cells:
        if cell["cell_type"] == "markdown" and re.search(r"(?m)^## Exercises", cell["source"]):
            break
        if cell["cell_type"] == "code":
            last = _printed(cell) or last
    if last:
        yield from _shown("Everyone has seen this, the last output before the exercises:", last, "")


def _printed(cell: dict[str, Any]) -> str:
    """What a code cell has printed or returned, if it is short text and no picture or pane."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if set(data) <= {"text/plain"} and output.get("output_type") != "error":
            text = "".join(output.get("text", data.get("text/plain", "")))
            asked = cell["source"].rpartition("\n")[2] if output.get("output_type") == "execute_result" else ""
            found += [f">>> {asked}"] * _is_expression(asked) + text.strip("\n").splitlines()
    return "\n".join(found) if len(found) <= SHORT else ""


def _is_expression(line: str) -> bool:
    try:
        return bool(compile(line, "", "eval"))
    except SyntaxError:
        return False


def _shown(label: str, text: str, margin: str) -> Iterator[str]:
    """Output under a label."""
    yield from (label, "")
    yield from (f"{margin}{line}".rstrip() for line in ("```text", *text.splitlines(), "```"))
    yield ""


def _prose(chapter: Chapter) -> str:
    """The chapter's markdown, with a NUL after each cell."""
    return "\n\0\n".join(cell["source"] for cell in chapter.cells if cell["cell_type"] == "markdown")


def _after(text: str, mark: str) -> str:
    """The text after a mark, up to the next heading or the end of its cell."""
    return re.split(r"(?m)^#|\0", text.partition(mark)[2])[0]


def _items(text: str) -> list[str]:
    """The items of the first list in a text."""
    return [f"- {_plain(item)}" for item in re.findall(r"(?m)^- (.*)$", text)]


def _plain(text: str) -> str:
    """Markdown in one line, without links, pictures and tags, which are no use on paper."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"(?<!`)</?\w[^>`]*>", "", text).split())
