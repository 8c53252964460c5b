"""The command line: real processes in copies of the clone, with an empty home and without the network.

The copies install one tiny wheel, made here, instead of the course's requirements: a full installation takes a
minute, and CI and `bench` do that one. The last tests run the real thing in the clone itself.
"""

import ast
import base64
import hashlib
import http.server
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import websocket
from jupyter_client import BlockingKernelClient
from redis import AuthenticationError, Redis

from course_tasks import servers
from course_tasks.install import ROOT, VENV
from course_tasks.tests.plugin import free_ports, listens, until

HOST = sys._base_executable  # a Python outside of any virtual environment
LINE = re.compile(r"course_tasks: [^\n]+\n")  # all that a user sees of an error
TINY = {
    "tiny.py": "def main():\n    print('tiny runs')\n",
    "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny-1.0.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
}
READY = "Ready. Next: python3 -m course_tasks lab\n"
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}


def environment(home, **more):
    """The environment of a newcomer: this PATH without our .venv, an empty home, no settings of pytest or of pip."""
    ours = ("CELERY_", "COURSE_", "JUPYTER_", "PIP_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "XDG_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = [entry for entry in kept["PATH"].split(os.pathsep) if Path(entry) != Path(sys.executable).parent]
    return kept | NO_INDEX | {"HOME": str(home), "PATH": os.pathsep.join(path)} | more


class Clone:
    """A copy of the launcher in a directory of its own."""

    def __init__(self, root):
        self.root, self.home = root, root.with_name("home")
        self.home.mkdir()
        root.mkdir()
        self.move(root.name)
        shutil.copy(ROOT / "pyproject.toml", root)
        shutil.copytree(
            ROOT / "course_tasks", root / "course_tasks", ignore=shutil.ignore_patterns("tests", "__pycache__")
        )
        (root / "course_tasks" / "constraints.txt").write_text("")
        self.default_ports(dict(zip(servers.ROLES, free_ports(), strict=False)))  # other tests may hold the usual ones
        with zipfile.ZipFile(root.with_name("tiny-1.0-py3-none-any.whl"), "w") as wheel:
            record = "tiny-1.0.dist-info/RECORD,,\n"
            for name, text in TINY.items():
                digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
                wheel.writestr(name, text)
                record += f"{name},sha256={digest},{len(text)}\n"
            wheel.writestr("tiny-1.0.dist-info/RECORD", record)
        self.require("tiny==1.0")

    def default_ports(self, ports):
        self.ports, module = ports, self.root / "course_tasks" / "servers.py"
        module.write_text(re.sub(r"^DEFAULT_PORTS = .*", f"DEFAULT_PORTS = {ports}", module.read_text(), flags=re.M))

    def require(self, requirement):
        (self.root / "requirements.txt").write_text(f"--find-links ..\n{requirement}\n")

    def move(self, name):
        self.root = self.root.rename(self.root.with_name(name))
        self.venv, self.stamp = self.root / ".venv", self.root / ".venv" / "course.json"

    def start(self, *words, python=HOST, prefix=(), stdout=subprocess.PIPE, **more):
        return subprocess.Popen(
            [*prefix, python, "-m", "course_tasks", *words],
            cwd=self.root, env=environment(self.home, **more), stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def run(self, *words, **more):
        return ended(self.start(*words, **more))

    def works(self):
        """Whether the script that pip put into .venv runs."""
        try:
            return (
                subprocess.check_output([self.venv / "bin" / "tiny"], text=True, stderr=subprocess.DEVNULL)
                == "tiny runs\n"
            )
        except (OSError, subprocess.CalledProcessError):
            return False


def ended(process):
    """(exit code, standard output, standard error) of a process that must end by itself."""
    try:
        out, err = process.communicate(timeout=90)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert "Traceback" not in (out or "") + err
    return process.returncode, out, err


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "clone")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A clone with a complete .venv, made by two first runs at once in a path with spaces and letters that are not
    ASCII, while another virtual environment is active. The tests leave it complete."""
    clone = Clone(tmp_path_factory.mktemp("installed") / "Kurs für Åsa")
    clone.files = {path.name for path in clone.root.iterdir()}
    both = [clone.start("install", VIRTUAL_ENV="/nowhere", LC_ALL="C", PIP_USER="1") for _ in range(2)]
    clone.first_runs = [ended(process) for process in both]
    return clone


# What is said before anything is installed


def test_help_names_every_command_and_installs_nothing(clone):
    from course_tasks.__main__ import COMMANDS

    pages = [clone.run(*words) for words in ([], ["--help"], ["lab", "-h"], ["test", "-x", "--help"])]
    assert [page for page in pages if page != pages[0]] == []
    code, out, err = pages[0]
    assert (code, err) == (0, "")
    assert sorted(re.findall(r"^  ([a-z]+) ", out, re.MULTILINE)) == sorted(COMMANDS)
    assert not clone.venv.exists()


def test_version(clone):
    assert clone.run("--version")[:2] == (0, "course_tasks 0.1.0, Python {}.{}.{}\n".format(*sys.version_info))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["lap"], "There is no command lap. Did you mean lab?"),
        (["xyzzy"], "There is no command xyzzy. The commands are lab, test,"),
        (["install", "--fast"], "install takes no --fast"),
        (["install", "--dev", "--from", "x.zip"], "A file of `pack` is for learners, so install takes --dev or --from"),
        (["doctor", "now"], "doctor takes no now"),
    ],
)
def test_unknown_words_are_refused_in_one_line(clone, words, wanted):
    code, out, err = clone.run(*words)
    assert (code, out) == (2, "")
    assert LINE.fullmatch(err) and wanted in err
    assert not clone.venv.exists()


def old_pythons():
    """Pythons 2.7 and 3.6 to 3.10 on this machine: a path for each minor version."""
    versions = sorted(Path(sys.base_prefix).parent.glob("[23].*/bin/python"))  # where pyenv keeps them
    versions += filter(None, (shutil.which(f"/usr/bin/python{version}") for version in ("2.7", "3.8", "3.9", "3.10")))
    found = {re.search(r"[23]\.\d+", str(path))[0]: str(path) for path in versions}
    return [path for version, path in found.items() if version in ("2.7", "3.6", "3.7", "3.8", "3.9", "3.10")]


@pytest.mark.skipif(not old_pythons(), reason="no Python from 2.7 to 3.10 on this machine")
@pytest.mark.parametrize("words", [["lab"], ["test", "-x"], []])
def test_python_too_old(clone, words):
    bin = clone.home / "bin"
    bin.mkdir()
    for python in old_pythons():
        for newer in (False, True):
            (bin / "python3.12").unlink(missing_ok=True)
            if newer:
                (bin / "python3.12").symlink_to("/bin/true")
            code, out, err = clone.run(*words, python=python, PATH=str(bin))
            assert (code, out) == (1, "")
            hint = "This machine has one: python3.12" if newer else "With one installed: python3.14"
            assert LINE.fullmatch(err) and "The course needs Python 3.11 or newer, and this is " in err
            assert err.endswith(f". {hint} -m course_tasks {' '.join(words) or 'lab'}\n")
    assert not clone.venv.exists()
    ignored = re.findall(r"^\*(\.\w+)", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    assert {path.suffix for path in clone.root.glob("course_tasks/*")} <= {".py", ".txt", "", *ignored}


def test_an_old_python_can_read_what_it_is_told():
    tree = ast.parse((ROOT / "course_tasks" / "__init__.py").read_text(), feature_version=(3, 7))  # ast goes no further
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.JoinedStr, ast.Starred, ast.AnnAssign))]


def test_python_newer_than_tested_is_told_by_the_doctor(clone):
    module = clone.root / "course_tasks" / "install.py"
    module.write_text(re.sub(r"NEWEST = \(3, \d+\)", "NEWEST = (3, 10)", module.read_text()))
    code, out, err = clone.run("doctor")
    assert (code, err) == (0, "")
    assert re.search(r"^--  Python +3\..*newer than the course was tested with$", out, re.MULTILINE)
    assert clone.run("--version")[2] == ""


# What is wrong with the machine


def in_a_mount_namespace(script):
    """The words before a command by which it sees a changed file system."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("only root can change what a process sees of the file system")
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh"]


def assert_refused(clone, what, text, commands=("lab", "test", "servers"), **more):
    """The commands end with one line, which the doctor's finding has as well."""
    code, out, _ = clone.run("doctor", **more)
    found = re.search(rf"^!!  {what} +(.*)$", out, re.MULTILINE)
    assert code == 1 and found and text in found[1], out
    for command in commands:
        assert clone.run(command, **more) == (1, "", f"course_tasks: {found[1]}\n")
    assert not clone.venv.exists()


@pytest.mark.parametrize(("name", "text"), [("a:b", "a colon"), ("a\nb", "the end of"), ("a$HOME", "a variable")])
def test_a_path_that_cannot_be_used_is_refused_in_one_line(clone, name, text):
    clone.move(name)
    assert_refused(clone, "folder", text, ("install", "lab", "test"))


def test_a_path_with_a_dollar_that_starts_no_name_of_a_variable_is_fine(clone):
    clone.move("5$ and $nothing_of_this_name")
    assert clone.run("doctor")[0] == 0


@pytest.mark.parametrize("home", ["/proc", "relative", "/dev/null", "/proc/nowhere/at/all"])
def test_a_home_that_cannot_be_written_is_refused_in_one_line(clone, home):
    assert_refused(clone, "home", "Set HOME to a folder of your own", HOME=home)


@pytest.mark.parametrize("names", [["JUPYTER_DATA_DIR"], ["JUPYTER_RUNTIME_DIR"]])
def test_a_folder_of_jupyters_own_makes_up_for_a_home_that_cannot_be_written(clone, tmp_path, names):
    assert clone.run("doctor", HOME="/proc", **{name: str(tmp_path / name) for name in names})[0] == 0
    assert not [name for name in names if (tmp_path / name).exists()]


def test_an_empty_home_is_as_good_as_none(clone):
    code, out, _ = clone.run("doctor", HOME="")
    assert code == 0 and "home" not in out


@pytest.mark.parametrize(("limit", "refused"), [("-n 64", True), ("-S -n 64", False)])
def test_too_few_open_files_are_refused_in_one_line(clone, limit, refused):
    prefix = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh"]
    if refused:
        assert_refused(clone, "files", "only 64 files at once, and the course needs 256", prefix=prefix)
    else:
        assert clone.run("doctor", prefix=prefix)[0] == 0


def test_a_machine_without_localhost_is_refused_in_one_line(clone, tmp_path):
    (tmp_path / "hosts").write_text("127.0.0.1 another-name\n")
    prefix = in_a_mount_namespace(f"mount --bind {tmp_path}/hosts /etc/hosts")
    knows = [*prefix, HOST, "-c", "import socket; socket.getaddrinfo('localhost', 1)"]
    if subprocess.run(knows, stderr=subprocess.DEVNULL, check=False).returncode == 0:
        pytest.skip("this machine knows localhost without the file")
    assert_refused(clone, "localhost", "Add the line `127.0.0.1 localhost` to /etc/hosts", prefix=prefix)


@pytest.mark.parametrize("words", [["doctor"], ["--help"], ["install"]])
def test_a_reader_that_goes_away_leaves_no_traceback(installed, words):
    ours, theirs = os.pipe()
    os.close(ours)
    process = installed.start(*words, stdout=theirs)
    os.close(theirs)
    assert ended(process) == (1, None, "")


def test_an_output_that_cannot_be_written_is_one_line(installed):
    with Path("/dev/full").open("w") as full:
        code, _, err = ended(installed.start("doctor", stdout=full))
    assert code == 1 and LINE.fullmatch(err) and "No space left" in err


# What the commands do once .venv is there


def test_no_server_program(installed, tmp_path):
    for words in (["servers"], ["lab"]):
        code, out, err = installed.run(*words, PATH=str(tmp_path))
        assert (code, out) == (1, "")
        assert LINE.fullmatch(err) and "Redis or Valkey 6.2" in err
    code, out, err = installed.run("doctor", PATH=str(tmp_path))
    assert (code, err) == (1, "")
    assert re.search(r"^!!  server +.*Redis or Valkey 6.2.*install", out, re.MULTILINE)
    assert re.search(r"^--  Docker +not installed", out, re.MULTILINE)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_servers_holds_the_pair_until_it_is_stopped(installed, end, request, clone):
    server = {"COURSE_REDIS_SERVER": servers.find_server()[0]}
    broker, backend = installed.ports.values()
    process = installed.start("servers", **server)
    request.addfinalizer(process.kill)  # which does nothing once it has ended
    lines = [process.stdout.readline() for _ in range(5)]
    script = lines[3].removeprefix(". ").rstrip()
    assert lines == [
        f"Broker:  redis://localhost:{broker}/0\n",
        f"Backend: redis://localhost:{backend}/0\n",
        "In another terminal, type this line first:\n",
        f". {script}\n",
        "Ctrl-C ends this.\n",
    ]
    url = subprocess.check_output(["sh", "-c", f". {script}; echo $CELERY_BROKER_URL"], text=True).split()[-1]
    with Redis.from_url(url) as client:
        assert client.ping()
    with Redis(port=broker) as client, pytest.raises(AuthenticationError):
        client.ping()
    assert listens(broker) and listens(backend)
    out = installed.run("doctor", **server)[1]
    assert f"ok  port {broker} " in out and out.count("the course's") == 2
    clone.default_ports(installed.ports)
    out = clone.run("doctor", **server)[1]
    assert (
        len(re.findall(r"^--  port \d+ +held by another clone's course: the course takes other ports$", out, re.M)) == 2
    )
    assert process.poll() is None
    process.send_signal(end)
    assert ended(process) == (0, "", "")
    until(lambda: not listens(broker) and not listens(backend), "both servers are gone")


def test_doctor_before_anything_is_installed(clone):
    code, out, err = clone.run("doctor")
    assert (code, err) == (0, "")
    found = re.findall(r"^(ok|--)  (\S+(?: \d+)?)  +\S", out, re.MULTILINE)
    ports = [f"port {port}" for port in clone.ports.values()]
    assert [what for _, what in found] == ["Python", ".venv", "server", *ports, "Docker", "disk"]
    assert ("--", ".venv") in found
    assert not clone.venv.exists()


def test_doctor_says_that_the_servers_are_the_users_and_shows_no_password(clone):
    given = dict.fromkeys(servers.VARIABLES.values(), "redis://:secret@localhost:1/0")
    code, out, err = clone.run("doctor", **given)
    assert (code, err) == (0, "") and "secret" not in out
    assert "--  servers    yours: CELERY_BROKER_URL=redis://localhost:1/0, CELERY_RESULT_BACKEND=redis" in out
    assert "They are tried when .venv is there" in out and "port" not in out


@pytest.mark.parametrize(
    ("speaks", "owner"), [("redis", "a Redis that is not the course's"), ("http", "another program")]
)
def test_doctor_tells_who_holds_a_port(clone, speaks, owner):
    port = clone.ports["backend"]
    with holding(port, speaks, clone.home):
        code, out, err = clone.run("doctor")
    assert (code, err) == (0, "")
    assert re.search(rf"^--  port {port} +held by {owner}: the course takes other ports$", out, re.MULTILINE)


@contextmanager
def holding(port, speaks, directory):
    if speaks == "http":
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), http.server.BaseHTTPRequestHandler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()
        server.server_close()
        return
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen([servers.find_server()[0], *options], stdout=subprocess.DEVNULL) as process:
        until(lambda: listens(port), "the foreign Redis listens")
        yield
        process.terminate()


