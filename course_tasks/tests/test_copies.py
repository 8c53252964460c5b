"""The working copies: what a learner writes is never lost, whatever happens in the middle.

Real commands in copies of the clone, whose course has two small chapters. They need the standard library alone.
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from course_tasks.authoring import kernels
from course_tasks.install import ROOT
from course_tasks.tests.plugin import until
from course_tasks.tests.test_install import read_only
from course_tasks.tests.test_launcher import HOST, LINE
from course_tasks.tests.test_notebooks import LINK, prose

WRITTEN = "# the learner's own words"
UPDATE = "from course_tasks import copies; print(*copies.update(), sep='\\n', end='')"
# Runs a command, and does something just before its N-th look at the disk. What a learner's program may do then:
# save in place (as JupyterLab does, which empties the file first), in two steps, or by putting a new file in its place.
DISTURBED = """
import atexit, os, signal, sys
from pathlib import Path
left, what, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
mine, saving, own = Path("my_notebooks/00_one.ipynb"), [], Path("saved").read_text()
WATCHED = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.symlink", "fcntl.flock"}

def finish():
    if saving:
        file = saving.pop()
        if what == "twice" and not (mine.exists() and os.path.sameopenfile(file.fileno(), os.open(mine, os.O_RDONLY))):
            mine.write_text(own + "\\n")
        file.write(own)
        file.close()

def disturb(event, args):
    global left
    if event not in WATCHED or "my_notebooks" not in "".join(map(str, args)):
        return
    finish()
    left -= 1
    if left:
        return
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "in place":
        mine.write_text(own)
    elif what in ("in two steps", "twice"):
        saving.append(mine.open("w"))
    elif what == "anew":
        Path("new").write_text(own)
        os.replace("new", mine)
    Path("disturbed").touch()

from course_tasks import __main__, copies
sys.addaudithook(disturb)
atexit.register(finish)
if words:
    sys.exit(__main__.main(words))
print(*copies.update(), sep="\\n", end="")
"""


def notebook(*sources, **metadata):
    """A notebook's text, with a code cell that was run for each source; the first one is markdown."""
    title, *code = sources
    cells = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": title}]
    output = {"output_type": "stream", "name": "stdout", "text": "stored\n"}
    for number, source in enumerate(code, start=1):
        more = {"execution_count": number, "outputs": [output], "source": source}
        cells.append({"cell_type": "code", "id": f"c{number}", "metadata": {}, **more})
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


class Clone:
    """A clone with two chapters."""

    def __init__(self, root):
        self.root, self.mine, self.one = root, root / "my_notebooks", root / "my_notebooks" / "00_one.ipynb"
        ignored = shutil.ignore_patterns("tests", "__pycache__")
        shutil.copytree(ROOT / "course_tasks", root / "course_tasks", ignore=ignored)
        (root / "notebooks" / "figures").mkdir(parents=True)
        self.deliver(1)

    def deliver(self, version):
        """Let the course have this version of its chapters."""
        for number, name in enumerate(["00_one.ipynb", "00b_two.ipynb"]):
            text = notebook(f"# {number}\n", f"version = {version}", "answer = ...")
            (self.root / "notebooks" / name).write_text(text)

    def start(self, *words, prefix=(), **more):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COURSE_")}
        return subprocess.Popen(
            [*prefix, HOST, *words],
            cwd=self.root, env=environment | {"LC_ALL": "C"} | more,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    def run(self, *words, **more):
        """(exit code, standard output, standard error) of a Python command; nobody sees a traceback."""
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=60)
        assert "Traceback" not in out + err
        return process.returncode, out, err

    def update(self, **more):
        code, out, err = self.run("-c", UPDATE, **more)
        assert (code, err) == (0, "")
        return out

    def reset(self, *names, **more):
        return self.run("-m", "course_tasks", "reset", *names, **more)

    def edit(self, name="00_one.ipynb", text=f"answer = 42  {WRITTEN}"):
        """Let the learner answer, and save."""
        path = self.mine / name
        path.write_text(path.read_text().replace("answer = ...", text))
        return path.read_text()

    def holds(self, text):
        """The learner's files that have this text, and no other."""
        return [path for path in self.mine.rglob("*") if path.is_file() and path.read_text() == text]

    def version(self, name="00_one.ipynb"):
        return int(re.search(r"version = (\d+)", (self.mine / name).read_text())[1])

    def check_tidy(self):
        assert list(self.mine.glob(".new*")) == []
        assert [path for path in self.mine.glob("old/*") if not any(path.iterdir())] == []


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "Kurs für Åsa")


