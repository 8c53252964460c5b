"""The correlation id, in real workers of all five pools: every line of a log about a task has its request's id."""

import ast
import collections
import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
from celery import Celery
from celery.app.task import Context

from course_tasks import correlation
from course_tasks.authoring import kernels
from course_tasks.correlation import HEADER, new_id
from course_tasks.install import ROOT
from course_tasks.tests.plugin import stands, until

POOLS = {"solo": 1, "prefork": 4, "threads": 8, "gevent": 16, "eventlet": 16}  # and their slots
REQUESTS = 60
# The tasks of one request. Each returns its own id, and logs before and after what may mix it up with others.
SHOP = """
import logging, os, threading, time
from contextvars import copy_context
from celery import Celery, Task, chain, chord, group, signals
from celery.utils.log import get_task_logger
from course_tasks.correlation import TASK_FORMAT, correlation_id, install

app = Celery("shop")
install(app)
# with whole ids: of so many tasks, two may begin with the same eight letters
app.conf.worker_task_log_format = TASK_FORMAT.replace("%(task_id).8s", "%(task_id)s")
logger = get_task_logger(__name__)
library = logging.getLogger("library")

class Db(Task):
    "A base of its own, which the documentation of Celery advises for what tasks share."

@app.task(name="sleep")
def sleep(seconds=0.5):
    logger.info("sleeps")
    time.sleep(seconds)

@app.task(name="based", base=Db)
def based():
    logger.info("based")

@app.task(name="step")
def step(*_):
    logger.info("begins")
    time.sleep(0.002)
    logger.info("ends")
    return correlation_id.get()

@app.task(name="again", bind=True)
def again(self):
    if not self.request.retries:
        raise self.retry(countdown=0)
    return correlation_id.get()

@app.task(name="fail")
def fail():
    raise ValueError("no stock")

@app.task(name="old_errback")
def old_errback(task_id):
    logger.info("old errback")

@app.task(name="errback")
def errback(request, exc, traceback):
    logger.info("errback")

@app.task(name="hang", base=Db, soft_time_limit=None, time_limit=1)
def hang():
    time.sleep(60)

@app.task(name="lost")
def lost():
    os._exit(1)

@app.task(name="lost_based", base=Db)
def lost_based():
    os._exit(1)

@app.task(name="spawns", bind=True)
def spawns(self):  # in a green pool a thread is a greenlet
    for what in ("empty", "carried"):
        context = copy_context()
        log = library.warning if what == "empty" else lambda *args: context.run(library.warning, *args)
        thread = threading.Thread(target=log, args=("%s: spawns[%s]", what, self.request.id))
        thread.start()
        thread.join()

@app.task(name="trouble")
def trouble():
    logger.info("the task says", extra={"correlation_id": "of-our-own"})
    library.warning("the library says", extra={"correlation_id": "of-our-own"})
    print("the task prints", flush=True)
    raise LookupError("no lamp")

def fail_once():
    del app.backend.process_cleanup
    raise OSError("no cleanup")

@app.task(name="unclean")
def unclean():
    app.backend.process_cleanup = fail_once

def told(what):
    def receiver(**_):
        library.warning("a receiver of %s", what)
    return receiver

for name in ("task_received", "task_unknown", "task_rejected", "task_revoked", "task_retry"):
    getattr(signals, name).connect(told(name), weak=False)

@app.task(name="nested")
def nested():
    step.apply()
    logger.info("after a call in place")
    return correlation_id.get()

@app.task(name="order")
def order():
    logger.info("an order")
    for signature in (
        step.si(), again.si(), nested.si(), based.si(), chain(step.si(), step.s()), group(step.si(), step.si()),
        chord([step.si(), step.si()], step.s()), fail.si().on_error(errback.s()), fail.si().on_error(old_errback.s()),
    ):
        signature.apply_async()
    logger.info("all sent")
    return correlation_id.get()
"""
TASKS = (
    1 + 1 + 2 + 1 + 1 + 2 + 2 + 3 + 2 + 1
)  # messages an order causes: two for a retry, one for the errback of old style
ABOUT = re.compile(r"\w+\[([0-9a-f-]{36})\]")  # a line about a task names it with its id
LINE = re.compile(r"^\[[\d:,. -]+ [A-Z]+(?:/[\w-]+)? ([\w.-]+)\] (.*)$")


