"""The page to keep, `notebooks/reference.md`: true of the installed Celery, with all that the chapters use, and linked.

In a chapter, bold is for two things. A label ends in punctuation (`**Predict:**`, `**a)**`, `**b.**`) or is one of
LABELS. Everything else in bold is a term, which is defined there and has a row in the page's glossary.
"""

import ast
import builtins
import functools
import inspect
import json
import logging
import re
import signal
import subprocess
import sys

import billiard.common
import celery.app.autoretry
import celery.exceptions
import celery.states
import celery.worker.autoscale
import kombu.exceptions
import kombu.transport.redis
import nbformat
import pytest
import redis
from celery import Celery, Task, signals
from celery.app.control import Inspect
from celery.app.defaults import SETTING_KEYS, find
from celery.backends.base import Backend
from celery.bin.base import CLIContext
from celery.bin.celery import celery as program
from celery.bin.worker import worker
from celery.utils.nodenames import host_format
from celery.worker.request import Request

from course_tasks import copies
from course_tasks.authoring import kernels
from course_tasks.classroom import free_port
from course_tasks.install import ROOT
from course_tasks.tests.plugin import cells, taken, until
from course_tasks.tests.test_notebooks import LINK

PAGE = kernels.NOTEBOOKS / "reference.md"
TEXT = PAGE.read_text()
CHAPTERS = copies.chapters()
LABELS = {"Quiz", "You need", "By the end you can"}
CODE = re.compile(r"`([^`]+)`")
BOLD = re.compile(r"\*\*(.+?)\*\*")


@functools.cache
def rows(heading: str) -> list[dict[str, str]]:
    """The rows of all tables below a heading, each as its values by the heads of the columns."""
    section = re.split(r"(?m)^## ", TEXT.partition(f"\n## {heading}\n")[2])[0]
    found: list[dict[str, str]] = []
    heads: list[str] = []
    for line in section.splitlines():
        values = [value.strip() for value in line.strip("|").split(" | ")] if line.startswith("|") else []
        if values and heads and not line.startswith("|---"):
            assert len(values) == len(heads), line
            found.append(dict(zip(heads, values, strict=True)))
        heads = (heads or values) if values else []
    assert found, f"the page has no table below {heading}"
    return found


def named(heading: str, column: str) -> dict[str, dict[str, str]]:
    """The rows below a heading by each name, written as code, in a column."""
    return {name: row for row in rows(heading) for name in CODE.findall(row[column])}


def default_in(row: dict[str, str]):
    """The default that a row has as code; None if it says it in words."""
    [*values] = CODE.findall(row["Default"])
    try:
        return ast.literal_eval(values[0]) if values else None
    except (SyntaxError, ValueError):
        return values[0]


def option(name: str, commands=(program, worker)):
    """What click knows of an option of `celery` or of its command `worker`; None if there is no such option."""
    return next((known for command in commands for known in command.params if name in known.opts), None)


def same(name: str, row: dict[str, str], default) -> None:
    assert default_in(row) == default, f"{name}: the default is {default!r}"


def test_a_setting_is_known_to_celery_and_has_that_default():
    for name, row in named("Settings", "Setting").items():
        assert name in SETTING_KEYS, f"{name} is no setting"
        default = find(name)[2].default
        if name == "result_expires":
            default = default.total_seconds()
        elif name == "worker_consumer":
            default = default.rpartition(":")[2]
        elif "log_format" in name:  # in words
            fields = ["asctime", "levelname", "processName", *["task_name", "task_id"] * ("task" in name), "message"]
            default = None if re.findall(r"\((\w+)\)", default) == fields else default
        same(name, row, default)


def test_an_option_of_the_command_is_known_to_celery_and_has_that_default():
    given = CLIContext(app=Celery(set_as_current=False), no_color=True, workdir=".")
    defaults = worker.make_context("worker", [], obj=given).params
    shown = {"loglevel": logging.getLevelName, "pool": lambda pool: pool.__module__.rpartition(".")[2]}
    shown["hostname"] = lambda name: name.replace(host_format("%h"), "%h")
    command = program
    for row in rows("The worker's command"):
        names = CODE.findall(row["Option"])
        command = worker if "-l" in names else command  # the first option of the second table
        known = option(names[0], [command])
        assert known and set(names) <= set(known.opts), f"{names}: no option of {command.name}"
        if command is worker:
            default = defaults[known.name]
            same(names[0], row, shown[known.name](default) if known.name in shown else default or None)


