"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import base64
import contextlib
import inspect
import json
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import celery.backends
import celery.exceptions
import kombu
import psutil
import pytest
from amqp.basic_message import Message
from celery import Celery, chord, states
from celery.app.control import Inspect
from celery.app.task import extract_exec_options
from celery.app.utils import find_app
from celery.backends.base import Backend
from celery.beat import Scheduler
from celery.bin.worker import worker as worker_command
from celery.events.state import State
from celery.exceptions import NotRegistered, TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult
from celery.schedules import crontab
from celery.utils.nodenames import default_nodename, host_format
from celery.utils.time import get_exponential_backoff_interval
from celery.worker.heartbeat import Heart
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp, virtual
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.transport.redis import Channel
from kombu.utils.functional import fxrange
from redis import Redis
from redis.connection import Connection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError

from course_tasks import copies
from course_tasks.celery import app
from course_tasks.celery import app as course_app
from course_tasks.classroom import free_port
from course_tasks.exercises import WrongAnswer
from course_tasks.exercises.project import Project
from course_tasks.install import ROOT
from course_tasks.tasks import add
from course_tasks.tests.plugin import cells, listens, until


@pytest.fixture
def project(tmp_path):
    """An empty folder, and a broker and a backend for what is written there."""
    with Project(str(tmp_path)) as project:
        yield project


def stands(chapter: str, *sentences: str) -> None:
    """Check that sentences are in a chapter's text still, whatever the line breaks."""
    text = " ".join("\n".join(cell.source for cell in cells(copies.chapters()[chapter], "markdown")).split())
    for sentence in sentences:
        assert " ".join(sentence.split()) in text, f"chapter {chapter} no longer says: {sentence}"


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
AWAY = "--result-backend redis://localhost:1/0"  # a port on which nothing listens


def notes(project: Project, *settings: str, option: str = "", more: str = "--pool=solo") -> None:
    """Start a worker with one task, which leaves a line in the log."""
    (project.folder / "notes.py").write_text(NOTES + "".join(f"app.conf.{setting}\n" for setting in settings))
    project.worker(NOTES_WORKER.format(option=option, more=more))


def writes(project: Project) -> int:
    """How many records the project's backend has been given so far."""
    commands = project.backend.info("commandstats")
    return sum(commands[name]["calls"] for name in ("cmdstat_set", "cmdstat_setex") if name in commands)


def logged(project: Project, text: str) -> None:
    """Wait for a text in the log of the project's workers."""
    until(lambda: text in project.log(), f"{text!r} in the log:\n{project.log()}", seconds=20)


# --- 00 ------------------------------------------------------------------------------------------------------


def test_get_waits_for_ever_if_it_is_not_told_how_long():
    stands("00", "Without a `timeout`, `get` would wait for ever")
    assert inspect.signature(AsyncResult.get).parameters["timeout"].default is None


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


def test_a_task_without_a_name_is_called_after_its_module_and_function():
    stands("00", "Without `name=`, Celery builds the name of a task from the module and the function.")

    def total():
        """Nothing: only the name counts."""

    total.__module__ = "shop"
    assert Celery(set_as_current=False).task(total).name == "shop.total"


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


def test_clients_push_a_message_in_at_the_left_end(project):
    stands("01", "Clients push a message in at the left end of the list")
    for number in (1, 2):
        project.client().send_task("buy", args=(number,), ignore_result=True)
    waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in project.broker.lrange("celery", 0, -1)]
    assert waiting == ["(2,)", "(1,)"]


def test_a_worker_that_runs_two_tasks_reserves_more_than_five_messages():
    stands("01", "**b.** The worker has taken all five messages.")
    assert 2 * Celery(set_as_current=False).conf.worker_prefetch_multiplier > 5


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
    start = time.monotonic()
    with pytest.raises(OperationalError):
        app.send_task("buy", ignore_result=True)
    assert len(attempts) == 4 and time.monotonic() - start < 5
    assert app.conf.broker_connection_max_retries == 100


