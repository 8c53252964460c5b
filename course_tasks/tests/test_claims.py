"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import base64
import contextlib
import functools
import inspect
import json
import logging
import os
import platform
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, MagicMock

import anyio
import asgi_correlation_id
import billiard.pool
import celery.backends
import celery.backends.asynchronous
import celery.exceptions
import httpx
import kombu
import kombu.pidbox
import kombu.utils.json
import psutil
import pytest
from amqp.basic_message import Message
from asgi_correlation_id import CorrelationIdMiddleware
from celery import Celery, chord, states
from celery.app.control import Inspect
from celery.app.defaults import SETTING_KEYS
from celery.app.task import Context, extract_exec_options
from celery.app.utils import find_app
from celery.beat import Scheduler
from celery.bin.worker import worker as worker_command
from celery.concurrency import ALIASES, get_available_pool_names
from celery.events.state import State
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult, GroupResult
from celery.schedules import crontab
from celery.utils import sysinfo
from celery.utils.nodenames import default_nodename, host_format
from celery.worker import autoscale
from celery.worker.consumer import Consumer
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.mingle import Mingle
from celery.worker.heartbeat import Heart
from kombu import Queue
from kombu.asynchronous import Hub
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp, virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.transport.redis import Channel
from kombu.utils.functional import fxrange
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from redis import Redis
from redis.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from course_tasks import copies, correlation
from course_tasks.celery import app
from course_tasks.celery import app as course_app
from course_tasks.classroom import free_port
from course_tasks.correlation import FORMAT, HEADER, CorrelatedRequest, correlation_id
from course_tasks.exercises import WrongAnswer, chapter_06b, chapter_07b
from course_tasks.exercises.project import Project
from course_tasks.install import ROOT
from course_tasks.spans import at_once, speedup
from course_tasks.tasks import add
from course_tasks.tests.plugin import accepted, cells, listens, logged, node_stats, stands, taken, until

NOTES = """
import time
from celery import Celery
app = Celery("notes")
@app.task(name="note")
def note(text, seconds=0):
    print(f"noted: {text}")
    time.sleep(seconds)
    return text
"""
NOTES_WORKER = "celery {option} -A notes worker --without-mingle --without-gossip {more}"
HOLDS = """
import time
from pathlib import Path
from celery import Celery
app = Celery("holds")
@app.task(name="hold")
def hold():
    print("holding")
    while not Path("go").exists():
        time.sleep(0.05)
    return "gone on"
"""
HOLDS_WORKER = "celery -A holds worker --without-mingle --without-gossip"
AWAY = "--result-backend redis://localhost:1/0"  # a port on which nothing listens


def notes(project: Project, *settings: str, option: str = "", more: str = "--pool=solo") -> None:
    """Start a worker with one task, which leaves a line in the log."""
    (project.folder / "notes.py").write_text(NOTES + "".join(f"app.conf.{setting}\n" for setting in settings))
    project.worker(NOTES_WORKER.format(option=option, more=more))


def writes(project: Project) -> int:
    """How many records the project's backend has been given so far."""
    commands = project.backend.info("commandstats")
    return sum(commands[name]["calls"] for name in ("cmdstat_set", "cmdstat_setex") if name in commands)


# --- 00 ------------------------------------------------------------------------------------------------------


def test_get_waits_as_long_as_it_is_told_and_otherwise_for_ever(project, monkeypatch):
    stands(
        "00",
        "`get` waits for the result, in this case for ten seconds at most.",
        "`get` waited for two seconds, which was our `timeout=2`",
        "Without a `timeout`, `get` would wait for ever",
    )
    client = project.client()
    start = time.monotonic()
    with pytest.raises(ResultTimeout):
        client.AsyncResult("never-sent").get(timeout=2)
    assert time.monotonic() - start >= 2
    assert inspect.signature(AsyncResult.get).parameters["timeout"].default is None
    days: list[int] = []

    def next_day():
        days.append(86_400)
        threading.Timer(3, client.backend.store_result, ["sent", 42, "SUCCESS"]).start()

    clock = SimpleNamespace(monotonic=lambda: sum(days), sleep=time.sleep)
    monkeypatch.setattr(celery.backends.asynchronous, "time", clock)
    assert client.AsyncResult("sent").get(on_interval=next_day) == 42


def test_the_banner_has_the_addresses_of_the_broker_and_of_the_backend(project):
    stands("00", "`transport` is the address of the broker, and `results` is the address of the backend.")
    stands("02", "In the banner, `results:` is the address of the backend.")
    notes(project)
    ports = [str(server.connection_pool.connection_kwargs["port"]) for server in (project.broker, project.backend)]
    assert re.findall(r"(?:transport|results): +redis://\S+:(\d+)/", project.log()) == ports


def test_the_environment_s_addresses_win_over_the_code_s_and_backend_cls_over_both(monkeypatch):
    stands("00", "`CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND`, and Celery prefers them to the URLs in the code.")
    stands(
        "02c",
        "would lose to the environment variable `CELERY_RESULT_BACKEND`, so the next cell sets `backend_cls`, which",
    )
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://localhost:1/0")
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://localhost:1/0")
    code = {"broker": "redis://localhost:2/0", "backend": "redis://localhost:2/0"}
    app, other = (Celery(set_as_current=False, **code) for _ in range(2))
    other.backend_cls = "redis://localhost:3/0"
    assert [app.connection().port, app.backend.connparams["port"], other.backend.connparams["port"]] == [1, 1, 3]


def test_ctrl_c_lets_the_worker_finish_its_tasks(project):
    stands("00", "press <kbd>Ctrl</kbd>+<kbd>C</kbd> once, and wait until it has finished its tasks.")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool=gevent", seconds=60)
    client = project.client()
    pid = node_stats(client, "celery")["pid"]
    result = client.send_task("hold")
    until(lambda: "holding" in project.log(), "the task to start")
    os.kill(pid, signal.SIGINT)
    until(lambda: "Warm shutdown" in project.log(), "the worker to stop")
    until(lambda: not project.broker.pubsub_numpat() + len(project.broker.pubsub_channels()), "its mailbox is closed")
    time.sleep(1)  # in which a worker that does not wait would end
    (project.folder / "go").touch()
    assert result.get(timeout=60) == "gone on"
    until(lambda: not psutil.pid_exists(pid), "the end of the worker")


def test_a_task_without_a_name_is_called_after_its_module_and_function():
    stands("00", "Without `name=`, Celery builds the name of a task from the module and the function.")
    stands("03", 'In a notebook with `Celery("shop")`, the task would be called `shop.double`.')

    def total():
        """Nothing: only the name counts."""

    total.__module__ = "shop"
    assert Celery(set_as_current=False).task(total).name == "shop.total"
    total.__module__ = "__main__"
    assert Celery(set_as_current=False).task(total).name == "__main__.total"
    assert Celery("shop", set_as_current=False).task(total).name == "shop.total"


def test_a_waiting_message_has_no_time_to_live(project):
    stands("00", "A task that you send while no worker is running waits in the broker until a worker takes it.")
    project.client().send_task("buy", ignore_result=True)
    assert project.broker.ttl("celery") == -1


def test_a_gevent_worker_runs_as_many_tasks_at_once_as_its_banner_says(project):
    stands("00", "tells you how many tasks this worker can run at the same time, and with which technique")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool=gevent --concurrency=2", seconds=60)
    assert "concurrency: 2 (gevent)" in project.log()
    results = [project.client().send_task("hold") for _ in range(3)]
    until(lambda: project.log().count("] received") == 3, "the worker to take all three")
    until(lambda: project.log().count("holding") >= 2, "two tasks to start")
    time.sleep(0.5)  # in which a third one would start
    assert project.log().count("holding") == 2
    (project.folder / "go").touch()
    assert [result.get(timeout=20) for result in results] == ["gone on"] * 3


# --- 01 ------------------------------------------------------------------------------------------------------

SHOP = """
from celery import Celery
app = Celery("shop")
@app.task(name="buy")
def buy(n):
    return n
"""
QUICK = "--pool=solo --without-mingle --without-gossip"


def test_redis_py_gives_up_on_an_answer_after_five_seconds_unless_told_otherwise():
    stands("01", "By default, redis-py 8 gives up on any answer after five seconds.")
    assert Redis.from_url("redis://localhost:1/0").connection_pool.make_connection().socket_timeout == 5


def test_with_rabbitmq_the_body_is_plain_json():
    stands("01", "they travel in RabbitMQ's own format, and the body is plain JSON without Base64")
    body = "[[4, 5], {}, {}]"
    sent = pyamqp.Channel.prepare_message(None, body, 0, "application/json", "utf-8", {"task": "add"}, {})
    assert sent.body == body and sent.headers == {"task": "add"} and sent.content_type == "application/json"
    assert virtual.Channel.body_encoding == "base64", "of Redis, in which the chapter's cell has decoded it"


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"body": "[[1], {}, {}]"}, "ValueError"),  # without its content type
        (
            {"body": '["Ada", 12]', "content-type": "application/json"},
            "ValueError('not enough values to unpack (expected 3, got 2)')",
        ),
    ],
    ids=["content-type", "body"],
)
def test_a_message_of_another_form_ends_one_worker_after_the_other(project, wrong, error):
    stands(
        "01",
        "the worker ends with an error and puts the message back, and the next worker ends in the same way",
        "the worker ends with an error. They start the worker again, and it ends again",
        "The worker expected three values.",
    )
    project.folder.joinpath("shop.py").write_text(SHOP)
    delivery = {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": "celery"}}
    message = {"headers": {"task": "buy", "id": "1"}, "properties": delivery} | wrong
    project.broker.lpush("celery", json.dumps(message))
    for number in (1, 2):
        project.worker(f"celery -A shop worker {QUICK}")
        until(lambda: project.log().count("Restoring 1 unacknowledged message") == number, "the end of the worker")  # noqa: B023
        assert project.log().count(f"Unrecoverable error: {error}") == number
        until(lambda: project.broker.llen("celery") == 1, "the message in its queue again")


def test_unacked_index_says_when_a_message_was_taken(project):
    stands("01", "A second key, `unacked_index`, records when each message was taken.")
    client = project.client()
    client.send_task("buy", queue="shelf", ignore_result=True)
    before = time.time()
    with client.connection_for_read() as connection:
        connection.SimpleQueue("shelf").get(timeout=10)
        [(_, taken)] = project.broker.zrange("unacked_index", 0, -1, withscores=True)
        assert before <= taken <= time.time()
        assert project.broker.hlen("unacked") == 1


def test_origin_is_the_program_that_sent_the_message(project):
    stands("01", "its id, and which program sent it (`origin`)")
    project.client().send_task("buy", ignore_result=True)
    sent = json.loads(project.broker.lindex("celery", 0))
    assert sent["headers"]["origin"] == f"gen{os.getpid()}@{socket.gethostname()}"


def test_clients_push_a_message_in_at_the_left_end(project):
    stands("01", "Clients push a message in at the left end of the list")
    for number in (1, 2):
        project.client().send_task("buy", args=(number,), ignore_result=True)
    waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in project.broker.lrange("celery", 0, -1)]
    assert waiting == ["(2,)", "(1,)"]


def test_argsrepr_has_short_arguments_as_they_are_and_shortens_long_ones(project):
    stands("01", "`argsrepr` is not enough, because Celery shortens long arguments there.")
    for password in ("s3cret", "s3cret" * 1000):
        project.client().send_task("login", args=("ada", password), ignore_result=True)
        text = json.loads(project.broker.lindex("celery", 0))["headers"]["argsrepr"]
        assert (password in text) is (password == "s3cret") and text.startswith("('ada', 's3cret")


@pytest.mark.parametrize(
    "part, field, said",
    [
        ("", "body", "TypeError: "),
        ("", "content-type", "ValueError: "),
        ("headers", "task", "Received and deleted unknown message"),
        ("headers", "id", "KeyError('id')"),
        ("properties", "delivery_tag", "KeyError('delivery_tag')"),
        ("properties", "delivery_info", "KeyError('exchange')"),
    ],
)
def test_a_message_by_hand_needs_all_its_six_fields(project, part, field, said):
    stands("01", "but none of these six fields may be missing", "so six fields were enough for it")
    message = {
        "body": "[[84], {}, {}]",
        "content-type": "application/json",
        "headers": {"task": "note", "id": "by-hand"},
        "properties": {"delivery_tag": "one", "delivery_info": {"exchange": "", "routing_key": "celery"}},
    }
    del (message[part] if part else message)[field]
    notes(project, more="--pool=threads -c 1")
    project.broker.lpush("celery", json.dumps(message))
    logged(project, said)
    assert "noted: " not in project.log()


def test_a_worker_that_runs_two_tasks_takes_five_messages_and_three_have_a_copy(project):
    stands("01", "**b.** The worker has taken all five messages.")
    stands("01", "the three tasks that still wait inside the worker have a copy, and the two running tasks don't.")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool=threads --concurrency=2", seconds=60)
    for _ in range(5):
        project.client().send_task("hold", ignore_result=True)
    until(lambda: project.log().count("holding") == 2, "two tasks to start")
    until(lambda: (project.broker.llen("celery"), project.broker.hlen("unacked")) == (0, 3), "three copies")


def test_the_environment_s_broker_has_priority(monkeypatch):
    stands("01", "the environment variable `CELERY_BROKER_URL`, which the set-up cell has set, has priority over it")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://localhost:1/0")
    app = Celery(broker="redis://localhost:2/0", set_as_current=False)
    assert app.connection_for_write().port == 1
    app.conf.broker_write_url = "redis://localhost:2/0"
    assert app.connection_for_write().port == 2


def test_a_client_tries_four_times_and_a_worker_a_hundred_times(monkeypatch):
    stands("01", "gave up within about a second. By then it had tried four times", "up to a hundred attempts")
    attempts = []

    def refused(self):
        attempts.append(self)
        raise ConnectionRefusedError

    monkeypatch.setattr(Connection, "_connect", refused)
    app = Celery(set_as_current=False)
    pauses = []
    monkeypatch.setattr("kombu.utils.functional.sleep", pauses.append)
    with pytest.raises(OperationalError):
        app.send_task("buy", ignore_result=True)
    assert len(attempts) == 4 and sum(pauses) < 1
    assert app.conf.broker_connection_max_retries == 100


def test_a_worker_gives_up_when_it_has_tried_that_often(project):
    stands("01", "by default it tries a hundred times before it gives up")
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        notes(project, "broker_connection_max_retries = 1", option="-b redis://localhost:1/0")
    assert "(1/1)" in project.log()


def test_a_silent_broker_is_waited_for_without_end_but_not_by_the_course_s_app(project):
    stands("01", "by default, `send_task` then waits without end", "the course's app sets `socket_timeout`")
    client = project.client()
    assert timeout_of(client) is None, "and not the five seconds of redis-py"
    client.conf.broker_transport_options = course_app.conf.broker_transport_options
    assert timeout_of(client) == client.conf.broker_transport_options["socket_timeout"] == 5


def timeout_of(app: Celery) -> float | None:
    """How long a client's connection to the broker waits for an answer, in seconds."""
    with app.connection_for_write() as connection:
        connections = connection.default_channel.client.connection_pool
        connected = connections.get_connection()
        try:
            return connected._sock.gettimeout()
        finally:
            connections.release(connected)


@contextlib.contextmanager
def behind_a_proxy(project: Project, answer: Callable[[bytes, bytes], bytes | None]):
    """A client whose requests to the project's broker are passed on by a proxy.

    `answer` takes a request and the broker's answer, and returns what the client gets; None closes the connection.
    """
    there = project.broker.connection_pool.connection_kwargs

    class Proxy(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection((there["host"], there["port"])) as server:
                while data := self.request.recv(65536):
                    server.sendall(data)
                    if (told := answer(data, server.recv(65536))) is None:
                        return
                    self.request.sendall(told)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        app = project.client()
        password = f":{there['password']}@" if there.get("password") else ""
        app.conf.broker_write_url = f"redis://{password}127.0.0.1:{proxy.server_address[1]}/{there['db']}"
        yield app
        proxy.shutdown()


def test_a_message_whose_arrival_is_not_confirmed_is_sent_twice(project):
    stands(
        "01",
        "So it sends the message once more.",
        "If the first one had arrived, the message now waits in the queue twice.",
    )
    cut = []

    def answer(request: bytes, reply: bytes) -> bytes | None:
        if b"LPUSH" not in request or cut:
            return reply
        cut.append(request)
        until(lambda: project.broker.llen("celery"), "the message in its queue")
        return None

    with behind_a_proxy(project, answer) as app:
        app.send_task("buy", ignore_result=True)
    ids = [json.loads(raw)["headers"]["id"] for raw in project.broker.lrange("celery", 0, -1)]
    assert len(ids) == 2 and len(set(ids)) == 1


def test_the_body_names_the_tasks_that_should_follow(project):
    stands("01", "and `embed`: other tasks that should follow this one.")
    client = project.client()
    after = {name: client.signature(name) for name in ("pay", "complain", "pack")}
    follow = {"link": after["pay"], "link_error": after["complain"], "chain": [after["pack"]]}
    client.send_task("buy", ignore_result=True, **follow)
    [_, _, embed] = json.loads(base64.b64decode(json.loads(project.broker.lindex("celery", 0))["body"]))
    named = {name: [task["task"] for task in tasks or ()] for name, tasks in embed.items()}
    assert named == {"callbacks": ["pay"], "errbacks": ["complain"], "chain": ["pack"], "chord": []}


# --- 01b -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--save", ""]])
def test_without_a_snapshot_a_killed_server_has_nothing_left(tmp_path, options):
    stands(
        "01b",
        "Without our `plain.save()`, `PLAIN` would have nothing at all, because it had not yet written a snapshot",
        '(With `--save ""`, it never does.)',
        "By default (`appendfsync everysec`)",
    )
    command = [sys.executable, "-m", "course_tasks", "server", "--bind", "127.0.0.1", *options, "--port"]
    port = free_port()
    with Redis(port=port) as server:
        for _ in range(2):
            process = subprocess.Popen([*command, str(port)], cwd=tmp_path, stdout=subprocess.DEVNULL)
            try:
                until(lambda: listens(port), "the server")
                assert server.keys() == [] and server.config_get("appendfsync") == {"appendfsync": "everysec"}
                server.lpush("celery", "a task")
            finally:
                process.kill()
                process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_worker_does_not_start_on_a_full_broker(project):
    stands("01b", "A worker that is started now would end at once.", "raise `maxmemory` and start the workers again.")
    project.folder.joinpath("shop.py").write_text(SHOP)
    project.client().send_task("buy", args=(1,), ignore_result=True)
    project.broker.config_set("maxmemory", "100kb")
    project.broker.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        project.worker(f"celery -A shop worker {QUICK}")
    assert "OutOfMemoryError" in project.log() and project.broker.llen("celery") == 1
    project.broker.config_set("maxmemory", "0")
    project.worker(f"celery -A shop worker {QUICK}", seconds=60)
    logged(project, "Task buy")
    until(lambda: not project.broker.exists("celery", "unacked"), "the task to be done")


def test_messages_that_a_worker_cannot_put_back_stay_in_unacked(project):
    stands("01b", "The messages that were reserved are still in `unacked`, because the worker could not put them back.")
    notes(project, more="--pool=threads -c 1")
    sent = [project.client().send_task("note", args=(n, 3), ignore_result=True).id for n in range(8)]
    logged(project, "noted: 0")
    until(lambda: project.broker.hlen("unacked") == 4, "four messages to be reserved")
    project.broker.config_set("maxmemory-policy", "noeviction")
    project.broker.config_set("maxmemory", "500kb")
    logged(project, "Restoring")
    ids = [json.loads(copy)[0]["headers"]["id"] for copy in project.broker.hvals("unacked")]
    started = project.log().count("noted: ")
    assert {*sent[started : started + 3]} <= {*ids}, "when the last of them started, the worker reached for a fourth"


def test_a_worker_that_is_stopped_puts_its_reserved_messages_back_after_a_purge(project):
    stands("01b", "If you stop the worker, it even puts them back into the purged queue.")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool=prefork -c 1")
    for _ in range(3):
        project.client().send_task("hold", ignore_result=True)
    logged(project, "holding")
    until(lambda: project.broker.hlen("unacked") == 2, "two messages to be reserved")
    assert "No messages purged" in project.run("celery -A holds purge -f")
    project.client().control.shutdown()
    logged(project, "Got shutdown from remote")
    (project.folder / "go").touch()
    until(lambda: project.broker.llen("celery") == 2, "the worker to put them back")


def test_purge_asks_first_and_f_is_for_not_asking(project):
    stands("01b", "(`-f` means: don't ask whether I'm sure.)")
    (project.folder / "notes.py").write_text(NOTES)
    project.client().send_task("note", ignore_result=True)
    project.run("sh -c 'echo n | celery -A notes purge || true'")
    assert project.broker.llen("celery") == 1
    assert "Purged 1 message" in project.run("celery -A notes purge -f")


def test_a_bare_purge_empties_all_queues_of_the_app_with_all_their_lists(project):
    stands("01b", "without `-Q`, the command empties every queue that the app knows")
    stands("01b", "`purge -Q NAME` empties one queue, and a bare `purge` empties all that the app knows.")
    (project.folder / "post.py").write_text(
        "from celery import Celery\nfrom kombu import Queue\n"
        'app = Celery("post", task_queues=[Queue("parcels"), Queue("returns")])\n'
    )
    for queue, priority in [("parcels", 0), ("returns", 0), ("returns", 9), ("letters", 0)]:
        project.client().send_task("note", queue=queue, priority=priority, ignore_result=True)
    assert "Purged 3 messages from 2 known task queues." in project.run("celery -A post purge -f", seconds=60)
    kept = [key for key in project.broker.scan_iter() if not key.startswith(b"_kombu.binding")]
    assert kept == [b"letters"]


def test_a_route_s_pattern_has_to_fit_the_whole_name():
    stands("01b", "but the pattern has to fit the whole name")
    app = Celery(set_as_current=False, task_routes={"mail.*.send": {"queue": "letters"}})
    for name, queue in [("mail.bulk.send", "letters"), ("a.mail.bulk.send", "celery"), ("mail.bulk.sends", "celery")]:
        assert app.amqp.router.route({}, name)["queue"].name == queue, name


def test_ten_priorities_are_in_four_lists(project):
    stands("01b", "Celery keeps the priorities 0 to 9 in four steps with Redis: 0, 3, 6 and 9.", "up to four lists")
    for priority in range(10):
        project.client().send_task("note", queue="parcels", priority=priority, ignore_result=True)
    kept = {}
    for key in project.broker.keys("parcels*"):
        messages = map(json.loads, project.broker.lrange(key, 0, -1))
        kept[key] = {message["properties"]["priority"] for message in messages}
    assert kept == {
        b"parcels": {0, 1, 2},
        b"parcels\x06\x163": {3, 4, 5},
        b"parcels\x06\x166": {6, 7, 8},
        b"parcels\x06\x169": {9},
    }


def test_a_password_in_the_url_and_the_name_of_the_machine():
    stands("01b", "`redis://:PASSWORD@host:6379/0` in the URL", "`%h` stands for the name of the machine.")
    with kombu.Connection("redis://:PASSWORD@host:6379/0") as connection:
        assert (connection.password, connection.hostname, connection.port) == ("PASSWORD", "host", 6379)
    assert host_format("parcels@%h") == f"parcels@{socket.gethostname()}"


def test_the_broker_of_compose_is_for_this_machine_only():
    stands("01b", "Our [docker-compose.yml](../docker-compose.yml) uses the second form.")
    text = ROOT.joinpath("docker-compose.yml").read_text()
    assert re.findall(r"ports: (.*)", text) == ['["127.0.0.1:6379:6379"]', '["127.0.0.1:6380:6380"]']


def test_priorities_have_four_steps_with_redis_and_a_queue_s_highest_one_with_rabbitmq():
    stands("01b", "in four steps with Redis: 0, 3, 6 and 9", "in queues with `x-max-priority`: a larger number")
    assert Channel.priority_steps == [0, 3, 6, 9]
    declared = []
    channel = SimpleNamespace(
        prepare_queue_arguments=lambda given, **kinds: given | to_rabbitmq_queue_arguments({}, **kinds),
        queue_declare=lambda **options: declared.append(options) or ("parcels", 0, 0),
    )
    Queue("parcels", max_priority=9, channel=channel).queue_declare()
    assert declared[0]["arguments"] == {"x-max-priority": 9} and declared[0]["durable"] is True


def test_what_the_table_says_of_the_three_brokers():
    stands(
        "01b", "Celery's queues are durable, and its messages are persistent", "an hour by default", "after 30 minutes"
    )
    app = Celery(set_as_current=False)
    [queue] = app.amqp.queues.values()
    assert queue.durable and queue.exchange.durable and app.conf.task_default_delivery_mode == 2
    assert Channel.visibility_timeout == 3600
    folder = Path(pyamqp.__file__).parent
    sqs = folder.joinpath("SQS/__init__.py").read_text()  # it can't be imported without Amazon's library
    assert "default_visibility_timeout = 1800  # 30 minutes." in sqs and "* Supports Priority: No" in sqs
    for transport in ("redis.py", "pyamqp.py"):
        assert "* Supports Priority: Yes" in folder.joinpath(transport).read_text()
    # what events and remote control need
    assert '.get("supports_fanout", False)' in sqs and Channel.supports_fanout


@pytest.mark.parametrize("pool, copies", [("solo", 1), ("threads", 0), ("prefork", 0)])
def test_the_copy_of_a_running_task_is_kept_with_solo_only(project, pool, copies):
    stands("01", "just before the task starts (with the pool `solo`, when the task has ended)")
    stands("03c", "just before it starts the task (except with `solo`)")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool={pool} -c 1")
    result = project.client().send_task("hold")
    logged(project, "holding")
    until(lambda: project.broker.hlen("unacked") == copies, "the copy to be as it should")
    (project.folder / "go").touch()
    result.get(timeout=20)
    until(lambda: not project.broker.exists("unacked"), "the acknowledgement")


def test_with_redis_a_message_that_is_put_back_goes_to_the_front(project):
    stands("01b", "first in, first out; messages that a stopped or dead worker had taken go to the front")
    client = project.client()
    for number in range(3):
        client.send_task("buy", args=(number,), queue="shelf", ignore_result=True)
    with client.connection_for_read() as connection:
        connection.SimpleQueue("shelf").get(timeout=10)
    waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in project.broker.lrange("shelf", 0, -1)]
    assert waiting == ["(2,)", "(1,)", "(0,)"]


