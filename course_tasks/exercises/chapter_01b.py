"""The exercises and the quiz of chapter 01b."""

import json
import tempfile
import time
import uuid
from collections.abc import Callable
from itertools import chain

from redis.exceptions import RedisError

from course_tasks.exercises import Exercise, Question, WrongAnswer
from course_tasks.exercises.project import Project
from course_tasks.exercises.watched import Dead, Endless, Watched


def _rescues(answer: Callable) -> str | None:
    wrong, right = keys = [f"judged-{name}-{uuid.uuid4()}" for name in ("wrong", "right")]
    with Watched(*keys) as watched:

        def after(count: int, before: int = 0, do: Callable | None = None) -> list[list[str]]:
            """What is in the two queues after a call, from left to right."""
            watched.server.delete(*keys)
            watched.server.lpush(wrong, *map(str, range(count)))
            watched.server.lpush(right, "waiting")
            try:
                watched.call(answer, wrong, right, before=before, do=do)
            except WrongAnswer as error:
                if isinstance(error.__cause__, Endless):
                    raise WrongAnswer(
                        "your function went on asking the broker without end. When is there nothing more to move?"
                    ) from None
                if not isinstance(error.__cause__, Dead):
                    raise
            return [[one.decode() for one in watched.server.lrange(key, 0, -1)] for key in keys]

        for count in (3, 7):
            left, moved = after(count)
            if not watched.requests:
                return "your function should ask the Redis client that it gets as its first argument."
            if reason := _misplaced(count, left, moved):
                return reason
        for number in range(2, min(watched.requests, 4) + 1):
            found = sorted(chain(*after(3, number)))
            if found != ["0", "1", "2", "waiting"]:
                what = "lost" if len(found) < 4 else "in both queues"
                return f"if your program is killed between two requests to the broker, messages are {what}."
            found = sorted(chain(*after(3, number, lambda: watched.server.lpush(wrong, "late"))))
            if found != ["0", "1", "2", "late", "waiting"]:
                return "a message that a client sends to the wrong queue meanwhile is lost or doubled."
    return None


def _misplaced(count: int, left: list[str], moved: list[str]) -> str | None:
    sent = [str(number) for number in range(count)]
    if left and set(moved) >= set(sent):
        return "the messages are in both queues now, so workers of both would run them."
    if left:
        return f"{len(left)} of {count} messages are still in the wrong queue."
    if "waiting" not in moved:
        return "the message that waited in the right queue already is gone."
    if sorted(moved) != sorted([*sent, "waiting"]):
        return f"the wrong queue had {count} messages, and {len(moved) - 1} of them are in the right one."
    if moved[-1] != "waiting":
        return "the rescued messages jumped the queue: a worker takes from the right end, where another one waited."
    if moved != [*reversed(sent), "waiting"]:
        return "their order is not the one in which they were sent: the oldest has to come first, from the right."
    return None


MEGABYTES = range(95_000_000, 106_000_000)  # 100 MB, by either of the two ways to count


def _careful(answer: dict) -> str | None:
    settings = {str(name).lower(): value for name, value in answer.items()}
    for name in ("appendonly", "maxmemory", "maxmemory-policy"):
        if name not in settings:
            return f"a value for {name} is missing."
        value = settings[name]
        if isinstance(value, bool):
            return f"{name} can't be {value}. Write the word that Redis uses, in quotes."
        if isinstance(value, float) and value.is_integer():
            settings[name] = int(value)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Project(folder) as project:
        for name in ("appendonly", "maxmemory", "maxmemory-policy"):
            try:
                project.broker.config_set(name, settings[name])
            except RedisError:
                return f"Redis doesn't accept {settings[name]!r} for {name}."
        found = project.broker.config_get("appendonly", "maxmemory", "maxmemory-policy")
    if found["appendonly"] != "yes":
        return "this broker doesn't write each change to a file. After a crash, its newest messages would be missing."
    policy = found["maxmemory-policy"]
    if policy.startswith("allkeys"):
        return f"with {policy}, a full broker drops keys, and a whole queue is one key."
    if policy.startswith("volatile"):
        return f"{policy} drops the keys that have a time to expire. This broker should drop no key at all."
    if found["maxmemory"] == "0":
        return "for maxmemory, 0 means that there is no limit, so this broker would never refuse a message."
    if int(found["maxmemory"]) not in MEGABYTES:
        return f"maxmemory should be 100 MB. Redis understands {settings['maxmemory']} as {found['maxmemory']} bytes."
    return None


