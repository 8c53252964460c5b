"""What README says about the course's files, commands and addresses, and what chapter 00 says about the addresses."""

import re

import nbformat
import pytest

import course_tasks
from course_tasks import copies, servers
from course_tasks.__main__ import COMMANDS
from course_tasks.install import ROOT

README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"(?m)^\| ([^|\n]+) \| (.*) \| (.*) \|$", README.partition("### To change something")[2])[1:]
CODE = re.compile(r"`([^`\n]+)`")


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