def test_a_worker_gives_up_when_it_has_tried_that_often(project):
    stands("01", "by default it tries a hundred times before it gives up")
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        notes(project, "broker_connection_max_retries = 1", option="-b redis://localhost:1/0")
    assert "(1/1)" in project.log()


def test_a_silent_broker_is_waited_for_without_end_but_not_by_the_course_s_app():
    stands("01", "by default, `send_task` then waits without end", "the course's app sets `socket_timeout`")
    assert Channel.socket_timeout is None  # it is passed to redis-py, instead of its five seconds
    assert Celery(set_as_current=False).conf.broker_transport_options == {}
    assert course_app.conf.broker_transport_options["socket_timeout"] == 5


def test_a_message_whose_arrival_is_not_confirmed_is_sent_twice(project):
    stands("01", "So it sends the message once more, and then the message waits in the queue twice.")
    there = project.broker.connection_pool.connection_kwargs
    cut = []

    class Between(socketserver.BaseRequestHandler):
        """Passes everything on, except for the answer to the first message that is pushed."""

        def handle(self):
            with socket.create_connection((there["host"], there["port"])) as server:
                while data := self.request.recv(65536):
                    server.sendall(data)
                    if b"LPUSH" in data and not cut:
                        cut.append(data)
                        until(lambda: project.broker.llen("celery"), "the message in its queue")
                        return
                    self.request.sendall(server.recv(65536))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Between) as between:
        between.daemon_threads = True
        threading.Thread(target=between.serve_forever, daemon=True).start()
        app = project.client()
        password = f":{there['password']}@" if there.get("password") else ""
        app.conf.broker_write_url = f"redis://{password}127.0.0.1:{between.server_address[1]}/{there['db']}"
        app.send_task("buy", ignore_result=True)
        between.shutdown()
    ids = [json.loads(raw)["headers"]["id"] for raw in project.broker.lrange("celery", 0, -1)]
    assert len(ids) == 2 and len(set(ids)) == 1


# --- 01b -----------------------------------------------------------------------------------------------------


def test_without_files_a_killed_server_has_nothing_left(tmp_path):
    stands("01b", 'with `--save ""`, `PLAIN` would have nothing at all', "By default (`appendfsync everysec`)")
    command = [sys.executable, "-m", "course_tasks", "server", "--bind", "127.0.0.1", "--save", "", "--port"]
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
    stands("01b", "A worker that is started now would end at once.")
    project.folder.joinpath("shop.py").write_text(SHOP)
    project.client().send_task("buy", args=(1,), ignore_result=True)
    project.broker.config_set("maxmemory", "100kb")
    project.broker.config_set("maxmemory-policy", "noeviction")
    with pytest.raises(WrongAnswer, match="ended before it was ready"):
        project.worker(f"celery -A shop worker {QUICK}")
    assert "OutOfMemoryError" in project.log() and project.broker.llen("celery") == 1


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
    assert {*sent[2:5]} <= {*ids}, "sent[1] had started, and so the worker reached for sent[5]"


def test_purge_asks_first_and_f_is_for_not_asking(project):
    stands("01b", "(`-f` means: don't ask whether I'm sure.)")
    (project.folder / "notes.py").write_text(NOTES)
    project.client().send_task("note", ignore_result=True)
    project.run("sh -c 'echo n | celery -A notes purge || true'")
    assert project.broker.llen("celery") == 1
    assert "Purged 1 message" in project.run("celery -A notes purge -f")


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


def test_with_redis_a_message_that_is_put_back_goes_to_the_front(project):
    stands("01b", "first in, first out; messages that are put back go to the front")
    client = project.client()
    for number in range(3):
        client.send_task("buy", args=(number,), queue="shelf", ignore_result=True)
    with client.connection_for_read() as connection:
        connection.SimpleQueue("shelf").get(timeout=10)
    waiting = [json.loads(raw)["headers"]["argsrepr"] for raw in project.broker.lrange("shelf", 0, -1)]
    assert waiting == ["(2,)", "(1,)", "(0,)"]


# --- 02 ------------------------------------------------------------------------------------------------------


