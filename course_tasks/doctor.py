"""Say what this machine has for the course, and what to do about what is missing: `python3 -m course_tasks doctor`.

Standard library only, for it must work before anything is installed. A finding is (mark, what, text); the mark is
"ok", "--" for what is good to know, or "!!" for what is needed and missing, with the remedy in the text.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

from course_tasks import servers
from course_tasks.install import (
    NEEDED_GB,
    NO_PIP,
    PYTHON,
    READ_ONLY,
    ROOT,
    VENV,
    can_get_pip,
    is_ready,
    read_stamp,
    say,
)

Finding = tuple[str, str, str]


def main() -> int:
    """Print a line for each finding. Returns 1 if something that is needed is missing, else 0."""
    findings = [_python(), _venv(), _server(), *_ports(), _docker(), _disk()]
    for mark, what, text in findings:
        say(f"{mark}  {what:<9}  {text}")
    return int(any(mark == "!!" for mark, *_ in findings))


def _python() -> Finding:
    return "ok", "Python", f"{platform.python_version()} ({sys.executable})"


def _venv() -> Finding:
    if is_ready():
        return "ok", ".venv", "complete"
    if not os.access(ROOT, os.W_OK):
        return "!!", ".venv", READ_ONLY
    if not (PYTHON.exists() or can_get_pip()):
        return "!!", ".venv", NO_PIP
    state = "out of date" if (read_stamp() or {}).get("files") else "incomplete" if VENV.exists() else "not there yet"
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
        yield "--", "servers", f"yours: {shown}. To try them: python3 -m course_tasks servers"
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
