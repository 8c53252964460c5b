"""Installing: real processes in copies of the clone, as in test_launcher, by uv and by pip."""

import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from course_tasks.install import ROOT
from course_tasks.tests import test_launcher
from course_tasks.tests.plugin import free_ports, until
from course_tasks.tests.test_launcher import HOST, LINE, READY, ended, environment

clone, installed = test_launcher.clone, test_launcher.installed
UV = Path(sys.executable).with_name("uv")
AGAIN = "run the same command again.\n"


@pytest.fixture(params=["uv", "pip"])
def by(request, tmp_path):
    """PATH for an installation by uv, and by pip where the only uv can't start."""
    if request.param == "uv" and not UV.exists():
        pytest.skip("uv comes with install --dev")
    bin = tmp_path / "bin"
    bin.mkdir()
    if request.param == "uv":
        (bin / "uv").symlink_to(UV)
    else:
        (bin / "uv").write_bytes(b"\0")
        (bin / "uv").chmod(0o755)
    return {"PATH": f"{bin}:{os.environ['PATH']}"}


def last_line(err):
    """What is said of a failure below what pip and uv have said themselves."""
    return err[err.rstrip().rfind("\n") + 1 :]


def test_two_first_runs_at_once_in_an_odd_path(installed):
    assert [(code, err) for code, _, err in installed.first_runs] == [(0, "")] * 2
    waiting, working = sorted(out for _, out, _ in installed.first_runs)
    assert waiting == f"Another run is installing into .venv just now; waiting for it.\n{READY}"
    assert working.startswith("Installing what the course needs into .venv")
    assert "Successfully installed tiny-1.0" in working and working.endswith(READY)
    assert installed.works()


def test_nothing_to_do_the_second_time(installed):
    stamp = installed.stamp.stat()
    assert installed.run("install") == (0, READY, "")
    assert installed.stamp.stat() == stamp
    assert sorted(path.name for path in installed.root.iterdir()) == sorted(installed.files | {".venv"})


@pytest.mark.parametrize("name", ["requirements.txt", "pyproject.toml", "course_tasks/constraints.txt"])
def test_a_changed_pin_updates_the_venv_in_place(installed, name):
    (installed.venv / "theirs").touch()
    with (installed.root / name).open("a") as pins:
        pins.write("# changed\n")
    code, out, err = installed.run("install")
    assert (code, err) == (0, "")
    assert out.startswith("Bringing .venv up to date.") and out.endswith(READY)
    assert (installed.venv / "theirs").exists() and installed.works()


def test_a_venv_made_by_hand_is_used_or_left_alone(installed):
    python = installed.venv / "bin" / "python"
    (installed.venv / "theirs").touch()
    installed.stamp.unlink()
    python.rename(python.with_name("away"))
    code, out, err = installed.run("install")
    assert (code, out) == (1, "")
    assert LINE.fullmatch(err) and "Move it away" in err

    python.with_name("away").rename(python)
    code, out, err = installed.run("install")
    assert (code, err) == (0, "")
    assert out.startswith("Bringing .venv up to date.")
    assert (installed.venv / "theirs").exists() and installed.works()


def test_a_linked_venv_that_does_not_fit_is_left_alone(clone, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    stamp = '{"venv": "/another/.venv", "python": "3"}'
    (elsewhere / "course.json").write_text(stamp)
    (elsewhere / "lib").mkdir()
    clone.venv.symlink_to(elsewhere)
    code, out, err = clone.run("install")
    assert (code, out) == (1, "") and LINE.fullmatch(err) and "Remove the link" in err
    assert (elsewhere / "lib").exists() and clone.stamp.read_text() == stamp


def test_a_moved_clone_gets_a_new_venv(installed):
    installed.move("anderswo, später")
    assert not installed.works()
    code, out, err = installed.run("install")
    assert (code, err) == (0, "")
    assert out.startswith("Installing what the course needs into .venv")
    assert installed.works()


def wait_for_pip(clone, command):
    """Wait until a child of the command is in the middle of putting pip into .venv."""

    def at_work():
        return psutil.Process(command.pid).children() and any(clone.venv.glob("lib/*/site-packages/pip"))

    until(at_work, "pip is being put into .venv")


def test_killed_in_the_middle(clone, request):
    def sweep():
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)

    waiting = "Another run is installing into .venv just now; waiting for it.\n"
    first = clone.start("install")
    request.addfinalizer(sweep)
    wait_for_pip(clone, first)
    os.killpg(first.pid, signal.SIGSTOP)
    first.kill()  # and only that, so what it started holds the lock
    first.communicate()

    second = clone.start("install")
    assert second.stdout.readline() == waiting
    second.send_signal(signal.SIGINT)
    code, _, err = ended(second)
    assert code == 130
    assert LINE.fullmatch(err) and "Nothing needs cleaning up" in err

    third = clone.start("install")
    assert third.stdout.readline() == waiting
    assert clone.stamp.read_text() == ""
    os.killpg(first.pid, signal.SIGKILL)
    code, out, err = ended(third)
    assert (code, err) == (0, "")
    assert out.startswith("Installing what the course needs")
    assert clone.works()


