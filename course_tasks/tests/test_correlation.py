"""The correlation id, in real workers of all five pools: every line of a log about a task has its request's id."""

import ast
import collections
import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from course_tasks import correlation
from course_tasks.authoring import kernels
from course_tasks.correlation import HEADER, new_id
from course_tasks.install import ROOT
from course_tasks.tests.plugin import until

POOLS = {"solo": 1, "prefork": 4, "threads": 8, "gevent": 16, "eventlet": 16}  # and their slots
REQUESTS = 60
# The tasks of one request. Each returns its own id, and logs before and after what may mix it up with others.
SHOP = """
import os, time
from celery import Celery, chain, chord, group
from celery.utils.log import get_task_logger
from course_tasks.correlation import TASK_FORMAT, correlation_id, install

app = Celery("shop")
install(app)
# with whole ids: of so many tasks, two may begin with the same eight letters
app.conf.worker_task_log_format = TASK_FORMAT.replace("%(task_id).8s", "%(task_id)s")
logger = get_task_logger(__name__)

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

@app.task(name="hang", soft_time_limit=None, time_limit=1)
def hang():
    time.sleep(60)

@app.task(name="lost")
def lost():
    os._exit(1)

@app.task(name="nested")
def nested():
    step.apply()
    logger.info("after a call in place")
    return correlation_id.get()

@app.task(name="order")
def order():
    logger.info("an order")
    for signature in (
        step.si(), again.si(), nested.si(), chain(step.si(), step.s()), group(step.si(), step.si()),
        chord([step.si(), step.si()], step.s()), fail.si().on_error(errback.s()), fail.si().on_error(old_errback.s()),
    ):
        signature.apply_async()
    logger.info("all sent")
    return correlation_id.get()
"""
TASKS = 1 + 1 + 2 + 1 + 2 + 2 + 3 + 2 + 1  # messages an order causes: two for a retry, one for the errback of old style
ABOUT = re.compile(r"\w+\[([0-9a-f-]{36})\]")  # a line about a task names it with its id
LINE = re.compile(r"^\[[\d:,. -]+ [A-Z]+(?:/[\w-]+)? ([\w.-]+)\] (.*)$")


