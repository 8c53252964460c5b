"""docker-compose.yml, tested without Docker: its form, its references, and its commands run by the local servers."""

import contextlib
import itertools
import re
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from redis import Redis
from redis.exceptions import ConnectionError, OutOfMemoryError

from course_tasks import servers
from course_tasks.install import ROOT
from course_tasks.tests.plugin import free_ports, needed

FILE = ROOT / "docker-compose.yml"
SERVICES = {"broker": "redis-broker", "backend": "redis-backend"}
TIMEOUT = 60  # seconds, far above what anything here takes


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


def installed(service: dict) -> dict[str, Distribution]:
    """What the Dockerfile's `pip install` brings, by name, as this environment has it."""
    words = shlex.split(re.search("^RUN (.+)$", service["build"]["dockerfile_inline"], re.M)[1])
    assert words[:-1] == ["pip", "install", "--no-cache-dir", "-c", "constraints.txt"]
    wanted, found = [Requirement(words[-1])], {}
    for requirement in wanted:  # which grows
        found[canonicalize_name(requirement.name)] = package = distribution(requirement.name)
        for needs in map(Requirement, package.requires or []):
            extras = requirement.extras or {""}
            if not needs.marker or any(needs.marker.evaluate({"extra": extra}) for extra in extras):
                wanted += [needs] * (needs not in wanted)
    return found


def test_the_workers_image_is_pinned_and_not_roots(compose):
    worker = compose["services"]["worker"]
    constraints = (ROOT / "course_tasks" / "constraints.txt").read_text()
    packages = installed(worker)
    assert {"celery", "redis", "gevent"} <= packages.keys()
    assert [name for name in packages if not re.search(f"^{name}==", constraints, re.M)] == []
    dockerfile = worker["build"]["dockerfile_inline"]
    assert 11 <= int(re.search(r"^FROM python:3\.(\d+)-slim$", dockerfile, re.M)[1]) <= 13
    assert dockerfile.splitlines()[-1] == "USER nobody"


# From here on this machine's programs run the commands: ports, directory and host names are put in their place.


@pytest.fixture
def services(tmp_path) -> dict:
    """The services, for this machine."""
    broker, backend = itertools.islice(free_ports(), 2)
    new = {"/data": tmp_path, "6379": broker, "6380": backend, "//redis-broker": "//127.0.0.1"}
    new["//redis-backend"] = new["//redis-broker"]
    text = re.sub("|".join(new), lambda found: str(new[found[0]]), FILE.read_text())
    return needed("yaml").safe_load(text)["services"]


@contextlib.contextmanager
def running(command: list, **settings):
    """Run a command; at the end stop it as `docker compose stop` does, with SIGTERM."""
    with subprocess.Popen(command, **settings) as process:
        try:
            yield process
            process.terminate()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()


@contextlib.contextmanager
def server(service: dict):
    """Run a server's command and yield a client of it, once it answers."""
    _, *words = shlex.split(service["command"])
    program = shutil.which("redis-server") or servers.find_server()[0]
    deadline = time.monotonic() + TIMEOUT
    with (
        running([program, *words, "--bind", "127.0.0.1"], stdout=subprocess.DEVNULL) as process,
        Redis("127.0.0.1", int(words[words.index("--port") + 1]), decode_responses=True) as redis,
    ):
        while True:
            with contextlib.suppress(ConnectionError):
                redis.ping()
                break
            assert process.poll() is None and time.monotonic() < deadline, words
            time.sleep(0.02)
        yield redis


def healthy(service: dict) -> bool:
    """Run a health check."""
    kind, *command = service["healthcheck"]["test"]
    assert kind == "CMD"
    return subprocess.run(command, capture_output=True, timeout=TIMEOUT).returncode == 0


def image(service: dict, folder: Path) -> dict:
    """Build what the image holds, and nothing else; return how to run a process in it."""
    packages, app = folder / "packages", folder / "app"
    packages.mkdir()
    for package in installed(service).values():
        for top in {file.parts[0] for file in package.files} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))
    build = service["build"]
    for line in re.findall("^COPY (?:--chmod=644 )?(.+)$", build["dockerfile_inline"], re.M):
        *patterns, target = line.split()
        (app / target).mkdir(parents=True, exist_ok=True)
        for pattern in patterns:
            files = list((ROOT / build["context"]).glob(pattern))
            assert files, f"nothing to copy: {pattern}"
            for file in files:
                shutil.copy(file, app / target)
    return {"cwd": app, "env": service["environment"] | {"PYTHONPATH": str(packages)}}


def fill(redis: Redis) -> None:
    """Write results of a megabyte, each of which lives longer than the one before, to a server of 20 MB."""
    redis.config_set("maxmemory", "20mb")
    for number in range(40):
        redis.set(f"celery-task-meta-{number}", "x" * 1_000_000, ex=1000 + number)


def test_a_full_broker_refuses_and_a_full_backend_drops_what_expires_first(services):
    for role, policy in (("broker", "noeviction"), ("backend", "volatile-ttl")):
        with server(services[SERVICES[role]]) as redis:
            assert redis.config_get("maxmemory-policy") == {"maxmemory-policy": policy}
            assert redis.config_get("maxmemory") != {"maxmemory": "0"}
            redis.lpush("celery", "a message")
            with pytest.raises(OutOfMemoryError) if role == "broker" else contextlib.nullcontext():
                fill(redis)
            assert redis.llen("celery") == 1
            there = [redis.exists(f"celery-task-meta-{number}") for number in (0, 39)]
            assert there == ([1, 0] if role == "broker" else [0, 1])


def test_a_foreign_error_is_not_health(services):
    if not shutil.which("redis-cli"):
        pytest.skip("the health checks need redis-cli")
    for role in servers.ROLES:
        service = services[SERVICES[role]]
        with server(service) as redis:
            assert healthy(service)
            redis.config_set("requirepass", "secret")
            assert not healthy(service)
        assert not healthy(service)


def test_a_queued_task_outlives_the_broker_and_a_result_goes_with_the_backend(services, tmp_path):
    worker = services["worker"]
    settings = image(worker, tmp_path)
    python = [sys.executable, "-S"]  # -S: without this environment's packages
    program, *words = shlex.split(worker["command"])
    assert program == "python"

    def client(code: str) -> str:
        command = [*python, "-c", f"from course_tasks.celery import app; print({code})"]
        return subprocess.check_output(command, **settings, text=True, timeout=TIMEOUT).strip()

    with server(services["redis-backend"]) as results:
        with server(services["redis-broker"]):
            task = client("app.send_task('add', (4, 5)).id")
        with server(services["redis-broker"]) as queue:
            assert queue.llen("celery") == 1
            with running([*python, *words], **settings):
                assert client(f"app.AsyncResult('{task}').get(timeout={TIMEOUT})") == "9"
        assert results.keys() == [f"celery-task-meta-{task}"]
    with server(services["redis-backend"]) as results:
        assert results.keys() == []