MAIL, STOCK = "shop.mail.confirm", "shop.stock.take"


def _confirms_at_once(folder: str) -> str | None:
    with Project(folder) as project:
        project.run("python order.py")
        queues: dict[str, list[str]] = {MAIL: [], STOCK: []}
        for key in project.broker.scan_iter(_type="list"):
            for raw in project.broker.lrange(key, 0, -1):
                queues.setdefault(json.loads(raw)["headers"]["task"], []).append(key.decode().partition("\x06")[0])
        if others := queues.keys() - {MAIL, STOCK}:
            return f"order.py sent a task {min(others)}. It should still send {MAIL} and {STOCK}."
        for task, found in queues.items():
            if len(found) != 1:
                return f"order.py should send {task} once, and it sent it {len(found)} times."
        if queues[STOCK] == ["mails"]:
            return f"{STOCK} goes to mails as well, so the mails would wait behind it there."
        if queues[MAIL] == ["celery"]:
            return f"{MAIL} still goes to the queue celery."
        for task, queue in (MAIL, "mails"), (STOCK, "celery"):
            if queues[task] != [queue]:
                return f"{task} goes to the queue {queues[task][0]}, which no worker reads."
        project.worker("celery -A shop worker -Q mails --pool=solo --without-mingle --without-gossip")
        deadline = time.monotonic() + 10
        while not any(over in project.log() for over in (" succeeded in ", "ERROR", "CRITICAL")):
            if time.monotonic() > deadline:
                return "the worker for mails got the message, but it has not run the task."
            time.sleep(0.02)
        if " succeeded in " not in project.log():
            return "the worker for mails got the message, but it couldn't run the task. Its log says why."
    return None


MAILS = """
%%writefile scratch/mail/shop.py
from celery import Celery

app = Celery("shop", broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")
{settings}


@app.task(name="shop.stock.take")
def take(item):
    return f"there is one {{item}} less"


@app.task(name="{mail}")
def confirm(customer):
    return f"Dear {{customer}}, thank you for your order."
"""
ORDERS = """
%%writefile scratch/mail/order.py
from shop import app

app.send_task("shop.stock.take", args=("pen",))
app.send_task("shop.mail.confirm", args=("Ada",), queue="mails", priority=3)
"""


def _mails(settings: str, mail: str = MAIL) -> str:
    return MAILS.format(settings=settings, mail=mail).strip()


