"""The exercises and the quiz of chapter 08."""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from course_tasks.exercises import Exercise, Question, WrongAnswer
from course_tasks.exercises.project import Project, ended
from course_tasks.exercises.watched import Dead, Watched

DEATHS = {"child", "connection", "worker"}
SURVIVES = {
    "early": {"connection"},
    "late": {"connection", "worker"},
    "reject": DEATHS,
    "retry": DEATHS,
}
WHY = {
    ("early", "child"): "its message was acknowledged before it started, so nothing is left to run again",
    ("early", "worker"): "its message was acknowledged before it started, so nothing is left to run again",
    ("early", "connection"): "its process lives on, and its message was already acknowledged",
    ("late", "child"): "the main process lives on, and acknowledges the message of the dead child",
    ("late", "worker"): "its message is still in unacked, and another worker puts it back",
    ("late", "connection"): "its process lives on, and it even runs twice",
    ("reject", "child"): "the main process puts its message back into the queue",
    ("retry", "child"): "the main process sends a new message for it",
}
MOST, DAY, REPORT = 3, 24 * 60 * 60, 30 * 60  # starts, seconds, seconds
SHORTEST = 59 * 60  # seconds: an hour, as some of it may be over
PATIENCE = 0.1  # seconds
INDEX = "unacked_index_key"  # of the messages that a worker looks through
MODULES, QUIET = ("mails", "reports"), "--pool=solo --without-mingle --without-gossip"
SETTINGS = """
import json, mails, reports
print(json.dumps({m.__name__: [m.app.conf.broker_transport_options, m.app.tasks[t].acks_late]
                  for m, t in ((mails, "mail"), (reports, "report"))}))
"""


def _survivors(answer: dict) -> str | None:
    if answer.keys() != SURVIVES.keys():
        wanted = ", ".join(map(repr, SURVIVES))
        return f"its keys should be {wanted}, and they are {', '.join(map(repr, answer)) or 'missing'}."
    for kind, right in SURVIVES.items():
        value = answer[kind]
        if isinstance(value, str) or not isinstance(value, set | frozenset | list | tuple):
            return f'the value of "{kind}" should be a set of names, not {value!r}.'
        if unknown := [name for name in value if name not in DEATHS]:
            return f'in "{kind}", {unknown[0]!r} is none of the three deaths: child, connection, worker.'
        for death in sorted(set(value) ^ right):
            how = "survives" if death in right else "doesn't survive"
            why = WHY.get((kind, death)) or WHY["late", death]
            return f'a task of the kind "{kind}" {how} the death of the {death}: {why}.'
    return None


def _guard(answer: Callable) -> str | None:
    with Watched("photo-7", "photo-8") as watched:

        def clean() -> None:
            for key in [key for id in ("photo-7", "photo-8") for key in watched.server.scan_iter(f"*{id}*")]:
                watched.server.delete(key)

        def starts(times: int, id: str = "photo-7", **options: int) -> list[Any]:
            return [watched.call(answer, id, **options) for _ in range(times)]

        try:
            clean()
            said = starts(MOST + 2)
            if said != [True] * MOST + [False] * 2:
                return f"for five starts of one task it returned {', '.join(map(repr, said))}."
            if starts(1, "photo-8") != [True]:
                return "another task, which starts for the first time, is refused as well."
            clean()
            requests = 0
            for _ in range(MOST + 1):  # a later call may take another way
                starts(1)
                requests = max(requests, watched.requests)
                if trouble := _lifetime(watched):
                    return trouble
            if not requests:
                return "it counts in Redis, but not with the client that it is given."
            for place, earlier in itertools.product(range(1, requests + 1), (0, MOST - 1)):
                clean()
                before = starts(earlier)
                inner: list[Any] = []

                def second(inner=inner) -> None:
                    try:
                        inner.append(answer(watched.server, "photo-7"))
                    except Exception as error:
                        inner.append(error)

                other = threading.Thread(target=second, daemon=True)

                def meanwhile(other=other) -> None:
                    other.start()
                    other.join(PATIENCE)  # with a lock, it waits until this call goes on

                outer = [watched.call(answer, "photo-7", before=place, do=meanwhile)]
                if other.ident:
                    other.join(15)
                    if not inner:
                        return "if two workers call it at the same moment, one of them waits without an end."
                    if isinstance(inner[0], Exception):
                        return f"if two workers call it at the same moment, one of them gets {inner[0]!r}."
                allowed = sum(before + outer + inner + starts(MOST))
                if allowed != MOST:
                    return f"if two workers call it at the same moment, {allowed} starts are allowed."
            for place in range(2, requests + 1):
                clean()
                try:
                    watched.call(answer, "photo-7", before=place)
                except WrongAnswer:
                    for key in watched.server.scan_iter("*photo-7*"):
                        if -1 < watched.server.ttl(key) < SHORTEST:  # a message may come back as late as that
                            watched.server.delete(key)
                    try:
                        starts(1, before=requests + 4)  # who waits for a lock asks again and again
                    except WrongAnswer as error:
                        if isinstance(error.__cause__, Dead):
                            return "a worker died inside guard, and then another one waits there without an end."
                        raise
                if trouble := _lifetime(watched):
                    return f"a worker died inside guard, and another one called it later: {trouble}"
        finally:
            clean()
    return None


