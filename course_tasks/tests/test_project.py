"""The exercises in which a learner mends a broken project: how the judge runs it, and that nothing is left."""

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from course_tasks.exercises import WrongAnswer
from course_tasks.exercises.project import Project, answers
from course_tasks.tests.plugin import listens, processes, until

APP = """
from celery import Celery
app = Celery("shop", broker="redis://localhost:1/0", backend="redis://localhost:1/0")
@app.task(name="price")
def price(n):
    return 3 * n
"""
ORDER = """
from shop import app
print("total", app.send_task("price", args=(5,)).get(timeout=10))
"""
WORKER = "celery -A shop worker --pool=solo --without-mingle --without-gossip"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "order.py").write_text(ORDER)
    return tmp_path


def test_a_project_runs_as_in_a_terminal_on_servers_of_its_own_and_leaves_nothing(folder):
    before = dict(os.environ)
    with Project(str(folder)) as project:
        project.worker(WORKER)
        assert project.run("python order.py") == "total 15\n"
        assert project.client().send_task("price", args=(2,)).get(timeout=10) == 6
        assert project.broker.llen("celery") == 0 and len(project.backend.keys("celery-task-meta-*")) == 2
        until(lambda: project.log().count(" succeeded in ") == 2, "both tasks in the log")
        home = str(project._home)
        ours = psutil.Process().children(recursive=True)
        assert processes("celery -A shop", ours)
    assert os.environ == before
    until(lambda: not processes(home) and not any(map(psutil.Process.is_running, ours)), "the end of its processes")
    assert not Path(home).exists()


def test_a_result_that_outlives_its_project_does_not_look_for_its_servers(folder, monkeypatch):
    raised: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    with Project(str(folder)) as project:
        client = project.client()
        results = [client.send_task("price", args=(n,)) for n in range(3)]
        assert client.backend.result_consumer.subscribed_to
    port = client.backend.connparams["port"]
    until(lambda: not listens(port), "the end of the backend")
    results.clear()  # nobody has asked for their values
    gc.collect()
    assert not raised


def test_each_worker_that_a_script_starts_is_waited_for_and_counted_and_can_be_asked(folder):
    names = ("one", "two", "three --pool=nosuch")  # the last one ends at once
    commands = [f"{WORKER} --loglevel=INFO -Q {name.split()[0]} -n {name}" for name in names]
    script = f"import subprocess\nfor each in [subprocess.Popen(line.split()) for line in {commands}]: each.wait()"
    (folder / "start.py").write_text(script)
    with Project(str(folder)) as project:
        assert project.worker("python start.py") == 2
        assert project.log().count(" ready.\n") == 2
        told = answers(project.client(), "active_queues", 2)
        assert sorted(queue["name"] for queues in told for queue in queues) == ["one", "two"]


def test_several_workers_are_started_at_once_and_the_one_that_ends_is_named(folder):
    wait = 'import os, sys, time\nwhile not os.path.exists("begun"): time.sleep(0.02)\n'
    (folder / "wait.py").write_text(wait + f"os.execvp('celery', {WORKER.split()} + sys.argv[1:])")
    (folder / "late.py").write_text("from pathlib import Path\nfrom shop import app\nPath('begun').touch()")
    second = WORKER.replace("shop", "late") + " -n two"
    with Project(str(folder)) as project:
        assert project.worker("python wait.py -n one", second) == 2
        assert project.log().count(" ready.\n") == 2
        with pytest.raises(WrongAnswer, match="`celery -A nosuch worker` ended before it was ready"):
            project.worker(f"{WORKER} -n three", "celery -A nosuch worker")


def test_threads_run_commands_at_the_same_time(folder):
    with ThreadPoolExecutor() as pool, Project(str(folder)) as project:
        commands = [f"python order.py; echo {number}" for number in range(4)]
        orders = [pool.submit(project.run, f'sh -c "{command}"') for command in commands]
        project.worker(WORKER)
        assert [order.result() for order in orders] == [f"total 15\n{number}\n" for number in range(4)]


def test_what_is_hopeless_is_not_waited_for(folder):
    with Project(str(folder)) as project, pytest.raises(WrongAnswer, match=r"^nobody will answer\.$"):
        project.run(  # without a worker, order.py would wait for 10 s
            "python order.py", hopeless=lambda: "nobody will answer." if project.broker.llen("celery") else None
        )


def test_a_settled_log_has_the_end_of_each_task_that_has_ended_also_if_its_lines_are_late(folder):
    with Project(str(folder)) as project:
        project.worker(WORKER)
        [copier] = [
            each for each in psutil.Process().children(recursive=True) if "supervisor.py" in str(each.cmdline())
        ]
        copier.suspend()  # it passes on what a worker writes
        assert project.client().send_task("price", args=(2,)).get(timeout=20) == 6
        assert project.settled_log(seconds=0.5).count(" succeeded in ") == 0, "it waits no longer than it is told"
        threading.Timer(0.5, copier.resume).start()
        assert project.settled_log(seconds=60).count(" succeeded in ") == 1


@pytest.mark.parametrize(
    "file, text, reason",
    [
        ("shop.py", "import nosuch\n", "ended before it was ready: .*nosuch"),
        ("order.py", "raise SystemExit('no stock')\n", r"`python order.py` ended with an error: no stock\.$"),
        ("order.py", "import time; print('one moment', flush=True); time.sleep(99)\n", r"still running after 1 s"),
    ],
)
def test_what_fails_is_said_in_one_line(folder, file, text, reason):
    (folder / file).write_text(text)
    with Project(str(folder)) as project, pytest.raises(WrongAnswer, match=reason) as told:
        project.worker(WORKER)
        project.run("python order.py", seconds=1 if "sleep" in text else 20)
    assert "\n" not in str(told.value)


def test_a_folder_that_is_missing_is_said():
    with pytest.raises(WrongAnswer, match="there is no folder nosuch"):
        Project("nosuch")


def test_nothing_is_left_when_the_judging_process_is_killed(folder):
    code = f"""
from course_tasks.exercises.project import Project, answers
with Project({str(folder)!r}) as project:
    project.worker({WORKER!r})
    print(project._home, flush=True)
    input()
"""
    judge = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    home = judge.stdout.readline().strip()
    ours = psutil.Process(judge.pid).children(recursive=True)
    assert len(ours) >= 3
    judge.kill()
    judge.wait()
    judge.stdin.close()
    judge.stdout.close()
    until(lambda: not processes(home) and not any(map(psutil.Process.is_running, ours)), "their end")
