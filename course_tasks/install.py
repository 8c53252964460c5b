"""Make the clone's .venv and keep it current. Standard library only, for this runs before anything is installed.

uv installs in a tenth of pip's time. So pip fetches uv, and uv the rest; where uv can't, pip does it all. Both write to
the terminal themselves.
"""

import ast
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
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
WHEELS = Path(".venv") / "wheels"  # what a file of `pack` is unpacked to: seen from ROOT, for pip splits at spaces
STAMP = VENV / "course.json"  # what .venv was made from; empty while it is half-done
MARK = "celery-course"  # the name by which pyvenv.cfg says that .venv is ours; `python -m venv` overwrites it
PINS = ("requirements.txt", "course_tasks/constraints.txt", "pyproject.toml")
NEEDED_GB = 1
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
NEWEST = (3, 14)  # the newest Python for which every package that is pinned has wheels

NO_PIP = f"This Python has neither ensurepip nor pip. On Debian and Ubuntu: sudo apt install python{VERSION}-venv"
READ_ONLY = f"Can't write to {ROOT}. Clone the course into a folder of your own"

# What a user has told pip about where packages come from, how to get there and which are allowed, with uv's names for
# it. Everything else would install something else or somewhere else (prefix, target, dry-run, no-deps and many more),
# so neither pip nor uv hears of it, nor does uv of its own configuration.
KEPT = {
    "index-url": ["UV_DEFAULT_INDEX"],
    "extra-index-url": ["UV_INDEX"],
    "find-links": ["UV_FIND_LINKS"],
    "no-index": [],
    "constraint": ["UV_CONSTRAINT"],
    "require-hashes": ["UV_REQUIRE_HASHES"],
    "trusted-host": ["UV_INSECURE_HOST"],
    "cert": ["SSL_CERT_FILE"],
    "client-cert": ["SSL_CLIENT_CERT"],
    "proxy": ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"],
    "keyring-provider": [],
    "cache-dir": [],
    "no-cache-dir": [],
    "default-timeout": [],
    "timeout": [],
    "retries": [],
}
# run in .venv, with the pins of requirements.txt
CHECK = """
import importlib, re, sys
from importlib.metadata import packages_distributions, version

wanted = {}
for pin in sys.argv[1:]:
    name, _, pinned = pin.partition("==")
    wanted.setdefault(name, []).append(pinned)
for name, pinned in wanted.items():
    if version(name) not in pinned:
        sys.exit(f"{name} is {version(name)} and not {' or '.join(pinned)}")
for module, owners in packages_distributions().items():
    if module.isidentifier() and wanted.keys() & {re.sub("[-_.]+", "-", name).lower() for name in owners}:
        importlib.import_module(module)
"""


class Problem(Exception):
    """What went wrong and what to do about it: one line for the user."""


def say(text: str) -> None:
    """Print a line at once, because this process may become another one."""
    print(text, flush=True)


def inside_venv() -> bool:
    """Whether this process runs on the Python of the clone's own .venv."""
    return Path(sys.prefix).resolve() == VENV.resolve()


def read_stamp() -> dict | None:
    """The stamp; {} if .venv is half-done, None if there is none."""
    try:
        stamp = json.loads(STAMP.read_text() or "{}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(stamp: dict) -> None:
    """Write the stamp, all of it or nothing."""
    new = STAMP.with_name(f"{STAMP.name}.new")
    new.write_text(json.dumps(stamp))
    new.replace(STAMP)


def complete_stamp(old: dict, dev: bool) -> dict:
    """What the stamp of a complete and current .venv says, given the stamp that it has."""
    python = f"{VERSION} {sys.base_prefix}"
    return {
        "venv": str(VENV),  # its scripts contain this path: a moved clone needs a new one
        "python": old.get("python", python) if inside_venv() else python,
        "dev": dev or old.get("dev", False),
        "files": hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in PINS)).hexdigest(),
        "packages": old.get("packages"),  # what was in site-packages then
    }


def packages() -> set[str]:
    """What is in .venv's site-packages, with the versions, but for what a user may update or remove at will."""
    found = {path.name for path in VENV.glob("lib/python*/site-packages/*")}
    return {name for name in found if name.partition("-")[0] not in ("pip", "setuptools", "uv", "__pycache__")}


def missing(stamp: dict) -> list[str]:
    """What was installed and is no longer there, or has another version by now."""
    return sorted(set(stamp.get("packages") or ()) - packages())


def is_ready(dev: bool = False) -> bool:
    """Whether .venv is complete and current. One made by hand is its owner's care while they work in it."""
    old = read_stamp()
    if old is None:
        return inside_venv() and not dev and importlib.util.find_spec("jupyterlab") is not None
    return PYTHON.exists() and old == complete_stamp(old, dev) and not missing(old)


