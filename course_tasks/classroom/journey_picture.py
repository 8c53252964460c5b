"""The picture of a task's way, from its steps; `journey` listens for those."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from course_tasks.classroom.drawing import AXIS, WIDTH, axis, framed

Bar = tuple[str, float, float, str, str]  # a stay: its row, from and to (seconds), its label and its class


@dataclass
class Step:
    """Something that happened to the task: what, when (seconds since the Epoch) and where (a worker's node name)."""

    what: str
    when: float
    where: str = ""


def bars_of(steps: Sequence[Step], listened: float | None, stored: bool) -> list[Bar]:
    """Turn a task's steps into the bars of its picture.

    Args:
        steps: at least one, in their order. The first says that the task was sent.
        listened: how many seconds after the first step nobody listened any more, or None if the task has ended.
        stored: whether the backend has its result.

    Returns:
        The bars, in the order of time.
    """
    bars: list[Bar] = [("client", 0.0, 0.0, "sent", "bar")]
    row, since = "broker", 0.0  # where the task is, and since when

    def leave(when: float, label: str, kind: str = "wait") -> None:
        bars.append((row, min(since, when), when, f"{label} {when - since:.3f} s", kind))

    for what, when in [(step.what, step.when) for step in steps[1:]]:
        if what in ("received", "started"):
            leave(when, "waits")
            row = "held" if what == "received" else "runs"
        else:
            bad = "bar" if what == "succeeded" else "bad"
            if row == "runs":
                leave(when, f"{what}, ran", bad)
            else:
                leave(when, "waits")
                bars.append(("runs", when, when, what, bad))
            row = "broker" if what in ("retried", "rejected") else "runs"
        since = when
    if listened is not None:
        end = max(listened, since + 0.001)  # with no worker, nothing is waited for
        leave(end, *("has run for", "bar") if row == "runs" else ("has waited for", "wait"))
    if stored:
        bars.append(("backend", since, since, "stored", "bar"))
    return bars


def drawn(bars: Sequence[Bar]) -> str:
    """Draw the picture: a lane for each place, time to the right, a bar for each stay, a line for each move.

    Args:
        bars: what `bars_of` returned.

    Returns:
        The picture as SVG.
    """
    left, right, tall = 110, WIDTH - 20, 46
    span = max(end for _, _, end, _, _ in bars) or 0.001
    rows = {"client": 0, "broker": tall, "held": 2 * tall, "runs": 3 * tall, "backend": 4 * tall}
    lanes = [("client", 1), ("broker", 1), ("worker", 2)] + [("backend", 1)] * (bars[-1][0] == "backend")
    parts: list[str] = []
    bottom = 0
    for number, (name, height) in enumerate(lanes):
        if number % 2 == 0:
            parts.append(f'<rect class="row" y="{bottom}" width="{WIDTH}" height="{height * tall}"/>')
        parts.append(f'<text class="name" x="10" y="{bottom + height * tall / 2 + 5}">{name}</text>')
        bottom += height * tall

    scale = (right - 8 - left) / span

    def x(when: float) -> float:
        return left + when * scale

    parts += axis(span, scale, bottom, left, top=0)
    for (before, *_), (row, start, *_) in itertools.pairwise(bars):
        down = rows[before] < rows[row]
        ends = rows[before] + (40 if down else 22), rows[row] + (22 if down else 40)
        parts.append(f'<path class="move" d="M{x(start) + 2:.1f} {ends[0]}V{ends[1]}"/>')
    taken: list[tuple[str, float, float]] = []
    for row, start, end, label, kind in sorted(bars, key=lambda bar: bar[1] - bar[2]):  # the longest first
        at, top, wide = x(start), rows[row], max(x(end) - x(start), 6)
        parts.append(f'<rect class="{kind}" x="{at:.1f}" y="{top + 22}" width="{wide:.1f}" height="18" rx="3"/>')
        words = at + 9 if at + 9 + 7 * len(label) < right else at - 4 - 7 * len(label)
        extent = (words, words + 7 * len(label))
        # a label with no room is in the text below only
        if not any(lane == row and extent[0] < to and since < extent[1] for lane, since, to in taken):
            parts.append(f'<text x="{words:.1f}" y="{top + 17}">{label}</text>')
            taken.append((row, *extent))
    return framed(parts, bottom + AXIS)
