"""The exercises and the quiz of chapter 08b."""

import base64
import contextlib
import json
import signal
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from celery.app.task import Task
from celery.exceptions import Retry

from course_tasks.exercises import Exercise, Question, WrongAnswer, in_words
from course_tasks.exercises.project import Project, ended

WAITS = [2, 4, 8, 16, 30, 30]  # seconds
RETRIES, SAMPLES = 4, 1000
GONE = "redis://localhost:1/0"  # a port on which nothing listens
RUNS = [  # what comes after `python parked.py`, and whether the broker answers
    ("list", True),
    ("replay id-ben", True),
    ("replay id-eve", False),
    ("drop id-eve", True),
    ("replay id-ben", True),
    ("drop id-ben", True),
    ("replya id-ada", True),
    ("", True),
]
# Each command runs in a process of its own, but all of them share one start of Python and Celery.
COMMANDS = f"""
import gc, json, os, runpy, signal, sys, tempfile
import celery.app.amqp, celery.app.events, celery.backends.redis, celery.fixups.django, celery.worker
import kombu.transport.redis, redis

gc.freeze()  # what is here to stay is not looked at again in each process

broker, backend = (redis.Redis.from_url(os.environ[n]) for n in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"))
found = []
for words, answers in {RUNS!r}:
    said = tempfile.TemporaryFile()
    pid = os.fork()
    if not pid:
        for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, said.fileno()), (2, said.fileno())):
            os.dup2(source, target)
        signal.alarm(10)
        sys.path[0], sys.argv[:] = os.getcwd(), ["parked.py", *words.split()]
        if not answers:
            os.environ["CELERY_BROKER_URL"] = "{GONE}"
        runpy.run_path("parked.py", run_name="__main__")
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said.seek(0)
    left = [json.loads(line)["id"] for line in backend.lrange("parked", 0, -1)]
    messages = [message.decode() for message in broker.lrange("celery", 0, -1)]
    found.append(dict(words=words, code=code, said=said.read().decode(errors="replace"), left=left, messages=messages))
    if code == -signal.SIGALRM:
        break
print(json.dumps(found))
"""


def _waits(answer: list) -> str | None:
    if answer == WAITS:
        return None
    if len(answer) != len(WAITS):
        return f"six retries wait six times, and your list has {len(answer)}."
    if answer[0] != WAITS[0]:
        return f"the first wait is the number in retry_backoff, and not {answer[0]!r}."
    if any(isinstance(wait, int | float) and wait > 30 for wait in answer):
        return f"a wait of {max(answer)!r} seconds is longer than retry_backoff_max."
    place = next(place for place, (given, right) in enumerate(zip(answer, WAITS, strict=True)) if given != right)
    return f"wait {place + 1} is not {answer[place]!r} seconds."


def _fetch(answer: object) -> str | None:
    try:  # a task is made when it is first looked at
        if not isinstance(answer, Task):
            return f"the answer should be a task, and this is {in_words(type(answer))}."
    except TypeError as trouble:
        if "not iterable" in str(trouble):
            return "autoretry_for takes a tuple, also if there is only one exception in it."
        raise
    if answer.name != "fetch":
        return f"its name is {answer.name}: without name= Celery makes one from the module and the function."
    for value in (3, None):
        if (got := answer.apply(args=(lambda value=value: value,))).result != value:
            return f"call() returned {value!r}, and fetch(call) gave {got.result!r}."
    for wrong in (ValueError, KeyError, FileNotFoundError):
        if (calls := _calls(answer, wrong)[0]) != 1:
            return f"after a {wrong.__name__} it called {calls} times. Such an error should fail at once."
    for kind in (ConnectionError, TimeoutError):
        calls, error = _calls(answer, kind)
        if calls != RETRIES + 1:
            return (
                f"after a {kind.__name__} it called {'once' if calls == 1 else f'{calls} times'}, and not five times."
            )
        if type(error) is not kind:
            return f"after the last {kind.__name__}, the client gets {type(error).__name__}."
    longest = [max(_countdowns(answer, attempt)) for attempt in range(RETRIES)]
    waits = f"the waits are at most {', '.join(f'{wait:g}' for wait in longest)} seconds."
    if not _near(max(longest), longest[-1]) or _near(*longest[:2]):
        return f"{waits} They should get longer."
    if not _exponential(longest):
        with contextlib.suppress(Exception):  # only the fourth may be the maximum; a list of four has no further ones
            if _exponential(longest + [max(_countdowns(answer, attempt)) for attempt in (RETRIES, RETRIES + 1)]):
                return None
        return f"{waits} With an exponential backoff, each of them is the one before times the same number."
    return None


