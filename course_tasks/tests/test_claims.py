"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import inspect
import os
import re
import socket
from datetime import datetime
from pathlib import Path

import kombu
import pytest
from celery import Celery
from celery.app.utils import find_app
from celery.bin.worker import worker as worker_command
from celery.result import AsyncResult
from redis import Redis

from course_tasks import copies
from course_tasks.exercises import WrongAnswer
from course_tasks.exercises.project import Project
from course_tasks.tests.plugin import cells, until


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


def shop(folder: Path, head: str = 'app = Celery("shop")', module: str = "shop") -> None:
    """Write a small project: a module with an app and one task."""
    code = f"from celery import Celery\n\n{head}\n\n\n@app.task\ndef price():\n    return 9\n"
    folder.joinpath(f"{module}.py").write_text(code)


QUIET = "--pool=solo --without-mingle --without-gossip"


def test_the_worker_s_command_has_these_defaults():
    stands(
        "03",
        "The default is `WARNING`, which is very little",
        "it is the default",
        "`celery` is the default",
        "On the command line, `--include` (or `-I`) does what `include=` does",
    )
    options = {name: option for option in worker_command.params for name in option.opts}
    assert options["--loglevel"].default == "WARNING"
    assert Celery(set_as_current=False).conf.worker_pool == "prefork"
    assert Celery(set_as_current=False).conf.task_default_queue == "celery"
    assert options["--include"] is options["-I"]


def test_the_banner_never_shows_a_password_nor_whether_there_is_one():
    stands("03", "you see `:**` here whether there is one or not")
    app = Celery(set_as_current=False)
    shown = {app.connection(url).as_uri() for url in ("redis://localhost:1/0", "redis://:secret@localhost:1/0")}
    assert shown == {"redis://:**@localhost:1/0"}


def test_mingle_asks_for_revoked_tasks_and_waits_a_second_and_gossip_hears_the_others(project, tmp_path):
    stands(
        "03",
        "asks the other workers at this broker what it has missed, for example which tasks have been revoked",
        "It waits a second for the answers",
        "with which workers listen to each other's signs of life",
    )
    shop(tmp_path)
    project.worker("celery -A shop worker --pool=solo -n one@%h")
    project.client().control.revoke("a-revoked-task", reply=True, timeout=10, limit=1)
    project.worker("celery -A shop worker --pool=solo -n two@%h")
    nodes = (project.client().control.inspect(timeout=10, limit=2).revoked() or {}).items()
    assert {node.partition("@")[0]: tasks for node, tasks in nodes} == {
        "one": ["a-revoked-task"],
        "two": ["a-revoked-task"],
    }
    begin, end, *_ = re.findall(r"\[\S+ (\S+): INFO/MainProcess\] mingle: (?:searching|all alone)", project.log())
    second = [datetime.strptime(time, "%H:%M:%S,%f") for time in (begin, end)]
    assert 1 <= (second[1] - second[0]).seconds < 3
    until(lambda: f"sync with two@{socket.gethostname()}" in project.log(), "one hears of two")


def test_a_direct_exchange_passes_a_message_to_each_queue_with_exactly_its_key(pair):
    stands("03", "passes a message on to each queue that is registered with exactly the message's **routing key**")
    stands("03", "Celery gives exchange, key and queue the same name")
    exchange = kombu.Exchange("claims", type="direct")
    queues = [kombu.Queue(name, exchange, routing_key=key) for name, key in [("a", "k"), ("b", "k"), ("c", "kk")]]
    with Celery(set_as_current=False).connection_for_write() as connection, Redis.from_url(pair.broker) as broker:
        connection.Producer().publish(1, exchange=exchange, routing_key="k", declare=queues)
        assert {name: broker.llen(name) for name in "abc"} == {"a": 1, "b": 1, "c": 0}
    made = Celery(set_as_current=False).amqp.queues["mail"]
    assert (made.name, made.exchange.name, made.routing_key) == ("mail", "mail", "mail")


def test_which_variable_a_finds(tmp_path, monkeypatch):
    stands(
        "03",
        "1. the variable `app` of the module;",
        "2. its variable `celery`;",
        "3. if the module is a package: the same steps in its module `celery`",
        "4. the first variable that contains a Celery app, whatever it is called.",
    )
    monkeypatch.syspath_prepend(tmp_path)
    head = "from celery import Celery\n"
    both = head + 'other = Celery("other")\nlast = Celery("last")\n'
    named = both + 'celery = Celery("celery")\n'
    for name, code in {"step1": named + 'app = Celery("app")\n', "step2": named, "step4": both}.items():
        tmp_path.joinpath(f"{name}.py").write_text(code)
    for name, code in {"step3": both, "step3first": named}.items():
        tmp_path.joinpath(name).mkdir()
        tmp_path.joinpath(name, "__init__.py").write_text(code)
        tmp_path.joinpath(name, "celery.py").write_text(head + 'whatever = Celery("in the module celery")\n')
    names = ("step1", "step2", "step3", "step4", "step4:last", "step4.last")
    found = {name: find_app(name).main for name in names}
    assert found == {
        "step1": "app",
        "step2": "celery",
        "step3": "in the module celery",
        "step4": "other",
        "step4:last": "last",
        "step4.last": "last",
    }