def test_a_message_that_is_put_back_after_the_visibility_timeout_goes_to_the_front(project):
    stands("01b", "first in, first out; messages that a stopped or dead worker had taken go to the front")
    client = project.client()
    client.conf.broker_transport_options = {"visibility_timeout": 0.1}
    for number in range(3):
        client.send_task("buy", args=(number,), queue="shelf", ignore_result=True)
    with client.connection_for_read() as connection:
        queue = connection.SimpleQueue("shelf")
        queue.get(timeout=10)
        time.sleep(0.2)  # longer than the visibility timeout
        queue.channel.qos.restore_visible()
        waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in project.broker.lrange("shelf", 0, -1)]
    assert waiting == ["(2,)", "(1,)", "(0,)"]


def test_a_message_for_any_queue_is_persistent(project):
    stands("01b", "kept on disk: Celery's queues are durable, and its messages are persistent")
    for queue in ("celery", "shelf"):
        project.client().send_task("buy", queue=queue, ignore_result=True)
        assert json.loads(project.broker.lindex(queue, 0))["properties"]["delivery_mode"] == 2


def test_a_strict_app_s_worker_does_not_start_with_a_queue_that_is_not_listed(project):
    stands(
        "01b", "| What if a queue name is wrong? | `task_create_missing_queues=False` | every app must list its queues"
    )
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        notes(project, "task_create_missing_queues = False", more="--pool=solo -Q lettres")
    assert project.broker.keys("_kombu.binding.lettres") == []


def test_redis_is_in_protected_mode_by_default(project):
    stands("01b", "(So does `protected-mode`, which is on by default")
    assert project.broker.config_get("protected-mode") == {"protected-mode": "yes"}


# --- 02 ------------------------------------------------------------------------------------------------------


def test_arguments_and_results_travel_as_json_by_default():
    stands("02", "By default, arguments and results travel as JSON, and JSON has no tuples.")
    defaults = Celery(set_as_current=False).conf
    assert defaults.task_serializer == defaults.result_serializer == "json"


@pytest.mark.parametrize("backend", ["file://{}", "db+sqlite:///{}/results"])
def test_a_folder_or_a_database_keeps_results_until_the_task_runs_that_beat_sends(project, tmp_path, backend):
    stands(
        "02",
        "A folder of files doesn't, and a database doesn't either. There, a result stays until a worker runs Celery's "
        "own task `celery.backend_cleanup`.",
        "The program that sends this task, by default once a day at 4 in the morning, is Celery's scheduler",
    )
    app = Celery(set_as_current=False, result_expires=timedelta(seconds=0.01))
    app.backend_cls = backend.format(tmp_path)
    app.backend.store_result("an-id", 42, "SUCCESS")
    time.sleep(0.1)  # the result expires
    assert app.backend.get_state("an-id") == "SUCCESS"
    app.tasks["celery.backend_cleanup"]()
    assert app.backend.get_state("an-id") == "PENDING"
    scheduler, with_redis = Scheduler(app, lazy=True), Scheduler(project.client(), lazy=True)
    for each in (scheduler, with_redis):
        each.install_default_entries(each.schedule)
    assert scheduler.schedule["celery.backend_cleanup"].schedule == crontab("0", "4", "*")
    assert "celery.backend_cleanup" not in with_redis.schedule


def test_volatile_ttl_drops_results_and_no_queue_and_noeviction_refuses_both(project):
    stands(
        "02",
        "The policy **`volatile-ttl`** deletes only keys that have a time to live, and begins with those that have the "
        "least time left. Results have a time to live, and queues don't.",
        "**b)** The results fill the memory, and then new tasks are refused.",
    )
    client, server = project.client(), project.broker
    client.send_task("note")
    assert server.ttl("celery") == -1

    def fill(policy: str) -> None:
        server.config_set("maxmemory-policy", policy)
        server.config_set("maxmemory", "10mb")
        for number in range(40):
            server.set(f"celery-task-meta-{number}", "x" * 1_000_000, ex=1000 + number)

    fill("volatile-ttl")
    assert (server.exists("celery-task-meta-0"), server.exists("celery-task-meta-39")) == (0, 1)
    client.send_task("note")
    with pytest.raises(OutOfMemoryError):
        fill("noeviction")
    server.config_set("maxmemory", server.info("memory")["used_memory"] // 2)
    with pytest.raises(OperationalError, match="maxmemory"):
        client.send_task("note")
    assert server.llen("celery") == 2


def test_a_client_stores_nothing_and_a_timedelta_counts_as_its_seconds(project):
    stands(
        "02",
        "it plays no part here, because a client stores nothing",
        "(`timedelta(hours=1)` from Python's `datetime` says that more clearly.)",
    )
    stands("02b", "Nobody stores `PENDING`.")
    client = project.client()
    asked = client.send_task("note")
    assert (asked.state, writes(project), project.backend.keys()) == ("PENDING", 0, [])
    for expires in (3600, timedelta(hours=1)):
        again = project.client()
        again.conf.result_expires = expires
        again.backend.store_result(str(expires), 42, "SUCCESS")
        assert 3590 < project.backend.ttl(f"celery-task-meta-{expires}") <= 3600


def test_of_a_task_that_ignores_its_result_not_even_an_error_is_stored(project):
    stands("02", "With `ignore_result=True`, nothing is stored.")
    notes(project)
    project.client().send_task("note", args=("too", "many", "arguments"), ignore_result=True)
    logged(project, "raised unexpected: TypeError")
    after = project.client().send_task("note", args=("after it",))
    assert after.get(timeout=20) == "after it"
    assert project.backend.keys() == [f"celery-task-meta-{after.id}".encode()]


def test_only_delay_knows_that_an_imported_task_ignores_its_result(project):
    stands("02", "If it imports the task and sends it with `delay`, or if it sends *any* task with")
    stands("02", "(The import alone doesn't help: `send_task` doesn't look at this option of the task.")
    client = project.client()

    @client.task(name="notify", ignore_result=True)
    def notify():
        """Never run."""

    assert notify.delay().get(timeout=20) is None
    assert client.send_task("notify", ignore_result=True).get(timeout=20) is None
    with pytest.raises(ResultTimeout):
        client.send_task("notify").get(timeout=1)


def test_reading_a_result_does_not_change_its_time_to_live(project):
    stands("02", "A result stays for its whole time to live, whether anybody has read it or not.")
    stands("02", "it plays no part here, because a client stores nothing")
    worker, client = project.client(), project.client()
    worker.conf.result_expires = 60
    worker.backend.store_result("an-id", 42, "SUCCESS")
    assert client.AsyncResult("an-id").get(timeout=10) == client.AsyncResult("an-id").result == 42
    assert 50 < project.backend.ttl("celery-task-meta-an-id") <= 60


def test_a_result_can_be_forgotten_by_a_client_that_has_not_read_it(project):
    stands("02", "and `forget()` deletes it sooner.")
    project.client().backend.store_result("an-id", 42, "SUCCESS")
    project.client().AsyncResult("an-id").forget()
    assert project.backend.keys() == []


# --- 02b -----------------------------------------------------------------------------------------------------


def test_flaky_is_tried_again_after_a_second_and_add_long_takes_its_time(project):
    stands(
        "02b",
        "`add_long` takes one second.",
        "`flaky` fails once, and is tried again one second later.",
        "| RETRY | an attempt has failed, and another one will follow. Or",
    )
    project.worker("celery -A course_tasks worker --pool=threads -c 2 --without-mingle --without-gossip")
    records, sent, at = [], [], []

    def note(record):
        records.append(record)
        at.append(time.time())

    for task, args in (("flaky", (1,)), ("add_long", (4, 5, 1))):
        sent.append(time.time())
        project.client().send_task(task, args=args).get(timeout=20, on_message=note)
    flaky, add_long = ["STARTED", "RETRY", "STARTED", "SUCCESS"], ["STARTED", "SUCCESS"]
    assert [record["status"] for record in records] == [*flaky, *add_long]
    assert str(records[1]["result"]) == "the service is not up yet"
    assert at[2] - sent[0] > 0.99 and at[5] - sent[1] > 0.99  # a record may be late, so it says nothing about the next
    stands("02b", "A **retry** means that the worker sends the task to the broker once more")
    assert project.broker.info("commandstats")["cmdstat_lpush"]["calls"] == 3  # flaky twice, and add_long


def test_get_passes_on_what_it_hears_meanwhile_about_another_task(project):
    stands("02b", "`get` passes on every announcement that it receives while it waits. If other tasks of yours")
    project.worker("celery -A course_tasks worker --pool=solo --without-mingle --without-gossip")
    client, heard = project.client(), []
    add, other = client.send_task("add", args=(4, 5)), client.send_task("add", args=(1, 2))
    for task in add, other:  # read without the client, which therefore hears of them later
        until(lambda task=task: b"SUCCESS" in (project.backend.get(f"celery-task-meta-{task.id}") or b""), "it is over")
    assert add.get(timeout=10) == 9
    add_long = client.send_task("add_long", args=(4, 5, 5))
    add_long.get(timeout=60, on_message=lambda record: heard.append((record["task_id"], record["status"])))
    assert (add.id, "SUCCESS") in heard and (add_long.id, "SUCCESS") in heard


def test_a_task_that_the_worker_does_not_know_fails_without_being_started(project):
    stands("02b", "└──> FAILURE (an unknown name)")
    notes(project, "task_track_started = True")
    before, asked = writes(project), project.client().send_task("unknown")
    with pytest.raises(NotRegistered):
        asked.get(timeout=20)
    assert (asked.state, writes(project) - before) == ("FAILURE", 1)


def test_a_task_that_comes_too_late_is_revoked_and_events_have_states_of_their_own(project):
    stands(
        "02b",
        "| REVOKED | the task was cancelled, or came too late (`expires`, see 04b) | a `TaskRevokedError` | yes, but",
        "in `celery.states` you also find `RECEIVED` and `REJECTED`. They belong to Celery's monitoring events",
    )
    notes(project)
    late = project.client().send_task("note", args=("late",), expires=-1)
    assert isinstance(late.get(timeout=20, propagate=False), TaskRevokedError)
    assert (late.state, "noted" in project.settled_log()) == ("REVOKED", False)
    assert {"RECEIVED", "REJECTED"} <= vars(states).keys()
    state = State()
    for kind in ("received", "rejected"):
        when = {"timestamp": 1, "local_received": 1, "clock": 1}
        state.event({"type": f"task-{kind}", "uuid": kind, "hostname": "w"} | when)
        assert state.tasks[kind].state == kind.upper()


def test_a_task_that_runs_longer_than_its_results_live_is_pending_until_it_ends(project):
    stands(
        "02b",
        "A task that runs for longer than `result_expires` becomes `PENDING` again while it is running. When it ends, "
        "its result is stored as usual.",
    )
    notes(project, "task_track_started = True", "result_expires = 2")
    asked = project.client().send_task("note", args=("long", 8))
    logged(project, "noted: long")
    assert writes(project) == 1  # of STARTED
    until(lambda: asked.state == "PENDING", "its record to expire")
    assert "succeeded" not in project.log()
    assert asked.get(timeout=20) == "long"


def test_by_default_started_is_not_stored_which_saves_a_write(project):
    stands("02b", "By default both are off, which saves a write to the backend for each task.")
    notes(project)
    client, written = project.client(), []
    client.send_task("note", args=("first",)).get(timeout=20)
    for _ in range(2):
        client.send_task("note", args=("more",)).get(timeout=20)
        written.append(writes(project))
    assert written[1] - written[0] == 1
    assert add.track_started and not Celery(set_as_current=False).conf.task_track_started


def test_started_is_stored_as_well_if_only_the_task_asks_for_it(project):
    stands("02b", "if its app has the setting `task_track_started`, or if the task has `track_started`")
    text = NOTES.replace('name="note"', 'name="note", track_started=True')
    (project.folder / "notes.py").write_text(text)
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo"))
    before = writes(project)
    project.client().send_task("note", args=("tracked",)).get(timeout=20)
    assert writes(project) - before == 2


def test_the_class_that_celery_makes_up_is_no_attribute_of_its_module():
    stands("02b", "**d.** The client doesn't have the real class, so Celery makes up a class with the same name.")
    stored = {"exc_type": "OutOfStock", "exc_message": ["pen", 0], "exc_module": "no_such_shop"}
    error = Celery(set_as_current=False).backend.exception_to_python(stored)
    assert isinstance(error, Exception) and type(error).__name__ == "OutOfStock"
    assert not hasattr(celery.exceptions, "OutOfStock"), "or answer a) would be right as well"


NO_ROUTE = """
from celery import Celery
app = Celery("notes")
class NoRoute({base}):
    def __init__(self, city, street):
        super().__init__({passed_on})
@app.task(name="deliver")
def deliver(city, street):
    raise NoRoute(city, street)
"""


def test_an_exception_that_passes_all_its_arguments_on_comes_back(project):
    stands("02b", "The fix is an `__init__` that passes all its arguments on: `super().__init__(city, street)`.")
    module = NO_ROUTE.format(base="Exception", passed_on="city, street")
    (project.folder / "notes.py").write_text(module)
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo"))
    said = project.run(
        'python -c "import notes\n'
        "try: notes.deliver.delay('Bern', 'Main Street').get(timeout=20)\n"
        'except notes.NoRoute as error: print(error.args)"'
    )
    assert said == "('Bern', 'Main Street')\n"


@pytest.mark.parametrize("base, arrives", [("Exception", "UnpickleableExceptionWrapper"), ("ValueError", "ValueError")])
def test_an_exception_that_can_not_be_built_again_arrives_as_its_base_class_or_wrapped(project, base, arrives):
    stands(
        "02b", "(If its class derives from another one than `Exception`, such as `ValueError`, the client gets a plain"
    )
    module = NO_ROUTE.format(base=base, passed_on="f'no route to {street} in {city}'")
    (project.folder / "notes.py").write_text(module)
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo"))
    error = project.client().send_task("deliver", args=("Bern", "Main Street")).get(timeout=20, propagate=False)
    assert type(error).__name__ == arrives


def test_a_worker_that_starts_after_a_revoke_and_is_told_by_nobody_runs_the_task(project):
    stands(
        "02b",
        "`revoke()` reaches only the workers that are running. One of them stores `REVOKED`, even if it doesn't read",
        "A worker that starts later, and that no other worker tells of it, runs the task all the same.",
    )
    notes(project, more="--pool=solo -Q others -n other@%h")
    client = project.client()
    waiting = client.send_task("note", args=("all the same",))
    client.control.revoke(waiting.id, reply=True, timeout=10, limit=1)
    until(lambda: client.AsyncResult(waiting.id).state == "REVOKED", "the other worker stores it")
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo -n late@%h"))
    logged(project, "noted: all the same")
    until(lambda: client.AsyncResult(waiting.id).state == "SUCCESS", "its result")


@pytest.mark.parametrize("given, held", [("", "NoneType"), (", exc=KeyError('gone')", "KeyError")])
def test_what_the_result_of_a_retry_holds(project, given, held):
    stands("02b", "(see 03c) | the exception that the task gave to `retry` (08b), `None`, or one of Celery's own")
    (project.folder / "notes.py").write_text(
        "from celery import Celery\n"
        "app = Celery('notes')\n"
        "@app.task(name='again', bind=True)\n"
        "def again(self):\n"
        "    try:\n"
        "        {}['gone']\n"
        "    except KeyError:\n"
        f"        raise self.retry(countdown=60{given})\n"
    )
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo"))
    task = project.client().send_task("again")
    until(lambda: task.state == "RETRY", "the first attempt fails")
    assert type(task.result).__name__ == held


def test_a_task_that_runs_again_is_still_retry_when_nobody_stores_that_it_has_started(project):
    stands("02b", "After a retry, a task that is running again is still `RETRY`.")
    (project.folder / "holds.py").write_text(
        HOLDS.replace('"hold")', '"hold", bind=True)')
        .replace("hold():", "hold(self):")
        .replace('print("holding")', "if not self.request.retries:\n        raise self.retry(countdown=0)")
    )
    project.worker(f"{HOLDS_WORKER} --pool=threads -c 1")
    task = project.client().send_task("hold")
    until(lambda: task.state == "RETRY", "the first attempt")
    accepted(project.client(), "celery")
    assert task.state == "RETRY"
    (project.folder / "go").touch()
    assert task.get(timeout=20) == "gone on"


def test_inspect_names_no_task_that_waits_for_its_rate_limit(project):
    stands("02b", "Or the task has a `rate_limit` (see 04) and waits in a worker for its turn |")
    (project.folder / "notes.py").write_text(NOTES.replace('name="note"', 'name="note", rate_limit="1/h"'))
    project.worker(NOTES_WORKER.format(option="", more="--pool=threads"))
    client = project.client()
    client.send_task("note", args=("first",)).get(timeout=20)
    waiting = client.send_task("note", args=("second",))
    logged(project, f"[{waiting.id}] received")
    asked = client.control.inspect(timeout=10, limit=1)
    for question in (asked.active, asked.reserved, asked.scheduled):
        assert list(question().values()) == [[]]
    assert (project.broker.llen("celery"), project.broker.hlen("unacked"), waiting.state) == (0, 1, "PENDING")


def test_inspect_names_tasks_that_are_pending(project):
    stands(
        "02b",
        "| a worker names it in `inspect().active()` | it is running, and there is no record of `STARTED`:",
        "| a worker names it in `inspect().scheduled()` | it waits for its `countdown` |",
        "We wait for five seconds at most, and we stop waiting after the second answer (`limit=2`).",
    )
    notes(project, more="--pool=threads -c 1")
    client = project.client()
    running = client.send_task("note", args=("running", 60))
    waiting = client.send_task("note", args=("waiting",), countdown=60)
    logged(project, "noted: running")

    def named(question: str) -> list[str]:
        [tasks] = getattr(client.control.inspect(timeout=10, limit=1), question)().values()
        return [task.get("request", task)["id"] for task in tasks]

    until(lambda: named("scheduled") == [waiting.id], "the task in scheduled()")
    begin = time.monotonic()
    assert client.control.inspect(timeout=60, limit=1).ping() and time.monotonic() - begin < 30
    assert named("active") == [running.id]
    assert running.state == waiting.state == "PENDING"


def test_a_task_is_over_in_three_states_and_not_in_one_of_its_own(project):
    stands("02b", "| any other, such as PROGRESS | the task has stored it itself | what the task wanted to say | no |")
    stands("02b", "But it is `ready()`, because that only means that the task is over, however it ended.")
    stands("02b", "A record of `STARTED` expires like any other record (see 02)")
    client = project.client()
    errors = {"RETRY": ValueError(), "FAILURE": ValueError(), "REVOKED": TaskRevokedError()}
    for state in ("PENDING", "STARTED", "RETRY", "SUCCESS", "FAILURE", "REVOKED", "PROGRESS"):
        if state != "PENDING":
            client.backend.store_result(state, errors.get(state, 42), state)
            assert 0 < project.backend.ttl(f"celery-task-meta-{state}") <= 24 * 60 * 60
        asked = client.AsyncResult(state)
        assert (asked.state, asked.ready()) == (state, state in ("SUCCESS", "FAILURE", "REVOKED"))


# --- 02c -----------------------------------------------------------------------------------------------------


def patient_pauses(monkeypatch, **settings) -> list[float]:
    """The first twenty pauses, in seconds, of a worker with `always_retry` whose backend is away."""
    patient = Celery(set_as_current=False)
    patient.conf.update(settings, result_backend_always_retry=True)
    patient.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 0}}
    patient.backend_cls = "redis://localhost:1/0"
    pauses: list[float] = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(patient.backend, "_sleep", sleep)
    monkeypatch.setattr("celery.utils.time.random.randrange", lambda end: end - 1)  # the whole pause
    with pytest.raises(KeyboardInterrupt):
        patient.backend.store_result("an-id", 42, "SUCCESS")
    return pauses


