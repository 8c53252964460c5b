"""Experiments with real workers, in this process and in kernels: what they find, refuse, and leave behind."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from celery import Celery
from redis import Redis

from course_tasks.authoring import kernels, record
from course_tasks.classroom import ClassroomError, Spans
from course_tasks.classroom.experiment import GOING, HERE, PIDBOX, Experiment, Run
from course_tasks.install import ROOT
from course_tasks.tests.plugin import free_ports, processes, until
from course_tasks.tests.test_live import serving
from course_tasks.tests.test_terminal import Kernel

QUICK = {"concurrency": 2, "tasks": 4, "seconds": 0.3}
LONG = {"pool": "solo", "concurrency": 1, "tasks": 40, "seconds": 0.2}
STATE = {"_kombu.binding_deadlines"}  # of all queues of a broker, which kombu sees to


def workers(pair) -> list[psutil.Process]:
    """The processes of experiments on this pair; elsewhere on the machine there may be others."""
    found = []
    for process in processes("-Q experiment-"):
        with contextlib.suppress(psutil.Error):  # it has ended in the meantime
            if process.environ().get("CELERY_BROKER_URL") == pair.broker:
                found.append(process)
    return found


def left(pair) -> list:
    """What an experiment should not have left: processes, keys in broker and backend, connections to them."""
    found = [process.cmdline() for process in workers(pair)]
    for url in (pair.broker, pair.backend):
        with Redis.from_url(url, decode_responses=True) as server:
            found += set(server.scan_iter()) - STATE
            found += [client for client in server.client_list() if client["id"] != str(server.client_id())]
    return found


@pytest.fixture
def clean(pair):
    """The pair, in which nothing may be left at the end of the test."""
    yield pair
    assert left(pair) == []


def choose(experiment: Experiment, **settings) -> None:
    for name, value in settings.items():
        experiment.controls[name].value = value


def status(experiment: Experiment) -> str:
    return re.sub("<[^>]*>", "", experiment.status.value)


@pytest.mark.parametrize("pool, slots", [("solo", 1), ("prefork", 2), ("threads", 2), ("gevent", 2), ("eventlet", 2)])
def test_a_run_in_every_pool_tells_what_its_tasks_did_and_leaves_nothing(clean, pool, slots):
    experiment = Experiment()
    run = experiment.run(pool=pool, kind="wait", **QUICK)
    assert experiment.runs == [run] and len(run.spans) == 4 and run.slots == slots
    assert all(span["seconds"] == 0.3 for span in run.spans)
    assert 0.98 * 4 * 0.3 / slots < run.wall and 0.5 < run.speedup < 1.02 * slots
    text = f"{pool}, -c 2, wait 0.3 s: 4 tasks used {slots} slot{'s' * (slots > 1)} and took {run.wall:.2f} s, "
    assert repr(run) == f"{text}{run.speedup:.1f} times as fast as one by one"
    assert f"--pool={pool} --concurrency=2 -Q experiment-" in run.command and run.command in experiment._command.value
    assert experiment.progress.value == experiment.progress.max == 4
    assert status(experiment).startswith("Run 1 is over: ")
    experiment.controls["tasks"].value += 1
    assert experiment.progress.value == 0, "a full bar would be that of the next run"


def test_the_speed_up_is_that_of_the_wall_time_beside_it():
    """Four that compute on two processors: each is delayed half the time, and this is the limit to be seen."""
    span = {"thread": "MainThread", "start": 0, "end": 2, "delayed": 1, "seconds": 1}
    run = Run("prefork", 4, 4, "compute", 1, "", Spans(span | {"pid": pid} for pid in range(4)))
    assert (run.wall, run.speedup, run.slots) == (2, 2, 4)
    assert repr(run).endswith("4 tasks used 4 slots and took 2.00 s, 2.0 times as fast as one by one")


def test_computing_tasks_compute(clean):
    run = Experiment().run(pool="threads", concurrency=2, tasks=2, kind="compute", seconds=0.3)
    assert run.speedup < 1.1 and run.wall > 0.55, "one thread at a time runs Python"


def test_the_last_runs_are_shown_side_by_side_with_a_picture_and_a_table(clean, monkeypatch):
    experiment = Experiment()
    span = {"pid": 7, "thread": "MainThread", "start": 0, "end": 2, "delayed": 0, "seconds": 1}
    monkeypatch.setattr(
        "course_tasks.classroom.experiment.measure",
        lambda settings, *_: Run(**settings, command="", spans=Spans([span])),
    )
    for pool in ("prefork", "solo", "threads", "gevent", "solo"):
        experiment.run(pool=pool)
    assert repr(experiment) == HERE, "the text that is stored is always the same"
    page = experiment._result.value
    rows = [re.findall(r"<td[^>]*>([^<]*)", row) for row in page.split("<tr>")[2:]]
    assert [row[:2] for row in rows] == [["2", "solo"], ["3", "threads"], ["4", "gevent"], ["5", "solo"]]
    assert rows[0] == ["2", "solo", "4", "10", "wait", "0.2", "2.00 s", "0.5 x", "1"]
    assert (
        "2: solo -c 4, wait: 1 task used 1 slot and took 2.00 s, 2.0 times as slow"
        in re.search(r'<img alt="([^"]*)"', page)[1]
    )


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pool": "processes"}, "pool is one of solo, prefork, threads, gevent, eventlet, not 'processes'."),
        ({"pool": None}, "pool is one of solo, prefork, threads, gevent, eventlet, not None."),
        ({"kind": "sleep"}, "kind is one of wait, compute, not 'sleep'."),
        ({"concurrency": 0}, "concurrency is a whole number from 1 to 50, not 0."),
        ({"concurrency": True}, "concurrency is a whole number from 1 to 50, not True."),
        ({"concurrency": 2.0}, "concurrency is a whole number from 1 to 50, not 2.0."),
        ({"tasks": 1000}, "tasks is a whole number from 1 to 100, not 1000."),
        ({"tasks": "10"}, "tasks is a whole number from 1 to 100, not '10'."),
        ({"seconds": float("nan")}, "seconds is a number from 0.05 to 5, not nan."),
        ({"seconds": True}, "seconds is a number from 0.05 to 5, not True."),
        ({"seconds": 5, "kind": "compute"}, "That may take 50 s, and a run has 20: choose fewer or shorter tasks."),
        ({"seconds": 5, "pool": "solo"}, "That may take 50 s, and a run has 20: choose fewer or shorter tasks."),
    ],
)
def test_a_setting_that_cannot_be_used_has_one_clear_line(settings, message):
    experiment = Experiment()
    with pytest.raises(ClassroomError) as raised:
        experiment.run(**settings)
    assert str(raised.value) == message == status(experiment).replace("&#x27;", "'")
    assert experiment.button.description == "Run" and not experiment.runs
    assert not experiment._command.value, "no worker was started"


def test_a_click_does_the_same_in_a_thread_and_a_second_run_is_refused(clean, capfd):
    experiment = Experiment()
    assert "10 x wait for 0.2 s, on threads with concurrency 4" in status(experiment)
    choose(experiment, pool="solo", kind="compute", tasks=100, seconds=5)
    experiment.button.click()
    experiment.join(10)
    assert status(experiment).startswith("That may take 500 s") and not experiment.runs, "a line, and no traceback"
    choose(experiment, pool="prefork", kind="wait", concurrency=3, tasks=6, seconds=0.5)
    experiment.button.click()
    with pytest.raises(ClassroomError, match=f"^{GOING}$"):  # the click has returned, and the run goes on
        experiment.run()
    experiment.button.click()
    assert status(experiment) == GOING
    with pytest.raises(ClassroomError, match=r"^The run is not over after 0\.01 s\.$"):
        experiment.join(0.01)
    seen = set()
    until(lambda: seen.add(experiment.progress.value) or experiment.runs, "the run is over")
    experiment.join(10)
    [run] = experiment.runs
    assert (run.pool, run.concurrency, run.tasks, run.kind, run.seconds, run.slots) == ("prefork", 3, 6, "wait", 0.5, 3)
    assert 0 in seen and len(seen - {0, 6}) >= 1, "the bar moves"
    assert capfd.readouterr() == ("", ""), "a thread's output would go to some other cell"


def test_a_worker_that_dies_at_its_start_is_said_so_and_the_next_run_works(clean, tmp_path, monkeypatch):
    (tmp_path / "course_tasks.py").write_text("raise SystemExit('a file of your own is in the way')\n")
    experiment = Experiment()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        with pytest.raises(ClassroomError, match=r"^The worker has ended\. Its last line: .*in the way") as raised:
            experiment.run()
    assert "\n" not in str(raised.value) and left(clean) == []
    assert experiment.run(tasks=1).slots == 1


def test_servers_that_are_away_or_go_away_are_said_so(clean, monkeypatch):
    experiment = Experiment()
    for variable, role in (("CELERY_BROKER_URL", "broker"), ("CELERY_RESULT_BACKEND", "backend")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, f"redis://:secret@127.0.0.1:{next(free_ports())}/0")
            with pytest.raises(ClassroomError, match=f"^The {role} does not answer. Run %servers first.$"):
                experiment.run()
            patch.delenv(variable)
            with pytest.raises(ClassroomError, match=f"^The {role} does not answer. Run %servers first.$"):
                experiment.run()
    with monkeypatch.context() as patch:
        with serving(port := next(free_ports())):
            patch.setenv("CELERY_BROKER_URL", f"redis://localhost:{port}/0")
            choose(experiment, **LONG)
            experiment.button.click()
            until(lambda: experiment.progress.value, "a task is done")
        experiment.join(30)
    assert re.fullmatch(r"The run broke off: .*[^.]\. Is %servers still right\?", status(experiment))
    assert experiment.run(tasks=1).slots == 1, "and the next one works"


def test_the_command_pastes_into_a_terminal_and_only_what_nobody_works_on_is_swept(pair):
    experiment = Experiment()
    command = experiment.run(tasks=1).command
    queue = re.search(r"-Q (\S+)", command)[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    worker = subprocess.Popen(
        shlex.split(command),
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    client = Celery(set_as_current=False)
    dead, other = "experiment-dead00", "experiment-other0"  # a killed kernel's, and one at work in another notebook
    try:
        assert any(line.endswith(" ready.\n") for line in worker.stdout)
        threading.Thread(target=worker.stdout.read, daemon=True).start()
        with (
            Redis.from_url(pair.broker, decode_responses=True) as server,
            Redis.from_url(pair.broker, client_name=other) as kernel,
            client.connection_for_write() as connection,
        ):
            kernel.ping()
            for name in (dead, other):  # as kombu writes them: waiting, taken by a worker, and where it listens
                server.lpush(name, "message")
                server.hset("unacked", name, json.dumps([{}, name, name]))
                server.zadd("unacked_index", {name: time.time()})
                server.sadd(f"_kombu.binding.{name}", f"{name}\x06\x16\x06\x16{name}")
                server.sadd(PIDBOX, f"\x06\x16\x06\x16{name}@host.celery.pidbox")
            experiment.run(tasks=1)
            assert [key for key in server.scan_iter() if dead in key] == []
            assert server.hkeys("unacked") == server.zrange("unacked_index", 0, -1) == [other]
            assert not any(dead in member for member in server.smembers(PIDBOX)) and server.llen(other) == 1
            assert server.exists(f"_kombu.binding.{queue}"), "a worker in a terminal has it"
            assert (
                client.send_task("wait", (0.1,), queue=queue, connection=connection).get(timeout=60)["seconds"] == 0.1
            )
    finally:
        worker.kill()
        worker.wait()
        client.backend.result_consumer.stop()
        client.backend.client.connection_pool.disconnect()


# In a kernel


@contextlib.contextmanager
def kernel():
    with kernels.kernel_manager() as manager:
        manager.start_kernel(env=kernels.kernel_environment(), cwd=str(kernels.NOTEBOOKS))
        kernel = Kernel(manager)
        kernel.run("from course_tasks.classroom.experiment import Experiment\nexperiment = Experiment()")
        yield kernel
        kernel.client.stop_channels()


def value(kernel: Kernel, expression: str):
    [output] = [output for output in kernel.run(expression) if "data" in output and "comm_id" not in output]
    return output["data"]["text/plain"]


def click(kernel: Kernel, button: str) -> None:
    """As the browser does."""
    content = {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}}
    kernel.client.shell_channel.send(kernel.client.session.msg("comm_msg", content))


def begin(kernel: Kernel, **settings) -> str:
    """Click, and wait until a task is done; the button's id."""
    kernel.run(f"for name, value in {LONG | settings!r}.items(): experiment.controls[name].value = value")
    click(kernel, button := value(kernel, "experiment.button.model_id").strip("'"))
    until(lambda: value(kernel, "experiment.progress.value") != "0", "a task is done")
    return button


