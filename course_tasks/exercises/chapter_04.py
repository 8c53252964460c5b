"""The exercises of chapter 04."""

import base64
import json
from collections.abc import Callable

from celery.signals import before_task_publish
from kombu.exceptions import EncodeError

from course_tasks.exercises import Exercise, Question, WrongAnswer, called


def _message(answer: dict) -> str | None:
    if not {"body", "headers", "properties"} <= answer.keys():
        return "this is not the whole message, which has a body, headers and properties."
    if (name := answer["headers"].get("task")) != "divide":
        return f"it calls {name!r}, and the worker knows the task as 'divide'."
    args, kwargs, _ = json.loads(base64.b64decode(answer["body"]))
    if args:
        return f"{args} went in order, as args. By name means kwargs={{...}}."
    if (x_and_y := {name: value for name, value in kwargs.items() if name in ("x", "y")}) != kwargs or len(kwargs) < 2:
        return f"its arguments by name are {sorted(kwargs)}; the task asks for x and y, no more and no less."
    return None if x_and_y == {"x": 1, "y": 4} else f"it was sent with {kwargs}. x is to be 1 and y is to be 4."


def _joins_sets(answer: Callable) -> str | None:
    sent = []

    def note(sender=None, **_):
        sent.append(sender)

    before_task_publish.connect(note)
    try:
        value = called(answer, {3, 1}, {2, 1}, case="for {3, 1} and {2, 1}, ")
    except WrongAnswer as error:
        if isinstance(error.__cause__, EncodeError):
            return "JSON knows no sets. Make lists of them before you send."
        raise
    finally:
        before_task_publish.disconnect(note)
    if not sent:
        return "no task was sent. The worker is to join them, with add."
    if isinstance(value, list):
        return f"it returned the list {value}. Make a set of what comes back."
    if not isinstance(value, set):
        return f"it returned {value!r}, which is no set. Wait for the result with get(timeout=10)."
    return None if value == {1, 2, 3} else f"answer({{3, 1}}, {{2, 1}}) is {value}, and it should be {{1, 2, 3}}."


EXERCISES = {
    "04-1": Exercise(
        kind=dict,
        judge=_message,
        wrong={
            'client.send_task("divide", args=(1, 4), queue="look"); answer = json.loads(broker.lpop("look"))': (
                "went in order, as args"
            ),
            'client.send_task("tasks.divide", kwargs={"x": 1, "y": 4}, queue="look")\n'
            'answer = json.loads(broker.lpop("look"))': "it calls 'tasks.divide'",
            'client.send_task("divide", kwargs={"x": 4, "y": 1}, queue="look")\n'
            'answer = json.loads(broker.lpop("look"))': "x is to be 1",
            'client.send_task("divide", kwargs={"a": 1, "b": 4}, queue="look")\n'
            'answer = json.loads(broker.lpop("look"))': "the task asks for x and y",
            'answer = {"x": 1, "y": 4}': "not the whole message",
            'client.send_task("divide", kwargs={"x": 1, "y": 4}, queue="look"); answer = broker.lpop("look")': (
                "should be a dictionary"
            ),
        },
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
            'answer = lambda one, other: client.send_task("add", args=(list(one), list(other)))': "which is no set",
            "answer = lambda one: one": "your function raised TypeError",
        },
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