def _calls(task: Task, kind: type[Exception]) -> tuple[int, object]:
    """How often a task calls what fails, and what it ends with."""
    calls: list[int] = []  # the number of retries before each

    def call() -> None:
        calls.append(task.request.retries)
        if len(calls) > 20 or calls[-1] in calls[:-1]:
            raise SystemExit  # it would go on for ever
        raise kind("no answer")

    try:
        ended = task.apply(args=(call,)).result
    except SystemExit:
        if len(calls) <= 20:
            reason = f"after a {kind.__name__} it calls again inside the same attempt. Use a retry."
        else:
            reason = f"after a {kind.__name__} it tries again and again, without an end."
        raise WrongAnswer(reason) from None
    return len(calls), ended


def _countdowns(task: Task, attempt: int) -> list[float]:
    """The waits that a task chooses after an attempt; several, because they may be random."""
    waits: list[float] = []

    def retry(*_args, countdown=None, eta=None, **_options) -> None:
        if eta:
            countdown = (eta - datetime.now(eta.tzinfo)).total_seconds()
        waits.append(task.default_retry_delay if countdown is None else countdown)
        raise Retry

    def call() -> None:
        raise ConnectionError("no answer")

    for _ in range(SAMPLES):
        task.push_request(retries=attempt, called_directly=False)
        task.retry = retry  # type: ignore[method-assign]
        try:
            with contextlib.suppress(Retry):
                task.run(call)
        finally:
            del task.retry
            task.pop_request()
    return waits or [0]


def _near(one: float, other: float, tolerance: float = 0.02) -> bool:
    """Whether two waits are the same, as far as the longest of some random ones tells."""
    return abs(one - other) <= tolerance * max(one, other)


def _exponential(longest: list[float]) -> bool:
    """Whether the steps between waits grow by the same factor, up to a maximum that two waits at least have."""
    if _near(*longest[-2:]):
        longest = [wait for wait in longest if not _near(wait, longest[-1])]
    steps = [after - before for before, after in pairwise(longest)]
    factors = [after / before for before, after in pairwise(steps) if before > 0]
    return all(factor > 1.05 and _near(factor, factors[0], 0.12) for factor in factors)


def _parked(folder: str) -> str | None:
    entries = [
        {"id": f"id-{name}", "task": "refund", "args": [name], "kwargs": {"euros": euros}, "error": f"Error({euros})"}
        for name, euros in (("ada", 5), ("ben", 6), ("eve", 7), ("max", 8))
    ]
    lines = {entry["id"]: json.dumps(entry) for entry in entries}
    with Project(folder) as project:
        project.backend.rpush("parked", *lines.values())
        runs = project.loaded(COMMANDS, "parked.py", seconds=60)
    if runs[-1]["code"] == -signal.SIGALRM:
        return f"`python parked.py {runs[-1]['words']}` was still running after 10 s."
    listed, replayed, gone, dropped, *unknown = runs
    for run in (listed, replayed, dropped):
        if run["code"]:
            last = (run["said"].strip() or "it wrote nothing").splitlines()[-1].rstrip(".")
            return f"`python parked.py {run['words']}` ended with an error: {last}."
        if trouble := _done(run, entries):
            return trouble
        if run is replayed and "id-eve" not in gone["left"]:
            return "the broker didn't answer, and `replay` took the task off the list all the same."
    absent = "for an id that is not on the list"
    for run, about in zip(
        unknown, (absent, absent, "for the unknown command 'replya'", "without a command"), strict=True
    ):
        if run["left"] != ["id-ada", "id-max"] or len(run["messages"]) != 1:
            return f"{about}, the program should change nothing. `python parked.py {run['words']}` does."
        if "Traceback" in run["said"]:
            return f"{about}, the program ends with a traceback."
        if about == absent and "id-ben" not in run["said"]:
            return f"{about}, the program should say so, with the id."
        if not run["said"].strip():
            return f"{about}, the program should say so, and it prints nothing."
    return None


