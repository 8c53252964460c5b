"""The picture of a canvas, from its tasks; `canvas` listens for those."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from course_tasks.classroom.drawing import WIDTH, framed

TALL, GAP = 40, 10  # height of a box, and the space below it, in pixels
LETTER = 6.6  # pixels that a letter takes, about


@dataclass
class Part:
    """A task of a canvas.

    Attributes:
        id: of the task.
        call: its name and arguments.
        after: the ids of the tasks whose end it waits for, or of the one that sent it.
        how: what became of it, in words.
        state: the first of these words: "succeeded", "failed", "revoked", "rejected", "never sent", or one for a task
            that is not over.
    """

    id: str
    call: str
    after: list[str] = field(default_factory=list)
    how: str = ""
    state: str = ""


KINDS = {"succeeded": "bar", "failed": "bad", "revoked": "bad", "rejected": "bad", "never sent": "row"}


def drawn(parts: Sequence[Part]) -> str:
    """Draw the picture: a box for each task, to the right of those that it waits for, with lines between them.

    Args:
        parts: at least one, each after those that it waits for.

    Returns:
        The picture as SVG.
    """
    known = {part.id for part in parts}
    column: dict[str, int] = {}
    row: dict[str, float] = {}
    for part in parts:
        column[part.id] = max([column[id] + 1 for id in part.after if id in column], default=0)
    for number in range(max(column.values()) + 1):
        free = 0.0
        mine = [part for part in parts if column[part.id] == number]
        wish = {part.id: statistics.mean([row[id] for id in part.after if id in row] or [0]) for part in mine}
        for part in sorted(mine, key=lambda part: wish[part.id]):
            row[part.id] = max(free, wish[part.id])
            free = row[part.id] + 1
    step = (WIDTH - 8) / (max(column.values()) + 1)
    wide = min(step - min(28, step / 3), 240)
    step = min(step, wide + 60)
    place = {id: (4 + column[id] * step, 4 + row[id] * (TALL + GAP)) for id in column}
    lines, boxes = [], []
    for number, part in enumerate(parts, start=1):
        x, y = place[part.id]
        for before in filter(known.__contains__, part.after):
            left, top = place[before][0] + wide, place[before][1] + TALL / 2
            half = (left + x) / 2
            lines.append(
                f'<path class="move" fill="none" d="M{left:.1f} {top:.1f}C{half:.1f} {top:.1f} {half:.1f} '
                f'{y + TALL / 2:.1f} {x:.1f} {y + TALL / 2:.1f}"/>'
            )
        kind = KINDS.get(part.state, "wait")
        dashes = ' stroke="#808080" stroke-dasharray="4"' if kind == "row" else ""
        boxes.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{TALL}" rx="4"{dashes}/>'
        )
        for below, words in ((16, f"{number} {part.call}"), (32, part.how)):
            room = int((wide - 8) / LETTER)
            short = words if len(words) <= room else words[: max(room - 1, 0)] + "…"
            boxes.append(f'<text x="{x + 5:.1f}" y="{y + below:.1f}">{html.escape(short)}</text>')
    return framed([*lines, *boxes], 8 + max(row.values()) * (TALL + GAP) + TALL)