def test_a_notebook_of_the_learners_own_beside_the_chapters_is_no_chapter(clone):
    for name in ("00_one_mine.ipynb", "Untitled.ipynb", "v1.2.ipynb", "12monkeys_x.ipynb"):
        (clone.root / "notebooks" / name).write_text("")
    assert clone.update() == ""
    assert sorted(path.name for path in clone.mine.glob("*.ipynb")) == ["00_one.ipynb", "00b_two.ipynb"]
    (clone.mine / ".new-folder").mkdir()
    assert clone.update() == ""


@pytest.fixture
def used(clone):
    """A clone whose copies have been made, and whose course has then got a newer version."""
    assert clone.update() == ""
    clone.deliver(2)
    return clone


def test_the_copies_of_the_course_have_no_outputs_and_all_their_links_work(tmp_path):
    clone = Clone(tmp_path / "clone")
    ignored = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(kernels.NOTEBOOKS, clone.root / "notebooks", dirs_exist_ok=True, ignore=ignored)
    for name in ("README.md", "docker-compose.yml"):
        shutil.copy(ROOT / name, clone.root)
    (clone.root / "notebooks" / "00_one.ipynb").unlink()  # the course has a chapter of that number
    assert clone.update() == clone.update() == ""
    found = sorted(clone.mine.glob("*.ipynb"))
    assert {path.name for path in kernels.NOTEBOOKS.glob("*.ipynb")} < {path.name for path in found}
    links = 0
    for path in found:
        cells = json.loads(path.read_text())["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
        for _, _, target, other in LINK.findall(prose(path)):
            place = (target or other).partition("#")[0]
            if place and not place.startswith("http"):
                links += 1
                assert (path.parent / place).exists(), place
    assert links > 50
    text = (clone.mine / "00_welcome.ipynb").read_text()
    assert text.count('\\"cwd\\": \\"my_notebooks\\"') == 1 and '\\"notebooks\\"' not in text
    assert (clone.mine / "scratch").is_dir() and not (clone.mine / "scratch").is_symlink()
    assert (clone.mine / "figures").readlink() == Path("../notebooks/figures")


def run_and_fold(notebook):
    for cell in notebook["cells"]:
        cell["metadata"]["collapsed"] = True
        cell["source"] = cell["source"].splitlines(keepends=True)
        if cell["cell_type"] == "code":
            cell.update(execution_count=7, outputs=[{"output_type": "stream", "name": "stdout", "text": "mine"}])


def test_a_copy_that_was_only_run_follows_an_update_of_the_course(used):
    copy = json.loads(used.one.read_text())
    run_and_fold(copy)
    used.one.write_text(json.dumps(copy))
    assert used.update() == ""
    assert used.version() == 2 and "mine" not in used.one.read_text()
    assert not (used.mine / "old").exists()
    used.deliver(1)
    assert used.update() == "" and used.version() == 1
    used.check_tidy()


def changed(copy):
    copy["cells"][1]["source"] += " "


def added(copy):
    copy["cells"].append({"cell_type": "markdown", "metadata": {}, "source": ""})


def removed(copy):
    del copy["cells"][2]


def moved(copy):
    copy["cells"].reverse()


def another_type(copy):
    copy["cells"][1]["cell_type"] = "raw"


def not_ours(copy):
    del copy["metadata"]["course_tasks"]


@pytest.mark.parametrize("change", [changed, added, removed, moved, another_type, not_ours])
def test_a_copy_that_was_changed_stays_and_one_line_says_how_to_get_the_newer_one(used, change):
    copy = json.loads(used.one.read_text())
    change(copy)
    used.one.write_text(json.dumps(copy))
    before = used.one.read_text()
    how = "You have changed yours, so it stays. To get the new one and keep yours: python3 -m course_tasks reset 00"
    assert used.update() == f"my_notebooks/00_one.ipynb: there is a newer version. {how}"
    assert used.one.read_text() == before
    assert used.version("00b_two.ipynb") == 2
    if change is not not_ours:
        used.deliver(1)
        assert used.update() == "", "the course has nothing newer"
        assert used.one.read_text() == before


@pytest.mark.parametrize("damaged", ["", "{", '{"cells": 5}', "[" * 100_000, "null", '{"cells": [{}], "metadata": {}}'])
def test_a_damaged_copy_stays_and_reset_keeps_it(used, damaged):
    used.one.write_text(damaged)
    said = used.update()
    assert said.startswith("my_notebooks/00_one.ipynb can't be read as a notebook, so it stays as it is.")
    assert said.endswith("For a fresh one: python3 -m course_tasks reset 00") and "\n" not in said
    assert used.one.read_text() == damaged
    assert used.reset("00")[0] == 0
    assert used.version() == 2 and used.holds(damaged) == [used.mine / "old" / "00_one-1" / "00_one.ipynb"]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_the_place_of_a_copy_stays_and_reset_keeps_it(used, make):
    used.one.unlink()
    make(used.one)
    before = used.one.lstat().st_ino
    assert used.update().startswith("my_notebooks/00_one.ipynb can't be read as a notebook, so it stays as it is.")
    assert used.reset("00")[0] == 0
    assert used.version() == 2 and (used.mine / "old" / "00_one-1" / "00_one.ipynb").lstat().st_ino == before


def test_a_damaged_chapter_of_the_course_is_said_so_and_the_others_are_delivered(used):
    (used.root / "notebooks" / "00_one.ipynb").write_text("<<<<<<<")
    line = "notebooks/00_one.ipynb is damaged. Move it away, and get it again with: git checkout notebooks/00_one.ipynb"
    assert used.update() == line
    assert used.reset("00") == (1, "", f"course_tasks: {line}\n")
    assert (used.version(), used.version("00b_two.ipynb")) == (1, 2)
    used.check_tidy()


def test_the_reference_has_a_copy_for_notes_which_follows_an_update_and_is_never_overwritten(clone):
    original, copy = clone.root / "notebooks" / "reference.md", clone.mine / "reference.md"
    original.write_text("# Terms\n\nAn old row.\n")
    clone.mine.mkdir()
    copy.symlink_to("../notebooks/reference.md")  # as the course had it at first
    assert clone.update() == clone.update() == ""
    assert not copy.is_symlink() and copy.read_text().startswith(original.read_text())
    original.write_text("# Terms\n\nA new row.\n")
    assert clone.update() == "" and "A new row." in copy.read_text() and not (clone.mine / "old").exists()
    delivered = copy.read_text()
    for noted in (f"{WRITTEN}\n{delivered}", f"{delivered}{WRITTEN}\n"):
        copy.write_text(noted)
        assert clone.update() == "" and copy.read_text() == noted, "the course has nothing newer"
    original.write_text("# Terms\n\nThe newest row.\n")
    assert clone.update().startswith("my_notebooks/reference.md: there is a newer version. You have changed yours, so")
    assert copy.read_text() == noted
    assert clone.reset("reference")[0] == 0 and "The newest row." in copy.read_text()
    assert clone.holds(noted) == [clone.mine / "old" / "reference-1" / "reference.md"]
    copy.write_bytes(b"\xff")
    assert clone.update().startswith("my_notebooks/reference.md can't be read as a text, so it stays as it is.")
    assert original.read_text() == "# Terms\n\nThe newest row.\n", "nothing was written to the course's own"
    clone.check_tidy()


def test_a_copy_of_a_chapter_that_is_gone_stays(used):
    (used.root / "notebooks" / "00_one.ipynb").unlink()
    assert used.update() == "" and used.version() == 1


def test_reset_keeps_the_old_copy_under_a_name_that_nothing_has(used):
    one, two = used.edit(), used.edit("00b_two.ipynb")
    others = used.mine / "old" / "00_one-1"
    others.mkdir(parents=True)
    (others / "00_one.ipynb").write_text("somebody else's")
    (used.mine / "old" / "00_one-2").write_text("a file")
    code, out, err = used.reset("00", "my_notebooks/00b_two.ipynb", "00_one")
    assert (code, err) == (0, "")
    end = "If it is open: File > Reload Notebook from Disk.\n"
    fresh = "is a fresh copy now. Your old copy is"
    assert out == (
        f"my_notebooks/00_one.ipynb {fresh} my_notebooks/old/00_one-3/00_one.ipynb. {end}"
        f"my_notebooks/00b_two.ipynb {fresh} my_notebooks/old/00b_two-1/00b_two.ipynb. {end}"
    )
    assert used.holds(one) and used.holds(two)
    assert (others / "00_one.ipynb").read_text() == "somebody else's"
    assert (used.mine / "old" / "00_one-2").read_text() == "a file"
    assert used.version() == used.version("00b_two.ipynb") == 2
    used.one.unlink()
    assert used.reset("00") == (0, "my_notebooks/00_one.ipynb is a fresh copy now.\n", "")


@pytest.mark.parametrize(
    "words, line",
    [
        (["0"], "There is no chapter 0. Did you mean 00?"),
        (["00", "99"], "There is no chapter 99. The chapters are 00, 00b."),
        (["--all"], "There is no chapter --all. The chapters are 00, 00b."),
        ([], "Which chapter? For example: python3 -m course_tasks reset 05"),
    ],
)
def test_reset_of_no_chapter_does_nothing(used, words, line):
    before = used.edit()
    assert used.reset(*words) == (1, "", f"course_tasks: {line}\n")
    assert used.one.read_text() == before and not (used.mine / "old").exists()


def test_what_is_not_a_folder_is_left_alone(clone):
    clone.mine.write_text(WRITTEN)
    assert re.fullmatch(r"Can't bring my_notebooks up to date: Not a directory \(my_notebooks\)\. .*", clone.update())
    code, out, err = clone.reset("00")
    assert (code, out) == (1, "") and LINE.fullmatch(err) and "Not a directory (my_notebooks)" in err
    clone.mine.unlink()
    clone.update()
    mine = clone.edit()
    (clone.mine / "old").write_text(WRITTEN)
    code, out, err = clone.reset("00")
    assert (code, out) == (1, "") and LINE.fullmatch(err) and "my_notebooks/old" in err
    assert clone.one.read_text() == mine and (clone.mine / "old").read_text() == WRITTEN
    clone.check_tidy()


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root can write everywhere")
def test_a_read_only_folder(used):
    mine = used.edit()
    with read_only(used.mine) as prefix:
        said = used.update(prefix=prefix)
        assert re.fullmatch(
            r"Can't bring my_notebooks up to date: Permission denied \(.*\)\. It stays as it was; .*", said
        )
        code, out, err = used.reset("00", prefix=prefix)
        assert (code, out) == (1, "") and LINE.fullmatch(err) and "Permission denied" in err
    assert used.one.read_text() == mine and used.version("00b_two.ipynb") == 1


@contextlib.contextmanager
def full_disk(place):
    """A small file system for a folder, with no byte left in it."""
    files = {path.name: path.read_text() for path in place.glob("*.ipynb")}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True, capture_output=True)
    try:
        for name, text in files.items():
            (place / name).write_text(text)
        with contextlib.suppress(OSError), (place / "junk").open("wb", buffering=0) as junk:
            while junk.write(b"x" * 512):
                pass
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("how", ["a limit", "a full disk"])
def test_no_room_costs_nothing(used, how):
    mine = used.edit()
    prefix, stack = ["prlimit", "--fsize=100"], contextlib.ExitStack()
    if how == "a full disk":
        prefix = []
        try:
            stack.enter_context(full_disk(used.mine))
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("may not mount")
    elif not shutil.which("prlimit"):
        pytest.skip("needs prlimit")
    with stack:
        wanted = "No space left on device" if how == "a full disk" else "File too large"
        assert f"Can't bring my_notebooks up to date: {wanted}" in used.update(prefix=prefix)
        code, out, err = used.reset("00", prefix=prefix)
        assert (code, out) == (1, "") and LINE.fullmatch(err)
        assert wanted in err and "Everything you wrote is still in my_notebooks." in err
        assert used.one.read_text() == mine and used.version("00b_two.ipynb") == 1
        used.check_tidy()