def _done(run: dict, entries: list[dict]) -> str | None:
    """Why a command didn't do its work; None if it did."""
    command, _, _ = run["words"].partition(" ")
    left, messages = run["left"], run["messages"]
    if command == "list":
        for entry in entries:
            if not any(entry["id"] in line and entry["error"] in line for line in run["said"].splitlines()):
                return f"`list` prints no line with {entry['id']} and {entry['error']}."
        if len(left) != len(entries) or messages:
            return "`list` changes something. It should only print."
        return None
    if command == "replay":
        if len(messages) != 1:
            return f"`replay` sent {len(messages)} messages, and not one."
        if trouble := _differs(json.loads(messages[0]), entries[1]):
            return trouble
    elif len(messages) != 1:
        return "`drop` sends the task."
    wanted = {"replay": ["id-ada", "id-eve", "id-max"], "drop": ["id-ada", "id-max"]}[command]
    if left != wanted:
        has = ", ".join(left) or "nothing"
        return f"after `{run['words']}`, the list has {has}, and not {', '.join(wanted)}."
    return None


def _differs(message: dict, entry: dict) -> str | None:
    headers = message["headers"]
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    for what, sent, parked in (
        ("name", headers["task"], entry["task"]),
        ("id", headers["id"], entry["id"]),
        ("args", args, entry["args"]),
        ("kwargs", kwargs, entry["kwargs"]),
    ):
        if sent != parked:
            return f"`replay` sends the {what} {sent!r}, and not {parked!r}."
    return None


def _mail(folder: str) -> str | None:
    for old in (*Path(folder).glob("*.tries"), Path(folder) / "delivered"):
        old.unlink(missing_ok=True)
    with Project(folder) as project:
        project.worker("celery -A shop worker --pool=solo --without-mingle --without-gossip")
        client = project.client()
        results = {name: client.send_task("mail", args=(name,)) for name in ("ada@shop", "ben@shop", "eve")}
        values = {name: ended(result) for name, result in results.items()}
        log = project.settled_log()
        for name in ("ada@shop", "ben@shop"):
            if isinstance(values[name], Exception):
                return f"the mail to {name} ended with {values[name]!r}."
            if values[name] != "delivered":
                return f"the mail to {name} has the result {values[name]!r}."
        if values["eve"] != "not delivered: eve is no address":
            return f"the mail to eve, which is no address, has the result {values['eve']!r}."
        file = Path(folder) / "delivered"
        delivered = file.read_text().split() if file.exists() else []
        for name in ("ada@shop", "ben@shop"):
            again = log.count(f"Task mail[{results[name].id}] received") > 1 and " retry: " not in log
            if again or name not in delivered:  # a retry that the task doesn't show may deliver it a moment later
                return f"the mail to {name} has the result 'delivered', but it was not delivered by then."
            if not (Path(folder) / f"{name}.tries").exists():
                return f"the mail to {name} was not delivered by `post.deliver`."
        if sorted(delivered) != ["ada@shop", "ben@shop"]:
            return f"these mails were delivered: {', '.join(delivered)}."
        if " retry: " not in log:
            return "the worker waits inside the task, and has a slot less meanwhile. Use a retry."
    return None


