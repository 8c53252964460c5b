"""The exercises of chapter 01b."""

import os
import re
import uuid
from collections.abc import Callable

from redis import Redis

from course_tasks.exercises import Exercise, Question, WrongAnswer, called


class _Endless(Exception):
    pass


class _Patient(Redis):
    """The broker, for a function that might never stop asking it. Nobody sends: one moment is as long as any wait."""

    commands = 0

    def execute_command(self, *args, **options):
        self.commands += 1
        if self.commands > 50:
            raise _Endless
        if args[0] not in ("BLMOVE", "BRPOPLPUSH", "BLPOP", "BRPOP"):
            return super().execute_command(*args, **options)
        *command, seconds = args
        found = super().execute_command(*command, 0.1, **options)
        if found is None and not seconds:  # it would wait for ever
            raise _Endless
        return found


def _rescues(answer: Callable) -> str | None:
    url = os.environ["CELERY_BROKER_URL"]
    wrong, right = (f"judged-{name}-{uuid.uuid4()}" for name in ("wrong", "right"))
    with Redis.from_url(url) as broker, _Patient.from_url(url, socket_timeout=1) as patient:
        broker.lpush(wrong, "first", "second", "third")
        broker.lpush(right, "waiting")
        try:
            called(answer, patient, wrong, right)
        except WrongAnswer as error:
            if isinstance(error.__cause__, _Endless):
                return "your function went on asking the broker without end. When is there nothing more to move?"
            raise
        finally:
            left, moved = ([one.decode() for one in broker.lrange(key, 0, -1)] for key in (wrong, right))
            broker.delete(wrong, right)
    if set(moved) >= {"first", "second", "third"} and left:
        return "the messages are in both queues now: they would wait for ever, or run twice."
    if left:
        return f"{len(left)} of the 3 messages are still in the wrong queue."
    if "waiting" not in moved:
        return "the message that waited in the right queue already is gone."
    if len(moved) < 4:
        return "the wrong queue is empty, but not all its messages are in the right one."
    if moved[-1] != "waiting":
        return "the rescued messages jumped the queue: a worker takes from the right end, where others waited."
    if moved != ["third", "second", "first", "waiting"]:
        return "their order is not the one in which they were sent: the oldest has to come first, from the right."
    return None


def _careful(answer: dict) -> str | None:
    settings = {str(name).lower(): str(value).lower() for name, value in answer.items()}
    for name in ("appendonly", "maxmemory", "maxmemory-policy"):
        if name not in settings:
            return f"a value for {name} is missing."
    if settings["appendonly"] != "yes":
        return "after a crash this broker knows nothing, as it writes no file of its changes."
    policy = settings["maxmemory-policy"]
    if policy.startswith("allkeys"):
        return f"with {policy} a full broker drops keys, and a whole queue is one key."
    if policy.startswith("volatile"):
        return f"{policy} spares a queue only as long as its key has no time to expire. One policy spares all keys."
    if policy != "noeviction":
        return f"there is no policy called {policy}."
    if re.fullmatch(r"0\w*", settings["maxmemory"]):
        return "for maxmemory, 0 means: no limit. The system would run out of memory before the broker refuses."
    if not re.fullmatch(r"100mb?|104857600b?|100000000b?", settings["maxmemory"]):
        return f"maxmemory should be 100 MB, and is {settings['maxmemory']}."
    return None


EXERCISES = {
    "01b-1": Exercise(
        kind=Callable,
        judge=_rescues,
        wrong={
            "answer = lambda broker, wrong, right: broker.rename(wrong, right)": "in the right queue already is gone",
            'answer = lambda broker, wrong, right: broker.lmove(wrong, right, "RIGHT", "LEFT")': "2 of the 3 messages",
            "def answer(broker, wrong, right):\n"
            '    while broker.lmove(wrong, right, "LEFT", "LEFT"):\n'
            "        pass": "their order is not",
            "def answer(broker, wrong, right):\n"
            '    while broker.lmove(wrong, right, "RIGHT", "RIGHT"):\n'
            "        pass": "jumped the queue",
            "answer = lambda broker, wrong, right: broker.lpush(right, *broker.lrange(wrong, 0, -1))": "in both queues",
            "answer = lambda broker, wrong, right: broker.delete(wrong)": "not all its messages",
            "def answer(broker, wrong, right):\n"
            "    while True:\n"
            '        broker.lmove(wrong, right, "RIGHT", "LEFT")': "without end",
            "def answer(broker, wrong, right):\n"
            '    while broker.blmove(wrong, right, 0, "RIGHT", "LEFT"):\n'
            "        pass": "When is there nothing more to move?",
        },
    ),
    "01b-2": Exercise(
        kind=dict,
        judge=_careful,
        wrong={
            'answer = {"appendonly": "yes", "maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}': "is one key",
            'answer = {"appendonly": "yes", "maxmemory": "100mb", "maxmemory-policy": "volatile-lru"}': "spares a",
            'answer = {"appendonly": "no", "maxmemory": "100mb", "maxmemory-policy": "noeviction"}': "knows nothing",
            'answer = {"appendonly": "yes", "maxmemory": 0, "maxmemory-policy": "noeviction"}': "no limit",
            'answer = {"appendonly": "yes", "maxmemory": "100mb"}': "maxmemory-policy is missing",
        },
    ),
}

QUIZ = {
    "01b-1": Question(
        right="c",
        wrong={
            "a": "the code hasn't run yet. A worker logs a task as `received` before it runs it.",
            "b": "there is a result only after a worker has run the task, and then its log would mention the task.",
            "d": "a worker that starts again with the same command reads the same queues as before.",
        },
    ),
    "01b-2": Question(
        right=("40", "forty", "40 tasks", "forty tasks"),
        wrong={
            "339": "the server doesn't take single messages out of a list. It drops whole keys.",
            "0": "`mails` has a key of its own, and the server has dropped only one key.",
            "300": "those tasks waited in the queue whose key was dropped.",
            "340": "a dropped key takes the messages in it along.",
        },
        otherwise="answer with a number from 0 to 340. Remember how many keys a queue has.",
    ),
    "01b-3": Question(
        right="a",
        wrong={
            "b": (
                "`get` asks the backend, and the backend is running. A broker that starts again doesn't know what "
                "it has lost."
            ),
            "c": "a worker stores `FAILURE` when a task has raised an exception. No worker has ever seen this task.",
            "d": "`send_task` keeps no copy. Its work ends when the broker has accepted the message.",
        },
    ),
    "01b-4": Question(
        right="d",
        wrong={
            "a": "the memory limit and the policy hold for the whole server. Keys of all its databases may be dropped.",
            "b": (
                "a short queue is a key as well. The cache alone can fill the memory, and then the server may drop "
                "that key."
            ),
            "c": (
                "then the cache can't drop old entries any more. Once the memory is full, the server refuses new "
                "entries."
            ),
        },
    ),
}
