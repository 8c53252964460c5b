"""The exercises and the quiz of chapter 00."""

import json
import os
import re

from celery.exceptions import NotRegistered, TimeoutError
from celery.result import AsyncResult
from celery.states import ALL_STATES
from redis import Redis

from course_tasks.exercises import Exercise, Question, sent
from course_tasks.exercises.project import Project


def _sends_add(answer: AsyncResult) -> str | None:
    asked = sent(answer.id)
    if asked and asked.task != "add":
        return f"you asked for a task called {asked.task!r}. The worker knows one task, and its name is 'add'."
    try:
        value = answer.get(timeout=10)
    except NotRegistered as error:
        return f"no worker knows a task called {error}. It was given the name 'add'."
    except TimeoutError:
        return "nothing came back within 10 s. Is the worker running? Run its cell again."
    except Exception as error:
        return f"the task failed with {type(error).__name__}: {error}. Give it two numbers."
    if value == "2022":
        return "its result is the text '2022': you sent texts, and + joins texts. Send numbers."
    if value != 42:
        return f"its result is {value!r}, and it should be 42."
    if asked and sorted([*asked.args, *asked.kwargs.values()]) != [20, 22]:
        given = ", ".join(map(str, [*asked.args, *asked.kwargs.values()]))
        return f"that makes 42 as well, but the worker should add 20 and 22, and you sent {given}."
    return None


def _stored_record(answer: object) -> str | None:
    if answer is None:
        return "the backend has nothing under that key. The key is celery-task-meta- and the task's id, in one text."
    if isinstance(answer, bytes | str) and b"task_id" in (answer if isinstance(answer, bytes) else answer.encode()):
        return "this is the record as text. json.loads makes a dictionary of it."
    if not isinstance(answer, dict) or "task_id" not in answer:
        return "this is not the whole record. Put everything that the backend has stored into answer."
    with Redis.from_url(os.environ["CELERY_RESULT_BACKEND"]) as backend:
        stored = backend.get(f"celery-task-meta-{answer['task_id']}")
    if stored is None or json.loads(stored) != answer:
        return "the backend has no such record. Read it from there with backend.get."
    return None if answer["result"] == 4 else "this is the record of another task. late computed 2 + 2."


def _unknown_state(answer: str) -> str | None:
    if answer in ALL_STATES - {"PENDING"}:
        return f"{answer} is a state that somebody has stored for a task. Make up an id that nobody has ever used."
    if answer != "PENDING":
        return "Celery has no such state. Let it tell you, with client.AsyncResult(...).state."
    return None


def _shop_works(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("celery -A shop worker --pool=solo --without-mingle --without-gossip")
        said = project.run("python order.py")
        if not re.search(r"\b15\b", said):
            return f"order.py printed {said.strip()!r}, but the prices 4, 5 and 6 make 15."
        if 15 not in project.results():
            return "order.py prints the right number, but no task has computed it. The worker should do that."
    return None


SHOP = """
%%writefile scratch/shop/shop.py
from celery import Celery

app = Celery("shop", broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")


{task}
def total(prices):
    {body}
"""
ORDER = """
%%writefile scratch/shop/order.py
from celery import Celery

client = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")
{rest}
"""


def _shop(task: str = '@app.task(name="total")', body: str = "return sum(prices)") -> str:
    return SHOP.format(task=task, body=body).strip()


def _order(rest: str) -> str:
    return ORDER.format(rest=rest).strip()


EXERCISES = {
    "00-1": Exercise(
        kind=AsyncResult,
        judge=_sends_add,
        wrong={
            'answer = client.send_task("add", args=(4, 5))': "its result is 9",
            'answer = client.send_task("add", args=("20", "22"))': "you sent texts",
            'answer = client.send_task("main.add", args=(20, 22))': "a task called 'main.add'",
            'answer = client.send_task("add", args=(20, 22)).get(timeout=10)': "should be an AsyncResult",
            'answer = client.send_task("add", args=(21, 21))': "you sent 21, 21",
            'answer = client.send_task("add", args=(42,))': "the task failed with TypeError",
            'answer = client.send_task("add", args=(20, None))': "unsupported operand",
        },
        right=(
            'answer = client.send_task("add", kwargs={"x": 20, "y": 22})',
            'answer = client.signature("add", args=(22, 20)).delay()',
            'answer = client.AsyncResult(client.send_task("add", (20.0, 22)).id)',
        ),
    ),
    "00-2": Exercise(
        kind=object,
        judge=_stored_record,
        wrong={
            'answer = backend.get(f"celery-task-meta-{late.id}")': "json.loads makes a dictionary",
            'answer = json.loads(backend.get(f"celery-task-meta-{result.id}"))': "the record of another task",
            "answer = late.get(timeout=10)": "not the whole record",
            "answer = broker.get(late.id)": "nothing under that key",
            'answer = {"status": "SUCCESS", "result": 4, "task_id": late.id}': "no such record",
        },
        right=(
            'answer = json.loads(backend.mget(f"celery-task-meta-{late.id}")[0])',
            'record = backend.get("celery-task-meta-" + str(late))\nanswer = json.loads(record.decode())',
        ),
    ),
    "00-3": Exercise(
        kind=str,
        judge=_unknown_state,
        wrong={
            "answer = client.AsyncResult(result.id).state": "SUCCESS is a state that somebody has stored",
            'answer = "UNKNOWN"': "no such state",
            'answer = "REVOKED"': "REVOKED is a state that somebody has stored",
            "answer = client.AsyncResult('never-sent')": "should be a text",
        },
        right=(
            'answer = client.AsyncResult("no-such-task").status',
            "from celery.states import PENDING\nanswer = PENDING",
        ),
    ),
    "00-4": Exercise(
        kind=str,
        judge=_shop_works,
        project="scratch/shop",
        wrong={
            _shop('@app.task(name="Total")'): "NotRegistered: 'total'",
            _shop("@app.task(name=total)"): "name 'total' is not defined",
            _shop(body="print(sum(prices))"): "order.py printed 'The total is None'",
            _order('print("The total is", sum([4, 5, 6]))'): "no task has computed it",
        },
        right=(
            _order('print("The total is", client.send_task("shop.total", args=([4, 5, 6],)).get(timeout=10))'),
            _order('from shop import total\n\nprint("The total is", total.delay([4, 5, 6]).get(timeout=10))'),
        ),
    ),
}

QUIZ = {
    "00-1": Question(
        right="b",
        wrong={
            "a": "`send_task` had handed the message to the broker before the crash, and the broker still runs.",
            "c": "no worker has seen the task yet, so nobody could report an error to the backend.",
        },
    ),
    "00-2": Question(
        right="d",
        wrong={
            "a": "this error comes from `get` in your own program. A task that fails gets the state FAILURE.",
            "b": "a worker may be in the middle of the task. From your side, that looks just the same.",
            "c": "nobody told the broker or a worker that you stopped waiting, so they carry on as before.",
        },
    ),
    "00-3": Question(
        right="a",
        wrong={
            "b": "the code runs in the worker, so only the worker needs it.",
            "c": "the client leaves the message with the broker, and any worker of that queue may take it.",
        },
    ),
    "00-4": Question(
        right=("backend", "the backend", "result backend", "the result backend"),
        wrong={
            "broker": "the broker keeps messages until a worker takes them. The result goes to another place.",
            "worker": "the worker gives the result away when the task ends. You can stop it and still get the result.",
            "client": "the client wasn't running when the task finished, so it could not receive anything.",
        },
        otherwise="name one of the four parts in the picture at the top: client, broker, worker or backend.",
    ),
}
