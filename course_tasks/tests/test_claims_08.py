"""Claims of chapters 08 to 08c that no cell proves: see test_claims.py."""

import os
import signal
import sqlite3
from unittest import mock

import pytest
from celery import Celery
from celery.exceptions import Retry
from redis.exceptions import LockNotOwnedError

from course_tasks.tests.plugin import node_stats, stands, until

FRAGILE = """
import os
import time
from celery import Celery
from redis import Redis
app = Celery("fragile")
app.conf.update(task_track_started=True, SETTINGS)
store = Redis.from_url(os.environ["CELERY_RESULT_BACKEND"])

class Parking(app.Task):
    def on_failure(self, exc, task_id, args, kwargs, einfo):
        store.rpush("parked", task_id)

def work(task, seconds):
    store.hincrby(task.request.id, "starts", 1)
    time.sleep(seconds)
    store.hincrby(task.request.id, "ends", 1)

@app.task(name="late", bind=True, acks_late=True)
def late(self, seconds):
    work(self, seconds)

@app.task(name="again", bind=True, retry_on_worker_lost=True, max_retries=2, default_retry_delay=0.1)
def again(self, seconds):
    work(self, seconds)

@app.task(name="parked", bind=True, base=Parking)
def parked(self, seconds):
    work(self, seconds)
    raise ValueError("it fails")

@app.task(name="slow", bind=True, soft_time_limit=1, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def slow(self):
    work(self, 3)
"""
FRAGILE_WORKER = "celery -A fragile worker --concurrency=1 -n w@%h --without-mingle --without-gossip"


def start(project, settings: str = "") -> Celery:
    """Start a prefork worker with one child for the tasks above, and return a client."""
    (project.folder / "fragile.py").write_text(FRAGILE.replace("SETTINGS", settings))
    project.worker(FRAGILE_WORKER)
    return project.client()


def counted(project, result) -> dict[str, int]:
    """How often a task has started and ended."""
    return {name.decode(): int(number) for name, number in project.backend.hgetall(result.id).items()}


def kill_child(client: Celery) -> None:
    """Kill the child process of the worker."""
    os.kill(node_stats(client, "w")["pool"]["processes"][0], signal.SIGKILL)


# --- 08 ------------------------------------------------------------------------------------------------------


def test_the_defaults_of_delivery():
    stands("08", "(three minutes by default)", "The setting is off by default.")
    app = Celery(set_as_current=False)
    assert app.Task.default_retry_delay == 180
    assert not app.conf.worker_cancel_long_running_tasks_on_connection_loss
    assert not app.Task.retry_on_worker_lost and not app.Task.reject_on_worker_lost


def test_retry_on_worker_lost_works_for_early_tasks_and_counts(project):
    stands("08", "It also works for tasks that are acknowledged early.", "and it counts the attempts")
    client = start(project)
    result = client.send_task("again", args=(60,))
    for attempt in (1, 2, 3):
        until(lambda: counted(project, result).get("starts") == attempt, f"attempt {attempt}")  # noqa: B023
        kill_child(client)
    error = result.get(timeout=30, propagate=False)
    assert (type(error).__name__, counted(project, result)) == ("WorkerLostError", {"starts": 3})


def test_a_late_task_is_killed_if_the_setting_says_so_when_the_connection_breaks(project):
    stands(
        "08",
        "Each of them is still started twice then, but finished only once.",
        "it puts the messages that it has not acknowledged back into the queue",
    )
    client = start(project, "worker_cancel_long_running_tasks_on_connection_loss=True")
    result = client.send_task("late", args=(2,))
    until(lambda: counted(project, result), "the task starts")
    for connection in project.broker.client_list():
        if connection["cmd"] == "brpop":
            project.broker.client_kill(connection["addr"])
    until(lambda: counted(project, result).get("ends"), "a run ends")
    until(lambda: not project.broker.exists("celery", "unacked"), "no message is left")
    assert counted(project, result) == {"starts": 2, "ends": 1}


# --- 08b -----------------------------------------------------------------------------------------------------