class Shop:
    """A worker of one pool with a broker's database of its own, and its log."""

    def __init__(self, number: int, pool: str, folder):
        self.broker = f"{os.environ['CELERY_BROKER_URL'].rpartition('/')[0]}/{number}"
        self.log = folder / f"{pool}.log"
        command = f"-m celery -A shop worker --loglevel=INFO --pool={pool} --concurrency={POOLS[pool]}"
        self.process = subprocess.Popen(
            [sys.executable, *command.split(), "-n", f"{pool}@%h", "--without-mingle", "--without-gossip"],
            cwd=folder,
            env=os.environ | {"CELERY_BROKER_URL": self.broker, "PYTHONPATH": f"{folder}:{ROOT}"},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def lines(self) -> list[tuple[str, str]]:
        """The log's lines in our format: id and message."""
        return [found.groups() for line in self.log.read_text().splitlines() if (found := LINE.match(line))]

    def logged(self, pattern: str, times: int = 1) -> None:
        """Wait until the log has as many matches."""

        def enough():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return len(re.findall(pattern, self.log.read_text(), re.MULTILINE)) >= times

        until(enough, f"{times} x {pattern!r} in the log", 90)


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """A worker of each pool; at the end each stops warmly."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "shop.py").write_text(SHOP)
    (folder / "client.py").write_text(CLIENT)
    running = {pool: Shop(number, pool, folder) for number, pool in enumerate(POOLS, start=1)}
    try:
        for shop in running.values():
            shop.logged(r" ready\.$")
        yield running
    finally:
        for shop in running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shop.process.pid, 9)
            shop.process.wait()


# Sends what it is told, each under an id of its own, and prints "request id" for each.
CLIENT = """
import sys
from shop import app, correlation_id
from course_tasks.correlation import new_id
name, number = sys.argv[1], int(sys.argv[2])
for n in range(number):
    token = correlation_id.set(new_id(f"request-{n}"))
    print(correlation_id.get(), app.send_task(name, ignore_result=True).id)
    correlation_id.reset(token)
"""


def sent(shop: Shop, name: str, number: int) -> dict[str, str]:
    """Send tasks from a process of its own, so that no connection stays; the requests by their tasks' ids."""
    done = subprocess.run(
        [sys.executable, "client.py", name, str(number)],
        cwd=shop.log.parent,
        env=os.environ | {"CELERY_BROKER_URL": shop.broker, "PYTHONPATH": f"{shop.log.parent}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return {line.split()[1]: line.split()[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize("pool", POOLS)
def test_no_line_about_a_task_has_a_wrong_id_or_none(shops, pool):
    shop = shops[pool]
    requests = sent(shop, "order", REQUESTS)
    shop.logged(r" received$", REQUESTS * TASKS)
    until(lambda: not busy(shop), f"{pool} is done", 60)
    lines = shop.lines()
    ids: dict[str, set] = collections.defaultdict(set)  # by task
    for found, message in lines:
        for task in ABOUT.findall(message):
            ids[task].add(found)
    assert len(ids) >= REQUESTS * (TASKS - 1)
    assert {task: found for task, found in ids.items() if len(found) != 1} == {}, "one id a task"
    assert {task: ids[task] for task in requests} == {task: {request} for task, request in requests.items()}
    number = collections.Counter(found for [found] in ids.values())
    assert set(number) == set(requests.values()), "no id but those of the requests"
    assert len(set(number.values())) == 1, "each request has the same number of tasks under its id"
    for what in ("after a call in place", ": errback", ": old errback"):
        assert len([1 for _, message in lines if message.endswith(what)]) == REQUESTS, what
    assert {found for found, message in lines if "ready." in message} == {"-"}


def busy(shop: Shop) -> set[str]:
    """The tasks that were received and have not said that they are over."""
    text = shop.log.read_text()
    ended = re.findall(r"Task \w+\[(\S+)\] (?:succeeded|raised)", text)
    return set(re.findall(r"Task \w+\[(\S+)\] received$", text, re.MULTILINE)).difference(ended)


def test_lines_and_error_callbacks_of_the_main_process_have_it_too(shops):
    shop = shops["prefork"]
    for name, line in (("hang", "Hard time limit"), ("lost", "Worker exited prematurely|WorkerLost")):
        [(task, request)] = sent(shop, name, 1).items()
        shop.logged(line)
        about = [found for found, message in shop.lines() if task in message]
        assert about and set(about) == {request}, (name, about)
        assert request in [found for found, message in shop.lines() if re.search(line, message)]


def test_a_task_from_a_client_that_knows_no_ids_has_its_own(shops):
    shop = shops["threads"]
    code = "import celery; print(celery.Celery().send_task('order', ignore_result=True).id)"
    env = os.environ | {"CELERY_BROKER_URL": shop.broker}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    task = done.stdout.strip()
    shop.logged(rf" {task}\] Task old_errback\[\S+ succeeded")
    assert {found for found, message in shop.lines() if task[:8] in message} == {task}


def test_after_all_that_a_line_about_no_task_has_none(shops):
    for pool in ("solo", "threads", "prefork"):
        shop = shops[pool]
        shop.process.terminate()
        shop.process.wait(60)
        [line] = [line for line in shop.log.read_text().splitlines() if "Warm shutdown" in line][:1]
        assert "request-" not in line
        assert [found for found, message in shop.lines() if not ABOUT.search(message) and "ready." in message] == ["-"]


@pytest.mark.parametrize("given", ["a", "0f3e", "A-b_c.9", "x" * 64])
def test_an_id_from_outside_is_kept_if_it_is_fit_for_a_log(given):
    assert new_id(given) == given


@pytest.mark.parametrize("given", [None, "", "a b", "a\nb", "a\n", "x" * 65, "ä", "<script>", "a]b"])
def test_another_is_replaced_by_a_new_one(given):
    first, second = new_id(given), new_id(given)
    assert first != second and re.fullmatch(r"[0-9a-f]{32}", first)


def python(code: str) -> str:
    """What code prints in a Python of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
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
logging.basicConfig(format="%(correlation_id)s %(mine)s %(message)s")
logging.warning("%s", "a")
correlation_id.set("id-1")
logging.warning("%(id)s", {"id": 9})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines() == ["- mine a", "id-1 mine 9"]


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
