"""Claims of chapters 08 to 08c that no cell proves: see test_claims.py."""

import contextlib
import functools
import json
import os
import signal
import sqlite3
from datetime import UTC, datetime, timedelta
from unittest import mock

import pytest
from celery import Celery
from celery.exceptions import Retry
from celery.result import AsyncResult
from redis.exceptions import LockNotOwnedError

from course_tasks.tests.plugin import logged, node_stats, stands, until

FRAGILE = """
import os
import signal
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
    store.rpush("redelivered", str(task.request.delivery_info["redelivered"]))
    while seconds is None and not store.exists("go"):  # held until somebody sets the key
        time.sleep(0.05)
    time.sleep(seconds or 0)
    store.hincrby(task.request.id, "ends", 1)

@app.task(name="early", bind=True)
def early(self, seconds):
    work(self, seconds)

@app.task(name="reject", bind=True, acks_late=True, reject_on_worker_lost=True)
def reject(self, seconds):
    work(self, seconds)

@app.task(name="someday", bind=True, retry_on_worker_lost=True)
def someday(self, seconds):
    work(self, seconds)

@app.task(name="patient", bind=True, max_retries=1)
def patient(self, countdown):
    work(self, 0)
    try:
        raise ConnectionError("the bank is closed")
    except ConnectionError:
        raise self.retry(countdown=countdown)

@app.task(name="late", bind=True, acks_late=True)
def late(self, seconds):
    work(self, seconds)

@app.task(name="again", bind=True, retry_on_worker_lost=True, max_retries=2, default_retry_delay=0.1)
def again(self, seconds):
    work(self, seconds)

@app.task(
    name="late again", bind=True, acks_late=True, retry_on_worker_lost=True, max_retries=2, default_retry_delay=0.1
)
def late_again(self, seconds):
    work(self, seconds)

@app.task(name="parked", bind=True, base=Parking, autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0)
def parked(self, seconds):
    work(self, seconds)
    if not store.exists("repaired"):
        raise ValueError("it fails")

@app.task(name="dies", bind=True)
def dies(self, times):
    if store.hincrby(self.request.id, "starts", 1) <= times:
        os.kill(os.getpid(), signal.SIGKILL)

@app.task(name="slow", bind=True, soft_time_limit=1, autoretry_for=(Exception,), max_retries=1, default_retry_delay=0)
def slow(self):
    work(self, 3)
"""
FRAGILE_WORKER = "celery -A fragile worker -n w@%h --without-mingle --without-gossip"
FAST = """broker_transport_options={
    "visibility_timeout": 2, "unacked_restore_interval": 1, "unacked_restore_throttle": 1, "unacked_mutex_expire": 5}"""


def start(project, settings: str = "", options: str = "--concurrency=1") -> Celery:
    """Start a prefork worker for the tasks above, and return a client."""
    (project.folder / "fragile.py").write_text(FRAGILE.replace("SETTINGS", settings))
    project.worker(f"{FRAGILE_WORKER} {options}")
    return project.client()


def seconds_left(project) -> float:
    """How long the first message with an eta that a worker keeps still has to wait."""

    def etas() -> list[str]:
        headers = [json.loads(copy)[0]["headers"] for copy in project.broker.hvals("unacked")]
        return [each["eta"] for each in headers if each["eta"]]

    return (datetime.fromisoformat(until(etas, "a worker keeps it")[0]) - datetime.now(UTC)).total_seconds()


def counted(project, result) -> dict[str, int]:
    """How often a task has started and ended."""
    return {name.decode(): int(number) for name, number in project.backend.hgetall(result.id).items()}


def kill_child(client: Celery) -> None:
    """Kill the child process of the worker."""
    os.kill(node_stats(client, "w")["pool"]["processes"][0], signal.SIGKILL)


def killed(project, client: Celery, name: str) -> AsyncResult:
    """Send a task, and kill the child process that runs it."""
    result = client.send_task(name, args=(None,))
    until(lambda: counted(project, result), "the task starts")
    kill_child(client)
    return result


# --- 08 ------------------------------------------------------------------------------------------------------


def test_the_defaults_of_delivery():
    stands("08", "(three minutes by default)", "The setting is off by default.")
    app = Celery(set_as_current=False)
    assert app.Task.default_retry_delay == 180
    assert not app.conf.worker_cancel_long_running_tasks_on_connection_loss
    assert not app.Task.retry_on_worker_lost and not app.Task.reject_on_worker_lost


