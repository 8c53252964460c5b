"""The toolkit, with real servers and workers: what it returns, and the one line for each thing that fails."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.signals import before_task_publish
from redis import Redis

from course_tasks.classroom import (
    ClassroomError,
    Spans,
    ask_worker,
    collect,
    follow_log,
    memory,
    run_tasks,
    send_under,
    wait_until,
)
from course_tasks.correlation import correlation_id
from course_tasks.servers import find_server
from course_tasks.tests.plugin import free_ports, listens, until
from course_tasks.tests.test_live import addressed, working


@pytest.fixture(scope="module")
def client():
    """A client, with a worker of two threads in a database of their own on the pair."""
    url = f"{os.environ['CELERY_BROKER_URL'].rpartition('/')[0]}/8"
    with addressed(url), working(8, "--pool=threads", "-c", "2", "--without-mingle", node="w1@%h"):
        client = Celery(set_as_current=False)
        yield client
        disconnect(client)


def disconnect(client: Celery) -> None:
    """Close what a client has open: the tests' servers wait until everybody has left."""
    client.pool.force_close_all()
    client.backend.result_consumer.stop()
    client.backend.client.connection_pool.disconnect()


@contextlib.contextmanager
def one_line(*parts: str):
    """The block raises a ClassroomError of one line, which has these parts."""
    with pytest.raises(ClassroomError) as raised:
        yield
    assert "\n" not in str(raised.value)
    assert [part for part in parts if part not in str(raised.value)] == [], str(raised.value)


def test_wait_until_says_that_a_condition_needs_a_lambda():
    with one_line("takes a function", "write `lambda:` before the condition"):
        wait_until(1 == 2)


def test_wait_until_returns_what_the_condition_found():
    looks = iter([0, None, [], "found"])
    assert wait_until(lambda: next(looks)) == "found"


def test_wait_until_says_what_it_waited_for_and_passes_errors_on():
    with one_line("Waited 0.1 s for the second worker, but it didn't happen."):
        wait_until(lambda: False, seconds=0.1, what="the second worker")
    task = SimpleNamespace(state="PENDING", ready=lambda: False)
    with one_line("Waited 0.1 s in vain for this: task.state == 'STARTED'. Look at the log"):
        wait_until(lambda: task.state == 'STARTED', seconds=0.1)  # fmt: skip
    with one_line("Waited 0.1 s in vain for this: task.ready. Look"):
        wait_until(task.ready, 0.1)
    with pytest.raises(ZeroDivisionError):
        wait_until(lambda: 1 / 0)


def test_run_tasks_returns_spans_that_know_what_they_say(client):
    spans = run_tasks(client, "wait", args=(0.3,), count=4)
    assert isinstance(spans, Spans) and len(spans) == 4 and repr(spans) == repr(list(spans))
    assert (spans.slots, spans.at_once) == (2, 2)
    assert spans.wall > 0.59 and 0 < spans.speedup < 2.02
    assert spans.speedup * (spans.wall + 1e-9) == pytest.approx(4 * 0.3)


def test_collect_keeps_the_order_of_the_results(client):
    results = [client.send_task("wait", args=(seconds,)) for seconds in (0.3, 0.1, 0.2)]
    assert [span["seconds"] for span in collect(results)] == [0.3, 0.1, 0.2]


def test_tasks_that_bring_no_spans_have_one_clear_line(client):
    with one_line("Task ", "returned 9. Only the tasks wait and compute"):
        run_tasks(client, "add", args=(4, 5))
    with one_line("ended as FAILURE (ZeroDivisionError: ", "%tail"):
        run_tasks(client, "divide", args=(1, 0))
    with one_line("ended as FAILURE (NotRegistered: "):
        run_tasks(client, "no-such-task")
    with one_line("Only 0 of 2 tasks were done after 0.2 s.", "Is a worker running that reads queue 'nobody'?"):
        run_tasks(client, "wait", args=(0.1,), count=2, queue="nobody", timeout=0.2)
    with one_line("Only 0 of 1 tasks", "their queue"):
        collect([client.send_task("wait", args=(0.1,), queue="nobody")], timeout=0.2)
    with one_line("count is how many tasks to send, 1 or more, not 0."):
        run_tasks(client, "wait", args=(0.1,), count=0)
    with one_line("nothing to collect"):
        collect([])


@pytest.mark.parametrize(
    "forgets_the_client",
    [
        lambda: run_tasks("wait", (0.1,)),
        lambda: send_under(None, "ada-7", "order"),
        lambda: ask_worker("w1", "stats"),
    ],
)
def test_a_forgotten_client_has_one_clear_line(forgets_the_client):
    with one_line("The first argument is the app to send with, such as client = Celery(), not "):
        forgets_the_client()


