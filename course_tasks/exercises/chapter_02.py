"""The exercises of chapter 02."""

import uuid
from collections.abc import Callable

from celery import Celery

from course_tasks.exercises import Exercise, Question, WrongAnswer, called


def _time_to_live(answer: int) -> str | None:
    if answer == -2:
        return "-2 says that this server has no such key. Is it the backend that you asked, and is the key right?"
    if answer > 86_000:
        return "that is in milliseconds, or more than the worker's setting allows. Ask with ttl, which gives seconds."
    if answer == 3600:
        return "3600 is what the key began with, and some of that is over. Ask the backend what is left."
    if not 0 < answer < 3600:
        return f"{answer} can't be: the key began with 3600 seconds, and they run down."
    return None


def _looks_up(answer: Callable) -> str | None:
    backend = Celery(set_as_current=False).backend
    stored = [str(uuid.uuid4()) for _ in range(2)]
    try:
        for task_id, result in zip(stored, ([4, 5], 0), strict=True):
            backend.store_result(task_id, result, "SUCCESS")
        return _judged_lookup(answer, *stored)
    finally:
        for task_id in stored:
            backend.forget(task_id)


def _judged_lookup(answer: Callable, task_id: str, of_zero: str) -> str | None:
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
    return None


EXERCISES = {
    "02-1": Exercise(
        kind=int,
        judge=_time_to_live,
        wrong={
            'answer = broker.ttl(f"celery-task-meta-{results[0].id}")': "this server has no such key",
            'answer = backend.pttl(f"celery-task-meta-{results[0].id}")': "in milliseconds",
            "answer = app.conf.result_expires": "what the key began with",
            "answer = client.conf.result_expires": "should be a whole number",
        },
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
        },
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
        right="d",
        wrong={
            "a": (
                "the worker `patient` did this because of one setting, and the course's app doesn't have that setting."
            ),
            "b": (
                "the function of the task doesn't need the backend. The worker needs it, before and after it runs "
                "the function."
            ),
            "c": "by default, the message was acknowledged just before the task started, so the broker has no copy.",
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