def test_commands_at_the_same_time_wait_for_each_other(used):
    mine = used.edit()
    resets = [used.start("-m", "course_tasks", "reset", "00") for _ in range(6)]
    updates = [used.start("-c", UPDATE) for _ in range(3)]
    for process in [*resets, *updates]:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "") and out.count("\n") <= 1
    kept = sorted(used.mine.glob("old/*/*"))
    assert [path.parent.name for path in kept] == [f"00_one-{number}" for number in range(1, 7)]
    assert len(used.holds(mine)) == 1
    assert used.version() == used.version("00b_two.ipynb") == 2
    used.check_tidy()


def test_a_command_waits_for_one_that_is_in_the_middle(used):
    mine = used.edit()
    (used.root / "saved").write_text("")
    one = used.start("-c", DISTURBED, "8", "stop", "reset", "00")
    until(lambda: psutil.Process(one.pid).status() == psutil.STATUS_STOPPED, "it has stopped in the middle")
    other = used.start("-m", "course_tasks", "reset", "00")
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(1)
    one.send_signal(signal.SIGCONT)
    for process in (one, other):
        assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert used.holds(mine) == [used.mine / "old" / "00_one-1" / "00_one.ipynb"]
    assert (used.mine / "old" / "00_one-2").exists()


def disturb(clone, at, what, *words):
    """Run a command (an update if no words are given) that is disturbed at a step. Returns whether it came to that."""
    code, out, err = clone.run("-c", DISTURBED, str(at), what, *words)
    done = (clone.root / "disturbed").exists() or code == -signal.SIGKILL
    assert code == (-signal.SIGKILL if what == "kill" and done else 0), err
    assert err == "" and out.count("\n") <= 1
    (clone.root / "disturbed").unlink(missing_ok=True)
    return done