# The real thing, in the clone itself

real = pytest.mark.skipif(Path(sys.prefix) != VENV, reason="this pytest does not run in the clone's .venv")


def start_real(home, *words, **more):
    more = {"COURSE_MY_NOTEBOOKS": str(home / "my_notebooks")} | more  # not those of whoever runs the tests
    return subprocess.Popen(
        [sys.executable, "-m", "course_tasks", *words],
        cwd=ROOT, env=environment(home, **more), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@real
def test_options_go_to_pytest(tmp_path):
    options = ["--collect-only", "-q", "-k", "old_python_can_read", "course_tasks/tests/test_launcher.py"]
    code, out, err = ended(start_real(tmp_path, "test", *options))
    assert (code, err) == (0, "")
    assert out.startswith("course_tasks/tests/test_launcher.py::test_an_old_python_can_read_what_it_is_told\n")


@real
def test_server_is_one_more_server_in_the_folder_where_it_is_started(tmp_path):
    port = next(free_ports())
    command = [sys.executable, "-m", "course_tasks", "server", "--port", str(port), "--appendonly", "yes"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert any("Ready to accept connections" in line for line in process.stdout)
            assert listens(port) and Path(tmp_path, "appendonlydir").is_dir()
        finally:
            process.terminate()
            process.communicate(timeout=60)
    assert process.returncode == 0


@real
def test_server_says_in_one_line_what_is_missing(tmp_path):
    code, out, err = ended(start_real(tmp_path, "server", COURSE_REDIS_SERVER="/nowhere"))
    assert (code, out) == (1, "")
    assert re.fullmatch(r"course_tasks: The course needs Redis or Valkey 6.2 .* /nowhere .*\n", err)


@real
def test_options_after_dashes_go_to_jupyterlab_even_if_they_are_ours(tmp_path):
    pair = {name: os.environ[name] for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "COURSE_RUNTIME")}
    code, out, err = ended(start_real(tmp_path, "lab", "--", "--help", **pair))
    assert (code, err) == (0, "")
    assert out.startswith("JupyterLab")


@dataclass
class Lab:
    """A running `lab`: what its log says it opens, the user's home, and the port of its own broker."""

    url: str
    opens: str
    token: str
    home: Path
    broker: int

    def get(self, path, data=None):
        """The body of the server's answer; a POST if there is data."""
        headers = {"Authorization": f"token {self.token}"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as answer:
            return answer.read().decode()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab of a user who has Jupyter settings, a shell start-up file and an active venv, and its own pair."""
    home = tmp_path_factory.mktemp("home")
    (home / ".jupyter").mkdir()
    theirs = {home / ".jupyter" / f"jupyter_{name}_config.json" for name in ("server", "lab")}
    for path in theirs:
        path.write_text('{"ServerApp": {"root_dir": "/tmp"}, "LabApp": {"default_url": "/theirs"}}')
    page = home / "more" / "labconfig" / "page_config.json"
    page.parent.mkdir(parents=True)
    page.write_text('{"theirs": "kept"}')
    for name in (".bashrc", ".zshrc"):  # as pyenv and conda do it
        lines = (
            "export PATH=/somewhere/shims:/usr/bin:/bin:$PATH; export THEIRS=sourced; export PYTHONPATH=$HOME/path\n"
        )
        (home / name).write_text(lines)
    (home / "path").mkdir()
    (home / "path" / "celery.py").write_text("raise SystemExit('the other one')\n")
    shell = next(filter(None, map(shutil.which, ("bash", "zsh"))))
    broker, backend = itertools.islice(free_ports(), 2)
    urls = {
        "CELERY_BROKER_URL": f"redis://localhost:{broker}/0",
        "CELERY_RESULT_BACKEND": f"redis://localhost:{backend}/0",
    }
    own = {
        "COURSE_RUNTIME": str(home / "pair"),
        "VIRTUAL_ENV": "/nowhere",
        "SHELL": shell,
        "JUPYTER_CONFIG_PATH": str(home / "more"),
    }
    process, log = start_real(home, "lab", "--no-browser", "--port", "0", **urls, **own), []
    reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")), daemon=True)
    reader.start()
    try:
        found = until(lambda: re.search(r"(http://127\S+:\d+)(/\S*)\?token=(\w+)", "".join(log)), "Lab names its URL")
        until(lambda: listens(urlsplit(found[1]).port), "Lab listens")  # which it does a moment later
        ready = time.monotonic()
        yield Lab(*found.groups(), home, broker)
        assert (time.monotonic() > ready + servers.GRACE + 1) or not time.sleep(servers.GRACE + 1)
        assert listens(broker) and listens(backend), "Lab has lost its hold on the servers"
        process.terminate()
        assert process.wait(30) == 0
        reader.join(10)
        assert "Shutting down" in "".join(log)
        until(lambda: not listens(broker) and not listens(backend), "both servers are gone")
    finally:
        process.kill()
    assert set((home / ".jupyter").iterdir()) == theirs


@real
def test_lab_opens_the_copy_of_chapter_00_with_the_course_as_root(lab):
    assert lab.opens == "/lab/tree/my_notebooks/00_welcome.ipynb"
    assert (lab.home / "my_notebooks" / "07d_across_services.ipynb").exists()
    contents = json.loads(lab.get("/api/contents/"))
    assert {"notebooks", "requirements.txt"} <= {entry["name"] for entry in contents["content"]}


@real
def test_lab_has_the_courses_settings(lab):
    def default(plugin, setting):
        return json.loads(lab.get(f"/lab/api/settings/@jupyterlab/{plugin}"))["schema"]["properties"][setting][
            "default"
        ]

    code = default("notebook-extension:tracker", "codeCellConfig")
    assert code["lineNumbers"] is code["lineWrap"] is True
    assert default("notebook-extension:tracker", "kernelShutdown") is True
    assert default("apputils-extension:themes", "adaptive-theme") is True
    assert default("apputils-extension:notification", "fetchNews") == "false"
    assert default("docmanager-extension:plugin", "defaultViewers") == {"markdown": "Markdown Preview"}
    assert default("docmanager-extension:plugin", "autosaveInterval") == 15
    page = re.search(r'<script id="jupyter-config-data"[^>]*>(.*?)</script>', lab.get("/lab"), re.DOTALL)[1]
    assert json.loads(page)["news"] == {"disabled": True}
    assert json.loads(page)["theirs"] == "kept"


def in_terminal(lab, command, answer):
    """Open a terminal in JupyterLab, type a command, and find its answer in what the terminal has said since."""
    name = json.loads(lab.get("/api/terminals", b""))["name"]
    address = f"{lab.url.replace('http', 'ws')}/terminals/websocket/{name}?token={lab.token}"
    with closing(websocket.create_connection(address, timeout=60)) as terminal:
        terminal.send(json.dumps(["stdin", f"{command}\r"]))
        seen, deadline = "", time.monotonic() + 60
        while not (found := re.search(answer, seen)):
            assert time.monotonic() < deadline, seen  # the terminal goes on saying that it is there
            kind, *text = json.loads(terminal.recv())
            seen += text[0] if kind == "stdout" else ""
    return found


def in_kernel(lab, kernel, code, **expressions):
    """Run code in one of JupyterLab's kernels; the values of expressions after it, as their reprs."""
    client = BlockingKernelClient(connection_file=str(lab.home / f".local/share/jupyter/runtime/kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    try:
        # not wait_for_ready: a kernel that is silent for a second is dead to it, on a busy machine too
        reply = client.execute(code, user_expressions=expressions, reply=True, timeout=60)
    finally:
        client.stop_channels()
    return {name: value["data"]["text/plain"] for name, value in reply["content"]["user_expressions"].items()}


@real
def test_labs_terminal_finds_the_courses_python(lab):
    command = 'echo "<$(command -v celery)|$THEIRS|$CELERY_BROKER_URL>"'
    celery, theirs, url = in_terminal(lab, command, r"<(/[^$|]*)\|(\w*)\|(\S*)>").groups()
    assert (celery, theirs) == (str(VENV / "bin" / "celery"), "sourced")
    assert re.fullmatch(rf"redis://:\w{{32}}@localhost:{lab.broker}/0", url)


@real
def test_labs_terminal_shares_the_database_of_the_notebook_whose_first_cell_ran_last(lab):
    session = {
        "path": "notebooks/05_pools.ipynb",
        "type": "notebook",
        "name": "05_pools.ipynb",
        "kernel": {"name": "python3"},
    }
    kernel = json.loads(lab.get("/api/sessions", json.dumps(session).encode()))["kernel"]["id"]
    told = in_kernel(lab, kernel, SETUP, url="os.environ['CELERY_BROKER_URL']")["url"]
    assert told.endswith("/50'")
    answer = r"(This terminal [^\r\n]*)\r\n[\s\S]*<(redis:[^\s|]*)\|([^>\r\n]*)>"
    said = in_terminal(lab, 'echo "<$CELERY_BROKER_URL|$(command -v celery)>"', answer).groups()
    assert said[0] == "This terminal uses database 50, like the notebook 05_pools."
    assert repr(said[1]) == told
    assert said[2] == str(VENV / "bin" / "celery")


SETUP = "import os\nget_ipython().run_line_magic('load_ext', 'course_tasks.classroom')\n"
SETUP += "get_ipython().run_line_magic('servers', '')"


@real
def test_labs_kernel_finds_the_courses_python(lab):
    kernel = json.loads(lab.get("/api/kernels", b"{}"))["id"]
    found = in_kernel(lab, kernel, "import shutil, sys", celery="shutil.which('celery')", prefix="sys.prefix")
    assert found == {"celery": repr(str(VENV / "bin" / "celery")), "prefix": repr(str(VENV))}


@real
@pytest.mark.parametrize("option", ["--port {}", "--port={}", "--ServerApp.port={}"])
def test_a_port_that_is_taken_is_refused_before_jupyterlab_starts(tmp_path, option):
    with socket.create_server(("127.0.0.1", next(free_ports()))) as taken:
        port = taken.getsockname()[1]
        process = start_real(
            tmp_path, "lab", "--no-browser", *option.format(port).split(), COURSE_RUNTIME=str(tmp_path / "own")
        )
        assert ended(process) == (
            1,
            "",
            f"course_tasks: Port {port} is taken on this machine. Choose another one, for example --port {port + 1}.\n",
        )
    assert not (tmp_path / "own").exists(), "nothing was started"


@real
@pytest.mark.parametrize("value", ["abc", "70000", "-1", "²"])
def test_what_is_no_port_is_refused_in_one_line(tmp_path, value):
    code, out, err = ended(start_real(tmp_path, "lab", f"--port={value}"))
    assert (code, out, err) == (1, "", f"course_tasks: --port takes a number up to 65535, not {value}.\n")


@real
@pytest.mark.parametrize("words", [["--port"], ["--ServerApp.port"], []])
def test_jupyterlab_itself_is_told_not_to_take_another_port_if_one_is_asked_for(tmp_path, words):
    given = [f"{words[0]}={next(free_ports())}"] if words else []
    code, out, _ = ended(start_real(tmp_path, "lab", *given, "--show-config-json"))
    assert code == 0
    server = json.loads(out[out.index("{") :])["ServerApp"]
    assert ("port_retries" in server) == bool(words) and server.get("port_retries", 0) == 0


@real
@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"CELERY_BROKER_URL": "redis://localhost:1"}, "Connection refused"),
        ({"CELERY_RESULT_BACKEND": "{}"}, "CELERY_BROKER_URL (): it is not set, and the other one is"),
        ({"CELERY_BROKER_URL": "amqp://localhost", "CELERY_RESULT_BACKEND": "{}"}, "needs Redis or Valkey"),
        ({"CELERY_BROKER_URL": "{}", "CELERY_RESULT_BACKEND": "redis://:wrong@localhost:1"}, "Connection refused"),
        ({"CELERY_BROKER_URL": "{wrong}", "CELERY_RESULT_BACKEND": "{}"}, "invalid username-password pair"),
        ({"CELERY_BROKER_URL": "{}", "CELERY_RESULT_BACKEND": "{}"}, ""),
    ],
)
def test_doctor_tries_the_servers_that_the_user_gave(tmp_path, given, problem):
    url = os.environ["CELERY_BROKER_URL"]
    wrong = re.sub(r":\w+@", ":wrong@", url)
    given = {name: text.replace("{wrong}", wrong).replace("{}", url) for name, text in given.items()}
    code, out, err = ended(start_real(tmp_path, "doctor", **given))
    found = re.search(r"^(ok|!!)  servers +(.*)$", out, re.MULTILINE)
    assert err == "" and found and urlsplit(url).password not in out and "wrong@" not in out
    assert (code, found[1]) == ((1, "!!") if problem else (0, "ok"))
    assert problem in found[2]


@real
def test_a_package_that_would_shadow_the_courses_is_left_out_and_told(tmp_path):
    other = tmp_path / "path" / "celery"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise SystemExit('the other one')\n")
    (tmp_path / "path" / "redis.py").write_text("raise SystemExit('the other one')\n")
    path = {"PYTHONPATH": str(other.parent), "COURSE_RUNTIME": ""}
    told = f"PYTHONPATH ({other.parent}) is left out: it has another celery and redis.\n"
    code, out, err = ended(start_real(tmp_path, "doctor", **path))
    assert (code, err) == (0, "")
    assert f"--  PYTHONPATH  {other.parent} is left out: it has another celery and redis\n" in out
    options = ["-q", "-n", "0", "-k", "Cell", "notebooks/00_welcome.ipynb"]
    code, out, err = ended(start_real(tmp_path, "test", *options, **path))
    assert (code, err) == (0, f"course_tasks: {told}"), out


@real
def test_labs_terminal_takes_no_packages_from_elsewhere(lab):
    found = in_terminal(
        lab, "echo \"<$(python -c 'import celery; print(celery.__file__)')|$PYTHONPATH>\"", r"<(/.*)\|(.*)>"
    )
    assert found[1].startswith(str(VENV)) and found[2] == ""
