"""What every notebook must be, whatever it teaches: complete, quiet, small, linked, its exercises judged."""

import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import nbformat
import pytest

from course_tasks import copies, exercises
from course_tasks.authoring import kernels, record
from course_tasks.install import ROOT
from course_tasks.tests.plugin import cells, printed_solution, tagged

PATHS = sorted(kernels.NOTEBOOKS.glob("*.ipynb"))
TEXTS = [*PATHS, ROOT / "README.md"]
MOST = {"lines in a cell": 15, "bytes": 150_000}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*?(?:src|href)=\"([^\"]+)\"")


def chapters():
    return pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def prose(path: Path) -> str:
    """A notebook's markdown, or a text file's."""
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


@chapters()
def test_outputs_are_stored_complete_and_quiet(path):
    for number, cell in enumerate(cells(path, "code"), start=1):
        assert cell.execution_count == number, f"cell {cell.id} was not recorded in order: nbval would compare nothing"
        for output in cell.outputs:
            assert output.get("name") != "stderr", f"cell {cell.id} writes to stderr: {output.text}"
            assert output.output_type != "error" or "raises-exception" in cell.metadata.get("tags", []), cell.id
            assert (
                "application/vnd.jupyter.widget-view+json" not in output.get("data", {}) or "text/plain" in output.data
            )
    found = path.read_text()
    assert not re.search(r"/(?:home|Users)/(?!you/)|/root/|/tmp/", found), "a path of the recording machine"


@chapters()
def test_there_is_no_noise_in_the_metadata(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    # with less, JupyterLab adds the rest and calls the notebook changed as soon as it is opened
    assert {"codemirror_mode", "file_extension", "mimetype", "name", "nbconvert_exporter", "pygments_lexer"} < set(
        notebook.metadata.language_info
    )
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
        assert re.fullmatch(r"[a-z0-9-]+", cell.id) and not re.fullmatch(r"[0-9a-f]{8}(-.*)?", cell.id), cell.id
    assert nbformat.writes(notebook) + "\n" == path.read_text(), "not as `record` writes it"


@chapters()
def test_cells_are_short_and_the_minutes_are_computed(path):
    sources = [cell.source.splitlines() for cell in cells(path, "code")]
    sizes = {"lines in a cell": max(map(len, sources)), "bytes": path.stat().st_size}
    assert {what: size for what, size in sizes.items() if size > MOST[what]} == {}
    # 07b writes a module, piece by piece: there the code is the subject
    assert statistics.median(map(len, sources)) <= (5 if copies.number(path.name) == "07b" else 4)
    assert record.minutes(nbformat.read(path, as_version=4)) in cells(path, "markdown")[0].source


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_and_pictures_are_there_and_pictures_have_a_text(path):
    for picture, text, target, other in LINK.findall(prose(path)):
        assert not picture or len(text) > 20, f"{target} needs an alternative text that says what it shows"
        place, _, anchor = (target or other).partition("#")
        if place.startswith(("http://", "https://")):
            continue
        found = path.parent / place if place else path
        assert found.exists(), f"{place} is not there"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", prose(found))
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in headings}
            assert anchor.lower() in {slug.lower() for slug in slugs}, f"{found.name} has no heading for #{anchor}"


@pytest.mark.parametrize("path", sorted(Path(kernels.NOTEBOOKS, "figures").glob("*.svg")), ids=lambda path: path.stem)
def test_a_figure_has_a_title_and_both_themes(path):
    figure = ElementTree.parse(path).getroot()
    assert figure.find("{http://www.w3.org/2000/svg}title").text
    assert "prefers-color-scheme: dark" in path.read_text()


@pytest.mark.parametrize(
    "path", sorted(Path(kernels.NOTEBOOKS, "figures").glob("system-*.svg")), ids=lambda path: path.stem
)
def test_the_picture_is_the_same_in_every_chapter_but_for_the_part_that_is_lit(path):
    lit = re.search(r'<rect class="lit" .*\s*<text class="name".*>(\w+)</text>', path.read_text())
    assert path.stem == f"system-{lit[1]}"
    assert path.read_text().replace('class="lit" ', "") == path.with_name("system.svg").read_text()


@chapters()
def test_a_chapter_follows_the_template(path):
    number = PATHS.index(path)
    first = cells(path, "markdown")[0].source
    neighbours = {target for _, _, target, _ in LINK.findall(first) if target.endswith(".ipynb")}
    expected = {other.name for other in PATHS[max(0, number - 1) : number + 2] if other != path}
    assert neighbours == expected, "the links to the previous and the next chapter"
    assert first.startswith(f"# {copies.number(path.name)} ") and re.search(r"\d+ minutes", first)
    for part in ("**By the end you can**", "**Why it matters", "**You need**"):
        assert part in first, part
    text = prose(path)
    assert text.count("**Predict:**") >= 2
    assert re.search(r"(?m)^## Break it", text)
    assert text.count("<details>") == text.count("</details>")
    sources = [cell.source for cell in cells(path, "code") if cell.source != "%progress"]
    assert sources[-1].startswith("%stop"), "a chapter stops its workers at its end"


