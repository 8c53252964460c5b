"""Claims of chapters 10 and on that no cell proves: see test_claims.py."""

import shelve
import subprocess
import sys
import time

from course_tasks.tests.plugin import logged, stands, until

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


def beat(project, *options: str) -> subprocess.Popen:
    """Start a beat of the project."""
    command = [sys.executable, "-m", "celery", "-A", "clock", "beat", *options]
    return subprocess.Popen(command, cwd=project.folder, env=project.environment, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> None:
    """Stop a beat, and wait for its end."""
    process.terminate()
    process.communicate(timeout=20)


def test_two_beats_with_one_schedule_file_both_send(project):
    stands("10", "even if they share a schedule file, both send")
    clock(project, 0.5)
    beats = [beat(project, "--schedule=shared"), beat(project, "--schedule=shared")]
    try:
        until(lambda: project.broker.llen("ticks") >= 8, "eight messages")
        senders = {
            message.split(b'"origin": "gen')[1].split(b"@")[0] for message in project.broker.lrange("ticks", 0, -1)
        }
    finally:
        for each in beats:
            ended(each)
    assert senders == {str(each.pid).encode() for each in beats}


def test_a_second_beat_with_the_same_pidfile_refuses_to_start(project):
    stands("10", "with the same file, the second beat refuses to start")
    clock(project)
    first = beat(project, "--pidfile=beat.pid", "--schedule=one")
    try:
        until((project.folder / "beat.pid").exists, "the pidfile")
        second = beat(project, "--pidfile=beat.pid", "--schedule=two")
        assert second.wait(30) == 73
        second.communicate()
    finally:
        ended(first)


def test_beat_does_not_make_up_for_missed_runs(project):
    stands("10", "After its start it sends each overdue task once.", "It doesn't make up for the other missed runs.")
    clock(project, 600)
    ended_once = beat(project, "--schedule=kept")
    until(lambda: list(project.folder.glob("kept*")), "the schedule file")
    time.sleep(1)
    ended(ended_once)
    from datetime import timedelta

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


def test_each_worker_with_b_is_a_beat_of_its_own(project):
    stands("10", "Two workers with `-B` are two beats")
    clock(project, 0.5)
    for name in ("one", "two"):
        project.worker(f"celery -A clock worker -B -s {name} --pool=prefork -c 1 -n {name}@%h -Q other")
    until(lambda: project.log().count("beat: Starting...") == 2, "two beats")
    logged(project, "Sending due task tick")
    until(lambda: project.broker.llen("ticks") >= 8, "eight messages")
    messages = project.broker.lrange("ticks", 0, -1)
    assert len({message.split(b'"origin": "gen')[1].split(b"@")[0] for message in messages}) == 2
