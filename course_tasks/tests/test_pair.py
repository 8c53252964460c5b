"""Several notebooks on one pair: `%servers`, `%stop --everywhere`, and chapters that run at the same time."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from redis import Redis

from course_tasks import servers
from course_tasks.authoring import kernels, record
from course_tasks.install import ROOT
from course_tasks.tests.plugin import cells, free_ports, listens, processes, until
from course_tasks.tests.test_servers import impostor
from course_tasks.tests.test_terminal import Kernel, cell, gone, mark  # noqa: F401

TEN = ["00_welcome", "01_broker", "01b_broker_care", "02_backend", "02b_states", "03_worker", "03b_workers"]
TEN += ["00_welcome", "02_backend", "03_worker"]  # as copies that are open beside the chapters
ROUNDS = 2  # a busy machine may spoil a measurement in one round, and not the same one in each
WORKER = "python -m celery -A course_tasks worker --loglevel=INFO --pool=solo --without-mingle"


@contextlib.contextmanager
def notebook(name=None, loaded=True, cwd=kernels.NOTEBOOKS, **variables):
    """A kernel that Jupyter Server has started for a notebook of this name; None for a variable takes it away."""
    given = kernels.kernel_environment() | variables
    if name is not None:
        given["JPY_SESSION_NAME"] = f"notebooks/{name}.ipynb"
    with kernels.kernel_manager() as manager:
        environment = {variable: value for variable, value in given.items() if value is not None}
        manager.start_kernel(env=environment, cwd=str(cwd))
        kernel = Kernel(manager, loaded)
        try:
            yield kernel
        finally:
            kernel.client.stop_channels()


def password(pair):
    return urlsplit(pair.broker).password


# --- %servers -----------------------------------------------------------------------------------------------


def test_servers_says_which_database_and_how_a_terminal_joins_and_shows_no_password(pair):
    port = {role: urlsplit(getattr(pair, role)).port for role in servers.ROLES}
    with notebook("05_pools") as kernel:
        lines = kernel.text("%servers").splitlines()
        script = Path(os.environ["COURSE_RUNTIME"]) / "50.sh"
        assert lines == [
            f"broker:  redis://localhost:{port['broker']}/50",
            f"backend: redis://localhost:{port['backend']}/50",
            "Database 50 belongs to 05_pools alone.",
            "To use it in a terminal outside JupyterLab, or opened before, type this there:",
            f". {shlex.quote(str(script))}",
        ]
        assert kernel.text("%servers").splitlines() == lines
        [pane] = kernel.run("%%terminal one\necho $CELERY_BROKER_URL $CELERY_RESULT_BACKEND $REDISCLI_AUTH")
        told = pane["data"]["text/plain"].splitlines()[-1].split()
        secret = password(pair)
        assert told == [f"redis://:{secret}@localhost:{port[role]}/50" for role in servers.ROLES] + [secret]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "COURSE_"))}
    outside["PATH"] = "/usr/bin:/bin"  # a login shell's: it knows no .venv
    done = subprocess.check_output(
        ["sh", "-c", f". {shlex.quote(str(script))}; python -c 'from course_tasks.celery import app; "
         "print(app.connection_for_write().virtual_host, app.connection_for_write().connect() is not None)'"],
        env=outside, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.splitlines()[-1] == "50 True"


def test_servers_says_no_more_where_the_name_is_unknown(pair):
    with notebook() as kernel:
        assert len(kernel.text("%servers").splitlines()) == 2
        assert "/0\n" in kernel.text("%servers")
    with notebook() as kernel:  # VS Code tells it in a variable
        kernel.run("__vsc_ipynb_file__ = '/home/you/course/notebooks/06b_prefetch.ipynb'")
        assert "Database 61 belongs to 06b_prefetch alone." in kernel.text("%servers")


def test_a_shell_without_the_password_is_refused_and_the_courses_app_finds_it(pair):
    port = urlsplit(pair.broker).port
    outside = {name: value for name, value in os.environ.items() if not name.startswith("CELERY_")}
    app = "import sys; from celery import Celery; Celery(broker=sys.argv[1]).connection_for_write().connect()"
    done = subprocess.run(
        [sys.executable, "-c", app, f"redis://localhost:{port}/0"], env=outside, capture_output=True, text=True
    )
    assert done.returncode and "uthentication required" in done.stderr  # README's table quotes it
    app = "from course_tasks.celery import app; app.connection_for_write().connect(); print('in')"
    assert subprocess.check_output([sys.executable, "-c", app], env=outside, text=True, cwd=ROOT) == "in\n"


@contextlib.contextmanager
def users_servers(secret="given-secret"):
    """Somebody's server, and the environment of who uses it for both."""
    port = next(free_ports())
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", secret]
    with subprocess.Popen([servers.find_server()[0], *options], stdout=subprocess.DEVNULL) as process:
        until(lambda: listens(port), "the server listens")
        url = f"redis://:{secret}@127.0.0.1:{port}/0"
        try:
            yield {**dict.fromkeys(servers.VARIABLES.values(), url), "COURSE_RUNTIME": None}
        finally:
            process.terminate()


