"""`Gantt`: when each task ran, and on which slot of its worker, as a picture and in a line of text."""

import html
from collections.abc import Mapping, Sequence

from course_tasks.classroom.drawing import AXIS, LEFT, RIGHT, ROW, TITLE, WIDTH, axis, framed, image
from course_tasks.classroom.errors import ClassroomError
from course_tasks.spans import FIELDS, Span, slots, speedup, wall


class Gantt:
    """A chart: a panel for each list of tasks, in it a row for each slot, time to the right.

    The panels share one scale, and each begins with its first task. As text, a line for each panel.

    Args:
        panels: by their titles, lists of what the tasks `wait` and `compute` return.
        columns: how many panels stand side by side.

    Raises:
        ClassroomError: a panel has no tasks, or something else than what these tasks return.
    """

    def __init__(self, panels: Mapping[str, Sequence[Span]], columns: int = 1):
        for title, spans in panels.items():
            if not spans or not all(isinstance(span, dict) and span.keys() >= FIELDS for span in spans):
                raise ClassroomError(f"Gantt takes lists of what wait and compute return. {title!r} is no such list.")
        if not panels:
            raise ClassroomError('Gantt takes a dictionary of at least one panel, as in Gantt({"gevent": values}).')
        self.panels, self.columns = panels, columns

    def __repr__(self) -> str:
        return "\n".join(f"{title}: {self._summary(spans)}" for title, spans in self.panels.items())

    def _repr_html_(self) -> str:
        return image("When each task ran, on which slot: " + "; ".join(repr(self).splitlines()), self.svg())

    def svg(self) -> str:
        """The picture as SVG."""
        longest = max(0.001, *map(wall, self.panels.values()))
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
        figures = f"{wall(spans):.2f} s, {speedup(spans):.1f} x"
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
        used, gain = len(slots(spans)), speedup(spans)
        kind = f"{len(spans)} task{'s' * (len(spans) > 1)} used {used} slot{'s' * (used > 1)}"
        factor = f"{gain:.1f} times as fast" if not 0 < gain < 0.9 else f"{1 / gain:.1f} times as slow"
        return f"{kind} and took {wall(spans):.2f} s, {factor} as one by one"