@pytest.mark.parametrize("name", ["again", "late again"])
def test_retry_on_worker_lost_works_for_early_tasks_too_and_counts(project, name):
    stands("08", "It also works for tasks that are acknowledged early.", "and counts the attempts")
    client = start(project)
    result = client.send_task(name, args=(None,))
    for attempt in (1, 2, 3):
        until(lambda: counted(project, result).get("starts") == attempt, f"attempt {attempt}")  # noqa: B023
        kill_child(client)
    error = result.get(timeout=30, propagate=False)
    assert (type(error).__name__, counted(project, result)) == ("WorkerLostError", {"starts": 3})


def test_the_message_of_a_dead_child_is_acknowledged(project):
    stands("08", "the main process acknowledges the message of its dead child")
    stands("08", "the main process stored `FAILURE` with `WorkerLostError`")
    client = start(project)
    result = killed(project, client, "late")
    assert type(result.get(timeout=30, propagate=False)).__name__ == "WorkerLostError"
    until(lambda: not project.broker.exists("celery", "unacked"), "no message is left")
    assert counted(project, result) == {"starts": 1}


def test_retry_on_worker_lost_waits_before_it_tries_again(project):
    stands(
        "08", "`retry_on_worker_lost` sends a new message, due after `default_retry_delay` (three minutes by default)"
    )
    client = start(project)
    result = killed(project, client, "someday")
    until(lambda: result.state == "RETRY", "the worker has seen it")
    assert 60 < seconds_left(project) <= 180


def test_the_second_start_of_a_message_says_that_it_was_redelivered(project):
    stands("08", "From the second start on, `redelivered` is true.")
    client = start(project)
    result = client.send_task("reject", args=(None,))
    for starts in (1, 2, 3):
        until(lambda: counted(project, result).get("starts") == starts, f"start {starts}")  # noqa: B023
        if starts < 3:
            kill_child(client)
    until(lambda: project.backend.llen("redelivered") == 3, "the third start")
    assert project.backend.lrange("redelivered", 0, -1) == [b"False", b"True", b"True"]


def cut_off(project, settings: str = "", pool: str = "prefork") -> tuple[AsyncResult, AsyncResult]:
    """An early and a late task. While they run, the connection on which their worker waits for messages is closed.

    Both may end as soon as the late one has started again.
    """
    client = start(project, settings, options=f"--pool={pool} --concurrency=3")
    early, late = (client.send_task(name, args=(None,)) for name in ("early", "late"))
    until(lambda: counted(project, early) and counted(project, late), "both start")
    [waiting] = until(
        lambda: [each for each in project.broker.client_list() if each["cmd"] == "brpop"], "the worker waits"
    )
    project.broker.client_kill(waiting["addr"])
    until(lambda: counted(project, late) == {"starts": 2}, "the late one starts again")
    project.backend.set("go", 1)
    return early, late


def test_after_a_broken_connection_a_late_task_runs_next_to_itself(project):
    stands(
        "08",
        "the second run began before the first was over",
        "it puts the messages that it has not acknowledged back into the queue",
        "plays no part in this. The early task was already acknowledged, so it ran once.",
    )
    early, late = cut_off(project)
    until(lambda: counted(project, late) == {"starts": 2, "ends": 2}, "both runs end")
    until(early.ready, "the early one ends")
    until(lambda: not project.broker.exists("celery", "unacked"), "no message is left")
    assert counted(project, early) == {"starts": 1, "ends": 1}


@pytest.mark.parametrize("pool, ends", [("prefork", 1), ("threads", 2)])
def test_a_late_task_is_killed_if_the_setting_says_so_when_the_connection_breaks(project, pool, ends):
    stands(
        "08",
        "the worker kills its late tasks when the connection breaks",
        "Each of them is still started twice then, but finished only once.",
    )
    early, late = cut_off(project, "worker_cancel_long_running_tasks_on_connection_loss=True", pool)
    until(lambda: counted(project, late).get("ends") == ends, "as many runs end")
    until(lambda: early.ready() and not project.broker.exists("celery", "unacked"), "no message is left")
    assert counted(project, late) == {"starts": 2, "ends": ends}
    assert counted(project, early) == {"starts": 1, "ends": 1}


@pytest.mark.parametrize(("options", "taken"), [("", 4), ("--prefetch-multiplier=1", 1)])
def test_how_many_late_tasks_a_worker_with_one_child_holds(project, options, taken):
    stands(
        "08",
        "A worker with one child takes four messages by default",
        "With `--prefetch-multiplier=1` and late acknowledgement, a worker with one child takes no message ahead:",
    )
    client = start(project, options=f"--concurrency=1 {options}")
    results = [client.send_task("late", args=(None,)) for _ in range(6)]
    until(lambda: project.broker.hlen("unacked") == taken, "the worker takes messages")
    until(lambda: any(counted(project, each) for each in results), "one starts")
    assert (project.broker.hlen("unacked"), project.broker.llen("celery")) == (taken, 6 - taken)