class Shop:
    """A Celery command in a process of its own, with one of the broker's databases, and its log."""

    def __init__(self, name: str, number: int, folder: Path, command: str):
        self.number = number
        self.broker = f"{os.environ['CELERY_BROKER_URL'].rpartition('/')[0]}/{number}"
        self.log = folder / f"{name}.log"
        self.env = os.environ | {"CELERY_BROKER_URL": self.broker, "PYTHONPATH": f"{folder}:{ROOT}"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "celery", *command.split()],
            cwd=folder,
            env=self.env,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @classmethod
    def worker(cls, name: str, number: int, folder: Path, options: str, app: str = "shop") -> "Shop":
        """A worker."""
        command = f"-A {app} worker --loglevel=INFO -n {name}@%h --without-mingle --without-gossip {options}"
        return cls(name, number, folder, command)

    def lines(self) -> list[tuple[str, str]]:
        """The log's lines in our format: id and message."""
        return [found.groups() for line in self.log.read_text().splitlines() if (found := LINE.match(line))]

    def logged(self, pattern: str, times: int = 1) -> None:
        """Wait until the log has as many matches."""

        def enough():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return len(re.findall(pattern, self.log.read_text(), re.MULTILINE)) >= times

        until(enough, f"{times} x {pattern!r} in the log", 90)

    def client(self, code: str) -> str:
        """What a client of the shop prints: in a process of its own, so that no connection stays."""
        done = subprocess.run(
            [sys.executable, "-c", CLIENT + code],
            cwd=self.log.parent,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@contextlib.contextmanager
def running(*shops: Shop):
    """Wait until all workers are ready; at the end of the block kill what has not ended."""
    try:
        for shop in shops:
            shop.logged(r" ready\.|beat: Starting")
        yield shops
    finally:
        for shop in shops:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shop.process.pid, 9)
            shop.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    return folder


@pytest.fixture(scope="module")
def shops(folder):
    """A worker of each pool."""
    with running(
        *(
            Shop.worker(pool, number, folder, f"--pool={pool} --concurrency={slots}")
            for number, (pool, slots) in enumerate(POOLS.items(), start=1)
        )
    ) as shops:
        yield dict(zip(POOLS, shops, strict=True))


CLIENT = """
from shop import app, correlation_id
from course_tasks.correlation import HEADER

def under(id, name, *args, **options):
    token = correlation_id.set(id)
    print(id, app.send_task(name, args, ignore_result=True, **options).id)
    correlation_id.reset(token)

def raw(body, headers, **properties):  # what a client that is not Celery's may publish
    with app.connection() as connection:
        properties |= {"content_type": "application/json", "content_encoding": "utf-8"}
        connection.Producer(serializer=None).publish(body, routing_key="celery", headers=headers, **properties)

"""


def sent(shop: Shop, name: str, number: int) -> dict[str, str]:
    """Send tasks, each under an id of its own; the requests by their tasks' ids."""
    said = shop.client(f"for n in range({number}):\n    under(f'request-{{n}}', {name!r})")
    return {line.split()[1]: line.split()[0] for line in said.splitlines()}


@pytest.mark.parametrize("pool", POOLS)
def test_no_line_about_a_task_has_a_wrong_id_or_none(shops, pool):
    shop = shops[pool]
    requests = sent(shop, "order", REQUESTS)
    shop.logged(r" received$", REQUESTS * TASKS)
    until(lambda: not busy(shop), f"{pool} is done", 60)
    lines = shop.lines()
    ids = ids_of(lines)
    assert len(ids) >= REQUESTS * (TASKS - 1)
    assert {task: found for task, found in ids.items() if len(found) != 1} == {}, "one id a task"
    assert {task: ids[task] for task in requests} == {task: {request} for task, request in requests.items()}
    number = collections.Counter(found for [found] in ids.values())
    assert set(number) == set(requests.values()), "no id but those of the requests"
    assert len(set(number.values())) == 1, "each request has the same number of tasks under its id"
    for what in ("after a call in place", ": errback", ": old errback"):
        assert len([1 for _, message in lines if message.endswith(what)]) == REQUESTS, what
    assert {found for found, message in lines if "ready." in message} == {"-"}