def can_get_pip() -> bool:
    """Whether pip can be put into a new .venv: as ensurepip or by the host's pip. Debian leaves out both."""
    return any(importlib.util.find_spec(module) for module in ("ensurepip", "pip"))


def install(dev: bool = False, pack: Path | None = None) -> None:
    """Make .venv or bring it up to date; return at once if it is.

    It may be killed at any point, and run twice at once: the stamp is emptied before anything is touched and
    completed when everything is done, and pip and uv hold the lock as well, in case they outlive this process.

    Args:
        dev: also install what contributors use; once there, it is kept current with the rest.
        pack: a file of `pack`, to install from without network.

    Raises:
        Problem: it can't be done; the same command may be run again.
    """
    import fcntl  # not on Windows, where the command line ends earlier

    archive = None
    if pack:  # a file that doesn't fit is worth a word even if nothing is missing
        from course_tasks.pack import opened

        archive = opened(pack)
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
                _install(dev, lock.fileno(), archive)
    except BrokenPipeError:  # nobody reads what is said, which is no fault of .venv's
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Problem(f"{READ_ONLY}.") from None
        raise Problem(f"Installing into {VENV} failed: {error}. Mend that, and run the same command again.") from None


def _install(dev: bool, lock: int, archive: "ZipFile | None") -> None:
    old, started = read_stamp(), time.monotonic()
    new = complete_stamp(old or {}, dev)
    fits = PYTHON.exists() and all((old or {}).get(key) == new[key] for key in ("venv", "python"))
    fresh = _is_ours() and not fits
    if fresh and VENV.is_symlink():
        raise Problem(f".venv is a link to {VENV.resolve()}, which others may use. Remove the link, and try again.")
    if not (fresh or fits):
        _check_made_by_hand()
    VENV.mkdir(exist_ok=True)
    STAMP.write_text("")
    if fresh:
        load = f"from {archive.filename}" if archive else "80 MB to download"
        say(f"Installing what the course needs into .venv: {load}, a minute at most, only this once.")
        _make_empty_venv()
    else:
        say("Bringing .venv up to date.")
    if sys.version_info[:2] > NEWEST:
        say(f"Python {VERSION} is newer than the course was tested with. If this fails, use Python 3.{NEWEST[1]}.")
    shutil.rmtree(ROOT / WHEELS, ignore_errors=True)  # of a run that was killed
    if archive:
        archive.extractall(ROOT / WHEELS)
    if not any(VENV.glob("lib/python*/site-packages/pip/__main__.py")):
        _get_pip(lock)
    there = packages()
    wanted = ["-r", PINS[0], *(["-c", PINS[1], "-e", ".[dev]"] if new["dev"] else [])]
    again = old is not None and not fresh and (not fits or bool(missing(old)))
    try:
        _fill(wanted, again, lock)
    except (Problem, KeyboardInterrupt):
        if packages() == there:  # then nothing has been touched, and the same command need not start from nothing
            if untouched := new if fresh else old:
                write_stamp(untouched | {"files": ""})
            elif old is None:  # it was made by hand
                STAMP.unlink()
        raise
    finally:
        shutil.rmtree(ROOT / WHEELS, ignore_errors=True)
    _check_packages()
    write_stamp(new | {"packages": sorted(packages())})
    say(f"Installed in {time.monotonic() - started:.0f} s.")


def _is_ours() -> bool:
    """Whether .venv may be emptied: there is none, or this command has made it, and nobody another one in its place."""
    if read_stamp() is None:
        return not VENV.exists() or not any(VENV.iterdir())
    try:
        return MARK in (VENV / "pyvenv.cfg").read_text()
    except FileNotFoundError:  # killed while it was being emptied
        return True