def test_no_network(clone):
    clone.require("celery==5.7.0")
    offline = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": f"http://127.0.0.1:{next(free_ports())}/", "PIP_RETRIES": "1"}
    code, _, err = clone.run("install", **offline)
    assert code == 1
    assert LINE.fullmatch(last_line(err)) and "connect to the network, and run the same command again" in err
    clone.require("tiny==1.0")
    code, out, err = clone.run("install")
    assert (code, err) == (0, "")
    assert out.startswith("Bringing .venv up to date.")
    assert clone.works()


def python_without_ensurepip(place, with_pip):
    """A copy of this Python as Debian ships it: no ensurepip, and pip only if asked for."""
    base, name = Path(sys.base_prefix), "python{}.{}".format(*sys.version_info)
    library = place / "lib" / name
    (library / "site-packages").mkdir(parents=True)
    (place / "bin").mkdir()
    shutil.copy2(base / "bin" / name, place / "bin" / "python3")
    for entry in (base / "lib" / name).iterdir():
        if entry.name not in ("ensurepip", "site-packages", "dist-packages", "sitecustomize.py"):
            (library / entry.name).symlink_to(entry)
    if with_pip:
        pip = list((base / "lib" / name / "site-packages").glob("pip*"))
        if not pip:
            pytest.skip("the Python under this one has no pip")
        for entry in pip:
            (library / "site-packages" / entry.name).symlink_to(entry)
    found = (
        "import sys; from importlib.util import find_spec as f; print(sys.base_prefix, f('ensurepip'), bool(f('pip')))"
    )
    run = subprocess.run(
        [place / "bin" / "python3", "-c", found], capture_output=True, text=True, env=environment(place)
    )
    if run.stdout.split() != [str(place), "None", str(with_pip)]:
        pytest.skip(f"this Python can't be copied without its ensurepip: {run.stdout}{run.stderr}")
    return place / "bin" / "python3"


def test_no_ensurepip_but_a_pip(clone, tmp_path):
    bundled = Path(sys.base_prefix, "lib", "python{}.{}".format(*sys.version_info), "ensurepip", "_bundled")
    if not any(bundled.glob("pip-*.whl")):
        pytest.skip("no wheel of pip on this machine, and the test may not fetch one")
    python = python_without_ensurepip(tmp_path / "host", with_pip=True)
    code, _, err = clone.run("install", python=python, PIP_FIND_LINKS=str(bundled))
    assert (code, err) == (0, "")
    assert clone.works()
    assert next(clone.venv.glob("lib/*/site-packages/pip/__main__.py"))


def test_neither_ensurepip_nor_pip(clone, tmp_path):
    python = python_without_ensurepip(tmp_path / "host", with_pip=False)
    wanted = "sudo apt install python{}.{}-venv".format(*sys.version_info)
    for _ in range(2):
        code, _, err = clone.run("lab", python=python)
        assert code == 1
        assert LINE.fullmatch(err) and wanted in err
    shutil.rmtree(clone.venv)
    code, out, err = clone.run("doctor", python=python)
    assert (code, err) == (1, "")
    assert re.search(rf"^!!  \.venv .*{wanted}", out, re.MULTILINE)


@contextmanager
def read_only(root):
    """Take away the right to write; yields the words before a command by which root is bound by that as well."""
    paths = [root, *root.rglob("*")]
    modes = [path.stat().st_mode for path in paths]
    for path, mode in zip(paths, modes, strict=True):
        path.chmod(mode & ~0o222)
    try:
        yield ["setpriv", "--bounding-set", "-dac_override,-dac_read_search,-fowner"] if os.geteuid() == 0 else []
    finally:
        for path, mode in zip(paths, modes, strict=True):
            path.chmod(mode)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can write everywhere")
