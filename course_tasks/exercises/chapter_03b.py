"""The exercises and the quiz of chapter 03b."""

import time
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.exceptions import TimeoutError as ResultTimeout

from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.toolkit import ask_worker
from course_tasks.exercises import Exercise, Question, WrongAnswer, called

AWAY = "the worker w1 doesn't answer. Is it running, and idle? Run its cell again."


def _ask(client: Celery, question: str) -> Any:
    """What w1 answers."""
    try:
        return ask_worker(client, "w1", question, 5)
    except ClassroomError as error:
        raise WrongAnswer(str(error)) from None


def _taken(answer: Callable) -> str | None:
    client = Celery(set_as_current=False)
    before = sum(_ask(client, "stats")["total"].values())
    if (given := _number(answer)) != before:
        return f"w1 has started {before} tasks so far, but your function says {given!r}."
    try:
        for name, args in (("add", (1, 2)), ("add", (3, 4)), ("whereami", ())):
            client.send_task(name, args=args).get(timeout=10)
    except ResultTimeout:
        return AWAY
    if (given := _number(answer)) == before:
        return f"w1 started three more tasks, and your function still returned {before}. Ask the worker on each call."
    return None if given == before + 3 else f"w1 has started {before + 3} tasks now, but your function says {given!r}."


def _number(answer: Callable) -> Any:
    given = called(answer, "w1", case='for "w1", ')
    if given is None:
        raise WrongAnswer("it returned None. Does your function end with return?")
    if isinstance(given, dict):
        raise WrongAnswer("it returned a dictionary, with a number for each name of a task. Add these numbers up.")
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise WrongAnswer(f"it returned {given!r}, and it should return a whole number.")
    return given


def _wait_until_idle(client: Celery) -> None:
    """A result is stored a moment before the worker's list of active tasks changes."""
    deadline = time.monotonic() + 5
    while _ask(client, "active"):
        if time.monotonic() > deadline:
            raise WrongAnswer("the worker w1 is busy with a task of yours. Wait until it is done.")


def _running(answer: Callable) -> str | None:
    client = Celery(set_as_current=False)
    _wait_until_idle(client)
    first, second = (client.send_task("add_long", args=(1, 2, seconds)) for seconds in (1.3, 0))
    deadline = time.monotonic() + 10
    while first.state != "STARTED":
        if time.monotonic() > deadline:
            return AWAY
    given = called(answer, "w1", case="for a busy worker, ")
    ended = first.state != "STARTED"
    away = called(answer, "nobody", case="for a worker that doesn't exist, ")  # while w1 is still busy
    first.get(timeout=10), second.get(timeout=10)
    if ended and given == []:
        return "your function took longer than the task that was running. Give limit=1, so that it doesn't wait."
    if given is None:
        return "it returned None while w1 was running a task. None is for a worker that doesn't answer."
    if isinstance(given, dict) or not isinstance(given, list | tuple | set | frozenset):
        return f"it returned {_brief(given)}, and it should return a list of ids."
    if any(isinstance(task, dict) for task in given):
        return "the list contains whole dictionaries. Take the id out of each of them."
    if second.id in given:
        return "the list contains a task that w1 had only taken ahead. Ask for active, not for reserved."
    if not given:
        return "the list was empty while w1 was running a task."
    if list(given) != [first.id]:
        return f"w1 was running the task {first.id}, and your function returned {_brief(given)}."
    _wait_until_idle(client)
    idle = called(answer, "w1", case="for an idle worker, ")
    if idle is None or list(idle):
        return f"w1 was running nothing, and your function returned {_brief(idle)}. It should return an empty list."
    if away is None:
        return None
    return f"for a worker that doesn't answer, it returned {_brief(away)}, and it should return None."


def _brief(value: Any) -> str:
    return text if len(text := repr(value)) < 80 else f"{text[:75]}..."


RUNNING = """
def running(name):
    node = f"{{name}}@{{socket.gethostname()}}"
    {body}


answer = running
"""