def test_on_the_users_own_servers_workers_that_answer_are_listed_and_those_of_this_clone_can_be_stopped(
    tmp_path, mark  # noqa: F811
):  # fmt: skip
    with users_servers() as given, contextlib.ExitStack() as stack:
        given |= {"XDG_RUNTIME_DIR": str(tmp_path)}
        one = stack.enter_context(notebook("05_pools", **given))
        two = stack.enter_context(notebook("06_concurrency", **given))
        own = {name: value for name, value in (os.environ | given).items() if value is not None}
        own = {name: value for name, value in own.items() if not name.startswith("COURSE_")}
        assert len(one.text("%servers").splitlines()) == 2, "no worker answers yet, and no database is its own"
        one.run(f"%%terminal worker\n{WORKER} -n {mark}-one@%h")
        for _ in range(2):  # of one name, as chapter 00's worker has it everywhere
            stranger = subprocess.Popen(
                [sys.executable, *shlex.split(WORKER)[1:], "-n", f"{mark}-two@%h"],
                env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            stack.callback(stranger.communicate)
            stack.callback(stranger.kill)
            for line in stranger.stderr:
                if " ready." in line:
                    break
        said = two.text("%servers")
        assert re.fullmatch(
            r"broker:  redis://127.0.0.1:\d+/0\nbackend: redis://127.0.0.1:\d+/0\n"
            r"These workers already use this broker, and they may take this notebook's tasks:\n"
            rf"  {mark}-one@\S+: worker of 05_pools\n"
            rf"(?:  {mark}-two@\S+: not from this copy of the course\n){{2}}"
            r"%stop --everywhere stops those that notebooks of this copy of the course have started\.\n",
            said,
        )
        assert f"{mark}-one@" not in one.text("%servers"), "its own workers are no news"
        assert two.text("%stop --everywhere") == "worker of 05_pools: stopped\n"
        assert f"{mark}-one@" not in two.text("%servers")
        assert stranger.poll() is None


@pytest.mark.parametrize("speaks", ["as compose's servers do", "and then is silent"])
def test_a_fake_that_claims_to_be_composes_servers_does_not_go_unnoticed(tmp_path, speaks):
    """Twenty lines of another account are enough for it: the two marks are no secret."""
    ports = dict(zip(servers.ROLES, free_ports(), strict=False))

    def claim(mark):
        def talk(connection):
            connection.settimeout(60)
            while received := connection.recv(4096):
                if b"dbfilename" in received:
                    answers = [b"dbfilename", mark.encode(), b"dir", servers.CONTAINER_DIR.encode()]
                    bulk = [b"$%d\r\n%s\r\n" % (len(word), word) for word in answers]
                    connection.sendall(b"*2\r\n%s%s*2\r\n%s%s+PONG\r\n" % tuple(bulk))
                elif speaks.startswith("as"):
                    connection.sendall(b"+OK\r\n" * received.count(b"*"))

        return talk

    with contextlib.ExitStack() as stack:
        for role, mark in servers.MARKS.items():
            stack.enter_context(impostor(ports[role], claim(mark)))
        nothing = dict.fromkeys([*servers.VARIABLES.values(), "COURSE_RUNTIME"])
        kernel = stack.enter_context(notebook("00_welcome", **nothing, XDG_RUNTIME_DIR=str(tmp_path)))
        kernel.run(f"from course_tasks import servers; servers.DEFAULT_PORTS.update({ports})")
        said = kernel.text("%servers")
        places = [f"redis://localhost:{port}/0" for port in ports.values()]
        assert said == f"broker:  {places[0]}\nbackend: {places[1]}\n{servers.SHARED}\n"


def test_stop_everywhere_is_for_every_kernel_of_this_clone_and_no_other(pair, mark, tmp_path):  # noqa: F811
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(notebook("05_pools"))
        two = stack.enter_context(notebook())
        three = stack.enter_context(notebook("06_concurrency"))
        other = stack.enter_context(notebook("07_ids", COURSE_RUNTIME=str(tmp_path)))
        for kernel in (one, two, three):
            kernel.run("%servers")
        other.run(cell(f"{mark}-other"))
        assert three.text("%stop --everywhere") == "Nothing is running.\n"
        one.run(cell(mark))
        script = f"trap 'exit 0' TERM; echo {mark} ready.; while :; do sleep 0.1; done | cat"  # a pipeline
        two.run(f"%%terminal second\n{script}")
        three.run(cell(mark, "%%terminal third"))
        lines = three.text("%stop --everywhere").splitlines()
        assert lines[0] == "third of this notebook: stopped"
        assert sorted(lines[1:]) == ["one of 05_pools: stopped", "second of another notebook: stopped"]
        assert len(processes(f"{mark}-other")) == 2
        assert one.updated("one: "), "its pane says that it is over"
        assert three.error("%stop --everywhere third") == (
            "%stop --everywhere takes no names: it stops the terminals of all notebooks."
        )
        other.run("%stop")
    assert gone(mark)


def test_a_terminal_that_is_busy_elsewhere_is_said_so(pair, mark):  # noqa: F811
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('{mark} ready.', flush=True); time.sleep(600)"
    with notebook("05_pools") as one, notebook("06_concurrency") as two:
        one.run("%servers")
        one.run(cell(mark, script=deaf))
        [said, error] = two.run("%stop --everywhere --timeout 0.5")
        assert said["text"] == "one of 05_pools: still busy\n"
        assert error["traceback"] == [error["evalue"]] and "%kill in their notebooks" in error["evalue"]
        one.run("%kill one")


def test_a_terminal_of_ones_own_that_is_busy_does_not_hide_how_the_others_ended(pair, mark):  # noqa: F811
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('{mark} ready.', flush=True); time.sleep(600)"
    with notebook("05_pools") as one, notebook("06_concurrency") as two:
        for kernel, script in ((one, cell(mark)), (two, cell(mark, script=deaf))):
            kernel.run("%servers")
            kernel.run(script)
        [said, error] = two.run("%stop --everywhere --timeout 5")
        assert said["text"] == "one of this notebook: still busy\none of 05_pools: stopped\n"
        assert error["traceback"] == [error["evalue"]]
        two.run("%kill one")


def test_the_first_cell_says_that_the_progress_file_was_damaged(tmp_path):
    (tmp_path / "progress.json").write_text("{")
    with notebook("05_pools", COURSE_MY_NOTEBOOKS=str(tmp_path), loaded=False) as kernel:
        assert kernel.text("%load_ext course_tasks.classroom").startswith("Your progress file was damaged. It was")


# --- the first cell -------------------------------------------------------------------------------------------

FIRST_CELL = next(cell.source for cell in cells(kernels.NOTEBOOKS / "00_welcome.ipynb", "code"))
NOT_RUN = "The first cell of this notebook hasn't been run since the kernel started.\n"


def printed(outputs):
    return "".join(output.get("text", "") for output in outputs)


def test_the_first_cell_can_be_run_again_and_leaves_what_runs_alone(pair, mark):  # noqa: F811
    with notebook("05_pools", loaded=False) as kernel:
        once = kernel.text(FIRST_CELL)
        assert once.startswith("broker: ")
        kernel.run(cell(mark))
        for _ in range(2):
            assert kernel.text(FIRST_CELL) == once
        assert kernel.text("%reload_ext course_tasks.classroom\n%tail one") == "(nothing new)\n"
        assert processes(mark)
        assert kernel.text("%stop") == "one: stopped\n"


def test_chapter_00_works_in_vs_code_whose_kernel_begins_in_another_folder(pair, tmp_path):
    place, home = tmp_path / "out of the clone", tmp_path / "home"
    place.mkdir()
    (home / "scratch").mkdir(parents=True)
    with notebook(loaded=False, cwd=home) as kernel:
        kernel.run(f"__vsc_ipynb_file__ = {str(place / '00_welcome.ipynb')!r}")
        moved = f"The kernel was started in {home}. Now it works in {place}, where the notebook is.\n"
        for each in cells(kernels.NOTEBOOKS / "00_welcome.ipynb", "code"):
            outputs = kernel.run(each.source)
            assert not any("ename" in output for output in outputs), outputs
            assert (moved in printed(outputs)) is (each.source == FIRST_CELL)
    assert (place / "scratch/main.py").exists() and not list((home / "scratch").iterdir())


def test_the_first_cell_finds_the_folder_of_a_notebook_or_says_what_to_do(pair, tmp_path):
    where = "import os; print(os.getcwd())"
    with notebook(loaded=False, cwd=ROOT) as kernel:  # as papermill does it
        moved = f"The kernel was started in {ROOT}. Now it works in {kernels.NOTEBOOKS}, where the notebook is.\n"
        assert kernel.text(FIRST_CELL).startswith(moved)
        assert kernel.text(FIRST_CELL).startswith("broker: ")
        assert kernel.text(where) == f"{kernels.NOTEBOOKS}\n"
    with notebook(loaded=False, cwd=tmp_path) as kernel:
        hint = f"A chapter writes files to the folder scratch, and {tmp_path} has none. "
        assert kernel.text(FIRST_CELL).startswith(f"{hint}Run it in the course's notebooks.\n")
    with notebook("my_own", loaded=False, cwd=tmp_path) as kernel:
        assert kernel.text(FIRST_CELL).startswith("broker: ")
        assert not list(tmp_path.iterdir()), "a notebook of the learner's own needs no folder"
    with notebook("00_welcome-Copy1", loaded=False, cwd=tmp_path) as kernel:
        assert kernel.text(FIRST_CELL).startswith("broker: ")
        assert (tmp_path / "scratch").is_dir()
    (tmp_path / "scratch").rmdir()
    (tmp_path / "scratch").touch()
    with notebook("00_welcome", loaded=False, cwd=tmp_path) as kernel:
        said = kernel.error(FIRST_CELL)
        assert said.startswith(
            f"This chapter writes files to the folder {tmp_path}/scratch, which can't be used: File "
        )


@pytest.mark.parametrize(
    "name, code, advised",
    [
        ("05_pools", "%%terminal worker\necho", True),
        ("05_pools", "%stop worker", True),
        ("05_pools", "check('05-1', 1)", True),
        ("05_pools", "client.send_task('add')", True),
        ("05_pools", "%no_such_magic", True),
        ("05_pools", "1 / 0", False),
        ("05_pools", "%cd /no/such/folder", False),
        ("05_pools", "print('not found.')", False),
        ("my_own", "client.send_task('add')", False),
        ("my_own", "%no_such_magic", False),
        ("my_own", "%%no_such_magic\necho", False),
        ("my_own", "%%terminal worker\necho", True),
        ("my_own", "x = %tail worker", True),
        ("my_own", "quiz('05-1', 'a')", True),
        (None, "%servers", True),
        (None, "x", False),
    ],
)
def test_a_cell_that_needs_the_first_one_says_so(name, code, advised):
    with notebook(name, loaded=False) as kernel:
        assert (NOT_RUN in printed(kernel.run(code))) is advised
        assert kernel.text("import sys; print('celery' in sys.modules, 'course_tasks.classroom' in sys.modules)") == (
            "False False\n"
        )
        kernel.run(FIRST_CELL)
        assert NOT_RUN not in printed(kernel.run("no_such_name")) + printed(kernel.run("%%no_such_magic\necho"))


# --- ten at once --------------------------------------------------------------------------------------------


def wrong_cells(number, name, outputs):
    """Run a chapter in a kernel of its own; the ids of the cells that are wrong, and all outputs into `outputs`."""
    stored = nbformat.read(kernels.NOTEBOOKS / f"{name}.ipynb", as_version=4)
    fresh = nbformat.from_dict(stored)
    environment = kernels.kernel_environment() | {"COURSE_RECORDING": "1"}
    environment["JPY_SESSION_NAME"] = f"my_notebooks/{name}.ipynb"
    wrong = {}
    with kernels.kernel_manager() as manager, kernels.workplace() as folder:
        environment["COURSE_MY_NOTEBOOKS"] = folder  # of a learner who is in this chapter
        client = kernels.notebook_client(fresh, manager, resources={"metadata": {"path": folder}})
        with client.setup_kernel(env=environment):
            for index, (old, new) in enumerate(zip(stored.cells, fresh.cells, strict=True)):
                if new.cell_type != "code":
                    continue
                try:
                    record.execute(client, new, index)
                except CellExecutionError as error:
                    wrong[number, new.id] = str(error)[-500:]
                    continue
                outputs.append(json.dumps(new.outputs))
                new.outputs = json.loads(re.sub(r"(localhost:\d+)/\d+", r"\1/0", outputs[-1]))
                if "setup" in new.metadata.get("tags", []):  # it says whose database it is
                    continue
                if (got := record.comparable(new)) != record.comparable(old):
                    wrong[number, new.id] = got
    return wrong


def test_ten_kernels_at_once_on_one_pair_have_no_wrong_cell(pair, request):
    wrong = {}
    owned = {servers._preferred_database(name) for name in TEN}
    others = [number for number in range(servers.DATABASES) if number not in owned and number not in servers.SPARE]
    url = pair.broker.rpartition("/")[0]
    for number in others:  # a worker that reads another notebook's queue takes this
        with Redis.from_url(f"{url}/{number}") as broker:
            broker.lpush("celery", "bait")
    request.addfinalizer(lambda: servers.flush(pair.broker))
    for turn in range(ROUNDS):
        outputs = []
        with ThreadPoolExecutor(len(TEN)) as together:
            found = list(together.map(wrong_cells, range(len(TEN)), TEN, [outputs] * len(TEN)))
        now = {key: value for each in found for key, value in each.items()}
        wrong = {key: value for key, value in now.items() if turn == 0 or key in wrong}
        databases = Counter(re.findall(r"Database (\d+) belongs to", "".join(outputs)))
        assert len(databases) == len(TEN) and set(databases.values()) == {1}
        assert not any(password(pair) in output for output in outputs)
        for number in others:
            with Redis.from_url(f"{url}/{number}") as broker:
                assert broker.lrange("celery", 0, -1) == [b"bait"]
        if not wrong:
            return
    pytest.fail("\n".join(f"{TEN[number]}, {name}: {got}" for (number, name), got in wrong.items()))