def countdowns(**options) -> list:
    """The waits that a task chooses after its first, second and third attempt, each tried often."""
    app = Celery(set_as_current=False)

    @app.task(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), **options)
    def fail(error):
        raise error

    waits: list[list] = []
    for attempt in range(3):
        waits.append([])
        for _ in range(60):
            fail.push_request(retries=attempt, called_directly=False)
            with (
                mock.patch.object(fail, "retry", side_effect=Retry()) as retry,
                pytest.raises(Retry),
            ):
                fail.run(ConnectionError())
            fail.pop_request()
            waits[-1].append(retry.call_args.kwargs.get("countdown"))
    return [set(found) for found in waits]


def test_the_defaults_of_retries():
    stands(
        "08b",
        "Without the option there are three retries, and `None` means for ever.",
        "up to `retry_backoff_max` (600 seconds by default)",
        "By default, Celery doesn't use these numbers as they are. It picks a random number of whole seconds",
        "The first number of the backoff is 1, and jitter picks a whole number from 0 to 1.",
    )
    assert Celery(set_as_current=False).Task.max_retries == 3
    assert countdowns(retry_backoff=True) == [{0, 1}, {0, 1, 2}, {0, 1, 2, 3, 4}]
    assert countdowns(retry_backoff=True, retry_jitter=False) == [{1}, {2}, {4}]
    assert countdowns(retry_backoff=601, retry_jitter=False) == [{600}] * 3
    assert countdowns() == [{None}] * 3


def test_a_part_of_the_exceptions_can_be_left_out():
    stands("08b", "`autoretry_for=(OSError,)` with `dont_autoretry_for=(FileNotFoundError,)` leaves out a part")
    app, calls = Celery(set_as_current=False), []

    @app.task(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), max_retries=1)
    def fail(kind):
        calls.append(kind)
        raise kind

    for kind in (ConnectionError, FileNotFoundError):
        fail.apply(args=(kind,))
    assert calls == [ConnectionError, ConnectionError, FileNotFoundError]


def test_autoretry_for_every_exception_retries_what_was_too_slow(project):
    stands("08b", "it retries a task that was too slow")
    client = start(project)
    result = client.send_task("slow")
    error = result.get(timeout=30, propagate=False)
    assert type(error).__name__ == "SoftTimeLimitExceeded" and counted(project, result) == {"starts": 2}


def test_on_failure_is_not_called_if_the_process_is_killed(project):
    stands("08b", "`on_failure` runs inside the worker's process, so it is not called if that process is killed.")
    client = start(project)
    killed = client.send_task("parked", args=(60,))
    until(lambda: counted(project, killed), "the task starts")
    kill_child(client)
    assert type(killed.get(timeout=30, propagate=False)).__name__ == "WorkerLostError"
    failed = client.send_task("parked", args=(0,))
    failed.get(timeout=30, propagate=False)
    until(lambda: project.backend.exists("parked"), "the second one is parked")
    assert project.backend.lrange("parked", 0, -1) == [failed.id.encode()]


# --- 08c -----------------------------------------------------------------------------------------------------


def test_a_lock_belongs_to_its_owner_and_disappears_by_itself(project):
    stands(
        "08c",
        "it sets a key in Redis that only its owner may delete, with a time after which it disappears by itself",
        "if the timeout is shorter than the task, a second task gets in while the first one is still at work",
    )
    first, second = (project.backend.lock("lock", timeout=0.2) for _ in range(2))
    assert first.acquire(blocking=False) and not second.acquire(blocking=False)
    until(lambda: second.acquire(blocking=False), "the lock disappears")
    with pytest.raises(LockNotOwnedError):
        first.release()
    assert 0 < project.backend.pttl("lock") <= 200 or not project.backend.exists("lock")


def test_what_a_dead_process_has_not_committed_is_gone(tmp_path):
    stands("08c", "When Ben's process died, the database had not committed anything")
    stands("08c", "`PRIMARY KEY` makes the database refuse a second row with the same order.")
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("CREATE TABLE done (order_id TEXT PRIMARY KEY)")
    db.execute("INSERT INTO done VALUES ('ben-4')")
    db.close()  # without a commit
    with sqlite3.connect(tmp_path / "shop.db") as db:
        db.execute("INSERT INTO done VALUES ('ben-4')")
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("INSERT INTO done VALUES ('ben-4')")
    db.close()
