"""Claims of chapters 10 and on that no cell proves: see test_claims.py."""

import json
import os
import re
import shelve
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from unittest.mock import MagicMock
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab, schedule
from redbeat import schedulers

from course_tasks.exercises import WrongAnswer
from course_tasks.tests.plugin import logged, node_stats, stands, until

CLOCK = """
from celery import Celery
app = Celery("clock")
app.conf.beat_schedule = {"tick": {"task": "tick", "schedule": %s, "options": {"queue": "ticks"}}}
@app.task(name="tick")
def tick():
    pass
"""


def clock(project, seconds: float = 1) -> None:
    """Write a project with one entry in its schedule."""
    (project.folder / "clock.py").write_text(CLOCK % seconds)


def beat(project, *options: str, app: str = "clock") -> subprocess.Popen:
    """Start a beat of the project. It writes to beat.log, together with the others."""
    command = [sys.executable, "-m", "celery", "-A", app, "beat", "--loglevel=INFO", *options]
    with (project.folder / "beat.log").open("a") as log:
        return subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=log)


def ended(process: subprocess.Popen) -> None:
    """Stop a beat, and wait for its end."""
    process.terminate()
    process.wait(20)


def senders(project) -> set[int]:
    """The processes that have sent the messages in the queue."""
    return {int(re.search(rb'"origin": "gen(\d+)@', text)[1]) for text in project.broker.lrange("ticks", 0, -1)}


@pytest.mark.parametrize("files", [("shared", "shared"), ("one", "two")])
def test_two_beats_both_send(project, files):
    stands(
        "10", "no log has an error. The beats don't know of each other, and even if they share a schedule file, both"
    )
    clock(project, 0.5)
    beats = [beat(project, f"--schedule={files[0]}")]
    try:
        until(lambda: senders(project), "the first one sends")  # of two that create one file at once, one may fail
        beats.append(beat(project, f"--schedule={files[1]}"))
        until(lambda: senders(project) == {each.pid for each in beats}, "both have sent")
        project.broker.delete("ticks")
        until(lambda: senders(project) == {each.pid for each in beats}, "both go on sending")
        # Read the log before they end: a beat that is stopped while it sends logs an error.
        log = (project.folder / "beat.log").read_text()
    finally:
        for each in beats:
            ended(each)
    if files[0] != files[1]:
        assert not re.search("WARNING|ERROR|CRITICAL|Traceback", log)


def test_a_second_beat_with_the_same_pidfile_refuses_to_start(project):
    stands("10", "with the same file, the second beat refuses to start")
    clock(project)
    first = beat(project, "--pidfile=beat.pid", "--schedule=one")
    try:
        until((project.folder / "beat.pid").exists, "the pidfile")
        second = beat(project, "--pidfile=beat.pid", "--schedule=two")
        assert second.wait(30) == 73
    finally:
        ended(first)


def test_beat_does_not_make_up_for_missed_runs(project):
    stands("10", "After its start it sends each overdue task once.", "It doesn't make up for the other missed runs.")
    clock(project, 600)
    ended_once = beat(project, "--schedule=kept")
    until(lambda: list(project.folder.glob("kept*")), "the schedule file")
    time.sleep(1)
    ended(ended_once)
    with shelve.open(str(project.folder / "kept"), writeback=True) as kept:
        kept["entries"]["tick"].last_run_at -= timedelta(hours=1)
    project.broker.delete("ticks")
    again = beat(project, "--schedule=kept")
    try:
        until(lambda: project.broker.llen("ticks"), "the overdue task")
        time.sleep(2)
    finally:
        ended(again)
    assert project.broker.llen("ticks") == 1


def test_beat_remembers_when_it_last_sent_each_task(project):
    stands("10", "beat remembers in its **schedule file** (here `beat-one`) when it last sent each task.")
    clock(project, 0.5)
    before = datetime.now(UTC)
    only = beat(project, "--schedule=kept")
    try:
        until(lambda: project.broker.llen("ticks") >= 3, "three messages")
    finally:
        ended(only)
    with shelve.open(str(project.folder / "kept")) as kept:
        entry = kept["entries"]["tick"]
    assert entry.total_run_count >= 3
    assert before + timedelta(seconds=1) < entry.last_run_at <= datetime.now(UTC)


