"""Say what this machine has for the course, and what to do about what is missing: `python3 -m course_tasks doctor`.

Standard library only, for it must work before anything is installed. A finding is (mark, what, text); the mark is
"ok", "--" for what is good to know, or "!!" for what is needed and missing, with the remedy in the text.
"""

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from course_tasks import servers
from course_tasks.install import (
    NEEDED_GB,
    NEWEST,
    NO_PIP,
    PYTHON,
    READ_ONLY,
    ROOT,
    VENV,
    can_get_pip,
    is_ready,
    missing,
    read_stamp,
    say,
)

Finding = tuple[str, str, str]


FILES = 256  # that a process must be able to open at once
NAMES = ("course_tasks", "celery", "kombu", "redis", "gevent", "eventlet", "IPython", "jupyterlab", "pytest")


def main() -> int:
    """Print a line for each finding. Returns 1 if something that is needed is missing, else 0."""
    findings = [_python(), *_python_path(), *_obstacles(), _venv(), _server(), *_ports(), _docker(), _disk()]
    for mark, what, text in findings:
        say(f"{mark}  {what:<9}  {text}")
    return int(any(mark == "!!" for mark, *_ in findings))


def obstacle(folder_only: bool) -> str:
    """What keeps JupyterLab and the tests from working on this machine, and the remedy; "" if nothing does.

    Args:
        folder_only: look only for what keeps .venv from being made.
    """
    found = (text for mark, what, text in _obstacles() if mark == "!!" and (what == "folder" or not folder_only))
    return next(found, "")


def _obstacles() -> Iterator[Finding]:
    yield from _folder()
    yield from _home()
    yield from _files()
    yield from _localhost()


def _folder() -> Iterator[Finding]:
    path = str(ROOT)
    for text, found in (
        ("a colon", os.pathsep in path),
        ("the end of a line", "\n" in path),
        ("the name of a variable", os.path.expandvars(path) != path),  # which Jupyter would replace
    ):
        if found:
            yield "!!", "folder", f"The path of this folder contains {text}, {path!r}. Rename it, or move the course"


def _home() -> Iterator[Finding]:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 (which tells no lie where there is none)
    if not home.is_absolute():
        yield "!!", "home", f"{str(home)!r} is no home folder. Set HOME to a folder of your own"
        return
    share = Path("Library") if sys.platform == "darwin" else Path(os.environ.get("XDG_DATA_HOME") or ".local/share")
    data = Path(os.environ.get("JUPYTER_DATA_DIR") or home / share / "jupyter")
    place = home / (os.environ.get("JUPYTER_RUNTIME_DIR") or data)  # it does without the folder of its settings
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        tempfile.TemporaryDirectory(dir=place).cleanup()
    except OSError as error:
        yield "!!", "home", f"Jupyter can't write to {place} ({error.strerror}). Set HOME to a folder of your own"


def _files() -> Iterator[Finding]:
    if (most := allow_files()) < FILES:
        text = f"A program may open only {most} files at once, and the course needs {FILES}"
        yield "!!", "files", f"{text}. Open a new terminal, or have `ulimit -n` raised"


def allow_files() -> int:
    """Let this process, and what it becomes, open as many files at once as it may, up to 1024. Returns how many."""
    import resource  # not on Windows, where the command line ends earlier

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1024 if most == resource.RLIM_INFINITY else min(most, 1024)
    if now != resource.RLIM_INFINITY and now < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return most


def _localhost() -> Iterator[Finding]:
    found = set()
    with contextlib.suppress(OSError):
        found = {address[0] for *_, address in socket.getaddrinfo("localhost", None)}
    if not found & {"127.0.0.1", "::1"}:
        text = "The name localhost doesn't lead to this machine. Add the line `127.0.0.1 localhost` to /etc/hosts"
        yield "!!", "localhost", text


def python_path() -> str:
    """What the user's PYTHONPATH would do to the course; "" if there is none."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    names = [name for name in NAMES if PathFinder.find_spec(name, folders)]
    return f"it has another {' and '.join(names)}" if names else "the course needs nothing from it" if folders else ""


def _python_path() -> Iterator[Finding]:
    if text := python_path():
        yield "--", "PYTHONPATH", f"{os.environ['PYTHONPATH']} is left out: {text}"


def _python() -> Finding:
    text = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info[:2] > NEWEST:
        return "--", "Python", f"{text}. It is newer than the course was tested with"
    return "ok", "Python", text


def _venv() -> Finding:
    if is_ready():
        return "ok", ".venv", "complete"
    if not os.access(ROOT, os.W_OK):
        return "!!", ".venv", READ_ONLY
    if not (PYTHON.exists() or can_get_pip()):
        return "!!", ".venv", NO_PIP
    stamp = read_stamp() or {}
    state = "out of date" if stamp.get("files") else "incomplete" if VENV.exists() else "not there yet"
    if gone := missing(stamp):
        state = f"damaged ({gone[0]} is not there)"
    return "--", ".venv", f"{state}: made when it is needed, or now by `python3 -m course_tasks install`"


def _server() -> Finding:
    try:
        path, version = servers.find_server()
    except servers.ServerError as error:
        return ("!!", "server", str(error)) if is_ready() else ("--", "server", "none yet: one comes with .venv")
    return "ok", "server", f"{version} ({path})"


def _ports() -> Iterator[Finding]:
    if given := servers.given_urls():
        shown = ", ".join(f"{servers.VARIABLES[role]}={servers.without_secrets(url)}" for role, url in given.items())
        try:
            servers.check_given()
            yield "ok", "servers", f"yours: {shown}"
        except servers.ServerError as error:
            yield "!!", "servers", str(error)
        except ImportError:
            yield "--", "servers", f"yours: {shown}. They are tried when .venv is there"
        return
    pair = servers.running()
    others = servers.ports_of_other_clones()
    for role, port in servers.DEFAULT_PORTS.items():
        owner = "another clone's course" if port in others else _owner(port)
        if pair and urlsplit(getattr(pair, role)).port == port:
            yield "ok", f"port {port}", f"the course's {role}, running"
        elif owner:
            yield "--", f"port {port}", f"held by {owner}: the course takes other ports"
        else:
            yield "ok", f"port {port}", f"free for the {role}"


def _owner(port: int) -> str:
    """What listens on a local port, as far as its answer to a PING tells; "" if nothing does."""
    for host in ("127.0.0.1", "::1"):
        try:
            with socket.create_connection((host, port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                answer = connection.recv(100)
        except (TimeoutError, ConnectionResetError):
            answer = b""
        except OSError:
            continue
        return "a Redis that is not the course's" if answer.startswith((b"+PONG", b"-NOAUTH")) else "another program"
    return ""


def _docker() -> Finding:
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except FileNotFoundError:
        return "--", "Docker", "not installed; the course works without"
    except (OSError, subprocess.SubprocessError):
        return "--", "Docker", "installed, but not running; the course works without"
    return "ok", "Docker", done.stdout.strip()


def _disk() -> Finding:
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < NEEDED_GB and not is_ready():
        return "!!", "disk", f"{free:.1f} GB free. Make room: the course needs {NEEDED_GB} GB"
    return "ok", "disk", f"{free:.0f} GB free"