def test_a_kernel_that_ends_in_the_middle_leaves_no_worker(pair):
    with kernel() as running:
        begin(running)
        assert (at_work := workers(pair))
        running.manager.restart_kernel()
        assert psutil.wait_procs(at_work, timeout=60)[1] == []
        running.client.wait_for_ready(timeout=60)
        until(lambda: left(pair) == [], "nothing is left")
        running.run("from course_tasks.classroom.experiment import Experiment\nexperiment = Experiment()")
        begin(running)
        assert (at_work := workers(pair))
        psutil.Process(running.manager.provisioner.process.pid).kill()
        assert psutil.wait_procs(at_work, timeout=60)[1] == []
    Experiment().run(tasks=1)  # clears what a killed kernel could not; its results expire
    found = [each for each in left(pair) if not str(each).startswith("celery-task-meta-")]
    assert found == []


def test_the_kernel_is_free_in_a_run_and_a_click_that_came_too_late_starts_none(clean):
    with kernel() as running:
        button = begin(running, tasks=15)
        assert value(running, "1 + 1") == "2"
        assert "is not over" in running.error("experiment.join(0.01)")
        running.run("experiment.join(60)")
        running.run("experiment.run(tasks=1, seconds=0.5)", wait=False)
        until(lambda: workers(clean), "the second run has begun")
        click(running, button)
        assert value(running, "experiment.join(60); len(experiment.runs)") == "2"
        assert "This click came while a run was in progress" in value(running, "experiment.status.value")
        running.run(f"experiment.run(**{LONG!r})", wait=False)
        until(lambda: workers(clean), "the third run has begun")
        running.manager.interrupt_kernel()
        until(lambda: not workers(clean), "the interrupted run's worker has ended")
        assert value(running, "len(experiment.runs)") == "2"
        assert "The run was interrupted." in value(running, "experiment.status.value")
    until(lambda: left(clean) == [], "the kernel has gone")