def again(clone, edited):
    """The copies as a learner has them, of an older version of the course; returns the text of the first."""
    shutil.rmtree(clone.mine, ignore_errors=True)
    if not (template := clone.root / "template").exists():
        clone.update()
        clone.edit("00b_two.ipynb")
        clone.mine.rename(template)
        clone.deliver(2)
        (clone.root / "saved").write_text(notebook("# mine", WRITTEN))
    shutil.copytree(template, clone.mine, symlinks=True)
    return clone.edit() if edited else clone.one.read_text()


def test_killed_at_any_step_of_an_update_and_repaired_by_the_next(clone):
    for step in range(1, 1000):
        again(clone, edited=False)
        two = (clone.mine / "00b_two.ipynb").read_text()
        killed = disturb(clone, step, "kill")
        assert (clone.mine / "00b_two.ipynb").read_text() == two
        clone.update()
        assert clone.version() == 2 and (clone.mine / "00b_two.ipynb").read_text() == two
        clone.check_tidy()
        if not killed:
            break
    assert step > 12


def test_killed_at_any_step_of_a_reset_and_nothing_is_lost(clone):
    for step in range(1, 1000):
        mine = again(clone, edited=True)
        killed = disturb(clone, step, "kill", "reset", "00")
        assert clone.holds(mine)
        clone.update()
        assert clone.holds(mine) and clone.one.exists()
        clone.check_tidy()
        if not killed:
            break
    assert step > 8