def test_read_only_clone(clone):
    with read_only(clone.root) as prefix:
        for words in (["install"], ["lab"]):
            code, out, err = clone.run(*words, prefix=prefix)
            assert (code, out) == (1, "")
            assert LINE.fullmatch(err) and "Clone the course into a folder of your own" in err
        code, out, err = clone.run("doctor", prefix=prefix)
        assert (code, err) == (1, "")
        assert re.search(r"^!!  \.venv .*Clone the course", out, re.MULTILINE)
    assert not clone.venv.exists()


# What has to hold whichever of the two installs


def test_the_installers_own_words_are_shown(clone, by, request):
    code, out, err = clone.run("install", **by)
    assert code == 0 and out.endswith(READY) and clone.works()
    assert ("+ tiny==1.0" in err) == ("[uv]" in request.node.name)
    assert ("Successfully installed tiny-1.0" in out) == ("[pip]" in request.node.name)


def test_a_failure_ends_with_one_line_and_leaves_what_was_there(installed, by):
    try:
        installed.require("tiny==2.0")
        for _ in range(2):
            code, _, err = installed.run("install", **by)
            assert code == 1
            assert "tiny==2.0" in err.removesuffix(last_line(err))
            assert LINE.fullmatch(last_line(err)) and last_line(err).endswith(AGAIN)
            assert installed.works()
    finally:
        installed.require("tiny==1.0")
        code, out, _ = installed.run("install", **by)
    assert (code, out.splitlines()[0]) == (0, "Bringing .venv up to date.")


ASTRAY = {
    "prefix": "{}",
    "target": "{}",
    "root": "{}",
    "python": "{}/python",
    "src": "{}",
    "report": "{}/report",
    "platform": "win32",
    "dry-run": "1",
    "user": "1",
    "no-deps": "1",
    "no-binary": ":all:",
    "only-binary": ":all:",
    "ignore-installed": "1",
    "require-virtualenv": "1",
    "no-build-isolation": "0",
    "quiet": "3",
    "upgrade": "1",
}
UV_ASTRAY = {
    "UV_TARGET": "{}",
    "UV_PREFIX": "{}",
    "UV_PYTHON": "/nowhere",
    "UV_WORKING_DIR": "/",
    "UV_DRY_RUN": "1",
    "UV_OFFLINE": "1",
    "UV_NO_BUILD": "1",
    "UV_SYSTEM_PYTHON": "1",
    "UV_REQUIRE_HASHES": "1",
    "UV_EXCLUDE_NEWER": "2020-01-01",
}


def told_to_pip(settings, clone, by_file):
    """The environment in which pip is told these settings, by variables or by a pip.conf."""
    if not by_file:
        return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in settings.items()}
    lines = "".join(f"{name} = {value}\n" for name, value in settings.items())
    conf = clone.home / ".config" / "pip" / "pip.conf"
    conf.parent.mkdir(parents=True, exist_ok=True)
    conf.write_text(f"[global]\n{lines}[install]\n{lines}")
    return {"PIP_CONFIG_FILE": ""}