def _lifetime(watched: Watched) -> str | None:
    keys = list(watched.server.scan_iter("*photo-7*"))
    if not keys:
        return "its counter doesn't have the task's id in its name, or nothing is counted in Redis."
    longest = [watched.server.ttl(key) for key in keys]
    if -1 in longest:
        return "a counter stays in Redis for ever: it has no time to live."
    if max(longest) > DAY:
        return f"a counter stays in Redis for {max(longest)} seconds, which is more than a day."
    if max(longest) < SHORTEST:
        return f"a counter lives for {max(longest)} s only, and a message may come back after an hour."
    return None


def _nightly(folder: str) -> str | None:
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        commands = [f"celery -A {name} worker -Q {name} -n {name}@%h {QUIET}" for name in MODULES]
        ready = pool.submit(project.worker, *commands)
        settings = project.loaded(SETTINGS, "mails.py")
        apart = len({(options or {}).get(INDEX, "unacked_index") for options, _ in settings.values()}) > 1
        for module, (options, late) in settings.items():
            timeout = (options or {}).get("visibility_timeout", 60 * 60)
            if isinstance(timeout, bool) or not isinstance(timeout, int | float):
                return f"the visibility timeout in {module}.py is {timeout!r}. It should be a number of seconds."
            if timeout <= REPORT and not (apart and module == "mails"):
                return (
                    f"the worker of {module}.py puts back every message that is in unacked for longer than "
                    f"{timeout:g} second{'s' * (timeout != 1)}, and a report takes half an hour."
                )
            if timeout > DAY:
                return f"if a worker dies, {module}.py brings its messages back after {timeout / DAY:g} days only."
            if not late:
                return f"the task in {module}.py is acknowledged before it runs, so it is lost if its worker dies."
        ready.result()
        client = project.client()
        client.send_task("report", args=(2026,), queue="reports")
        value = ended(client.send_task("mail", args=("Ada",), queue="mails"))
        if isinstance(value, Exception):
            return f"the task mail ended with {value!r}."
        if "mail to Ada" not in project.settled_log():
            return "the task mail ended, but its worker's log doesn't have the line `mail to Ada`."
        deadline = time.monotonic() + 10
        while "writing the report of 2026" not in project.log():
            if time.monotonic() > deadline:
                return "the worker of reports.py has not begun to write a report within 10 s."
            time.sleep(0.02)
    return None


RIGHT_SETS = '"early": {"connection"}, "late": ["worker", "connection"]'
ALL = '{"child", "connection", "worker"}'
GUARD = """def guard(redis, task_id):
    {}


answer = guard"""
MAILS = """%%writefile scratch/nightly/mails.py
from celery import Celery

app = Celery("mails")
{}


@app.task(name="mail"{})
def mail(customer):
    print(f"mail to {{customer}}", flush=True)
"""
OPTIONS = "app.conf.broker_transport_options = "

