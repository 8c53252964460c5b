"""The exercises and the quiz of chapter 00."""

from celery.exceptions import NotRegistered, TimeoutError
from celery.result import AsyncResult

from course_tasks.exercises import Exercise, Question


def _sends_add(answer: AsyncResult) -> str | None:
    try:
        value = answer.get(timeout=10)
    except NotRegistered as error:
        return f"no worker knows a task called {error}. It was given the name 'add'."
    except TimeoutError:
        return "nothing came back within 10 s. Is the worker running? Run its cell again."
    if value == "2022":
        return "its result is the text '2022': you sent texts, and + joins texts. Send numbers."
    return None if value == 42 else f"its result is {value!r}, and it should be 42."


def _stored_record(answer: object) -> str | None:
    if answer is None:
        return "the backend has nothing under that key. It is made of celery-task-meta- and the task's id."
    if isinstance(answer, bytes | str):
        return "this is the record as text. json.loads makes a dictionary of it."
    if not isinstance(answer, dict):
        return "this is only a part of the record. Put all of it into answer."
    if answer.get("result") != 4:
        return "this is the record of another task: late computed 2 + 2, and its result is 4."
    return None if answer.get("status") == "SUCCESS" else "the record has no status SUCCESS: read it from the backend."


def _unknown_state(answer: str) -> str | None:
    if answer in ("SUCCESS", "STARTED", "FAILURE"):
        return f"{answer} is the state of a task that a worker has had. Make up an id that nobody ever sent."
    if answer != "PENDING":
        return "Celery has no such state. Let it tell you, with client.AsyncResult(...).state."
    return None


EXERCISES = {
    "00-1": Exercise(
        kind=AsyncResult,
        judge=_sends_add,
        wrong={
            'answer = client.send_task("add", args=(4, 5))': "its result is 9",
            'answer = client.send_task("add", args=("20", "22"))': "you sent texts",
            'answer = client.send_task("main.add", args=(20, 22))': "no worker knows a task called",
            'answer = client.send_task("add", args=(20, 22)).get(timeout=10)': "should be a receipt",
        },
    ),
    "00-2": Exercise(
        kind=object,
        judge=_stored_record,
        wrong={
            'answer = backend.get(f"celery-task-meta-{late.id}")': "json.loads makes a dictionary",
            'answer = json.loads(backend.get(f"celery-task-meta-{result.id}"))': "the record of another task",
            "answer = late.get(timeout=10)": "only a part of the record",
            "answer = broker.get(late.id)": "nothing under that key",
        },
    ),
    "00-3": Exercise(
        kind=str,
        judge=_unknown_state,
        wrong={
            "answer = client.AsyncResult(result.id).state": "a task that a worker has had",
            'answer = "UNKNOWN"': "no such state",
        },
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