def _function(*lines: str) -> str:
    return RUNNING.format(body="\n    ".join(lines)).strip()


EXERCISES = {
    "03b-1": Exercise(
        kind=Callable,
        judge=_taken,
        wrong={
            'answer = lambda name: ask_worker(client, name)["total"]': "Add these numbers up",
            'answer = lambda name: len(ask_worker(client, name)["total"])': "but your function says",
            'total = sum(ask_worker(client, "w1")["total"].values())\nanswer = lambda name: total': "on each call",
            'def taken(name):\n    sum(ask_worker(client, name)["total"].values())\n\n\nanswer = taken': (
                "it returned None. Does"
            ),
            'answer = sum(ask_worker(client, "w1")["total"].values())': "should be a function",
            'answer = lambda name: "%s" % sum(ask_worker(client, name)["total"].values())': "return a whole number",
        },
        right=(
            "from collections import Counter\n"
            'answer = lambda name: Counter(ask_worker(client, name, "stats")["total"]).total()',
            "def taken(name):\n    node = f'{name}@{socket.gethostname()}'\n"
            "    stats = client.control.inspect([node], timeout=5, limit=1).stats()\n    taken = 0\n"
            "    for count in stats[node]['total'].values():\n        taken += count\n    return taken\n\n\n"
            "answer = taken",
        ),
    ),
    "03b-2": Exercise(
        kind=Callable,
        judge=_running,
        wrong={
            _function("return [task['id'] for task in ask_worker(client, name, 'active', seconds=1)]"): (
                "for a worker that doesn't exist, your function raised"
            ),
            _function("return (client.control.inspect([node], timeout=1, limit=1).active() or {}).get(node)"): (
                "Take the id out"
            ),
            _function("return client.control.inspect([node], timeout=1, limit=1).active()"): "should return a list of",
            _function(
                "answers = client.control.inspect([node], timeout=1, limit=1).active() or {}",
                "return [task['id'] for task in answers.get(node, [])]",
            ): "it returned [], and it should return None",
            _function(
                "answers = client.control.inspect([node], timeout=1, limit=1).reserved()",
                "return answers and [task['id'] for task in answers[node]]",
            ): "taken ahead",
            _function("return []"): "the list was empty while",
            _function("return None"): "None is for a worker",
        },
        right=(
            "def ids(name):\n    try:\n"
            "        return {task['id'] for task in ask_worker(client, name, 'active', seconds=1)}\n"
            "    except Exception:\n        return None\n\n\nanswer = ids",
            _function(
                "for tasks in (client.control.inspect([node], timeout=0.6).active() or {}).values():",
                "    return [task['id'] for task in tasks]",
            ),
        ),
    ),
}

QUIZ = {
    "03b-1": Question(
        right="c",
        wrong={
            "a": "then the worker would answer, with an empty list.",
            "b": "it may be dead, but a frozen worker, or a busy `solo` worker, doesn't answer either.",
            "d": "if the broker is down, `inspect` raises an `OperationalError` after a few seconds.",
        },
    ),
    "03b-2": Question(
        right=("2", "two", "2 nodes", "two nodes", "2 nodes online"),
        wrong={
            "3": "three workers answer, but Celery doesn't count answers.",
            "1": "not all three workers have the same name.",
        },
        otherwise="answer with a number from 0 to 3.",
    ),
    "03b-3": Question(
        right="b",
        wrong={
            "a": "they would, if somebody left them alone. But the cluster asks them first.",
            "c": "the probe doesn't know what a worker is doing. It only sees that no answer comes.",
            "d": "a probe waits for its answer for seconds, not for minutes, and then it has failed.",
        },
    ),
    "03b-4": Question(
        right="b",
        wrong={
            "a": "lines about tasks that went well have the level INFO, which is less important than WARNING.",
            "c": "a failed task is written at the level ERROR, which is more important than WARNING.",
            "d": "`received` is written at the level INFO, like `succeeded`.",
        },
    ),
}