def ids_of(lines: list[tuple[str, str]]) -> dict[str, set[str]]:
    """The correlation ids of the lines about each task."""
    ids: dict[str, set[str]] = collections.defaultdict(set)
    for found, message in lines:
        for task in ABOUT.findall(message):
            ids[task].add(found)
    return ids


def busy(shop: Shop) -> set[str]:
    """The tasks that were received and have not said that they are over."""
    text = shop.log.read_text()
    ended = re.findall(r"Task \w+\[(\S+)\] (?:succeeded|raised)", text)
    return set(re.findall(r"Task \w+\[(\S+)\] received$", text, re.MULTILINE)).difference(ended)


def test_lines_and_error_callbacks_of_the_main_process_have_it_too(shops):
    shop = shops["prefork"]
    for times, name, line in ((1, "hang", "Hard time limit"), (1, "lost", LOST), (2, "lost_based", LOST)):
        task, request = shop.client(f"under('of-{name}', {name!r})").split()[::-1]
        shop.logged(line, times)
        about = [found for found, message in shop.lines() if task in message]
        assert about and set(about) == {request}, (name, about)
        assert [found for found, message in shop.lines() if re.search(line, message)][-1] == request


def test_so_have_those_about_tasks_that_are_revoked_or_cancelled(folder):
    with running(Shop.worker("revoked", 14, folder, "--pool=prefork --concurrency=1")) as [shop]:
        # from one process, so that the worker knows of it long before the eight seconds are over
        shop.client(
            "under('later-1', 'step', task_id='later', countdown=8)\n"
            "while 'later' not in str(app.control.inspect(limit=1).scheduled()): pass\n"
            "app.control.revoke('later')"
        )
        shop.logged("Discarding revoked task")
        now = shop.client("under('now-1', 'sleep', 90)").split()[1]
        shop.logged(f"sleep.{now}.: sleeps")
        shop.client(f"app.control.revoke({now!r}, terminate=True)")
        shop.logged("a receiver of task_revoked", 2)
        shop.client(
            "under('cancelled-1', 'sleep', 90, task_id='cancelled')\n"
            "while 'cancelled' not in str(app.control.inspect(limit=1).active()): pass"
        )
        shop.process.send_signal(signal.SIGQUIT)  # a cold shutdown
        shop.logged("a receiver of task_retry")
        said = [line for line in shop.lines() if line[1].startswith(("Discarding", "a receiver of task_re"))]
        assert [id for id, message in said if "Discarding" in message] == ["later-1"]
        assert [id for id, message in said if message.endswith("revoked")] == ["later-1", "now-1"]
        assert [id for id, message in said if message.endswith("retry")] == ["cancelled-1"]
        assert "step[later]: begins" not in shop.log.read_text(), "a revoked task does not run"


LOST = "Task handler raised error: WorkerLostError"

