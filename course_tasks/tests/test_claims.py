"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import inspect
import json
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.result import AsyncResult
from kombu import Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp, virtual
from kombu.transport import redis as redis_transport
from kombu.transport.base import to_rabbitmq_queue_arguments
from redis import Redis
from redis.connection import Connection

from course_tasks import copies
from course_tasks.celery import app as course_app
from course_tasks.classroom import free_port
from course_tasks.exercises import WrongAnswer
from course_tasks.exercises.project import Project
from course_tasks.install import ROOT
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


# --- 00 ------------------------------------------------------------------------------------------------------


def test_get_waits_for_ever_if_it_is_not_told_how_long():
    stands("00", "Without a `timeout`, `get` would wait for ever")
    assert inspect.signature(AsyncResult.get).parameters["timeout"].default is None


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


def test_a_message_without_its_content_type_ends_one_worker_after_the_other(project):
    stands("01", "the worker ends with an error and puts the message back, and the next worker ends in the same way")
    project.folder.joinpath("shop.py").write_text(SHOP)
    delivery = {"delivery_tag": "1", "delivery_info": {"exchange": "", "routing_key": "celery"}}
    message = {"body": "[[1], {}, {}]", "headers": {"task": "buy", "id": "1"}, "properties": delivery}
    project.broker.lpush("celery", json.dumps(message))
    for number in (1, 2):
        project.worker(f"celery -A shop worker {QUICK}")
        until(lambda: project.log().count("Restoring 1 unacknowledged message") == number, "the end of the worker")  # noqa: B023
        assert project.log().count("Unrecoverable error: ValueError") == number
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


def test_the_environment_s_broker_has_priority(monkeypatch):
    stands("01", "the environment variable `CELERY_BROKER_URL`, which the set-up cell has set, has priority over it")
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://localhost:1/0")
    app = Celery(broker="redis://localhost:2/0", set_as_current=False)
    assert app.connection_for_write().port == 1
    app.conf.broker_write_url = "redis://localhost:2/0"
    assert app.connection_for_write().port == 2


def test_a_client_tries_four_times_and_a_worker_a_hundred_times(monkeypatch):
    stands("01", "By then it had tried four times, which is the default with Redis.", "up to a hundred attempts")
    attempts = []

    def refused(self):
        attempts.append(self)
        raise ConnectionRefusedError

    monkeypatch.setattr(Connection, "_connect", refused)
    app = Celery(set_as_current=False)
    with pytest.raises(OperationalError):
        app.send_task("buy", ignore_result=True)
    assert len(attempts) == 4
    assert app.conf.broker_connection_max_retries == 100


def test_a_silent_broker_is_waited_for_without_end_but_not_by_the_course_s_app():
    stands("01", "by default, `send_task` then waits without end", "the course's app sets `socket_timeout`")
    assert redis_transport.Channel.socket_timeout is None  # it is passed to redis-py, instead of its five seconds
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


def test_the_broker_of_compose_is_for_this_machine_only():
    stands("01b", "Our [docker-compose.yml](../docker-compose.yml) uses the second form.")
    text = ROOT.joinpath("docker-compose.yml").read_text()
    assert re.findall(r"ports: (.*)", text) == ['["127.0.0.1:6379:6379"]', '["127.0.0.1:6380:6380"]']


def test_priorities_have_four_steps_with_redis_and_a_queue_s_highest_one_with_rabbitmq():
    stands("01b", "in four steps with Redis: 0, 3, 6 and 9", "in queues with `x-max-priority`: a larger number")
    assert redis_transport.Channel.priority_steps == [0, 3, 6, 9]
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
    assert redis_transport.Channel.visibility_timeout == 3600
    folder = Path(redis_transport.__file__).parent
    sqs = folder.joinpath("SQS/__init__.py").read_text()  # it can't be imported without Amazon's library
    assert "default_visibility_timeout = 1800  # 30 minutes." in sqs and "* Supports Priority: No" in sqs
    for transport in ("redis.py", "pyamqp.py"):
        assert "* Supports Priority: Yes" in folder.joinpath(transport).read_text()
    # what events and remote control need
    assert '.get("supports_fanout", False)' in sqs and redis_transport.Channel.supports_fanout


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


# --- 02b -----------------------------------------------------------------------------------------------------


# --- 03 ------------------------------------------------------------------------------------------------------


# --- 03b -----------------------------------------------------------------------------------------------------


# --- 04 ------------------------------------------------------------------------------------------------------


# --- 04b -----------------------------------------------------------------------------------------------------


# --- 05 ------------------------------------------------------------------------------------------------------


# --- 05b -----------------------------------------------------------------------------------------------------


# --- 06 ------------------------------------------------------------------------------------------------------


# --- 06b -----------------------------------------------------------------------------------------------------


# --- 07 ------------------------------------------------------------------------------------------------------


# --- 07b -----------------------------------------------------------------------------------------------------


# --- 07c -----------------------------------------------------------------------------------------------------


# --- 07d -----------------------------------------------------------------------------------------------------