def test_results_travel_as_json_by_default():
    stands("02", "By default, results travel as JSON, and JSON has no tuples.")
    assert Celery(set_as_current=False).conf.result_serializer == "json"


def test_a_folder_keeps_results_until_the_task_runs_that_beat_sends(project, tmp_path):
    stands(
        "02",
        "A folder of files doesn't, and a database doesn't either. There, a result stays until a worker runs Celery's "
        "own task `celery.backend_cleanup`.",
        "The program that sends this task, by default once a day at 4 in the morning, is Celery's scheduler",
    )
    app = Celery(set_as_current=False, result_expires=0.01)
    app.backend_cls = f"file://{tmp_path}"
    app.backend.store_result("an-id", 42, "SUCCESS")
    stored = tmp_path / "celery-task-meta-an-id"
    until(lambda: time.time() - stored.stat().st_mtime > 0.02, "the result to expire")
    assert app.backend.get_state("an-id") == "SUCCESS"
    app.tasks["celery.backend_cleanup"]()
    assert not stored.exists()
    scheduler, with_redis = Scheduler(app, lazy=True), Scheduler(project.client(), lazy=True)
    for each in (scheduler, with_redis):
        each.install_default_entries(each.schedule)
    assert scheduler.schedule["celery.backend_cleanup"].schedule == crontab("0", "4", "*")
    assert "celery.backend_cleanup" not in with_redis.schedule
    database = Path(celery.backends.__file__).with_name("database") / "__init__.py"  # its library is not installed
    assert "supports_autoexpire" not in database.read_text() and not Backend.supports_autoexpire


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


# --- 02b -----------------------------------------------------------------------------------------------------


def test_flaky_is_tried_again_after_a_second_and_add_long_takes_its_time(project):
    stands(
        "02b",
        "`add_long` takes one second.",
        "`flaky` fails once, and is tried again one second later.",
        "| RETRY | an attempt has failed, and another one will follow | the exception of that attempt | no |",
    )
    project.worker("celery -A course_tasks worker --pool=threads -c 2 --without-mingle --without-gossip")
    records, at = [], []

    def note(record):
        records.append(record)
        at.append(time.monotonic())

    project.client().send_task("flaky", args=(1,)).get(timeout=20, on_message=note)
    project.client().send_task("add_long", args=(4, 5, 1)).get(timeout=20, on_message=note)
    flaky, add_long = ["STARTED", "RETRY", "STARTED", "SUCCESS"], ["STARTED", "SUCCESS"]
    assert [record["status"] for record in records] == [*flaky, *add_long]
    assert str(records[1]["result"]) == "the service is not up yet"
    assert at[2] - at[1] > 0.9 and at[5] - at[4] > 0.9
    stands("02b", "A **retry** means that the worker sends the task to the broker once more")
    assert project.broker.info("commandstats")["cmdstat_lpush"]["calls"] == 3  # flaky twice, and add_long


def test_a_task_that_no_worker_knows_fails_without_being_started(project):
    stands("02b", "└──> FAILURE (no worker knows the task's name)")
    notes(project, "task_track_started = True")
    before, asked = writes(project), project.client().send_task("unknown")
    with pytest.raises(NotRegistered):
        asked.get(timeout=20)
    assert (asked.state, writes(project) - before) == ("FAILURE", 1)


def test_a_task_that_comes_too_late_is_revoked_and_events_have_states_of_their_own(project):
    stands(
        "02b",
        "| REVOKED | the task was cancelled, or came too late (`expires`, see 04b) | a `TaskRevokedError` | yes |",
        "in `celery.states` you also find `RECEIVED` and `REJECTED`. They belong to Celery's monitoring events",
    )
    notes(project)
    late = project.client().send_task("note", args=("late",), expires=-1)
    assert isinstance(late.get(timeout=20, propagate=False), TaskRevokedError)
    assert (late.state, "noted" in project.log()) == ("REVOKED", False)
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
    notes(project, "task_track_started = True", "result_expires = 1")
    asked = project.client().send_task("note", args=("long", 4))
    until(lambda: asked.state == "STARTED", "its start", seconds=20)
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


