"""The exercises and the quiz of chapter 08c."""

import contextlib
import sqlite3
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from course_tasks.exercises import Exercise, Question, WrongAnswer, called
from course_tasks.exercises.project import Project, ended
from course_tasks.exercises.watched import Dead

REASONS = {
    "a": "the price is 5 euros after one run and after two",
    "b": "after two runs, the price is 10 euros higher",
    "c": "after two runs the file is gone, as after one",
    "d": "after two runs, the file has the line twice",
    "e": "the second run writes the same picture to the same file",
    "f": "after two runs, there are two e-mails",
}
IDEMPOTENT = {"a", "c", "e"}
MOST = 50  # statements; a function that runs more would go on without end


def _letters(answer: set | frozenset | list | tuple) -> str | None:
    given = {str(letter).strip().lower() for letter in answer}
    if unknown := sorted(given - REASONS.keys()):
        return f"{unknown[0]!r} is none of the letters from a to f."
    for letter in sorted(given ^ IDEMPOTENT):
        return f"{letter} is {'' if letter in IDEMPOTENT else 'not '}idempotent: {REASONS[letter]}."
    return None


class Dying(sqlite3.Connection):
    """A connection whose process dies before a statement or a commit: before the number `left`, counted down."""

    left = 0
    count = 0

    def _step(self) -> None:
        self.count += 1
        if self.count > MOST or (self.left and self.count >= self.left):
            raise Dead

    def execute(self, *args):
        """Run a statement, or die."""
        self._step()
        return super().execute(*args)

    def executemany(self, *args):
        """Run a statement, or die."""
        self._step()
        return super().executemany(*args)

    def executescript(self, *args):
        """Run a script, each statement by itself as SQLite does, or die before one of them."""
        if self.in_transaction:
            self.commit()
        level, self.isolation_level = self.isolation_level, None  # a script begins no transaction by itself
        try:
            statement = ""
            for piece in f"{args[0]};".split(";"):
                statement += piece
                if not statement.strip():
                    continue
                statement += ";"
                if sqlite3.complete_statement(statement):
                    self.execute(statement)
                    statement = ""
        finally:
            self.isolation_level = level
        return self.cursor()

    def commit(self):
        """Commit, or die."""
        self._step()
        super().commit()

    def cursor(self, factory=None):
        """Make a cursor that dies as well."""
        return super().cursor(factory or _DyingCursor)


class _DyingCursor(sqlite3.Cursor):
    connection: Dying

    def execute(self, *args):
        self.connection._step()
        return super().execute(*args)

    def executescript(self, *args):
        return self.connection.executescript(*args)


def _pay(answer: Callable) -> str | None:
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        path = Path(folder) / "bank.db"

        def fresh() -> None:
            path.unlink(missing_ok=True)
            with sqlite3.connect(path) as db:
                db.execute("CREATE TABLE accounts (euros INTEGER)")
                db.execute("CREATE TABLE paid (order_id TEXT PRIMARY KEY)")
                db.execute("INSERT INTO accounts VALUES (100)")
            db.close()

        def pay(order: str, left: int = 0) -> tuple[object, int, bool]:
            """Call the function with a connection of its own.

            Args:
                order: the order's number.
                left: the step before which the function dies; 0 for none.

            Returns:
                What it returned, how many steps it took, and whether it left something that is not committed.
            """
            db = sqlite3.connect(path, factory=Dying)
            db.left = left
            try:
                return called(answer, db, order, 7), db.count, db.in_transaction
            finally:
                db.left = 0
                db.close()  # what is not committed is gone, as with the process

        def euros() -> int:
            db = sqlite3.connect(path)
            try:
                return db.execute("SELECT euros FROM accounts").fetchone()[0]
            finally:
                db.close()

        fresh()
        first, steps, pending = pay("ada-1")
        if euros() != 107:
            why = " Something is not committed." if pending else ""
            return f"the account had 100 euros, and after an order of 7 euros it has {euros()}.{why}"
        if first is not True:
            return f"for a new order it returned {first!r}."
        second = pay("ada-1")[0]
        if euros() != 107:
            return f"after the same order came twice, the account has {euros()} euros, and not 107."
        if second is not False:
            return f"for an order that was paid before it returned {second!r}."
        if pay("ben-2")[0] is not True or euros() != 114:
            return "another order, which comes later, is not paid."
        for left in range(1, steps + 2):
            fresh()
            try:
                pay("eve-3", left)
            except WrongAnswer as error:
                if not isinstance(error.__cause__, Dead):
                    raise
            pay("eve-3")
            if euros() != 107:
                return (
                    f"its process died before step {left}, and the order came again. Then the account has {euros()} "
                    "euros, and not 107."
                )
    return None