def test_the_retry_policies_of_clients_and_of_patient_workers(monkeypatch):
    stands(
        "02c",
        "The first retry comes at once, and each further one a second later, so our two retries took a second. "
        "Celery's default is 20 retries, which take 19 seconds, and the course's app has 5.",
        "The pauses grow from milliseconds to ten seconds, unless you set",
    )
    plain = Celery(set_as_current=False)
    plain.backend_cls = "redis://localhost:1/0"
    policy = plain.backend.retry_policy
    assert policy == {"max_retries": 20, "interval_start": 0, "interval_step": 1, "interval_max": 1}
    assert sum(fxrange(0, 1, 1, repeatlast=False)) == 1
    assert app.backend.retry_policy == policy | {"max_retries": 5}
    assert plain.conf.result_backend_max_retries == float("inf")
    assert not plain.conf.result_backend_always_retry and not plain.conf.task_track_started
    pauses = patient_pauses(monkeypatch)
    assert pauses == sorted(pauses) and (pauses[0], pauses[-1]) == (0.02, 10)


def test_a_worker_tries_once_to_store_a_result(monkeypatch):
    stands("02c", "`hasty` tried once to store the result, and gave up.")
    attempts = []

    def refused(self):
        attempts.append(self)
        raise ConnectionRefusedError

    monkeypatch.setattr(Connection, "_connect", refused)
    own = Celery(set_as_current=False)
    own.conf.result_backend_transport_options = course_app.conf.result_backend_transport_options
    own.backend_cls = "redis://localhost:1/0"
    with pytest.raises(RedisConnectionError):
        own.backend.store_result("an-id", 42, "SUCCESS")
    assert len(attempts) == 1


def test_a_client_subscribes_to_results_that_it_wants(project):
    stands(
        "02c", "Before a client sends a task, it subscribes to the task's result, and for that it needs the backend."
    )
    client = project.client()
    client.send_task("note", ignore_result=True)
    assert project.backend.pubsub_channels() == []
    asked = client.send_task("note")
    until(lambda: project.backend.pubsub_channels() == [f"celery-task-meta-{asked.id}".encode()], "it to subscribe")


@pytest.mark.parametrize("tracked", [False, True])
def test_without_started_a_task_runs_while_the_backend_is_away(project, tracked):
    stands(
        "02c",
        "With Celery's default, a worker doesn't store `STARTED`. Then this task would run, and only its result would "
        "be lost.",
    )
    notes(project, f"task_track_started = {tracked}", option=AWAY)
    project.client().send_task("note", args=("while it is away",))
    logged(project, "Exception raised outside body")
    assert ("noted: while it is away" in project.log()) is not tracked
    until(lambda: not project.broker.llen("celery") + project.broker.hlen("unacked"), "it to be acknowledged")


def test_a_worker_that_waits_for_its_backend_has_acknowledged_and_keeps_its_place(project):
    stands(
        "02c",
        "The price is that meanwhile the task keeps its place in the worker, so the tasks behind it wait as well. And "
        "if such a worker is killed while it waits, the result is lost after all.",
    )
    notes(project, "result_backend_always_retry = True", option=AWAY, more="--pool=threads -c 1")
    for text in ("first", "second"):
        project.client().send_task("note", args=(text,))
    logged(project, "Failed operation _store_result")
    until(lambda: project.log().count("received") == 2, "both")
    until(lambda: project.broker.hlen("unacked") == 1, "the first one to be acknowledged")
    assert "noted: first" in project.log() and "noted: second" not in project.log()
    [copy] = project.broker.hvals("unacked")  # of the second, which the broker would deliver again
    assert b"second" in base64.b64decode(json.loads(copy)[0]["body"])


def test_a_chord_never_ends_if_the_backend_is_away_for_one_of_its_tasks(project):
    stands("02c", "If the backend is away when one of them ends, the last task never starts.")
    notes(project, more="--pool=solo -Q up,celery -n up@%h")
    project.worker(NOTES_WORKER.format(option=AWAY, more="--pool=solo -Q down -n down@%h"))
    client = project.client()
    parts = [client.signature("note", args=(queue,), queue=queue) for queue in ("up", "down")]
    last = chord(parts, app=client)(client.signature("note", args=("last",), immutable=True))
    logged(project, "Exception raised outside body")
    logged(project, "succeeded")
    assert "noted: up" in project.log() and "noted: down" in project.log()
    assert client.send_task("note", args=("later",)).get(timeout=20) == "later"
    assert ("noted: last" in project.settled_log(), last.state) == (False, "PENDING")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the results' __del__
def test_a_client_that_was_connected_hears_at_once_that_the_backend_is_gone(project):
    stands(
        "02c",
        "(A client that was connected before may send one more task until it notices, and its `get` ends with a "
        "`ConnectionError` at once.)",
    )
    client = project.client()
    client.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 0}}
    asked = client.send_task("note")
    with pytest.raises(ResultTimeout):
        asked.get(timeout=0.01)
    project.backend.shutdown(nosave=True)
    # the latter if the client has noticed it already
    with pytest.raises((RuntimeError, OperationalError), match=r"Retry limit exceeded|Connection refused"):
        for _ in range(2):
            client.send_task("note")
    with pytest.raises(RedisConnectionError):  # and no RuntimeError, which comes after the retries
        asked.get(timeout=1)


def test_a_client_whose_backend_was_away_works_again_without_a_restart(project, tmp_path):
    stands("02c", "once the backend is back, the same client can send tasks and get their results again")
    port = free_port()
    command = [sys.executable, "-m", "course_tasks", "server", "--bind", "127.0.0.1", "--port", str(port)]
    client = project.client()
    client.backend_cls = f"redis://localhost:{port}/0"
    client.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1}}
    kept = []  # a result that ends while the backend is away looks for it
    for number in range(2):
        server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        try:
            until(lambda: listens(port), "the server")
            kept.append(client.send_task("note"))
            threading.Timer(1, client.backend.store_result, [kept[-1].id, number, "SUCCESS"]).start()
            assert kept[-1].get(timeout=20) == number
        finally:
            server.kill()
            server.wait()
        with pytest.raises(RuntimeError, match="must be restarted"):
            for _ in range(3):  # one or two may slip through
                kept.append(client.send_task("note"))


def test_of_a_task_that_ignores_its_result_started_is_not_stored_either(project):
    stands("02c", "the worker writes nothing about this task to the backend, neither `STARTED` nor a result.")
    notes(project, "task_track_started = True")
    before, client = writes(project), project.client()
    client.send_task("note", args=("ignored",), ignore_result=True)
    client.send_task("note", args=("not ignored",)).get(timeout=20)
    assert "noted: ignored" in project.settled_log() and writes(project) - before == 2


def test_the_longest_pause_of_a_patient_worker_can_be_set(monkeypatch):
    stands("02c", "unless you set `result_backend_max_sleep_between_retries_ms`, as `patient` does")
    pauses = patient_pauses(monkeypatch, result_backend_max_sleep_between_retries_ms=1000)
    assert pauses == sorted(pauses) and pauses[-1] == 1


def test_a_client_tries_as_often_at_each_attempt_to_send_a_task(project, monkeypatch):
    stands("02c", "A web site would be blocked at each attempt to send something.")
    client, waits = project.client(), []
    client.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 3}}
    client.backend_cls = AWAY.split()[1]
    monkeypatch.setattr("kombu.utils.functional.sleep", waits.append)
    for number in (1, 2, 3):
        with pytest.raises(RuntimeError, match="Retry limit exceeded"):
            client.send_task("note")
        assert sum(waits) == number * 2  # seconds, after a first retry at once


# --- 03 ------------------------------------------------------------------------------------------------------


def write_shop(folder: Path, head: str = 'app = Celery("shop")', module: str = "shop") -> None:
    """Write a small project: a module with an app and one task."""
    code = f"from celery import Celery\n\n{head}\n\n\n@app.task\ndef price():\n    return 9\n"
    folder.joinpath(f"{module}.py").write_text(code)


QUIET = "--pool=solo --without-mingle --without-gossip"


def test_the_worker_s_command_has_these_defaults():
    stands(
        "03",
        "The default is `WARNING`, which is very little",
        "it is the default",
        "`celery` is the default",
        "On the command line, `--include` (or `-I`) does what `include=` does",
    )
    options = {name: option for option in worker_command.params for name in option.opts}
    assert options["--loglevel"].default == "WARNING"
    assert Celery(set_as_current=False).conf.worker_pool == "prefork"
    assert Celery(set_as_current=False).conf.task_default_queue == "celery"
    assert options["--include"] is options["-I"]


def test_the_banner_never_shows_a_password_nor_whether_there_is_one():
    stands("03", "you see `:**` here whether there is one or not")
    app = Celery(set_as_current=False)
    shown = {app.connection(url).as_uri() for url in ("redis://localhost:1/0", "redis://:secret@localhost:1/0")}
    assert shown == {"redis://:**@localhost:1/0"}


def test_a_worker_can_leave_out_mingle_and_gossip():
    stands("03", "The last two options leave out its talk with other workers: mingle, and **gossip**")
    app = Celery("claims", broker="redis://", set_as_current=False)
    consumer = SimpleNamespace(app=app, hostname="w", pid=1, timer=None, hub=None)
    assert (Mingle(consumer).enabled, Mingle(consumer, without_mingle=True).enabled) == (True, False)
    assert (Gossip(consumer).enabled, Gossip(consumer, without_gossip=True).enabled) == (True, False)


def test_mingle_asks_for_revoked_tasks_and_waits_a_second_and_gossip_hears_the_others(project, tmp_path):
    stands(
        "03",
        "asks the other workers at this broker what it has missed, for example which tasks have been revoked",
        "It waits a second for the answers",
        "with which workers listen to each other's signs of life",
    )
    write_shop(tmp_path)
    project.worker("celery -A shop worker --pool=solo -n one@%h")
    project.client().control.revoke("a-revoked-task", reply=True, timeout=10, limit=1)
    project.worker("celery -A shop worker --pool=solo -n two@%h")
    two = f"two@{socket.gethostname()}"
    asked = project.client().control.inspect([two], timeout=5, limit=1)
    assert until(asked.revoked, "the second worker answers")[two] == ["a-revoked-task"]
    begin, end, *_ = re.findall(r"\[\S+ (\S+): INFO/MainProcess\] mingle: (?:searching|all alone)", project.log())
    second = [datetime.strptime(time, "%H:%M:%S,%f") for time in (begin, end)]
    assert (second[1] - second[0]).seconds >= 1
    waits = []
    control = SimpleNamespace(
        inspect=lambda timeout, **_: waits.append(timeout) or SimpleNamespace(hello=lambda *_: {})
    )
    state = SimpleNamespace(revoked=[])
    Mingle.send_hello(
        None,
        SimpleNamespace(
            app=SimpleNamespace(control=control),
            controller=SimpleNamespace(state=state),
            connection=None,
            hostname="w",
        ),
    )
    assert waits == [1]
    until(lambda: f"sync with {two}" in project.log(), "one hears of two")


def test_a_direct_exchange_passes_a_message_to_each_queue_with_exactly_its_key(pair):
    stands("03", "passes a message on to each queue that is registered with exactly the message's **routing key**")
    stands("03", "Celery gives exchange, key and queue the same name")
    exchange = kombu.Exchange("claims", type="direct")
    queues = [kombu.Queue(name, exchange, routing_key=key) for name, key in [("a", "k"), ("b", "k"), ("c", "kk")]]
    with Celery(set_as_current=False).connection_for_write() as connection, Redis.from_url(pair.broker) as broker:
        connection.Producer().publish(1, exchange=exchange, routing_key="k", declare=queues)
        assert {name: broker.llen(name) for name in "abc"} == {"a": 1, "b": 1, "c": 0}
    made = Celery(set_as_current=False).amqp.queues["mail"]
    assert (made.name, made.exchange.name, made.routing_key) == ("mail", "mail", "mail")


def test_which_variable_a_finds(tmp_path, monkeypatch):
    stands(
        "03",
        "1. the variable `app` of the module;",
        "2. its variable `celery`;",
        "3. if the module is a package: the same steps in its module `celery`",
        "4. the first variable that contains a Celery app, whatever it is called.",
    )
    monkeypatch.syspath_prepend(tmp_path)
    head = "from celery import Celery\n"
    both = head + 'other = Celery("other")\nlast = Celery("last")\n'
    named = both + 'celery = Celery("celery")\n'
    for name, code in {"step1": named + 'app = Celery("app")\n', "step2": named, "step4": both}.items():
        tmp_path.joinpath(f"{name}.py").write_text(code)
    for name, code in {"step3": both, "step3first": named}.items():
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "__init__.py").write_text(code)
        tmp_path.joinpath(name, "celery.py").write_text(head + 'whatever = Celery("in the module celery")\n')
    names = ("step1", "step2", "step3", "step4", "step4:last", "step4.last")
    found = {name: find_app(name).main for name in names}
    assert found == {
        "step1": "app",
        "step2": "celery",
        "step3": "in the module celery",
        "step4": "other",
        "step4:last": "last",
        "step4.last": "last",
    }


def test_solo_s_banner_has_the_number_of_processors_and_a_discarded_message_is_gone(project, tmp_path):
    stands("03", "the number of processors is Celery's default")
    stands("05", "The banner says `concurrency: 2 (solo)`, or the number of processors of your machine.")
    stands("03", "*Discarded* means that the message is gone. No other worker will get it, even if one knows the task.")
    write_shop(tmp_path)
    project.worker(f"celery -A shop worker {QUIET}")
    assert f"concurrency: {os.cpu_count()} (solo)" in project.log()
    project.client().send_task("unknown")
    until(lambda: "The message has been ignored and discarded." in project.log(), "the message is discarded")
    until(lambda: not project.broker.exists("celery", "unacked"), "nothing of the message is left in the broker")


def test_without_e_a_worker_reports_no_task_and_its_mailbox_is_called_pidbox(project, tmp_path, caplog):
    stands("03", "whether it reports each of its steps to monitoring programs. Without `-E` it doesn't")
    stands("03", "Celery's name for this mailbox is **pidbox**, and you meet that name in logs and in the broker.")
    write_tasks(tmp_path)
    reports = project.broker.pubsub()
    reports.psubscribe("*celeryev*")
    project.worker(f"celery -A tasks worker {QUIET}")
    assert project.broker.exists("_kombu.binding.celery.pidbox")
    project.client().send_task("nap", args=(0,)).get(timeout=20)
    done, heard = time.time(), []

    def beat() -> bool:
        found = reports.get_message(ignore_subscribe_messages=True, timeout=0.1)
        heard.append(found["channel"].decode() if found else "")
        return heard[-1].endswith("worker.heartbeat") and time.time() > done + 0.5

    until(beat, "a heartbeat after the task")
    assert {channel.partition(".celeryev/")[2].partition(".")[0] for channel in heard if channel} == {"worker"}
    with caplog.at_level("DEBUG"):
        kombu.pidbox.Mailbox("claims").Node("w", handlers={"hello": lambda state: 1}).dispatch("hello")
    assert "pidbox received method hello" in caplog.text


def test_with_e_a_worker_reports_each_step_of_a_task(project, tmp_path):
    stands("03", "whether it reports each of its steps to monitoring programs. Without `-E` it doesn't")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker -E {QUIET}")
    client, heard = project.client(), []
    with client.connection_for_read() as connection:
        receiver = client.events.Receiver(connection, handlers={"*": lambda event: heard.append(event["type"])})
        steps = receiver.itercapture(limit=None, timeout=20)
        next(steps)
        client.send_task("nap", args=(0,))
        until(lambda: next(steps, True) or "task-succeeded" in heard, "the last step")
    assert [kind for kind in heard if kind.startswith("task-")] == ["task-received", "task-started", "task-succeeded"]


# --- 03b -----------------------------------------------------------------------------------------------------


TASKS = """
import os
import time
from pathlib import Path

from celery import Celery, signals

app = Celery("tasks")
app.conf.task_track_started = True
{settings}


@signals.heartbeat_sent.connect
def touch(**_):
    Path("beats.txt").touch()


@app.task(name="nap")
def nap(seconds):
    time.sleep(seconds)


@app.task(name="fail")
def fail():
    raise ValueError("on purpose")


@app.task(name="bye")
def bye():
    app.control.shutdown()


@app.task(name="hold")
def hold():
    while not Path("go").exists():
        time.sleep(0.05)
"""


def write_tasks(folder: Path, settings: str = "") -> None:
    """Write a module `tasks` with an app and a few tasks."""
    folder.joinpath("tasks.py").write_text(TASKS.format(settings=settings))


def heartbeat_age(folder: Path) -> float:
    """How many seconds ago the worker's last heartbeat was."""
    return time.time() - folder.joinpath("beats.txt").stat().st_mtime


def test_inspect_waits_a_second_and_a_worker_without_a_name_is_called_celery(project):
    stands("03b", "so it waits for the whole `timeout`, by default one second")
    stands("03b", "Without `-n`, a worker is called `celery@` and the name of its machine")
    stands("03b", "Every two seconds its main process sends a **heartbeat**")
    begin = time.monotonic()
    assert project.client().control.inspect(["nobody@nowhere"]).ping() is None
    assert time.monotonic() - begin >= 1
    assert inspect.signature(Inspect).parameters["timeout"].default == 1
    assert default_nodename(None) == f"celery@{socket.gethostname()}"
    assert Heart(None, eventer=SimpleNamespace(on_enabled=set(), on_disabled=set())).interval == 2


def test_twins_make_celery_warn(project, tmp_path):
    stands("03b", "It also prints a `DuplicateNodenameWarning`")
    write_tasks(tmp_path)
    for _ in range(2):
        project.worker(f"celery -A tasks worker {QUIET}")
    said = project.run("celery -A tasks status --timeout 3")
    assert "DuplicateNodenameWarning" in said and "1 node online" in said


def test_at_warning_a_worker_writes_only_about_tasks_that_fail(project, tmp_path):
    stands("03b", "Celery would have written a line there only if a task had failed.")
    write_tasks(tmp_path)
    for name, args in (("nap", (0,)), ("fail", ()), ("bye", ())):
        project.client().send_task(name, args=args)
    said = project.run(f"celery -A tasks worker --loglevel=WARNING {QUIET}").partition("key=celery")[2]
    assert re.findall(r"Task (\w+)\[", said) == ["fail"]
    stands("03b", "A failed task is written at the level ERROR")
    assert re.findall(r"(\w+)/MainProcess\] Task", said) == ["ERROR"]


def test_two_workers_share_and_answer_the_table_s_questions_and_a_shutdown_is_warm(project, tmp_path):
    stands("03b", "each message goes to exactly one worker")
    stands("03b", "| `registered()` | the names of the tasks that it knows |")
    stands("03b", "| `active_queues()` | the queues that it takes messages from |")
    stands("03b", "| `stats()` | figures about itself: its pid, its pool, how many tasks of each name it has started |")
    stands("03b", "`celery inspect active -d NODE`", "That is a warm stop", "so no running task was lost")
    stands("03", "(In a terminal, `celery inspect stats` does the same")
    stands("04", "does what the command `celery inspect registered` does")
    stands("04b", "as `celery inspect scheduled` does")
    write_tasks(tmp_path)
    host = socket.gethostname()
    for name in ("one", "two"):
        project.worker(f"celery -A tasks worker {QUIET} -n {name}@%h -Q celery,{name} --pool=prefork -c 1")
    client = project.client()
    for result in [client.send_task("nap", args=(0.1,)) for _ in range(6)]:
        result.get(timeout=20)
    asked = client.control.inspect(timeout=5, limit=2)
    stats = asked.stats()
    totals = [stats[f"{name}@{host}"]["total"]["nap"] for name in ("one", "two")]
    assert sum(totals) == 6 and min(totals) > 0
    assert stats[f"one@{host}"]["pool"]["max-concurrency"] == 1 and psutil.pid_exists(stats[f"one@{host}"]["pid"])
    assert asked.registered()[f"two@{host}"] == ["bye", "fail", "hold", "nap"]
    assert {queue["name"] for queue in asked.active_queues()[f"two@{host}"]} == {"celery", "two"}
    long = client.send_task("hold", queue="one")
    later = client.send_task("nap", args=(0,), countdown=60, queue="one")
    until(lambda: long.state == "STARTED", "the task starts")
    questions = ("stats", "registered", "scheduled", f"active -d one@{host}")
    project.run(
        "sh -c '"
        + " & ".join(f"celery inspect --timeout 3 {it} >{n} 2>&1" for n, it in enumerate(questions))
        + " & wait'",
        seconds=60,
    )
    said = [tmp_path.joinpath(str(n)).read_text() for n in range(4)]
    assert str(stats[f"two@{host}"]["pid"]) in said[0] and "* fail" in said[1] and later.id in said[2]
    assert long.id in said[3] and f"one@{host}" in said[3] and f"two@{host}" not in said[3]
    client.control.shutdown([f"one@{host}"])
    logged(project, "Got shutdown from remote")
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(stats[f"one@{host}"]["pid"]).wait(1.5)
    tmp_path.joinpath("go").touch()
    until(lambda: not psutil.pid_exists(stats[f"one@{host}"]["pid"]), "the worker ends")
    assert long.state == "SUCCESS" and list(client.control.inspect(timeout=1).ping()) == [f"two@{host}"]


