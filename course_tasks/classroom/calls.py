"""`Calls`: how many calls a service got, second by second, as a picture and in a line of text for each row."""

import html
from collections.abc import Mapping, Sequence

from course_tasks.classroom.drawing import AXIS, LEFT, RIGHT, TITLE, WIDTH, axis, framed, image
from course_tasks.classroom.errors import ClassroomError

HIGH, GAP = 56, 8  # pixels: of the highest bar, and between two rows
STEP = 0.5  # seconds that one bar counts


class Calls:
    """A chart of calls over time: a row for each list of times, and in it a bar for each half second.

    All rows have the same scales, and each begins with its first call. As text, a line for each row.

    Args:
        rows: by their names, the times of the calls in seconds, at least one in each list.

    Raises:
        ClassroomError: there is no row, or one has something else than numbers.

    Example:
        >>> Calls({"fixed": [0.0, 0.1, 1.2], "backoff": [0.0, 3.1]})
        fixed: 3 calls in 1.2 s, at most 2 in half a second
        backoff: 2 calls in 3.1 s, at most 1 in half a second
    """

    def __init__(self, rows: Mapping[str, Sequence[float]]):
        if not isinstance(rows, Mapping) or not rows:
            raise ClassroomError('Calls takes a dictionary of at least one list, as in Calls({"fixed": times}).')
        for name, times in rows.items():
            if not isinstance(times, Sequence) or not times or not all(isinstance(time, int | float) for time in times):
                raise ClassroomError(f"Calls takes lists of times in seconds. {name!r} is no such list.")
        self.rows = {name: [time - min(times) for time in times] for name, times in rows.items()}

    def __repr__(self) -> str:
        return "\n".join(
            f"{name}: {len(times)} call{'s' * (len(times) > 1)} in {max(times):.1f} s, "
            f"at most {max(_counts(times))} in half a second"
            for name, times in self.rows.items()
        )

    def _repr_html_(self) -> str:
        return image("Calls over time. " + "; ".join(repr(self).splitlines()), self.svg())

    def svg(self) -> str:
        """The picture as SVG."""
        longest = max(STEP, *(time for times in self.rows.values() for time in times))
        counts = {name: _counts(times) for name, times in self.rows.items()}
        most = max(map(max, counts.values()))
        scale, drawn, top = (WIDTH - LEFT - RIGHT) / (longest + STEP), [], TITLE
        for name, times in self.rows.items():
            bottom = top + HIGH
            drawn.append(f'<text class="name" x="4" y="{bottom - 24}">{html.escape(name[:14])}</text>')
            drawn.append(f'<text x="4" y="{bottom - 6}">{len(times)} calls</text>')
            drawn.append(f'<path class="grid" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
            for number, count in enumerate(counts[name]):
                high = HIGH * count / most
                drawn.append(
                    f'<rect class="bar" x="{LEFT + number * STEP * scale:.1f}" y="{bottom - high:.1f}" '
                    f'width="{STEP * scale - 1:.1f}" height="{high:.1f}"/>'
                )
            top = bottom + GAP
        drawn.append(f'<text x="{LEFT}" y="17">calls in each half second (the highest bar: {most})</text>')
        return framed([*drawn, *axis(longest + STEP, scale, top)], top + AXIS)


def _counts(times: Sequence[float]) -> list[int]:
    """How many of the times are in the first half second, in the second one, and so on."""
    counts = [0] * (int(max(times) / STEP) + 1)
    for time in times:
        counts[int(time / STEP)] += 1
    return counts