# --- 08b -----------------------------------------------------------------------------------------------------


def countdowns(attempts: int = 3, **options) -> list:
    """The waits that a task chooses after its first attempts, each tried often."""
    app = Celery(set_as_current=False)

    @app.task(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), **options)
    def fail(error):
        raise error

    waits: list[list] = []
    for attempt in range(attempts):
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
        "By default, Celery doesn't use these numbers as they are. It picks a random number up to them.",
        "The first number of the backoff is 1, and jitter picks a whole number from 0 to 1.",
    )
    assert Celery(set_as_current=False).Task.max_retries == 3
    assert countdowns(retry_backoff=True) == [{0, 1}, {0, 1, 2}, {0, 1, 2, 3, 4}]
    assert countdowns(retry_backoff=True, retry_jitter=False) == [{1}, {2}, {4}]
    assert countdowns(retry_backoff=601, retry_jitter=False) == [{600}] * 3
    assert countdowns() == [{None}] * 3
    stands("08b", "The number in `retry_backoff` is the first wait.", "answer = [2, 4, 8, 16, 30, 30]")
    waits = countdowns(6, retry_backoff=2, retry_backoff_max=30, retry_jitter=False)
    assert waits == [{2}, {4}, {8}, {16}, {30}, {30}]


def test_a_part_of_the_exceptions_can_be_left_out():
    stands("08b", "`dont_autoretry_for=(FileNotFoundError,)`, every `OSError` is retried, except for a missing file.")
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


def test_on_failure_is_not_called_if_the_process_dies_but_it_is_after_the_hard_time_limit(project):
    stands(
        "08b",
        "`on_failure` runs in the process that runs the task, so it is not called if that process dies",
        "The hard time limit is an exception: when it kills the process, the main process calls `on_failure`.",
    )
    client = start(project)
    lost = killed(project, client, "parked")
    assert type(lost.get(timeout=30, propagate=False)).__name__ == "WorkerLostError"
    failed = client.send_task("parked", args=(0,))
    failed.get(timeout=30, propagate=False)
    until(lambda: project.backend.exists("parked"), "the second one is parked")
    assert project.backend.lrange("parked", 0, -1) == [failed.id.encode()]
    assert counted(project, failed)["starts"] == 2, "it was not parked before its retry"
    slow = client.send_task("parked", args=(60,), time_limit=1)
    assert type(slow.get(timeout=30, propagate=False)).__name__ == "TimeLimitExceeded"
    until(lambda: project.backend.lrange("parked", 1, -1) == [slow.id.encode()], "the slow one is parked as well")


def test_a_task_that_is_sent_again_has_a_new_result_under_its_old_id(project):
    stands("08b", "We give the new message the old id, so a client that asks for this id later gets the new result.")
    client = start(project)
    failed = client.send_task("parked", args=(0,))
    failed.get(timeout=30, propagate=False)
    project.backend.set("repaired", 1)
    client.send_task("parked", args=(0,), task_id=failed.id)
    asked = functools.partial(client.AsyncResult, failed.id)
    until(lambda: asked().state == "SUCCESS", "the new result")


def test_where_a_retry_waits_and_for_how_long(project):
    stands(
        "08b",
        "`countdown` says how many seconds the next attempt waits",
        "a waiting retry survives the death of its worker, even though the first attempt was acknowledged early",
        "another worker puts it back after the visibility timeout",
    )
    stands("08c", "shouldn't wait for it inside a slot. It comes back later with a retry", "a retry may be overtaken")
    client = start(project, FAST)
    client.send_task("patient", args=(300,))
    assert 200 < seconds_left(project) <= 300
    client.send_task("early", args=(0,)).get(timeout=20)
    project.backend.delete("redelivered")
    result = client.send_task("patient", args=(20,))
    until(lambda: project.broker.hlen("unacked") == 2, "both retries wait")
    main = node_stats(client, "w")
    for pid in (main["pid"], *main["pool"]["processes"]):
        os.kill(pid, signal.SIGKILL)
    assert counted(project, result) == {"starts": 1, "ends": 1}
    project.worker(f"{FRAGILE_WORKER} --concurrency=1")
    until(lambda: counted(project, result)["starts"] > 1, "the retry runs")