def test_active_reserved_and_scheduled(project, tmp_path):
    stands("03b", "| `active()` | the tasks that it is running now |")
    stands("03b", "| `reserved()` | the tasks that it has taken and not started yet |")
    stands("03b", "| `scheduled()` | the tasks that it has taken and that have to wait for their time |")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET} --pool=threads --concurrency=1")
    client = project.client()
    ids = [client.send_task(name, countdown=wait).id for name, wait in (("hold", 0), ("hold", 0), ("hold", 600))]
    until(lambda: client.AsyncResult(ids[0]).state == "STARTED", "the first task starts")
    until(lambda: not project.broker.llen("celery"), "the worker has taken all three")

    def asked(question: str) -> list[str]:
        [found] = (getattr(client.control.inspect(timeout=10, limit=1), question)() or {"": None}).values()
        return [task.get("request", task)["id"] for task in found or ()]

    until(lambda: asked("scheduled"), "the third task is there")
    assert {question: asked(question) for question in ("active", "reserved", "scheduled")} == {
        "active": ids[:1],
        "reserved": ids[1:2],
        "scheduled": ids[2:],
    }
    stands("03b", "it has started |", "has started so far", "Tasks that it has only reserved don't count.")
    assert node_stats(client, "celery")["total"] == {"hold": 1}


def test_a_solo_worker_sends_no_heartbeat_while_it_runs_a_task(project, tmp_path):
    stands("03b", "a `solo` worker doesn't send heartbeats while it runs a task")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET}")
    until(lambda: tmp_path.joinpath("beats.txt").exists(), "the first heartbeat")
    result = project.client().send_task("hold")
    until(lambda: heartbeat_age(tmp_path) > 4, "the heartbeats are old")
    assert result.state == "STARTED"
    tmp_path.joinpath("go").touch()
    until(lambda: heartbeat_age(tmp_path) < 1, "the heartbeats go on")


def test_without_a_broker_there_is_no_heartbeat(project, tmp_path):
    stands("03b", "without a broker there is no heartbeat either")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET}")
    until(lambda: tmp_path.joinpath("beats.txt").exists(), "the first heartbeat")
    stands("03b", "the worker has lost its connection to the broker | no, it connects again by itself |")
    stands("03b", "Pings travel through the broker, so without it nobody can answer")
    project.broker.shutdown(nosave=True)
    with pytest.raises(WrongAnswer, match="ended with an error"):  # so a probe fails
        project.run("celery -A tasks inspect ping", seconds=60)
    until(lambda: heartbeat_age(tmp_path) > 5, "the heartbeats are old")
    assert "Connection to broker lost" in project.log()
    logged(project, "Trying again in ")


def test_no_remote_control_means_no_answers_and_no_orders(project, tmp_path):
    stands("03b", "Workers with the setting `worker_enable_remote_control = False` obey no orders")
    stands("03b", "`celery -A course_tasks control shutdown` does the same in a terminal")
    write_tasks(tmp_path, "app.conf.worker_enable_remote_control = False")
    project.worker(f"celery -A tasks worker {QUIET} -n deaf@%h")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET} -n hears@%h -Q other")
    with contextlib.suppress(WrongAnswer):  # nobody answers such an order, which the program takes for an error
        project.run("celery -A tasks control --timeout 1 shutdown")
    until(lambda: "Got shutdown from remote" in project.log(), "the other worker stops")
    assert project.client().control.ping(timeout=1) == []
    project.client().send_task("nap", args=(0,)).get(timeout=10)


def test_a_program_that_cannot_reach_the_broker_gets_an_error_and_not_none():
    stands("03b", "you get an `OperationalError` after a few seconds, and not `None`")
    app = Celery(set_as_current=False)
    app.conf.broker_read_url = app.conf.broker_write_url = f"redis://localhost:{free_port()}/0"
    with pytest.raises(OperationalError):
        app.control.inspect(timeout=1).ping()


def test_in_a_terminal_d_names_the_node_that_an_order_is_for(project, tmp_path):
    stands("03b", "To prevent such accidents, always give nodes (`-d NODE` in a terminal).")
    write_tasks(tmp_path)
    for name in ("one", "two"):
        project.worker(f"celery -A tasks worker {QUIET} -n {name}@%h")
    one, two = (node_stats(project.client(), name)["pid"] for name in ("one", "two"))
    with contextlib.suppress(WrongAnswer):  # nobody answers such an order, which the program takes for an error
        project.run(f"celery -A tasks control --timeout 1 -d one@{socket.gethostname()} shutdown")
    until(lambda: not psutil.pid_exists(one), "the end of the first worker")
    assert node_stats(project.client(), "two")["pid"] == two


# --- 03c -----------------------------------------------------------------------------------------------------


RISK = """
import os
import signal
import time

from celery import Celery

app = Celery("risk")
app.conf.task_track_started = True
app.conf.update(SETTINGS)


@app.task(name="early")
def early(seconds, label=""):
    print(f"began {label}", flush=True)
    time.sleep(seconds)


@app.task(name="late", acks_late=True)
def late(seconds, label=""):
    print(f"began {label}", flush=True)
    time.sleep(seconds)


@app.task(name="poison", acks_late=True, reject_on_worker_lost=True)
def poison():
    print("began", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="limited", retry_on_worker_lost=True, max_retries=2, default_retry_delay=0.1)
def limited():
    print("began", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
RISKY = "python -m celery -A risk worker --without-mingle --without-gossip"
FAST = {"unacked_restore_interval": 1, "unacked_restore_throttle": 1}


def write_risk(folder: Path, **settings) -> None:
    """Write a module `risk` with an app and tasks that don't survive everything."""
    folder.joinpath("risk.py").write_text(RISK.replace("SETTINGS", repr(settings)))


def test_the_defaults_for_a_worker_s_end(project):
    stands("03c", "By default the setting is 0, so there is no waiting.")
    stands("03c", "That is an hour by default")
    stands("03c", "times `worker_prefetch_multiplier` (4 by default)")
    defaults = Celery(set_as_current=False).conf
    assert defaults.worker_soft_shutdown_timeout == 0
    assert defaults.worker_prefetch_multiplier == 4
    with project.client().connection_for_read() as connection:
        assert connection.default_channel.visibility_timeout == Channel.visibility_timeout == 3600
    assert not defaults.task_acks_late and not defaults.task_reject_on_worker_lost


def test_the_lock_of_a_worker_that_was_killed_while_it_put_messages_back(project):
    stands("03c", "If it is killed then, the lock stays for `unacked_mutex_expire` seconds, by default 300.")
    for options, seconds in (({}, 300), ({"unacked_mutex_expire": 5}, 5)):
        client = project.client()
        client.conf.broker_transport_options = options
        with client.connection_for_read() as connection, project.broker.monitor() as watched:
            channel = connection.default_channel
            channel.qos.restore_visible(interval=1)
            lock = next(line["command"] for line in watched.listen() if "SET unacked_mutex" in line["command"])
            assert lock.endswith(f"NX PX {seconds * 1000}")
            with project.broker.pipeline() as pipe:  # as the worker that was killed has left it
                pipe.zadd("unacked_index", {"tag": 0})
                pipe.set("unacked_mutex", "killed")
                pipe.execute()
            channel.qos.restore_visible(interval=1)
            assert project.broker.zcard("unacked_index") == 1
            project.broker.delete("unacked_mutex")
            channel.qos.restore_visible(interval=1)
            assert not project.broker.exists("unacked_index")


def regular_look(connection) -> tuple[float, Callable[[], None]]:
    """After how many seconds a worker's event loop looks through `unacked` again, and the function that it calls."""
    loop = MagicMock()
    connection.transport.register_with_event_loop(connection.connection, loop)
    timers = {call.args[1].__name__: call.args for call in loop.call_repeatedly.call_args_list}
    return timers["maybe_restore_messages"]


def test_workers_look_through_unacked_every_hundred_seconds(project):
    """A worker looks at its start. Later its event loop asks every ten seconds, and every tenth time it looks."""
    stands("03c", "By default they look only every 100 seconds.")

    def looks() -> int:
        return project.broker.info("commandstats")["cmdstat_zrange"]["calls"]

    seen = []
    with (
        project.client().connection_for_read() as connection,
        connection.channel() as channel,
        kombu.Consumer(channel, [Queue("celery")]),
    ):
        seconds, look = regular_look(connection)
        for _ in range(20):
            look()
            seen.append(looks())
    assert seconds == 10 and seen == [1] * 9 + [2] * 10 + [3]


@pytest.mark.parametrize(
    "row, sent, task",
    [
        ("SIGTERM", "SIGTERM", "early"),
        ("SIGQUIT, acknowledged early", "SIGQUIT", "early"),
        ("SIGQUIT, `acks_late`", "SIGQUIT", "late"),
    ],
)
def test_how_each_pool_stops(project, tmp_path, row, sent, task):
    stands("03c", "Each worker had three tasks of three seconds and `--concurrency=1`")
    text = "\n".join(cell.source for cell in cells(copies.chapters()["03c"], "markdown"))
    pools = re.search(r"(?m)^\| Signal \| (prefork .*) \|$", text)[1].split(" | ")
    said = re.search(rf"(?m)^\| {re.escape(row)} \| (.*) \|$", text)[1].split(" | ")
    write_risk(tmp_path)
    client, pids, results = project.client(), {}, {}
    for pool in pools:
        project.worker(f"{RISKY} --pool={pool} --concurrency=1 -n {pool}@%h -Q {pool}")
        pids[pool] = node_stats(client, pool)["pid"]
    for pool in pools:
        results[pool] = [client.send_task(task, args=(3, pool), queue=pool) for _ in range(3)]
        until(lambda: f"began {pool}" in project.log(), f"{pool} starts the first task")  # noqa: B023
        # a message that a worker is just taking when it is stopped may be lost, so it has all that it takes first
        for result in results[pool][: {"solo": 1, "gevent": 2, "eventlet": 2}.get(pool, 3)]:
            logged(project, f"[{result.id}] received")
        if pool == "prefork":
            accepted(client, pool)
        os.kill(pids[pool], getattr(signal, sent))
    until(lambda: not any(map(psutil.pid_exists, pids.values())), "all workers have ended")
    done = {pool: sum(result.state == "SUCCESS" for result in results[pool]) for pool in pools}
    for pool, claim in zip(pools, said, strict=True):
        found = f"{done[pool]} done, {project.broker.llen(pool)} back"
        assert found == claim or (claim == "at least 1 done" and done[pool] >= 1), (pool, found)


def test_sigquit_is_a_cold_stop_and_a_soft_timeout_makes_no_difference_to_sigterm(project, tmp_path):
    stands("03c", "The signal SIGQUIT asks for it directly.")
    stands("03c", "a warm stop waits for the running tasks anyway, however long they take")
    stands("03c", "The long task was ended after two seconds", "that fits into the ten seconds of `docker stop`")
    stands("03c", "Without that option it would have been lost")
    write_risk(tmp_path, worker_soft_shutdown_timeout=0.5)
    client = project.client()
    for number, seconds in ((1, 6), (2, 60)):
        project.worker(f"{RISKY} --concurrency=1 -n w{number}@%h -Q q{number}")
        result = client.send_task("early", args=(seconds,), queue=f"q{number}")
        pid = node_stats(client, f"w{number}")["pid"]
        accepted(client, f"w{number}")
        asked = time.monotonic()
        os.kill(pid, {1: signal.SIGTERM, 2: signal.SIGQUIT}[number])
        until(lambda: not psutil.pid_exists(pid), "the worker ends")  # noqa: B023
        assert result.state == {1: "SUCCESS", 2: "RETRY"}[number]
        assert number == 1 or type(result.result).__name__ == "Retry"
        assert not project.broker.exists(f"q{number}", "unacked")
        # what docker waits for, and far more than the 0.5 s of the setting; a warm stop waits for its task, too
        assert time.monotonic() - asked < 10 + (seconds if number == 1 else 0)
        assert ("Cold shutdown" in project.log()) == (number == 2)


def test_a_child_waits_thirty_seconds_at_most_until_its_last_result_is_counted(monkeypatch):
    stands("03c", "With prefork, a stop may take 30 seconds longer than the tasks.", "count its last result")
    waited = []
    monkeypatch.setattr("billiard.pool.time", SimpleNamespace(sleep=waited.append))
    child = SimpleNamespace(on_ready_counter=SimpleNamespace(value=1))
    assert billiard.pool.Worker._ensure_messages_consumed(child, completed=1) and not waited
    assert not billiard.pool.Worker._ensure_messages_consumed(child, completed=2) and sum(waited) == pytest.approx(30)


def test_sigterm_to_all_processes_ends_the_running_task_and_sigint_does_not(project, tmp_path):
    stands("03c", "That includes prefork's children, and these drop their tasks at once")
    stands("03c", "(Ctrl-C reaches the children as well, but they ignore SIGINT.)")
    write_risk(tmp_path)
    client = project.client()
    states = []
    for name in ("SIGTERM", "SIGINT"):
        project.worker(f"{RISKY} --concurrency=1 -n {name}@%h -Q {name}")
        pid = node_stats(client, name)["pid"]
        result = client.send_task("late", args=(6,), queue=name)
        until(lambda: result.state == "STARTED", "the task starts")  # noqa: B023
        os.killpg(pid, getattr(signal, name))
        until(lambda: not psutil.pid_exists(pid), "the worker ends")  # noqa: B023
        states.append(type(result.result).__name__ if result.failed() else result.state)
    assert states == ["WorkerLostError", "SUCCESS"]


def test_a_lost_child_is_acknowledged_and_a_poisonous_task_comes_back_or_is_given_up(project, tmp_path):
    stands("03c", "stores the failure `WorkerLostError`, and acknowledges the message")
    stands("03c", "(If only a prefork child is killed, the main process stores `FAILURE` instead.)")
    stands("03c", "It would come back for ever.", "That counts the attempts and gives up after the last one")
    write_risk(tmp_path, worker_lost_wait=0.5)
    client = project.client()
    project.worker(f"{RISKY} --concurrency=1 -n w@%h -Q q")
    lost = client.send_task("late", args=(60,), queue="q")
    until(lambda: project.log().count("began") == 1, "the task starts")
    os.kill(node_stats(client, "w")["pool"]["processes"][0], signal.SIGKILL)
    until(lambda: lost.state == "FAILURE", "the main process stores the failure")
    until(lambda: not project.broker.exists("q", "unacked"), "the message is acknowledged")
    early = client.send_task("early", args=(60,), queue="q")
    until(lambda: project.log().count("began") == 2, "the task starts")
    os.kill(node_stats(client, "w")["pool"]["processes"][0], signal.SIGKILL)
    assert type(early.get(timeout=20, propagate=False)).__name__ == "WorkerLostError"
    limited = client.send_task("limited", queue="q")
    until(lambda: limited.state == "FAILURE", "Celery gives up")
    assert type(limited.result).__name__ == "WorkerLostError"
    until(lambda: project.log().count("began") == 2 + 3, "its three starts in the log")
    client.send_task("poison", queue="q")
    until(lambda: project.log().count("began") >= 2 + 3 + 4, "the task comes back again and again")


def test_messages_taken_ahead_get_too_old_and_with_a_multiplier_of_1_they_do_not(project, tmp_path):
    stands("03c", "The messages that a worker has prefetched get older as well, while they wait for a free process.")
    stands("03c", "as long as it waits, it is in `unacked`, even without `acks_late`")
    client = project.client()
    for multiplier, task, timeout, seconds in ((1, "late", 10, 2.5), (4, "late", 3, 2.5), (4, "early", 3, 2.5)):
        transport = {"visibility_timeout": timeout, **FAST}
        write_risk(tmp_path, broker_transport_options=transport, worker_prefetch_multiplier=multiplier)
        name = f"{task}{multiplier}"
        project.worker(f"{RISKY} --concurrency=1 -n {name}@%h -Q {name}")
        begun = f"began {name}"
        # the five of them are longer than the timeout, and one is not
        results = [client.send_task(task, args=(seconds, name), queue=name) for _ in range(5)]
        if multiplier == 1:
            until(lambda: all(result.ready() for result in results), "all tasks are done")  # noqa: B023
            until(lambda: not project.broker.exists(name, "unacked"), "no message is left")  # noqa: B023
            assert project.log().count(begun) == 5
        else:
            until(lambda: project.log().count(begun) > 5, "a task runs a second time")  # noqa: B023
        pid = node_stats(client, name)["pid"]
        client.control.shutdown()
        until(lambda: not psutil.pid_exists(pid), "the worker has ended")  # noqa: B023


def test_a_worker_with_a_short_timeout_puts_back_the_messages_of_the_others(project, tmp_path):
    stands("03c", "a single worker with a short timeout puts back the messages of all others")
    stands("03c", "is started once more each time the visibility timeout has passed")
    write_risk(tmp_path)
    project.worker(f"{RISKY} --pool=threads --concurrency=4 -n patient@%h -Q q")
    result = project.client().send_task("late", args=(60,), queue="q")
    until(lambda: result.state == "STARTED", "the task starts")
    write_risk(tmp_path, broker_transport_options={"visibility_timeout": 1, **FAST})
    project.worker(f"{RISKY} --pool=solo -n hasty@%h -Q other")
    until(lambda: project.log().count("began") >= 3, "the patient worker starts the task again, and again")
    assert result.state == "STARTED"


def test_a_look_puts_back_every_message_that_is_old_enough(project):
    stands("03c", "put back every message that has been there for longer than the **visibility timeout**")
    client = project.client()
    client.conf.broker_transport_options = {"visibility_timeout": 0.1, **FAST}
    for _ in range(15):
        client.send_task("buy", queue="shelf", ignore_result=True)
    with (
        client.connection_for_read() as other,
        client.connection_for_read() as connection,
        connection.channel() as channel,
        kombu.Consumer(channel, [Queue("celery")]),
    ):
        _, look = regular_look(connection)
        queue = other.SimpleQueue("shelf")
        for _ in range(15):
            queue.get(timeout=10)
        assert project.broker.hlen("unacked") == 15
        time.sleep(0.2)  # longer than the visibility timeout
        look()
        assert (project.broker.llen("shelf"), project.broker.hlen("unacked")) == (15, 0)


@pytest.mark.parametrize("green", ["gevent", "eventlet"])
@pytest.mark.parametrize("pool, option", [(None, {"polling_interval": 10}), ("threads", {})])
def test_an_idle_green_worker_puts_nothing_back_unless_it_is_told_to(project, tmp_path, green, pool, option):
    stands(
        "03c",
        "a worker with gevent or eventlet (chapter 05) doesn't look through `unacked` while it waits for messages.",
    )
    stands(
        "03c", 'add `"polling_interval": 10` to `broker_transport_options`.', "it looks for all queues of the broker."
    )
    fast = {"visibility_timeout": 1, **FAST}
    write_risk(tmp_path, broker_transport_options=fast)
    project.worker(f"{RISKY} --pool={green} -n first@%h -Q green", seconds=60)
    client = project.client()
    client.send_task("buy", queue="shelf", ignore_result=True)

    def waits() -> int:
        return project.broker.info("commandstats").get("cmdstat_brpop", {"calls": 0})["calls"]

    with client.connection_for_read() as connection:
        connection.SimpleQueue("shelf").get(timeout=10)
        begin = waits()
        until(lambda: waits() > begin + 5, "it waits again and again, a second each time")
        assert (project.broker.hlen("unacked"), project.broker.llen("shelf")) == (1, 0)
        write_risk(tmp_path, broker_transport_options=fast | option)
        project.worker(f"{RISKY} --pool={pool or green} -n second@%h -Q other", seconds=60)
        until(lambda: project.broker.llen("shelf") == 1, "the message is back")


def test_sigquit_itself_waits_for_the_soft_timeout(project):
    stands("03c", "a cold stop waits for that many seconds before it ends the running tasks")
    (project.folder / "holds.py").write_text(HOLDS + "app.conf.worker_soft_shutdown_timeout = 30\n")
    project.worker(f"{HOLDS_WORKER} --pool=prefork -c 1")
    pid = node_stats(project.client(), "celery")["pid"]
    result = project.client().send_task("hold")
    accepted(project.client(), "celery")
    os.kill(pid, signal.SIGQUIT)
    logged(project, "Initiating Soft Shutdown")
    (project.folder / "go").touch()
    until(lambda: not psutil.pid_exists(pid), "the end of the worker", seconds=40)
    assert result.state == "SUCCESS"


def test_a_task_that_waits_for_its_time_goes_back_at_a_warm_stop(project, tmp_path):
    stands("03c", "running tasks are finished, and waiting ones go back")
    write_risk(tmp_path)
    project.worker(f"{RISKY} --pool=solo")
    client = project.client()
    client.send_task("early", args=(0,), countdown=600)
    pid = node_stats(client, "celery")["pid"]
    until(lambda: project.broker.hlen("unacked") == 1, "the worker to take it")
    os.kill(pid, signal.SIGTERM)
    until(lambda: not psutil.pid_exists(pid), "the end of the worker")
    assert (project.broker.llen("celery"), project.broker.hlen("unacked")) == (1, 0)


# --- 03d -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head, tasks",
    [
        ('app = Celery("shop", include=["stock"])', "stock.count"),
        ('app = Celery("shop")\napp.conf.imports = ["stock"]', "stock.count"),
        ('app = Celery("shop")\napp.autodiscover_tasks(["store"])', "store.tasks.count"),
    ],
)
def test_three_ways_to_a_second_module(project, tmp_path, head, tasks):
    stands("03d", '| the setting `app.conf.imports = ["stock"]` | exactly these modules | the same |')
    stands("03d", "the package `store` and its module `store.tasks`")
    write_shop(tmp_path, head)
    tmp_path.joinpath("store").mkdir()
    for module in ("stock.py", "store/tasks.py", "store/video.py"):
        tmp_path.joinpath(module).write_text("from shop import app\n\n\n@app.task\ndef count():\n    return 3\n")
    project.worker(f"python -m celery -A shop worker {QUIET}")
    assert re.findall(r"\n  \. (\S+)", project.log()) == ["shop.price", tasks]