def test_readme_and_chapter_00_have_the_same_table_of_all_chapters():
    row = re.compile(r"(?m)^\| \[(.+)\]\((?:notebooks/)?(\S+)\) \| (.+) \|$")
    readme, welcome = row.findall(prose(ROOT / "README.md")), row.findall(prose(PATHS[0]))
    assert readme == welcome
    assert [name for _, name, _ in readme] == [path.name for path in PATHS]


def test_every_chapter_opens_with_the_same_cell_which_knows_the_wrong_python():
    [source] = {tagged(path)["setup"].source for path in PATHS}
    python, _, magics = source.partition("%")
    assert magics == "load_ext course_tasks.classroom\n%servers"
    command = [sys.executable, "-I", "-S", "-c", python]  # without site-packages
    said = subprocess.run(command, capture_output=True, text=True, cwd="/").stderr
    assert re.fullmatch(r"No module named 'course_tasks'. Open the course with: python3 -m course_tasks lab\n", said)


def test_the_client_of_chapter_01_waits_as_long_as_it_says_if_nobody_answers(pair):
    """redis-py itself would give up after 5 s, with an error."""
    source = {cell.id: cell.source for cell in cells(kernels.NOTEBOOKS / "01_broker.ipynb", "code")}
    ask = source["toy-answer"].splitlines()[-1].replace("timeout=10", "timeout=6")
    code = f"import time\n{source['own']}\nstart = time.monotonic()\nprint({ask}, time.monotonic() - start >= 6)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"(\{'answer': )?None\}? True\n", said.stdout), said.stderr


@chapters()
def test_every_exercise_has_its_cells_and_enough_wrong_and_right_answers(path):
    judged = exercises.all_of(copies.number(path.name))
    assert len(judged) >= 2
    tags = tagged(path)
    named = {tag.partition("-")[2] for tag in tags if re.fullmatch(r"(exercise|check|solution)-\d\d[a-z]?-\d", tag)}
    assert named == set(judged)
    for name, exercise in judged.items():
        if exercise.project:
            assert tags[f"exercise-{name}"].source.startswith(f"%%writefile {exercise.project}/")
            assert tags[f"check-{name}"].source == f'check("{name}", "{exercise.project}")'
        else:
            assert "= ..." in tags[f"exercise-{name}"].source
            assert tags[f"check-{name}"].source == f'check("{name}", answer)'
        assert printed_solution(tags[f"solution-{name}"])
        assert len(exercise.wrong) >= 4 and len(set(exercise.wrong.values())) == len(exercise.wrong)
        assert len(exercise.right) >= 2


@chapters()
def test_a_quiz_has_its_cells_and_a_folded_answer_for_each_question(path):
    questions = exercises.quiz_of(copies.number(path.name))
    before, mark, text = prose(path).partition("**Quiz**")
    assert mark and "**Quiz**" not in text
    assert list(questions) == [f"{copies.number(path.name)}-{number}" for number in range(1, len(questions) + 1)]
    assert len(questions) >= 3 and "<summary>Answer to question" not in before
    assert sorted(tag for tag in tagged(path) if tag.startswith("quiz-")) == [f"quiz-{name}" for name in questions]
    all_cells = nbformat.read(path, as_version=4).cells
    for name, question in questions.items():
        number = name.partition("-")[2]
        at = all_cells.index(tagged(path)[f"quiz-{name}"])
        ask, code, answer = all_cells[at - 1 : at + 2]
        assert code.source == f'quiz("{name}", "...")'
        assert code.outputs[0].text.startswith(f"☐ quiz {name}: still to do")
        asked = ask.source.rpartition("</details>")[2]
        assert f"### Question {number}\n\n" in asked
        choices = re.findall(r"(?m)^- \*\*([a-z])\)\*\* \S", asked)
        folded = answer.source.partition("</details>")[0]
        says = re.match(
            rf"<details><summary>Answer to question {number}</summary>\n\n\*\*(.*?)\.\*\* (.+)\n\n$", folded
        )
        assert says, folded
        rights = [question.right] if isinstance(question.right, str) else question.right
        assert says[1] in rights, "the folded answer names the right one"
        if isinstance(question.right, str):
            assert choices == sorted([question.right, *question.wrong]) == list("abcdef"[: len(choices)])
            assert len(choices) >= 3 and not question.otherwise
            assert len({*question.wrong.values()}) == len(question.wrong), "each wrong choice has a reason of its own"
        else:
            assert not choices and len({*question.wrong.values()}) >= 2 and question.otherwise
        assert not re.search(r"`|\*|</?\w", exercises.explanation(name)), "plain text"