def test_an_exception_that_passes_all_its_arguments_on_comes_back(project):
    stands("02b", "The cure is an `__init__` that passes all its arguments on: `super().__init__(city, street)`.")
    (project.folder / "notes.py").write_text(
        "from celery import Celery\n"
        "app = Celery('notes')\n"
        "class NoRoute(Exception):\n"
        "    def __init__(self, city, street):\n"
        "        super().__init__(city, street)\n"
        "@app.task(name='deliver')\n"
        "def deliver(city, street):\n"
        "    raise NoRoute(city, street)\n"
    )
    project.worker(NOTES_WORKER.format(option="", more="--pool=solo"))
    said = project.run(
        'python -c "import notes\n'
        "try: notes.deliver.delay('Bern', 'Main Street').get(timeout=20)\n"
        'except notes.NoRoute as error: print(error.args)"'
    )
    assert said == "('Bern', 'Main Street')\n"


def test_inspect_names_tasks_that_are_pending(project):
    stands(
        "02b",
        "| a worker names it in `inspect().active()` | it is running, and its worker doesn't store `STARTED` |",
        "| a worker names it in `inspect().scheduled()` | it waits for its `countdown` |",
        "We wait for five seconds at most, and not after the second answer (`limit=2`).",
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


# --- 02c -----------------------------------------------------------------------------------------------------


def test_the_retry_policies_of_clients_and_of_patient_workers():
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
    assert plain.conf.result_backend_base_sleep_between_retries_ms == 10
    assert plain.conf.result_backend_max_sleep_between_retries_ms == 10_000
    assert plain.conf.result_backend_max_retries == float("inf")
    pauses = [get_exponential_backoff_interval(10, retries, 10_000) for retries in range(20)]
    assert pauses == sorted(pauses) and pauses[-1] == 10_000
    assert not plain.conf.result_backend_always_retry and not plain.conf.task_track_started


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
    assert ("noted: last" in project.log(), last.state) == (False, "PENDING")


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
    with pytest.raises(RuntimeError, match="Retry limit exceeded"):
        for _ in range(2):
            client.send_task("note")
    with pytest.raises(RedisConnectionError):  # and no RuntimeError, which comes after the retries
        asked.get(timeout=1)


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
    assert 1 <= (second[1] - second[0]).seconds < 3
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
    stands("03", "*Discarded* means that the message is gone. No other worker will get it, even if one knows the task.")
    write_shop(tmp_path)
    project.worker(f"celery -A shop worker {QUIET}")
    assert f"concurrency: {os.cpu_count()} (solo)" in project.log()
    project.client().send_task("unknown")
    until(lambda: "The message has been ignored and discarded." in project.log(), "the message is discarded")
    until(lambda: not project.broker.exists("celery", "unacked"), "nothing of the message is left in the broker")


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
"""


def write_tasks(folder: Path, settings: str = "") -> None:
    """Write a module `tasks` with an app and a few tasks."""
    folder.joinpath("tasks.py").write_text(TASKS.format(settings=settings))


def heartbeat_age(folder: Path) -> float:
    """How many seconds ago the worker's last heartbeat was."""
    return time.time() - folder.joinpath("beats.txt").stat().st_mtime


def test_inspect_waits_a_second_and_a_worker_without_a_name_is_called_celery():
    stands("03b", "it always waits for the whole `timeout`, by default one second")
    stands("03b", "Without `-n`, a worker is called `celery@` and the name of its machine")
    stands("03b", "Every two seconds its main process sends a **heartbeat**")
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
    stands("03b", "It would have written only if a task had failed.")
    write_tasks(tmp_path)
    for name, args in (("nap", (0,)), ("fail", ()), ("bye", ())):
        project.client().send_task(name, args=args)
    said = project.run(f"celery -A tasks worker --loglevel=WARNING {QUIET}").partition("key=celery")[2]
    assert re.findall(r"Task (\w+)\[", said) == ["fail"]


def test_active_reserved_and_scheduled(project, tmp_path):
    stands("03b", "| `active()` | the tasks that it is running now |")
    stands("03b", "| `reserved()` | the tasks that it has taken and not started yet |")
    stands("03b", "| `scheduled()` | the tasks that it has taken and that have to wait for their time |")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET} --pool=threads --concurrency=1")
    client = project.client()
    ids = [client.send_task("nap", args=(n,), countdown=wait).id for n, wait in ((4, None), (0, None), (0, 60))]
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