def test_each_worker_with_b_is_a_beat_of_its_own(project):
    stands("10", "Two workers with `-B` are two beats")
    clock(project, 0.5)
    for name in ("one", "two"):
        project.worker(f"celery -A clock worker -B -s {name} --pool=prefork -c 1 -n {name}@%h -Q other")
    until(lambda: project.log().count("beat: Starting...") == 2, "two beats")
    logged(project, "Sending due task tick")
    until(lambda: len(senders(project)) == 2, "both send")


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_worker_with_a_green_pool_refuses_b(project, pool):
    stands("10", "A worker with gevent or eventlet refuses it.")
    clock(project)
    with pytest.raises(WrongAnswer, match=r"ended with an error: .*-B option doesn't work with eventlet/gevent pools"):
        project.run(f"celery -A clock worker -B --pool={pool}", seconds=60)
    assert not project.broker.exists("ticks")


RED = """
import os
from clock import app
app.conf.beat_scheduler = "redbeat.RedBeatScheduler"
app.conf.redbeat_redis_url = os.environ["CELERY_BROKER_URL"]
app.conf.redbeat_lock_timeout = 60
app.conf.beat_max_loop_interval = 1
"""


def test_a_standby_is_silent_until_the_leader_s_lock_is_gone(project):
    stands(
        "10",
        "only the one with the lock, the **leader**, sends. The others wait in silence.",
        "so the other beat has to wait until the lock expires",
        "when the leader hasn't renewed it for `redbeat_lock_timeout`",
        "**RedBeat** keeps the schedule in Redis, together with a lock.",
    )
    clock(project, 0.5)
    (project.folder / "red.py").write_text(RED)
    leader = beat(project, app="red")
    beats = [leader]
    try:
        until(lambda: project.broker.llen("ticks"), "the leader sends")
        beats.append(standby := beat(project, app="red"))
        until(
            lambda: (project.folder / "beat.log").read_text().count("beat: Starting...") == 2, "the other beat starts"
        )
        count = project.broker.llen("ticks")
        until(lambda: project.broker.llen("ticks") >= count + 10, "the leader has sent ten more")
        assert senders(project) == {leader.pid} and project.broker.exists("redbeat:tick")
        left = [project.broker.pttl("redbeat::lock")]
        until(
            lambda: left.append(project.broker.pttl("redbeat::lock")) or left[-1] > left[-2],
            "the leader renews its lock",
            seconds=30,
        )
        told = (project.folder / "beat.log").read_text().rpartition("beat: Starting...")[2].splitlines()[1:]
        assert told and all("Sending due task" in line for line in told)
        leader.send_signal(signal.SIGKILL)
        leader.wait(20)
        count = project.broker.llen("ticks")
        assert 30 < project.broker.ttl("redbeat::lock") <= 60
        time.sleep(2)
        assert project.broker.llen("ticks") == count
        project.broker.delete("redbeat::lock")
        until(lambda: standby.pid in senders(project), "the other beat takes over")
    finally:
        for each in beats:
            ended(each)


def test_without_redbeat_s_settings_the_pause_may_take_half_an_hour(monkeypatch):
    stands(
        "10",
        "Without our two settings, the lock lives for 25 minutes, and the other beat looks every five minutes.",
        "So the pause may take up to 30 minutes.",
    )
    server = MagicMock()
    monkeypatch.setattr(schedulers, "get_redis", lambda app: server)
    for settings, expected in (
        ({}, (25 * 60, 5 * 60)),
        ({"redbeat_lock_timeout": 5, "beat_max_loop_interval": 1}, (5, 1)),
    ):
        app = Celery(set_as_current=False)
        app.conf.update(settings, redbeat_redis_url="redis://localhost:1/0")
        scheduler = schedulers.RedBeatScheduler(app, lazy=True)
        schedulers.acquire_distributed_beat_lock(SimpleNamespace(scheduler=scheduler))
        options = server.lock.call_args.kwargs  # redis-py's lock looks again after `sleep` seconds
        assert (options["timeout"], options["sleep"]) == expected


LATER = """
from celery import Celery
app = Celery("later")
app.conf.timezone = "Asia/Tokyo"
app.conf.enable_utc = {}
app.conf.broker_transport_options = {{"unacked_restore_interval": 1, "unacked_restore_throttle": 1}}
@app.task(name="remind")
def remind():
    pass
"""


def later(project, pool: str, enable_utc: bool = True, name: str = "later") -> None:
    """Start a worker with one slot for reminders, whose time zone is Tokyo's."""
    (project.folder / "later.py").write_text(LATER.format(enable_utc))
    project.worker(f"celery -A later worker --pool={pool} -c 1 -n {name}@%h --without-mingle --without-gossip")