# What the worker logs about a message that never becomes a task, and the client's code that sends it under an id.
REFUSED = {
    "Received unregistered task": "under(id, 'nosuch')",
    "Received invalid task message: invalid ETA": "under(id, 'step', headers={'eta': 'soon'})",
    "Received invalid task message: Refusing": "under(id, 'step', serializer='pickle')",
    "Can't decode message body": "raw('{', {HEADER: id, 'task': 'step', 'id': 'a'})",
    "Received and deleted unknown message": "raw('[1]', {HEADER: id})",
    "Discarding revoked task": "under(id, 'step', headers={'expires': '2020-01-01T00:00:00'})",
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_message_that_never_becomes_a_task_is_logged_with_its_id(shops, pool):
    shop = shops[pool]
    before = len(shop.lines())
    for number, (line, code) in enumerate(REFUSED.items()):
        shop.client(f"id = 'refused-{number}'\n{code}")
        shop.logged(re.escape(line))
    shop.logged("a receiver of task_revoked")
    lines = shop.lines()[before:]
    for number, line in enumerate(REFUSED):
        assert [found for found, message in lines if line in message] == [f"refused-{number}"], line
    told = {what: sorted(found for found, message in lines if message == f"a receiver of {what}") for what in TOLD}
    assert told == TOLD


TOLD = {  # by the signal, whose receivers log; an expired task is received as well
    "task_unknown": ["refused-0"],
    "task_rejected": ["refused-1", "refused-2", "refused-4"],
    "task_revoked": ["refused-5"],
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_record_with_a_correlation_id_of_its_own_is_logged_too(shops, pool):
    shop = shops[pool]
    shop.client("under('trouble-1', 'trouble')")
    shop.logged("raised unexpected: LookupError")
    for what in SAID:
        assert {found for found, message in shop.lines() if what in message} == {"trouble-1"}, what


SAID = ("Task trouble[", "the task says", "the library says", "the task prints", "LookupError('no lamp')")


@pytest.mark.parametrize("pool", POOLS)
def test_a_thread_or_greenlet_has_the_id_if_it_runs_in_a_copy_of_the_context(shops, pool):
    shop = shops[pool]
    task = shop.client("under('spawns-1', 'spawns')").split()[1]
    shop.logged(rf"carried: spawns\[{task}")
    said = {message.partition(":")[0]: found for found, message in shop.lines() if f": spawns[{task}]" in message}
    inherits = getattr(sys.flags, "thread_inherit_context", False)  # as builds of Python 3.14 without a GIL do
    assert said == {"empty": "spawns-1" if inherits else "-", "carried": "spawns-1"}


def test_an_id_that_is_not_fit_for_a_log_is_refused_by_the_worker_as_well(shops):
    """A producer that is not ours may send anything; the ids of the first task and of the task itself stand in."""
    shop = shops["prefork"]
    forged = "eve\n[2026-01-01 00:00:00,000: INFO ben-8] Task pay[1] succeeded"
    for given in (forged, {"a": [1]}, "-", "", 7, None, "x" * 65):
        task = shop.client(f"under(None, 'step', headers={{HEADER: {given!r}}})").split()[1]
        shop.logged(rf"Task step\[{task}\] succeeded")
        assert {found for found, message in shop.lines() if task in message} == {task}, given
    assert "\n[2026-01-01" not in shop.log.read_text()


def test_ids_of_tasks_that_a_client_made_up_stand_in_made_fit(shops):
    shop = shops["prefork"]
    shop.client("under(None, 'nested', task_id='order:17/a')")
    shop.logged(re.escape("Task nested[order:17/a] succeeded"))
    lines = [found for found, message in shop.lines() if "nested[order:17/a]" in message]
    assert len(lines) == 3 and set(lines) == {"order_17_a"}


@pytest.mark.parametrize(
    "task_id, id",
    [("zoë 1", "zo__1"), ("x" * 70, "x" * 64), ("a\nb", "a_b"), (7, "7"), ("", "parent"), (None, "parent")],
)
def test_whatever_stands_in_is_short_and_fit_for_a_log(task_id, id):
    """The first that there is: an empty one or none at all is passed over."""
    assert correlation._id_of({}, None, task_id, "parent") == id
    assert correlation._id_of(None, task_id, "parent") == id
    assert correlation._id_of({HEADER: "a b"}, task_id, "parent") == id
    assert correlation._id_of({HEADER: "ada-7"}, task_id, "parent") == "ada-7"
    assert correlation._id_of({}, None, "") is None


def test_a_request_s_methods_run_under_its_id_and_answer_as_before():
    """All six, whatever is current meanwhile, which is current again afterwards, also after an error."""
    code = """
from celery.worker.request import Request
METHODS = ("on_accepted", "on_timeout", "on_failure", "revoked", "terminate", "cancel")
def spy(name):
    def method(self, fails=False, *, by=""):
        if fails:
            raise LookupError
        return name, by, correlation_id.get()
    return method
for name in METHODS:
    setattr(Request, name, spy(name))
from course_tasks.correlation import CorrelatedRequest, correlation_id
request = CorrelatedRequest.__new__(CorrelatedRequest)
request.correlation = "ada-7"
correlation_id.set("ben-8")
for name in METHODS:
    assert getattr(request, name)(by="us") == (name, "us", "ada-7"), name
    assert correlation_id.get() == "ben-8", name
    try:
        getattr(request, name)(True)
    except LookupError:
        print(correlation_id.get(), end=" ")
"""
    assert python(code) == " ".join(["ben-8"] * 6)


def test_the_formats_show_the_time_the_level_the_id_and_eight_letters_of_the_task_s():
    code = """
import logging
from celery import Celery
from course_tasks.correlation import install
app = Celery("formats")
install(app)
record = logging.makeLogRecord({"levelname": "INFO", "msg": "paid", "task_name": "pay", "task_id": "1f2e3d4c-5b"})
for name in ("worker_log_format", "worker_task_log_format"):
    print(logging.Formatter(app.conf[name]).format(record))
"""
    time = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(rf"{time} INFO -\] paid\n{time} INFO -\] pay\[1f2e3d4c\]: paid", python(code))


def test_a_task_from_a_client_that_knows_no_ids_has_its_own(shops):
    shop = shops["threads"]
    task = shop.client("print(__import__('celery').Celery().send_task('order', ignore_result=True).id)")
    shop.logged(rf" {task}\] Task old_errback\[\S+ succeeded")
    assert {found for found, message in shop.lines() if task[:8] in message} == {task}


OTHER_CLIENTS = {  # and the id that stands in for theirs
    "app.conf.task_protocol = 1; under('old-1', 'step', task_id='1-1')": "old-1",
    "app.conf.task_protocol = 1; under(None, 'step', task_id='1-2')": "1-2",
    "raw('[[], {}, {}]', {'id': '1-3', 'task': 'step', HEADER: 'foreign-1'})": "foreign-1",
    "raw('[[], {}, {}]', {'id': '1-4', 'task': 'step'})": "1-4",
    "raw('[[], {}, {}]', {'id': '1-5', 'task': 'step', 'root_id': 'first-1'})": "first-1",
    "raw('[[], {}, {}]', {'id': '1-6', 'task': 'step'}, correlation_id='property-1')": "property-1",
}


def test_main_process_and_child_agree_on_the_id_of_any_message(shops):
    shop = shops["prefork"]
    for number, (code, id) in enumerate(OTHER_CLIENTS.items(), start=1):
        shop.client(code)
        shop.logged(rf"Task step\[1-{number}\] succeeded")
        assert [found for found, message in shop.lines() if f"step[1-{number}]" in message] == [id] * 4, code


def test_what_the_docstring_says_has_no_id(shops):
    stands(
        "07c", "what a worker logs when it obeys `revoke`, such as `Tasks flagged as revoked`, what it logs about its"
    )
    shop = shops["prefork"]
    later, running = shop.client("under('a-1', 'step', countdown=90)\nunder('a-1', 'sleep', 90)").split()[1::2]
    shop.logged(f"{later}. received")
    shop.logged(f"sleep.{running}.: sleeps")
    shop.client(f"app.control.revoke({later!r})\napp.control.revoke({running!r}, terminate=True)")
    shop.client("under('a-1', 'unclean')\nunder('a-1', 'trouble')")
    shop.client("raw('{', {HEADER: 'a-1', 'task': 'step', 'id': 'a', 'compression': 'zlib'})")
    for line in (
        f"Tasks flagged as revoked: {later}",
        f"Terminating {running} (15)",
        "Process cleanup failed",
        "Can't decode message body: error('Error -5 while decompressing",
    ):
        shop.logged(re.escape(line))
        assert {found for found, message in shop.lines() if message.startswith(line)} == {"-"}, line
    shop.logged("^LookupError: no lamp$")  # a traceback's last line
    for quoted in (
        "Tasks flagged as revoked",
        "Process cleanup failed",
        "Couldn't ack",
        "can't decompress",
        "only the first line",
        "those of beat",
    ):
        assert quoted in correlation.__doc__


def test_beat_logs_without_an_id_and_each_task_that_it_sends_has_its_own(shops, folder):
    schedule = "{'tick': {'task': 'based', 'schedule': 0.3}}"
    (folder / "timed.py").write_text(f"from shop import app\napp.conf.beat_schedule = {schedule}\n")
    shop = shops["threads"]
    before = len(shop.lines())

    def ran() -> dict[str, set]:
        return {task: found for task, found in ids_of(shop.lines()[before:]).items() if len(found) == 1}

    with running(Shop("beat", shop.number, folder, "-A timed beat --loglevel=INFO")) as [beat]:
        beat.logged("Sending due task tick", 2)
        assert {found for found, message in beat.lines() if "Sending due task" in message} == {"-"}
        until(lambda: len(ran()) >= 2, "two due tasks")  # beat says it before it sends one
    assert all(found == {task} for task, found in ran().items())


def test_after_all_that_a_line_about_no_task_has_none(shops):
    for pool in ("solo", "threads", "prefork"):
        shop = shops[pool]
        shop.process.terminate()
        shop.process.wait(60)
        [line] = [line for line in shop.log.read_text().splitlines() if "Warm shutdown" in line][:1]
        assert "request-" not in line
        assert [found for found, message in shop.lines() if not ABOUT.search(message) and "ready." in message] == ["-"]


# How projects set their logging up, in a module that a worker is started with; the ids are in the format of each.
LOGGING = """
import logging.config
from celery import signals
from shop import app
FIELD = "request_correlation_id"
HANDLERS = {"out": {"class": "logging.StreamHandler", "formatter": "ours"}}
CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"ours": {"format": f"<%({FIELD})s> %(message)s"}},
    "handlers": HANDLERS,
    "root": {"level": "INFO", "handlers": ["out"]},
}

def format_with(formatter):
    def receiver(logger, **_):
        for handler in logger.handlers:
            handler.setFormatter(formatter)
    signals.after_setup_logger.connect(receiver, weak=False)
    signals.after_setup_task_logger.connect(receiver, weak=False)
"""
SETUPS = {
    "formatter": "format_with(logging.Formatter(f'<{{{FIELD}}}> {{message}}', style='{'))",
    "json": """
        from pythonjsonlogger.json import JsonFormatter
        format_with(JsonFormatter())
    """,
    "not_hijacked": """
        app.conf.worker_hijack_root_logger = False
        logging.config.dictConfig(CONFIG)
        format_with(logging.Formatter(f'<%({FIELD})s> %(message)s'))
    """,
    "setup_logging": """
        signals.setup_logging.connect(lambda **_: logging.config.dictConfig(CONFIG), weak=False)
    """,
    "replaced": """
        def replace(**_):
            CONFIG["loggers"] = {"celery.task": {"handlers": ["out"], "propagate": False}}
            logging.config.dictConfig(CONFIG)
        signals.after_setup_task_logger.connect(replace, weak=False)
    """,
    "settings": """
        class Settings:
            CELERY_TASK_TIME_LIMIT = 600
        app.config_from_object(Settings, namespace="CELERY")
    """,
    "spawn": "",
}
OPTIONS = {"spawn": "--pool-start-method=spawn"}  # as on macOS: a child process logs before it has imported the app


@pytest.fixture(scope="module")
def set_up(folder):
    """A worker with each set-up of logging."""
    for name, code in SETUPS.items():
        (folder / f"log_{name}.py").write_text(LOGGING + textwrap.dedent(code))
    workers = [
        Shop.worker(name, number, folder, f"--pool=prefork --concurrency=1 {OPTIONS.get(name, '')}", f"log_{name}")
        for number, name in enumerate(SETUPS, start=len(POOLS) + 1)
    ]
    with running(*workers):
        yield dict(zip(SETUPS, workers, strict=True))


@pytest.mark.parametrize("name", SETUPS)
def test_the_ids_are_there_whatever_sets_the_logging_up(set_up, name):
    worker = set_up[name]
    worker.client("under('trouble-1', 'trouble')")
    worker.client("under('refused-1', 'nosuch')")
    worker.logged("a receiver of task_unknown")
    worker.logged("raised unexpected: LookupError")
    log = worker.log.read_text()
    assert "Logging error" not in log
    if name in ("settings", "spawn"):
        lines = worker.lines()
    elif name == "json":
        records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        lines = [(record["request_correlation_id"], record["message"]) for record in records]
        [failed] = [record for record in records if "raised unexpected" in record["message"]]
        assert "Traceback" in failed["exc_info"], "a record with its traceback is one line"
        [told] = [record for record in records if record["message"] == "the library says"]
        assert told["correlation_id"] == "of-our-own"
    else:
        lines = re.findall("^<(.*?)> (.*)$", log, re.MULTILINE)
    for what in SAID:
        if name == "setup_logging" and what == "the task prints":
            assert re.search(f"^{what}$", log, re.MULTILINE), "Celery does not redirect what is printed"
            continue
        assert {found for found, message in lines if what in message} == {"trouble-1"}, what
    for what in ("unregistered task", "a receiver of task_unknown"):
        assert {found for found, message in lines if what in message} == {"refused-1"}, what
    assert {found for found, message in lines if " ready." in message} == {"-"}


def test_a_child_that_is_born_while_a_message_is_taken_does_not_inherit_its_id(folder):
    (folder / "grows.py").write_text(
        "from shop import app, library, signals\n"
        "signals.worker_process_init.connect(lambda **_: library.warning('a child is born'), weak=False)\n"
    )
    with running(Shop.worker("grows", 13, folder, "--pool=prefork --autoscale=4,1", "grows")) as [shop]:
        shop.client("for n in range(6):\n    under(f'grows-{n}', 'sleep')")
        shop.logged("a child is born", 2)
        assert "Scaling up" in shop.log.read_text()
        assert {found for found, message in shop.lines() if message == "a child is born"} == {"-"}


STRUCTURED = """
import logging
import sys
import structlog
from shop import app, correlation_id
def with_id(logger, method, event):
    return event | {"correlation_id": correlation_id.get()}
structlog.configure(
    processors=[with_id, structlog.processors.JSONRenderer()],
    logger_factory=structlog.WriteLoggerFactory(sys.__stderr__),
)
@app.task(name="structured")
def structured():
    structlog.get_logger().info("its own output")
    logging.getLogger("library").warning("of a library")
"""


def test_a_processor_puts_the_id_into_structlog_s_own_output_and_only_there(folder):
    stands(
        "07c",
        "| structlog with its own output | a processor that adds `correlation_id.get()` | records that don't come from "
        "structlog still need a format with the field |",
    )
    (folder / "structured.py").write_text(STRUCTURED)
    with running(Shop.worker("structured", 15, folder, "--pool=prefork --concurrency=1", "structured")) as [shop]:
        shop.client("under('structured-1', 'structured')")
        shop.logged("its own output")
        shop.logged("of a library")
        lines = shop.log.read_text().splitlines()
    [own] = [json.loads(line) for line in lines if "its own output" in line]
    assert own == {"event": "its own output", "correlation_id": "structured-1"}
    [other] = [line for line in lines if "of a library" in line]
    assert not other.startswith("{") and LINE.match(other), "it needs a format with the field"


@pytest.mark.parametrize("given", ["a", "0f3e", "A-b_c.9", "_", "x" * 64])
def test_an_id_from_outside_is_kept_if_it_is_fit_for_a_log(given):
    assert new_id(given) == given


@pytest.mark.parametrize(
    "given", [None, "", "a b", "a\nb", "a\n", "x" * 65, "ä", "<script>", "a]b", "-", "-a", ".", 7, b"a"]
)
def test_another_is_replaced_by_a_new_one(given):
    first, second = new_id(given), new_id(given)
    assert first != second and re.fullmatch(r"[0-9a-f]{32}", first)


def python(code: str) -> str:
    """What code prints in a Python of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.strip()


def test_installed_twice_it_is_there_once_and_another_factory_stays():
    code = """
import logging
from celery import Celery
from course_tasks.correlation import correlation_id, install
before = logging.getLogRecordFactory()
def factory(*args, **kwargs):
    record = before(*args, **kwargs)
    record.mine = "mine"
    return record
logging.setLogRecordFactory(factory)
install(Celery("one"))
first = logging.getLogRecordFactory()
install(Celery("two"))
assert logging.getLogRecordFactory() is first
logging.basicConfig(format="%(request_correlation_id)s %(mine)s %(message)s")
logging.warning("%s", "a")
correlation_id.set("id-1")
logging.warning("%(id)s", {"id": 9}, extra={"correlation_id": "of-our-own"})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines() == ["- mine a", "id-1 mine 9"]


def test_installed_by_a_task_that_runs_it_gives_nothing_back():
    code = """
import logging
from celery import Celery
from course_tasks.correlation import correlation_id, install
logging.basicConfig()  # shows if a receiver of a signal has failed
app = Celery("shop")
@app.task
def late():
    install(Celery("another"))
late.apply().get()
print(correlation_id.get())
"""
    assert python(code) == "None"


def test_two_apps_in_a_process_share_the_current_id_and_nothing_else():
    code = f"""
from celery import Celery, Task, signals
from celery.worker.request import Request
from course_tasks.correlation import FORMAT, correlation_id, install
one, two = Celery("one", broker="memory://"), Celery("two", broker="memory://")
install(one)
sent = []
signals.after_task_publish.connect(lambda headers, **_: sent.append(headers.get("{HEADER}")), weak=False)
correlation_id.set("id-1")
for app in (one, two):
    app.send_task("a")
print(sent, one.conf.worker_log_format == FORMAT, two.conf.worker_log_format == FORMAT)
"""
    assert python(code) == "['id-1', 'id-1'] True False"


def test_a_request_class_of_a_project_s_own_stays():
    code = """
from celery import Celery, Task
from celery.worker.request import Request
from course_tasks.correlation import install
class Ours(Request): pass
class Db(Task): Request = Ours
app = Celery("one")
install(app)
@app.task(base=Db)
def a(): pass
@app.task
def b(): pass
print(a.Request is Ours, b.Request is Ours)
"""
    assert python(code) == "True False"


@pytest.mark.parametrize("way", ["step.apply()", "step.delay()", "chain(step.si(), step.si())()", "nested.delay()"])
def test_a_task_that_is_run_in_place_has_its_caller_s_id(way, folder):
    code = f"""
import sys
sys.path.insert(0, {str(folder)!r})
from shop import *
app.conf.task_always_eager = True
correlation_id.set("id-1")
print({way}.get(), correlation_id.get())
correlation_id.set(None)
result = {way}
print(len(result.get()), correlation_id.get())
"""
    assert python(code) == "id-1 id-1\n36 None"


def test_the_name_is_none_of_celery_s():
    """For a header with a name that Celery uses, its own value may win, or the worker may even die of it."""
    assert not hasattr(Context, HEADER)
    record = logging.makeLogRecord({})
    assert HEADER not in vars(record)
    app = Celery("shop", broker="memory://", set_as_current=False)
    message = app.amqp.as_task_v2("1f2e", "step")
    assert HEADER not in message.headers


def test_a_message_carries_the_id_and_a_given_one_wins():
    code = f"""
from celery import Celery, signals
from course_tasks.correlation import correlation_id, install
app = Celery("shop", broker="memory://")
install(app)
sent = []
signals.after_task_publish.connect(lambda headers, **_: sent.append(headers.get("{HEADER}")), weak=False)
app.send_task("a")
correlation_id.set("id-1")
app.send_task("a")
app.send_task("a", headers={{"{HEADER}": "id-2"}})
print(sent)
"""
    assert python(code) == "[None, 'id-1', 'id-2']"


def definitions(code: str) -> dict[str, str]:
    """Functions, classes and constants by their names, the last of each; no docstrings, type hints or comments."""
    found = {}
    for node in ast.parse(code).body:
        for part in ast.walk(node):
            if isinstance(part, ast.arg):
                part.annotation = None
            elif isinstance(part, ast.FunctionDef):
                part.returns = None
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part) is not None:
                del part.body[0]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            [target] = node.targets if isinstance(node, ast.Assign) else [node.target]
            found[target.id] = ast.dump(node.value)
        else:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
    return found


def test_what_a_learner_builds_is_the_course_s_own_code():
    cells = nbformat.read(kernels.NOTEBOOKS / "07b_build_ids.ipynb", as_version=4).cells
    written = [re.fullmatch(r"%%writefile (-a )?scratch/ids\.py\n(.*)", cell.source, re.DOTALL) for cell in cells]
    parts = [found.groups() for found in written if found]
    assert [append for append, _ in parts] == [None, *["-a "] * (len(parts) - 1)]
    built = definitions("\n".join(part for _, part in parts))
    ours = definitions(Path(correlation.__file__).read_text())
    assert set(built) == set(ours)
    assert {name: code for name, code in built.items() if code != ours[name]} == {}