def test_a_solo_worker_sends_no_heartbeat_while_it_runs_a_task(project, tmp_path):
    stands("03b", "a `solo` worker doesn't send heartbeats while it runs a task")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET}")
    until(lambda: tmp_path.joinpath("beats.txt").exists(), "the first heartbeat")
    result = project.client().send_task("nap", args=(5,))
    until(lambda: result.state == "STARTED", "the task starts")
    until(lambda: heartbeat_age(tmp_path) > 4, "the heartbeats are old")
    assert result.state == "STARTED"
    until(lambda: heartbeat_age(tmp_path) < 1, "the heartbeats go on")


def test_without_a_broker_there_is_no_heartbeat(project, tmp_path):
    stands("03b", "without a broker there is no heartbeat either")
    write_tasks(tmp_path)
    project.worker(f"celery -A tasks worker {QUIET}")
    until(lambda: tmp_path.joinpath("beats.txt").exists(), "the first heartbeat")
    project.broker.shutdown(nosave=True)
    until(lambda: heartbeat_age(tmp_path) > 5, "the heartbeats are old")
    assert "Connection to broker lost" in project.log()


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


def node_stats(client: Celery, name: str) -> dict:
    """What a worker says about itself."""
    node = f"{name}@{socket.gethostname()}"
    return until(lambda: client.control.inspect([node], timeout=5, limit=1).stats(), f"{name} answers")[node]


def test_the_defaults_for_a_worker_s_end():
    stands("03c", "By default the setting is 0, so there is no waiting.")
    stands("03c", "That is an hour by default", "By default they look only every 100 seconds.")
    stands("03c", "times `worker_prefetch_multiplier` (4 by default)")
    defaults = Celery(set_as_current=False).conf
    assert defaults.worker_soft_shutdown_timeout == 0
    assert defaults.worker_prefetch_multiplier == 4
    assert Channel.visibility_timeout == 3600
    assert Channel.unacked_restore_interval * Channel.unacked_restore_throttle == 100
    assert not defaults.task_acks_late and not defaults.task_reject_on_worker_lost


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
        os.kill(pids[pool], getattr(signal, sent))
    until(lambda: not any(map(psutil.pid_exists, pids.values())), "all workers have ended")
    done = {pool: sum(result.state == "SUCCESS" for result in results[pool]) for pool in pools}
    for pool, claim in zip(pools, said, strict=True):
        found = f"{done[pool]} done, {project.broker.llen(pool)} back"
        assert found == claim or (claim == "at least 1 done" and done[pool] >= 1), (pool, found)


def test_sigquit_is_a_cold_stop_and_a_soft_timeout_makes_no_difference_to_sigterm(project, tmp_path):
    stands("03c", "The signal SIGQUIT asks for it directly.")
    stands("03c", "It makes no difference to SIGTERM, which waits for ever anyway.")
    write_risk(tmp_path, worker_soft_shutdown_timeout=0.5)
    client = project.client()
    for number in (1, 2):
        project.worker(f"{RISKY} --concurrency=1 -n w{number}@%h -Q q{number}")
        result = client.send_task("early", args=({1: 2, 2: 60}[number],), queue=f"q{number}")
        pid = node_stats(client, f"w{number}")["pid"]
        until(lambda: result.state == "STARTED", "the task starts")  # noqa: B023
        os.kill(pid, {1: signal.SIGTERM, 2: signal.SIGQUIT}[number])
        until(lambda: not psutil.pid_exists(pid), "the worker ends")  # noqa: B023
        assert result.state == {1: "SUCCESS", 2: "RETRY"}[number]
        assert ("Cold shutdown" in project.log()) == (number == 2)