def test_a_recorded_notebook_has_a_text_in_the_widgets_place(clean, tmp_path):
    """In a notebook that is opened again, a widget without its kernel would be an error message."""
    title = nbformat.v4.new_markdown_cell("# A title")
    cell = nbformat.v4.new_code_cell("from course_tasks.classroom.experiment import Experiment\nExperiment()")
    nbformat.write(nbformat.v4.new_notebook(cells=[title, cell]), path := tmp_path / "experiment.ipynb")
    assert record.record(path) == [cell.id]
    _, stored = nbformat.read(path, as_version=4).cells
    bundle = stored.outputs[0].data
    assert bundle == {"text/plain": HERE, "text/html": bundle["text/html"]} and HERE in bundle["text/html"]
    assert record.WIDGET in (live := Experiment()._repr_mimebundle_())
    assert compared(stored.outputs[0].data) == compared(live)


def compared(data: dict) -> list:
    """What nbval compares of an output."""
    output = nbformat.v4.new_output("execute_result", data, execution_count=1)
    return record.comparable(nbformat.v4.new_code_cell(outputs=[output]))


def test_nbval_finds_two_runs_alike_but_not_different_ones():
    def shown(pid: int, end: float, **changes) -> list:
        span = {"pid": pid, "thread": "MainThread", "start": 0, "end": end, "delayed": 0, "seconds": 0.2}
        settings: dict = {"pool": "solo", "concurrency": 1, "tasks": 1, "kind": "wait", "seconds": 0.2} | changes
        run = Run(**settings, command="", spans=Spans([span] * settings["tasks"]))
        return compared({"text/plain": repr(run), "text/html": run._repr_html_()})

    assert shown(7, 0.2) == shown(8, 0.3)
    for change in ({"pool": "threads"}, {"concurrency": 2}, {"tasks": 2}, {"kind": "compute"}, {"seconds": 0.3}):
        assert shown(7, 0.2, **change) != shown(7, 0.2), change