@pytest.mark.parametrize("by_file", [False, True])
def test_settings_of_pip_and_uv_lead_nothing_astray(clone, by, by_file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    settings = told_to_pip({name: text.format(elsewhere) for name, text in ASTRAY.items()}, clone, by_file)
    uv = {name: text.format(elsewhere) for name, text in UV_ASTRAY.items()}
    toml = clone.home / ".config" / "uv" / "uv.toml"
    toml.parent.mkdir(parents=True)
    toml.write_text(f"[pip]\ntarget = '{elsewhere}'\nno-deps = true\n")
    code, out, err = clone.run("install", **by, **uv, **settings)
    assert code == 0 and out.endswith(READY), err
    assert clone.works() and not elsewhere.exists()


@contextmanager
def index(folder):
    """An index with the wheels of a folder; yields its URL and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.strip("/").split("/")[-1]
            wheels = [path.name for path in folder.glob("*.whl")]
            found = [wheel for wheel in wheels if wheel.startswith(f"{name}-")]
            page = "".join(f'<a href="/wheels/{wheel}">{wheel}</a>' for wheel in found).encode()
            body = (folder / name).read_bytes() if name in wheels else page
            self.send_response(200 if found or name in wheels else 404)
            self.send_header("Content-Type", "text/html" if found else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/simple/", asked
    finally:
        server.shutdown()
        server.server_close()


def uninstall(clone):
    subprocess.run([clone.venv / "bin" / "python", "-m", "pip", "uninstall", "-qy", "tiny"], check=True)


def test_where_packages_come_from_is_as_pip_knows_it(clone, by, tmp_path, request):
    (clone.root / "requirements.txt").write_text("tiny==1.0\n")
    folder = tmp_path / "wheels"
    folder.mkdir()
    clone.root.with_name("tiny-1.0-py3-none-any.whl").rename(folder / "tiny-1.0-py3-none-any.whl")
    with index(folder) as (url, asked):
        nothing, nowhere = url.replace("/simple/", "/nothing/"), "http://nowhere.invalid/simple/"
        for settings, by_file in (
            ({"index-url": url}, False),
            ({"index-url": nothing, "extra-index-url": f"{nothing} {url}"}, True),
            ({"no-index": "true", "index-url": nothing, "find-links": f"{tmp_path} {url}tiny/"}, True),
            ({"index-url": nowhere, "trusted-host": "nowhere.invalid", "proxy": url.removesuffix("/simple/")}, False),
        ):
            asked.clear()
            # where pip's file says no-index, a variable that is empty would have the last word
            more = {} if "no-index" in settings else {"PIP_NO_INDEX": ""}
            more |= told_to_pip(settings, clone, by_file)
            code, out, err = clone.run("install", **by, **more)
            assert code == 0 and clone.works(), err
            assert ("so pip does" in out) == ("[pip]" in request.node.name), err
            assert asked and ("no-index" not in settings or not any("nothing" in path for path in asked))
            uninstall(clone)


def test_a_bad_set_up_shows_the_installers_reason_and_ends_with_one_line(clone, by):
    (clone.root / "requirements.txt").write_text("tiny==1.0\n")
    (clone.root / "broken.conf").write_text("this is no configuration\n")
    for bad in (
        {"http_proxy": "garbage", "https_proxy": "garbage", "PIP_NO_INDEX": "", "PIP_RETRIES": "0"},
        {"PIP_FIND_LINKS": "/nowhere"},
        {"PIP_CONSTRAINT": "/nowhere/constraints.txt"},
        {"PIP_REQUIRE_HASHES": "1"},
        {"PIP_CONFIG_FILE": "broken.conf"},
        {"PIP_NO_INPUT": "perhaps"},
    ):
        code, _, err = clone.run("install", **by, **bad)
        line = last_line(err)
        assert code == 1 and LINE.fullmatch(line) and line.endswith(AGAIN), bad
        assert err.removesuffix(line).strip(), bad
    clone.require("tiny==1.0")
    assert clone.run("install", **by)[0] == 0 and clone.works()


# A .venv that is made by hand, and one that is damaged


def made_by_hand(clone):
    """What the usual way leaves, with a file and a package of its owner."""
    subprocess.run([HOST, "-m", "venv", clone.venv], check=True)
    packages = next(clone.venv.glob("lib/python3*/site-packages"))
    theirs = [clone.venv / "theirs", packages / "theirs.py"]
    for path in theirs:
        path.touch()
    return [path.relative_to(clone.venv) for path in theirs]


def stop_when(clone, condition, signal_, **more):
    """Start an installation, and send its processes a signal when a condition holds. It may have ended by then."""
    process = clone.start("install", **more)
    until(lambda: condition() or process.poll() is not None, "the moment to stop it")
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal_)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("first", "end"), [("the usual way", signal.SIGKILL), ("this command, then the usual way", signal.SIGINT)]
)
def test_a_venv_made_by_hand_outlives_kills_at_any_moment(clone, by, first, end):
    if first != "the usual way":
        stop_when(clone, (clone.venv / "pyvenv.cfg").exists, signal.SIGKILL)
        assert clone.stamp.exists()
    theirs = made_by_hand(clone)

    def installing():
        with suppress(psutil.Error):
            return any("install" in child.cmdline() for child in psutil.Process().children(recursive=True))

    for moment in (lambda: True, clone.stamp.exists, lambda: clone.stamp.exists() and installing()):
        stop_when(clone, moment, end, **by)
        assert all((clone.venv / path).exists() for path in theirs)
    for place in ("here", "there"):
        clone.move(place)
        code, out, _ = clone.run("install", **by)
        assert code == 0 and out.startswith("Bringing .venv up to date.") and clone.works()
        assert all((clone.venv / path).exists() for path in theirs)


def test_a_venv_made_by_hand_outlives_a_spoilt_stamp(clone):
    theirs = made_by_hand(clone)
    for spoilt in ("", "{", "[]", '{"files": "", "packages": null}'):
        clone.stamp.write_text(spoilt)
        assert clone.run("install")[0] == 0 and clone.works()
        assert all((clone.venv / path).exists() for path in theirs)


def test_a_damaged_venv_heals(clone, by):
    assert clone.run("install", **by)[0] == 0
    packages = next(clone.venv.glob("lib/python3*/site-packages"))
    (packages / "theirs.py").touch()
    info, other = packages / "tiny-1.0.dist-info", packages / "tiny-0.9.dist-info"

    def another_version():
        info.rename(other)
        (other / "METADATA").write_text((other / "METADATA").read_text().replace("1.0", "0.9"))

    for damage in (
        (packages / "tiny.py").unlink,
        lambda: shutil.rmtree(info),
        lambda: uninstall(clone),
        another_version,
    ):
        damage()
        state = re.search(r"^--  \.venv +damaged \(tiny\S* is not there\)", clone.run("doctor")[1], re.MULTILINE)
        code, out, _ = clone.run("install", **by)
        assert state and code == 0 and out.startswith("Bringing .venv up to date.")
        assert clone.works() and info.exists() and (packages / "theirs.py").exists()
        assert clone.run("install", **by) == (0, READY, "")


def test_a_venv_whose_python_has_gone_is_made_anew(clone):
    assert clone.run("install")[0] == 0
    for python in clone.venv.glob("bin/python*"):
        python.unlink()
        python.symlink_to("/nowhere/python")
    assert clone.run("install")[0] == 0 and clone.works()


def test_what_cannot_be_imported_is_not_complete(clone):
    with zipfile.ZipFile(clone.root.with_name("tiny-1.0-py3-none-any.whl")) as wheel:
        files = {name: wheel.read(name) for name in wheel.namelist() if "RECORD" not in name}
    with zipfile.ZipFile(clone.root.with_name("tiny-2.0-py3-none-any.whl"), "w") as wheel:
        for name, text in files.items():
            text = b"import nowhere" if name == "tiny.py" else text.replace(b"\nVersion: 1.0\n", b"\nVersion: 2.0\n")
            wheel.writestr(name.replace("1.0", "2.0"), text)
        wheel.writestr("tiny-2.0.dist-info/RECORD", "".join(f"{name.replace('1.0', '2.0')},,\n" for name in files))
    clone.require("tiny==2.0")
    code, _, err = clone.run("install")
    assert code == 1 and LINE.fullmatch(last_line(err)) and "No module named 'nowhere'" in err
    assert clone.run("install")[0] == 1, "it is still not complete"
    clone.require("tiny==1.0")
    assert clone.run("install")[0] == 0 and clone.works()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(clone, by):
    clone.venv.mkdir()
    mount = f'mount -t tmpfs -o size=8m tmpfs {shlex.quote(str(clone.venv))} && exec "$@"'
    code, _, err = clone.run("install", prefix=["unshare", "-m", "sh", "-c", mount, "sh"], **by)
    assert code == 1 and LINE.fullmatch(last_line(err)) and "of room" in last_line(err)
    assert clone.run("install", **by)[0] == 0 and clone.works()


def test_requirements_name_what_the_course_imports():
    """All that it imports itself is in requirements.txt or, for contributors' tools, in pyproject.toml."""
    sources = [path.read_text() for path in ROOT.glob("course_tasks/**/*.py")]
    for notebook in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = re.findall(r"^ *(?:import|from) +(\w+)", "\n".join(sources), re.MULTILINE)
    owners = metadata.packages_distributions()
    used = {owner.lower().replace("_", "-") for module in lines for owner in owners.get(module, ())} - {"course-tasks"}
    text = (ROOT / "requirements.txt").read_text()
    listed = set(re.findall(r"^([\w-]+).*==", text, re.MULTILINE))
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    listed |= {re.match(r"[\w-]+", name)[0] for name in dev}
    # a namespace of many packages, of which one needs the others
    assert {name for name in used if not name.startswith("opentelemetry")} <= listed