@pytest.mark.parametrize("enable_utc", [True, False])
def test_a_worker_runs_a_naive_date_as_utc_whatever_the_settings_are(project, enable_utc):
    stands(
        "10",
        "A worker reads a naive date as UTC, and not in its own zone.",
        "Celery sends a naive date as it is, and neither the worker's `timezone` nor yours plays a part.",
    )
    project.environment["TZ"] = "America/New_York"
    later(project, "threads", enable_utc)
    client = project.client()
    client.conf.timezone, client.conf.enable_utc = "Asia/Tokyo", enable_utc
    now = datetime.now(UTC).replace(tzinfo=None)
    client.send_task("remind", eta=now - timedelta(hours=1)).get(timeout=20)  # in New York, this is still to come
    client.send_task("remind", eta=now + timedelta(hours=1))  # in Tokyo, this is past
    client.send_task("remind").get(timeout=20)
    until(lambda: project.broker.hlen("unacked") == 1, "only the second one is left")
    client.send_task("remind", queue="look", eta=datetime(2100, 1, 1, 12))
    assert json.loads(project.broker.lpop("look"))["headers"]["eta"] == "2100-01-01T12:00:00"


def test_a_worker_lists_a_thousand_waiting_tasks_and_puts_each_back_when_it_is_stopped(project):
    stands(
        "10",
        "`celery inspect scheduled` lists them all.",
        "but it moves a thousand messages, with several Redis commands for each.",
    )
    later(project, "prefork")
    client = project.client()
    sent = {client.send_task("remind", countdown=3000).id for _ in range(1000)}
    until(lambda: project.broker.hlen("unacked") == 1000, "the worker holds them all")
    pid = node_stats(client, "later")["pid"]
    [[tasks]] = [reply.values() for reply in client.control.broadcast("scheduled", reply=True, timeout=60, limit=1)]
    assert {task["request"]["id"] for task in tasks} == sent

    def commands() -> int:
        return sum(each["calls"] for each in project.broker.info("commandstats").values())

    before = commands()
    os.kill(pid, signal.SIGTERM)
    until(lambda: project.broker.llen("celery") == 1000, "all are in the queue again")
    assert 3000 < commands() - before < 12_000


def looks_for_old_copies(project) -> int:
    """How often a worker has looked for copies that are older than the visibility timeout."""
    return project.broker.info("commandstats").get("cmdstat_zrange", {"calls": 0})["calls"]


def test_messages_with_a_countdown_stay_unacked_when_their_worker_is_killed(project):
    stands("10", "After `kill -9`, they stay in `unacked` until the visibility timeout.")
    later(project, "solo")
    client = project.client()
    for _ in range(3):
        client.send_task("remind", countdown=3000)
    until(lambda: project.broker.hlen("unacked") == 3, "the worker holds them all")
    taken = project.broker.zrange("unacked_index", 0, -1, withscores=True)
    os.kill(node_stats(client, "later")["pid"], signal.SIGKILL)
    later(project, "prefork", name="next")
    project.broker.config_resetstat()
    client.send_task("remind").get(timeout=20)
    until(lambda: looks_for_old_copies(project) >= 2, "the next worker looks for old copies")
    until(lambda: project.broker.hlen("unacked") == 3, "only those three are left")
    assert project.broker.zrange("unacked_index", 0, -1, withscores=True) == taken, "nobody has taken them again"


def test_an_interval_and_the_default_zone_take_no_notice_of_a_clock_change():
    stands("10", "or take an interval in seconds", "By default, the hours are in UTC.")

    def runs(rule, hours: int = 6) -> list[str]:
        now = last = datetime(2026, 10, 25, 0, 30, tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC)
        found, end = [], now + timedelta(hours=hours)
        rule.nowfun = lambda: now.astimezone(rule.app.timezone)
        while now < end:
            now += timedelta(minutes=1)
            if rule.is_due(last.astimezone(rule.app.timezone)).is_due:
                found.append(f"{now:%H:%M}")
                last = now
        return found

    berlin, plain = Celery(set_as_current=False), Celery(set_as_current=False)
    berlin.conf.timezone = "Europe/Berlin"
    assert len(runs(schedule(3600, app=berlin))) == 6
    assert runs(crontab(hour=2, minute=30, app=plain)) == ["02:30"]