EXERCISES = {
    "08-1": Exercise(
        kind=dict,
        judge=_survivors,
        wrong={
            "answer = {}": "they are missing",
            f'answer = {{"early": set(), "late": {ALL}, "reject": {ALL}, "retry": {ALL}}}': (
                '"early" survives the death of the connection'
            ),
            f'answer = {{"early": {{"worker", "connection"}}, "late": set(), "reject": {ALL}, "retry": {ALL}}}': (
                '"early" doesn\'t survive the death of the worker'
            ),
            f'answer = {{"early": {{"connection"}}, "late": {ALL}, "reject": {ALL}, "retry": {ALL}}}': (
                '"late" doesn\'t survive the death of the child'
            ),
            f'answer = {{{RIGHT_SETS}, "reject": {ALL}, "retry": {{"child"}}}}': (
                '"retry" survives the death of the connection'
            ),
            f'answer = {{{RIGHT_SETS}, "reject": "child", "retry": {ALL}}}': "should be a set of names, not 'child'",
            f'answer = {{{RIGHT_SETS}, "reject": {{"parent"}}, "retry": {ALL}}}': "'parent' is none of the three",
        },
        right=(
            f'answer = {{{RIGHT_SETS}, "reject": {ALL}, "retry": ("child", "worker", "connection")}}',
            "every = frozenset(['child', 'connection', 'worker'])\n"
            "answer = dict(retry=every, reject=every, late=every - {'child'}, early=['connection'])",
        ),
    ),
    "08-2": Exercise(
        kind=Callable,
        judge=_guard,
        wrong={
            GUARD.format('return redis.incr(f"starts:{task_id}") <= 3'): "a counter stays in Redis for ever",
            GUARD.format(
                'key = f"starts:{task_id}"\n    n = int(redis.get(key) or 0) + 1\n'
                "    redis.set(key, n, ex=86400)\n    return n <= 3"
            ): "at the same moment, 4 starts are allowed",
            GUARD.format(
                'key = f"starts:{task_id}"\n    redis.incr(key)\n    redis.expire(key, 3600)\n'
                "    return int(redis.get(key)) <= 3"
            ): "at the same moment, 2 starts are allowed",
            GUARD.format(
                'key = f"starts:{task_id}"\n    n = redis.incr(key)\n    redis.expire(key, 3600)\n    return n < 3'
            ): "it returned True, True, False, False, False",
            GUARD.format(
                'n = redis.incr("starts")\n    redis.expire("starts", 3600)\n    return n <= 3'
            ): "another task, which starts for the first time, is refused",
            GUARD.format(
                'key = f"starts:{task_id}"\n    n = redis.incr(key)\n    redis.expire(key, 604800)\n    return n <= 3'
            ): "for 604800 seconds",
            GUARD.format(
                'key = f"starts:{task_id}"\n    n = redis.incr(key)\n    if n == 1:\n'
                "        redis.expire(key, 3600)\n    return n <= 3"
            ): "a worker died inside guard",
            GUARD.format(
                'key = f"starts:{task_id}"\n    n = redis.incr(key)\n    redis.expire(key, 1)\n    return n <= 3'
            ): "a counter lives for 1 s only, and",
            **{
                GUARD.format(
                    f'key = f"starts:{{task_id}}"\n    n = redis.incr(key)\n    redis.expire(key, 3600)\n'
                    f"    return {value}"
                ): f"it returned {said}."
                for value, said in (
                    ("n", "1, 2, 3, 4, 5"),
                    ('"True" if n <= 3 else ""', "'True', 'True', 'True', '', ''"),
                    ("n <= 3 or None", "True, True, True, None, None"),
                )
            },
            GUARD.format(
                'key = f"starts:{task_id}"\n    if redis.set(key, 1, nx=True, ex=86400):\n        return True\n'
                "    starts = int(redis.get(key)) + 1\n    redis.set(key, starts, ex=86400)\n    return starts <= 3"
            ): "two workers call it at the same moment, 4 starts",
            GUARD.format(
                'with redis.lock(f"lock-{task_id}"):\n        n = int(redis.get(f"n-{task_id}") or 0) + 1\n'
                '        redis.set(f"n-{task_id}", n, ex=3600)\n    return n <= 3'
            ): "then another one waits there without an end",
            "import os\n\nfrom redis import Redis\n\nother = Redis.from_url(os.environ['CELERY_RESULT_BACKEND'])\n\n\n"
            + GUARD.format("other.set(task_id, 0, nx=True, ex=3600)\n    return other.incr(task_id) <= 3"): (
                "not with the client that it is given"
            ),
            "seen = {}\n\n\ndef guard(redis, task_id):\n    seen[task_id] = seen.get(task_id, 0) + 1\n"
            "    return seen[task_id] <= 3\n\n\nanswer = guard": "nothing is counted in Redis",
        },
        right=(
            GUARD.format(
                'with redis.pipeline() as pipe:\n        pipe.incr(f"n-{task_id}").expire(f"n-{task_id}", 86400)\n'
                "        return pipe.execute()[0] <= 3"
            ),
            GUARD.format(
                'with redis.lock(f"lock-{task_id}", timeout=10):\n        n = int(redis.get(f"n-{task_id}") or 0) + 1\n'
                '        redis.set(f"n-{task_id}", n, ex=3600)\n    return n <= 3'
            ),
            GUARD.format("redis.set(task_id, 0, nx=True, ex=3600)\n    return redis.incr(task_id) in (1, 2, 3)"),
            GUARD.format(
                "script = \"local n = redis.call('INCR', KEYS[1]) redis.call('EXPIRE', KEYS[1], 3600) return n\"\n"
                '    return not redis.eval(script, 1, f"starts/{task_id}") > 3'
            ),
        ),
    ),
    "08-3": Exercise(
        kind=str,
        judge=_nightly,
        project="scratch/nightly",
        wrong={
            MAILS.format(OPTIONS + '{"visibility_timeout": 3}', ", acks_late=True"): "for longer than 3 seconds",
            MAILS.format(OPTIONS + '{"visibility_timeout": "14400"}', ", acks_late=True"): "a number of seconds",
            MAILS.format(OPTIONS + '{"visibility_timeout": 7 * 86400}', ", acks_late=True"): "after 7 days only",
            MAILS.format(OPTIONS + '{"visibility_timeout": 14400}', ""): "is acknowledged before it runs",
            MAILS.format(
                "app.conf.broker_transport_options = None.x", ", acks_late=True"
            ): "`mails.py` ended with an error",
            MAILS.format(OPTIONS + '{"visibility_timeout": 1}', ", acks_late=True"): "for longer than 1 second, and",
            MAILS.format("", ", acks_late=True").replace('print(f"mail to {customer}", flush=True)', "pass"): (
                "doesn't have the line `mail to Ada`"
            ),
        },
        right=(
            MAILS.format("", ", acks_late=True"),
            MAILS.format(
                OPTIONS + '{"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 1,'
                '"unacked_key": "mails", "unacked_index_key": "mails_index", "unacked_mutex_key": "mails_mutex"}',
                ", acks_late=True",
            ),
            MAILS.format(
                OPTIONS + '{"visibility_timeout": 60, "unacked_index_key": "mails_index"}', ", acks_late=True"
            ),
            MAILS.format(
                "from reports import app as reports\n\napp.conf.task_acks_late = True\n"
                "app.conf.broker_transport_options = dict(reports.conf.broker_transport_options)",
                "",
            ),
        ),
    ),
}

