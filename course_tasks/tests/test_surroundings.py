"""The course on other people's machines: proxies, git's settings, other CI."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from course_tasks.authoring import kernels
from course_tasks.install import ROOT
from course_tasks.tests.plugin import free_ports, needed, until

PROXY, SOCKS = "http://127.0.0.1:9", "socks5://127.0.0.1:9"  # where nobody is
PROXIES = {name: PROXY for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
PROXIES |= {"ALL_PROXY": SOCKS, "all_proxy": SOCKS}
UNSET = [*PROXIES, "no_proxy", "NO_PROXY"]


def without_proxies(**more: str) -> dict[str, str]:
    """This environment, with only those settings of proxies that are given."""
    return {name: value for name, value in os.environ.items() if name not in UNSET} | more


def pytest_run(*words, **environment: str) -> subprocess.CompletedProcess:
    """pytest in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "--color=no", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["localhost,127.0.0.1,::1"] * 2),
        ({"no_proxy": "a.example, localhost"}, ["a.example,localhost,127.0.0.1,::1"] * 2),
        ({"NO_PROXY": "a.example"}, ["a.example,localhost,127.0.0.1,::1"] * 2),
        ({"no_proxy": "a", "NO_PROXY": "b"}, ["a,localhost,127.0.0.1,::1", "b,localhost,127.0.0.1,::1"]),
        ({"no_proxy": "*"}, ["*", "None"]),
    ],
)
def test_what_a_user_says_of_proxies_is_kept(tmp_path, given, wanted):
    code = "import os, sys; from course_tasks import servers; servers.private(sys.argv[1])\n"
    code += "print(os.environ.get('no_proxy'), os.environ.get('NO_PROXY'), sep='|')"
    command = [sys.executable, "-c", code, tmp_path / "pair"]
    said = subprocess.check_output(command, env=without_proxies(**given), text=True)
    assert said.strip().split("|") == wanted


def test_the_services_of_07d_answer_in_spite_of_proxies():
    done = pytest_run("-k", "Cell", kernels.NOTEBOOKS / "07d_across_services.ipynb", **without_proxies(**PROXIES))
    assert done.returncode == 0, done.stdout


def newcomer(folder: Path) -> dict[str, str]:
    """What gives `lab` a home, a pair and notebooks of its own."""
    broker, backend = (f"redis://localhost:{port}/0" for port in itertools.islice(free_ports(), 2))
    urls = {"CELERY_BROKER_URL": broker, "CELERY_RESULT_BACKEND": backend}
    folders = {"HOME": "home", "COURSE_RUNTIME": "pair", "COURSE_MY_NOTEBOOKS": "mine"}
    return urls | {name: str(folder / place) for name, place in folders.items()}


@contextlib.contextmanager
def lab(folder: Path, **environment: str):
    """A running `lab` in a home of its own; yields its URL with the token, and its log."""
    command = [sys.executable, "-m", "course_tasks", "lab", "--no-browser", "--port", "0"]
    log: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | newcomer(folder), stderr=subprocess.PIPE, text=True
    ) as process:
        reader = threading.Thread(target=lambda: log.extend(iter(process.stderr.readline, "")), daemon=True)
        reader.start()
        try:
            url = until(lambda: re.search(r"http://127\S+:\d+/\S*\?token=\w+", "".join(log)), "Lab names its URL")
            yield url[0], log
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            reader.join(10)


def test_lab_answers_in_spite_of_proxies(tmp_path):
    with lab(tmp_path, **without_proxies(**PROXIES)) as (url, log):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def answers():
            with contextlib.suppress(OSError):
                return direct.open(url, timeout=60).status

        assert until(answers, "Lab answers") == 200
    assert "Traceback" not in "".join(log), "".join(log)