def test_a_missing_package_and_a_bare_celery_stop_a_worker_that_discovers_tasks(project, tmp_path):
    stands("03d", "with no package `store`, the worker doesn't start")
    stands("03d", "The bare command `celery` looks for the app and for the modules in `include` in the current folder")
    write_shop(tmp_path, 'app = Celery("shop")\napp.autodiscover_tasks(["store"])')
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'store'"):
        project.worker(f"python -m celery -A shop worker {QUIET}")
    tmp_path.joinpath("store").mkdir()
    tmp_path.joinpath("store/tasks.py").touch()
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'store'"):
        project.worker(f"celery -A shop worker {QUIET}")


def test_a_package_without_tasks_and_an_app_without_tasks_start_without_a_word(project, tmp_path):
    stands("03d", "The worker has started all the same, and says nothing about it.")
    stands("03", "`[tasks]` is empty, and the worker gets ready without any warning")
    tmp_path.joinpath("store").mkdir()
    tmp_path.joinpath("store/video.py").touch()
    tmp_path.joinpath("auto.py").write_text(
        'from celery import Celery\napp = Celery("auto")\napp.autodiscover_tasks(["store"])'
    )
    project.worker(f"python -m celery -A auto worker {QUIET}")
    said = project.log()
    assert "store" not in said and re.search(r"\[tasks\]\s+\[", said)
    assert set(re.findall(r"\w*Warning", said)) <= {"SecurityWarning"}  # it is there for root only
    assert re.findall(r": (\w+)/MainProcess", said) == ["INFO", "INFO"]  # connected, ready


@pytest.mark.parametrize(
    "head", ['app = Celery("shop", include=["stok"])', 'app = Celery("shop")\napp.conf.imports = ["stok"]']
)
def test_a_worker_doesn_t_start_with_an_unknown_module(project, tmp_path, head):
    stands("03d", "exactly these modules | the worker doesn't start: `ModuleNotFoundError`")
    write_shop(tmp_path, head)
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'stok'"):
        project.worker(f"celery -A shop worker {QUIET}")


def test_a_wrong_value_stops_the_worker_without_naming_the_setting_or_is_taken(project, tmp_path):
    stands(
        "03d",
        '`worker_prefetch_multiplier = "four"` stops the worker with a `ValueError` that doesn\'t name the setting',
    )
    stands("03d", '`task_time_limit = "3"`, a text, lets it start')
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.worker_prefetch_multiplier = "four"')
    with pytest.raises(WrongAnswer, match="ready: ValueError: ") as error:
        project.worker(f"celery -A shop worker {QUIET}")
    assert "worker_prefetch_multiplier" not in str(error.value)
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limit = "3"')
    project.worker(f"celery -A shop worker {QUIET}")


def test_report_reads_the_file_and_inspect_conf_asks_the_worker(project, tmp_path):
    stands("03d", "`celery -A shop inspect conf` asks the running workers", "Neither of them marks a wrong name.")
    stands("03d", "it imports the app, and lists the settings in the file as it is now")
    stands("03d", "`celery -A shop report` asks nobody", "together with the versions of Celery and Python")
    stands("03d", "**d.** Celery stores every name that you set, and reads only those that it knows.")
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 4')
    report = project.run("celery -A shop report")  # no worker is running
    assert "\ntask_time_limt: 4\n" in report
    assert f"celery:{celery.__version__} " in report and f"py:{platform.python_version()}\n" in report
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 3')
    project.worker(f"celery -A shop worker {QUIET}")
    assert "limt" not in project.log()  # nobody reports it
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 4')
    assert '"task_time_limt": 3' in project.run("celery -A shop inspect conf")
    assert Celery(set_as_current=False).conf.task_time_limit is None


def test_conf_tells_also_of_what_is_turned_off(project, tmp_path):
    stands("03d", "The question `conf` asks a worker for all settings that its app or the worker itself has set.")
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.update(task_publish_retry=False, result_expires=None)')
    project.worker(f"celery -A shop worker {QUIET}")
    [told] = until(lambda: project.client().control.inspect(timeout=5, limit=1).conf(), "an answer").values()
    assert told["task_publish_retry"] is False and told["result_expires"] is None


def test_celery_s_list_of_names_has_every_setting_that_has_a_default():
    stands("03d", "Celery has a list of nearly all names that it knows.")
    stands("03d", "(Settings for another package, such as RedBeat in chapter 10, aren't on it either.)")
    app = Celery(set_as_current=False)
    assert set(app.conf.table(with_defaults=True)) - {"deprecated_settings"} == SETTING_KEYS
    assert not SETTING_KEYS & {"result_backend_thread_safe", "redbeat_redis_url", "redbeat_lock_timeout"}
    app.conf.result_backend_thread_safe = True
    assert app.backend.thread_safe, "which Celery reads all the same"


def test_a_package_without_tasks_does_not_keep_the_next_one_out(project, tmp_path):
    stands("03d", "The worker has started all the same, and says nothing about it.")
    for package, module in (("store", "video"), ("films", "tasks")):
        tmp_path.joinpath(package).mkdir()
        tmp_path.joinpath(package, f"{module}.py").write_text(
            "from shop import app\n@app.task(name='count')\ndef count(): ..."
        )
    write_shop(tmp_path, 'app = Celery("shop")\napp.autodiscover_tasks(["store", "films"])')
    project.worker(f"python -m celery -A shop worker {QUIET}")
    assert re.findall(r"^  \. (\S+)$", project.log(), re.MULTILINE) == ["count", "shop.price"]


# --- 04 ------------------------------------------------------------------------------------------------------

REPORT = """
from celery import Celery
app = Celery("reports")
@app.task(name="report", queue="reports", expires=60, time_limit=30, ignore_result=True)
def report(year):
    return year
"""


def test_what_a_decorator_says_is_read_where_the_row_says(project):
    stands(
        "04",
        "| `queue`, `priority`, `expires`, `serializer` | the program that *sends*,",
        "| `time_limit`, `soft_time_limit` | both: the sender puts them into the message, if it has the code.",
        "| `acks_late`, `max_retries`, `autoretry_for`, `rate_limit`, `track_started` | the *worker*",
        'without our `queue="look"` it would have gone to the queue `celery`',
    )
    options = 'priority=3, serializer="pickle", expires=60'
    (project.folder / "reports.py").write_text(REPORT.replace("expires=60", options))
    project.run("python -c 'from reports import report; report.delay(1)'")
    with_code = json.loads(project.broker.lindex("reports\x06\x163", 0))  # with Redis, 3 has a list of its own
    assert with_code["properties"]["priority"] == 3 and "python" in with_code["content-type"]
    project.client().send_task("report", args=(1,))
    [message] = [json.loads(text) for text in project.broker.lrange("celery", 0, -1)]
    sender = {"queue", "priority", "expires", "time_limit", "soft_time_limit", "serializer"}
    worker = {"acks_late", "max_retries", "autoretry_for", "rate_limit", "track_started"}
    travels = extract_exec_options(add).keys()  # what `delay` and `apply_async` take from the task
    assert sender <= travels and not worker & travels
    assert not {name for name in worker if f'"{name}"' in json.dumps(message)}


def test_send_task_uses_the_options_of_a_task_that_its_app_has_registered(project):
    stands(
        "04",
        "It uses these options (except `ignore_result`) only if its app has already registered the task.",
        "A program that only defines the task and then calls `send_task` sends none of the options",
    )
    (project.folder / "reports.py").write_text(REPORT)
    send = 'app.send_task("report", args=(2,))'
    project.run(f"python -c 'from reports import app, report; {send}; report.delay(1); {send}'")
    [message] = project.broker.lrange("celery", 0, -1)
    unregistered = json.loads(message)["headers"]
    assert (unregistered["expires"], unregistered["timelimit"]) == (None, [None, None])
    by_name, with_code = [json.loads(text)["headers"] for text in project.broker.lrange("reports", 0, -1)]
    assert by_name["expires"] and by_name["timelimit"] == with_code["timelimit"] == [30, None]
    assert (by_name["ignore_result"], with_code["ignore_result"]) == (None, True)


def test_rabbitmq_drops_properties_that_it_does_not_know():
    stands("04", "(RabbitMQ drops properties that it does not know.)")
    # what py-amqp, the client for RabbitMQ, puts on the wire
    assert (
        Message("", apply_async=True, priority=1)._serialize_properties()
        == Message("", priority=1)._serialize_properties()
    )


def test_a_name_that_is_unknown_is_found_by_the_worker_and_a_missing_argument_too(project):
    stands(
        "04",
        '`client.send_task("add", args=(4,))` would not complain. The worker would then raise the same `TypeError`',
    )
    (project.folder / "reports.py").write_text(REPORT.replace(", ignore_result=True", ""))
    project.worker("celery -A reports worker --pool=solo --without-mingle -Q reports")
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        project.client().send_task("report", queue="reports").get(timeout=20)


FORMS = """
from celery import Celery
app, by_name = Celery("forms"), Celery(set_as_current=False)
@app.task(name="report")
def report(year, month):
    return year
by_name.send_task("report", args=(2026, 5))
by_name.signature("report", args=(2026, 5)).delay()
by_name.signature("report", args=(2026, 5)).apply_async()
report.delay(2026, 5)
report.apply_async(args=(2026, 5))
report.s(2026, 5).delay()
report.s(2026, 5).apply_async()
"""


def test_all_forms_of_a_call_differ_in_the_id_and_ignore_result_only(project):
    stands(
        "04",
        "`delay` is a shortcut for `apply_async` without options.",
        "`send_task`, `delay`, `apply_async` and signatures write the same body.",
        "The id is in the message three times:",
        "(One header differs as well: `send_task` leaves `ignore_result` empty.",
    )
    (project.folder / "forms.py").write_text(FORMS)
    project.run("python forms.py")
    texts = [text.decode() for text in reversed(project.broker.lrange("celery", 0, -1))]
    messages = [json.loads(text) for text in texts]
    ids = [message["headers"]["id"] for message in messages]
    assert [text.count(id) for text, id in zip(texts, ids, strict=True)] == [3] * 7 and len(set(ids)) == 7
    assert [message["headers"].pop("ignore_result") for message in messages] == [None] + [False] * 6
    for message in messages:
        del message["properties"]["delivery_tag"]  # the receipt of this one message
    same = {json.dumps(message).replace(id, "ID") for message, id in zip(messages, ids, strict=True)}
    assert len({re.sub(r'"reply_to": "[^"]*"', "", text) for text in same}) == 1  # one address per app


LIMITED = """
import time
from celery import Celery
app = Celery("limited")
@app.task(name="slow", time_limit=1, soft_time_limit=None)
def slow(seconds):
    time.sleep(seconds)
@app.task(name="soft", soft_time_limit=0.5)
def soft(seconds):
    time.sleep(seconds)
@app.task(name="name_of")
def name_of(names):
    return names[7]
@app.task(name="silent", ignore_result=True)
def silent():
    return 1
@app.task(name="seldom", rate_limit="1/h")
def seldom():
    return 1
"""


def test_limits_keys_and_results_of_tasks_that_are_sent_by_name(project):
    stands(
        "04",
        "If the message has no limit, the worker uses the one in its own code",
        "The worker has even run the task and stored the result, but this client doesn't know where to look for it.",
        "**KeyError.** In JSON all keys are texts",
    )
    (project.folder / "limited.py").write_text(LIMITED)
    (project.folder / "half.py").write_text(
        'from celery import Celery\nprint(Celery().send_task("slow", args=(0,)).id)'
    )
    project.worker("celery -A limited worker --pool=prefork -c 2 --without-mingle --without-gossip")
    client = project.client()
    slow, soft = client.send_task("slow", args=(60,)), client.send_task("soft", args=(60,))
    seldom = [client.send_task("seldom") for _ in range(2)]
    half = client.AsyncResult(project.run("env -u CELERY_RESULT_BACKEND python half.py").strip())
    with pytest.raises(KeyError):
        client.send_task("name_of", args=({7: "seven"},)).get(timeout=20)
    assert type(slow.get(timeout=20, propagate=False)).__name__ == "TimeLimitExceeded"
    assert type(soft.get(timeout=20, propagate=False)).__name__ == "SoftTimeLimitExceeded"
    until(lambda: half.state == "SUCCESS", "the result is stored")
    stands("04", "`autoretry_for`, `rate_limit`, `track_started` | the *worker* that runs the task |")
    assert (seldom[0].get(timeout=20), seldom[1].state) == (1, "PENDING")


def test_a_program_without_celery_sees_how_a_date_is_written():
    stands("04", 'A program without Celery would see something like `{"__type__": "datetime", ...}`.')
    for value, name in ((datetime(2026, 11, 23), "datetime"), (Decimal("0.1"), "decimal"), (b"raw", "bytes")):
        written = json.loads(kombu.utils.json.dumps(value))
        assert written["__type__"] == name and len(written) == 2


# --- 04b -----------------------------------------------------------------------------------------------------

BUSY = """
import time
from celery import Celery
app = Celery("busy")
@app.task(name="sleep")
def sleep(seconds):
    time.sleep(seconds)
"""


@pytest.mark.parametrize(
    "pool, looks_again", [("prefork", True), ("solo", True), ("threads", False), ("gevent", False)]
)
def test_when_a_worker_looks_at_expires(project, pool, looks_again):
    stands(
        "04b",
        "| prefork, solo | when it takes the message, and again before the task starts |",
        "| threads, gevent | when it takes the message, but not again when a place becomes free |",
        "(If the task also has a `countdown`, which comes next, every worker looks once more when the",
    )
    (project.folder / "busy.py").write_text(BUSY)
    project.worker(f"celery -A busy worker --pool={pool} -c 1 --without-mingle --without-gossip")
    client = project.client()
    client.send_task("sleep", args=(9,))
    late = client.send_task("sleep", args=(0,), expires=5)  # taken before, if the worker takes messages ahead
    if looks_again:
        with pytest.raises(TaskRevokedError):
            late.get(timeout=20)
    else:
        assert late.get(timeout=20) is None
    delayed = client.send_task("sleep", args=(0,), countdown=1.5, expires=1)
    assert delayed.state == "PENDING"
    with pytest.raises(TaskRevokedError):
        delayed.get(timeout=30)


def test_how_long_and_how_many_a_worker_holds_by_default():
    stands("04b", "by default without a limit", "That timeout is one hour by default.")
    assert Celery(set_as_current=False).conf.worker_eta_task_limit is None
    assert Channel.visibility_timeout == 3600


def test_a_countdown_becomes_the_eta_in_seconds_from_now(project):
    stands("04b", "`countdown=3` means: start in three seconds.", "The message then contains an `eta`")
    before = time.time()
    project.client().send_task("sleep", args=(0,), countdown=30)
    [message] = [json.loads(text) for text in project.broker.lrange("celery", 0, -1)]
    assert before + 29.9 < datetime.fromisoformat(message["headers"]["eta"]).timestamp() < time.time() + 30.1


def test_expires_is_told_to_rabbitmq(project):
    stands("04b", "Celery also writes the time into a property that RabbitMQ understands")
    project.client().send_task("sleep", args=(0,), expires=5)
    [message] = [json.loads(text) for text in project.broker.lrange("celery", 0, -1)]
    assert "expiration" in dict(Message.PROPERTIES)
    assert 4000 < float(message["properties"]["expiration"]) <= 5000


def test_a_chain_needs_no_backend_and_a_chord_does(project):
    stands("04b", "A chain doesn't need a backend. A chord does, because the backend counts how many parts are done.")
    client = project.client()
    client.backend_cls = "disabled://"
    part = client.signature("sleep", args=(0,), immutable=True)
    (part | part).apply_async()
    assert project.broker.llen("celery") == 1
    with pytest.raises(NotImplementedError):
        chord([part, part], part).apply_async()


QUICK_TASKS = """
import os
import time
from celery import Celery
app = Celery("quick")
app.conf.task_track_started = True
@app.task(name="silent", ignore_result=True)
def silent(x):
    return x
@app.task(name="gather")
def gather(parts):
    return parts
@app.task(name="report", bind=True)
def report(self):
    while not os.path.exists("go"):
        time.sleep(0.02)
    self.update_state(state="PROGRESS", meta={"done": 3, "total": 10})
    while not os.path.exists("end"):
        time.sleep(0.02)
    return 10
"""


def test_a_worker_takes_every_countdown_and_a_chord_counts_silent_parts_and_info_changes(project):
    stands(
        "04b",
        "With Redis, this works even for parts that ignore their results.",
        "A worker takes messages with a countdown at once, by default without a limit.",
        "the client finds `meta` in `result.info`",
        "It is `None` before the task starts, and the result after the task has ended.",
        "until the first report, it is the dictionary of the state `STARTED`, which has no `done`",
    )
    (project.folder / "quick.py").write_text(QUICK_TASKS)
    client = project.client()
    report = client.send_task("report")
    infos = [report.info]
    project.worker("celery -A quick worker --pool=threads -c 2 --without-mingle --without-gossip")
    until(lambda: report.state == "STARTED", "the task starts")
    infos.append(report.info)
    (project.folder / "go").touch()
    until(lambda: report.state == "PROGRESS", "it reports")
    infos.append(report.info)
    (project.folder / "end").touch()
    report.get(timeout=20)
    assert (infos[0], "done" in infos[1], infos[2], report.info) == (None, False, {"done": 3, "total": 10}, 10)
    # sent by its name, a task is silent only if the message says so
    parts = [client.signature("silent", args=(n,), app=client, ignore_result=True) for n in range(2)]
    last = chord(parts, app=client)(client.signature("gather"))
    assert last.get(timeout=20) == [0, 1] and {part.state for part in last.parent} == {"PENDING"}
    for _ in range(50):
        client.send_task("silent", args=(0,), countdown=600)
    until(
        lambda: (project.broker.llen("celery"), project.broker.hlen("unacked")) == (0, 50), "all are taken", seconds=20
    )


@pytest.mark.parametrize(
    "pool, value", [("prefork", None), ("threads", None), ("gevent", "inner"), ("eventlet", "inner")]
)
def test_which_pool_refuses_to_wait_inside_a_task(project, pool, value):
    stands(
        "04b", "With the check, Celery refuses to wait inside a task. (With the pools gevent and eventlet it does not:"
    )
    (project.folder / "nested.py").write_text(
        "from celery import Celery\napp = Celery('nested')\n"
        "@app.task(name='inner')\ndef inner():\n    return 'inner'\n"
        "@app.task(name='outer')\ndef outer():\n    return inner.delay().get(timeout=20)\n"
    )
    project.worker(
        f"celery -A nested worker --pool={pool} --concurrency=2 --without-mingle --without-gossip", seconds=60
    )
    told = project.client().send_task("outer").get(timeout=30, propagate=False)
    assert told == value if value else "Never call result.get() within a task!" in str(told)


def test_get_refuses_to_wait_inside_a_task_by_default():
    stands("04b", "`disable_sync_subtasks` is a check of Celery's that is normally on.")
    for result in (AsyncResult, GroupResult):
        assert inspect.signature(result.get).parameters["disable_sync_subtasks"].default is True


# --- 05 ------------------------------------------------------------------------------------------------------


POOLS = """
import os
import threading
import time
from celery import Celery
app = Celery("pools")
app.conf.task_track_started = True
running, most = 0, 0
@app.task(name="wait")
def wait(seconds):
    global running, most
    running += 1
    most = max(most, running)
    with open("begun", "a") as file:
        file.write(".")
    time.sleep(seconds)
    while not os.path.exists("go"):
        time.sleep(0.1)
    running -= 1
    return most
@app.task(name="compute")
def compute():
    while not os.path.exists("go"):
        sum(range(1000))
@app.task(name="where")
def where():
    return [os.getpid(), threading.current_thread().name]
"""
# One task waits for a program, which ends when the other task has run.
PROGRAMS = """
import subprocess
from pathlib import Path
from celery import Celery
app = Celery("programs")
@app.task(name="waits")
def waits(path):
    script = f"until test -e '{path}'; do sleep 0.05; done; echo gone on"
    return subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, text=True, timeout=15).stdout.strip()
@app.task(name="goes")
def goes(path):
    Path(path).touch()
"""
POOLS_WORKER = "python -m celery -A pools worker --without-mingle --without-gossip -n {0}@%h -Q {0} --pool={0}"


@pytest.mark.parametrize("pool, at_once", [("threads", 100), ("gevent", 100), ("eventlet", 100), ("solo", 1)])
def test_how_many_tasks_wait_at_once_with_a_hundred_slots(project, pool, at_once):
    stands("05", "Waiting tasks overlap on as many slots as there are, so 100 slots need about four seconds.")
    stands("05", "The gevent pool with 100 slots is just as good")
    stands("05", "this pool has one slot, whatever the banner and `--concurrency` say")
    stands("05", "as many tasks waited at the same time as there were slots, whether a slot is")
    (project.folder / "pools.py").write_text(POOLS)
    project.worker(POOLS_WORKER.format(pool) + " --concurrency=100")
    assert "concurrency: 100 (" in project.log()
    client = project.client()
    go = project.folder / "go"
    if pool == "solo":  # it can't answer while a task waits
        go.touch()
    results = [client.send_task("wait", args=(0.05,), queue=pool) for _ in range(at_once + 4)]
    begun = project.folder / "begun"
    until(lambda: begun.exists() and begun.stat().st_size >= at_once, "all slots are taken")
    go.touch()
    assert max(result.get(timeout=30) for result in results) == at_once


def test_in_a_green_pool_tasks_overlap_while_they_wait_for_another_program(project):
    stands("05", "(in a green pool, if they wait through Python's own modules)")
    stands("05b", "`time.sleep`, sockets and more are replaced by versions that give the turn to another greenlet")
    (project.folder / "programs.py").write_text(PROGRAMS)
    project.worker("celery -A programs worker --pool=gevent -c 2 --without-mingle --without-gossip")
    client = project.client()
    waits = client.send_task("waits", args=(str(project.folder / "go"),))
    client.send_task("goes", args=(str(project.folder / "go"),)).get(timeout=20)
    assert waits.get(timeout=20) == "gone on"


def test_the_kinds_of_pool_and_who_has_children(project):
    stands("05", "There are five kinds of pool, and `--pool` chooses one.")
    stands("05", "Of the five pools in this chapter, only prefork makes child processes.")
    names = {implementation for name, implementation in ALIASES.items() if name != "custom"}
    assert len(names) == 5 and set(get_available_pool_names()) - {"custom", "processes"} == {
        *("prefork", "threads", "gevent", "eventlet", "solo")
    }


