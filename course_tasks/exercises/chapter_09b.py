"""The exercises and the quiz of chapter 09b."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from celery import Celery
from celery.app.control import Control
from celery.result import AsyncResult, GroupResult

from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project

STATES = {"a": "SUCCESS", "b": "FAILURE", "c": "FAILURE", "d": "FAILURE"}
WHY = {
    "a": "it ended before `b` began",
    "b": "it has raised an exception",
    "c": "it was never sent, but the worker stores the error of `b` for it",
    "d": "it was never sent, but the worker stores the error of `b` for it",
}
BOOKS = (("one",), ("one", "two", "three"))  # two runs of the program, at the same time


def _states(answer: dict) -> str | None:
    if answer.keys() != STATES.keys():
        return f"its keys should be a, b, c and d, and they are {', '.join(map(str, answer)) or 'missing'}."
    for name, state in STATES.items():
        if str(answer[name]).upper() == state != answer[name]:
            return f"Celery writes states as texts in capitals, and you have {answer[name]!r} for {name}."
        if answer[name] != state:
            return f"the state of {name} is not {answer[name]!r}: {WHY[name]}."
    return None


def _cancel(answer: Callable) -> str | None:
    app = Celery(set_as_current=False)
    first = AsyncResult("first", app=app)
    members = GroupResult("group", [AsyncResult(f"member-{n}", app=app) for n in (1, 2)], parent=first, app=app)
    for what, last, ids in (
        ("a chain of one task", AsyncResult("alone", app=app), {"alone"}),
        (
            "a chain of three tasks",
            AsyncResult("last", parent=AsyncResult("second", parent=first, app=app), app=app),
            {"first", "second", "last"},
        ),
        (
            "a chain with a group in it",
            AsyncResult("last", parent=members, app=app),
            {"first", "member-1", "member-2", "last"},
        ),
    ):
        revoked: list[str] = []

        def revoke(_self, task_id, *_args, revoked=revoked, **_options) -> None:
            revoked.extend([task_id] if isinstance(task_id, str) else task_id)

        with mock.patch.object(Control, "revoke", revoke):
            called(answer, last)
        if missing := sorted(ids - set(revoked)):
            return f"in {what}, {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not revoked."
        if unknown := sorted(set(revoked) - ids):
            return f"in {what}, {unknown[0]} is revoked, which is no task of it."
    return None


def _books(folder: str) -> str | None:
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        project.worker("celery -A press worker --pool=threads --concurrency=2 --without-mingle --without-gossip")
        runs = [pool.submit(project.run, f"python order.py {' '.join(texts)}") for texts in BOOKS]
        books = ["+".join(texts).upper() for texts in BOOKS]
        for texts, book, run in zip(BOOKS, books, runs, strict=True):
            said = run.result().splitlines()
            printed = said[0].strip() if said else ""  # Celery may complain below it when the program ends
            if printed != book:
                return f"`python order.py {' '.join(texts)}` prints {printed!r}, and not {book!r}."
        log = project.settled_log()
    if log.count("Task page[") < 2 * sum(map(len, BOOKS)):  # received, and succeeded
        return "not every page was printed by the worker."
    if log.count("Task bind[") < 2 * len(BOOKS):
        return "the book was not bound by the worker."
    for book in books:
        if not re.search(rf"Task bind\[\S+ succeeded in \S+ {re.escape(repr(book))}", log):
            return f"the task bind did not return {book!r}. Look at what it gets from the pages."
    return None


ALL = '{"a": "SUCCESS", "b": "FAILURE", "c": "FAILURE", "d": "FAILURE"}'
CANCEL = "def cancel(result):\n    {}\n\n\nanswer = cancel"
ORDER = """%%writefile scratch/books/order.py
import sys

from celery import chain, chord, group
from press import bind, page