def test_sigterm_to_all_processes_ends_the_running_task_and_sigint_does_not(project, tmp_path):
    stands("03c", "so also to prefork's children, and these drop their tasks at once")
    stands("03c", "(Ctrl-C reaches the children as well, but they ignore SIGINT.)")
    write_risk(tmp_path)
    client = project.client()
    states = []
    for name in ("SIGTERM", "SIGINT"):
        project.worker(f"{RISKY} --concurrency=1 -n {name}@%h -Q {name}")
        pid = node_stats(client, name)["pid"]
        result = client.send_task("late", args=(2,), queue=name)
        until(lambda: result.state == "STARTED", "the task starts")  # noqa: B023
        os.killpg(pid, getattr(signal, name))
        until(lambda: not psutil.pid_exists(pid), "the worker ends")  # noqa: B023
        states.append(type(result.result).__name__ if result.failed() else result.state)
    assert states == ["WorkerLostError", "SUCCESS"]


def test_a_lost_child_is_acknowledged_and_a_poisonous_task_comes_back_or_is_given_up(project, tmp_path):
    stands("03c", "stores the failure `WorkerLostError`, and acknowledges the message")
    stands("03c", "It would come back for ever.", "That counts the attempts and gives up after the last one")
    write_risk(tmp_path, worker_lost_wait=0.5)
    client = project.client()
    project.worker(f"{RISKY} --concurrency=1 -n w@%h -Q q")
    lost = client.send_task("late", args=(60,), queue="q")
    until(lambda: lost.state == "STARTED", "the task starts")
    os.kill(node_stats(client, "w")["pool"]["processes"][0], signal.SIGKILL)
    until(lambda: lost.state == "FAILURE", "the main process stores the failure")
    until(lambda: not project.broker.exists("q", "unacked"), "the message is acknowledged")
    limited = client.send_task("limited", queue="q")
    until(lambda: limited.state == "FAILURE", "Celery gives up")
    assert type(limited.result).__name__ == "WorkerLostError" and project.log().count("began") == 1 + 3
    client.send_task("poison", queue="q")
    until(lambda: project.log().count("began") >= 1 + 3 + 4, "the task comes back again and again")


def test_messages_taken_ahead_get_too_old_and_with_a_multiplier_of_1_they_do_not(project, tmp_path):
    stands("03c", "Messages that a worker has taken ahead age as well while they wait for a free process.")
    stands("03c", "(a waiting message is in `unacked` without `acks_late` as well)")
    client, runs = project.client(), {}
    for multiplier, task in ((1, "late"), (4, "late"), (4, "early")):
        write_risk(
            tmp_path,
            broker_transport_options={"visibility_timeout": 3, **FAST},
            worker_prefetch_multiplier=multiplier,
        )
        before = project.log().count("began")
        project.worker(f"{RISKY} --concurrency=1 -n {task}{multiplier}@%h -Q q")
        seconds = 1.5 if multiplier == 1 else 2.5  # five of them are longer than the timeout, one is not
        results = [client.send_task(task, args=(seconds,), queue="q") for _ in range(5)]
        until(lambda: all(result.ready() for result in results), "all tasks are done")  # noqa: B023
        until(lambda: not project.broker.exists("q", "unacked"), "no message is left")
        runs[multiplier, task] = project.log().count("began") - before
        pid = node_stats(client, f"{task}{multiplier}")["pid"]
        client.control.shutdown()
        until(lambda: not psutil.pid_exists(pid), "the worker has ended")  # noqa: B023
    assert runs[1, "late"] == 5 < min(runs[4, "late"], runs[4, "early"]), runs


