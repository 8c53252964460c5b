"""The exercises and the quiz of chapter 02."""

import json
import os
import re
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from celery import Celery
from redis import Redis

from course_tasks.exercises import Exercise, Question, WrongAnswer, called
from course_tasks.exercises.project import Project

LARGE = 1_000_000  # letters in a result of the chapter's list `results`
HOUR, DAY = 3600, 86_400


def _time_to_live(answer: float) -> str | None:
    if answer == -2:
        return "-2 says that this server has no such key. Is it the backend that you asked, and is the key right?"
    if answer > DAY:
        return "that is in milliseconds, or it is a time on the clock. Ask with ttl, which gives seconds."
    with Redis.from_url(os.environ["CELERY_RESULT_BACKEND"]) as backend:
        left = [backend.pttl(key) / 1000 for key in backend.scan_iter("celery-task-meta-*") if _large(backend, key)]
    if not left:
        return "the two results are not in the backend any more. Run the cell again that makes them, and then this one."
    if answer >= HOUR:
        return f"{answer} is what the key began with, or more. Some of that is over: ask the backend what is left."
    if answer < min(left) - 1:
        return f"the backend will keep it for {min(left):.0f} more seconds, and {answer} is less. Ask with ttl."
    return None


def _large(backend: Redis, key: bytes) -> bool:
    return backend.type(key) == b"string" and backend.strlen(key) > LARGE


def _looks_up(answer: Callable) -> str | None:
    backend = Celery(set_as_current=False).backend
    stored = {str(uuid.uuid4()): value for value in ([4, 5], 0, ZeroDivisionError("division by zero"))}
    try:
        for task_id, value in stored.items():
            backend.store_result(task_id, value, "FAILURE" if isinstance(value, Exception) else "SUCCESS")
        return _judged_lookup(answer, *stored)
    finally:
        for task_id in stored:
            backend.forget(task_id)


def _judged_lookup(answer: Callable, task_id: str, of_zero: str, failed: str) -> str | None:
    found = called(answer, task_id, case="given the id of a stored result, ")
    if isinstance(found, bytes | str):
        return "it returned the record as text. json.loads makes a dictionary of it."
    if isinstance(found, dict):
        return "it returned the whole record. The result is the value under 'result' in it."
    if found is None:
        return "it returned None for a result that is stored. Is the key made of celery-task-meta- and the id?"
    if found != [4, 5]:
        return f"the stored result is [4, 5], and it returned {found!r}."
    try:
        found = called(answer, str(uuid.uuid4()), case="given an unknown id, ")
    except WrongAnswer as error:
        return f"{error} Nothing is stored for that id, so return None."
    if found is not None:
        return f"nothing is stored for an unknown id, and it returned {found!r}, not None."
    if called(answer, of_zero, case="given the id of a result that is 0, ") != 0:
        return "a task whose result is 0 has a result too, and it did not return that 0."
    if isinstance(called(answer, failed, case="given the id of a task that failed, "), BaseException):
        return "for a failed task it returned an exception, so it asked Celery. Read the record with backend and json."
    return None


def _keeps_prices(folder: str) -> str | None:
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        ordered = pool.submit(project.run, "python order.py")
        project.worker("celery -A quotes worker --pool=solo --without-mingle --without-gossip")
        if not (order := ordered.result().split()):
            return "`python order.py` should print the order's id."
        deadline = time.monotonic() + 10
        while not (end := re.search(rf"\[{re.escape(order[-1])}\] (?!received)(.+)", project.log())):
            if time.monotonic() > deadline:
                return f"the worker has not run the task price with the id {order[-1]} within 10 s."
            time.sleep(0.02)
        left = project.backend.ttl(f"celery-task-meta-{order[-1]}")
        if not end[1].startswith("succeeded in "):
            return f"the task price fails: it {end[1]}"
        if left == -2:
            return "the task succeeds, but no result of it is in the backend."
        if left == -1:
            return "now the backend keeps each result for ever. After a day, it should be gone."
        if left > DAY:
            return f"now the backend keeps each result for {left} seconds, which is longer than a day."
        if left < HOUR - 60:
            return f"the backend keeps a result for {left} seconds from the worker. Customers come back within an hour."
        said = project.run(f"python order.py {order[-1]}").strip()
        stored = project.backend.get(f"celery-task-meta-{order[-1]}")
        if not stored or json.loads(stored)["result"] != 42 or "42" not in said:
            return f"14 pieces cost 42, and the customer reads {said!r}."
    return None


QUOTES = """
%%writefile scratch/quotes/quotes.py
from celery import Celery

app = Celery("quotes", broker="redis://localhost:6379/0", backend="redis://localhost:6380/0"{more})
{setting}


@app.task(name="price"{options})
def price(pieces):
    return {price}
"""
ORDER = """
%%writefile scratch/quotes/order.py
import sys

from celery import Celery

client = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")
client.conf.result_expires = 3600
if len(sys.argv) == 1:
    print(client.send_task("price", args=(14,)).id)
else:
    print("The price is", client.AsyncResult(sys.argv[1]).get(timeout=30))
"""


