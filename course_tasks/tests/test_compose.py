"""docker-compose.yml, tested without Docker: its form, its references, and its commands run by the local servers."""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as NotYet

from course_tasks import servers

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docker-compose.yml"
SERVICES = {"broker": "redis-broker", "backend": "redis-backend"}
TIMEOUT = 60  # seconds, far above what anything here takes


def needed(module: str):
    """Import a module of the dev extra; without it skip, except in CI."""
    if os.environ.get("CI") == "true":
        return importlib.import_module(module)
    return pytest.importorskip(module, reason=f"{module} is missing: pip install -e '.[dev]'")


@pytest.fixture(scope="module")
def compose() -> dict:
    return needed("yaml").safe_load(FILE.read_text())


def options(compose: dict, role: str) -> dict[str, str]:
    """The options of a server's command: name to value."""
    program, *words = shlex.split(compose["services"][SERVICES[role]]["command"])
    assert program == "redis-server"
    return dict(zip(words[::2], words[1::2], strict=True))


def test_it_keeps_to_the_schema_of_the_compose_specification():
    needed("check_jsonschema")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", FILE]
    done = subprocess.run(check, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_docker_compose_reads_it():
    docker = shutil.which("docker")
    if not docker or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    config = [docker, "compose", "--file", FILE, "--profile", "workers", "config", "--quiet"]
    done = subprocess.run(config, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_what_it_names_exists(compose):
    services = compose["services"]
    assert services.keys() == {"redis-broker", "redis-backend", "worker"}
    named = set()
    for service in services.values():
        assert service.get("depends_on", {}).keys() <= services.keys()
        assert all("healthcheck" in services[name] for name in service.get("depends_on", {}))
        named |= {volume.partition(":")[0] for volume in service.get("volumes", [])}
    assert named == compose["volumes"].keys()


@pytest.mark.parametrize("role", servers.ROLES)
def test_a_server_is_published_to_this_machine_alone(compose, role):
    service, port = compose["services"][SERVICES[role]], servers.DEFAULT_PORTS[role]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert options(compose, role)["--port"] == str(port)
    assert service["image"] == "redis:8-alpine"


@pytest.mark.parametrize("role", servers.ROLES)
def test_a_server_carries_the_mark_of_the_course(compose, role):
    given = options(compose, role)
    assert (given["--dbfilename"], given["--dir"]) == (servers.MARKS[role], servers.CONTAINER_DIR)


def test_only_the_queue_outlives_its_container(compose):
    broker, backend = (compose["services"][SERVICES[role]] for role in servers.ROLES)
    assert broker["volumes"] == [f"broker:{servers.CONTAINER_DIR}"]
    assert "volumes" not in backend
    assert backend["tmpfs"] == [servers.CONTAINER_DIR]


def test_workers_are_asked_for_and_can_be_many(compose):
    worker = compose["services"]["worker"]
    assert worker["profiles"] == ["workers"]
    assert not {"container_name", "hostname", "ports"} & worker.keys()
    assert " -n " not in worker["command"] and "--hostname" not in worker["command"]
    for role, variable in zip(servers.ROLES, ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"), strict=True):
        assert worker["environment"][variable] == f"redis://{SERVICES[role]}:{servers.DEFAULT_PORTS[role]}/0"


def test_the_workers_image_is_pinned_and_not_roots(compose):
    dockerfile = compose["services"]["worker"]["build"]["dockerfile_inline"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.search(r"^FROM python:3\.(\d+)-slim$", dockerfile, re.M)
    assert project["requires-python"] == ">=3.11" and 11 <= int(python[1]) <= 13
    packages = re.search(r"^RUN pip install --no-cache-dir -c constraints.txt (.+)$", dockerfile, re.M)[1].split()
    constraints = (ROOT / "course_tasks" / "constraints.txt").read_text()
    assert all(re.search(rf"^{package}==", constraints, re.M) for package in packages)
    assert {"celery", "redis", "gevent"} == set(packages)
    assert dockerfile.splitlines()[-1] == "USER nobody"


class Containers:
    """The services' commands, run by this machine's own programs on free ports."""

    def __init__(self, compose: dict, directory: Path):
        self.services = compose["services"]
        self.data = {role: directory / role for role in servers.ROLES}
        for path in self.data.values():
            path.mkdir()
        sockets = [socket.create_server(("127.0.0.1", 0)) for _ in servers.ROLES]
        self.ports = dict(zip(servers.ROLES, [s.getsockname()[1] for s in sockets], strict=True))
        for each in sockets:
            each.close()
        self.app = directory / "app"
        self.running = {}

    def local(self, role: str, text: str) -> str:
        """Put this machine's directory and port for the container's."""
        text = text.replace(servers.CONTAINER_DIR, str(self.data[role]))
        return text.replace(f"{SERVICES[role]}:", "localhost:").replace(
            str(servers.DEFAULT_PORTS[role]), str(self.ports[role])
        )

    def redis(self, role: str) -> Redis:
        return Redis(port=self.ports[role], decode_responses=True)

    def up(self, role: str) -> None:
        """Start a server and wait until it answers."""
        command = shlex.split(self.local(role, self.services[SERVICES[role]]["command"]))
        command[0] = shutil.which("redis-server") or servers.find_server()[0]
        self.running[role] = subprocess.Popen([*command, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + TIMEOUT
        with self.redis(role) as redis:
            while True:
                try:
                    return redis.ping()
                except NotYet:
                    assert self.running[role].poll() is None and time.monotonic() < deadline, command
                    time.sleep(0.02)

    def down(self, name: str) -> None:
        """Stop a process as `docker compose stop` does, by SIGTERM."""
        process = self.running.pop(name)
        process.terminate()
        assert process.wait(TIMEOUT) == 0

    def kill(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()

    def health(self, role: str) -> int:
        """Run the health check and return its exit code."""
        kind, *command = self.services[SERVICES[role]]["healthcheck"]["test"]
        assert kind == "CMD"
        return subprocess.run([self.local(role, word) for word in command], capture_output=True).returncode

    def copy(self) -> None:
        """Copy what the Dockerfile copies to where it copies it."""
        build = self.services["worker"]["build"]
        for line in re.findall(r"^COPY (.+)$", build["dockerfile_inline"], re.M):
            *patterns, target = line.split()
            (self.app / target).mkdir(parents=True, exist_ok=True)
            for pattern in patterns:
                files = list((ROOT / build["context"]).glob(pattern))
                assert files, pattern
                for file in files:
                    shutil.copy(file, self.app / target)

    def environment(self) -> dict[str, str]:
        """The worker's environment, by which a client here can find the same servers."""
        given = self.services["worker"]["environment"]
        mine = {name: value for name, value in os.environ.items() if name != "COURSE_RUNTIME"}
        urls = (given["CELERY_BROKER_URL"], given["CELERY_RESULT_BACKEND"])
        return mine | {
            name: self.local(role, url) for name, role, url in zip(given, servers.ROLES, urls, strict=True)
        }

    def work(self, log: Path) -> None:
        """Start a worker that has nothing of the course but what is in the image."""
        python, *rest = shlex.split(self.services["worker"]["command"])
        assert python == "python"
        with log.open("w") as file:
            self.running["worker"] = subprocess.Popen(
                [sys.executable, *rest], cwd=self.app, env=self.environment(), stdout=file, stderr=file
            )

    def client(self, code: str) -> str:
        """Run a client's code, and return what it prints."""
        command = [sys.executable, "-c", f"from course_tasks.celery import app; {code}"]
        done = subprocess.run(
            command, cwd=self.app, env=self.environment(), capture_output=True, text=True, timeout=TIMEOUT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def containers(compose, tmp_path):
    with contextlib.closing(Containers(compose, tmp_path)) as running:
        yield running