def test_a_computing_task_stops_the_whole_gevent_worker(project):
    stands("05", "during that time it answers no question and starts no other task.")
    stands("05", "There is no error in the log; everything is just late.")
    (project.folder / "pools.py").write_text(POOLS)
    project.worker(POOLS_WORKER.format("gevent") + " --concurrency=50")
    client = project.client()
    pid = node_stats(client, "gevent")["pid"]
    assert psutil.Process(pid).children() == []
    long = client.send_task("compute", queue="gevent")
    process = psutil.Process(pid)
    until(lambda: not project.broker.llen("gevent"), "the worker takes the task")
    until(lambda: process.cpu_percent(0.3) > 20, "it computes")
    late = client.send_task("where", queue="gevent")
    assert client.control.ping(timeout=1) == [] and late.state == "PENDING"
    (project.folder / "go").touch()
    long.get(timeout=20)
    assert late.get(timeout=20)[0] == pid
    assert not re.search("WARNING|ERROR|CRITICAL", project.settled_log())


# --- 05b -----------------------------------------------------------------------------------------------------


LIMITS = """
import ctypes
import hashlib
import os
import time
from celery.signals import heartbeat_sent
from course_tasks.celery import app
from course_tasks.tasks import _delayed, _span

libc, data, calls = ctypes.CDLL(None), bytes(20_000_000), 0

@heartbeat_sent.connect
def beat(**_):
    print(f"a heartbeat {time.time()}")

@app.task(name="count")
def count():
    global calls
    calls += 1
    return calls

@app.task(name="in_c")
def in_c(seconds):
    start = time.time()
    libc.usleep(int(seconds * 1_000_000))
    return _span(seconds, start)

@app.task(name="digest")
def digest(seconds):
    start, delayed, end = time.time(), _delayed(), time.thread_time() + seconds
    while time.thread_time() < end:
        hashlib.sha256(data)
    return _span(seconds, start, _delayed() - delayed)

@app.task(name="stubborn")
def stubborn(seconds):
    try:
        time.sleep(seconds)
    except:
        return "caught"

@app.task(name="sleeper")
def sleeper():
    return time.sleep.__module__
"""


KINDS = {(True, True): "yes", (True, False): "if the task waits", (False, False): "no"}


class Pool:
    """A worker of one pool with two slots, and what it can do, in the words of the chapter's table."""

    attempt = 0  # how often the same has been measured before

    def __init__(self, project: Project, pool: str):
        self.project, self.pool, self.node = project, pool, f"limits@{socket.gethostname()}"
        (project.folder / "limits.py").write_text(LIMITS)
        self.client = project.client()
        self.start(f"--pool={pool} -c 2 --max-tasks-per-child=2")

    def start(self, options: str) -> None:
        self.project.worker(f"celery -A limits worker {options} -n limits@%h --without-mingle --without-gossip")

    def run(self, task: str, *args, count: int = 1, **options) -> list:
        sent = [self.client.send_task(task, args=args, **options) for _ in range(count)]
        return [result.get(timeout=180, propagate=False) for result in sent]

    def running(self, task: str, seconds: float, **options) -> AsyncResult:
        result = self.client.send_task(task, args=(seconds,), **options)
        until(lambda: result.state != "PENDING", f"the start of {task}")
        return result

    def in_time(self, result: AsyncResult, seconds: float) -> bool:
        """Whether a task ends before its time; not by its state, which may be any."""
        began = time.monotonic()
        result.get(timeout=60, propagate=False)
        return time.monotonic() - began < seconds

    def kinds(self, test) -> str:
        """In the table's words: whether something works on a task that waits, and on one that computes."""
        return KINDS[test("wait"), test("compute")]

    def hard(self, task: str) -> bool:
        return self.in_time(self.running(task, 2, time_limit=1), 1.8)

    def soft(self, task: str) -> bool:
        return self.in_time(self.running(task, 2, soft_time_limit=1), 1.8)

    def revoke(self, task: str) -> bool:
        result = self.running(task, 2)
        self.client.control.revoke(result.id, terminate=True)
        early = self.in_time(result, 1.5)
        self.run("wait", 2)  # a task that is only said to be revoked would succeed meanwhile
        return early and f"Task {task}[{result.id}] succeeded" not in self.project.log()

    def answers(self, task: str) -> bool:
        """Whether it answers a ping during a task, and not only after it."""
        result = self.running(task, 4)
        answers = self.client.control.ping([self.node], timeout=1.5, limit=1)
        result.get(timeout=60)
        return bool(answers)

    def beats(self, task: str) -> bool:
        """Whether it sends heartbeats during a task. There is one every two seconds."""
        result = self.running(task, 4)
        began = time.time() + 0.2
        end = result.get(timeout=60)["end"] - 0.2
        beats = [float(each) for each in re.findall(r"a heartbeat (\S+)", self.project.settled_log())]
        return any(began < each < end for each in beats)

    def at_once(self, task: str) -> str:
        """Whether two tasks run at the same time."""
        return "yes" if at_once(self.run(task, 0.8 * 2**self.attempt, count=2)) == 2 else "no"

    def gains(self, task: str) -> Any:
        """Whether two tasks use more than one processor, however busy the machine is."""
        if os.cpu_count() == 1:
            return ANY
        seconds = 0.4 * 5**self.attempt  # on a busy machine, the second task starts late, which counts for less then
        return "yes" if speedup(self.run(task, seconds, count=2), delays=False) > 1.4 else "no"

    def grows(self) -> str:
        """What --autoscale does. The first worker is stopped for it."""
        self.client.control.shutdown([self.node])
        until(lambda: not self.client.control.ping([self.node], timeout=0.5), "the end of the first worker")
        self.start(f"--pool={self.pool} --autoscale=4,2")
        done = self.project.log().count(" succeeded in ")
        seconds = 2**self.attempt  # so long that the worker has time to add slots, also on a busy machine
        sent = [self.client.send_task("wait", args=(seconds,)) for _ in range(6)]
        crash = "Unrecoverable error: AttributeError"
        until(lambda: crash in (log := self.project.log()) or log.count(" succeeded in ") == done + 6, "all six tasks")
        if crash in self.project.log():
            return "it crashes"
        return "yes" if at_once([result.get(timeout=60) for result in sent]) > 2 else "no"


def limits(pool: str) -> dict[str, str]:
    """A pool's column in the chapter's table, by what one needs."""
    text = "\n".join(cell.source for cell in cells(copies.chapters()["05b"], "markdown"))
    rows = [line.strip("|").split(" | ") for line in text.partition("| You need |")[2].split("\n\n")[0].splitlines()]
    at = ["prefork", "threads", "gevent", "eventlet", "solo"].index(pool) + 1
    return {row[0].strip(): row[at].strip() for row in rows[2:]}


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent", "eventlet", "solo"])
def test_the_table_of_what_each_pool_can_do(project, pool):
    can, said = Pool(project, pool), limits(pool)
    highest = max(can.run("count")[0] for _ in range(6))
    measures = {
        "a hard time limit": lambda: can.kinds(can.hard),
        "a soft time limit": lambda: can.kinds(can.soft),
        "`revoke(terminate=True)` to end a running task": lambda: can.kinds(can.revoke),
        "`--max-tasks-per-child`": lambda: "yes" if highest <= 2 else "no",
        "a global variable for all tasks": lambda: "yes" if highest == 6 else "no",
        "to overlap waits in Python's modules": lambda: can.at_once("wait"),
        "to overlap waits in a C library": lambda: can.at_once("in_c"),
        "Python code that computes to gain": lambda: can.gains("compute"),
        "C code that releases the GIL to gain": lambda: can.gains("digest"),
        "an answer to a ping during a task": lambda: can.kinds(can.answers),
        "heartbeats during a task": lambda: can.kinds(can.beats),
        "`--autoscale`": can.grows,  # the last one, because it ends the worker
    }
    assert said.keys() == measures.keys()
    for need, measure in measures.items():
        # other programs may disturb a measurement, but not three times in favour of a false entry
        seen = next((found for can.attempt in range(3) if (found := measure()) == said[need]), None)
        assert seen, need


def test_without_a_reply_only_the_log_says_that_a_task_can_not_be_ended(project):
    stands("05b", "By default, the client doesn't wait for an answer to `revoke`.")
    stands("05b", "Without `reply=True`, the message appears only in its log.")
    can = Pool(project, "threads")
    result = can.running("wait", 2)
    assert can.client.control.revoke(result.id, terminate=True) is None
    logged(project, "<class 'celery.concurrency.thread.TaskPool'> does not implement kill_job")


def test_in_gevent_the_state_of_a_revoked_task_that_computes_is_a_matter_of_luck(project):
    stands("05b", "The state is a matter of luck then: it may be `SUCCESS`, `REVOKED` or `FAILURE`.")
    can, seen = Pool(project, "gevent"), set()
    deadline = time.monotonic() + 60
    while not {"SUCCESS", "REVOKED", "FAILURE"} <= seen and time.monotonic() < deadline:
        result = can.running("compute", 0.3, **({"time_limit": 0.1} if "REVOKED" in seen else {}))
        can.client.control.revoke(result.id, terminate=True) if "REVOKED" not in seen else None
        result.get(timeout=20, propagate=False)
        seen.add(result.state)
    assert {"SUCCESS", "REVOKED", "FAILURE"} <= seen


def test_in_gevent_a_bare_except_catches_the_time_limit(project):
    stands("05b", "even a task that waits can escape it, with a bare `except:`")
    assert Pool(project, "gevent").run("stubborn", 3, time_limit=0.5) == ["caught"]


@pytest.mark.parametrize(
    "setting, option, pool, module",
    [
        ("", "-P gevent", "gevent", "gevent.hub"),
        ("", "--pool gevent", "gevent", "gevent.hub"),
        ("", "--pool=gevent", "gevent", "gevent.hub"),
        ("", "-Pgevent", "gevent", None),
        ("", "-P prefork -P gevent", "gevent", None),
        ("gevent", "", "gevent", None),
        ("solo", "--pool=prefork", "solo", "time"),
        ("solo", "--pool=threads", "thread", "time"),
    ],
)
def test_what_celery_makes_of_each_way_to_name_a_pool(project, setting, option, pool, module):
    stands(
        "05b",
        "| `-P gevent`, `--pool gevent`, `--pool=gevent` | gevent | yes |",
        "| `-Pgevent` | gevent | no, it hangs |",
        "| `-P prefork -P gevent` | gevent, because the last one wins | no, it hangs, because the *first* one counts",
        '| `worker_pool = "gevent"` in the configuration | gevent | no, it hangs |',
        "Any other pool on the command line wins over the configuration.",
    )
    (project.folder / "limits.py").write_text(LIMITS + (f"app.conf.worker_pool = {setting!r}\n" if setting else ""))
    project.worker(f"celery -A limits worker {option} -c 2 --without-mingle --without-gossip")
    assert f"concurrency: 2 ({pool})" in project.log()
    result = project.client().send_task("sleeper")
    if module:
        assert result.get(timeout=20) == module
    else:
        until(lambda: not project.broker.llen("celery"), "the worker to take the message")
        with pytest.raises(ResultTimeout):
            result.get(timeout=2)


def test_a_short_option_takes_no_equals_sign(project):
    stands("05b", "| `-P=gevent` | it doesn't start, because a short option takes no `=` |")
    (project.folder / "limits.py").write_text(LIMITS)
    with pytest.raises(WrongAnswer, match="'=gevent' is not one of"):
        project.worker("celery -A limits worker -P=gevent")


def test_a_ping_asks_the_broker_as_well(project):
    stands("05b", "If the broker is away, no worker can answer, and all are restarted.")
    can = Pool(project, "threads")
    command = f"celery -A limits inspect ping -d {can.node} --timeout 2"
    assert "pong" in project.run(command)
    project.broker.shutdown(nosave=True)
    with pytest.raises(WrongAnswer, match=r"ended with an error|was still running"):
        project.run(command, seconds=10)


# --- 06 ------------------------------------------------------------------------------------------------------

SLOTTED = """
import os
import time

import redis
from celery import Celery

app = Celery("slotted")
app.conf.update(SETTINGS)
pool = redis.BlockingConnectionPool.from_url(os.environ["CELERY_BROKER_URL"], max_connections=2)
database = redis.Redis(connection_pool=pool)


@app.task(name="nap")
def nap(seconds):
    time.sleep(seconds)


@app.task(name="late", acks_late=True)
def late(seconds):
    time.sleep(seconds)


@app.task(name="query")
def query(seconds):
    database.blpop("an empty list", timeout=seconds)
"""
# Has the worker print how long its main loop waits for messages.
WAITS = """
from kombu import Connection

drain = Connection.drain_events


def drain_events(self, **options):
    print(f"waits {options}")
    return drain(self, **options)


Connection.drain_events = drain_events
"""
SLOTTED_WORKER = "celery -A slotted worker --without-mingle --without-gossip"


def write_slotted(folder: Path, **settings) -> None:
    """Write a module `slotted` with an app and tasks that wait."""
    folder.joinpath("slotted.py").write_text(SLOTTED.replace("SETTINGS", repr(settings)))


def took(client: Celery, task: str, count: int, queue: str, seconds: float = 0.2) -> float:
    """How long a worker needs for some equally long tasks."""
    start = time.monotonic()
    for result in [client.send_task(task, args=(seconds,), queue=queue) for _ in range(count)]:
        result.get(timeout=60)
    return time.monotonic() - start


def test_without_a_number_each_pool_but_solo_has_a_slot_per_processor(project, tmp_path):
    stands("06", "The default is the same for all pools but solo, which always has one slot.")
    stands("06", "by default one per processor (solo always has one)", "You set it with `--concurrency`, or `-c`.")
    write_slotted(tmp_path)
    client = project.client()
    for pool in ("prefork", "threads", "eventlet", "solo"):
        project.worker(f"{SLOTTED_WORKER} --pool={pool} -n {pool}@%h -Q {pool}")
        slots = node_stats(client, pool)["pool"]["max-concurrency"]
        assert slots == (1 if pool == "solo" else os.cpu_count()), pool
    project.worker(f"{SLOTTED_WORKER} --pool=solo -c 7 -n alone@%h -Q alone")
    assert node_stats(client, "alone")["pool"]["max-concurrency"] == 1


def test_auto_leaves_out_processors_and_respects_a_quota(project, tmp_path, monkeypatch):
    stands("06", "With prefork, `auto` leaves out processors that the worker may not use")
    stands("06", "on Linux it respects the CPU limit of a container (its **quota**)")
    for quota in (1.0, 2.0, None):
        monkeypatch.setattr(sysinfo, "cgroup_cpu_quota", lambda: quota)  # noqa: B023
        assert sysinfo.cpu_budget().count == min(quota or 1e9, sysinfo.available_cpu_count())
    write_slotted(tmp_path)
    if hasattr(os, "sched_getaffinity") and shutil.which("taskset"):
        processor = min(os.sched_getaffinity(0))
        project.worker(f"taskset -c {processor} {SLOTTED_WORKER} -c auto -n one@%h")
        assert node_stats(project.client(), "one")["pool"]["max-concurrency"] == 1


def test_the_option_overrides_the_setting(project, tmp_path):
    stands("06", "A command-line option overrides the setting in the file")
    stands("06", "Without the option, the setting `worker_concurrency = 2` counts.")
    write_slotted(tmp_path, worker_concurrency=2)
    slots = {}
    for name, option in {"with": "--concurrency=4", "without": ""}.items():
        project.worker(f"{SLOTTED_WORKER} --pool=threads {option} -n {name}@%h -Q {name}")
        slots[name] = node_stats(project.client(), name)["pool"]["max-concurrency"]
    assert slots == {"with": 4, "without": 2}


def test_a_library_that_waits_for_a_free_connection_gains_nothing_from_more_slots(project, tmp_path):
    stands("06", "Other libraries wait for a free connection, and then the additional slots don't help.")
    write_slotted(tmp_path)
    client, seconds = project.client(), {}
    for slots in (2, 8):
        project.worker(f"{SLOTTED_WORKER} --pool=threads -c {slots} -n w{slots}@%h -Q q{slots}")
        took(client, "query", 1, f"q{slots}", 0.01)
        seconds[slots] = took(client, "query", 8, f"q{slots}", 0.5)
    assert seconds[8] > 0.8 * 4 * 0.5, f"four rounds on two connections, however many slots: {seconds}"


def test_the_main_process_replaces_a_child_that_died(project, tmp_path):
    stands("06", "One task is lost, and the main process replaces the child.")
    write_slotted(tmp_path)
    project.worker(f"{SLOTTED_WORKER} --concurrency=2 -n w@%h")
    client = project.client()
    before = node_stats(client, "w")["pool"]["processes"]
    os.kill(before[0], signal.SIGKILL)
    until(lambda: before[0] not in (now := node_stats(client, "w")["pool"]["processes"]) and len(now) == 2, "a new one")


def test_after_delayed_tasks_a_limited_worker_with_late_acknowledgement_runs_one_task_at_a_time(project):
    stands(
        "06b",
        "If the worker's prefetch count is higher than the limit, the first delayed task lowers it to the limit.",
        "Each delayed task that starts then lowers it by one, and nothing raises it again.",
        "After them, it ran only one task at a time, until we restarted it.",
        "If it is already higher, the first task with a countdown lowers it to that number, and it stays low.",
    )
    settings = "app.conf.update(worker_eta_task_limit=2, task_acks_late=True)"
    (project.folder / "holds.py").write_text(f"{HOLDS}\n{settings}\n")
    project.worker(f"{HOLDS_WORKER} --pool=threads --concurrency=4")
    client = project.client()

    def holding() -> int:
        """How many of four tasks it runs at once."""
        before = project.log().count("holding")
        results = [client.send_task("hold") for _ in range(4)]
        until(lambda: project.log().count("holding") > before, "the first one starts")
        time.sleep(2)  # in which the others would start
        count = project.log().count("holding") - before
        (project.folder / "go").touch()
        for result in results:
            result.get(timeout=60)
        return count

    assert (node_stats(client, "celery")["prefetch_count"], holding()) == (16, 4)
    delayed = [client.send_task("hold", countdown=3) for _ in range(8)]
    until(lambda: node_stats(client, "celery")["prefetch_count"] == 2, "the limit")
    for result in delayed:
        result.get(timeout=60)
    (project.folder / "go").unlink()
    assert (node_stats(client, "celery")["prefetch_count"], holding()) == (1, 1)


@pytest.mark.parametrize("pool, reserved", [("gevent", 1), ("eventlet", 1), ("threads", 8), ("prefork", 8)])
def test_how_many_messages_wait_in_a_worker_with_two_busy_slots(project, pool, reserved):
    stands("06b", "| wait, on gevent | a multiplier above 1 | while all slots are busy, one reserved message waits")
    stands("06b", "With one slot of prefork, the default leaves four tasks behind a long one")
    stands("06b", "Every slot of a prefork worker runs a task, none of the tasks has a countdown")
    (project.folder / "holds.py").write_text(HOLDS)
    project.worker(f"{HOLDS_WORKER} --pool={pool} --concurrency=2", seconds=60)
    client = project.client()
    for _ in range(20):
        client.send_task("hold", ignore_result=True)
    until(lambda: project.log().count("holding") == 2 and project.broker.llen("celery") <= 20 - 2 - reserved, "all")
    time.sleep(1)  # in which it would take more
    assert (project.broker.llen("celery"), project.broker.hlen("unacked")) == (20 - 2 - reserved, reserved)


@pytest.mark.parametrize("pool", ["threads", "gevent"])
def test_all_running_tasks_are_lost_when_the_only_process_dies(project, tmp_path, pool):
    stands("06", "one for each child of prefork, and all of them with threads and gevent")
    write_slotted(tmp_path)
    worker = f"{SLOTTED_WORKER} --pool={pool} -c 3 -n {{}}@%h"
    project.worker(worker.format("first"))
    client = project.client()
    pid = node_stats(client, "first")["pid"]
    lost = [client.send_task("nap", args=(60,)) for _ in range(3)]
    asked = client.control.inspect([f"first@{socket.gethostname()}"], timeout=5, limit=1)
    until(lambda: [len(each) for each in (asked.active() or {}).values()] == [3], "three running tasks")
    until(lambda: not project.broker.exists("celery", "unacked"), "the broker has let go of them")
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid), "the worker ends")
    project.worker(worker.format("second"))
    client.send_task("nap", args=(0,)).get(timeout=60)
    assert node_stats(client, "second")["total"] == {"nap": 1}  # of those that it has started
    assert not any(result.ready() for result in lost)


def test_slots_of_autoscale_stay_30_seconds_and_green_workers_look_once_a_second(monkeypatch):
    stands("06", "removes slots when no task has arrived for 30 seconds")
    stands("06", "checks once a second whether it needs more slots")
    environment = {name: value for name, value in os.environ.items() if name != "AUTOSCALE_KEEPALIVE"}
    code = "from celery.worker import autoscale; print(autoscale.AUTOSCALE_KEEPALIVE)"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout == "30.0\n"
    naps: list[float] = []
    monkeypatch.setattr(autoscale, "sleep", naps.append)
    scaler = autoscale.Autoscaler(SimpleNamespace(num_processes=1), 1, 1)
    scaler.body()
    assert naps == [1.0]


def test_autoscale_removes_slots_when_nothing_has_arrived_for_as_long_as_keepalive_says(monkeypatch):
    stands("06", "**Autoscaling** adds slots when tasks have to wait, and removes slots when no task has arrived for")
    now = [1000.0]
    waiting: list[str] = []
    monkeypatch.setattr(autoscale, "monotonic", lambda: now[0])
    monkeypatch.setattr(autoscale.state, "reserved_requests", waiting)
    pool = SimpleNamespace(num_processes=1, maintain_pool=lambda: None)
    pool.grow = lambda n: setattr(pool, "num_processes", pool.num_processes + n)
    pool.shrink = lambda n: setattr(pool, "num_processes", pool.num_processes - n)
    scaler = autoscale.Autoscaler(pool, 10, 1, keepalive=30)

    def slots_at(seconds: float, tasks: int, arrived: bool = False) -> int:
        now[0] = 1000.0 + seconds
        waiting[:] = ["a task"] * tasks
        scaler.maybe_scale("a task" if arrived else None)
        return pool.num_processes

    assert [slots_at(0, 4), slots_at(5, 20), slots_at(29, 0), slots_at(34, 0)] == [4, 10, 10, 10]
    assert [slots_at(34, 1, arrived=True), slots_at(63, 0), slots_at(65, 0)] == [10, 10, 1]


