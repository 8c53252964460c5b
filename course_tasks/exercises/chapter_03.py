"""The exercises of chapter 03."""

import shlex
import socket

import click
from celery import Celery
from celery.bin.celery import celery as program
from celery.bin.worker import worker

from course_tasks.exercises import Exercise, Question


def _registered(answer: list | tuple | set | dict) -> str | None:
    if isinstance(answer, dict):
        return "this is a dictionary with the answers of nodes, by their names. Take the list of one node out of it."
    names = {str(name) for name in answer}
    if "celery.chain" in names:
        return "these are the tasks that an app in this notebook has, Celery's own among them. Ask the worker."
    if any(name.startswith(("course_tasks.", "__main__.")) for name in names):
        return "these are the functions' places in the code. The worker goes by the names that name= has given."
    node = f"first@{socket.gethostname()}"
    asked = Celery().control.inspect([node], timeout=1, limit=1).registered() or {}
    if node not in asked:
        return f"the worker {node} doesn't answer. Is it running? Run its cell again."
    return None if names == set(asked[node]) else f"the worker {node} has {len(asked[node])} tasks, and other ones."


def _command(answer: str) -> str | None:
    try:
        words = shlex.split(answer)
        if words[:2] in (["python", "-m"], ["python3", "-m"]):
            del words[:2]
        if words[:1] != ["celery"]:
            return "it should begin with celery, or with python -m celery."
        before, after, _ = program.make_parser(click.Context(program)).parse_args(words[1:])
        if after[:1] != ["worker"]:
            return "it does not say what to start: the word worker is missing."
        options, rest, _ = worker.make_parser(click.Context(worker)).parse_args(after[1:])
    except click.UsageError as error:
        said = error.format_message()
        if "-A" in said or "--app" in said:
            return f"Celery says: {said} It belongs before the word worker."
        if "--name" in said:
            return f"Celery says: {said} The node name is given with -n."
        return f"Celery says: {said}"
    except ValueError as error:
        return f"a shell could not read it: {error}."
    if before.get("app") not in ("shop", "shop:app", "shop.app"):
        return "it does not say which app: give -A with the name of the module, without .py."
    if rest:
        return f"Celery would stop at {rest[0]!r}, which is neither an option nor the value of one."
    if options.get("pool", options.get("pool_cls")) != "solo":
        return "the pool is not solo."
    if str(options.get("hostname")).partition("@")[0] != "night":
        return "the node name is not night: give it with -n."
    if options["hostname"] not in ("night@%h", f"night@{socket.gethostname()}"):
        return "the node name lacks the machine: it should end in @%h."
    return None if str(options.get("queues")) == "orders" else "the queue is not orders: give it with -Q."


EXERCISES = {
    "03-1": Exercise(
        kind=(list, tuple, set, dict),
        judge=_registered,
        wrong={
            f'answer = client.control.inspect(["first@{socket.gethostname()}"], limit=1).registered()': (
                "Take the list of one node"
            ),
            "answer = sorted(client.tasks)": "Ask the worker",
            'answer = ["course_tasks.tasks.add", "course_tasks.tasks.divide"]': "the functions' places",
            'answer = ["add"]': "and other ones",
        },
    ),
    "03-2": Exercise(
        kind=str,
        judge=_command,
        wrong={
            'answer = "celery worker --app=shop --pool=solo -n night@%h -Q orders"': "belongs before the word worker",
            'answer = "celery --app=shop worker --pool=solo --name=night -Q orders"': "The node name is given with -n",
            'answer = "celery --app=shop worker --pool=solo -n night -Q orders"': "lacks the machine",
            'answer = "celery --app=shop worker --pool=solo -n night@%h"': "the queue is not orders",
            'answer = "celery -A shop --pool=solo worker"': "Celery says: No such option",
            'answer = "celery -A shop.py worker --pool=solo -n night@%h -Q orders"': "without .py",
        },
    ),
}

QUIZ = {
    "03-1": Question(
        right="a",
        wrong={
            "b": "a message contains the name and the arguments of the task, but no code.",
            "c": "Python reads a module's file once per process, when the module is imported.",
            "d": "that was `--autoreload`, and Celery no longer has this option.",
        },
    ),
    "03-2": Question(
        right="c",
        wrong={
            "a": "the worker has thrown the message away, so no other worker will get it.",
            "b": "after a restart, the worker imports the same modules as before. The notebook isn't one of them.",
            "d": "`delay` sends the same name, and the worker doesn't know a task of that name.",
        },
    ),
    "03-3": Question(
        right=("office.mail.send",),
        wrong={
            "send": 'that would be the name with `@app.task(name="send")`.',
            "mail.send": "the first part of the name is the whole name of the module, as the worker imports it.",
            "office.mail": "that is the module. It may contain several tasks, so the name needs one more part.",
            "__main__.send": (
                "`__main__` is the name of a notebook, or of a file that is run as a script. This file is imported."
            ),
        },
        otherwise="without `name=`, Celery makes the name out of the module and the function, as in `shop.price`.",
    ),
    "03-4": Question(
        right="b",
        wrong={
            "a": (
                "Celery doesn't switch to another kind of broker by itself. If Redis is down, a worker keeps trying "
                "its address."
            ),
            "c": "then the worker doesn't start at all, and Celery says `Unable to load celery application`.",
            "d": "`-Q` chooses queues. It doesn't change the address of the broker.",
        },
    ),
}