def _loans(folder: str) -> str | None:
    file = Path(folder) / "loans.db"
    file.unlink(missing_ok=True)
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        ready = pool.submit(project.worker, "celery -A library worker --pool=solo --without-mingle --without-gossip")
        messages = project.loaded(MESSAGES, "library.py")
        reason = _unfit(file, messages)
        if reason:
            return reason
        ready.result()
        client = project.client()
        for _ in range(2):
            value = ended(client.send_task("lend", args=("form-4", "ada", "Emma")))
            if isinstance(value, Exception):
                return f"in a worker, the task ended with {value!r}."
        if (found := _loans_of(file).get("form-4", 0)) != 1:
            return f"in a worker, a form that was sent twice has {found} loans, and not one."
    return None


def _unfit(file: Path, messages: dict[str, Any]) -> str | None:
    for message in messages["run"]:
        if "error" in message:
            return f"the task ended with {message['error']}."
    if not file.exists():
        return "there is no file loans.db. Where are the loans?"
    found = _loans_of(file)
    for request, what in (
        ("form-1", "which was sent twice, each time to another process"),
        ("form-3", "in which the same reader wants the same book again"),
        ("form-2", "whose message came back"),
    ):
        if found.get(request, 0) != 1:
            return f"{request}, {what}, has {found.get(request, 0)} loans, and not one."
    if not messages["late"]:
        return "the task is acknowledged before it runs, so the loan is lost if its worker dies."
    for request in messages["died"]:
        if found.get(request, 0) != 1:
            return (
                f"its process died in the middle, and the message came back. Then the form has {found.get(request, 0)} "
                "loans, and not one."
            )
    return None


def _loans_of(file: Path) -> dict[str, int]:
    """How many loans each request has."""
    with contextlib.closing(sqlite3.connect(file)) as db:
        return dict(db.execute("SELECT request, count(*) FROM loans GROUP BY request").fetchall())


# Runs the task as often as it is sent, each time in a new process. Some of these die before a statement or a request.
# What a process would import at its first task is imported once, before them all.
MESSAGES = """
import json, os, signal, sqlite3, tempfile
import celery.app.amqp, celery.app.trace, celery.backends.redis, kombu.transport.redis
from celery.app.utils import find_app
from redis.connection import AbstractConnection

count = death = 0

def step(*_):
    global count
    count += 1
    if count == death:
        os._exit(9)

def connect(*args, connect=sqlite3.connect, **options):
    db = connect(*args, **options)
    db.execute("PRAGMA synchronous = OFF")  # a process dies here, and not the machine
    db.set_trace_callback(step)
    return db

def send(*args, send=AbstractConnection.send_packed_command, **options):
    step()
    return send(*args, **options)

sqlite3.connect, AbstractConnection.send_packed_command = connect, send
app = find_app("library")
if "lend" not in app.tasks:
    raise SystemExit("there is no task named lend")

def run(request, id, dies=0):
    global count, death
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if not pid:
            signal.alarm(10)
            count, death = 0, dies
            result = app.tasks["lend"].apply(args=(request, "ada", "Emma"), task_id=id)
            error = {} if result.successful() else {"error": repr(result.result)}
            said.write(json.dumps({"steps": count} | error))
            said.flush()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            return {"error": "no result after 10 seconds"}
        said.seek(0)
        return json.loads(said.read() or "{}")

forms = (("form-1", "a"), ("form-1", "b"), ("form-2", "c"), ("form-2", "c"), ("form-3", "d"))
runs, died = [], []
for form in forms:
    if not runs or "error" not in runs[-1]:
        runs.append(run(*form))
if "error" not in runs[-1]:
    for place in range(1, min(runs[0]["steps"], 50) + 1):
        died.append(f"died-{place}")
        run(died[-1], died[-1], place)
        runs.append(run(died[-1], died[-1]))
        if "error" in runs[-1]:
            break
print(json.dumps({"run": runs, "died": died, "late": app.tasks["lend"].acks_late}))
"""
PAY = """import sqlite3


def pay(db, order, euros):
    {}


answer = pay"""
INSERT = 'db.execute("INSERT INTO paid VALUES (?)", (order,))'
UPDATE = 'db.execute("UPDATE accounts SET euros = euros + ?", (euros,))'
SET = 'db.execute("UPDATE accounts SET euros = ?", (euros,))'
EXCEPT = "\n    except sqlite3.IntegrityError:\n        return False\n    return True"
LIBRARY = """%%writefile scratch/loans/library.py
from sqlite3 import IntegrityError

from celery import Celery
from loans import database

app = Celery("library")


@app.task(name="lend", bind=True, acks_late=True)
def lend(self, request, reader, book):
    with database() as db:
        {before}
        try:
            {first}
            {second}
        except IntegrityError:
            return "was done before"
    return "done"
"""
REDIS = """%%writefile scratch/loans/library.py
import os

from celery import Celery
from loans import database
from redis import Redis

app = Celery("library")
store = Redis.from_url(os.environ["CELERY_RESULT_BACKEND"])


@app.task(name="lend", acks_late=True)
def lend(request, reader, book):
    with database() as db:
        {}
    return "done"
"""
KEY = 'db.execute("INSERT INTO done VALUES (?)", ({},))'
LOAN = 'db.execute("INSERT INTO loans VALUES (?, ?, ?)", (request, reader, book))'


