"""Make the clone's .venv and keep it current. Standard library only, for this runs before anything is installed."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "course.json"  # what .venv was made from; empty while it is half-done
LOG = VENV / "install.log"  # the output of the last step
PINS = ("requirements.txt", "course_tasks/constraints.txt", "pyproject.toml")
NEEDED_GB = 1
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"

NO_NETWORK = r"Retrying \(|Max retries exceeded|NewConnectionError|ConnectionError|ProxyError|name resolution"
NO_PIP = f"This Python has neither ensurepip nor pip. On Debian and Ubuntu: sudo apt install python{VERSION}-venv"
READ_ONLY = f"Can't write to {ROOT}. Clone the course into a folder of your own"


class Problem(Exception):
    """What went wrong and what to do about it: one line for the user."""


def say(text: str) -> None:
    """Print a line at once, because this process may become another one."""
    print(text, flush=True)


def inside_venv() -> bool:
    """Whether this process runs on the Python of the clone's own .venv."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def read_stamp() -> dict | None:
    """The stamp; {} if it is half-written, None if there is none."""
    try:
        return json.loads(STAMP.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}


def complete_stamp(old: dict, dev: bool) -> dict:
    """What the stamp of a complete and current .venv says, given the stamp that it has."""
    python = f"{VERSION} {sys.base_prefix}"
    return {
        "venv": str(VENV),  # its scripts contain this path: a moved clone needs a new one
        "python": old.get("python", python) if inside_venv() else python,
        "dev": dev or old.get("dev", False),
        "files": hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in PINS)).hexdigest(),
    }


def is_ready(dev: bool = False) -> bool:
    """Whether .venv is complete and current. One made by hand is its owner's care while they work in it."""
    old = read_stamp()
    if old is None:
        return inside_venv() and not dev and importlib.util.find_spec("jupyterlab") is not None
    return PYTHON.exists() and old == complete_stamp(old, dev)


def can_get_pip() -> bool:
    """Whether pip can be put into a new .venv: as ensurepip or by the host's pip. Debian leaves out both."""
    return any(importlib.util.find_spec(module) for module in ("ensurepip", "pip"))


def install(dev: bool = False) -> None:
    """Make .venv or bring it up to date; return at once if it is.

    It may be killed at any point, and run twice at once: the stamp is emptied before anything is touched and
    completed when everything is done, and pip holds the lock as well, in case it outlives this process.

    Args:
        dev: also install what contributors use; once there, it is kept current with the rest.

    Raises:
        Problem: it can't be done; the same command may be run again.
    """
    import fcntl  # not on Windows, where the command line ends earlier

    try:
        if is_ready(dev):
            return
        with (ROOT / "requirements.txt").open("r+") as lock:  # a file that is there anyway; it is not written
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("Another run is installing into .venv just now; waiting for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(dev):
                _install(dev, lock.fileno())
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Problem(f"{READ_ONLY}.") from None
        raise Problem(f"Installing into {VENV} failed: {error}. Mend that, and run the same command again.") from None


def _install(dev: bool, lock: int) -> None:
    old, started = read_stamp(), time.monotonic()
    new = complete_stamp(old or {}, dev)
    if old is None and VENV.is_dir() and any(VENV.iterdir()):
        _check_made_by_hand()
        usable = True
    else:
        usable = old is not None and all(old.get(key) == new[key] for key in ("venv", "python"))
    if not usable and VENV.is_symlink():
        raise Problem(f".venv is a link to {VENV.resolve()}, which others may use. Remove the link, and run this again")
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("{}")
    if usable:
        say("Bringing .venv up to date.")
    else:
        say("Installing what the course needs into .venv: 60 MB to download, a minute or two, only this once.")
        _make_empty_venv()
    if not any(VENV.glob("lib/python*/site-packages/pip/__main__.py")):
        _get_pip(lock)
    command = [PYTHON, "-m", "pip", "install", "-r", PINS[0]]
    if new["dev"]:
        command += ["-c", PINS[1], "-e", ".[dev]"]
    if not sys.dont_write_bytecode:
        command.append("--no-compile")  # a fifth faster: what is used gets compiled when it is first imported
    code, output = _run(command, lock)
    if code:
        if "\nInstalling collected packages" not in output:  # then nothing has been touched
            STAMP.write_text(json.dumps(new | {"files": ""}))
        raise Problem(_explain(output))
    STAMP.write_text(json.dumps(new))
    say(f"Installed in {time.monotonic() - started:.0f} s.")


def _check_made_by_hand() -> None:
    """Raises Problem if a .venv that was made without this command can't be used: it is not ours to delete."""
    command = [str(PYTHON), "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        found = ""
    if found != VERSION:
        text = f"was made without this command, and not with this Python {VERSION}"
        raise Problem(f"{VENV} {text}. Move it away, and run the same command again.")


def _make_empty_venv() -> None:
    """A new virtual environment, without pip. The stamp stays, so that a kill in the middle is noticed."""
    import venv

    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    venv.EnvBuilder(symlinks=True).create(VENV)


def _get_pip(lock: int) -> None:
    """Put pip into .venv: Python's own copy or, where that is left out, by the host's pip."""
    code, output = _run([PYTHON, "-Im", "ensurepip", "--default-pip"], lock)
    if code and not inside_venv() and importlib.util.find_spec("pip"):
        code, output = _run([sys.executable, "-m", "pip", "--python", PYTHON, "install", "pip"], lock)
        if code:
            raise Problem(_explain(output))
    if code:
        raise Problem(f"{NO_PIP}.")


def _run(command: list, lock: int) -> tuple[int, str]:
    """Run a step and show how it goes: a live line on a terminal, plain lines elsewhere.

    Returns its exit code and its output.
    """
    pip = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PIP_PROGRESS_BAR": "off", "PIP_USER": "0"}
    live, width = sys.stdout.isatty(), shutil.get_terminal_size().columns - 1
    started, code, text, shown = time.monotonic(), None, "Preparing", 0
    with LOG.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | pip,
            pass_fds=[lock],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    while code is None:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(0.2)
        output = LOG.read_text(errors="replace")
        steps = re.findall(r"^(?:Collecting|Building|Installing) .*\n", output, re.MULTILINE)
        for step in steps[shown:]:
            text = step.split(" (")[0].strip()
            if step.startswith("Installing collected packages"):
                text = f"Installing {step.count(',') + 1} packages"
            if not live:
                say(f"  {text}")
        shown = len(steps)
        if live:
            line = f"{time.monotonic() - started:4.0f} s  {text}" if code is None else ""
            print("\r\033[K" + line[:width], end="", flush=True)
    return code, output


def _explain(output: str) -> str:
    """One line on why pip failed and what to do, from its output."""
    if re.search(NO_NETWORK, output):
        text = "pip can't reach the package index. Connect to the network, and run the same command again"
    elif "No space left on device" in output:
        text = f"The disk is full. Make {NEEDED_GB} GB of room, and run the same command again"
    else:
        text = "pip failed: " + (re.findall(r"^ERROR: (.*?)\.?$", output, re.MULTILINE) or ["no message"])[-1]
    return f"{text} (pip's output: {LOG})."
