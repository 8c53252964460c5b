"""The Celery app and its tasks, with real workers, as a learner starts them."""

import contextlib
import copy
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery.backends.base import Backend
from celery.exceptions import SoftTimeLimitExceeded, TaskRevokedError
from kombu.exceptions import EncodeError
from redis import Redis

from course_tasks.authoring import record
from course_tasks.celery import app
from course_tasks.install import ROOT
from course_tasks.tasks import add, add_long
from course_tasks.tests.plugin import cells, until

NOTEBOOKS = ROOT / "notebooks"
TASKS = sorted(re.findall(r'(?m)^@app\.task\(name="(\w+)"', (ROOT / "course_tasks/tasks.py").read_text()))
COMMAND = "python -m celery -A course_tasks worker --loglevel=INFO --pool="
STARTS = {  # a worker: the folder it is started in, and the command
    "gevent": (ROOT, COMMAND + "gevent"),
    "gevent in notebooks": (NOTEBOOKS, COMMAND + "gevent"),
    "prefork": (ROOT, COMMAND + "prefork --concurrency=1"),
    "threads": (NOTEBOOKS, COMMAND + "threads --concurrency=1"),
    "solo": (ROOT, COMMAND + "solo"),
}
TIMEOUT = 60  # seconds, far above what anything here takes


class Worker:
    """A running worker, alone with its database on the broker (the first: 0), so that all can run at once."""

    def __init__(self, number: int, folder: Path, command: str, log: Path):
        broker = f"{os.environ['CELERY_BROKER_URL'].rpartition('/')[0]}/{number}"
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                shlex.split(command),
                cwd=folder,
                env=os.environ | {"PATH": path, "CELERY_BROKER_URL": broker},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.connection = app.connection_for_write(broker)

    def send(self, name: str, *args, **options):
        """Send a task, known by its name alone."""
        return app.send_task(name, args, connection=self.connection, **options)

    def logged(self, pattern: str) -> re.Match:
        """Wait for a line in the log of the living worker."""

        def found():
            assert self.process.poll() is None, self.log.read_text()
            return re.search(pattern, self.log.read_text(), re.M)

        return until(found, f"{pattern!r} in the log")


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """All the workers, by name; at the end each must stop warmly."""
    folder = tmp_path_factory.mktemp("workers")
    with contextlib.ExitStack() as stack:
        running = {}
        for number, (name, start) in enumerate(STARTS.items()):
            worker = running[name] = Worker(number, *start, folder / f"{number}.log")
            stack.callback(worker.connection.release)
            stack.callback(lambda w=worker: os.killpg(w.process.pid, signal.SIGKILL) if w.process.poll() is None else 0)
        for worker in running.values():
            worker.logged(r" ready\.$")
        yield running
        for worker in running.values():
            worker.process.terminate()
        for name, worker in running.items():
            assert worker.process.wait(TIMEOUT) == 0, f"{name}:\n{worker.log.read_text()}"
            assert "Warm shutdown" in worker.log.read_text()


@pytest.fixture(scope="module", autouse=True)
def client():
    """Leave no connection behind: other tests wait until the pair has none."""
    yield
    app.pool.force_close_all()
    app.backend.result_consumer.stop()
    app.backend.client.connection_pool.disconnect()


def python(code: str, folder: Path = ROOT, **variables) -> str:
    """Run code in a Python of its own, whose only settings of Celery's are `variables`; return what it prints."""
    names = ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "COURSE_RUNTIME")
    env = {name: value for name, value in os.environ.items() if name not in names} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", STARTS)
def test_a_worker_of_every_pool_runs_add_and_knows_only_our_tasks(workers, name):
    worker = workers[name]
    assert worker.send("add", 4, 5).get(timeout=TIMEOUT) == 9
    worker.logged(r"^\[\d\d:\d\d:\d\d INFO\] Task add\[[\w-]{36}\] succeeded in \S+: 9$")
    assert re.findall(r"^  \. (\S+)$", worker.log.read_text(), re.M) == TASKS


COMPARED = ["add", "add_long", "compute", "count_to", "divide", "flaky", "notify", "wait", "whereami"]  # sanitize.cfg
LISTS = {  # what a new banner lists, and whether that is as good as what the stored one lists
    "the same": (lambda text: text, True),
    "one more at the start": (lambda text: text.replace("  . add\n", "  . abs\n  . add\n"), True),
    "one more in the middle": (lambda text: text.replace("  . flaky\n", "  . flaky\n  . multiply\n"), True),
    "one more at the end": (lambda text: text.replace("  . whereami\n", "  . whereami\n  . zip\n"), True),
    **{f"no {name}": (lambda text, name=name: text.replace(f"  . {name}\n", ""), False) for name in COMPARED},
    "a misspelt one": (lambda text: text.replace("  . divide\n", "  . devide\n"), False),
    "one by its place": (lambda text: text.replace("  . wait\n", "  . wait\n  . course_tasks.tasks.wait\n"), False),
    "one of another app": (lambda text: text.replace("  . whereami\n", "  . whereami\n  . shop.price\n"), False),
    "none": (lambda text: re.sub(r"(?:  \. \w+\n)+", "", text), False),
}


@pytest.mark.parametrize("kind", ["text/plain", "text/html"])
@pytest.mark.parametrize("name", LISTS)
def test_a_new_task_changes_no_stored_banner_and_a_wrong_list_is_noticed(name, kind):
    change, equal = LISTS[name]
    stored = next(cell for cell in cells(NOTEBOOKS / "03_worker.ipynb", "code") if "[tasks]" in str(cell.outputs))
    fresh = copy.deepcopy(stored)
    data = fresh.outputs[0].data
    assert set(COMPARED) <= set(re.findall(r"(?m)^  \. (\w+)$", data[kind]))
    data[kind] = change(data[kind])
    assert (record.comparable(fresh) == record.comparable(stored)) == equal