def test_a_retry_that_waits_longer_than_the_visibility_timeout_runs_more_than_once(project):
    stands("08b", "If the countdown is longer than the visibility timeout, the retry runs more than once")
    client = start(project, FAST)
    result = client.send_task("patient", args=(12,))
    until(lambda: counted(project, result).get("starts", 0) > 2, "the retry runs twice")


def test_without_exc_the_reason_is_in_the_traceback_only(project):
    stands("08b", "the client gets `MaxRetriesExceededError`, and the reason is only in the traceback.")
    client = start(project)
    result = client.send_task("patient", args=(0,))
    assert type(result.get(timeout=30, propagate=False)).__name__ == "MaxRetriesExceededError"
    assert "the bank is closed" not in repr(result.result)
    assert "the bank is closed" in result.traceback
    logged(project, "the bank is closed")


# --- 08c -----------------------------------------------------------------------------------------------------


def test_a_lock_belongs_to_its_owner_and_disappears_by_itself(project):
    stands(
        "08c",
        "it sets a key in Redis that only its owner may delete, with a time after which it disappears by itself",
        "if the timeout is shorter than the task, a second task gets in while the first one is still at work",
    )
    first, second = (project.backend.lock("lock", timeout=seconds) for seconds in (0.2, 600))
    assert first.acquire(blocking=False)
    assert project.backend.pttl("lock") in {-2, *range(201)}  # -2: it is gone
    until(lambda: second.acquire(blocking=False), "the lock disappears")
    with pytest.raises(LockNotOwnedError):
        first.release()
    assert second.owned()
    stands("08c", "Without a timeout, Eve's tasks would retry for ever.")
    assert project.backend.lock("for ever").acquire() and project.backend.ttl("for ever") == -1


def test_a_task_that_finds_no_free_lock_comes_back_later_however_often(project):
    stands("08c", "It comes back later with a retry", "Without a timeout, Eve's tasks would retry for ever.")
    client = project.client()

    @client.task(bind=True, max_retries=None)
    def turn(self): ...

    delivery = {"exchange": "", "routing_key": "look"}
    turn.push_request(id="eve", args=(), kwargs={}, retries=10**6, called_directly=False, delivery_info=delivery)
    before = datetime.now(UTC)
    assert isinstance(turn.retry(countdown=0.2, throw=False), Retry)
    headers = json.loads(project.broker.rpop("look"))["headers"]
    assert headers["retries"] == 10**6 + 1
    assert datetime.fromisoformat(headers["eta"]) >= before + timedelta(seconds=0.2)


def test_a_task_comes_back_each_time_its_process_dies(project):
    stands("08c", "The tasks are acknowledged late, and they come back if their process dies.")
    client = start(project, "task_acks_late=True, task_reject_on_worker_lost=True")
    result = client.send_task("dies", args=(2,))
    result.get(timeout=60)
    assert counted(project, result) == {"starts": 3}


def test_a_lock_and_a_dedupe_key_are_set_in_one_step_and_a_lock_counts_in_seconds(project):
    stands(
        "08c",
        "`SET ... NX` sets it only if it is not there yet, in one step, so only one task can win.",
        "A **lock** lets one task at a time into a piece of code.",
        "until the lock's timeout is over, so up to five seconds here",
    )
    project.backend.config_resetstat()
    assert project.backend.set("charged", 1, nx=True, ex=600) and not project.backend.set("charged", 2, nx=True, ex=600)
    assert project.backend.lock("lock", timeout=600).acquire(blocking=False)
    assert not project.backend.lock("lock", timeout=600).acquire(blocking=False)
    commands = project.backend.info("commandstats")
    assert commands["cmdstat_set"]["calls"] == 4
    assert not {"cmdstat_exists", "cmdstat_get", "cmdstat_setnx", "cmdstat_expire", "cmdstat_pexpire"} & set(commands)
    assert 300_000 < project.backend.pttl("lock") <= 600_000 and 300 < project.backend.ttl("charged") <= 600


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


@pytest.mark.parametrize("options, rows", [({}, 0), ({"isolation_level": None}, 1)])
def test_with_makes_a_transaction_only_of_a_connection_that_begins_one(tmp_path, options, rows):
    stands(
        "08c",
        "This holds for a connection from `sqlite3.connect(file)`, as in `shop.py`.",
        "The notebook's own `db` has `isolation_level=None`, which commits each statement at once",
    )
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db", **options)) as db:
        db.execute("CREATE TABLE paid (id)")
        with pytest.raises(ZeroDivisionError), db:
            db.execute("INSERT INTO paid VALUES (1)")
            1 / 0  # noqa: B018
        assert db.execute("SELECT count(*) FROM paid").fetchone() == (rows,)