def test_an_option_of_a_task_is_known_to_celery_and_has_that_default():
    settings = dict(Task.from_config)
    sending = inspect.signature(Celery.send_task).parameters
    for name, row in named("Options of a task", "Option").items():
        if name in settings:
            same(name, row, find(settings[name])[2].default)
        elif hasattr(Task, name):
            same(name, row, getattr(Task, name))
        else:  # `queue` is read by the router, and stands in the docstring of apply_async
            known = name in sending or f"'{name}'" in inspect.getsource(celery.app.autoretry)
            assert known or f"\n            {name} (" in Task.apply_async.__doc__, f"{name} is no option"


def test_an_option_of_the_connections_is_known_and_has_that_default():
    for name, row in named("Options of the connections to Redis", "Option").items():
        policy = Backend.retry_policy["max_retries"] if name == "retry_policy" else None
        same(name, row, policy or getattr(kombu.transport.redis.Channel, name))


def test_a_setting_of_a_redis_server_has_that_default(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "course_tasks", "server", "--bind", "127.0.0.1", "--dir", tmp_path]
    asked = redis.Redis(port=port, decode_responses=True, retry=None)

    def answers() -> bool:
        try:
            return asked.ping()
        except redis.ConnectionError:
            return False

    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL) as server:
        try:
            until(answers, "the server answers")
            for name, row in named("Settings of a Redis server", "Setting").items():
                if name == "save":  # in seconds and changes; the page says it in words
                    assert asked.config_get(name)[name] == "3600 1 300 100 60 10000"
                else:
                    assert asked.config_get(name)[name] == "".join(CODE.findall(row["Default"])), name
        finally:
            server.terminate()