def test_a_client_may_also_import_the_tasks(workers):
    result = add.apply_async((4, 5), connection=workers["threads"].connection)
    assert result.get(timeout=TIMEOUT) == 9
    assert (add.name, add_long.name) == ("add", "add_long")


def test_add_long_is_started_before_it_is_done(workers):
    states = []
    result = workers["threads"].send("add_long", 4, 5, kwargs={"seconds": 0.3})
    assert result.get(timeout=TIMEOUT, on_message=lambda message: states.append(message["status"])) == 9
    assert list(dict.fromkeys(states)) == ["STARTED", "SUCCESS"]  # the client may hear of one twice
    workers["threads"].logged(rf"^\[[\d:]+ INFO\] add_long\[{result.id[:8]}\]: adding 4 and 5 ")


def test_add_long_takes_as_long_as_it_is_told():
    start = time.monotonic()
    assert add_long(4, 5, seconds=0.25) == 9
    assert time.monotonic() - start >= 0.25


def test_a_revoke_ends_add_long_in_a_green_pool(workers):
    worker = workers["gevent"]
    result = worker.send("add_long", 4, 5, kwargs={"seconds": 2 * TIMEOUT})
    until(lambda: result.state == "STARTED", "STARTED")
    result.revoke(terminate=True)
    with pytest.raises(TaskRevokedError):
        result.get(timeout=TIMEOUT)


def test_a_soft_time_limit_ends_add_long_in_prefork(workers):
    result = workers["prefork"].send("add_long", 4, 5, kwargs={"seconds": 2 * TIMEOUT}, soft_time_limit=1)
    with pytest.raises(SoftTimeLimitExceeded):
        result.get(timeout=TIMEOUT)


def test_only_json_is_sent(workers):
    with pytest.raises(EncodeError, match="set is not JSON serializable"):
        workers["threads"].send("add", {1}, {2})


def test_only_json_is_accepted(workers):
    worker = workers["threads"]
    refused = worker.send("add", 4, 5, serializer="pickle")
    worker.logged("Refusing to deserialize untrusted content of type pickle")
    assert worker.send("add", 4, 5).get(timeout=TIMEOUT) == 9
    assert refused.state == "PENDING"
    refused.forget()


def test_a_result_expires(workers):
    result = workers["threads"].send("add", 4, 5)
    result.get(timeout=TIMEOUT)
    with Redis.from_url(os.environ["CELERY_RESULT_BACKEND"]) as backend:
        assert 3600 - TIMEOUT < backend.ttl(f"celery-task-meta-{result.id}") <= 3600


def test_times_are_utc():
    assert app.conf.enable_utc and str(app.timezone) == "UTC"


URLS = {"CELERY_BROKER_URL": "redis://localhost:1/0", "CELERY_RESULT_BACKEND": "redis://localhost:2/0"}
PRINT_PORTS = "print(app.connection_for_write().port, app.connection_for_read().port, app.backend.connparams['port'])"


def test_the_environment_beats_the_running_pair():
    assert python(f"from course_tasks.celery import app; {PRINT_PORTS}", **URLS) == "1 1 2"


def test_it_does_so_too_when_set_after_the_import():
    code = f"import os; from course_tasks.celery import app; os.environ.update({URLS}); {PRINT_PORTS}"
    assert python(code) == "1 1 2"


def test_without_an_environment_the_running_pair_is_used():
    code = f"""
from course_tasks import servers
servers.urls = lambda: {tuple(URLS.values())}
from course_tasks.celery import app
{PRINT_PORTS}
"""
    assert python(code) == "1 1 2"


def test_a_silent_server_is_an_error_and_not_a_wait_for_ever():
    code = """
from course_tasks.authoring import record
from course_tasks.celery import app
try:
    {}
except Exception as error:
    print(error)
"""
    calls = ["app.send_task('add', (4, 5), ignore_result=True)", "app.AsyncResult('x').state"]
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as together:
        urls = dict.fromkeys(URLS, f"redis://127.0.0.1:{listener.getsockname()[1]}/0")
        errors = together.map(lambda call: python(code.format(call), **urls), calls)
        assert set(errors) == {"Timeout reading from socket"}


def test_a_backend_that_is_down_is_given_up_sooner_than_by_default():
    assert app.backend.retry_policy["max_retries"] < Backend.retry_policy["max_retries"]


def test_the_worker_side_needs_nothing_of_the_classroom(tmp_path):
    code = "import sys, course_tasks.tasks; print(*sorted(sys.modules))"
    modules = python(code, tmp_path, **URLS).split()
    ours = {name for name in modules if name.startswith("course_tasks")}
    assert ours == {f"course_tasks{name}" for name in ("", ".celery", ".servers", ".spans", ".tasks")}
    assert not {"gevent", "eventlet", "IPython", "ipywidgets", "nbformat"} & set(modules)


def test_importing_the_app_costs_little_more_than_making_an_empty_one():
    codes = {"empty": "from celery import Celery; Celery('x')", "ours": "from course_tasks.celery import app"}
    least = dict.fromkeys(codes, float("inf"))
    for round in range(30):  # in turn, and again as long as a busy machine may be to blame
        for name, code in codes.items():
            _, status, usage = os.wait4(os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ), 0)
            assert status == 0
            least[name] = min(least[name], usage.ru_utime + usage.ru_stime)
        if round >= 4 and least["ours"] < 1.25 * least["empty"]:
            return
    pytest.fail(f"processor seconds: {least}")