FETCH = 'app = Celery("fetching")\n\n\n@app.task({})\ndef fetch({}):\n    {}\n\n\nanswer = fetch'
FOR = 'name="fetch", autoretry_for=(ConnectionError, TimeoutError), '
TOOL = """%%writefile scratch/tool/parked.py
import json
import os
import sys

from celery import Celery
from redis import Redis

client = Celery()
store = Redis.from_url(os.environ["CELERY_RESULT_BACKEND"], decode_responses=True)
command, *ids = sys.argv[1:] or [""]
entries = [json.loads(line) for line in store.lrange("parked", 0, -1)]
{}
"""
LIST = 'if command == "list":\n    for entry in entries:\n        print(entry["id"], entry["error"])\n'
SEND = 'client.send_task(entry["task"], entry["args"], entry["kwargs"], task_id=entry["id"])'
REMOVE = 'store.lrem("parked", 1, json.dumps(entry))'
EACH = "else:\n    chosen = [entry for entry in entries if entry['id'] == ids[0]]\n    for entry in chosen:\n        "
UNKNOWN = "\n    if not chosen:\n        print('unknown:', ids[0])"
KNOWN = EACH.replace("else:", "elif command in ('replay', 'drop'):", 1)
OTHER = "\nelse:\n    print('What is', command)"
ONLY = 'if command == "replay":\n            '
MAIL = """%%writefile scratch/mail/shop.py
import post
from celery import Celery

app = Celery("shop")


@app.task(name="mail", bind=True, max_retries={}, default_retry_delay=0.1)
def mail(self, customer):
{}
"""

