"""The exercises of chapter 02b."""

import time
import uuid
from collections.abc import Callable

from celery import Celery
from celery.exceptions import TimeoutError
from celery.result import AsyncResult

from course_tasks.exercises import Exercise, Question, WrongAnswer, called


def _exception(answer: object) -> str | None:
    if isinstance(answer, AsyncResult):
        return "this is the receipt. The exception is what its get returns, if you ask it not to raise."
    if isinstance(answer, type):
        return f"this is the class {answer.__name__}. Put the object into answer that came back from the worker."
    if isinstance(answer, str):
        return "this is a text. The exception itself came back as an object: put that into answer."
    if answer is None:
        return "this is None: the task was not over yet when you looked. Wait for it with get."
    if isinstance(answer, TimeoutError):
        return "this only says that your waiting was over. Is the worker running? Run its cell again."
    if isinstance(answer, dict) and "pid" in answer:
        return "this says where the task was running when you looked. Wait until it is over, with get."
    if not isinstance(answer, BaseException):
        return f"this is {answer!r}, a result. Divide 1 by 0, so that there is an exception."
    if not isinstance(answer, ZeroDivisionError):
        return f"this is a {type(answer).__name__}: {answer}. Send the task divide with the arguments 1 and 0."
    return None


def _outcome(answer: Callable) -> str | None:
    client = Celery(set_as_current=False)
    given = {
        "SUCCESS": 0,
        "FAILURE": ZeroDivisionError("division by zero"),
        "STARTED": {"pid": 1, "hostname": "celery@laptop"},
        "RETRY": ConnectionError("the service is not up yet"),
        "PENDING": None,
    }
    ids = {state: str(uuid.uuid4()) for state in given}
    try:
        for state, value in given.items():
            if state != "PENDING":
                client.backend.store_result(ids[state], value, state)
        for state, value in given.items():
            if reason := _judged(answer, client.AsyncResult(ids[state]), state, value):
                return reason
    finally:
        for task_id in ids.values():
            client.AsyncResult(task_id).forget()
    return None


def _judged(answer: Callable, result: AsyncResult, state: str, value: object) -> str | None:
    begun = time.monotonic()
    try:
        found = called(answer, result, case=f"for a task that is {state}, ")
    except WrongAnswer as error:
        if isinstance(error.__cause__, TimeoutError):
            return f"it waited for a task that is {state}. Ask whether the task is over before you want its result."
        if isinstance(value, BaseException) and isinstance(error.__cause__, type(value)):
            return f"{error} Return the exception instead."
        raise
    if time.monotonic() - begun > 0.4:
        return f"it waited for a task that is {state}, and it was to come back at once."
    if isinstance(found, AsyncResult):
        return "it returned the receipt that it was given, and not what the task returned."
    if state == "SUCCESS" and found != value:
        return f"for a task that returned 0 it returned {found!r}."
    if state == "FAILURE" and not isinstance(found, ZeroDivisionError):
        return f"for a task that failed with ZeroDivisionError it returned {found!r}, not the exception."
    if state not in ("SUCCESS", "FAILURE") and found is not None:
        return f"a task that is {state} isn't over, and it returned {found!r}, which is no outcome."
    return None


def _progress(answer: list) -> str | None:
    if answer and all(isinstance(each, dict) and "status" in each for each in answer):
        return "these are whole records. Of each take what is under 'result', if its status is PROGRESS."
    if answer and all(isinstance(each, str) for each in answer):
        return "these are the states. The progress is in the records' results."
    if any(not isinstance(each, dict) or "done" not in each for each in answer):
        return "this has results of other states in it: take the records whose status is PROGRESS alone."
    if not answer:
        return "this list is empty. The status that you look for is the text 'PROGRESS', in capitals."
    if answer[-1].get("total") != 3:
        return f"it counted to {answer[-1].get('total')}, and was to count to 3."
    return None if [each["done"] for each in answer] == [1, 2, 3] else "there are to be three: done 1, 2 and 3."


EXERCISES = {
    "02b-1": Exercise(
        kind=object,
        judge=_exception,
        wrong={
            'answer = client.send_task("divide", args=(1, 0))': "this is the receipt",
            "answer = failed.traceback": "this is a text",
            'answer = client.send_task("divide", args=(0, 1)).get(timeout=10, propagate=False)': "this is 0.0",
            'answer = client.AsyncResult("never-sent").result': "this is None",
            "answer = ZeroDivisionError": "this is the class",
        },
    ),
    "02b-2": Exercise(
        kind=Callable,
        judge=_outcome,
        wrong={
            "answer = lambda result: result.result": "is STARTED isn't over",
            "answer = lambda result: result.get(timeout=1)": "is FAILURE, your function raised ZeroDivisionError",
            "answer = lambda result: result.get(timeout=1, propagate=False)": "it waited for a task that is STARTED",
            "answer = lambda result: result.result if result.successful() else None": "None, not the exception",
            "answer = lambda result: result.result or None": "for a task that returned 0 it returned None",
        },
    ),
    "02b-3": Exercise(
        kind=list,
        judge=_progress,
        wrong={
            'answer = watch("count_to", 3)': "these are whole records",
            'answer = [record["status"] for record in watch("count_to", 3)]': "these are the states",
            'answer = [record["result"] for record in watch("count_to", 3)]': "results of other states",
            'answer = [record["result"] for record in watch("count_to", 2) if record["status"] == "PROGRESS"]': (
                "it counted to 2"
            ),
        },
    ),
}

QUIZ = {
    "02b-1": Question(
        right=(
            "successful",
            "successful()",
            "result.successful",
            "result.successful()",
            "AsyncResult.successful",
            "AsyncResult.successful()",
            "task.successful",
            "task.successful()",
        ),
        wrong={
            "ready": "`ready()` is `True` for a task that failed as well, because that task is over too.",
            "get": "`get` waits for the task, and it raises the task's exception.",
            "failed": "`failed()` is `False` for a task that went well, but also for one that is still running.",
            "state": "`state` is an attribute. There is a method that compares it for you.",
            "result": "`result` is an attribute, and while the task runs or after it failed, it holds something else.",
        },
        otherwise=(
            "name one of the methods that read the record and come back at once. The chapter calls them for three "
            "tasks."
        ),
    ),
    "02b-2": Question(
        right="b",
        wrong={
            "a": "the course's app turns on `task_track_started`, and that is not Celery's default.",
            "c": "`PENDING` is not stored anywhere. Even an id that was never sent has this state.",
            "d": "by default, Celery keeps a result for a day, and the task was sent an hour ago.",
        },
    ),
    "02b-3": Question(
        right="d",
        wrong={
            "a": (
                "the made-up class only claims to come from there. `celery.exceptions` has no `OutOfStock`, so this "
                "line raises an `AttributeError`."
            ),
            "b": "the answer arrives in time, so `get` doesn't time out.",
            "c": "this program can't import `shop`, so Python doesn't know the name `shop` here.",
        },
    ),
    "02b-4": Question(
        right="c",
        wrong={
            "a": "a timeout happens only in your own program. It doesn't touch the broker.",
            "b": "a worker can't see whether anybody waits for a result, so it runs the task either way.",
            "d": "a timeout changes nothing in an `AsyncResult`. It still knows the task's id.",
        },
    ),
}