def test_an_environment_variable_is_read(monkeypatch):
    known = named("Environment variables", "Variable")
    assert set(known) == {"CELERY_BROKER_URL", "CELERY_RESULT_BACKEND", "REMAP_SIGTERM", "AUTOSCALE_KEEPALIVE"}
    same("AUTOSCALE_KEEPALIVE", known["AUTOSCALE_KEEPALIVE"], celery.worker.autoscale.AUTOSCALE_KEEPALIVE)
    assert "REMAP_SIGTERM" in inspect.getsource(billiard.common)
    for name in ("CELERY_BROKER_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "redis://there:1/2")
    app = Celery(broker="redis://elsewhere:3/4", backend="redis://elsewhere:3/4", set_as_current=False)
    assert app.connection_for_write().as_uri(include_password=True) == app.backend.as_uri(True) == "redis://there:1/2"


def test_a_state_is_one_of_celerys_and_over_or_not():
    for name, row in named("States", "State").items():
        assert getattr(celery.states, name, None) == name, f"{name} is no state"
        over = {"yes": celery.states.READY_STATES, "no": celery.states.UNREADY_STATES}
        assert name in over.get(row["Is it over?"], [name]), name


def test_a_signal_is_one_of_celerys_and_gives_these_arguments():
    for name, row in named("Signals", "Signal").items():
        assert name in signals.__all__, f"{name} is no signal"
        assert set(CODE.findall(row["It gets"])) <= getattr(signals, name).providing_args, name


SIGNALLING = """
import os
from celery import Celery, signals
app = Celery("signalling")
def note(name):
    def receiver(**_):
        with open("signals", "a") as file:
            print(name, os.getpid(), file=file)
    return receiver
for name in NAMES:
    getattr(signals, name).connect(note(name), weak=False)
@app.task
def add(x, y):  # for which a spawned child imports this module before it sets up logging
    return x + y
"""


@pytest.mark.parametrize("method, processes", [("fork", 1), ("spawn", 3)])
@pytest.mark.parametrize("names", [["setup_logging"], ["after_setup_logger", "after_setup_task_logger"]])
def test_where_the_signals_about_logging_are_sent(project, method, processes, names):
    for name in names:
        said = named("Signals", "Signal")[name]["Where"]
        assert said.startswith("in the main process, and in each child that is spawned (a forked child takes over")
    sign_off = "signals.worker_ready.connect(lambda **_: print(' ready.', flush=True), weak=False)"  # whatever the log
    (project.folder / "signalling.py").write_text(SIGNALLING.replace("NAMES", repr(names)) + sign_off)
    project.worker(f"celery -A signalling worker -c 2 --pool-start-method={method} --without-mingle", seconds=60)
    file = project.folder / "signals"
    until(lambda: len(file.read_text().splitlines()) >= processes * len(names), "each process has sent them")
    sent = [line.split() for line in file.read_text().splitlines()]
    assert len(sent) == processes * len(names)
    assert all(len({pid for name, pid in sent if name == wanted}) == processes for wanted in names)


def nothing():
    """What a task does where only its options count."""


def test_a_retry_of_a_cancelled_task_is_signalled_without_a_reason():
    arguments = named("Signals", "Signal")["task_retry"]["It gets"]
    assert arguments == "`request`, and `reason` unless the worker has cancelled it"
    app = Celery(set_as_current=False)
    app.backend_cls = "cache+memory://"
    task = app.task(name="long")(nothing)
    request = Request(taken(app, "long"), app=app, task=task)
    told: list[dict] = []
    signals.task_retry.connect(lambda **given: told.append(given), weak=False, sender=task)
    request._announce_cancelled()
    [given] = told
    assert given["request"].id == "1f2e" and "reason" not in given


@pytest.mark.parametrize("own, kept", [(("",), "True False 0"), (("", "celery.task"), "True True 0")])
def test_without_hijacking_a_handler_stays_but_tasks_log_to_one_of_celerys(own, kept):
    price = named("Settings", "Setting")["worker_hijack_root_logger"]["Price of changing it"]
    assert price.startswith("`False`: yours stay, but lines of task loggers go to a handler of Celery's, unless your")
    code = f"""
import logging
from celery import Celery
app = Celery()
app.conf.worker_hijack_root_logger = False
mine = logging.StreamHandler()
for name in {own}:
    logging.getLogger(name).addHandler(mine)
app.log.setup_logging_subsystem()
for name in ("", "celery.task"):
    logs = [each for each in logging.getLogger(name).handlers if not isinstance(each, logging.NullHandler)]
    print(logs == [mine], end=" ")
print(logging.getLogger("celery.task").propagate)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert said.stdout == f"{kept}\n", said.stderr


def test_an_option_that_only_the_worker_reads_has_no_effect_with_a_call_and_a_countdown_none_in_the_decorator(project):
    assert "and those read by the *worker* only in the decorator." in TEXT
    client = project.client()
    only = {name for name, row in named("Options of a task", "Option").items() if row["Read by"] == "worker"}
    assert {"acks_late", "max_retries", "rate_limit"} <= only
    client.send_task("report", ignore_result=True, **dict.fromkeys(only, 9))
    message = json.loads(project.broker.lindex("celery", 0))
    assert only <= message["properties"].keys(), "where a worker doesn't look"
    client.task(name="later", countdown=60, eta="2099-01-01", ignore_result=True)(nothing).delay()
    assert json.loads(project.broker.lindex("celery", 0))["headers"]["eta"] is None


def test_a_pool_can_be_chosen():
    assert set(named("Which pool", "`--pool`")) <= set(option("--pool").type.choices)


def test_a_command_is_celerys():
    for name in named("Commands that ask and order", "Command"):
        words = name.removeprefix("celery -A shop ").split()
        assert words[0] in program.commands, name
        assert words[0] != "inspect" or hasattr(Inspect, words[1]), name
        assert words[0] != "control" or hasattr(Celery().control, words[1]), name


def test_an_exception_is_one_and_a_signal_of_the_system_too():
    places = (builtins, celery.exceptions, kombu.exceptions)
    for name in set(re.findall(r"`([A-Z]\w*(?:Error|NotFound|NotRegistered|Exceeded))`", TEXT)):
        assert any(issubclass(getattr(place, name, int), Exception) for place in places), f"{name} is no exception"
    for name in set(re.findall(r"\bSIG[A-Z]{3,}\b", TEXT)):
        assert hasattr(signal, name), f"{name} is no signal"


# ----------------------------------------------------------------------------------------- what the chapters use


def prose(chapter: str) -> str:
    """A chapter's markdown without fenced code."""
    text = "\n\n".join(cell.source for cell in cells(CHAPTERS[chapter], "markdown"))
    return re.sub(r"(?ms)^```.*?^```", "", text)


def terms(text: str) -> set[str]:
    """The terms in bold, in the singular and in small letters."""
    found = {term for term in BOLD.findall(text) if term not in LABELS and not re.search(r"[.:!?)]$", term)}
    return {term.strip("`").casefold().removesuffix("s") for term in found}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_page_has_every_setting_option_state_and_signal_that_a_chapter_uses(chapter):
    text = "\n\n".join(cell.source for cell in nbformat.read(CHAPTERS[chapter], as_version=4).cells)
    words = set(re.findall(r"\b\w+\b", text))
    snake = {word for word in words if "_" in word}  # `imports` and `include` are words of English as well
    states = {name for name in words if getattr(celery.states, name, None) == name}
    assert snake & SETTING_KEYS - set(named("Settings", "Setting")) == set()
    assert states - set(named("States", "State")) == set()
    assert snake & set(signals.__all__) - set(named("Signals", "Signal")) == set()
    lines = re.findall(r"(?m)^.*\bcelery .*\bworker .*$", text.replace("\\\n", ""))
    written = {name for line in lines for name in re.findall(r"(?<=\s)--?[A-Za-z][\w-]*", line)}
    written |= set(re.findall(r"`(--?[A-Za-z][\w-]*)", prose(chapter)))
    page = {option(name) for name in named("The worker's command", "Option")}
    assert {name for name in written if option(name) and option(name) not in page} == set()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_glossary_has_every_term_that_a_chapter_has_in_bold(chapter):
    known = terms("\n".join(row["Term"] for row in rows("Glossary")))
    assert terms(prose(chapter)) - known == set(), "write it into the glossary, or in italics if it is no term"


def test_a_term_is_in_bold_where_its_row_leads_and_is_explained_in_one_sentence():
    order = []
    for row in rows("Glossary"):
        order += sorted(terms(row["Term"]))[-1:]
        places = [where(target) for _, _, target, _ in LINK.findall(row["Chapter"])]
        for term in terms(row["Term"]):
            assert any(term in terms(text) for text in places), f"{term} isn't in bold there"
        assert all(terms(row["Term"]) & terms(text) for text in places), f"{row['Term']}: a link too many"
        assert re.fullmatch(r"[^.]*(?:\S\.\S[^.]*|\.\.\.[^.]*)*\.", row["What it means"]), row["What it means"]
    assert order == sorted(order), "from A to Z"


# ----------------------------------------------------------------------------------------------------- the links


def where(target: str) -> str:
    """What a link leads to: a heading of the page itself, a chapter's prose, or the text of one of its cells."""
    place, _, anchor = target.partition("#")
    if not place:
        headings = {heading.replace(" ", "-"): heading for heading in re.findall(r"(?m)^#+ (.*)$", TEXT)}
        assert anchor in headings, f"the page has no heading #{anchor}"
        return headings[anchor]
    path = PAGE.parent / place
    assert path.is_file(), f"{place} is not there"
    if not anchor:
        return path.read_text() if path.suffix == ".md" else prose(copies.number(place))
    # a heading's name would do as well, but JupyterLab follows it only if the chapter is open already
    texts = {f"cell-id={cell.id}": cell.source for cell in cells(path, "markdown")}
    assert anchor in texts, f"{place} has no markdown cell #{anchor}"
    return texts[anchor]


def test_every_link_leads_to_a_file_and_cell_that_exist():
    links = LINK.findall(TEXT)
    assert len(links) > 150
    for _, text, target, _ in links:
        assert where(target)
        if re.fullmatch(r"\d\d[a-z]?", text):
            assert target.startswith(f"{text}_"), f"[{text}] leads to {target}"


@pytest.mark.parametrize("heading", re.findall(r"(?m)^## (.*)$", TEXT))
def test_every_row_leads_to_a_chapter_and_every_section_is_in_the_list_at_the_top(heading):
    for row in rows(heading):
        assert re.search(r"\[\d\d[a-z]?\]\(", row["Chapter"]), row
    assert f"- [{heading}](#" in TEXT


def test_readme_and_every_chapter_lead_to_the_page():
    assert "](notebooks/reference.md)" in (ROOT / "README.md").read_text()
    link = " · [The course](../README.md) · [Reference](reference.md) · "
    titles = {chapter: f" · {cells(path, 'markdown')[0].source}" for chapter, path in CHAPTERS.items()}
    assert [chapter for chapter, title in titles.items() if link not in title.replace("\n", " · ")] == []