@pytest.mark.parametrize(
    ("name", "others"),
    [("ALL_PROXY", {}), ("http_proxy", {"ALL_PROXY": SOCKS}), ("HTTPS_PROXY", {"HTTP_PROXY": PROXY})],
)
@pytest.mark.parametrize("value", ["user:secret@proxy.example:3128", "socks4://proxy.example"])
def test_lab_says_in_one_line_what_jupyterlab_can_not_read(tmp_path, name, others, value):
    command = [sys.executable, "-m", "course_tasks", "lab", "--no-browser"]
    environment = without_proxies(**others, **{name: value}, COURSE_RUNTIME=str(tmp_path / "pair"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"course_tasks: JupyterLab can't read {name}\. Write a whole URL [^\n]*\n", done.stderr)
    assert "secret" not in done.stderr and not (tmp_path / "pair").exists()


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of the files that are here, committed or not."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone")
    folder = tmp_path_factory.mktemp("repository")
    listed = subprocess.check_output(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    who = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_clone_has_the_same_bytes_whatever_git_is_told_about_line_ends(repository, tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "-c", "core.autocrlf=true", repository, clone], check=True)
    expected, found = files(repository), files(clone)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert [name for name in found if not name.endswith(".png") and b"\r\n" in found[name]] == []
    for name in (".ci/run", "course_tasks/jupyter/bashrc"):
        subprocess.run(["bash", "-n", clone / name], check=True)


@pytest.mark.parametrize("promised", [False, True])
def test_what_only_contributors_have_is_needed_only_where_ours_is_the_ci(tmp_path, promised):
    """As without the dev extra, on a hosted runner, which sets CI."""
    for module in ("playwright", "check_jsonschema"):
        (tmp_path / f"{module}.py").write_text(f"raise ImportError('No module named {module}')")
    environment = {name: value for name, value in os.environ.items() if name != "COURSE_CI"}
    environment |= {"CI": "true", "PYTHONPATH": str(tmp_path)} | ({"COURSE_CI": "1"} if promised else {})
    words = [
        "-rs",
        "-k",
        "schema or browser",
        "course_tasks/tests/test_compose.py",
        "course_tasks/tests/test_browser.py",
    ]
    done = pytest_run(*words, **environment)
    if promised:
        assert done.returncode and "COURSE_CI is set, but this machine lacks" in done.stdout, done.stdout
        return
    assert re.search(r"SKIPPED .* lacks check_jsonschema: python3 -m course_tasks install --dev", done.stdout)
    assert re.search(r"SKIPPED .* lacks (Chromium|playwright: python3 -m course_tasks install --dev)", done.stdout)
    assert not re.search(r"failed|error|passed", done.stdout.splitlines()[-1])


WORKFLOW, DEPENDABOT = ROOT / ".github" / "workflows" / "test.yml", ROOT / ".github" / "dependabot.yml"
COMMAND = re.compile(r"python3 -m course_tasks [a-z]+")


@pytest.mark.parametrize(("path", "schema"), [(WORKFLOW, "github-workflows"), (DEPENDABOT, "dependabot")])
def test_what_github_reads_keeps_to_its_schema(path, schema):
    needed("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dependabot_finds_the_pins():
    updates = needed("yaml").safe_load(DEPENDABOT.read_text())["updates"]
    [pip] = [update for update in updates if update["package-ecosystem"] == "pip"]
    assert {f"/{folder}".rstrip("/") or "/" for folder in ("", "course_tasks")} == set(pip["directories"])
    assert (ROOT / "requirements.txt").exists() and (ROOT / "course_tasks" / "constraints.txt").exists()


def test_others_start_the_course_with_the_commands_of_readme(tmp_path):
    """The workflow's scripts are run here: the one with `lab` as it is, the one with `test` for one small test."""
    readme = COMMAND.findall((ROOT / "README.md").read_text())
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert set(container) <= {"name", "image", "forwardPorts", "portsAttributes", "postAttachCommand"}
    [job] = needed("yaml").safe_load(WORKFLOW.read_text())["jobs"].values()
    assert [f"3.{minor}" for minor in range(11, 15)] == job["strategy"]["matrix"]["python"]
    lab, tests = (step["run"] for step in job["steps"] if "run" in step)
    for script in (lab, tests, container["postAttachCommand"]):
        [command] = COMMAND.findall(script)
        assert command in readme and command.split()[-1] in ("lab", "test")
    assert tests == "python3 -m course_tasks test"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = without_proxies(PATH=path) | newcomer(tmp_path)
    lab = lab.replace("9001", str(next(free_ports())))
    for script in (lab, f"{tests} -n 0 -k figure_has_a_title course_tasks/tests/test_notebooks.py"):
        command = ["bash", "-e", "-o", "pipefail", "-c", script]  # as GitHub runs it
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