def test_servers_that_are_away_have_one_clear_line():
    with addressed(f"redis://localhost:{next(free_ports())}/0"):
        away = Celery(set_as_current=False)
        with one_line("The broker or the backend doesn't answer", "%servers"):
            run_tasks(away, "wait", args=(0.1,))
        with one_line("The broker or the backend doesn't answer", "%servers"):
            ask_worker(away, "w1", seconds=1)
        disconnect(away)


def test_a_worker_answers_by_its_short_or_full_name(client):
    assert ask_worker(client, "w1")["pool"]["max-concurrency"] == 2
    assert ask_worker(client, f"w1@{socket.gethostname()}", "active") == [], "an empty answer is one too"
    assert "add" in ask_worker(client, "w1", "registered")


def test_a_worker_that_starts_later_is_asked_until_it_answers(client):
    with contextlib.ExitStack() as stack:
        code = f"from course_tasks.classroom import ask_worker; from celery import Celery; {LATE}"
        asking = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert asking.stdout.readline() == "asking\n"
        stack.enter_context(working(8, "--pool=solo", "-Q", "late", "--without-mingle", node="late@%h"))
        assert asking.communicate(timeout=60)[0] == "solo\n"


LATE = "print('asking', flush=True); print(ask_worker(Celery(), 'late', seconds=60)['pool']['implementation'][-13:-9])"


SLOW = """
import sys, time
import kombu.pidbox
from celery.__main__ import main
handle = kombu.pidbox.Node.handle_message
def slowly(*args, **kwargs):
    time.sleep(1.5)
    return handle(*args, **kwargs)
kombu.pidbox.Node.handle_message = slowly
sys.argv = "celery -A course_tasks worker -Q slow -n slow@%h --pool=solo --without-mingle --loglevel=INFO".split()
main()
"""


def test_a_worker_that_takes_longer_than_the_first_patience_answers_in_the_end(client):
    """Each answer comes when the next question has been asked already, and must not be taken for its answer."""
    command = [sys.executable, "-c", SLOW]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as worker:
        try:
            assert any(line.endswith(" ready.\n") for line in worker.stdout)
            threading.Thread(target=worker.stdout.read, daemon=True).start()
            assert ask_worker(client, "slow", "ping", seconds=30) == {"ok": "pong"}
        finally:
            worker.kill()


def test_a_worker_that_does_not_answer_and_a_wrong_question_have_one_clear_line(client):
    with one_line(f"No worker called w9@{socket.gethostname()} has answered within 0.3 s. Is it running?", "solo"):
        ask_worker(client, "w9", seconds=0.3)
    with one_line("A worker has no answer to 'shutdown'. You can ask for stats, active"):
        ask_worker(client, "w1", "shutdown")


def test_memory_is_the_processs_own_in_megabytes():
    grown = "held = b'x' * 100_000_000"
    sizes = []
    for code in ("pass", grown):
        code += "; print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            sizes.append(memory(process.pid))
            process.communicate(b"\n")
    assert 95 < sizes[1] - sizes[0] < 105
    with one_line(f"There is no process {process.pid}. Has it ended?"):
        memory(process.pid)
    with one_line("There is no process None."):
        memory(None)


def test_a_backend_that_goes_away_while_results_are_collected_is_one_line(monkeypatch):
    port = next(free_ports())
    with subprocess.Popen([find_server()[0], "--port", str(port), "--save", ""], stdout=subprocess.DEVNULL) as server:
        until(lambda: listens(port), "the server listens")
        monkeypatch.setenv("CELERY_RESULT_BACKEND", f"redis://localhost:{port}/0")
        client = Celery(set_as_current=False)
        client.conf.result_backend_transport_options = {"retry_policy": {"max_retries": 1}}
        result = client.AsyncResult("nobody-sends-this")
        asked = threading.Thread(target=lambda: until(lambda: heard(port), "collect listens") and server.kill())
        asked.start()
        with one_line("The broker or the backend doesn't answer", "Run %servers."):
            collect([result], timeout=30)
        asked.join()


def heard(port: int) -> bool:
    """Whether somebody has subscribed to a result on this server."""
    with Redis(port=port) as server:
        return bool(server.pubsub_channels())


def test_without_a_notebook_it_says_so():
    with one_line("follow_log follows a notebook's terminal cells. Run the notebook's first cell first."):
        follow_log("one", "text")


def test_send_under_sets_the_id_only_while_it_sends(client):
    seen = []
    look = before_task_publish.connect(lambda **_: seen.append(correlation_id.get()), weak=False)
    token = correlation_id.set("mine")
    try:
        assert send_under(client, "ada-7", "add", args=(4, 5)).get(timeout=30) == 9
        away = Celery(broker="redis://localhost:1/0", set_as_current=False)
        away.conf.broker_read_url = away.conf.broker_write_url = "redis://localhost:1/0"
        with one_line("The broker or the backend doesn't answer"):
            send_under(away, "ben-8", "add", args=(4, 5), ignore_result=True)
        assert (seen[0], correlation_id.get()) == ("ada-7", "mine")
    finally:
        correlation_id.reset(token)
        before_task_publish.disconnect(look)
