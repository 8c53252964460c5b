"""The exercises and the quiz of chapter 02c."""

import json
import time
import uuid
from collections.abc import Callable

from celery import Celery

from course_tasks.classroom.toolkit import free_port
from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project


def _sends_anyway(answer: Callable) -> str | None:
    queue = f"exercise-{uuid.uuid4()}"
    for away in (False, True):
        options = {"retry_policy": {"max_retries": 0}}
        app = Celery(set_as_current=False, task_default_queue=queue, result_backend_transport_options=options)
        if away:
            app.backend_cls = f"redis://localhost:{free_port()}/0"
        try:
            if reason := _judged_sending(answer, app, away):
                return reason
        finally:
            with app.connection_for_write() as connection:
                connection.default_channel.queue_delete(queue)
            app.close()
    return None


def _judged_sending(answer: Callable, app: Celery, away: bool) -> str | None:
    case = "while the backend is away, " if away else "while the backend is there, "
    called(answer, app, "add", (1, 2), case=case)
    headers = []
    with app.connection_for_write() as connection, connection.SimpleQueue(app.conf.task_default_queue) as waiting:
        while True:
            try:
                message = waiting.get_nowait()
            except waiting.Empty:
                break
            message.ack()
            headers.append((message.headers, json.loads(message.body)))
    if len(headers) != 1:
        return f"{case}it sent {len(headers)} messages. There should be one."
    [(header, (args, kwargs, _))] = headers
    if header["task"] != "add" or [*args, *kwargs.values()] != [1, 2]:
        return f"{case}it sent {header['task']}{tuple(args)}. It was asked to send add(1, 2)."
    if not away and header["ignore_result"]:
        return f"{case}it sent the task without a result, so nobody can ever read it."
    return None


def _mails_while_full(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("celery -A mails worker --pool=solo --without-mingle --without-gossip")
        conf = next(iter((project.client().control.inspect(timeout=10, limit=1).conf() or {"": {}}).values()))
        project.backend.config_set("maxmemory-policy", "noeviction")
        project.backend.config_set("maxmemory", "1kb")
        project.run("python send.py")
        deadline = time.monotonic() + 10
        while "mail to ada@example.com" not in (log := project.log()):
            if "Exception raised outside body" in log:
                return "the worker received the task, but it could not write to the full backend. " + _why(conf)
            if " raised unexpected" in log or "Received unregistered task" in log:
                return f"the task fails: {[line for line in log.splitlines() if line.strip()][-1].strip()}"
            if time.monotonic() > deadline:
                return "no worker has sent a mail to ada@example.com within 10 s."
            time.sleep(0.02)
    return None


def _why(conf: dict) -> str:
    if conf.get("result_backend_always_retry"):
        return "result_backend_always_retry waits only for a backend that it can't reach."
    if conf.get("task_acks_late"):
        return "With task_acks_late the worker acknowledges later, but it still writes before it runs the task."
    if conf.get("result_expires") not in (None, 86400):
        return "A shorter result_expires makes room later, but the backend is full now."
    return "So the task did not start."


MAILS = """
%%writefile scratch/mails/mails.py
from celery import Celery

app = Celery("mails", broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")
{setting}


@app.task(name="mail"{options})
def mail(address):
    print(f"mail to {{address}}")
"""
SEND = """
%%writefile scratch/mails/send.py
from celery import Celery

client = Celery(broker="redis://localhost:6379/0", backend="redis://localhost:6380/0")
client.send_task("mail", args=("ada@example.com",){options})
print("The mail is on its way.")
"""


def _mails(*settings: str, options: str = "") -> str:
    lines = "\n".join(f"app.conf.{setting}" for setting in settings)
    return MAILS.format(setting=lines, options=options).strip()


TRACKED = "task_track_started = True"

EXERCISES = {
    "02c-1": Exercise(
        kind=Callable,
        judge=_sends_anyway,
        wrong={
            "answer = lambda app, name, args: app.send_task(name, args=args)": (
                "while the backend is away, your function raised RuntimeError"
            ),
            "answer = lambda app, name, args: app.send_task(name, args=args, ignore_result=True)": (
                "without a result, so nobody can ever read it"
            ),
            "def answer(app, name, args):\n"
            "    app.send_task(name, args=args, ignore_result=True)\n"
            "    app.send_task(name, args=args)": "while the backend is there, it sent 2 messages",
            "def answer(app, name, args):\n"
            "    try:\n"
            "        app.send_task(name, args=args)\n"
            "    except RuntimeError:\n"
            "        pass": "while the backend is away, it sent 0 messages",
            "answer = lambda app, name, args: app.send_task(name, args=[args])": "It was asked to send add(1, 2)",
        },
        right=(
            "def answer(app, name, args):\n"
            "    for options in {}, {'ignore_result': True}:\n"
            "        try:\n"
            "            return app.signature(name, args=args).apply_async(**options).id\n"
            "        except Exception:\n"
            "            continue",
            "from redis.exceptions import RedisError\n"
            "def answer(app, name, args):\n"
            "    try:\n"
            "        away = not app.backend.client.ping()\n"
            "    except RedisError:\n"
            "        away = True\n"
            "    app.send_task(name, args=args, ignore_result=away)",
        ),
    ),
    "02c-2": Exercise(
        kind=str,
        judge=_mails_while_full,
        wrong={
            _mails(TRACKED, "result_backend_always_retry = True"): "only for a backend that it can't reach",
            _mails(TRACKED, "task_acks_late = True"): "the worker acknowledges later",
            _mails(TRACKED, "result_expires = 60"): "the backend is full now",
            _mails(TRACKED, options=", max_retries=5"): "So the task did not start.",
        },
        right=(
            _mails("task_track_started = False"),
            _mails(TRACKED, "task_ignore_result = True"),
            _mails(TRACKED, options=", track_started=False"),
            SEND.format(options=", ignore_result=True").strip(),
        ),
        project="scratch/mails",
    ),
}

QUIZ = {
    "02c-1": Question(
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
    "02c-2": Question(
        right=("19", "about 19", "19 seconds", "19 s"),
        wrong={
            "2": "the `timeout` limits how long `get` waits for a result, not how long it tries to reach the backend.",
            "20": "nearly. There are 20 retries, but the first one comes at once.",
            "1": "that was our client, with two retries. The default is more.",
            "4": "that is the course's app, with five retries. The question is about Celery's default.",
        },
        otherwise="the chapter says how many retries Celery's default has, and how long each of them waits.",
    ),
    "02c-3": Question(
        right=("volatile-ttl", "maxmemory-policy volatile-ttl"),
        wrong={
            "noeviction": "with this policy, the full server refuses to store anything, and the workers can't go on.",
            "allkeys-lru": "it drops the keys that were not used for the longest time, whenever they would expire.",
            "volatile-lru": "it goes by the last use of a key, and not by the time that the key has left.",
        },
        otherwise="look at the end of the chapter: with this policy, all twenty tasks ran.",
    ),
    "02c-4": Question(
        right="b",
        wrong={
            "a": "results that expire earlier are gone earlier, and the workers still can't store anything at night.",
            "c": "then no results would be stored at all, and in the morning there would be nothing to read.",
            "d": "then the tasks would run, but each one that ends at that time would lose its result.",
        },
    ),
}
