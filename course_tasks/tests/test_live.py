"""The live views, from outside: real servers, workers of four pools, and kernels where it matters what they show."""

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from functools import partial
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from celery import Celery
from celery.signals import after_task_publish
from redis import Redis

from course_tasks.authoring import kernels, record
from course_tasks.celery import app
from course_tasks.classroom.broker_view import BrokerView
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.journey import Journey
from course_tasks.classroom.terminal import STOPPED
from course_tasks.install import ROOT
from course_tasks.servers import without_secrets
from course_tasks.tests.plugin import free_ports, listens, until
from course_tasks.tests.test_terminal import Kernel

POOLS = ["threads", "prefork", "solo", "gevent"]
LONG = 60.0  # seconds that nothing may really wait for: half of it is still plenty for a busy machine
# Databases on the broker; the pools have 1 to 4, views 0. A worker that had to be killed leaves its queue for orders.
NOBODY, ALONE = 9, 12  # that of no worker ever, and that of a test with one worker
clients: dict[int, Celery] = {}  # by database
STEP = re.compile(r"\+(\d+\.\d{3}) s  (\w+) +(.*)")


def broker(number: int) -> str:
    """The URL of one of the databases on the broker."""
    return f"{os.environ['CELERY_BROKER_URL'].rpartition('/')[0]}/{number}"


@contextlib.contextmanager
def working(number: int, *options: str, node: str | None = None):
    """A worker that has just said that it is ready, stopped at the end."""
    command = [sys.executable, "-m", "celery", "-A", "course_tasks", "worker", "--loglevel=INFO", *options]
    process = subprocess.Popen(
        [*command, "-n", node or f"worker{number}@%h"],
        cwd=ROOT,
        env=os.environ | {"CELERY_BROKER_URL": broker(number)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = []
    try:
        for line in process.stdout:
            log.append(line)
            if line.endswith(" ready.\n"):
                break
        else:
            raise AssertionError("".join(log))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOPPED)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def workers():
    """A worker of each pool, none of which sends events of its own accord, all started at once."""
    with contextlib.ExitStack() as stack:
        starting, running = [], []
        for number, pool in enumerate(POOLS, start=1):
            worker = working(number, f"--pool={pool}", "-c", "2", "--without-mingle", node=f"{pool}@%h")
            start = threading.Thread(target=lambda worker=worker: running.append(stack.enter_context(worker)))
            start.start()
            starting.append(start)
        for start in starting:
            start.join()
        yield
        for process in running:  # together, before they are waited for one by one
            process.kill() if "--pool=gevent" in process.args else process.terminate()  # its warm stop takes 4 s


@pytest.fixture
def client(request):
    """A client of the worker of a pool, by default that of threads, at whose end no trace of a journey is left."""
    with connected(POOLS.index(getattr(request, "param", "threads")) + 1) as client:
        yield client


@contextlib.contextmanager
def addressed(url: str | None):
    """Celery finds its broker here, as the environment wins over what an app is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELERY_BROKER_URL", url) if url else patch.delenv("CELERY_BROKER_URL")
        yield


@contextlib.contextmanager
def connected(number: int):
    """A client of a database on the broker, which must be without a trace of the client's journeys at the end."""
    with addressed(broker(number)), Redis.from_url(broker(number)) as server:
        before = kept(server)
        yield clients.setdefault(number, Celery())
        until(lambda: kept(server) - before <= {b"celery"}, "nothing but a task not taken is left")
        server.delete("celery")


def kept(server: Redis) -> set[bytes]:
    """The keys in a broker, without those of kombu's that tell which queues there are."""
    return {key for key in server.scan_iter() if b"_kombu.binding" not in key}


@pytest.fixture(scope="module", autouse=True)
def clients_end():
    """Leave no connection behind: other tests wait until the pair has none."""
    yield
    for number, client in clients.items():
        with addressed(broker(number)):
            client.pool.force_close_all()  # which is shared by the clients of one URL, so not before
            client.backend.result_consumer.stop()
            client.backend.client.connection_pool.disconnect()


def journeys() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "journey"]