def test_each_inspect_ping_imports_the_app(project, tmp_path):
    stands("03b", "each probe starts a Python program that imports your app")
    tmp_path.joinpath("noted.py").write_text(
        "import os\nfrom pathlib import Path\nfrom celery import Celery\napp = Celery()\n"
        "Path('imports').open('a').write(f'{os.getpid()}\\n')\n"
    )
    project.worker("celery -A noted worker --pool=solo --without-mingle --without-gossip")
    for _ in range(2):
        project.run("celery -A noted inspect ping")
    imports = tmp_path.joinpath("imports").read_text().split()
    assert len(imports) == len({*imports}) == 3  # the worker's, and one for each probe


def test_pool_grow_lasts_until_the_worker_is_restarted_and_a_green_worker_waits_two_seconds(project, tmp_path):
    stands("06", "`pool_grow` adds one until the worker is restarted", "looks again only after two seconds")
    stands("06b", "its main loop waits for two seconds")
    write_slotted(tmp_path)
    with tmp_path.joinpath("slotted.py").open("a") as file:
        file.write(WAITS)
    client = project.client()
    seconds = {}
    for name, slots in {"slow": 2, "again": 1}.items():
        project.worker(f"{SLOTTED_WORKER} --pool=gevent -c 1 --prefetch-multiplier=1 -n {name}@%h -Q {name}")
        node = f"{name}@{socket.gethostname()}"
        if slots == 2:
            until(lambda: client.control.pool_grow(1, destination=[node], reply=True, limit=1), "it to grow")  # noqa: B023
            took(client, "nap", 4, name, 0.3)
        # a busy machine makes something take longer, but not three times
        seconds[slots] = min(took(client, "nap", 2, name, 0.05) for _ in range(3))
        assert node_stats(client, name)["pool"]["max-concurrency"] == slots
    assert seconds[2] < seconds[1] / 2
    # the other loop, which has one second, is for remote control
    assert {*re.findall(r"waits (.*)", project.log())} == {"{'timeout': 2.0}", "{'timeout': 1.0}"}


def test_one_green_slot_is_quick_with_the_usual_multiplier_and_late_acknowledgement_stalls_more_slots(
    project, tmp_path
):
    stands("06", "The fix is to leave the multiplier alone")
    stands("06", "The second slot helps only with early acknowledgement, which is the default.")
    stands("06", "With `acks_late` a worker with more slots can stall as well")
    stands("06", "looks again only after two seconds")
    write_slotted(tmp_path)
    client = project.client()
    for name, options in {
        "usual": "-c 1",
        "one": "-c 1 --prefetch-multiplier=1",
        "two": "-c 2 --prefetch-multiplier=1",
    }.items():
        project.worker(f"{SLOTTED_WORKER} --pool=gevent {options} -n {name}@%h -Q {name}")
        took(client, "nap", 1, name, 0.01)
    slow = took(client, "nap", 3, "one")
    # a busy machine makes something take longer, but not three times
    assert any(took(client, "nap", 3, "usual") < slow / 2 for _ in range(3))
    assert any(took(client, "nap", 6, "two") < slow / 2 for _ in range(3))
    assert took(client, "late", 6, "two") > slow / 2
    assert not Celery(set_as_current=False).conf.task_acks_late


# --- 06b -----------------------------------------------------------------------------------------------------


def test_the_defaults_of_prefetching():
    stands("06b", "**prefetch multiplier**, which is 4 by default", "It is off by default.")
    conf = Celery(set_as_current=False).conf
    assert (conf.worker_prefetch_multiplier, conf.worker_eta_task_limit, conf.task_acks_late) == (4, None, False)


def test_a_multiplier_of_0_in_the_configuration_is_no_limit(project):
    stands("06b", "A multiplier of 0 in the configuration means that there is no limit at all")
    notes(project, "worker_prefetch_multiplier = 0", more="--pool=threads -c 1")
    client = project.client()
    for _ in range(30):
        client.send_task("note", args=("long", 60))
    until(lambda: project.broker.hlen("unacked") == 29, "all but the running one are reserved")


def test_a_multiplier_of_0_on_the_command_line_is_none_and_acks_late_is_no_option(project):
    wrong = chapter_06b.QUIZ["06b-2"].wrong
    assert "on the command line, 0 counts as no value" in wrong["--prefetch-multiplier=0"]
    notes(project, "worker_prefetch_multiplier = 3", more="--pool=threads -c 2 --prefetch-multiplier=0 -n w@%h")
    assert node_stats(project.client(), "w")["prefetch_count"] == 6
    assert wrong["--acks-late"] == "`celery worker` has no such option."
    assert not any("ack" in option for parameter in worker_command.params for option in parameter.opts)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_late_acknowledgement_and_multiplier_1_leave_no_room_for_another_message(project, pool):
    stands("06b", "A running task is then still unacknowledged, so it counts, and there is no room for another")
    stands("06b", "With prefork and threads, the recipe works")
    (project.folder / "holds.py").write_text(HOLDS + "app.conf.task_acks_late = True\n")
    project.worker(f"{HOLDS_WORKER} --pool={pool} -c 2 --prefetch-multiplier=1 -n w@%h")
    client = project.client()
    held = [client.send_task("hold") for _ in range(4)]
    until(lambda: project.log().count("holding") == 2, "two tasks run")
    # it takes what it may before it answers the second question
    assert [node_stats(client, "w")["prefetch_count"] for _ in range(2)] == [2, 2]
    assert (project.broker.llen("celery"), project.broker.hlen("unacked")) == (2, 2)
    (project.folder / "go").touch()
    assert [result.get(timeout=20) for result in held] == ["gone on"] * 4


def test_one_worker_collects_all_delayed_tasks_however_many_there_are(project):
    stands("06b", "one worker collects *all* delayed tasks that it meets, however many there are")
    client = project.client()
    for _ in range(300):
        client.send_task("note", args=("later",), countdown=1800)
    notes(project, more="--pool=threads -c 1 --prefetch-multiplier=1")
    until(lambda: (project.broker.llen("celery"), project.broker.hlen("unacked")) == (0, 300), "all are taken", 20)


def test_prefetching_is_disabled_with_redis_only(project):
    stands("06b", "which exists for Redis only", "and `--disable-prefetch` has no effect there")
    notes(project, option="-b memory://", more="--pool=solo --disable-prefetch")
    logged(project, "worker_disable_prefetch is only supported for Redis brokers")


# --- 07 ------------------------------------------------------------------------------------------------------


def test_a_task_passes_its_root_id_on_which_is_not_in_the_log_by_default(project):
    stands("07", "if a task sends another one, it passes its `root_id` on")
    stands("07", "by default, Celery doesn't write `root_id` into the log")
    stands("07", "The line `card refused` comes from a library, and it names no task at all.")
    sending = """
import logging
@app.task(name="first")
def first():
    second.delay()
@app.task(name="second", bind=True)
def second(self):
    if not self.request.retries:
        raise self.retry(countdown=0)
    logging.getLogger("cards").warning("card refused")
    app.send_task("third", queue="nobody")
"""
    notes(project, f"update()\n{sending}")
    project.client().send_task("first", root_id="a-root")
    logged(project, "Task second[")
    until(lambda: project.log().count(" succeeded in ") == 2, project.log(), seconds=20)
    headers = json.loads(project.broker.rpop("nobody"))["headers"]
    assert headers["root_id"] == "a-root" not in (headers["id"], headers["parent_id"])
    assert "a-root" not in project.log()
    assert re.search(r"(?m)^\[[^]]*\] card refused$", project.log())


def test_a_task_formatter_writes_the_task_s_id_into_a_library_s_line(project):
    stands("07", "`celery.app.log.TaskFormatter` can write the task's id into such a line, too. But it would be the id")
    (project.folder / "cards.py").write_text("""
import logging
from celery import Celery, signals
from celery.app.log import TaskFormatter
app = Celery("cards")
@signals.after_setup_logger.connect
def with_ids(logger, **options):
    for handler in logger.handlers:
        handler.setFormatter(TaskFormatter("%(task_id)s %(message)s"))
@app.task(name="charge")
def charge():
    logging.getLogger("cards").warning("card refused")
""")
    project.worker("celery -A cards worker --pool=threads -c 1 --without-mingle --without-gossip")
    charged = project.client().send_task("charge", root_id="ada")
    logged(project, f"{charged.id} card refused")


def test_with_redis_a_stored_success_stays(project):
    stands("07", "With Redis, a SUCCESS stays there as it is")
    client = project.client()
    client.backend.store_result("one", 2, "SUCCESS")
    error = LookupError("no card")
    for state, what in (("STARTED", {}), ("RETRY", error), ("FAILURE", error), ("REVOKED", error), ("SUCCESS", 4)):
        client.backend.store_result("one", what, state)
        stored = client.AsyncResult("one")
        assert (stored.state, stored.result) == ("SUCCESS", 2), state


def test_a_printed_text_is_one_record_however_many_lines_it_has(project):
    stands("07", "The second printed line is missing", "at its beginning, even if it is many lines long")
    printing = '@app.task(name="prints")\ndef prints():\n    print("one line\\nand another")'
    ids_worker(project, "shop", settings=printing)
    under(project, "shop", "prints")
    assert line_of(project, "one line").endswith(" ada-7] one line")
    assert line_of(project, "and another") == "and another"


# --- 07b -----------------------------------------------------------------------------------------------------


IDS = """
import os
import time
from celery import Celery
from celery.utils.log import get_task_logger
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from course_tasks import correlation
{change}
app = Celery("shop")
correlation.install(app)
{settings}
logger = get_task_logger(__name__)
@app.task(name="pack")
def pack():
    logger.info("packed")
@app.task(name="hang", time_limit=1)
def hang():
    time.sleep(60)
@app.task(name="lost")
def lost():
    os._exit(1)
"""


def ids_worker(
    project: Project, name: str, change: str = "", settings: str = "", pool: str = "prefork -c 1", more: str = ""
) -> None:
    """Start a worker with the course's ids, changed somehow, and with more tasks. All is called by the same name."""
    (project.folder / f"{name}.py").write_text(IDS.format(change=change, settings=settings) + more)
    command = f"celery -A {name} worker --pool={pool} -Q {name} -n {name}@%h --without-mingle --without-gossip"
    project.worker(command)


def under(project: Project, queue: str, task: str, id: str | None = "ada-7", **options) -> AsyncResult:
    """Send a task under an id, from a client that knows no ids itself."""
    return project.client().send_task(task, queue=queue, headers={HEADER: id} if id else {}, **options)


def line_of(project: Project, *texts: str) -> str:
    """Wait for a line of the log with all of these texts."""

    def found() -> list[str]:
        return [line for line in project.log().splitlines() if all(text in line for text in texts)]

    return until(found, f"{texts} in the log:\n{project.log()}", seconds=20)[0]


@pytest.mark.parametrize(
    "row, change, id, line, shown",
    [
        ("`_publish` | the first task's own id stands in", "", None, " received", "TASK"),
        ("`_begin` | the lines of running tasks have a `-`", "_begin = lambda **_: None", "ada-7", ": packed", "-"),
        ("`CorrelatedConsumer` | `received` has a `-`", "CorrelatedConsumer = Consumer", "ada-7", " received", "-"),
        ("`received` has a `-`, and `Hard time limit` too", "CorrelatedConsumer = Consumer", "ada-7", "Hard time", "-"),
        ("`CorrelatedRequest` | `Hard time limit` has a `-`", "CorrelatedRequest = Request", "ada-7", "Hard time", "-"),
    ],
)
def test_each_part_of_the_ids_has_its_own_job(project, row, change, id, line, shown):
    stands("07b", row)
    ids_worker(project, "shop", change and f"correlation.{change}")
    task = under(project, "shop", "hang" if line == "Hard time" else "pack", id)
    shown = task.id if shown == "TASK" else shown
    assert f" {shown}] " in line_of(project, line, task.id[:8])


@pytest.mark.parametrize("change, own", [("", False), ("correlation._begin = lambda **_: None", True)])
def test_without_begin_a_task_sends_others_under_its_own_id(project, change, own):
    stands("07b", "and the tasks that they send have the first task's own id in `received`")
    order = '@app.task(name="order")\ndef order():\n    return pack.apply_async(queue="shop").id'
    ids_worker(project, "shop", change, more=order)
    task = under(project, "shop", "order")
    sent = task.get(timeout=20)
    assert f" {task.id if own else 'ada-7'}] " in line_of(project, " received", sent[:8])


def test_a_line_whose_format_names_a_field_that_the_record_lacks_is_an_error():
    stands("07b", "the lines are missing, because the formats name a field that no record has")
    with pytest.raises(ValueError, match=HEADER):
        logging.Formatter(FORMAT).format(logging.LogRecord("celery", logging.INFO, "a.py", 1, "ready.", None, None))


def test_who_logs_what_about_a_task_and_the_main_process_s_lines_have_its_id(project):
    stands(
        "07b",
        "The task's own line and `succeeded` have the id, because a child process logs them",
        "because the main process logs them, and it doesn't run any task",
        "because a killed child doesn't log how its task has ended.",
        "So a message is logged with its id even if nobody knows its task, so that it never becomes one.",
        "the caller's id in an eager call, and no id in a child process.",
        "`on_timeout` | a time limit is over | `Hard time limit (1s) exceeded`, or `Soft` |",
        "`on_failure` | a hard time limit is over, or the child process has died | `Task handler raised error:`",
    )  # what the other three methods do is in test_correlation.py
    formats = (
        "worker_log_format = '%(processName)s ' + correlation.FORMAT",
        "worker_task_log_format = '%(processName)s ' + correlation.TASK_FORMAT",
    )
    settings = "\n".join(f"app.conf.{setting}" for setting in formats)
    after = """
import logging
from celery import signals
@signals.task_postrun.connect
def after(task, **_):
    logging.warning("after %s", task.request.id)
@app.task(name="soft", soft_time_limit=1)
def soft():
    time.sleep(60)
"""
    ids_worker(project, "shop", settings=settings, more=after, pool="prefork -c 2")
    names = ("pack", "hang", "soft", "lost", "nosuch")
    pack, hang, soft, lost, _ = (under(project, "shop", name) for name in names)
    said = {
        "MainProcess": [
            (" received", pack),
            ("Hard time limit (1s) exceeded", hang),
            ("Soft time limit (1s) exceeded", soft),
            ("Task handler raised error: WorkerLostError", lost),
        ],
        "ForkPoolWorker": [(": packed", pack), (" succeeded in ", pack)],
    }
    for process, lines in said.items():
        for text, task in lines:
            line = line_of(project, text, "" if "WorkerLost" in text else task.id[:8])
            assert line.startswith(process) and " ada-7] " in line, line
    assert " ada-7] " in line_of(project, "Received unregistered task of type 'nosuch'")
    assert " -] " in line_of(project, f"after {pack.id}")
    ends = [line for line in project.log().splitlines() if line.startswith("Fork") and hang.id[:8] in line]
    assert not [line for line in ends if "succeeded" in line or "raised" in line]


@pytest.mark.parametrize(
    "option, copied", [("", sys.platform != "darwin"), ("--pool-start-method=spawn", False)], ids=["default", "spawn"]
)
def test_a_child_is_a_copy_of_the_main_process_unless_it_is_spawned(project, option, copied):
    stands(
        "07b", "On Linux, a child is by default a copy (a **fork**) of the main process.", "a child is started afresh"
    )
    settings = """
from celery import signals
made = []
signals.worker_init.connect(lambda **_: made.append("by the main process"), weak=False)
@app.task(name="look")
def look():
    logger.info("made %s", made)
"""
    ids_worker(project, "shop", settings=settings, pool=f"prefork -c 1 {option}")
    under(project, "shop", "look")
    assert line_of(project, ": made ").endswith("['by the main process']" if copied else "[]")


def test_a_spawned_child_logs_before_it_has_imported_the_code(project):
    stands("07b", "and logs before it has imported your code. Its first records don't have our field, so `_unformat`")
    spawned = "prefork -c 1 --pool-start-method=spawn"
    missing = f"not found in record: '{HEADER}'"
    ids_worker(project, "shop", pool=spawned)
    line_of(project, f"pack[{under(project, 'shop', 'pack').id[:8]}]: packed")
    assert missing not in project.log()
    ids_worker(project, "kept", "correlation._unformat = lambda **_: None", pool=spawned)
    line_of(project, missing)


def test_task_postrun_is_sent_however_a_task_ends():
    stands("07b", "Before a task runs, Celery sends the signal `task_prerun`, and after it `task_postrun`.")
    code = """
from celery import Celery, exceptions, signals
app = Celery("ends")
@app.task(bind=True)
def end(self, how):
    seen.append("runs")
    if how != "well":
        raise getattr(exceptions, how, LookupError)()
signals.task_prerun.connect(lambda **_: seen.append("prerun"), weak=False)
signals.task_postrun.connect(lambda **_: seen.append("postrun"), weak=False)
for how in ("well", "badly", "Ignore", "Reject", "Retry"):
    seen = []
    app.tasks[end.name].apply([how])
    print(*seen)
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout == "prerun runs postrun\n" * 5, said.stderr


@pytest.mark.parametrize("first, shown", [("logging.basicConfig(level=10)", "True\n"), ("pass", "False\n")])
def test_an_accepted_task_is_logged_if_the_level_was_set_before_celery_was_imported(first, shown):
    stands("07b", "`Task accepted`, if the log had the level DEBUG when Celery was imported |")
    looks = f"import logging; {first}; import celery.worker.request as module; print(module._does_debug)"
    assert subprocess.check_output([sys.executable, "-c", looks], text=True) == shown


@pytest.mark.parametrize("loop, id", [("hub", None), ("none", "ada-7")])  # gevent and eventlet have none
def test_what_is_logged_about_an_accepted_task_has_its_id_but_not_a_lost_acknowledgement(caplog, monkeypatch, loop, id):
    stands("07c", "in prefork, threads and solo, `Couldn't ack`, when the connection to the broker is broken")

    def broken(tag, multiple):
        raise ConnectionError("broken")

    seen = {}

    def look(record: logging.LogRecord) -> bool:
        seen[record.getMessage().partition(":")[0].partition(" 1 ")[0]] = correlation_id.get()
        return True

    message = taken(app, "add")
    message.channel = SimpleNamespace(basic_ack=broken, no_ack_consumers=[])
    consumer = SimpleNamespace(hub=Hub() if loop == "hub" else None)
    on_ack = functools.partial(Consumer.call_soon_ack, consumer, message.ack_log_error)
    errors = (ConnectionError,)
    with correlation._current("ada-7"):
        request = CorrelatedRequest(message, on_ack=on_ack, app=app, connection_errors=errors, task=add)
    caplog.set_level(logging.DEBUG, logger="celery.worker.request")
    monkeypatch.setattr("celery.worker.request._does_debug", True)  # as it is in a program that sets the level first
    with caplog.filtering(look):  # type: ignore[arg-type]  # a function will do
        request.on_accepted(1, time.monotonic())
        for later in consumer.hub._pop_ready() if consumer.hub else ():
            later()
    assert seen["Task accepted"] == "ada-7"
    [lost] = [text for text in seen if text.startswith("Couldn't ack")]
    assert seen[lost] == id


def test_a_global_variable_would_do_for_one_task_at_a_time_only(project):
    stands(
        "07b",
        "In prefork and solo, a process runs one task at a time, so a global variable would do. With threads, gevent "
        "and eventlet, several tasks run in one process, and each of them would overwrite the id of the others.",
        "Some lines of a task have the id of another request.",
    )
    change = """
class Global:
    value = None
    def get(self):
        return self.value
    def set(self, value):
        before, self.value = self.value, value
        return before
    reset = set
correlation.correlation_id = Global()
"""
    settings = """
@app.task(name="twice")
def twice():
    logger.warning("begins")
    time.sleep(1)
    logger.warning("ends")
"""
    for pool, right in (("prefork -c 2", True), ("solo", True), ("threads -c 2", False), ("gevent -c 2", False)):
        name = pool.split()[0] + "_shop"
        ids_worker(project, name, change, settings, pool)
        tasks = {id: under(project, name, "twice", id).id[:8] for id in ("ada-7", "ben-8")}
        lines = [line_of(project, f"twice[{task}]: ends").split("]")[0] for task in tasks.values()]
        assert ([line.split()[-1] for line in lines] == list(tasks)) is right, pool


# --- 07c -----------------------------------------------------------------------------------------------------


def test_a_message_without_root_id_has_the_task_s_own_id(project):
    stands("07c", "Other clients may leave out `root_id` as well. Then the task's own id stands in.")
    ids_worker(project, "shop")
    client = project.client()
    client.conf.task_protocol = 1  # an old one, without root_id
    task = client.send_task("pack", queue="shop").id
    for line in (("received", task), (f"pack[{task[:8]}]: packed",), ("succeeded", task)):
        assert f" {task}] " in line_of(project, *line)


@pytest.mark.parametrize("redirects", [True, False])
def test_a_worker_is_silent_about_a_wrong_format_because_it_redirects_stderr(project, redirects):
    stands(
        "07c",
        "A line that can't be formatted is dropped, and nothing tells you so.",
        "Only the task's own line is there, because a task logger has a format of its own (`worker_task_log_format`).",
        "It sends what programs write to stderr to the same log",
    )
    settings = (
        f"app.conf.update(worker_log_format='%(customer)s', worker_redirect_stdouts={redirects})\n"
        "import sys\nfrom celery import signals\n"
        "signals.worker_ready.connect(lambda **_: print(' ready.', file=sys.__stdout__, flush=True), weak=False)"
    )
    ids_worker(project, "shop", settings=settings)
    task = under(project, "shop", "pack")
    line_of(project, "pack[", ": packed")
    if redirects:
        assert not any(text in project.log() for text in ("received", task.id, "Logging error", "Traceback"))
    else:
        line_of(project, "--- Logging error ---")


def test_with_setup_logging_what_a_task_prints_is_no_record(project):
    stands("07c", "with `setup_logging`, what a task prints is not a record any more, so it has no id")
    settings = f"""
import logging
from celery import signals
def ours(**_):
    logging.basicConfig(format="<%({HEADER})s> %(message)s", level="INFO")
signals.setup_logging.connect(ours)
@app.task(name="prints")
def prints():
    print("this was printed", flush=True)
    logging.warning("this was logged")