EXERCISES = {
    "01b-1": Exercise(
        kind=Callable,
        judge=_rescues,
        wrong={
            "answer = lambda broker, wrong, right: broker.rename(wrong, right)": "in the right queue already is gone",
            'answer = lambda broker, wrong, right: broker.lmove(wrong, right, "RIGHT", "LEFT")': "2 of 3 messages",
            "def answer(broker, wrong, right):\n"
            "    for _ in range(3):\n"
            '        broker.lmove(wrong, right, "RIGHT", "LEFT")': "4 of 7 messages",
            "def answer(broker, wrong, right):\n"
            '    while broker.lmove(wrong, right, "LEFT", "LEFT"):\n'
            "        pass": "their order is not",
            "def answer(broker, wrong, right):\n"
            '    while broker.lmove(wrong, right, "RIGHT", "RIGHT"):\n'
            "        pass": "jumped the queue",
            "answer = lambda broker, wrong, right: broker.lpush(right, *broker.lrange(wrong, 0, -1))": "in both queues",
            "answer = lambda broker, wrong, right: broker.delete(wrong)": "and 0 of them",
            "def answer(broker, wrong, right):\n"
            "    while True:\n"
            '        broker.lmove(wrong, right, "RIGHT", "LEFT")': "without end",
            "def answer(broker, wrong, right):\n"
            "    messages, _ = broker.pipeline().lrange(wrong, 0, -1).delete(wrong).execute()\n"
            "    broker.lpush(right, *reversed(messages))": "messages are lost",
            "def answer(broker, wrong, right):\n"
            "    messages = broker.lrange(wrong, 0, -1)\n"
            "    broker.pipeline().delete(wrong).lpush(right, *reversed(messages)).execute()": "meanwhile is lost",
            "def answer(broker, wrong, right):\n"
            "    while message := broker.lindex(wrong, -1):\n"
            "        broker.lpush(right, message)\n"
            "        broker.rpop(wrong)": "killed between two requests to the broker, messages are in both",
        },
        right=(
            "def answer(broker, wrong, right):\n    while broker.brpoplpush(wrong, right, timeout=0.2):\n        pass",
            "def answer(broker, wrong, right):\n"
            "    pipe = broker.pipeline(transaction=False)\n"
            "    for _ in range(broker.llen(wrong)):\n"
            '        pipe.lmove(wrong, right, "RIGHT", "LEFT")\n'
            "    pipe.execute()",
            "def answer(broker, wrong, right):\n"
            "    text = 'while redis.call(\"RPOPLPUSH\", KEYS[1], KEYS[2]) do end'\n"
            "    broker.eval(text, 2, wrong, right)",
        ),
    ),
    "01b-2": Exercise(
        kind=dict,
        judge=_careful,
        wrong={
            'answer = {"appendonly": "yes", "maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}': "is one key",
            'answer = {"appendonly": "yes", "maxmemory": "100mb", "maxmemory-policy": "volatile-lru"}': "a time to",
            'answer = {"appendonly": "no", "maxmemory": "100mb", "maxmemory-policy": "noeviction"}': "newest messages",
            'answer = {"appendonly": "yes", "maxmemory": 0, "maxmemory-policy": "noeviction"}': "no limit",
            'answer = {"appendonly": "yes", "maxmemory": 100, "maxmemory-policy": "noeviction"}': "100 as 100 bytes",
            'answer = {"appendonly": "yes", "maxmemory": "100 MB", "maxmemory-policy": "noeviction"}': "accept '100 ",
            'answer = {"appendonly": True, "maxmemory": "100mb", "maxmemory-policy": "noeviction"}': "can't be True",
            'answer = {"appendonly": "yes", "maxmemory": "100mb"}': "maxmemory-policy is missing",
        },
        right=(
            'answer = {"maxmemory": 100e6, "appendonly": "YES", "maxmemory-policy": "NoEviction", "save": ""}',
            'answer = dict([("appendonly", "yes"), ("maxmemory", "102400kb"), ("maxmemory-policy", "noeviction")])',
        ),
    ),
    "01b-3": Exercise(
        kind=str,
        judge=_confirms_at_once,
        project="scratch/mail",
        wrong={
            _mails('app.conf.task_routes = {"shop.mail": {"queue": "mails"}}'): "still goes to the queue celery",
            _mails('app.conf.task_routes = {"shop.*": {"queue": "mails"}}'): "goes to mails as well",
            _mails('app.conf.task_routes = {"shop.mail.*": {"queue": "mail"}}'): "goes to the queue mail, which",
            _mails(
                'app.conf.task_routes = {"shop.mail.*": {"queue": "mails"}}', "mail.confirm"
            ): "couldn't run the task",
            _mails('app.conf.task_routes = {"shop.mail.*" {"queue": "mails"}}'): "invalid syntax",
            ORDERS.strip().replace('app.send_task("shop.stock.take", args=("pen",))\n', ""): "and it sent it 0 times",
        },
        right=(
            _mails('app.conf.task_routes = {"*.mail.*": "mails"}'),
            _mails("app.conf.task_routes = ({'shop.mail.confirm': {'queue': 'mails'}},)"),
            ORDERS.strip(),
        ),
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