def _quotes(setting: str = "", more: str = "", options: str = "", price: str = "3 * pieces") -> str:
    return QUOTES.format(setting=setting, more=more, options=options, price=price).strip()


EXERCISES = {
    "02-1": Exercise(
        kind=(int, float),
        judge=_time_to_live,
        wrong={
            'answer = broker.ttl(f"celery-task-meta-{results[0].id}")': "this server has no such key",
            'answer = backend.pttl(f"celery-task-meta-{results[0].id}")': "in milliseconds",
            "answer = app.conf.result_expires": "what the key began with",
            "answer = client.conf.result_expires": "should be a whole number or a number",
            "answer = 1800": "and 1800 is less",
        },
        right=(
            "answer = backend.pttl(client.backend.get_key_for_task(results[0].id)) / 1000",
            'import time\nanswer = backend.expiretime(f"celery-task-meta-{results[0].id}") - time.time()',
        ),
    ),
    "02-2": Exercise(
        kind=Callable,
        judge=_looks_up,
        wrong={
            'answer = lambda task_id: backend.get(f"celery-task-meta-{task_id}")': "the record as text",
            'answer = lambda task_id: json.loads(backend.get(f"celery-task-meta-{task_id}"))': "the whole record",
            'answer = lambda task_id: json.loads(backend.get(f"celery-task-meta-{task_id}"))["result"]': (
                "given an unknown id, your function raised TypeError"
            ),
            "answer = lambda task_id: backend.get(task_id)": "for a result that is stored",
            'answer = json.loads(backend.get(f"celery-task-meta-{results[0].id}"))["result"]': "should be a function",
            "answer = lambda task_id: client.AsyncResult(task_id).result": "so it asked Celery",
            'answer = lambda i: json.loads(backend.get(f"celery-task-meta-{i}") or "{}").get("result") or None': (
                "did not return that 0"
            ),
        },
        right=(
            'answer = lambda task_id: json.loads(backend.get("celery-task-meta-" + task_id) or "{}").get("result")',
            "import functools\n"
            "def look(server, task_id):\n"
            '    for stored in server.mget(["celery-task-meta-" + task_id]):\n'
            '        return stored and json.loads(stored)["result"]\n'
            "answer = functools.partial(look, backend)",
        ),
    ),
    "02-3": Exercise(
        kind=str,
        judge=_keeps_prices,
        wrong={
            _quotes("app.conf.result_expires = 60"): "for 60 seconds",
            _quotes("app.conf.result_expires = None"): "for ever",
            _quotes("app.conf.result_expires = 3600 * 1000"): "longer than a day",
            _quotes(options=", ignore_result=True"): "no result of it is in the backend",
            _quotes(price="4 * pieces"): "14 pieces cost 42",
            ORDER.strip(): "from the worker",
        },
        right=(
            _quotes("from datetime import timedelta\n\napp.conf.update(result_expires=timedelta(hours=1))"),
            _quotes(more=", result_expires=7200"),
            _quotes("# a day, as by default", options=", bind=False"),
        ),
        project="scratch/quotes",
    ),
}

QUIZ = {
    "02-1": Question(
        right="b",
        wrong={
            "a": "`succeeded` in the log means that the worker has run the task to its end.",
            "c": "then this worker would not have received the task, and its log would not mention it.",
            "d": "then `get` would raise `NotImplementedError` at once. It would not wait for ten seconds.",
        },
    ),
    "02-2": Question(
        right=("10", "ten", "10 minutes", "ten minutes", "10 min"),
        wrong={
            "60": "that is the client's setting, but the client doesn't store the result.",
            "600": "`result_expires` is in seconds, and the question is about minutes.",
            "3600": "that is the client's setting, and it is in seconds. The client doesn't store the result.",
            "1440": "a day is only Celery's default. Both apps in this question have a setting of their own.",
        },
        otherwise="answer with a number of minutes. Ask yourself first which of the two programs stores the result.",
    ),
    "02-3": Question(
        right="b",
        wrong={
            "a": "the databases of a server share its memory. Only the keys are apart.",
            "c": "the policy `volatile-ttl` would do that. `noeviction` drops nothing.",
            "d": "the policy `allkeys-lru` could do that (see 01b). `noeviction` drops nothing.",
        },
    ),
    "02-4": Question(
        right="a",
        wrong={
            "b": "the client would have to know that there will be no result. All it knows is the name `notify`.",
            "c": "the definition in the worker says that the result is ignored, so the worker stores nothing.",
            "d": "the client can't know how the task is defined, so `send_task` has no reason to complain.",
        },
    ),
}
