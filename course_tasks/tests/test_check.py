"""`check` in the cases that no chapter's exercises show, and `free_port`."""

import signal
import threading
import time
from contextlib import suppress

import pytest
from celery import Celery
from celery._state import get_current_app

from course_tasks import exercises
from course_tasks.classroom import check, free_port
from course_tasks.tests.plugin import listens
from course_tasks.tests.test_live import addressed, working


class Hostile:
    """An object that fails whatever is done with it."""

    def __getattribute__(self, name):
        raise RuntimeError("do not touch")

    def __eq__(self, other):
        raise RuntimeError("do not compare")


@pytest.mark.parametrize(
    "exercise, answer, start",
    [
        ("00-9", 1, "There is no exercise '00-9'"),
        ("99-1", 1, "There is no exercise '99-1'"),
        ("nonsense", ..., "There is no exercise 'nonsense'"),
        (None, 1, "There is no exercise None"),
        ("00-3", ..., "☐ 00-3: still to do"),
        ("00-3", 5, "❌ 00-3: the answer should be a text, and this is a whole number"),
        ("00-2", Hostile, "❌ 00-2: "),
        ("00-3", "PENDING", "✅ 00-3"),
    ],
)
def test_check_prints_one_line_and_never_raises(capsys, exercise, answer, start):
    check(exercise, answer() if answer is Hostile else answer)
    printed = capsys.readouterr().out
    assert printed.startswith(start) and printed.count("\n") == 1


@pytest.mark.parametrize("exercise, answer", [("03-1", lambda name: []), ("03b-1", lambda name: 0)])
def test_a_judge_that_asks_a_worker_says_when_it_is_the_broker_that_is_away(capsys, exercise, answer):
    with addressed("redis://localhost:1/0"):
        check(exercise, answer)
    printed = capsys.readouterr().out
    assert printed.startswith(f"❌ {exercise}: The broker or the backend doesn't answer (")
    assert printed.endswith("Run %servers.\n")


@pytest.mark.parametrize("exercise", ["03-1", "03b-1", "03b-2"])
def test_a_judge_that_needs_an_app_does_not_make_it_the_learners_current_one(exercise):
    before, own = get_current_app(), Celery("own", set_as_current=False)
    own.set_current()
    try:
        with addressed("redis://localhost:1/0"):
            check(exercise, lambda name: 0)
        assert get_current_app() is own
    finally:
        before.set_current()


def test_slots_that_a_busy_machine_left_idle_are_counted(pair, capsys):
    """24 tasks took three rounds of eight, on a worker that has ten slots."""
    with addressed(pair.broker), working(0, "--pool=gevent", "-c", "10", "--without-mingle") as worker:
        spans = [
            {"pid": worker.pid, "thread": f"Dummy-{number}", "start": start, "end": start + 0.3}
            | {"delayed": 0.0, "seconds": 0.3}
            for number in range(24)
            for start in [1.0 + number // 8]
        ]
        check("06-2", spans)
        Celery(set_as_current=False).pool.force_close_all()  # other tests wait until the pair has no connection
    assert capsys.readouterr().out.startswith("❌ 06-2: they took 3 rounds, but on 10 slots.")


def test_a_function_that_never_ends_is_stopped_and_so_is_one_that_the_learner_interrupts(capsys, monkeypatch):
    def endless(*_args):
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    monkeypatch.setattr(exercises, "PATIENCE", 0.3)
    check("07-2", endless)
    assert "your function was still running after 0.3 seconds." in capsys.readouterr().out
    monkeypatch.setattr(exercises, "PATIENCE", 30)
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
    timer.start()
    check("07-2", endless)
    assert capsys.readouterr().out.startswith("☐ 07-2: not judged, because you have interrupted it.")


def test_a_tuple_of_dots_is_no_answer_yet(capsys):
    check("07d-1", ("...", "..."))
    assert capsys.readouterr().out.startswith("☐ 07d-1: still to do.")


def test_a_free_port_is_nobody_s_and_not_one_that_a_connection_may_get():
    for port in {free_port() for _ in range(100)}:
        assert not listens(port)
        assert port < 32768  # where Linux begins, and other systems later