def test_solo_s_banner_has_the_number_of_processors_and_a_discarded_message_is_gone(project, tmp_path):
    stands("03", "the number of processors is Celery's default")
    stands("03", "*Discarded* means that the message is gone. No other worker will get it, even if one knows the task.")
    shop(tmp_path)
    project.worker(f"celery -A shop worker {QUIET}")
    assert f"concurrency: {os.cpu_count()} (solo)" in project.log()
    project.client().send_task("unknown")
    until(lambda: "The message has been ignored and discarded." in project.log(), "the message is discarded")
    until(lambda: not project.broker.exists("celery", "unacked"), "nothing of the message is left in the broker")


@pytest.mark.parametrize(
    "head, tasks",
    [
        ('app = Celery("shop", include=["stock"])', "stock.count"),
        ('app = Celery("shop")\napp.conf.imports = ["stock"]', "stock.count"),
        ('app = Celery("shop")\napp.autodiscover_tasks(["store"])', "store.tasks.count"),
    ],
)
def test_three_ways_to_a_second_module(project, tmp_path, head, tasks):
    stands("03", '| the setting `app.conf.imports = ["stock"]` | exactly these modules | the same |')
    stands("03", "the package `store` and its module `store.tasks`")
    shop(tmp_path, head)
    tmp_path.joinpath("store").mkdir()
    for module in ("stock.py", "store/tasks.py", "store/video.py"):
        tmp_path.joinpath(module).write_text("from shop import app\n\n\n@app.task\ndef count():\n    return 3\n")
    project.worker(f"python -m celery -A shop worker {QUIET}")
    assert re.findall(r"\n  \. (\S+)", project.log()) == ["shop.price", tasks]


def test_a_missing_package_and_a_bare_celery_stop_a_worker_that_discovers_tasks(project, tmp_path):
    stands("03", "with no package `store`, the worker doesn't start")
    stands("03", "The bare command `celery` looks for the app and for the modules in `include` in the current folder")
    shop(tmp_path, 'app = Celery("shop")\napp.autodiscover_tasks(["store"])')
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'store'"):
        project.worker(f"python -m celery -A shop worker {QUIET}")
    tmp_path.joinpath("store").mkdir()
    tmp_path.joinpath("store/tasks.py").touch()
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'store'"):
        project.worker(f"celery -A shop worker {QUIET}")


@pytest.mark.parametrize(
    "head", ['app = Celery("shop", include=["stok"])', 'app = Celery("shop")\napp.conf.imports = ["stok"]']
)
def test_a_worker_doesn_t_start_with_an_unknown_module(project, tmp_path, head):
    stands("03", "exactly these modules | the worker doesn't start: `ModuleNotFoundError`")
    shop(tmp_path, head)
    with pytest.raises(WrongAnswer, match="ended before it was ready: ModuleNotFoundError: No module named 'stok'"):
        project.worker(f"celery -A shop worker {QUIET}")


def test_a_wrong_value_stops_the_worker_without_naming_the_setting_or_is_taken(project, tmp_path):
    stands(
        "03",
        '`worker_prefetch_multiplier = "four"` stops the worker with a `ValueError` that doesn\'t name the setting',
    )
    stands("03", '`task_time_limit = "3"`, a text, lets it start')
    shop(tmp_path, 'app = Celery("shop")\napp.conf.worker_prefetch_multiplier = "four"')
    with pytest.raises(WrongAnswer, match="ready: ValueError: ") as error:
        project.worker(f"celery -A shop worker {QUIET}")
    assert "worker_prefetch_multiplier" not in str(error.value)
    shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limit = "3"')
    project.worker(f"celery -A shop worker {QUIET}")


def test_report_reads_the_file_and_inspect_conf_asks_the_worker(project, tmp_path):
    stands("03", "`celery -A shop inspect conf` asks the running workers", "Neither of them marks a wrong name.")
    stands("03", "it imports the app, and lists the settings in the file as it is now")
    shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 3')
    project.worker(f"celery -A shop worker {QUIET}")
    shop(tmp_path, 'app = Celery("shop")\napp.conf.task_time_limt = 4')
    assert "\ntask_time_limt: 4\n" in project.run("celery -A shop report")
    assert '"task_time_limt": 3' in project.run("celery -A shop inspect conf")
    assert Celery(set_as_current=False).conf.task_time_limit is None


# --- 03b -----------------------------------------------------------------------------------------------------


# --- 04 ------------------------------------------------------------------------------------------------------


# --- 04b -----------------------------------------------------------------------------------------------------


# --- 05 ------------------------------------------------------------------------------------------------------


# --- 05b -----------------------------------------------------------------------------------------------------


# --- 06 ------------------------------------------------------------------------------------------------------


# --- 06b -----------------------------------------------------------------------------------------------------


# --- 07 ------------------------------------------------------------------------------------------------------


# --- 07b -----------------------------------------------------------------------------------------------------


# --- 07c -----------------------------------------------------------------------------------------------------


# --- 07d -----------------------------------------------------------------------------------------------------