def _check_made_by_hand() -> None:
    """Raises Problem if a .venv that was made without this command can't be used: it is not ours to delete."""
    command = [str(PYTHON), "-c", "import sys; print('{}.{}'.format(*sys.version_info))"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if found != VERSION:
        text = f"was made without this command, and not with this Python {VERSION}"
        raise Problem(f"{VENV} {text}. Move it away, and run the same command again.")


def _make_empty_venv() -> None:
    """A new virtual environment, without pip. The stamp stays, so that a kill in the middle is noticed."""
    import venv

    for entry in sorted(VENV.iterdir(), key=lambda entry: entry.name == "pyvenv.cfg"):  # which says whose it is, last
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    venv.EnvBuilder(symlinks=True, prompt=MARK).create(VENV)


def _get_pip(lock: int) -> None:
    """Put pip into .venv: Python's own copy or, where that is left out, by the host's pip."""
    own, host = [PYTHON, "-Im", "ensurepip", "--default-pip"], [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("ensurepip") and not _run(own, lock, dict(os.environ), quiet=True):
        return
    if inside_venv() or not importlib.util.find_spec("pip"):
        raise Problem(f"{NO_PIP}.")
    if _run([*host, "--python", PYTHON, "install", "pip"], lock, settings(host)):
        raise Problem(_advice())


def _fill(wanted: list[str], again: bool, lock: int) -> None:
    """Install into .venv: by uv, else by pip. `again`: also what seems to be there."""
    pip = [PYTHON, "-Im", "pip"]
    environment = settings(pip)
    own = VENV / "bin" / "uv"
    uv = own if own.exists() else shutil.which("uv")
    if not uv:
        say("Fetching uv, which is faster than pip.")
        quick = ["--retries", "0", "--only-binary", ":all:", "--no-deps"]
        _run([*pip, "install", *quick, "-c", PINS[1], "uv"], lock, environment, quiet=True)
    options = ["--reinstall"] if again else []
    if environment.get("PIP_NO_INDEX", "").lower() in ("y", "yes", "t", "true", "on", "1"):  # uv has no variable for it
        options.append("--no-index")
    try:
        failed = _run([uv or own, "pip", "install", "--python", PYTHON, *options, *wanted], lock, environment)
    except OSError:  # there is no uv, or none for this machine
        failed = 1
    if failed:
        say("uv did not do it, so pip does, in a minute or two.")
        # without compiling a fifth faster: what is used gets compiled when it is first imported
        options = ["--force-reinstall"] if again else []
        if _run([*pip, "install", "--no-compile", *options, *wanted], lock, environment):
            raise Problem(_advice())


def settings(pip: list) -> dict[str, str]:
    """The environment for pip and uv: of the user's settings of pip, variables included, only those in KEPT.

    While a file of `pack` is unpacked, none of them: everything comes from there.

    Args:
        pip: the words that start pip.

    Returns:
        The environment, without what would lead Python astray.

    Raises:
        Problem: pip can't read its own configuration.
    """
    left_out = re.compile("PIP_|UV_(?!CACHE_DIR)|PYTHON(PATH|HOME)$")
    found = {name: value for name, value in os.environ.items() if not left_out.match(name)}
    values = {"no-index": "1", "find-links": str(WHEELS)}
    if not (ROOT / WHEELS).exists():
        asks = os.environ | {"_PIP_RUNNING_IN_SUBPROCESS": "1"}  # or the setting `python` would make it another pip
        told = subprocess.run([*pip, "config", "list", "-vvv"], env=asks, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if told.returncode:
            raise Problem("pip can't read its own configuration: see above. Mend that, and run the same command again.")
        sections = ["global", "install", ":env:"]  # the last one wins
        listed = re.findall(r"^(global|install|:env:)\.([\w-]+)=(['\"].*['\"])$", told.stdout, re.MULTILINE)
        listed.sort(key=lambda setting: sections.index(setting[0]))
        values = {name: ast.literal_eval(value).strip() for _, name, value in listed if name in KEPT}
    for name, value in values.items():
        found[f"PIP_{name.upper().replace('-', '_')}"] = value
        found |= {key: ",".join(value.split()) if name == "find-links" else value for key in KEPT[name]}
    found |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    # uv: several indexes as with pip, the system's certificates, and no links, by which an edit would spoil its cache
    return found | {
        "UV_NO_CONFIG": "1",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_SYSTEM_CERTS": "1",
        "UV_LINK_MODE": "copy",
    }


def _run(command: list, lock: int, environment: dict[str, str], quiet: bool = False) -> int:
    """Run a step, which holds the lock as well. Returns its exit code."""
    out = subprocess.DEVNULL if quiet else None
    return subprocess.run(
        command, cwd=ROOT, env=environment, pass_fds=[lock], stdin=subprocess.DEVNULL, stdout=out, stderr=out
    ).returncode


def _advice() -> str:
    """The last line, below what pip has said."""
    if shutil.disk_usage(VENV).free < NEEDED_GB * 0.3e9:
        return f"The disk is full. Make {NEEDED_GB} GB of room, and run the same command again."
    text = "pip failed, and says why above. Mend that, or connect to the network, and run the same command again"
    return f"{text}, or use Python 3.{NEWEST[1]}." if sys.version_info[:2] > NEWEST else f"{text}."


def _check_packages() -> None:
    """Import in .venv what requirements.txt names. Raises Problem if that is not there as it should be."""
    say("Trying to import it all.")
    pins = re.findall(r"^([\w.-]+)(?:\[.*?\])?(==\S+)", (ROOT / PINS[0]).read_text(), re.MULTILINE)
    command = [str(PYTHON), "-I", "-c", CHECK, *map("".join, pins)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise Problem(f".venv is incomplete ({reason}). Run the same command again: it installs everything anew.")
