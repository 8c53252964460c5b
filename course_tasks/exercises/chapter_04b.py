"""The exercises of chapter 04b."""

from celery.exceptions import NotRegistered, TimeoutError
from celery.result import AsyncResult

from course_tasks.exercises import Exercise, Question


def _gathered(answer: object) -> str | None:
    if isinstance(answer, AsyncResult) or hasattr(answer, "results"):
        return "this is a receipt. Ask it for the results, with get(timeout=10, propagate=False)."
    if not isinstance(answer, list | tuple):
        return f"this is of type {type(answer).__name__}. Put the list of all four into answer."
    if any(isinstance(value, AsyncResult) for value in answer):
        return "these are receipts. Ask each for what came of it."
    if any(isinstance(value, str) for value in answer):
        return "there are texts in your list. Put the results themselves there, and the error itself."
    if len(answer) != 4:
        return f"your list has {len(answer)} values. There are four calls, and the one that failed has its place too."
    if not any(isinstance(value, ZeroDivisionError) for value in answer):
        return "no ZeroDivisionError is among them. 12 / 0 has to be in your list, as the error that it raises."
    expected = [12, 6, ZeroDivisionError, 3]
    if [ZeroDivisionError if isinstance(value, ZeroDivisionError) else value for value in answer] != expected:
        return f"it is {answer!r}. In the order of the calls: 12 / 1, 12 / 2, 12 / 0, 12 / 4."
    return None


def _chained(answer: AsyncResult) -> str | None:
    try:
        value = answer.get(timeout=2)
    except NotRegistered as error:
        return f"no worker knows a task called {error}. It is called 'add'."
    except TimeoutError:
        return "nothing came back within 2 s. Is the worker running? Run its cell again."
    except Exception as error:
        return f"it ended with {type(error).__name__}: {error}"
    if value != 10:
        return f"its result is {value!r}, and it should be 10."
    links = 1
    while answer.parent is not None:
        answer, links = answer.parent, links + 1
    if links == 1:
        return "its result is 10, but it has no parent: it is one call. Join three with |, and send the chain."
    return None if links == 3 else f"its result is 10, by a chain of {links}. It is to have three links."


EXERCISES = {
    "04b-1": Exercise(
        kind=object,
        judge=_gathered,
        wrong={
            'answer = group(client.signature("divide", args=(12, n)) for n in (1, 2, 0, 4)).delay()': (
                "this is a receipt."
            ),
            'answer = [client.send_task("divide", args=(12, n)) for n in (1, 2, 0, 4)]': "these are receipts",
            'answer = [client.send_task("divide", args=(12, n)).get(timeout=10) for n in (1, 2, 4)]': "has 3 values",
            'answer = [client.send_task("divide", args=(n, 12)).get(timeout=10) for n in (1, 2, 0, 4)]': (
                "no ZeroDivisionError"
            ),
            'calls = [client.send_task("divide", args=(12, n)) for n in (0, 1, 2, 4)]\n'
            "answer = [call.get(timeout=10, propagate=False) for call in calls]": "In the order of the calls",
            'answer = [12.0, 6.0, "ZeroDivisionError", 3.0]': "there are texts",
        },
    ),
    "04b-2": Exercise(
        kind=AsyncResult,
        judge=_chained,
        wrong={
            'answer = client.send_task("add", args=(3 + 3, 4))': "it has no parent",
            'answer = (client.signature("add", args=(3, 3)) | client.signature("add", args=(4,))).delay()': (
                "by a chain of 2"
            ),
            'answer = (client.signature("add", args=(1, 2)) | client.signature("add", args=(3,))).delay()': (
                "its result is 6"
            ),
            'answer = (client.signature("add", args=(1, 2)) | client.signature("add", args=(3, 4))).delay()': (
                "it ended with TypeError"
            ),
            'answer = group(client.signature("add", args=(1, n)) for n in (2, 3, 4)).delay()': ("should be a receipt"),
        },
    ),
}

QUIZ = {
    "04b-1": Question(
        right="c",
        wrong={
            "a": (
                "a message leaves the queue before its task runs, so an empty queue doesn't tell you that anything "
                "is done."
            ),
            "b": "`send_task` has sent all of the messages already. The client could even stop now.",
            "d": "Redis doesn't look at the time in a message. It hands these messages out like any others.",
        },
    ),
    "04b-2": Question(
        right=("1", "one", "1 message", "one message"),
        wrong={
            "0": "something would have to look at `expires` first, and Redis doesn't do that.",
            "zero": "something would have to look at `expires` first, and Redis doesn't do that.",
            "none": "something would have to look at `expires` first, and Redis doesn't do that.",
            "60": "60 is the number of seconds. `llen` counts the messages in a queue.",
            "2": "`expires` adds no second message. One call of `send_task` sends one message.",
        },
        otherwise="answer with one number. `llen` counts the messages in a queue.",
    ),
    "04b-3": Question(
        right="b",
        wrong={
            "a": "`iter_native` works like that. This loop asks for one result after the other.",
            "c": "each `get` waits for its own task. It doesn't take the result of another one.",
            "d": "`get` gives up after 90 seconds, and the first task takes only 60.",
        },
    ),
    "04b-4": Question(
        right="a",
        wrong={
            "b": "a task keeps its slot until it ends, even if it only waits.",
            "c": "that error comes from a check, and `disable_sync_subtasks=False` switches the check off.",
            "d": "a worker doesn't know what its tasks are waiting for. This one keeps its ten slots.",
        },
    ),
}
