"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import inspect
import json

import pytest
from amqp.basic_message import Message
from celery import Celery, chord
from celery.app.task import extract_exec_options
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from kombu.transport.redis import Channel

from course_tasks import copies
from course_tasks.exercises.project import Project
from course_tasks.tasks import add
from course_tasks.tests.plugin import cells


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


# --- 01b -----------------------------------------------------------------------------------------------------


# --- 02 ------------------------------------------------------------------------------------------------------


# --- 02b -----------------------------------------------------------------------------------------------------


# --- 03 ------------------------------------------------------------------------------------------------------


# --- 03b -----------------------------------------------------------------------------------------------------


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