def test_killed_at_any_step_of_the_first_start(clone):
    for step in range(1, 1000):
        shutil.rmtree(clone.mine, ignore_errors=True)
        (clone.root / "saved").write_text("")
        killed = disturb(clone, step, "kill")
        clone.update()
        assert clone.version() == clone.version("00b_two.ipynb") == 1 and (clone.mine / "figures").is_dir()
        clone.check_tidy()
        if not killed:
            break
    assert step > 8


def test_killed_at_any_moment(used):
    """Twenty resets, each killed after a moment between none and what one takes. Each leaves all that was written."""
    took = time.monotonic()
    used.reset("00")
    took = time.monotonic() - took
    texts = set()
    for number in range(20):
        used.update()
        texts.add(used.edit(text=f"answer = {number}"))
        process = used.start("-m", "course_tasks", "reset", "00")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.5, 1.1) * took)
        process.kill()
        process.communicate()
        assert [text for text in texts if not used.holds(text)] == []


@pytest.mark.parametrize("words", [[], ["reset", "00"]], ids=["update", "reset"])
@pytest.mark.parametrize("what", ["in place", "in two steps", "anew", "twice"])
def test_what_is_saved_in_the_middle_is_not_lost(clone, what, words):
    for step in range(1, 1000):
        text = again(clone, edited=bool(words))
        saved = (clone.root / "saved").read_text()
        done = disturb(clone, step, what, *words)
        assert not done or clone.holds(saved), step
        assert not done or words or clone.one.read_text().strip() == saved, "an update leaves it in its place"
        assert clone.one.exists()
        clone.update()
        assert not done or clone.holds(saved), step
        assert done or not words or clone.holds(text)
        clone.check_tidy()
        if not done:
            break
    assert step > 8


