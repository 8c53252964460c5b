"""`Gantt`: when each task ran, and on which slot of its worker, as a picture and in a line of text."""

import base64
import html
import math
from collections.abc import Callable, Sequence

from course_tasks.classroom import ClassroomError

FIELDS = {"pid", "thread", "start", "end", "delayed", "seconds"}  # of what the tasks wait and compute return
GREEN = ("Dummy-", "GreenThread-")  # how gevent and eventlet name the greenlet that each task gets
WIDTH, LEFT, RIGHT = 760, 108, 14  # of the picture, of the column of names, and free at the right, in pixels
ROW, TITLE, AXIS = 20, 26, 26  # heights: a slot's row (less where there are many), a panel's title, its axis
TICKS = 5  # at most, on an axis
# The colours of notebooks/figures; a picture in a notebook follows the system's theme, and so does JupyterLab here
STYLE = """
text{font:12px system-ui,sans-serif;fill:#1f2430}.name{font-weight:700;font-size:13px}
.tick{text-anchor:middle}.grid{stroke:#4a5160;opacity:.3}.row{fill:#e9f2ec}
.bar{fill:#8fd0a6;stroke:#2f7d4f}
@media (prefers-color-scheme:dark){text{fill:#e8eaf0}.grid{stroke:#aab2c2}.row{fill:#21382b}
.bar{fill:#2f7d4f;stroke:#63c08a}}
"""

Span = dict[str, float | int | str]


def wall(spans: Sequence[Span]) -> float:
    """Seconds from the start of the first task to the end of the last."""
    return max(span["end"] for span in spans) - min(span["start"] for span in spans)


def speedup(spans: Sequence[Span]) -> float:
    """How many times as fast as one after the other the tasks were.

    That is the seconds that they were asked for, over those from the first start to the last end; a delay by other
    programs, which says nothing about the pool, is left out of the end. At most the number of slots, as no task takes
    less than it was asked for.
    """
    end = max(span["end"] - span["delayed"] for span in spans)
    return sum(span["seconds"] for span in spans) / (end - min(span["start"] for span in spans))