EXERCISES = {
    "08b-1": Exercise(
        kind=list,
        judge=_waits,
        wrong={
            "answer = [2, 4, 8, 16, 30]": "your list has 5",
            "answer = [1, 2, 4, 8, 16, 30]": "and not 1",
            "answer = [2, 4, 8, 16, 32, 64]": "a wait of 64 seconds",
            "answer = [2, 4, 6, 8, 10, 12]": "wait 3 is not 6 seconds",
        },
        right=("answer = [min(2 ** n, 30) for n in range(1, 7)]", "answer = [2.0, 4.0, 8.0, 16.0, 30.0, 30.0]"),
    ),
    "08b-2": Exercise(
        kind=object,
        judge=_fetch,
        wrong={
            FETCH.format(FOR[14:] + "max_retries=4, retry_backoff=True", "call", "return call()"): "without name=",
            FETCH.format(FOR + "max_retries=4", "call", "return call()"): "They should get longer",
            FETCH.format(FOR + "retry_backoff=True", "call", "return call()"): "it called 4 times",
            FETCH.format(FOR + "retry_backoff=True, max_retries=None", "call", "return call()"): "without an end",
            FETCH.format(
                'name="fetch", autoretry_for=(Exception,), max_retries=4, retry_backoff=True', "call", "return call()"
            ): "after a ValueError it called 5 times",
            FETCH.format(
                'name="fetch", autoretry_for=(OSError,), max_retries=4, retry_backoff=True', "call", "return call()"
            ): "after a FileNotFoundError it called 5 times",
            FETCH.format(
                'name="fetch", bind=True, max_retries=4',
                "self, call",
                "try:\n        return call()\n    except (ConnectionError, TimeoutError):\n"
                "        raise self.retry(countdown=2**self.request.retries)",
            ): "the client gets MaxRetriesExceededError",
            FETCH.format(FOR + "max_retries=4, retry_backoff=True", "call", "call()"): "gave None",
            FETCH.format(FOR[:28] + "ConnectionError, max_retries=4", "call", "return call()"): "takes a tuple",
            FETCH.format(
                'name="fetch"',
                "call",
                "for n in range(5):\n        try:\n            return call()\n"
                "        except (ConnectionError, TimeoutError):\n            if n == 4:\n                raise",
            ): "it calls again inside the same attempt",
            FETCH.format(
                'name="fetch", autoretry_for=(ConnectionError,), max_retries=4', "call", "return call()"
            ): "after a TimeoutError it called once, and not five times",
            "def fetch(call):\n    return call()\n\n\nanswer = fetch": "should be a task, and this is a function",
            **{
                FETCH.format(
                    'name="fetch", bind=True, max_retries=4',
                    "self, call",
                    "try:\n        return call()\n    except (ConnectionError, TimeoutError) as error:\n"
                    f"        raise self.retry(exc=error, countdown={linear})",
                ): f"at most {waits} seconds. With an exponential backoff"
                for linear, waits in (
                    ("self.request.retries + 1", "1, 2, 3, 4"),
                    ("10 + self.request.retries", "10, 11, 12, 13"),
                    ("(1 + self.request.retries)**2", "1, 4, 9, 16"),
                )
            },
        },
        right=(
            FETCH.format(
                'name="fetch", bind=True, max_retries=4',
                "self, call",
                "try:\n        return call()\n    except (ConnectionError, TimeoutError) as error:\n"
                "        raise self.retry(exc=error, countdown=3 * 1.5**self.request.retries)",
            ),
            FETCH.format(
                FOR + "retry_kwargs={'max_retries': 4}, retry_backoff=3, retry_jitter=False", "call", "return call()"
            ),
            FETCH.format(FOR + "max_retries=4, retry_backoff=30, retry_backoff_max=100", "call", "return call()"),
            FETCH.format(FOR + "max_retries=4, retry_backoff=60, retry_backoff_max=300", "call", "return call()"),
            FETCH.format(FOR + "max_retries=4, retry_backoff=300", "call", "return call()"),
            FETCH.format(
                'name="fetch", bind=True, max_retries=4',
                "self, call",
                "import random\n    from datetime import UTC, datetime, timedelta\n    try:\n        return call()\n"
                "    except (ConnectionError, TimeoutError) as error:\n"
                "        wait = timedelta(seconds=10 + 2**self.request.retries + random.random())\n"
                "        raise self.retry(exc=error, eta=datetime.now(UTC) + wait)",
            ),
        ),
    ),
    "08b-3": Exercise(
        kind=str,
        judge=_parked,
        project="scratch/tool",
        wrong={
            TOOL.format("print(entries and entries[0])"): "no line with id-ben",
            TOOL.format("for entry in entries:\n    print(entry['id'], entry['error'])\n    " + REMOVE): (
                "`list` changes something"
            ),
            TOOL.format(LIST + EACH + REMOVE + "\n        " + ONLY + SEND + UNKNOWN): "took the task off the list",
            TOOL.format(LIST + EACH + SEND + "\n        " + REMOVE + UNKNOWN): "`drop` sends the task",
            TOOL.format(LIST + EACH + ONLY + SEND + UNKNOWN): "the list has id-ada, id-ben, id-eve, id-max",
            TOOL.format(
                LIST + EACH + ONLY + SEND.replace(', task_id=entry["id"]', "") + "\n        " + REMOVE + UNKNOWN
            ): ", and not 'id-ben'.",
            TOOL.format(
                LIST + EACH + ONLY + SEND.replace('entry["kwargs"]', "{}") + "\n        " + REMOVE + UNKNOWN
            ): "`replay` sends the kwargs {}, and not {'euros': 6}.",
            TOOL.format(LIST + EACH + ONLY + SEND + "\n        " + REMOVE): "the program should say so",
            TOOL.format(
                LIST + "else:\n    entry = {entry['id']: entry for entry in entries}[ids[0]]\n    "
                'if command == "replay":\n        ' + SEND + "\n    " + REMOVE
            ): "with a traceback",
            TOOL.format(LIST + EACH + REMOVE + UNKNOWN): "`replay` sent 0 messages",
            TOOL.format(
                LIST + EACH + ONLY + SEND + "\n        if command == 'drop':\n            store.lpop('parked')\n"
                "        else:\n            " + REMOVE + UNKNOWN
            ): "after `drop id-eve`, the list has id-eve, id-max, and not id-ada, id-max",
            TOOL.format(
                LIST + EACH + ONLY + SEND + "\n        " + REMOVE + UNKNOWN
            ): "unknown command 'replya', the program",
            TOOL.format(LIST + KNOWN + ONLY + SEND + "\n        " + REMOVE + UNKNOWN): "and it prints nothing",
            TOOL.format(
                "command = sys.argv[1]\n" + LIST + KNOWN + ONLY + SEND + "\n        " + REMOVE + UNKNOWN + OTHER
            ): "without a command, the program ends with a traceback",
        },
        right=(
            TOOL.format(
                LIST + KNOWN + ONLY + SEND + "\n        " + REMOVE + "\n    if not chosen:\n"
                "        sys.exit(f'{ids[0]} is not parked.')" + OTHER
            ),
            TOOL.format(
                "import argparse\nparser = argparse.ArgumentParser()\n"
                "parser.add_argument('command', choices=['list', 'replay', 'drop'])\n"
                "parser.add_argument('id', nargs='?')\nwords = parser.parse_args()\n"
                "by_id = {entry['id']: entry for entry in entries}\n"
                "if words.command == 'list':\n    print('\\n'.join(f\"{i}: {e['error']}\" for i, e in by_id.items()))\n"
                "elif words.id not in by_id:\n    parser.error(f'unknown id {words.id}')\n"
                "else:\n    entry = by_id[words.id]\n    if words.command == 'replay':\n"
                "        client.signature(entry['task'], entry['args'], entry['kwargs'], app=client).apply_async("
                "task_id=entry['id'])\n    store.lrem('parked', 0, json.dumps(entry))"
            ),
        ),
    ),
    "08b-4": Exercise(
        kind=str,
        judge=_mail,
        project="scratch/mail",
        wrong={
            MAIL.format(5, "    post.deliver(customer)\n    return 'delivered'"): "ended with ConnectionError",
            MAIL.format(
                5,
                "    try:\n        post.deliver(customer)\n    except Exception as error:\n"
                "        raise self.retry(exc=error)\n    return 'delivered'",
            ): "the mail to eve, which is no address",
            MAIL.format(
                5,
                "    try:\n        post.deliver(customer)\n    except ConnectionError as error:\n"
                "        raise self.retry(exc=error)\n    except ValueError as error:\n"
                "        return f'not delivered: {error}'",
            ): "has the result None",
            MAIL.format(
                5,
                "    import time\n    while True:\n        try:\n            post.deliver(customer)\n"
                "            return 'delivered'\n        except ConnectionError:\n            time.sleep(0.1)\n"
                "        except ValueError as error:\n            return f'not delivered: {error}'",
            ): "the worker waits inside the task",
            MAIL.format(
                5,
                "    try:\n        post.deliver(customer)\n    except ConnectionError as error:\n"
                "        try:\n            self.retry(exc=error)\n        except Exception:\n            pass\n"
                "    except ValueError as error:\n        return f'not delivered: {error}'\n    return 'delivered'",
            ): "has the result 'delivered', but it was not delivered by then",
            MAIL.format(
                5,
                "    if '@' not in customer:\n        return f'not delivered: {customer} is no address'\n"
                "    with open('delivered', 'a') as file:\n        print(customer, file=file)\n    return 'delivered'",
            ): "was not delivered by `post.deliver`",
        },
        right=(
            MAIL.format(
                "None",
                "    from celery.exceptions import Retry\n    try:\n        try:\n            post.deliver(customer)\n"
                "        except ConnectionError as error:\n            raise self.retry(exc=error)\n"
                "    except Retry:\n        raise\n    except Exception as error:\n"
                "        return f'not delivered: {error}'\n    return 'delivered'",
            ),
            MAIL.format(
                "5, autoretry_for=(ConnectionError,)",
                "    try:\n        post.deliver(customer)\n    except ValueError as error:\n"
                "        return f'not delivered: {error}'\n    return 'delivered'",
            ),
        ),
    ),
}

QUIZ = {
    "08b-1": Question(
        right="c",
        wrong={
            "a": "the broker still has a copy in `unacked`.",
            "b": "nobody else knows the message until it is back in the queue.",
            "d": "nobody tells the client. The state stays RETRY until the task runs again.",
        },
    ),
    "08b-2": Question(
        right=("5", "five"),
        wrong={"4": "these are the retries. The first attempt comes before them.", "3": "that is Celery's default."},
        otherwise="count the first attempt and the retries.",
    ),
    "08b-3": Question(
        right="b",
        wrong={
            "a": "that would be the wait without jitter, which is on by default.",
            "c": "that is `default_retry_delay`, which doesn't count with a backoff.",
            "d": "600 seconds are the maximum of later waits.",
        },
    ),
    "08b-4": Question(
        right="b",
        wrong={
            "a": "the new message is sent before `Retry` is raised.",
            "c": "the worker never sees the `Retry`, because the task has caught it.",
            "d": "for the worker, the task has ended well: it has returned None.",
        },
    ),
}
