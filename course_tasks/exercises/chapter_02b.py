"""The exercises and the quiz of chapter 02b."""

import time
import uuid
from collections.abc import Callable

from celery import Celery
from celery.exceptions import TaskRevokedError, TimeoutError
from celery.result import AsyncResult
from celery.states import READY_STATES

from course_tasks.exercises import Exercise, Question, WrongAnswer, called, was_sent


def _exception(answer: object) -> str | None:
    if isinstance(answer, AsyncResult):
        return "this is the AsyncResult. The exception is what its get returns, if you ask it not to raise."
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
        return f"this is {answer!r}, a result. Divide 5 by 0, so that there is an exception."
    if not isinstance(answer, ZeroDivisionError):
        return f"this is a {type(answer).__name__}: {answer}. Send the task divide with the arguments 5 and 0."
    if not was_sent("divide", 5, 0):
        return "no worker was asked to divide 5 by 0. The exception should come from there."
    return None


def _outcome(answer: Callable) -> str | None:
    client = Celery(set_as_current=False)
    given = {
        "SUCCESS": 0,
        "FAILURE": ZeroDivisionError("division by zero"),
        "REVOKED": TaskRevokedError("expired"),
        "STARTED": {"pid": 1, "hostname": "celery@laptop"},
        "RETRY": ConnectionError("the service is not up yet"),
        "PENDING": None,
        "PROGRESS": {"done": 1, "total": 3},
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
        return f"it took its time for a task that is {state}, and it should come back at once."
    if isinstance(found, AsyncResult):
        return "it returned the AsyncResult that it was given, and not what the task returned."
    if state == "SUCCESS" and (found != value or isinstance(found, bool)):
        return f"for a task that returned 0 it returned {found!r}."
    if isinstance(value, BaseException) and state in READY_STATES and not isinstance(found, type(value)):
        return f"for a task that is {state} it returned {found!r}, not its {type(value).__name__}."
    if state not in READY_STATES and found is not None:
        return f"a task that is {state} isn't over, and it returned {found!r}, which is no outcome."
    return None


def _progress(answer: list | tuple) -> str | None:
    if not answer:
        return "this list is empty. The status that you look for is the text 'PROGRESS', in capitals."
    if all(isinstance(each, dict) and "status" in each for each in answer):
        return "these are whole records. Of each, take what is under 'result', if its status is PROGRESS."
    if all(isinstance(each, str) for each in answer):
        return "these are the states. The progress is in the records' results."
    if any(not isinstance(each, dict) or "done" not in each for each in answer):
        return "some of these come from other states. Take only the records whose status is PROGRESS."
    if answer[-1].get("total") != 4:
        return f"it counted to {answer[-1].get('total')}, and it should count to 4."
    if [each["done"] for each in answer] != [1, 2, 3, 4]:
        return "there should be four reports: done 1, 2, 3 and 4."
    return None if was_sent("count_to", 4) else "no worker was asked to count to 4. Send the task count_to."


EXERCISES = {
    "02b-1": Exercise(
        kind=object,
        judge=_exception,
        wrong={
            'answer = ZeroDivisionError("division by zero")': "no worker was asked",
            'answer = client.send_task("divide", args=(5, 0))': "this is the AsyncResult",
            "answer = divide.traceback": "this is a text",
            'answer = client.send_task("divide", args=(0, 5)).get(timeout=10, propagate=False)': "this is 0.0",
            'answer = client.AsyncResult("never-sent").result': "this is None",
            "answer = ZeroDivisionError": "this is the class",
        },
        right=(
            "try:\n"
            '    client.signature("divide", kwargs={"x": 5, "y": 0}).delay().get(timeout=10)\n'
            "except ZeroDivisionError as error:\n"
            "    answer = error",
            'asked = client.send_task("divide", (5, 0.0))\nwait_until(asked.ready)\nanswer = asked.result',
        ),
    ),
    "02b-2": Exercise(
        kind=Callable,
        judge=_outcome,
        wrong={
            "answer = lambda result: result.result": "is STARTED isn't over",
            "answer = lambda result: result.get(timeout=1)": "is FAILURE, your function raised ZeroDivisionError",
            "answer = lambda result: result.get(timeout=1, propagate=False)": "it waited for a task that is STARTED",
            "answer = lambda result: result.result if result.successful() else None": "None, not its ZeroDivisionError",
            "answer = lambda result: result.result or None": "for a task that returned 0 it returned None",
            "answer = lambda result: result.result if result.successful() or result.failed() else None": (
                "None, not its TaskRevokedError"
            ),
            'answer = lambda r: None if r.state in ("PENDING", "STARTED", "RETRY") else r.result': (
                "PROGRESS isn't over"
            ),
            "import time\n"
            "def answer(result):\n"
            "    time.sleep(0.5)\n"
            "    return result.result if result.ready() else None": "it took its time",
        },
        right=(
            "answer = lambda result: result.get(timeout=1, propagate=False) if result.ready() else None",
            "class Outcome:\n"
            "    def __call__(self, result):\n"
            "        record = client.backend.get_task_meta(result.id)\n"
            '        return record["result"] if record["status"] in celery.states.READY_STATES else None\n'
            "answer = Outcome()",
        ),
    ),
    "02b-3": Exercise(
        kind=(list, tuple),
        judge=_progress,
        wrong={
            'answer = [{"done": n, "total": 4} for n in (1, 2, 3, 4)]': "no worker was asked",
            'answer = []\nclient.send_task("count_to", args=(4,)).get(timeout=10, on_message=answer.append)': (
                "whole records"
            ),
            "answer = []\n"
            'keep = lambda record: answer.append(record["status"])\n'
            'client.send_task("count_to", args=(4,)).get(timeout=10, on_message=keep)': "these are the states",
            "answer = []\n"
            'keep = lambda record: answer.append(record["result"])\n'
            'client.send_task("count_to", args=(4,)).get(timeout=10, on_message=keep)': "come from other states",
            "answer = []\n"
            'keep = lambda record: answer.append(record["result"]) if record["status"] == "PROGRESS" else None\n'
            'client.send_task("count_to", args=(2,)).get(timeout=10, on_message=keep)': "it counted to 2",
            'answer = []\nclient.send_task("count_to", args=(4,)).get(timeout=10)': "this list is empty",
        },
        right=(
            "records = []\n"
            'client.send_task("count_to", kwargs={"total": 4}).get(timeout=10, on_message=records.append)\n'
            'answer = tuple(record["result"] for record in records if record["status"] == "PROGRESS")',
            "import functools\n"
            "answer = []\n"
            "def keep(into, record):\n"
            "    if record['status'] not in celery.states.ALL_STATES:\n"
            "        into.append(record['result'])\n"
            "keep_here = functools.partial(keep, answer)\n"
            "client.send_task('count_to', (4,)).get(timeout=10, on_message=keep_here)",
        ),
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
    "02b-5": Question(
        right="d",
        wrong={
            "a": "a worker that is frozen or busy can be silent as well.",
            "b": "workers with nothing to do would answer. And their answer would not be `None`.",
            "c": "then `inspect` would raise an error, because it could not send its question.",
        },
    ),
}
