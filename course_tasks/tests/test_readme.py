"""What README says about the course's files, commands and addresses, and what chapter 00 says about the addresses."""

import base64
import hashlib
import re
import struct

import nbformat
import pytest

import course_tasks
from course_tasks import copies, servers
from course_tasks.__main__ import COMMANDS
from course_tasks.authoring import kernels
from course_tasks.classroom import terminal
from course_tasks.install import ROOT

README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"(?m)^\| ([^|\n]+) \| (.*) \| (.*) \|$", README.partition("### To change something")[2])[1:]
CODE = re.compile(r"`([^`\n]+)`")
# README's pictures of JupyterLab, each with the chapter and the cell that it shows; see `pictured`
PICTURES = {"terminal-cell.png": ("00", "worker"), "pools.png": ("05", "decide"), "trail.png": ("07d", "trail")}
TAKE = "COURSE_PICTURES=1 .venv/bin/python -m pytest course_tasks/tests/test_browser.py -k pictures"


def pictured(picture: str) -> tuple[nbformat.NotebookNode, nbformat.NotebookNode, str]:
    """What a picture shows: the chapter, the cell, and a digest of the cell without the numbers that each run changes.

    `test_browser.py` takes the pictures and writes the digest into them, so that the test below knows an old one.
    """
    chapter, name = PICTURES[picture]
    notebook = nbformat.read(copies.chapters()[chapter], as_version=4)
    [cell] = (cell for cell in notebook.cells if cell.id == name)
    seen = "".join(output.data["text/html"] for output in cell.outputs)
    seen = re.sub(r"base64,([^\"]+)", lambda found: base64.b64decode(found[1]).decode(), seen)
    parts = {re.sub(r"0x[0-9a-f]+|[\d.]+", "", part) for part in re.findall(r"<[^>]+>|[^<>\n]+", seen)}
    return notebook, cell, hashlib.sha256("\n".join([cell.source, *sorted(parts)]).encode()).hexdigest()


@pytest.mark.parametrize("chapter", copies.chapters())
def test_the_addresses_in_a_chapter_are_the_default_ports(chapter):
    cells = nbformat.read(copies.chapters()[chapter], as_version=4).cells
    text = "\n".join(cell.source for cell in cells)
    ports = {role: str(port) for role, port in servers.DEFAULT_PORTS.items()}
    assert set(re.findall(r"redis://localhost:(\d+)", text)) <= set(ports.values())
    named = re.findall(r"\b(broker|backend)=\"redis://localhost:(\d+)/0\"", text)
    assert set(named) <= set(ports.items())
    assert set(named) == set(ports.items()) or chapter != "00", "chapter 00 shows both addresses"


def test_readme_names_the_default_ports():
    ports = servers.DEFAULT_PORTS
    assert f"# the broker on {ports['broker']} and the backend on {ports['backend']}," in README
    assert f"Something else has {ports['broker']} or {ports['backend']}" in README
    others = set(re.findall(r"\b6\d{3}\b", README)) - {str(port) for port in ports.values()}
    assert others == {"6390"}, "a port that is neither the default nor a chapter's own"


def test_readme_says_how_long_the_course_is():
    minutes = {True: 0, False: 0}
    for chapter, path in copies.chapters().items():
        first = nbformat.read(path, as_version=4).cells[0].source
        [times] = re.findall(r"(\d+) minutes to read and run, (\d+) to practise", first)
        minutes[chapter.isdigit()] += sum(map(int, times))
    said = re.search(r"about (\d+) hours\s+together. Those with a letter go deeper and take about (\d+) hours", README)
    hours = [round(minutes[True] / 60), round(minutes[False] / 60)]
    assert [int(number) for number in said.groups()] == hours, (
        "the chapters have changed: write these hours into README"
    )


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_shows_the_cell_as_it_is_now_and_is_small(picture):
    content = (kernels.NOTEBOOKS / "figures" / picture).read_bytes()
    assert len(content) < 100_000 and max(struct.unpack(">II", content[16:24])) < 900
    assert f"tEXtShows\0{pictured(picture)[-1]}".encode() in content, (
        f"what {picture} shows has changed. Take it anew: {TAKE}"
    )
    [text] = re.findall(rf"!\[([^]]+)\]\(notebooks/figures/{picture}\)", README)
    assert len(text) > 40


def test_the_first_screen_has_what_you_will_be_able_to_do_how_long_it_takes_the_commands_and_the_pictures():
    first = README.partition("\n## ")[0] + README.partition("\n## Start\n")[2].partition("\n## ")[0]
    first = "\n".join(first.splitlines()[:60])
    for part in ("you can", "It takes", "-m course_tasks lab", "-m course_tasks test", *PICTURES):
        assert part in first, part


def test_readme_names_the_limits_of_a_log():
    assert f"A pane shows the last {terminal.SHOWN} lines, and `%tail` prints up to {terminal.PRINTED:,}." in README


def test_every_command_in_readme_is_one():
    assert set(re.findall(r"python3? -m course_tasks (\w+)", README)) <= set(COMMANDS)


def test_the_workers_in_docker_are_built_whenever_they_are_started():
    """Otherwise they run the tasks of an earlier day."""
    for text in (README, (ROOT / "docker-compose.yml").read_text()):
        assert (starts := re.findall(r"docker compose --profile workers up.*", text))
        assert all("--build" in start for start in starts)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_is_named_for_a_change_is_there(row):
    edit = CODE.findall(row[1])
    files = [ROOT / name for name in edit if re.search(r"\.\w+$", name) and name != "__init__.py" and "NN" not in name]
    texts = [file.read_text() for file in files]
    for name in edit:
        if re.fullmatch(r"[A-Z_]{2,}|adaptive-theme", name):
            assert any(name in text for text in texts), name
    for test in CODE.findall(row[-1]):
        if re.fullmatch(r"test_\w+\.py", test):
            assert (ROOT / "course_tasks" / "tests" / test).is_file()


def test_the_words_of_our_own_are_used():
    words = re.findall(r"\*\*([\w ]+)\*\*", course_tasks.__doc__)
    assert len(words) > 10
    code = {path: path.read_text() for path in ROOT.glob("course_tasks/**/*.py") if "tests" not in path.parts}
    del code[ROOT / "course_tasks" / "__init__.py"]
    unused = [word for word in words if not any(re.search(rf"(?i)\b{word}", text) for text in code.values())]
    assert not unused, "nobody needs to know these words"