def slots(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """The tasks by the slot that ran them, in the order in which the slots were first used.

    A slot is a process or a thread. A green pool has a new greenlet for each task: there a slot is a place that is
    free again when its task is over, and the number of slots is that of tasks in hand at the same time.
    """
    found: dict[str, list[Span]] = {}
    threads: dict[tuple, str] = {}
    for span in sorted(spans, key=lambda span: span["start"]):
        if str(span["thread"]).startswith(GREEN):
            number = 1
            while (name := f"{span['pid']}, slot {number}") in found and found[name][-1]["end"] > span["start"]:
                number += 1
        elif span["thread"] == "MainThread":
            name = f"pid {span['pid']}"
        else:
            number = sum(pid == span["pid"] for pid, _ in threads) + 1
            name = threads.setdefault((span["pid"], span["thread"]), f"{span['pid']}, thread {number}")
        found.setdefault(name, []).append(span)
    return found


class Gantt:
    """A chart: a panel for each list of tasks, in it a row for each slot, time to the right.

    The panels share one scale, and each begins with its first task. As text, a line for each panel.

    Args:
        panels: by their titles, lists of what the tasks `wait` and `compute` return.
        columns: how many panels stand side by side.
        factor: what says how fast a list of tasks was.

    Raises:
        ClassroomError: a panel has no tasks, or something else than what these tasks return.
    """

    def __init__(
        self,
        panels: dict[str, Sequence[Span]],
        columns: int = 1,
        factor: Callable[[Sequence[Span]], float] = speedup,
    ):
        for title, spans in panels.items():
            if not spans or not all(isinstance(span, dict) and span.keys() >= FIELDS for span in spans):
                raise ClassroomError(f"Gantt takes lists of what wait and compute return. {title!r} is no such list.")
        if not panels:
            raise ClassroomError('Gantt takes a dictionary of at least one panel, as in Gantt({"gevent": values}).')
        self.panels, self.columns, self.factor = panels, columns, factor

    def __repr__(self) -> str:
        return "\n".join(f"{title}: {self._summary(spans)}" for title, spans in self.panels.items())

    def _repr_html_(self) -> str:
        return image("When each task ran, on which slot: " + "; ".join(repr(self).splitlines()), self.svg())

    def svg(self) -> str:
        """The picture as SVG."""
        longest = max(map(wall, self.panels.values()))
        wide, drawn, top = WIDTH / self.columns, [], 0
        titles = list(self.panels)
        for first in range(0, len(titles), self.columns):
            together = titles[first : first + self.columns]
            rows = max(len(slots(self.panels[title])) for title in together)
            height = ROW if rows <= 12 else max(6, 12 * ROW // rows)
            for column, title in enumerate(together):
                drawn.append(f'<g transform="translate({column * wide:.1f} {top})">')
                drawn += self._panel(title, wide, height, longest)
                drawn.append("</g>")
            top += TITLE + rows * height + AXIS
        return framed(drawn, top)

    def _panel(self, title: str, wide: float, height: float, longest: float) -> list[str]:
        spans = self.panels[title]
        begin, rows = min(span["start"] for span in spans), slots(spans)
        scale = (wide - LEFT - RIGHT) / longest
        bottom = TITLE + len(rows) * height
        figures = f"{wall(spans):.2f} s, {self.factor(spans):.1f} x"
        drawn = [
            f'<text class="name" x="4" y="17">{html.escape(title)}</text>',
            f'<text x="{wide - RIGHT:.1f}" y="17" text-anchor="end">{figures}</text>',
        ]
        for number, (name, row) in enumerate(rows.items()):
            y = TITLE + number * height
            drawn.append(
                f'<rect class="row" x="{LEFT}" y="{y + 1:.1f}" '
                f'width="{wide - LEFT - RIGHT:.1f}" height="{height - 2:.1f}"/>'
            )
            if height == ROW:  # else there is no room for it
                drawn.append(f'<text x="4" y="{y + 14}">{name}</text>')
            for span in row:
                drawn.append(
                    f'<rect class="bar" x="{LEFT + (span["start"] - begin) * scale:.1f}" y="{y + 2:.1f}" rx="2" '
                    f'width="{max((span["end"] - span["start"]) * scale, 1):.1f}" height="{height - 4:.1f}"/>'
                )
        return drawn + axis(longest, scale, bottom)

    def _summary(self, spans: Sequence[Span]) -> str:
        number = len(slots(spans))
        kind = f"{len(spans)} task{'s' * (len(spans) > 1)} on {number} slot{'s' * (number > 1)}"
        return f"{kind} took {wall(spans):.2f} s, {self.factor(spans):.1f} x as fast as one after the other"


def axis(longest: float, scale: float, bottom: float, left: float = LEFT, top: float = TITLE) -> list[str]:
    """Ticks with their seconds, `scale` pixels each, below `bottom`, and a line up to `top` from each."""
    step, drawn = 10.0 ** math.floor(math.log10(longest)), []
    step *= next(part for part in (0.2, 0.5, 1, 2, 5) if longest / (step * part) <= TICKS)
    for at in (number * step for number in range(int(longest / step) + 1)):
        x = left + at * scale
        drawn.append(f'<path class="grid" d="M{x:.1f} {top}V{bottom + 4:.1f}"/>')
        drawn.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 17:.1f}">{at:.6g} s</text>')
    return drawn


def framed(drawn: list[str], height: float, style: str = STYLE) -> str:
    """The whole picture, of what was drawn."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<style>{style}</style>{''.join(drawn)}</svg>"
    )


def image(alt: str, picture: str) -> str:
    """The picture as HTML that shows in a notebook that is not trusted yet, and follows the theme."""
    data = base64.b64encode(picture.encode()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}" width="{WIDTH}">'