def test_git_ignores_all_of_it():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a clone")
    for name in ("00_welcome.ipynb", "progress.json", "scratch/main.py", "old/00_welcome-1/00_welcome.ipynb"):
        assert subprocess.call(["git", "check-ignore", "-q", f"my_notebooks/{name}"], cwd=ROOT) == 0


@pytest.mark.parametrize(
    "last, copied, more, opens",
    [
        (None, True, [], "/lab/tree/my_notebooks/00_welcome.ipynb"),
        ("05b", True, [], "/lab/tree/my_notebooks/05b_pool_limits.ipynb"),
        ("05b", False, [], "/lab/tree/notebooks/05b_pool_limits.ipynb"),
        ("99", True, [], "/lab/tree/my_notebooks/00_welcome.ipynb"),
        ("05b", True, ["--LabApp.default_url=/lab/tree/README.md"], "/lab/tree/README.md"),
    ],
)
def test_lab_opens_where_the_learner_stopped_if_no_option_says_otherwise(tmp_path, last, copied, more, opens):
    mine = tmp_path / "my_notebooks"
    mine.mkdir()
    if copied:
        for path in kernels.NOTEBOOKS.glob("*.ipynb"):
            shutil.copy(path, mine)
    (mine / "progress.json").write_text(json.dumps({"version": 1, "exercises": {}, "quiz": {}, "last": last}))
    environment = {
        "JUPYTER_CONFIG_PATH": str(ROOT / "course_tasks" / "jupyter"),
        "COURSE_MY_NOTEBOOKS": str(mine),
    }
    command = [sys.executable, "-m", "jupyterlab", "--show-config-json", *more]
    said = subprocess.check_output(command, cwd=ROOT, env=os.environ | environment, text=True)
    assert json.loads(said)["LabApp"]["default_url"] == opens