QUIZ = {
    "08-1": Question(
        right="c",
        wrong={
            "a": "the worker is alive, but when it connects again, it puts back what it hasn't acknowledged.",
            "b": "that error is about a process that has died, and here no process has.",
            "d": "the visibility timeout is for messages of workers that are gone. This one is back after a second.",
        },
    ),
    "08-2": Question(
        right="b",
        wrong={
            "a": "the time counts from the moment in which the worker takes the message, and not from its start.",
            "c": "a late task runs once, as long as its message is acknowledged before the visibility timeout.",
            "d": "a worker takes four messages ahead for each child, and these are in `unacked`.",
        },
    ),
    "08-3": Question(
        right=("retry_on_worker_lost", "retry_on_worker_lost=True"),
        wrong={
            "acks_late": "with prefork, the main process lives on and acknowledges the message of its dead child.",
            "reject_on_worker_lost": "it puts the message back without counting, so the task comes back for ever.",
            "autoretry_for": "the exception for a dead child comes from the main process, where no task code runs.",
        },
        otherwise="it isn't that option. It is new in Celery 5.7, and it stands in the chapter's first project.",
    ),
    "08-4": Question(
        right="b",
        wrong={
            "a": "SIGTERM to the main process alone does. systemd sends it to the children as well.",
            "c": "that needs `reject_on_worker_lost=True`.",
            "d": "the main process lives long enough to acknowledge the messages.",
        },
    ),
}
