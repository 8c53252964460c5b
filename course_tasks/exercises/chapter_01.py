"""The exercises of chapter 01."""

import base64
import json
import os
import uuid
from collections.abc import Callable

from celery import Celery
from redis import Redis

from course_tasks.exercises import Exercise, Question, WrongAnswer, called


def _reads_a_message(answer: Callable) -> str | None:
    for task, args, kwargs in (("add", [4, 5], {}), ("add_long", [1, 2], {"seconds": 3}), ("sum", [[7] * 1000], {})):
        raw = _message(task, args, kwargs)
        try:
            found = called(answer, raw, case=f"given a waiting message of {task}, ")
        except WrongAnswer as error:
            if len(json.dumps(args)) > 1000:
                return f"{error} The message has a list of 1000 numbers. Celery cuts argsrepr off, so read the body."
            raise
        if not isinstance(found, tuple | list) or len(found) != 3:
            return f"return three things, the name, the positional arguments and those with names, not {_short(found)}."
        if found[0] != task:
            return f"the task's name is {task!r}, in the headers, and your function found {_short(found[0])}."
        if isinstance(found[1], str) or isinstance(found[2], str):
            return f"{_short(found[1])} is a text for logs. The arguments themselves are in the body."
        if (list(found[1]), found[2]) != (args, kwargs):
            return f"the arguments are {_short(args)} and {kwargs}, and your function found {_short(found[1:])}."
    return None


def _message(task: str, args: list, kwargs: dict) -> bytes:
    """A message as it waits in the broker, made by Celery itself."""
    made = Celery(set_as_current=False).amqp.as_task_v2(str(uuid.uuid4()), task, args, kwargs)
    message = {
        "body": base64.b64encode(json.dumps(made.body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": made.headers,
        "properties": {"body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "celery"}},
    }
    return json.dumps(message).encode()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Dead(Exception):
    pass


class _Mortal(Redis):
    """The broker for a worker that dies after its first command."""

    commands = 0

    def execute_command(self, *args, **options):
        if self.commands == 1:
            raise _Dead
        self.commands = 1
        return super().execute_command(*args, **options)


def _takes_safely(answer: Callable) -> str | None:
    url = os.environ["CELERY_BROKER_URL"]
    queue, taken = (f"toy-{name}-{uuid.uuid4()}" for name in ("queue", "taken"))
    with Redis.from_url(url) as broker, _Mortal.from_url(url, socket_timeout=1) as mortal:
        broker.lpush(queue, "oldest", "newest")
        try:
            job, dead = called(answer, mortal, queue, taken), False
        except WrongAnswer as error:
            if not isinstance(error.__cause__, _Dead):
                raise
            job, dead = None, True
        finally:
            left, kept = broker.lrange(queue, 0, -1), broker.lrange(taken, 0, -1)
            broker.delete(queue, taken)
    if dead:
        if len(left) + len(kept) < 2:
            return "a worker that died after the first command has lost the job: it is in neither list."
        return "it takes more than one command. In between, the worker can die, or another one take the same job."
    if len(left) == 2:
        return "the job is still in the queue, where the next worker takes it as well."
    if not kept:
        return "there is no copy in the list `taken`: who dies now loses the job."
    if kept == [b"newest"]:
        return "it took the newest job. The oldest one, the first to be served, is at the right end."
    if (job.encode() if isinstance(job, str) else job) != b"oldest":
        return f"it moved the right job, but returned {_short(job)}: the worker needs the job itself."
    return None


EXERCISES = {
    "01-1": Exercise(
        kind=Callable,
        judge=_reads_a_message,
        wrong={
            'answer = lambda raw: [json.loads(raw)["headers"][n] for n in ("task", "argsrepr", "kwargsrepr")]': (
                "is a text for logs"
            ),
            "def answer(raw):\n"
            '    headers = json.loads(raw)["headers"]\n'
            '    return headers["task"], eval(headers["argsrepr"]), eval(headers["kwargsrepr"])': "cuts argsrepr off",
            'answer = lambda raw: (json.loads(raw)["headers"]["task"], *json.loads(json.loads(raw)["body"])[:2])': (
                "your function raised JSONDecodeError"
            ),
            'answer = lambda raw: json.loads(base64.b64decode(json.loads(raw)["body"]))': "and your function found",
            'answer = lambda raw: json.loads(raw)["headers"]': "return three things",
            'answer = ("add", [4, 5], {})': "should be a function",
        },
    ),
    "01-2": Exercise(
        kind=Callable,
        judge=_takes_safely,
        wrong={
            "def answer(broker, queue, taken):\n"
            "    _, job = broker.brpop(queue)\n"
            "    broker.lpush(taken, job)\n"
            "    return job": "it is in neither list",
            "def answer(broker, queue, taken):\n"
            "    broker.lpush(taken, broker.lindex(queue, -1))\n"
            "    return broker.rpop(queue)": "more than one command",
            "answer = lambda broker, queue, taken: broker.rpop(queue)": "no copy in the list",
            'answer = lambda broker, queue, taken: broker.lmove(queue, taken, "LEFT", "LEFT")': "took the newest job",
            "answer = lambda broker, queue, taken: broker.lindex(queue, -1)": "still in the queue",
            'def answer(broker, queue, taken):\n    broker.lmove(queue, taken, "RIGHT", "LEFT")': "returned None",
        },
    ),
}

QUIZ = {
    "01-1": Question(
        right="b",
        wrong={
            "a": "by default, an acknowledgement doesn't wait for the end of the task. It happens earlier.",
            "c": (
                "the message of a running task has no copy any more, because it was acknowledged just before the "
                "task started."
            ),
            "d": (
                "the queue is empty because the worker has taken the messages. Taking a message doesn't acknowledge "
                "it yet."
            ),
        },
    ),
    "01-2": Question(
        right="c",
        wrong={
            "a": "Base64 is an encoding and not encryption. `base64.b64decode` needs no key.",
            "b": "look at the chapter's message once more. The body isn't the only place that describes the arguments.",
            "d": "a message contains no code. The body holds what the task's function is called with.",
        },
    ),
    "01-3": Question(
        right="a",
        wrong={
            "b": "a worker waits like this for its broker. The client in the chapter did something else.",
            "c": (
                "a client keeps no messages for later. You get an `AsyncResult` when the broker has accepted the "
                "message."
            ),
        },
    ),
    "01-4": Question(
        right=("blue",),
        wrong={
            "red": "this message is at the left end, where `send_task` puts new messages.",
            "green": "this message is in the middle, and workers take messages from one end of the list.",
        },
        otherwise="answer with one of the three names: red, green or blue.",
    ),
}
