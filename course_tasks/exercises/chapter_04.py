"""The exercises and the quiz of chapter 04."""

import base64
import json
import os
import re
from collections.abc import Callable

from kombu.exceptions import EncodeError
from redis import Redis

from course_tasks.exercises import Exercise, Question, WrongAnswer, called, published, sent
from course_tasks.exercises.project import Project


def _message(answer: dict) -> str | None:
    if not {"body", "headers", "properties"} <= answer.keys():
        return "this is not the whole message, which has a body, headers and properties."
    if (name := answer["headers"].get("task")) != "divide":
        return f"it calls {name!r}, and the worker knows the task as 'divide'."
    args, kwargs, _ = json.loads(base64.b64decode(answer["body"]))
    if args:
        return f"{args} went by position, as args. By name means kwargs={{...}}."
    if kwargs.keys() != {"x", "y"}:
        return f"its arguments by name are {sorted(kwargs)}. The task takes x and y, no more and no less."
    if kwargs != {"x": 1, "y": 4}:
        return f"it was sent with {kwargs}, but x should be 1 and y should be 4."
    if not sent(answer["headers"].get("id", "")):
        return "no such task was sent from this notebook. Send it with client.send_task."
    if (queue := answer["properties"].get("delivery_info", {}).get("routing_key")) != "look":
        return f"it was sent to the queue {queue!r}. Send it to the queue 'look'."
    with Redis.from_url(os.environ["CELERY_BROKER_URL"]) as broker:
        waiting = [json.loads(text)["headers"]["id"] for text in broker.lrange("look", 0, -1)]
    if answer["headers"]["id"] in waiting:
        return "the message is still in the queue. Take it out, with broker.rpop for example."
    return None


def _joins_sets(answer: Callable) -> str | None:
    for one, other in (({3, 1}, {2, 1}), ({"a"}, {"b", "c"}), (set(), {50})):
        try:
            with published() as calls:
                value = called(answer, one, other, case=f"for {one} and {other}, ")
        except WrongAnswer as error:
            if isinstance(error.__cause__, EncodeError):
                return "JSON knows no sets. Make lists of them before you send."
            raise
        if not calls:
            return "no task was sent. The worker should join them, with add."
        bodies = json.dumps([[call.args, call.kwargs] for call in calls], default=str)
        if missing := [item for item in one | other if json.dumps(item) not in bodies]:
            return f"{missing[0]!r} was not sent to the worker. Have the worker join the two sets, not your function."
        if isinstance(value, list):
            return f"it returned the list {value}. Make a set of what comes back."
        if not isinstance(value, set | frozenset):
            return f"it returned {value!r}, which is not a set. Wait for the result with get(timeout=10)."
        if value != one | other:
            return f"for {one} and {other} it returned {value}, and it should return {one | other}."
    return None