def _library(first: str, second: str = LOAN, before: str = "pass") -> str:
    return LIBRARY.format(first=first, second=second, before=before)


EXERCISES = {
    "08c-1": Exercise(
        kind=(set, frozenset, list, tuple),
        judge=_letters,
        wrong={
            'answer = {"a", "c"}': "e is idempotent",
            'answer = {"a", "b", "c", "e"}': "b is not idempotent",
            'answer = {"c", "e"}': "a is idempotent",
            'answer = {"a", "c", "d", "e"}': "d is not idempotent",
            'answer = {"a", "c", "e", "g"}': "'g' is none of the letters",
        },
        right=('answer = ["e", "a", "c"]', 'answer = frozenset("ACE")'),
    ),
    "08c-2": Exercise(
        kind=Callable,
        judge=_pay,
        wrong={
            PAY.format("with db:\n        " + UPDATE + "\n    return True"): "the same order came twice",
            PAY.format(
                "try:\n        " + INSERT + "\n        " + UPDATE + EXCEPT
            ): "it has 100. Something is not committed.",
            PAY.format("try:\n        with db:\n            " + INSERT + "\n            " + SET + EXCEPT): (
                "after an order of 7 euros it has 7."
            ),
            PAY.format(
                "if db.execute('SELECT * FROM paid WHERE order_id = ?', (order,)).fetchone():\n        return False\n"
                '    db.executescript(f"UPDATE accounts SET euros = euros + {euros};"\n'
                "                     f\"INSERT INTO paid VALUES ('{order}')\")\n    return True"
            ): "Then the account has 114 euros, and not 107",
            PAY.format(
                "try:\n        with db:\n            "
                + INSERT
                + "\n    except sqlite3.IntegrityError:\n        return False\n    with db:\n        "
                + UPDATE
                + "\n    return True"
            ): "died before step 2",
            PAY.format(
                "try:\n        with db:\n            " + UPDATE + "\n        with db:\n            " + INSERT + EXCEPT
            ): "the same order came twice, the account has 114 euros, and",
            PAY.format(
                "try:\n        with db:\n            "
                + INSERT
                + "\n            "
                + UPDATE
                + "\n    except sqlite3.IntegrityError:\n        return True\n    return True"
            ): "for an order that was paid before it returned True",
            PAY.format(
                "if db.execute('SELECT * FROM paid').fetchone():\n        return False\n    with db:\n        "
                + INSERT
                + "\n        "
                + UPDATE
                + "\n    return True"
            ): "another order, which comes later",
            PAY.format("try:\n        with db:\n            " + INSERT + "\n            " + UPDATE + EXCEPT[:-16]): (
                "for a new order it returned None"
            ),
        },
        right=(
            PAY.format(
                "cursor = db.cursor()\n    try:\n        cursor.execute('INSERT INTO paid VALUES (?)', [order])\n"
                "    except sqlite3.IntegrityError:\n        db.rollback()\n        return False\n"
                "    cursor.execute('UPDATE accounts SET euros = euros + ?', [euros])\n    db.commit()\n    return True"
            ),
            PAY.format(
                "with db:\n        new = db.execute('INSERT OR IGNORE INTO paid VALUES (?)', (order,)).rowcount\n"
                "        db.execute('UPDATE accounts SET euros = euros + ?', (euros * new,))\n    return new == 1"
            ),
            PAY.format(
                "if db.execute('SELECT * FROM paid WHERE order_id = ?', (order,)).fetchone():\n        return False\n"
                '    db.executescript(f"BEGIN; UPDATE accounts SET euros = euros + {euros};"\n'
                "                     f\"INSERT INTO paid VALUES ('{order}'); COMMIT;\")\n    return True"
            ),
        ),
    ),
    "08c-3": Exercise(
        kind=str,
        judge=_loans,
        project="scratch/loans",
        wrong={
            _library(
                KEY.format("self.request.root_id")
            ): "form-1, which was sent twice, each time to another process, has 2 loans",
            _library("pass", LOAN + "\n            " + LOAN): "another process, has 4 loans",
            _library(KEY.format("f'{reader} {self.request.id}'"), "pass"): "another process, has 0 loans",
            _library(KEY.format("requests")): "the task ended with NameError",
            _library(
                KEY.format("reader + book")
            ): "form-3, in which the same reader wants the same book again, has 0 loans",
            _library(KEY.format("request")).replace("acks_late=True", "acks_late=False"): (
                "the task is acknowledged before it runs"
            ),
            _library(KEY.format("request"), "db.commit()\n            " + LOAN): "Then the form has 0 loans",
            _library(
                "if request in SEEN:\n                return 'done before'", "SEEN.add(request)\n            " + LOAN
            )
            + "\n\nSEEN = set()\n": "each time to another process, has 2 loans",
            REDIS.format(
                "if not store.set(request, 1, nx=True, ex=86400):\n            return 'done before'\n        " + LOAN
            ): "came back. Then the form has 0 loans",
            REDIS.format(
                "if store.exists(request):\n            return 'done before'\n        "
                + LOAN
                + "\n    store.set(request, 1, ex=86400)"
            ): "Then the form has 2 loans",
            _library(KEY.format("request")).replace('name="lend"', 'name="lent"'): "there is no task named lend",
        },
        right=(
            _library("pass", LOAN, "db.execute('CREATE UNIQUE INDEX IF NOT EXISTS once ON loans (request)')"),
            _library(KEY.format("'form ' + request")),
            _library(
                "db.execute('BEGIN IMMEDIATE')",
                "if not db.execute('SELECT * FROM loans WHERE request = ?', (request,)).fetchall():\n                "
                + LOAN,
            ),
        ),
    ),
}

QUIZ = {
    "08c-1": Question(
        right="b",
        wrong={
            "a": "the lock was released after the first charge, and remembers nothing.",
            "c": "a lock is stale only if its owner died without releasing it.",
            "d": "a minute later, there is no lock to wait for.",
        },
    ),
    "08c-2": Question(
        right="c",
        wrong={
            "a": "in the second run the key is there, so the task thinks that it is done.",
            "b": "that would happen if the key were set after the e-mail.",
            "d": "it doesn't wait. It finds the key and ends.",
        },
    ),
    "08c-3": Question(
        right=("idempotent",),
        wrong={"atomic": "that means that something happens as a whole or not at all.", "unique": "that is a column."},
        otherwise="look at the first section of the chapter.",
    ),
    "08c-4": Question(
        right="b",
        wrong={
            "a": "the row stays until the message is sent, so it is sent at some time.",
            "c": "the order and the row are written in one transaction.",
            "d": "between the send and the deletion there is a moment in which the relay may die.",
        },
    ),
}