def test_a_worker_with_a_short_timeout_puts_back_the_messages_of_the_others(project, tmp_path):
    stands("03c", "a single worker with a short timeout puts back the messages of all others")
    stands("03c", "is started once more each time the visibility timeout has passed")
    write_risk(tmp_path)
    project.worker(f"{RISKY} --pool=threads --concurrency=4 -n patient@%h -Q q")
    result = project.client().send_task("late", args=(10,), queue="q")
    until(lambda: result.state == "STARTED", "the task starts")
    write_risk(tmp_path, broker_transport_options={"visibility_timeout": 1, **FAST})
    project.worker(f"{RISKY} --pool=solo -n hasty@%h -Q other")
    until(lambda: project.log().count("began") == 3, "the patient worker starts the task again, and again")
    assert result.state == "STARTED"


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
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 3')
    project.worker(f"celery -A shop worker {QUIET}")
    write_shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 4')
    assert "\ntask_time_limt: 4\n" in project.run("celery -A shop report")
    assert '"task_time_limt": 3' in project.run("celery -A shop inspect conf")
    assert Celery(set_as_current=False).conf.task_time_limit is None


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
        "| `queue`, `priority`, `expires`, `time_limit`, `soft_time_limit`, `serializer` | the program that **sends**,",
        "| `acks_late`, `max_retries`, `autoretry_for`, `rate_limit`, `track_started` | the **worker**",
        'without our `queue="look"` it would have gone to the queue `celery`',
    )
    project.client().send_task("report", args=(1,))
    [message] = [json.loads(text) for text in project.broker.lrange("celery", 0, -1)]
    sender = {"queue", "priority", "expires", "time_limit", "soft_time_limit", "serializer"}
    worker = {"acks_late", "max_retries", "autoretry_for", "rate_limit", "track_started"}
    travels = extract_exec_options(add).keys()  # what `delay` and `apply_async` take from the task
    assert sender <= travels and not worker & travels
    assert not {name for name in worker if f'"{name}"' in json.dumps(message)}


def test_what_counts_is_whether_the_sender_has_the_code(project):
    stands("04", "If its app knows the task, `send_task` uses these options too, except for `ignore_result`.")
    (project.folder / "reports.py").write_text(REPORT)
    project.run("python -c 'from reports import app, report; report.delay(1); app.send_task(\"report\", args=(2,))'")
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
        "| threads, gevent | only when it takes the message |",
    )
    (project.folder / "busy.py").write_text(BUSY)
    project.worker(f"celery -A busy worker --pool={pool} -c 1 --without-mingle --without-gossip")
    client = project.client()
    client.send_task("sleep", args=(1.5,))
    late = client.send_task("sleep", args=(0,), expires=0.5)  # taken at once, for it is prefetched
    if looks_again:
        with pytest.raises(TaskRevokedError):
            late.get(timeout=20)
    else:
        assert late.get(timeout=20) is None


def test_how_long_and_how_many_a_worker_holds_by_default():
    stands("04b", "by default without a limit", "That timeout is one hour by default.")
    assert Celery(set_as_current=False).conf.worker_eta_task_limit is None
    assert Channel.visibility_timeout == 3600


def test_expires_is_told_to_rabbitmq(project):
    stands("04b", "Celery also writes the time into a property that RabbitMQ understands")
    project.client().send_task("sleep", args=(0,), expires=5)
    [message] = [json.loads(text) for text in project.broker.lrange("celery", 0, -1)]
    assert "expiration" in dict(Message.PROPERTIES)
    assert 4000 < float(message["properties"]["expiration"]) <= 5000


def test_a_chain_needs_no_backend_and_a_chord_does(project):
    stands("04b", "A chain doesn't need a backend; a chord does, because the backend counts how many parts are done.")
    client = project.client()
    client.backend_cls = "disabled://"
    part = client.signature("sleep", args=(0,), immutable=True)
    (part | part).apply_async()
    assert project.broker.llen("celery") == 1
    with pytest.raises(NotImplementedError):
        chord([part, part], part).apply_async()


# --- 05 ------------------------------------------------------------------------------------------------------


# --- 05b -----------------------------------------------------------------------------------------------------


# --- 06 ------------------------------------------------------------------------------------------------------


# --- 06b -----------------------------------------------------------------------------------------------------


# --- 07 ------------------------------------------------------------------------------------------------------


# --- 07b -----------------------------------------------------------------------------------------------------


# --- 07c -----------------------------------------------------------------------------------------------------


# --- 07d -----------------------------------------------------------------------------------------------------