def gone(client: Celery, name: str, *args, get: bool = True, wait: float = 5, **options) -> Journey:
    """The journey of one task."""
    with Journey(client, wait) as journey:
        result = client.send_task(name, args, **options)
        if get:
            result.get(timeout=60, propagate=False)
    assert not journeys(), "it listens no more when the block has ended"
    return journey


def steps(journey: Journey) -> list[tuple[float, str, str]]:
    """When, what and where, from the text that it shows."""
    text = journey._repr_mimebundle_()["text/plain"]
    return [(float(found[1]), found[2], found[3]) for found in map(STEP.match, text.splitlines()) if found]


def words(journey: Journey) -> str:
    return " ".join(step[1] for step in steps(journey))


def picture(journey: Journey) -> ElementTree.Element:
    page = journey._repr_mimebundle_()["text/html"]
    return ElementTree.fromstring(base64.b64decode(re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', page)[1]))


def bars(journey: Journey, kind: str) -> list[float]:
    """The widths of the bars of a kind."""
    return [float(rect.get("width")) for rect in picture(journey).findall(".//{*}rect") if rect.get("class") == kind]


def labels(journey: Journey) -> list[str]:
    return [text.text for text in picture(journey).findall(".//{*}text") if text.get("class") is None]


# Journey


@pytest.mark.parametrize("client", POOLS, indirect=True)
def test_a_journey_has_every_step_in_every_pool(workers, client, request):
    pool = request.node.callspec.params["client"]
    journey = gone(client, "add_long", 4, 5, 0.4)
    assert words(journey) == "sent received started succeeded"
    (sent, _, where), (received, _, at), (started, _, there), (succeeded, _, end) = steps(journey)
    assert where == "by the client, to queue 'celery'"
    assert at == there == f"by worker {pool}@{socket.gethostname()}"
    assert end == f"{at}; stored in the backend"
    assert 0 == sent <= received <= started and succeeded - started > 0.399  # each is rounded
    assert {"sent", "stored"} <= set(labels(journey))
    until(lambda: not journeys(), "no thread is left")
    [ran] = [found[1] for label in labels(journey) if (found := re.fullmatch(r"succeeded, ran (\d+\.\d{3}) s", label))]
    assert float(ran) == pytest.approx(succeeded - started, abs=0.002)


def test_a_task_was_sent_no_later_than_its_worker_received_it(workers, client):
    """Though the client learns that it has sent the message when the task may be at work already."""

    def dawdle(**_):
        time.sleep(0.5)

    after_task_publish.connect(dawdle)  # before the journey is told of it
    journey = gone(client, "add_long", 4, 5, 1)
    after_task_publish.disconnect(dawdle)
    (sent, *_), (received, *_), (started, *_), (succeeded, *_) = steps(journey)
    assert 0 == sent == received <= started and succeeded - started > 0.999  # each is rounded


def test_an_answer_that_comes_too_late_is_not_left_in_the_broker_and_a_later_order_is_answered():
    with (
        working(ALONE, "--pool=threads", "-c", "1", "--without-mingle"),
        connected(ALONE) as client,
        client.connection_for_write() as connection,
    ):
        with Journey(client, LONG) as journey:
            client.send_task("add", args=(4, 5)).get(timeout=60)
            # a worker does so that has looked up where to send it just before the queue was given up
            connection.Producer().publish({"late@here": {"ok": "late"}}, routing_key=journey._answers)
        assert [list(answer.values()) for answer in client.control.ping(timeout=60, limit=1)] == [[{"ok": "pong"}]]


def test_an_answer_that_comes_just_too_late_is_not_taken_for_one_to_the_client_s_next_order():
    with (
        working(ALONE, "--pool=threads", "-c", "1", "--without-mingle") as worker,
        connected(ALONE) as client,
        client.connection_for_write() as connection,
    ):
        worker.send_signal(signal.SIGSTOP)
        with Journey(client, LONG) as journey:
            connection.Producer().publish({"late@here": {"ok": "late"}}, routing_key=journey._answers)
            worker.send_signal(signal.SIGCONT)
            assert [list(answer.values()) for answer in client.control.ping(timeout=60, limit=1)] == [[{"ok": "pong"}]]
            client.send_task("add", args=(4, 5)).get(timeout=60)


def test_the_picture_is_one_that_an_untrusted_notebook_shows_in_both_themes(workers, client):
    journey = gone(client, "add", 4, 5)
    page = journey._repr_mimebundle_()["text/html"]
    assert re.findall(r"<(\w+)", page) == ["img", "pre"]
    alt = re.search(r'<img alt="([^"]+)"', page)[1]
    assert alt.startswith("The way of task add: sent by the client") and "succeeded by worker threads@" in alt
    assert "@media (prefers-color-scheme:dark)" in picture(journey).find("{*}style").text
    assert [text.text for text in picture(journey).findall(".//{*}text") if text.get("class") == "name"] == [
        "client",
        "broker",
        "worker",
        "backend",
    ]


def test_a_short_stay_beside_a_long_one_can_be_seen_and_nothing_is_cut_off(workers, client):
    journey = gone(client, "add", 4, 5, countdown=2)
    _, received, started, (end, *_) = steps(journey)
    due = float(re.fullmatch(r"by worker \S+, to be started at \+(\d\.\d{3}) s", received[2])[1])
    assert received[0] < due <= 2 and 0.9 * due < started[0]
    part = (started[0] - received[0]) / end
    assert len(bars(journey, "wait")) == 2 and max(bars(journey, "wait")) > 500 * part, "the wait in the worker is long"
    width = float(picture(journey).get("width"))
    for rect in picture(journey).findall(".//{*}rect"):
        assert float(rect.get("width")) >= 6
        assert 0 <= float(rect.get("x", 0)) <= width - float(rect.get("width"))
    for text in picture(journey).findall(".//{*}text"):
        if text.get("class") is None:
            assert 110 <= float(text.get("x")) <= width - 7 * len(text.text)


def test_a_failed_task_is_marked_in_words_too(workers, client):
    journey = gone(client, "divide", 1, 0)
    assert words(journey) == "sent received started failed"
    assert ": ZeroDivisionError('division by zero'); stored" in steps(journey)[-1][2]
    assert bars(journey, "bad") and any(label.startswith("failed, ran") for label in labels(journey))


@pytest.mark.parametrize("client", ["threads", "prefork"], indirect=True)
def test_a_retried_task_shows_each_attempt_in_order(workers, client):
    """The next attempt is often received before the worker tells of the retry."""
    journey = gone(client, "flaky", 2, 0.2)
    attempt = "received started"
    assert words(journey) == f"sent {attempt} retried {attempt} retried {attempt} succeeded"
    times = [step[0] for step in steps(journey)]
    assert times == sorted(times)
    assert steps(journey)[3][2].endswith(": ConnectionError('the service is not up yet')")
    assert (len(bars(journey, "wait")), len(bars(journey, "bad"))) == (6, 2)


def test_an_attempt_that_is_told_of_after_the_end_is_shown_all_the_same(client):
    """A busy machine's main process may tell of a retry only when the next attempt has already succeeded."""
    with client.events.default_dispatcher() as worker:
        with Journey(client) as journey:
            task = client.send_task("nobody's", queue="nobody").id
            for kind, retries in (("received", 0), ("started", 0), ("received", 1), ("started", 1), ("succeeded", 1)):
                worker.send(f"task-{kind}", uuid=task, retries=retries)
            late = threading.Timer(0.3, worker.send, ["task-retried"], {"uuid": task, "exception": "OSError()"})
            late.start()
        late.join()
    with client.connection_for_write() as connection:
        connection.default_channel.queue_purge("nobody")
    assert words(journey) == "sent received started retried received started succeeded"


def test_no_result_no_place_in_the_backend(workers, client):
    journey = gone(client, "notify", "hello", get=False)
    assert words(journey) == "sent received started succeeded"
    assert "stored" not in journey._repr_mimebundle_()["text/html"]
    assert "stored" not in labels(journey) and "backend" not in ElementTree.tostring(picture(journey)).decode()


def test_a_task_that_no_worker_knows_has_failed(workers, client):
    journey = gone(client, "nonsense")
    assert words(journey) == "sent failed" and "NotRegistered" in steps(journey)[-1][2]
    assert bars(journey, "bad")


def test_a_revoked_task_is_not_waited_for(workers, client):
    with Journey(client, LONG) as journey, Redis.from_url(os.environ["CELERY_BROKER_URL"]) as server:
        result = client.send_task("add", (1, 2), countdown=1)
        until(lambda: server.hlen("unacked"), "the worker has it")  # revoked before, it would not be received
        result.revoke()
        start = time.monotonic()
    assert time.monotonic() - start < LONG / 2
    assert words(journey) == "sent received revoked"


def test_the_end_is_awaited_but_not_for_ever(workers, client):
    start = time.monotonic()
    journey = gone(client, "add_long", 4, 5, 0.5, get=False, wait=LONG)
    assert words(journey).endswith("succeeded") and time.monotonic() - start < LONG / 2
    journey = gone(client, "add_long", 4, 5, 3, get=False, wait=1)
    assert words(journey) == "sent received started"
    assert journey._repr_mimebundle_()["text/plain"].endswith("\nNo more was heard within 1 s.")
    assert any(label.startswith("has run for") for label in labels(journey))


def test_without_a_worker_it_says_so_at_once(monkeypatch):
    monkeypatch.setattr("course_tasks.classroom.listening.ANSWER", LONG)
    with connected(NOBODY) as client:
        start = time.monotonic()
        journey = gone(client, "add", 4, 5, get=False, wait=LONG)
        assert time.monotonic() - start < LONG / 2
        assert words(journey) == "sent"
        text = journey._repr_mimebundle_()["text/plain"]
        assert text.endswith("\nNo worker has taken it: it waits in queue 'celery'.")
        assert any(label.startswith("has waited") for label in labels(journey))


def test_a_busy_solo_worker_does_not_block_for_ever():
    """It is busy for as long as the test may take."""
    with working(6, "--pool=solo", "--without-mingle") as worker, connected(6) as client:
        busy = client.send_task("add_long", (1, 2, 1000))
        until(lambda: busy.state == "STARTED", "the worker is busy")
        with Journey(client, wait=0.5) as journey:
            client.send_task("add", (4, 5))
        assert words(journey) == "sent"
        worker.kill()
        worker.wait(20)
        with Redis.from_url(broker(6)) as server:
            server.flushdb()  # what the worker has taken


def test_a_worker_that_has_only_just_started_is_heard():
    with working(5, "--pool=solo", "--without-mingle"), connected(5) as client:
        assert words(gone(client, "add", 4, 5)) == "sent received started succeeded"


def test_a_task_that_was_taken_in_silence_is_said_so():
    with connected(NOBODY) as client, Redis.from_url(broker(NOBODY)) as server:
        with Journey(client) as journey:
            client.send_task("add", (1, 2))
            server.delete("celery")
        text = journey._repr_mimebundle_()["text/plain"]
        assert text.endswith("\nIt is not in queue 'celery' any more, but no worker has told of it.")


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_connection_that_is_lost_on_the_way_is_said_so():
    with connected(NOBODY) as client, Redis.from_url(broker(NOBODY)) as server, Journey(client) as journey:
        client.send_task("add", (1, 2), ignore_result=True)
        [listener] = [each for each in server.client_list("pubsub") if each["db"] == str(NOBODY)]
        server.client_kill_filter(listener["id"])
        until(lambda: not journeys(), "the thread has ended")
    last = journey._repr_mimebundle_()["text/plain"].splitlines()[-1]
    assert words(journey) == "sent" and last.startswith("The connection to the broker was lost on the way")


def test_a_broker_that_ends_in_the_block_does_not_hold_it_up():
    port = next(free_ports())
    with addressed(f"redis://127.0.0.1:{port}/0"), serving(port) as server:
        client = Celery()
        client.conf.broker_transport_options = {"connect_retries_timeout": LONG}  # how long kombu alone would try
        with Journey(client, 0.1) as journey:
            client.send_task("add", (1, 2), ignore_result=True)
            server.shutdown(nosave=True)
            ended = time.monotonic()
        assert time.monotonic() - ended < LONG / 2
        client.pool.force_close_all()
    assert words(journey) == "sent"


def test_the_block_begins_when_the_journey_listens(workers, client, monkeypatch):
    receiver = client.events.Receiver
    monkeypatch.setattr(client.events, "Receiver", lambda *args, **kw: time.sleep(0.5) or receiver(*args, **kw))
    assert words(gone(client, "add", 4, 5)) == "sent received started succeeded"


def test_a_worker_that_starts_is_asked_until_it_answers_but_not_for_ever():
    """It has a queue for orders first, and listens to it later; this one never does."""
    binding = ("_kombu.binding.celery.pidbox", "\x06\x16\x06\x16slow@host.celery.pidbox")
    with connected(NOBODY) as client, Redis.from_url(broker(NOBODY)) as server, server.pubsub() as orders:
        orders.psubscribe(f"/{NOBODY}.celery.pidbox")
        starting = threading.Timer(0.1, server.sadd, binding)
        starting.start()
        start = time.monotonic()
        with Journey(client, wait=0.1) as journey:
            assert time.monotonic() - start < LONG / 2
            client.send_task("add", (1, 2))
        asked = 0
        while message := orders.get_message(timeout=0.2):
            asked += message["type"] == "pmessage"
        server.srem(*binding)
    assert asked >= 3 and words(journey) == "sent"


@pytest.mark.parametrize("number", [0, 2])
def test_a_block_sends_one_task(workers, client, number):
    message = f"sent {number or 'none'}"
    with pytest.raises(ClassroomError, match=message) as raised, Journey(client) as journey:
        for _ in range(number):
            client.send_task("add", (1, 2)).get(timeout=60)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    assert message in journey._repr_mimebundle_()["text/plain"] and "\n" not in str(raised.value)


@pytest.mark.parametrize("number", [0, 1])
def test_an_error_in_the_block_passes_through(workers, client, number):
    with pytest.raises(ZeroDivisionError), Journey(client) as journey:
        for _ in range(number):
            client.send_task("add", (1, 2)).get(timeout=60)
        1 / 0  # noqa: B018
    assert words(journey) == ("sent received started succeeded" if number else "")


def test_a_journey_can_be_made_again(workers, client, monkeypatch):
    handlers, receiver = [], client.events.Receiver
    monkeypatch.setattr(
        client.events, "Receiver", lambda *args, **kw: handlers.append(kw["handlers"]["*"]) or receiver(*args, **kw)
    )
    journey = Journey(client)
    for _ in range(2):
        with journey:
            result = client.send_task("add", (1, 2))
            result.get(timeout=60)
            if len(handlers) == 2:  # the thread of the block before is still at work
                handlers[0]({"type": "task-received", "uuid": result.id, "timestamp": time.time(), "hostname": "x"})
        assert words(journey) == "sent received started succeeded"
    assert not after_task_publish.receivers, "what is sent after the block is no part of it"


@pytest.mark.parametrize(
    "url, message",
    [
        ("memory://", r"needs a Redis or Valkey broker.*memory"),
        ("redis://:secret@127.0.0.1:1/0", r"can't listen to the broker"),
        ("nonsense://x", r"can't listen to the broker"),
    ],
)
def test_a_journey_that_cannot_begin_has_one_clear_line(url, message):
    start = time.monotonic()
    with addressed(url), pytest.raises(ClassroomError, match=message) as raised, Journey(Celery()):
        pass
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)
    assert time.monotonic() - start < LONG / 2
    until(lambda: not journeys(), "no thread is left")


def test_a_journey_is_a_clients():
    with pytest.raises(ClassroomError, match=r"^Journey takes a Celery app.*not a str\.$"):
        Journey("client")


def test_nbval_finds_two_journeys_alike_but_not_different_ones(workers, client):
    def compared(journey, **changes):
        bundle = journey._repr_mimebundle_()
        for old, new in changes.items():
            bundle = {kind: text.replace(old, new) for kind, text in bundle.items()}
        output = nbformat.v4.new_output("execute_result", bundle, execution_count=1)
        return record.comparable(nbformat.v4.new_code_cell(outputs=[output]))

    one, two = (gone(client, "add_long", 4, 5, seconds) for seconds in (0.02, 0.15))
    assert one._repr_mimebundle_() != two._repr_mimebundle_()
    assert compared(one) == compared(two)
    host = {socket.gethostname(): "another-host.example"}
    assert compared(one, **host) == compared(two)
    for old in ("add_long", "succeeded", "received", "'celery'", "threads", "stored"):
        assert compared(one, **{old: "other"}) != compared(two), old
    late, later = (gone(client, "add", 4, 5, countdown=pause) for pause in (0.02, 0.15))
    assert compared(late) == compared(later) != compared(one)


def test_a_notebook_shows_a_journey_and_one_line_for_a_wrong_one(workers):
    cells = [
        "from celery import Celery\nfrom course_tasks.classroom.journey import Journey\nclient = Celery()",
        "with Journey(client) as journey:\n    client.send_task('add', (4, 5)).get(timeout=60)\njourney",
        "with Journey(client) as journey:\n    pass",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    with addressed(broker(1)), kernels.executing(notebook, allow_errors=True) as kernel:
        for index, cell in enumerate(notebook.cells):
            kernel.execute_cell(cell, index)
    [shown], [error] = notebook.cells[1].outputs, notebook.cells[2].outputs
    assert set(shown.data) == {"text/plain", "text/html"} and "succeeded" in shown.data["text/plain"]
    assert error.traceback == [error.evalue] and "has sent none" in error.evalue


# BrokerView


class ViewKernel(Kernel):
    """A kernel that shows views; it keeps the HTML of live updates too."""

    def __init__(self, manager):
        super().__init__(manager)
        self.run("from course_tasks.classroom.broker_view import BrokerView")

    def pane(self, code: str) -> str:
        """The text of the cell's one output, a pane."""
        [output] = self.run(code)
        return output["data"]["text/plain"]

    def in_cell(self, code: str, cell: str) -> None:
        """Run as JupyterLab does, which says in which cell the code is."""
        content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
        message = self.client.session.msg("execute_request", content, metadata={"cellId": cell})
        self.client.shell_channel.send(message)
        while True:
            found = self.message()
            idle = found["msg_type"] == "status" and found["content"]["execution_state"] == "idle"
            if idle and found["parent_header"].get("msg_id") == message["header"]["msg_id"]:
                return


@contextlib.contextmanager
def viewing(**variables):
    with kernels.kernel_manager() as manager:
        manager.start_kernel(env=kernels.kernel_environment() | variables, cwd=str(kernels.NOTEBOOKS))
        kernel = ViewKernel(manager)
        yield kernel
        kernel.client.stop_channels()


@pytest.fixture(scope="module")
def shared():
    with viewing() as kernel:
        yield kernel


@pytest.fixture
def kernel(shared):
    """One kernel for all tests of what views show; no view is left at work."""
    shared.updates.clear()
    yield shared
    shared.run("for view in [*BrokerView._ipython_display_.__globals__['_showing'].values()]: view.stop()")
    assert (
        shared.run("import threading; sum(t.name == 'broker-view' for t in threading.enumerate())")[0]["data"][
            "text/plain"
        ]
        == "0"
    )


@pytest.fixture
def server():
    """The views' broker, where a test's queues are its own and end with it."""
    with Redis.from_url(os.environ["CELERY_BROKER_URL"], decode_responses=True) as server:
        server.flushdb()
        yield server
        server.flushdb()


def views(server: Redis) -> int:
    """How many connections views have to the broker."""
    return sum(client["name"] == "broker-view" for client in server.client_list())


@contextlib.contextmanager
def serving(port: int):
    """A server of the test's own."""
    command = [sys.executable, "-m", "course_tasks", "server", "--port", str(port), "--save", ""]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        with Redis(port=port, decode_responses=True) as server:
            until(lambda: listens(port), "the server listens")
            yield server
    finally:
        process.terminate()
        process.wait(10)


def take(server: Redis, queue: str, routing_key: str | None = None) -> None:
    """Add a message that a worker has taken and not acknowledged, as kombu writes it."""
    server.hset("unacked", str(uuid.uuid4()), json.dumps([{"body": "e30="}, "", routing_key or queue]))


def test_the_pane_counts_waiting_and_unacknowledged_messages_and_follows(kernel, server):
    connection = app.connection_for_write(os.environ["CELERY_BROKER_URL"])
    send = partial(app.send_task, "add", (1, 2), connection=connection, ignore_result=True)  # not to ask the backend
    for priority in (0, 4, 9):  # one list each, in Redis
        send(queue="letters", priority=priority)
    message = connection.SimpleQueue("letters").get(timeout=60)  # as a worker takes it
    take(server, "parcels")
    take(server, "parcels")
    take(server, "elsewhere")
    [output] = kernel.run('view = BrokerView("letters", "parcels"); view')
    text, page = output["data"]["text/plain"], output["data"]["text/html"]
    url = without_secrets(os.environ["CELERY_BROKER_URL"])
    assert [line.split() for line in text.splitlines()] == [
        ["broker", url],
        ["letters", "2", "waiting", "1", "unacked"],
        ["parcels", "0", "waiting", "2", "unacked"],
        ["1", "unacked", "elsewhere", "in", "this", "broker's", "database"],
    ]
    assert 'role="status"' in page and 'aria-label="messages in letters, parcels"' in page
    assert not re.search(r"<(?!/|b>|div|pre|span)|class=|<script", page), "only what an untrusted notebook shows"
    assert not kernel.updated("", 0.6), "no update without a change"
    message.ack()
    send(queue="parcels")
    assert kernel.updated("letters      2 waiting      0 unacked\nparcels      1 waiting      2 unacked")
    connection.release()


def test_it_only_reads_a_few_times_a_second_over_one_connection(kernel):
    with serving(port := next(free_ports())) as server:
        take(server, "celery")
        kernel.run(f'view = BrokerView("celery", url="redis://localhost:{port}/0"); view')
        server.config_resetstat()
        start, calls = time.monotonic(), {}
        while calls.get("hlen", 0) < 4:
            time.sleep(0.1)
            calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in server.info("commandstats").items()}
        seconds = time.monotonic() - start
        assert set(calls) - {"config|resetstat", "info"} <= {"llen", "hlen", "hkeys", "hmget"}
        assert calls["hlen"] <= 4 * seconds + 1
        assert "hmget" not in calls, "a message is read once"
        assert views(server) == 1


def test_stop_ends_the_thread_and_the_connection(kernel, server):
    kernel.run('view = BrokerView("celery"); view')
    until(lambda: views(server) == 1, "the view is connected")
    kernel.run("view.stop()")
    assert views(server) == 0
    server.lpush("celery", "x")
    assert not kernel.updated("1 waiting", 0.6)
    kernel.run("view.stop()")
    assert "1 waiting" in kernel.pane("view")
    server.lpush("celery", "x")
    assert kernel.updated("2 waiting"), "it can be shown again"


def test_a_cell_run_again_and_a_view_of_the_same_queues_replace_the_view(kernel, server):
    for _ in range(3):
        kernel.run('BrokerView("celery", "letters")')
    assert views(server) == 1
    for queue in ("one", "two", "three"):
        kernel.in_cell(f'BrokerView("{queue}")', "cell-1")
    assert views(server) == 2
    kernel.in_cell('BrokerView("other")', "cell-2")
    assert views(server) == 3
    server.lpush("three", "x")
    assert kernel.updated("three      1 waiting")


@pytest.mark.parametrize("how", ["restart", "shutdown", "sigkill"])
def test_a_view_ends_with_the_kernel(server, how):
    with viewing() as kernel:
        kernel.run('BrokerView("celery")')
        assert views(server) == 1
        if how == "restart":
            kernel.manager.restart_kernel()
        elif how == "shutdown":
            process = kernel.manager.provisioner.process
            kernel.manager.shutdown_kernel()
            assert process.returncode == 0, "it had to be killed"
        else:
            psutil.Process(kernel.manager.provisioner.process.pid).send_signal(signal.SIGKILL)
        until(lambda: views(server) == 0, "the view has gone")


def test_a_broker_that_goes_away_and_comes_back(kernel):
    url = f"redis://localhost:{(port := next(free_ports()))}/0"
    away = "The broker does not answer. This view goes on as soon as it does."
    assert kernel.pane(f'view = BrokerView("celery", url="{url}"); view') == f"broker {url}\n{away}"
    for _ in range(2):
        kernel.updates.clear()
        with serving(port):
            assert kernel.updated("celery      0 waiting")
        assert kernel.updated(away)
        assert kernel.updates[-1] == f"broker {url}\n{away}"


@pytest.mark.parametrize(
    "code, message",
    [
        ("BrokerView()", r"takes names of queues"),
        ("BrokerView(1)", r"takes names of queues"),
        ("BrokerView('')", r"takes names of queues"),
        ("BrokerView(['celery'])", r"takes names of queues"),
        ("BrokerView('celery', url='amqp://guest:secret@localhost//')", r"a URL such as redis://"),
        ("BrokerView('celery', url='localhost')", r"a URL such as redis://"),
        ("BrokerView('celery', url='redis://localhost:port/0')", r"a URL such as redis://"),
        ("BrokerView('celery', url=6379)", r"a URL such as redis://"),
        ("del os.environ['CELERY_BROKER_URL']; BrokerView('celery')", r"%servers"),
    ],
)
def test_wrong_input_has_one_clear_line(kernel, code, message):
    kernel.run("import os; url = os.environ['CELERY_BROKER_URL']")
    error = kernel.error(code)
    kernel.run("os.environ['CELERY_BROKER_URL'] = url")
    assert re.search(message, error) and "\n" not in error and "secret" not in error


def test_a_broker_that_is_silent_counts_as_away(kernel):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        assert "The broker does not answer." in kernel.pane(
            f'view = BrokerView("celery", url="redis://127.0.0.1:{silent.getsockname()[1]}/0"); view'
        )
        kernel.run("view.stop()")
        assert time.monotonic() - start < LONG / 2


def test_a_broker_that_refuses_is_told_from_one_that_is_away(kernel, server):
    server.set("letters", "no list")
    assert re.search(r"The broker refuses: .*WRONGTYPE", kernel.pane('BrokerView("letters")'))
    server.delete("letters")
    assert kernel.updated("letters      0 waiting")
    url = os.environ["CELERY_BROKER_URL"].replace("//:", "//someone:secret")
    pane = kernel.pane(f'BrokerView("celery", url="{url}")')
    assert "The broker refuses: " in pane and "secret" not in pane


def test_many_messages_stay_cheap_and_legible(kernel, server):
    server.lpush("celery", *["x" * 10_000] * 1500)
    [output] = kernel.run('view = BrokerView("celery"); view')
    assert "celery   1500 waiting" in output["data"]["text/plain"]
    assert len(output["data"]["text/html"]) < 2000
    before = server.info("stats")["total_net_output_bytes"]
    kernel.run("view._look()")
    assert server.info("stats")["total_net_output_bytes"] - before < 1e6, "of 15e6 bytes"
    with server.pipeline() as pipe:
        for _ in range(1001):
            pipe.hset("unacked", str(uuid.uuid4()), json.dumps([{}, "", "celery"]))
        pipe.execute()
    assert kernel.updated("celery   1500 waiting\n1001 unacked in all queues of this broker's database")


def test_what_is_not_kombus_in_unacked_is_counted_only(kernel, server):
    server.hset("unacked", "tag", "nonsense")
    assert kernel.pane('BrokerView("celery")').endswith("waiting\n1 unacked in all queues of this broker's database")
    server.delete("unacked")
    assert kernel.updated("0 unacked"), "and the view goes on"


def test_the_past_is_drawn_beside_the_numbers_and_not_read_aloud(server):
    view = BrokerView("celery")
    server.lpush("celery", "x", "y")
    shown = []
    try:
        for count in (2, 1, 8):
            server.delete("celery")
            server.lpush("celery", *"x" * count)
            view._history["celery"].append(0)
            shown = view._bundle(view._look())
    finally:
        view.stop()
    assert re.search(r'<span aria-hidden="true"[^>]*> +▂▁█</span>', shown["text/html"])
    assert "█" not in shown["text/plain"]


def test_a_recording_has_no_thread_and_no_update(kernel, server):
    kernel.run("import os; os.environ['COURSE_RECORDING'] = '1'")
    assert "0 waiting" in kernel.pane('view = BrokerView("celery"); view')
    server.lpush("celery", "x")
    assert not kernel.updated("", 0.6)
    assert "1 waiting" in kernel.pane("view")
    kernel.run("view.stop(); del os.environ['COURSE_RECORDING']")
    assert views(server) == 0