def _prices_work(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("celery -A prices worker --pool=solo --without-mingle --without-gossip")
        said = project.run("python shop.py", hopeless=lambda: _no_result(project))
        if not re.search(r"\b75\b", said):
            return f"shop.py printed {said.strip()!r}, and 3 pieces for 25 each cost 75."
        if "computing the price" not in (log := project.settled_log()):
            return "shop.py prints the right number, but no task has computed it. The worker should do that."
        results = project.results()
        forgotten = not results and _stored(project) and re.search(r" succeeded in \S+ 75$", log, re.MULTILINE)
        if 75 not in results and not forgotten:
            return (
                "shop.py prints the right number, but it can't have it from the task: the backend has no such result."
            )
    return None


def _no_result(project: Project) -> str | None:
    """Why a client waits in vain: the worker stores a result before it logs the end of the task."""
    end = re.search(r" Task price\[\S+ (succeeded|raised unexpected: (.+))", project.log())
    if not end or _stored(project):
        return None
    return (
        f"the task price fails: {end[2]}" if end[2] else "the task has succeeded, but the backend has no result of it."
    )


def _stored(project: Project) -> bool:
    """Whether the backend was ever given a result, even if a client has deleted it since."""
    return not {"cmdstat_set", "cmdstat_setex"}.isdisjoint(project.backend.info("commandstats"))


def _prices(task: str, body: str = "return amount * each") -> str:
    return f"""%%writefile scratch/prices/prices.py
from celery import Celery

app = Celery("prices")


{task}
def price(amount, each):
    print("computing the price")
    {body}
"""


def _shop(*lines: str) -> str:
    rest = "\n".join(lines)
    return f"""%%writefile scratch/prices/shop.py
from celery import Celery

client = Celery()
{rest}
"""


EXERCISES = {
    "04-1": Exercise(
        kind=dict,
        judge=_message,
        wrong={
            'client.send_task("divide", args=(1, 4), queue="look"); answer = json.loads(broker.rpop("look"))': (
                "went by position, as args"
            ),
            'client.send_task("tasks.divide", kwargs={"x": 1, "y": 4}, queue="look")\n'
            'answer = json.loads(broker.rpop("look"))': "it calls 'tasks.divide'",
            'client.send_task("divide", kwargs={"x": 4, "y": 1}, queue="look")\n'
            'answer = json.loads(broker.rpop("look"))': "x should be 1",
            'client.send_task("divide", kwargs={"a": 1, "b": 4}, queue="look")\n'
            'answer = json.loads(broker.rpop("look"))': "The task takes x and y",
            'answer = {"x": 1, "y": 4}': "not the whole message",
            'client.send_task("divide", kwargs={"x": 1, "y": 4}, queue="look"); answer = broker.rpop("look")': (
                "should be a dictionary"
            ),
            'client.send_task("divide", kwargs={"x": 1, "y": 4}, queue="look")\n'
            'answer = json.loads(broker.lindex("look", 0))': "still in the queue",
            'broker.delete("look"); client.send_task("divide", kwargs={"x": 1, "y": 4}, queue="looks")\n'
            'answer = json.loads(broker.rpop("looks"))': "the queue 'looks'",
            'import base64\nbody = base64.b64encode(b\'[[], {"x": 1, "y": 4}, {}]\').decode()\n'
            'answer = {"body": body, "headers": {"task": "divide", "id": "1"}, "properties": {}}': (
                "no such task was sent"
            ),
        },
        right=(
            'client.signature("divide", kwargs={"y": 4, "x": 1}, queue="look").delay()\n'
            '[text] = broker.lrange("look", 0, -1)\nbroker.delete("look")\nanswer = json.loads(text)',
            "from course_tasks.tasks import divide\n"
            'divide.apply_async(kwargs=dict(x=1, y=4), queue="look")\nanswer = json.loads(broker.brpop("look")[1])',
        ),
    ),
    "04-2": Exercise(
        kind=Callable,
        judge=_joins_sets,
        wrong={
            'answer = lambda one, other: client.send_task("add", args=(one, other)).get(timeout=10)': (
                "JSON knows no sets"
            ),
            "answer = lambda one, other: one | other": "no task was sent",
            'answer = lambda one, other: client.send_task("add", args=(list(one), list(other))).get(timeout=10)': (
                "Make a set of what comes back"
            ),
            'answer = lambda one, other: client.send_task("add", args=(list(one), list(other)))': "which is not a set",
            "answer = lambda one: one": "your function raised TypeError",
            'def answer(one, other):\n    client.send_task("add", args=(1, 1))\n    return one | other': (
                "was not sent to the worker"
            ),
            'answer = lambda one, other: set(client.send_task("add", args=(list(one), [])).get(timeout=10))': (
                "2 was not sent to the worker"
            ),
        },
        right=(
            "answer = lambda *sets: frozenset(add.delay(*map(list, sets)).get(timeout=10))",
            'def answer(one, other):\n    call = client.signature("add", kwargs={"x": [*one], "y": [*other]})\n'
            "    return {*call.apply_async().get(timeout=10)}",
        ),
    ),
    "04-3": Exercise(
        kind=str,
        judge=_prices_work,
        project="scratch/prices",
        wrong={
            _shop(
                'result = client.send_task("price", kwargs={"amount": 3, "each": 25})',
                'print("The price is", result.get(timeout=60))',
            ): "the backend has no result of it",
            _shop('print("The price is", 3 * 25)'): "no task has computed it",
            _shop('client.send_task("price", kwargs={"amount": 3, "each": 25})', "import time; time.sleep(10)")
            + 'print("The price is", 75)\n': "the task has succeeded, but the backend",
            _shop(
                'client.send_task("price", kwargs={"amount": 1, "each": 25}, ignore_result=False).get(timeout=10)',
                'print("The price is", 75)',
            ): "it can't have it from the task",
            _prices(
                '@app.task(name="price", ignore_result=False)', "return amount * each + 100"
            ): "printed 'The price is 175'",
            _prices('@app.task(name="price")', "print(amount * each)"): "shop.py printed 'The price is None'",
            _prices("@app.task"): "NotRegistered: 'price'",
            _prices('@app.task(name="price", ignore_result=True)', "return amount * eachh"): (
                "the task price fails: NameError("
            ),
            _prices(
                '@app.task(name="price", ignore_results=False, ignore_result=True)'
            ): "the task has succeeded, but the backend has no result",
        },
        right=(
            _prices('@app.task(name="price", ignore_result=False)'),
            _prices('@app.task(name="price")', "total = each * amount\n    return total"),
            _shop(
                'result = client.send_task("price", kwargs={"amount": 3, "each": 25}, ignore_result=False)',
                'print(f"{result.get(timeout=10)} euros")',
                "result.forget()",
            ),
        ),
    ),
}

QUIZ = {
    "04-1": Question(
        right="b",
        wrong={
            "a": "the function runs in the workers, and they already have the new version.",
            "c": (
                "only the program that runs the function needs the library. The web server's old file does not even "
                "mention it."
            ),
        },
    ),
    "04-2": Question(
        right=("KeyError", "KeyError: 7", "KeyError(7)", "a KeyError", "builtins.KeyError"),
        wrong={
            "EncodeError": "JSON has a way to write this dictionary, so the client can send it.",
            "TypeError": "the argument arrives as a dictionary, and you may look up any number in a dictionary.",
            "IndexError": "lists and tuples raise this one. The argument arrives as a dictionary.",
            "NotRegistered": "the worker knows this task and runs it.",
            "TimeoutError": "the task fails at once, so `get` has an answer long before a timeout.",
            "none": "the task does fail. Think of what JSON does to the key 7.",
            "no exception": "the task does fail. Think of what JSON does to the key 7.",
        },
        otherwise="answer with the name of one Python exception. What does JSON do to the key 7?",
    ),
    "04-3": Question(
        right="c",
        wrong={
            "a": "a client has no list of the names that the workers know, so `send_task` can't check yours.",
            "b": "a worker takes each message of its queue, whatever the name in it is.",
            "d": "the worker does log an error, but it goes on with the next message.",
        },
    ),
    "04-4": Question(
        right="a",
        wrong={
            "b": "`send_task` accepts options of any name, so Python has no reason to complain.",
            "c": "a task gets only what you put into `args` and `kwargs`.",
            "d": "a worker ignores those properties of a message that it doesn't know.",
        },
    ),
}
