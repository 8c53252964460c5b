"""The exercises and the quiz of chapter 01."""

import base64
import json
import re
import time
import uuid
from collections.abc import Callable

from celery import Celery
from redis.exceptions import WatchError

from course_tasks.exercises import Exercise, Question, WrongAnswer, called
from course_tasks.exercises.project import Project
from course_tasks.exercises.watched import Dead, Endless, Watched


def _reads_a_message(answer: Callable) -> str | None:
    for task, args, kwargs in (
        ("add", [4, 5], {}),
        ("add_long", [1, 2], {"seconds": 3}),
        ("greet", ["Zoë", None], {"polite": True}),
        ("sum", [[7] * 1000], {}),
    ):
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
            return f"the task's name is {task!r}, in the headers, and your function returned {_short(found[0])} first."
        if isinstance(found[1], str) or isinstance(found[2], str):
            text = found[1] if isinstance(found[1], str) else found[2]
            return f"{_short(text)} is a text for logs. The arguments themselves are in the body."
        if not isinstance(found[1], tuple | list) or (list(found[1]), found[2]) != (args, kwargs):
            return f"the arguments are {_short(args)} and {kwargs}, and your function returned {_short(found[1:])}."
    return None


def _message(task: str, args: list, kwargs: dict) -> bytes:
    """A message as it waits in the broker, with all fields that Celery gives it."""
    made = Celery(set_as_current=False).amqp.as_task_v2(str(uuid.uuid4()), task, args, kwargs)
    properties = {
        "correlation_id": made.properties["correlation_id"],
        "reply_to": str(uuid.uuid4()),
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": str(uuid.uuid4()),
    }
    message = {
        "body": base64.b64encode(json.dumps(made.body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": made.headers,
        "properties": properties,
    }
    return json.dumps(message).encode()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


JOBS = [b"oldest", b"second", b"third", b"newest"]


def _takes_safely(answer: Callable) -> str | None:
    queue, taken, other = keys = [f"toy-{name}-{uuid.uuid4()}" for name in ("queue", "taken", "other")]
    with Watched(*keys) as watched:

        def after(before: int = 0, do: Callable | None = None) -> tuple[object, list[bytes], list[bytes], list[bytes]]:
            """The job that the function returns, and what is in the three lists then."""
            watched.server.delete(*keys)
            watched.server.lpush(queue, *JOBS)
            job = None
            try:
                job = watched.call(answer, queue, taken, before=before, do=do)
            except WrongAnswer as error:
                if isinstance(error.__cause__, Endless):
                    raise WrongAnswer("your function went on asking the broker without end.") from None
                if before == 0 or not isinstance(error.__cause__, Dead | WatchError):
                    raise
            return (job, *(watched.server.lrange(key, 0, -1) for key in keys))

        job, left, kept, _ = after()
        requests = watched.requests
        if not requests:
            return "your function should ask the Redis client that it gets as its first argument."
        if len(left) == len(JOBS):
            return "the job is still in the queue, where the next worker takes it as well."
        if len(left) < len(JOBS) - 1:
            return f"it should take one job, but {len(JOBS) - len(left)} jobs are gone from the queue."
        if not kept:
            return "there is no copy in the list `taken`. If the worker dies now, the job is lost."
        if b"oldest" in left:
            return "it took another job than the oldest one. The oldest job is at the right end of the list."
        if kept != [b"oldest"]:
            return f"the list `taken` should contain the oldest job and nothing else, but it contains {_short(kept)}."
        if (job.encode() if isinstance(job, str) else job) != b"oldest":
            return f"it moved the right job, but returned {_short(job)}: the worker needs the job itself."
        for number in range(2, min(requests, 5) + 1):
            _, left, kept, _ = after(number)
            if sorted(left + kept) != sorted(JOBS):
                found = "in neither list" if len(left + kept) < len(JOBS) else "in both lists, so it will run twice"
                return f"a worker that dies between two requests to the broker leaves a job {found}."
        for number in range(2, min(requests, 5) + 1):
            _, left, kept, stolen = after(number, lambda: watched.server.lmove(queue, other, "RIGHT", "LEFT"))
            if sorted(left + kept + stolen) != sorted(JOBS):
                return "when another worker takes a job between your two requests, a job is lost or taken twice."
    return None


# What a worker's log says of a task that it has dealt with, or of a message that it can't deal with
OVER = re.compile(r"succeeded in|raised unexpected|CRITICAL|unknown message|unregistered task|broker lost")
ENDED = re.compile(r"Unrecoverable error: (.*)")


def _writes_bills(folder: str) -> str | None:
    with Project(folder) as project:
        project.run("python till.py")
        if (count := project.broker.llen("bills")) != 2:
            return f"after a run of till.py, 2 messages should wait in the queue bills, and there are {count}."
        project.worker("celery -A shop worker --pool=solo --without-mingle --without-gossip")
        deadline = time.monotonic() + 10
        while len(lines := [line for line in project.log().splitlines() if OVER.search(line)]) < 2:
            if ENDED.search("".join(lines)) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    text = "\n".join(lines)
    if ended := ENDED.search(text):
        return f"the worker still ends: {ended[1]}."
    if "unknown message" in text:
        return "the worker threw a message away, because its headers lack the task's name."
    if "unregistered task" in text:
        return "the worker knows no task of that name. In shop.py its name is bill."
    if lost := re.search(r"broker lost.*\(KeyError\((.*)\)\)", text):
        return f"the worker couldn't read a message, and dropped it: the field {lost[1]} is missing."
    if "CRITICAL" in text:
        return "the worker can't decode the body. Its log names the reason."
    if failed := re.search(r"raised unexpected: (\w+)\(['\"]?(.*?)['\"]?\)$", text, re.MULTILINE):
        return f"the task failed with {failed[1]}: {failed[2]}."
    bills = re.findall(r"succeeded in [\d.e-]+s: (.*)", text)
    if bills == ["'Ben pays 30 euros'", "'Ada pays 12 euros'"]:
        return "both bills were written, but Ben's before Ada's. At which end of the list do new messages belong?"
    if bills != ["'Ada pays 12 euros'", "'Ben pays 30 euros'"]:
        return f"the worker wrote {' and '.join(bills)}, not 'Ada pays 12 euros' and 'Ben pays 30 euros'."
    return None


TILL = """
%%writefile scratch/till/till.py
import json
import os
from base64 import b64encode
from uuid import uuid4

from redis import Redis

broker = Redis.from_url(os.environ["CELERY_BROKER_URL"])
for customer, euros in [("Ada", 12), ("Ben", 30)]:
    headers = {{"task": "{task}", "id": str(uuid4())}}
    delivery = {{"exchange": "", "routing_key": "bills"}}
    properties = {{"delivery_tag": str(uuid4()), "delivery_info": delivery}}
    body = json.dumps({body})
    message = {{"body": body, "content-type": "application/json", "headers": headers, "properties": properties}}
    {push}
"""
SENDS = """
%%writefile scratch/till/till.py
from celery import Celery

client = Celery(broker="redis://localhost:6379/0")
for customer, euros in [("Ada", 12), ("Ben", 30)]:
    client.send_task("bill", args=(customer, euros), queue="bills")
"""


def _till(
    task: str = "bill",
    body: str = "[[customer, euros], {}, {}]",
    push: str = 'broker.lpush("bills", json.dumps(message))',
) -> str:
    return TILL.format(task=task, body=body, push=push).strip()


EXERCISES = {
    "01-1": Exercise(
        kind=Callable,
        judge=_reads_a_message,
        wrong={
            'answer = lambda raw: [json.loads(raw)["headers"][n] for n in ("task", "argsrepr", "kwargsrepr")]': (
                "'[4, 5]' is a text for logs"
            ),
            "def answer(raw):\n"
            '    headers = json.loads(raw)["headers"]\n'
            '    return headers["task"], eval(headers["argsrepr"]), eval(headers["kwargsrepr"])': "cuts argsrepr off",
            'answer = lambda raw: (json.loads(raw)["headers"]["task"], *json.loads(json.loads(raw)["body"])[:2])': (
                "your function raised JSONDecodeError"
            ),
            'answer = lambda raw: json.loads(base64.b64decode(json.loads(raw)["body"]))': "[4, 5] first",
            'answer = lambda raw: json.loads(raw)["headers"]': "return three things",
            'answer = ("add", [4, 5], {})': "should be a function",
            'answer = lambda raw: ("add", [4, 5], {})': "the task's name is 'add_long'",
            "def answer(raw):\n"
            "    args, kwargs, embed = json.loads(base64.b64decode(json.loads(raw)['body']))\n"
            '    return json.loads(raw)["headers"]["task"], kwargs, args': "the arguments are [4, 5] and {}",
        },
        right=(
            "import functools\n"
            "def take_apart(part, raw):\n"
            "    message = json.loads(raw.decode())\n"
            '    [*both, _] = json.loads(base64.standard_b64decode(message[part].encode()).decode("utf-8"))\n'
            '    return [message["headers"]["task"], *both]\n'
            'answer = functools.partial(take_apart, "body")',
            "class Reader:\n"
            "    def __call__(self, raw):\n"
            "        message = json.loads(raw)\n"
            '        message["properties"]["delivery_tag"], message["properties"]["correlation_id"]\n'
            '        args, kwargs, _ = json.loads(base64.b64decode(message["body"]))\n'
            '        return message["headers"]["task"], tuple(args), dict(kwargs)\n'
            "answer = Reader()",
        ),
    ),
    "01-2": Exercise(
        kind=Callable,
        judge=_takes_safely,
        wrong={
            "def answer(broker, queue, taken):\n"
            "    _, job = broker.brpop(queue)\n"
            "    broker.lpush(taken, job)\n"
            "    return job": "a job in neither list",
            "def answer(broker, queue, taken):\n"
            "    broker.lpush(taken, broker.lindex(queue, -1))\n"
            "    return broker.rpop(queue)": "in both lists",
            "def answer(broker, queue, taken):\n"
            "    with broker.pipeline() as pipe:\n"
            "        [job] = pipe.rpop(queue).execute()\n"
            "        pipe.lpush(taken, job).execute()\n"
            "    return job": "between two requests to the broker leaves a job in neither",
            "def answer(broker, queue, taken):\n"
            "    job = broker.lindex(queue, -1)\n"
            "    broker.pipeline().rpop(queue).lpush(taken, job).execute()\n"
            "    return job": "when another worker takes a job",
            'answer = lambda _, queue, taken: globals()["broker"].lmove(queue, taken, "RIGHT", "LEFT")': (
                "the Redis client that it gets"
            ),
            "answer = lambda broker, queue, taken: broker.rpop(queue)": "no copy in the list",
            'answer = lambda broker, queue, taken: broker.lmove(queue, taken, "LEFT", "LEFT")': "than the oldest one",
            "answer = lambda broker, queue, taken: broker.lindex(queue, -1)": "still in the queue",
            "answer = lambda broker, queue, taken: broker.rename(queue, taken)": "4 jobs are gone",
            'def answer(broker, queue, taken):\n    broker.lmove(queue, taken, "RIGHT", "LEFT")': "returned None",
        },
        right=(
            "answer = lambda broker, queue, taken: broker.rpoplpush(queue, taken).decode()",
            'answer = lambda broker, queue, taken: broker.blmove(queue, taken, 0, "RIGHT", "RIGHT")',
            "def answer(broker, queue, taken):\n"
            '    text = \'local job = redis.call("RPOP", KEYS[1]) redis.call("LPUSH", KEYS[2], job) return job\'\n'
            "    return broker.register_script(text)(keys=[queue, taken])",
            "def answer(broker, queue, taken):\n"
            "    def move(pipe):\n"
            "        job = pipe.lindex(queue, -1)\n"
            "        pipe.multi()\n"
            "        pipe.rpop(queue).lpush(taken, job)\n"
            "    return broker.transaction(move, queue)[0]",
        ),
    ),
    "01-3": Exercise(
        kind=str,
        judge=_writes_bills,
        project="scratch/till",
        wrong={
            _till(body="[[customer, euros]]"): "the worker still ends: ValueError('not enough values",
            _till(body='[[], {"customer": customer, "amount": euros}, {}]'): "the task failed with TypeError",
            _till(push='broker.rpush("bills", json.dumps(message))'): "Ben's before Ada's",
            _till(task="shop.bill"): "knows no task of that name",
            _till(
                push='message["body"] = b64encode(body.encode()).decode()\n    '
                'broker.lpush("bills", json.dumps(message))'
            ): "can't decode the body",
            _till(push='del properties["delivery_tag"]\n    broker.lpush("bills", json.dumps(message))'): (
                "the field 'delivery_tag' is missing"
            ),
            _till(push="pass"): "there are 0",
        },
        right=(
            SENDS.strip(),
            _till(
                body='[[], {"customer": customer, "euros": euros}, None]',
                push='message["body"] = b64encode(body.encode()).decode()\n'
                '    properties["body_encoding"] = "base64"\n'
                '    broker.pipeline().lpush("bills", json.dumps(message)).execute()',
            ),
        ),
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
