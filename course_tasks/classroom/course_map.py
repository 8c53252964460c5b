"""`%progress`: the chapters of the course, what the learner has right in each, and where they stopped."""

import html
import json
from pathlib import Path

from IPython.display import display

from course_tasks import copies, exercises, progress
from course_tasks.classroom.errors import refuse_words

HEADINGS = ("Chapter", "Exercises", "Quiz", "State")
CELL = "text-align:left;padding:3px 14px 3px 8px"
GROUND = "color:var(--jp-content-font-color1,inherit);background:transparent"
LIT = "background:var(--jp-layout-color2,transparent);font-weight:bold"


def show(line: str = "") -> None:
    """Show the map of the course: what you have right in each chapter, and where you stopped."""
    refuse_words("progress", line)
    known, state = copies.chapters(), progress.read()
    rows = [_row(chapter, path, state) for chapter, path in known.items()]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (HEADINGS, *rows)]
    table = "".join(_html_row(row, path.name) for row, path in zip(rows, known.values(), strict=True))
    heads = "".join(f'<th scope="col" style="{CELL}">{heading}</th>' for heading in HEADINGS)
    page = f'<table aria-label="Your progress" style="{GROUND}"><thead><tr>{heads}</tr></thead>{table}</table>'
    display({"text/plain": "\n".join(lines), "text/html": page}, raw=True)


def _row(chapter: str, path: Path, state: dict) -> tuple[str, ...]:
    """A chapter's title, its exercises and quiz questions as "1 of 3", and its marks."""
    counts, complete = [], True
    for kind, names in (("exercises", exercises.all_of(chapter)), ("quiz", exercises.quiz_of(chapter))):
        right = sum(state[kind].get(name) == "right" for name in names)
        counts.append(f"{right} of {len(names)}" if names else "-")
        complete = complete and right == len(names)
    marks = ["✅ complete"] * complete + ["▶ you are here"] * (chapter == state["last"])
    return _title(path), *counts, ", ".join(marks)


def _title(path: Path) -> str:
    """What the notebook's heading says before the colon; its file's name if that can't be read."""
    try:
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
        return "".join(first["source"]).lstrip("# ").partition("\n")[0].partition(":")[0]
    except (OSError, ValueError, LookupError, TypeError):
        return path.stem


def _html_row(row: tuple[str, ...], name: str) -> str:
    style = f' style="{LIT}"' if "▶" in row[-1] else ""
    title = f'<th scope="row" style="{CELL};font-weight:inherit"><a href="{name}">{html.escape(row[0])}</a></th>'
    cells = "".join(f'<td style="{CELL}">{text}</td>' for text in row[1:])
    return f"<tr{style}>{title}{cells}</tr>"
