"""`Trail`: one request's way through services and tasks, made from the lines that their logs have about it."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from course_tasks.classroom.drawing import AXIS, RIGHT, ROW, TITLE, WIDTH, axis, framed, image
from course_tasks.classroom.errors import ClassroomError

LEFT = 156  # pixels for the names, which may be a request's method and path
LONGEST_NAME = 22  # letters that fit there
LINE = re.compile(r"\[(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[,.]\d{3}) [A-Z]+ ([^\s\]]+)\] (.*)")
ABOUT = re.compile(r"Task ([\w.]+)\[([\w-]{8})[\w-]*\] (.*)")  # what a worker says about a task
OWN = re.compile(r"[\w.]+\[([\w-]{8})\]: ")  # what a task says itself
ANSWERED = re.compile(r'\S+ - "([A-Z]+ \S+) HTTP/[\d.]+" (\d{3})')  # an ASGI server's access log
ENDS = {"succeeded": "succeeded", "raised": "failed", "retry": "retried", "ignored": "ignored", "rejected": "rejected"}
RAN = re.compile(r"succeeded in ([\d.e-]+)s")
BAD = {"failed", "rejected"}  # and answers from 500 up
KINDS = {"wait": "waited", "bar": "ran", "bad": "failed"}


@dataclass
class Step:
    """A request, or one run of a task. Times are in seconds since the Epoch, None where the log does not tell.

    Attributes:
        name: of the task, or the request's method and path.
        arrived: when its first line was written.
        started: when it began to run.
        ended: when its last line was.
        how: how it ended.
    """

    name: str
    arrived: float
    started: float | None = None
    ended: float | None = None
    how: str = "not over"

    @property
    def answered(self) -> bool:
        """Whether it is a request, which begins as it arrives."""
        return self.how.startswith("answered")

    @property
    def bad(self) -> bool:
        """Whether it failed, or was answered with an error of the server's."""
        return self.how in BAD or self.how.startswith("answered 5")


class Trail:
    """The steps of one request in the order of their arrival, as text and as a picture.

    A row for each: waiting from its arrival to its start, then running. The times are those of the log's lines, by the
    clocks of the machines that wrote them. A task that succeeded has started as long before its end as Celery says
    that it took, another one with the first line that it logged itself. A log does not say who sent whom.

    Args:
        lines: of all the logs, in any order, in the format of `course_tasks.correlation`; those with other ids, or in
            other formats, are passed over.
        id: the correlation id.

    Raises:
        ClassroomError: these are no lines, or none of them is about a request or a task of this id.
    """

    def __init__(self, lines: Sequence[str], id: str):
        fit = isinstance(lines, Sequence) and not isinstance(lines, str) and isinstance(id, str)
        if not fit or not all(isinstance(line, str) for line in lines):
            raise ClassroomError('Trail takes a list of lines and an id, as in Trail(lines, "ada-1").')
        found = [match.groups() for line in lines if (match := LINE.match(line))]
        mine = [(datetime.fromisoformat(when).timestamp(), text) for when, other, text in found if other == id]
        if not mine:
            known = ", ".join(sorted({other for _, other, _ in found})[:5]) or "none: they are in another format"
            raise ClassroomError(f"None of these {len(lines)} lines has the id {id!r}. They have: {known}.")
        mine.sort(key=lambda line: line[0])  # lines of the same moment stay in their order
        self.id, self.steps = id, _steps(mine)
        if not self.steps:
            raise ClassroomError(
                f"The lines with the id {id!r} mention neither a request that was answered nor a task "
                "that was received."
            )
        self._begin = min(step.arrived for step in self.steps)
        # what is not over goes on to the last line
        self._end = max([mine[-1][0], *(step.ended for step in self.steps if step.ended)])

    def __repr__(self) -> str:
        number = len(self.steps)
        return "\n".join([f"The trail of {self.id}: {number} step{'s' * (number > 1)}", *map(self._told, self.steps)])

    def _told(self, step: Step) -> str:
        if step.ended is None:
            how = step.how
        elif step.started is None or step.answered:
            how = f"{step.how} after {step.ended - step.arrived:.3f} s"
        else:
            waited, ran = step.started - step.arrived, step.ended - step.started
            how = f"waited {waited:.3f} s, ran {ran:.3f} s, {step.how}"
        return f"+{step.arrived - self._begin:.3f} s {step.name}: {how}"

    def _repr_html_(self) -> str:
        return image("; ".join(repr(self).splitlines()), self.svg())

    def svg(self) -> str:
        """The picture as SVG."""
        longest = max(self._end - self._begin, 0.001)
        wide = WIDTH - LEFT - RIGHT
        scale, bottom = wide / longest, TITLE + len(self.steps) * ROW
        drawn = [f'<text class="name" x="4" y="17">{html.escape(self.id[:40])}, {longest:.2f} s</text>']
        for number, (kind, text) in enumerate(KINDS.items()):
            x = WIDTH - RIGHT - 74 * (len(KINDS) - number)
            drawn.append(f'<rect class="{kind}" x="{x}" y="7" width="12" height="12" rx="2"/>')
            drawn.append(f'<text x="{x + 17}" y="17">{text}</text>')
        for number, step in enumerate(self.steps):
            y = TITLE + number * ROW
            drawn.append(f'<rect class="row" x="{LEFT}" y="{y + 1}" width="{wide}" height="{ROW - 2}"/>')
            name = step.name if len(step.name) <= LONGEST_NAME else step.name[: LONGEST_NAME - 1] + "…"
            drawn.append(f'<text x="4" y="{y + 14}">{html.escape(name)}</text>')
            end = self._end if step.ended is None else step.ended
            # what has ended, and who knows when it began, is drawn as having run
            started = step.started or (end if step.ended is None else step.arrived)
            for kind, start, stop in (
                ("wait", step.arrived, started),
                ("bad" if step.bad else "bar", started, end),
            ):
                if stop > start:
                    drawn.append(
                        f'<rect class="{kind}" x="{LEFT + (start - self._begin) * scale:.1f}" y="{y + 2}" rx="2" '
                        f'width="{max((stop - start) * scale, 1):.1f}" height="{ROW - 4}"/>'
                    )
        return framed([*drawn, *axis(longest, scale, bottom, LEFT)], bottom + AXIS)


def _steps(lines: Sequence[tuple[float, str]]) -> list[Step]:
    """What the lines of one id, each with its time and in their order, tell of its requests and tasks."""
    steps: list[Step] = []
    current: dict[str, Step] = {}  # the last run of a task, by the first letters of its id
    began: float | None = None  # when a request did of which the answer is still to come
    for when, text in lines:
        if about := ABOUT.match(text):
            name, task, what = about.groups()
            if what == "received":
                steps.append(Step(name, when))
                current[task] = steps[-1]
            elif (step := current.get(task)) and (how := ENDS.get(what.split(maxsplit=1)[0].rstrip(":"))):
                step.ended, step.how = when, how
                if ran := RAN.match(what):  # by the task's clock, and the line is rounded
                    step.started = max(step.arrived, when - float(ran[1]))
        elif own := OWN.match(text):
            step = current.get(own[1])
            if step and step.started is None and step.ended is None:
                step.started = when
        elif answered := ANSWERED.match(text):
            start = when if began is None else began
            steps.append(Step(answered[1], start, start, when, f"answered {answered[2]}"))
            began = None
        else:
            began = when if began is None else began
    return sorted(steps, key=lambda step: step.arrived)