"""
    ids_worker(project, "shop", settings=settings)
    under(project, "shop", "prints")
    assert line_of(project, "this was logged") == "<ada-7> this was logged"
    assert line_of(project, "this was printed") == "this was printed"


@pytest.mark.parametrize("hijack", [False, True])
def test_a_configuration_of_one_s_own_stays_if_celery_does_not_hijack_the_root_logger(project, hijack):
    stands("07c", "your own configuration, with `worker_hijack_root_logger=False` or the signal `setup_logging`")
    settings = f"""
import logging
logging.basicConfig(format="<%({HEADER})s> %(message)s", level="INFO")
app.conf.worker_hijack_root_logger = {hijack}
@app.task(name="prints")
def prints():
    print("this was printed", flush=True)
    logging.warning("this was logged")
"""
    ids_worker(project, "shop", settings=settings)
    task = under(project, "shop", "prints").id
    line_of(project, f"Task prints[{task}] succeeded")
    for text in ("this was printed", "this was logged", f"Task prints[{task}] received"):
        line = line_of(project, text)
        assert project.log().count(text) == 1
        assert line == f"<ada-7> {text}" if not hijack else line.endswith(f" ada-7] {text}")


@pytest.mark.parametrize("id", ["ada-7", None])
def test_a_chain_run_eagerly_has_its_caller_s_id_or_one_for_each_task(id):
    stands("07c", "If you run a chain eagerly without an id, each of its tasks has an id of its own.")
    code = f"""
from celery import Celery, chain
from course_tasks.correlation import correlation_id, install
app = Celery("eager")
install(app)
@app.task
def step():
    return correlation_id.get()
correlation_id.set({id!r})
last = chain(step.si(), step.si(), step.si()).apply()
results = last, last.parent, last.parent.parent
print(*("own" if result.get() == result.id else result.get() for result in results))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout.split() == [id or "own"] * 3, said.stderr


def test_a_header_with_a_name_of_celery_s_is_none_of_one_s_own():
    stands("07c", "Celery uses about fifty names itself", "such as `id`, `task`, `args`, `chord` and `hostname`")
    taken = {name for name in chapter_07b.taken() if not name.startswith("_")}
    assert {"id", "task", "args", "chord", "hostname", "timelimit", "correlation_id"} < taken and 45 <= len(taken) <= 55
    assert "shop_order" not in taken and Context({"shop_order": "a"}).headers == {"shop_order": "a"}
    for name in taken:
        if not callable(getattr(Context, name, None)):  # else it would take the place of a method
            assert Context({name: "order-1"}).headers in (None, "order-1"), name


@pytest.mark.parametrize("pool", ["prefork -c 1", "threads"])
def test_a_worker_dies_of_a_wrong_time_limit_and_so_does_the_next_one(project, pool):
    stands(
        "07c",
        "The whole worker dies, and so do prefork and threads workers.",
        "so the next worker would take it and die as well",
    )
    ids_worker(project, "shop", pool=pool)
    under(project, "shop", "pack")
    line_of(project, " succeeded in ")
    project.client().send_task("pack", queue="shop", headers={"timelimit": "ten minutes"})
    line_of(project, "ValueError: too many values to unpack")
    until(lambda: project.broker.llen("shop") == 1, "the message is back in the queue", seconds=20)
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        ids_worker(project, "shop", pool=pool)
        until(lambda: project.broker.llen("shop") == 1, "the message is back again", seconds=20)
        raise WrongAnswer("ended before it was ready, or soon after")


def test_how_an_id_gets_into_a_thread_and_into_a_greenlet(project):
    stands(
        "07c",
        "for a thread: `Thread(target=copy_context().run, args=(function,))`",
        "for a greenlet: `gevent.spawn(copy_context().run, function)`",
        "for an asyncio task: nothing, because it starts with a copy anyway.",
        "everything that such a thread or greenlet logs has a `-`",
        "In a gevent worker, Python's threads are greenlets.",
    )
    settings = """
import asyncio, gevent, logging, threading
from collections.abc import Callable
from contextvars import copy_context
log = logging.getLogger("library").warning
async def tell():
    log("an asyncio task")
async def start():
    await asyncio.create_task(tell())
@app.task(name="helpers")
def helpers():
    threading.Thread(target=log, args=("a plain thread",)).start()
    threading.Thread(target=copy_context().run, args=(log, "a carried thread")).start()
    threading.Thread(target=lambda: log("a thread is a gevent.%s", type(gevent.getcurrent()).__name__)).start()
    gevent.spawn(log, "a plain greenlet").join()
    gevent.spawn(copy_context().run, log, "a carried greenlet").join()
    asyncio.run(start())
"""
    ids_worker(project, "shop", settings=settings, pool="gevent")
    under(project, "shop", "helpers")
    ids = {"an asyncio task": "ada-7", "a carried thread": "ada-7", "a carried greenlet": "ada-7"}
    ids |= {"a plain greenlet": "-", "a plain thread": "-"}
    for text, id in ids.items():
        assert f" {id}] {text}" in line_of(project, text)
    line_of(project, "a thread is a gevent.Greenlet")


def test_two_threads_can_not_use_one_copy_of_a_context():
    stands("07c", "Take a new copy for each of them, because two threads can't use one copy at the same time.")
    context, inside, done = copy_context(), threading.Event(), threading.Event()
    first = threading.Thread(target=context.run, args=(lambda: (inside.set(), done.wait(10)),))
    first.start()
    assert inside.wait(10)
    with pytest.raises(RuntimeError):  # this is another thread
        context.run(print)
    done.set()
    first.join()


def test_since_python_3_14_a_thread_takes_a_context():
    stands("07c", "Since Python 3.14, you can also write `Thread(target=function, context=copy_context())`.")
    seen, since = [], sys.version_info >= (3, 14)
    with correlation._current("ada-7"), contextlib.nullcontext() if since else pytest.raises(TypeError):
        thread = threading.Thread(target=lambda: seen.append(correlation_id.get()), context=copy_context())
        thread.start()
        thread.join()
    assert seen == (["ada-7"] if since else [])


def test_a_worker_log_format_counts_if_it_comes_after_install():
    stands("07c", "your own `worker_log_format` has to come after it, and has to name the field")
    code = """
from celery import Celery
from course_tasks.correlation import FORMAT, install
app = Celery("formats")
app.conf.worker_log_format = "before"
install(app)
print(app.conf.worker_log_format == FORMAT)
app.conf.worker_log_format = "after"
print(app.conf.worker_log_format)
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout == "True\nafter\n", said.stderr


def test_a_base_class_with_a_request_of_its_own_keeps_that():
    stands("07c", "But if you give one its own `Request`, derive that from `CorrelatedRequest`.")
    code = """
from celery import Celery, Task
from celery.worker.request import Request
from course_tasks.correlation import CorrelatedRequest, install
class Own(Task): Request = Request
class Derived(Task): Request = type("Ours", (CorrelatedRequest,), {})
app = Celery("bases")
install(app)
def add(): pass
bases = Task, Own, Derived
print([issubclass(app.task(name=base.__name__, base=base)(add).Request, CorrelatedRequest) for base in bases])
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout == "[True, False, True]\n", said.stderr


# --- 07d -----------------------------------------------------------------------------------------------------

WEB = ("web", "web-order", "web-id", "log-config")  # the cells that write the web service
TASKS_OF_THE_SHOP = ("shop", "shop-tasks")


def write_cells(project: Project, *ids: str, edit=lambda source: source) -> None:
    """Write the files of the chapter's `%%writefile` cells with these ids."""
    for cell in cells(copies.chapters()["07d"], "code"):
        if cell.id in ids:
            magic, _, source = cell.source.partition("\n")
            with (project.folder / Path(magic.split()[-1]).name).open("a") as file:
                file.write(edit(source) + "\n")


@contextlib.contextmanager
def service(project: Project, edit=lambda source: source):
    """The chapter's web service under uvicorn, on the project's broker; gives its port."""
    write_cells(project, *WEB, *TASKS_OF_THE_SHOP, edit=edit)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "web:app", "--port", str(port), "--log-config", "log.json"]
    process = subprocess.Popen(command, cwd=project.folder, env=project.environment)
    try:
        until(lambda: listens(port), "the web service", seconds=20)
        yield port
    finally:
        process.terminate()
        process.wait()


def post(port: int, header: bytes = b"X-Request-ID: ada-7") -> str:
    """What the service answers to an order with a header, byte by byte as given."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"POST /orders/ada HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + header + b"\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def web_log(project: Project, text: str) -> str:
    """The line of the web service's log with a text."""
    log = project.folder / "web.log"
    until(lambda: text in log.read_text(), f"{text!r} in {log.read_text()}", seconds=20)
    return next(line for line in log.read_text().splitlines() if text in line)


def test_no_line_break_in_an_id_gets_through_and_no_request_uses_the_id_of_another_one(project):
    stands(
        "07d",
        "httpx refuses to send it. If another program sends it, uvicorn takes the line break as the end of the header",
        "or refuses the request with status 400.",
        "uvicorn runs each request in an asyncio task of its own, and `with_id` sets a new value at the beginning",
        "So no request uses the id of another one.",
    )
    first = "app = BaseHTTPMiddleware(app, with_id)"
    around = f"""{first}
inner = app
async def app(scope, receive, send):
    if scope["type"] == "http":
        logging.warning("begins")  # before the middleware
    await inner(scope, receive, send)
"""
    with service(project, lambda source: source.replace(first, around)) as port:
        with httpx.Client(timeout=30) as client:  # it keeps its connection
            for id in ("ada-7", "ben-8"):
                answer = client.post(f"http://127.0.0.1:{port}/orders/ada", headers={"X-Request-ID": id})
                assert answer.headers["X-Request-ID"] == id
        for broken in (b"X-Request-ID: a\nb", b"X-Request-ID: a\rb"):
            assert post(port, broken).startswith("HTTP/1.1 400")
        assert "x-request-id: ada-7" in post(port).lower()
        assert re.search(r"x-request-id: [0-9a-f]{32}\r", post(port, b"X-Other: 1").lower())
        begun = [line for line in (project.folder / "web.log").read_text().splitlines() if line.endswith("begins")]
        assert len(begun) == 4 and all(" WARNING -] " in line for line in begun), begun
        assert "x-request-id: ada-7\r" in post(port, b"X-Request-ID: ada-7\nX: y").lower()
        with httpx.Client(timeout=30) as client:
            with pytest.raises(httpx.LocalProtocolError):
                client.post(f"http://127.0.0.1:{port}/orders/ada", headers={"X-Request-ID": "ada-7\nfoo"})
            # after a large body, the context of a request is the one of the next request as well
            client.post(
                f"http://127.0.0.1:{port}/orders/ada", content=b"x" * 300_000, headers={"X-Request-ID": "eve-9"}
            )
            answer = client.post(f"http://127.0.0.1:{port}/orders/ada")
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])


NEXT = "    response = await call_next(request)\n"
CALL = (
    NEXT + '    response.headers["X-Request-ID"] = correlation_id.get()\n    return response\n',
    f"    try:\n    {NEXT}        return response\n    finally:\n        correlation_id.reset(token)\n",
)


@pytest.mark.parametrize("reset", [False, True])
def test_after_a_reset_uvicorn_s_own_lines_have_no_id(project, reset):
    stands("07d", "After a reset, those lines would have no id.")

    def edit(source: str) -> str:
        fails = 'logging.info("an order of %s", {"ada": customer}[customer])'
        source = source.replace('logging.info("an order of %s", customer)', fails)
        return source.replace(*CALL).replace("correlation_id.set(", "token = correlation_id.set(") if reset else source

    with service(project, edit) as port:
        post(port)
        assert ("INFO ada-7]" in web_log(project, '"POST /orders/ada')) is not reset
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"POST /orders/eve HTTP/1.1\r\nHost: a\r\nX-Request-ID: eve-9\r\n\r\n")
            connection.recv(100)
        assert ("ERROR eve-9]" in web_log(project, "Exception in ASGI application")) is not reset


def test_starlette_has_forty_threads_and_celery_by_itself_no_time_out_for_the_broker(project):
    stands(
        "07d",
        "Starlette runs plain functions, such as `order`, in 40 threads by default",
        "Celery would have waited until the broker",
    )

    async def threads() -> int:
        inside, release = [], threading.Event()

        def wait(request):
            inside.append(request)
            release.wait(60)
            return PlainTextResponse("")

        transport = httpx.ASGITransport(Starlette(routes=[Route("/", wait)]))
        client = httpx.AsyncClient(transport=transport, base_url="http://shop")
        async with client, anyio.create_task_group() as group:
            for _ in range(45):
                group.start_soon(client.get, "/")
            with anyio.move_on_after(60):
                while len(inside) < 40:
                    await anyio.sleep(0.01)
            await anyio.sleep(0.2)  # more than 40 would begin now
            number = len(inside)
            release.set()
        return number

    assert anyio.run(threads) == 40
    app = project.client()
    for options, seconds in (({}, None), ({"socket_timeout": 1}, 1)):
        app.conf.broker_transport_options = options
        assert timeout_of(app) == seconds


def test_the_broker_may_have_a_message_of_a_client_that_gave_up(project):
    stands("07d", "the broker may have received the message although the client gave up")
    received = []

    def answer(request: bytes, reply: bytes) -> bytes:
        if b"LPUSH" not in request:
            return reply
        received.append(reply)
        return b""

    with behind_a_proxy(project, answer) as app:
        app.conf.broker_transport_options = {"socket_timeout": 1, "socket_connect_timeout": 1}  # as in the chapter
        for _ in range(5):  # a busy machine may take too long for the greeting already
            with pytest.raises(OperationalError):
                app.send_task("order", queue="shop", ignore_result=True)
            if received:
                break
        until(
            lambda: project.broker.llen("shop") == len(received) > 0, "what was passed on is in the queue", seconds=20
        )


def test_a_worker_replaces_an_id_that_forges_lines(project):
    stands("07d", "It replaces an id that isn't fit for a log by the id of the first task.")
    write_cells(project, *TASKS_OF_THE_SHOP)
    project.worker("celery -A shop worker --pool=threads --without-mingle --without-gossip")
    forged = {HEADER: "ada-7\n[2026-01-01 00:00:00,000 INFO ben-8] Task pay[1] succeeded"}
    sent = project.client().send_task("order", args=("ada",), queue="shop", headers=forged)
    logged(project, "a parcel for ada")
    assert "Task pay" not in project.log() and f" {sent.id}] Task pack" in project.log()


def test_what_the_library_keeps_by_default_and_with_a_validator_of_none(caplog):
    stands(
        "07d", "By default it keeps only ids that look like a UUID", "With `validator=None` it would believe everything"
    )

    async def kept(id: str, **options) -> bool:
        app = CorrelationIdMiddleware(Starlette(), **options)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            return (await client.get("/", headers={"X-Request-ID": id})).headers["X-Request-ID"] == id

    assert anyio.run(kept, "5f0c6e1f9a3b4c7d8e2f1a0b9c8d7e6f") and not anyio.run(kept, "ada-7")
    [told] = [record for record in caplog.records if record.name == "asgi_correlation_id"]
    assert told.levelname == "WARNING", "it warns about each id that it refuses"
    assert anyio.run(lambda: kept("ada-7] cancelled [", validator=None))
    stands("07d", "with `validator=` and a function of your own you decide")
    own = {"validator": lambda id: id == "ada-7"}
    assert anyio.run(lambda: kept("ada-7", **own))
    assert not anyio.run(lambda: kept("5f0c6e1f9a3b4c7d8e2f1a0b9c8d7e6f", **own))


def test_the_library_s_variable_has_the_same_name_and_the_request_s_id():
    stands("07d", "Its own context variable is also called `correlation_id`.")
    id, seen = "5f0c6e1f9a3b4c7d8e2f1a0b9c8d7e6f", []

    async def look(scope, receive, send):
        seen.append(asgi_correlation_id.correlation_id.get())
        await PlainTextResponse("")(scope, receive, send)

    async def ask():
        transport = httpx.ASGITransport(CorrelationIdMiddleware(look))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            await client.get("/", headers={"X-Request-ID": id})

    anyio.run(ask)
    assert seen == [id] and asgi_correlation_id.correlation_id is not correlation_id


def test_a_context_variable_goes_into_the_endpoint_and_comes_back_only_with_a_plain_middleware():
    stands("07d", "With `BaseHTTPMiddleware` it can't, because it works with a copy of the context. For that you need")
    stands(
        "07d", "a middleware without this class (Starlette's documentation shows how), and `order` has to be an `async`"
    )
    seen = []

    def in_a_thread(request):
        correlation_id.set("of the endpoint")
        return PlainTextResponse("")

    async def endpoint(request):
        seen.append(correlation_id.get())
        return in_a_thread(request)

    async def base(request, call_next):
        correlation_id.set("ada-7")
        answer = await call_next(request)
        seen.append(correlation_id.get())
        return answer

    async def plain(scope, receive, send):
        correlation_id.set("ada-7")
        await web(scope, receive, send)
        seen.append(correlation_id.get())

    async def ask(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            await client.get("/")

    web = Starlette(routes=[Route("/", endpoint)])
    anyio.run(ask, BaseHTTPMiddleware(web, base))
    anyio.run(ask, plain)
    assert seen == ["ada-7", "ada-7", "ada-7", "of the endpoint"]
    web = Starlette(routes=[Route("/", in_a_thread)])
    anyio.run(ask, plain)
    assert seen[4:] == ["ada-7"]


def test_an_id_that_is_not_reset_stays_in_the_context_of_a_test():
    stands("07d", "the app shares the context of the test, so the id stays there")

    async def with_id(request, call_next):
        correlation_id.set("ada-7")
        return await call_next(request)

    async def ask() -> str | None:
        transport = httpx.ASGITransport(BaseHTTPMiddleware(Starlette(), with_id))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            await client.get("/")
        return correlation_id.get()

    assert anyio.run(ask) == "ada-7"


def test_the_lines_in_the_middleware_make_the_trace_id_the_correlation_id():
    stands("07d", "In a web service, these lines in the middleware make the trace id the correlation id.")
    stands("07d", "OpenTelemetry's own middleware has to be outside of ours, because otherwise there is no span yet:")
    cell = next(cell for cell in cells(copies.chapters()["07d"], "markdown") if cell.id == "traced-text")
    [lines] = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
    tracer = TracerProvider().get_tracer("test")

    def found() -> str | None:
        exec(lines, {"trace": trace, "correlation_id": correlation_id})
        return correlation_id.get()

    assert copy_context().run(found) is None, "no span, no id"
    with tracer.start_as_current_span("checkout") as span:
        assert copy_context().run(found) == f"{span.get_span_context().trace_id:032x}"


def test_an_instrumented_client_writes_the_trace_into_the_headers_by_itself(project):
    stands(
        "07d", "`inject` writes the trace into the headers of the message, as an instrumented client does by itself."
    )
    code = """
from celery import Celery
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
provider = TracerProvider()
CeleryInstrumentor().instrument(tracer_provider=provider)
app = Celery()
@app.task(name="order")
def order(): pass
with provider.get_tracer("test").start_as_current_span("checkout") as span:
    order.apply_async(queue="nobody", ignore_result=True)
print(f"{span.get_span_context().trace_id:032x}")
"""
    (project.folder / "checkout.py").write_text(code)
    trace_id = project.run("python checkout.py", seconds=60).splitlines()[-1]
    headers = json.loads(project.broker.rpop("nobody"))["headers"]
    assert headers["traceparent"].split("-")[1] == trace_id


def test_spans_have_a_start_an_end_and_a_parent(project):
    stands("07d", "Each piece of work is a **span**, with a start, an end and a parent.")
    stands("07d", "OpenTelemetry adds durations and parents")
    ids = "{span.context.span_id:016x} {span.parent.span_id:016x}"
    line = f'f"span {{span.name}} {ids} {{span.end_time - span.start_time}}\\n"'
    edit = functools.partial(re.sub, r'f"span .*?\\n"', lambda _: line)
    write_cells(project, *TASKS_OF_THE_SHOP, "traced", edit=edit)
    project.worker("celery -A traced worker --pool=threads --without-mingle --without-gossip")
    checkout = f"{7:016x}"
    headers = {"traceparent": f"00-{5:032x}-{checkout}-01"}
    project.client().send_task("order", args=("ada",), queue="traced", headers=headers)
    until(lambda: project.log().count("\nspan ") == 7, project.log(), seconds=20)
    spans = {name: rest for name, *rest in map(str.split, re.findall(r"(?m)^span (.*)", project.log()))}
    ids = {name: id for name, (id, _, _) in spans.items()}
    assert spans["run/order"][1] == checkout
    for name in ("charge", "reserve", "pack"):
        assert spans[f"run/{name}"][1] == ids[f"apply_async/{name}"]
        parents = ("run/order",) if name != "pack" else ("run/charge", "run/reserve")
        assert spans[f"apply_async/{name}"][1] in [ids[parent] for parent in parents]
    assert int(spans["run/charge"][2]) > 0.25e9, "it sleeps for 0.3 s"


def test_a_batch_span_processor_sends_the_spans_in_a_thread_of_its_own():
    stands("07d", "use `BatchSpanProcessor`. It sends the spans in a thread of its own, so the tasks don't wait.")
    threads = {}

    def exporter(name: str) -> SimpleNamespace:
        def export(spans):
            threads[name] = threading.current_thread()

        return SimpleNamespace(export=export, shutdown=lambda: None)

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter("batch"), schedule_delay_millis=10))
    provider.add_span_processor(SimpleSpanProcessor(exporter("simple")))
    with provider.get_tracer("test").start_as_current_span("checkout"):
        pass
    assert threads["simple"] is threading.current_thread()
    until(lambda: "batch" in threads, "the spans are sent", seconds=20)
    provider.shutdown()
    assert threads["batch"] is not threading.current_thread()


def test_worker_process_init_is_sent_by_prefork_and_solo_only(project):
    stands("07d", "Celery sends that signal only with prefork and solo.")
    settings = """
from pathlib import Path
from celery import signals
signals.worker_process_init.connect(lambda **_: Path(f"{__name__}.born").touch(), weak=False)
"""
    pools = {
        "prefork": "prefork -c 1",
        "solo": "solo",
        "threads": "threads",
        "gevent": "gevent",
        "eventlet": "eventlet",
    }
    for name, pool in pools.items():
        ids_worker(project, f"{name}_shop", settings=settings, pool=pool)
        line_of(project, f"pack[{under(project, f'{name}_shop', 'pack').id[:8]}]: packed")
    assert {path.stem for path in project.folder.glob("*.born")} == {"prefork_shop", "solo_shop"}