texts = sys.argv[1:]
pages = [page.s(text) for text in texts]
{}
"""

EXERCISES = {
    "09b-1": Exercise(
        kind=dict,
        judge=_states,
        wrong={
            "answer = {}": "they are missing",
            f"answer = {ALL.replace('SUCCESS', 'success')}": "texts in capitals",
            f"answer = {ALL.replace('SUCCESS', 'FAILURE')}": "the state of a is not",
            f"answer = {ALL.replace('FAILURE', 'REVOKED')}": "the state of b is not",
            'answer = {"a": "SUCCESS", "b": "FAILURE", "c": "PENDING", "d": "PENDING"}': "the state of c is not",
            'answer = {"a": "SUCCESS", "b": "FAILURE", "c": "FAILURE", "d": "PENDING"}': "the state of d is not",
        },
        right=(
            f"answer = dict({ALL})",
            "from celery import states\nanswer = {name: states.FAILURE for name in 'bcd'} | {'a': states.SUCCESS}",
        ),
    ),
    "09b-2": Exercise(
        kind=Callable,
        judge=_cancel,
        wrong={
            CANCEL.format("result.revoke()"): "first, second are not revoked",
            CANCEL.format("result.parent and result.parent.revoke()"): "alone is not revoked",
            CANCEL.format("while result.parent:\n        result = result.parent\n    result.revoke()"): (
                "last, second are not revoked"
            ),
            CANCEL.format(
                "while result:\n        if isinstance(result, AsyncResult):\n            result.revoke()\n"
                "        result = result.parent"
            ): "member-1, member-2 are not revoked",
            CANCEL.format(
                "while result:\n        result.app.control.revoke(result.id)\n        result = result.parent"
            ): "in a chain with a group in it, member-1, member-2 are",
        },
        right=(
            CANCEL.format("result.revoke()\n    if result.parent is not None:\n        cancel(result.parent)"),
            CANCEL.format(
                "ids = []\n    while result:\n        ids += [r.id for r in getattr(result, 'results', [result])]\n"
                "        last, result = result, result.parent\n    last.app.control.revoke(ids)"
            ),
        ),
    ),
    "09b-3": Exercise(
        kind=str,
        judge=_books,
        project="scratch/books",
        wrong={
            ORDER.format("print(chain(group(*pages), bind.s())().get(timeout=10))"): "prints 'O+N+E'",
            ORDER.format("print(chord([*pages, page.s('')], bind.s())().get(timeout=10).rstrip('+'))"): (
                "bind did not return 'ONE'"
            ),
            ORDER.format("print('+'.join(texts).upper())"): "not every page was printed",
            ORDER.format("print('+'.join(group(pages)().get(timeout=10)))"): "the book was not bound",
            ORDER.format("print(chord(group(group(pages), page.s('x')), bind.s())().get(timeout=10))"): "ONE+X",
            ORDER.format("print(chord(pages, bind())().get(timeout=10))"): "ended with an error",
        },
        right=(
            ORDER.format("print((group(pages) | bind.s())().get(timeout=10))"),
            ORDER.format("print(bind.delay(group(pages)().get(timeout=10)).get(timeout=10))"),
        ),
    ),
}

QUIZ = {
    "09b-1": Question(
        right="b",
        wrong={
            "a": "all header tasks are sent at the same time, and none of them knows of the others.",
            "c": "the body would get a list with a hole, so it doesn't run.",
            "d": "the third header task has its own message, and it runs.",
        },
    ),
    "09b-2": Question(
        right="c",
        wrong={
            "a": "somebody would have to store the failure, and the worker that could is dead.",
            "b": "nobody has revoked anything.",
            "d": "the body was never sent.",
        },
    ),
    "09b-3": Question(
        right="b",
        wrong={
            "a": "that is for the program that sent the chain, because its result object knows the first task.",
            "c": "a task without a result doesn't return None. `get` waits.",
            "d": "the first task never ran, so it has raised nothing.",
        },
    ),
    "09b-4": Question(
        right=("chord", "celery.chord"),
        wrong={
            "group": "a group has no body that gets the list.",
            "chunks": "that splits many calls of one task into fewer messages.",
        },
        otherwise="it takes a header and a body.",
    ),
}
