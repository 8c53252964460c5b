"""Spans: which process and thread ran a task, and when; and what a list of them says about a worker.

The tasks `wait` and `compute` return a span. A **slot** is what runs one task at a time: a process, a thread or, in a
green pool, a place for one greenlet.
"""

from collections.abc import Sequence
from typing import TypedDict

GREEN = ("Dummy-", "GreenThread-")  # how gevent and eventlet name the greenlet that each task gets


class Span(TypedDict):
    """One run of a task.

    Attributes:
        pid: the process that ran it.
        thread: the name of the thread that ran it.
        start: when it began, in seconds since the Epoch.
        end: when it ended, in seconds since the Epoch.
        delayed: how many seconds it was ready to run while other programs had the processors.
        seconds: how many seconds it was asked to take.
    """

    pid: int
    thread: str
    start: float
    end: float
    delayed: float
    seconds: float


FIELDS = Span.__required_keys__


def wall(spans: Sequence[Span]) -> float:
    """The wall time: seconds from the start of the first task to the end of the last."""
    return max(span["end"] for span in spans) - min(span["start"] for span in spans)


def speedup(spans: Sequence[Span], delays: bool = True) -> float:
    """How many times as fast this was as running the tasks one by one.

    Args:
        spans: at least one.
        delays: whether the time counts in which other programs had the processors. Without it, the speed-up is at
            most the number of slots and says what the pool does, whatever else this machine is doing.

    Returns:
        The seconds that all tasks together were asked to take, divided by the seconds from the first start to the
        last end.
    """
    end = max(span["end"] - (0 if delays else span["delayed"]) for span in spans)
    took = end - min(span["start"] for span in spans)
    return sum(span["seconds"] for span in spans) / max(took, 1e-6)  # a task may be too short for the clock


def slots(spans: Sequence[Span]) -> dict[str, list[Span]]:
    """The tasks by the slot that ran them, in the order in which the slots were first used.

    A green pool starts a new greenlet for each task. There a slot becomes free when its task ends, so the number of
    slots is the largest number of tasks that were running at the same time.
    """
    found: dict[str, list[Span]] = {}
    threads: dict[tuple[int, str], str] = {}
    for span in sorted(spans, key=lambda span: span["start"]):
        if span["thread"].startswith(GREEN):
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


def at_once(spans: Sequence[Span]) -> int:
    """The largest number of tasks that were running at the same time."""
    return max(sum(one["start"] <= span["start"] < one["end"] for one in spans) for span in spans)
