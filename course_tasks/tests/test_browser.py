"""The course in a real browser: JupyterLab as `lab` starts it, the chapters as a learner goes through them."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

import nbformat
import psutil
import pytest

from course_tasks.authoring import kernels
from course_tasks.install import ROOT
from course_tasks.tests.plugin import lacking, listens, needed, processes, until
from course_tasks.tests.test_readme import PICTURES, pictured

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
WELCOME = "00_welcome.ipynb"
SECOND = 1000  # Playwright counts in milliseconds
WAIT = 90 * SECOND

if not CHROMIUM:
    lacking("Chromium")
needed("playwright")
needed("axe_playwright_python")
import axe_playwright_python.sync_playwright as axe  # noqa: E402
import playwright.sync_api as api  # noqa: E402

api.expect.set_options(timeout=WAIT)


class Lab:
    """JupyterLab on the working copies of a learner who has just begun."""

    def __init__(self, folder: Path):
        self.notebooks = folder / "my_notebooks"
        self.notebooks.mkdir()
        shutil.copytree(kernels.NOTEBOOKS / "figures", folder / "notebooks" / "figures")
        # as in a clone, because Lab follows no link out of its root
        (self.notebooks / "figures").symlink_to("../notebooks/figures")
        shutil.copy(ROOT / "README.md", folder)
        home = folder / "home"
        home.mkdir()
        places = [f"--ServerApp.root_dir={folder}", f"--LabApp.workspaces_dir={home}"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "course_tasks", "lab", "--no-browser", "--port=0", *places],
            cwd=ROOT,
            env={
                **kernels.kernel_environment(),
                "HOME": str(home),
                "JUPYTER_PREFER_ENV_PATH": "1",
                "COURSE_MY_NOTEBOOKS": str(self.notebooks),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"http://(?:localhost|127\.0\.0\.1):\d+/lab\S*", line):
                self.url = found[0]
                break
        else:
            raise AssertionError("".join(self.said))
        until(
            lambda: listens(urlsplit(self.url).port), "JupyterLab listens"
        )  # which it does a moment after it has said so
        # a full pipe would stop Lab
        threading.Thread(target=self.said.extend, args=[self.process.stdout], daemon=True).start()

    def address(self, name: str) -> str:
        """The URL of a notebook, in a workspace of its own: nothing that another page has left open is there."""
        return re.sub(r"/lab[^?]*", f"/lab/workspaces/{uuid4().hex}/tree/my_notebooks/{name}", self.url)

    def cells(self, name: str = WELCOME) -> list[dict]:
        """The saved chapter's code cells; none while Lab is writing the file."""
        text = (self.notebooks / name).read_text()
        return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"] if text else []

    def ask_on(self) -> None:
        """Have requests under way from now on, until Lab answers no more, on connections that stay open as a page's."""
        where = urlsplit(self.url)
        answered = threading.Event()

        def ask():
            connection = http.client.HTTPConnection(where.netloc, timeout=60)
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    connection.request("GET", f"/api/contents/my_notebooks?{where.query}")
                    assert "content" in json.load(connection.getresponse())
                    answered.set()

        for _ in range(4):
            threading.Thread(target=ask, daemon=True).start()
        assert answered.wait(60)

    def processes(self, text: str) -> list[psutil.Process]:
        """What Lab's notebooks have started with `text` in its command line."""
        return processes(text, psutil.Process(self.process.pid).children(recursive=True))


@pytest.fixture(scope="module")
def labs():
    labs = []
    yield labs
    for lab in labs:
        lab.process.kill()
        lab.process.wait()


@pytest.fixture
def lab(labs, tmp_path_factory):
    """A running JupyterLab: the one there is, if the test before has not closed it."""
    if not labs or labs[-1].process.poll() is not None:
        labs.append(Lab(tmp_path_factory.mktemp("lab")))
    return labs[-1]


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """A browser for all tests, with a profile on disk: only there it keeps JupyterLab's scripts as compiled."""
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1300, "height": 1000},
        )
        yield browser
        browser.close()


@pytest.fixture
def page(context, lab, request):
    """A chapter in the browser, by default 00 in the light theme; the parameter is (theme, name)."""
    theme, name = getattr(request, "param", ("light", WELCOME))
    page = context.new_page()
    page.emulate_media(color_scheme=theme)
    page.set_default_timeout(WAIT)
    page.goto(lab.address(name))
    # the status bar: the indicator at the top says "idle" before there is a kernel too, and what is run then is lost
    api.expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
    yield page
    if folder := os.environ.get("COURSE_SCREENSHOTS"):  # to be looked at
        page.screenshot(path=Path(folder, f"{request.node.name}.png"))
    page.close()


def status(page: api.Page):
    return page.locator(".jp-Notebook-ExecutionIndicator")


def menu(page: api.Page, name: str, entry: str) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile(f"^{name}$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile(f"^{entry}$")).click()


def pane(page: api.Page, number: int = 0):
    """The log of a terminal cell, scrolled to, for Lab keeps only what is near the view."""
    found = page.locator("[role=log]").nth(number)
    for _ in range(40):
        try:
            found.scroll_into_view_if_needed(timeout=SECOND / 2)
            return found
        except api.Error:
            page.locator(".jp-WindowedPanel-outer").evaluate("view => view.scrollTop += 500")
    raise AssertionError("there is no terminal pane")


def faults(page: api.Page) -> list[str]:
    """What axe-core finds wrong with the course's part of the page, for people who see little or use no mouse."""
    scope = [[".jp-Notebook .jp-RenderedHTMLCommon"], [".jp-Notebook .jp-OutputArea-output"]]
    found = axe.Axe().run(page, {"include": scope}, {"resultTypes": ["violations"]}).response["violations"]
    return [f"{fault['id']}: {node['html'][:300]}" for fault in found for node in fault["nodes"]]


def run_all(page: api.Page) -> None:
    menu(page, "Run", "Run All Cells")
    api.expect(status(page)).to_have_attribute("data-status", "busy")
    api.expect(status(page)).to_have_attribute("data-status", "idle")
    page.locator(".jp-WindowedPanel-outer").evaluate("view => view.scrollTop = 0")


def save(page: api.Page, lab: Lab, name: str = WELCOME) -> None:
    """Save the chapter, and see that every cell has run and none has failed."""
    page.keyboard.press("Control+s")  # the autosave may have been faster: then there is nothing left to save
    page.wait_for_function("() => !document.querySelector('.lm-TabBar-tab.jp-mod-dirty')")

    def saved() -> list[dict]:
        found = lab.cells(name)
        return found if all(cell["execution_count"] for cell in found) else []

    for cell in until(saved, "every cell has run and is saved"):
        assert all(output["output_type"] != "error" for output in cell["outputs"]), cell["outputs"]
        assert all(output.get("name") != "stderr" for output in cell["outputs"]), cell["outputs"]


def test_lab_opens_on_chapter_00_and_run_all_shows_the_workers_log_which_grows_and_stop_stops_it(page, lab):
    assert urlsplit(lab.url).path == "/lab/tree/my_notebooks/00_welcome.ipynb"
    assert page.url.partition("?")[0].endswith("/tree/my_notebooks/00_welcome.ipynb")
    assert all(cell["outputs"] == [] for cell in lab.cells()), "no answer is seen before its question"
    api.expect(page.get_by_role("heading", name=re.compile("^00 Welcome"))).to_be_visible()
    picture = page.locator("img[alt*=backend]")
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 0
    api.expect(page.locator(".jp-toast-button, .Toastify__toast")).to_have_count(0)  # no question about news
    run_all(page)
    log = pane(page)
    api.expect(log).to_contain_text("ready.")
    api.expect(log).to_contain_text("succeeded in")  # written after the cell had ended
    api.expect(log.locator("..")).to_contain_text("worker: stopped")
    assert lab.processes("-m celery") == []
    save(page, lab)
    assert ["9"] in [output.get("data", {}).get("text/plain") for cell in lab.cells() for output in cell["outputs"]]


def switch(page: api.Page, theme: str) -> None:
    """Let the system's theme become "light" or "dark", and JupyterLab follow."""
    page.emulate_media(color_scheme=theme)
    light = {"light": "true", "dark": "false"}[theme]
    api.expect(page.locator("body")).to_have_attribute("data-jp-theme-light", light)


def test_the_saved_notebook_shows_the_pane_in_both_themes(page):
    for theme in ("light", "dark"):
        switch(page, theme)
        log = pane(page)
        api.expect(log).to_contain_text("succeeded in")
        *colours, over = log.locator("pre").evaluate(
            "pre => { const is = getComputedStyle(pre);"
            " return [is.color, is.backgroundColor, pre.scrollWidth - pre.clientWidth] }"
        )
        front, back = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
        assert front > 500 > 200 > back, "light text on a dark ground"
        assert over == 0, "long lines wrap"
        view = log.evaluate("log => [log.scrollTop, log.scrollHeight > log.clientHeight]")
        assert view == [0, True], "the end of a long log is what is seen (0 is the end in a reversed box)"


ANSWERS = """from course_tasks.classroom import check
%load_ext course_tasks.classroom
check("00-3", "PENDING")
quiz("00-1", "b")
%progress"""


def test_answers_are_counted_and_the_map_leads_to_the_next_chapter_in_both_themes(page, lab):
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(ANSWERS)
    page.keyboard.press("Control+Enter")
    said = page.locator(".jp-Notebook .jp-OutputArea").first
    api.expect(said).to_contain_text("✅ 00-3: right. 1 of 4 in this chapter.")
    api.expect(said).to_contain_text("✅ quiz 00-1: right. send_task had already handed")
    rows = said.locator("table[aria-label='Your progress'] tr")
    api.expect(rows).to_have_count(len(CHAPTERS) + 2)
    api.expect(rows.nth(1)).to_have_text("00 Welcome1 of 41 of 4▶ you are here")
    for theme in ("dark", "light"):
        switch(page, theme)
        for what in ("a", "td", "th"):
            assert rows.nth(1).locator(what).first.evaluate(CONTRAST) > 4.5, (theme, what)
            assert rows.nth(2).locator(what).first.evaluate(CONTRAST) > 4.5, (theme, what)
    rows.nth(2).get_by_role("link").click()
    api.expect(page.get_by_role("heading", name=re.compile("^01 Broker"))).to_be_visible()
    assert page.url.partition("?")[0].endswith("/tree/my_notebooks/01_broker.ipynb")


def test_a_chapter_leads_to_the_reference_page_and_a_link_there_to_the_cell_of_a_chapter(page, lab):
    page.locator(".jp-Notebook .jp-Cell").first.get_by_role("link", name="Reference", exact=True).click()
    reference = page.locator(".jp-MarkdownViewer")
    reference.get_by_role("link", name="The worker's command", exact=True).click()
    api.expect(reference.get_by_role("heading", name="The worker's command", exact=True)).to_be_in_viewport()
    row = reference.get_by_role("row", name=re.compile("^visibility_timeout"))
    link = row.get_by_role("link", name="03c", exact=True)
    link.click()
    here = page.get_by_role("heading", name=re.compile("^A task that takes longer than the visibility timeout"))
    api.expect(here).to_be_attached()
    try:
        api.expect(here).to_be_in_viewport(timeout=10 * SECOND)
    except AssertionError:  # a busy Lab scrolls before it has laid out the chapter: a learner follows the link again
        page.get_by_role("tab", name="reference.md").click()
        link.click()
        api.expect(here).to_be_in_viewport()
    assert page.url.partition("?")[0].endswith("/tree/my_notebooks/03c_stopping.ipynb")


def test_a_running_pane_follows_and_closing_lab_leaves_no_worker(page, lab):
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(
        "%%terminal counter --ready 'line 1$'\nn=0; while sleep 0.1; do n=$((n + 1)); echo line $n; done"
    )
    page.keyboard.press("Control+Enter")
    log = page.locator("[role=log][aria-label='log of counter']")
    api.expect(log).to_contain_text("line 1")
    api.expect(log).to_contain_text("line 12")
    assert (counters := lab.processes("echo line"))
    lab.ask_on()  # what is under way holds nothing up
    lab.process.send_signal(signal.SIGTERM)
    assert psutil.wait_procs(counters, timeout=60)[1] == []
    try:
        lab.process.wait(60)
    except subprocess.TimeoutExpired:
        lab.process.kill()  # the tests to come need one that is not half closed
        lab.process.wait()
        pytest.fail(f"Lab does not end. It said:\n{''.join(lab.said)}")


# A browser costs a test more than the chapter itself does. So only the first chapter with a live view of each kind is
# run in it, if not all are asked for; that they run to their ends, nbval shows for all. Experiment has its own test.
CHAPTERS = {path.name: path.read_text() for path in sorted(kernels.NOTEBOOKS.glob("*.ipynb")) if path.name != WELCOME}
LIVE = ("BrokerView(", "Journey(", "import IntProgress")
FIRST = {next(name for name, text in CHAPTERS.items() if view in text) for view in LIVE}
SHOWN = sorted(CHAPTERS if os.environ.get("COURSE_BROWSER") == "all" else FIRST)


@pytest.mark.parametrize(
    "page, name",
    [((("dark", "light")[number % 2], name), name) for number, name in enumerate(SHOWN)],
    ids=SHOWN,
    indirect=["page"],
)
def test_run_all_in_the_browser(page, lab, name):
    run_all(page)
    save(page, lab, name)
    pictures, panes = set(), set()
    view = page.locator(".jp-WindowedPanel-outer")
    while True:  # Lab keeps only what is near the view
        page.wait_for_function("() => [...document.images].every(image => image.complete)")
        hidden = page.locator(".jp-Notebook .cm-scroller").evaluate_all(
            "all => all.map(i => i.scrollWidth - i.clientWidth)"
        )
        assert not any(hidden), "a line of code goes on beyond its box"
        for alt, width in page.locator(".jp-Notebook img").evaluate_all("all => all.map(i => [i.alt, i.naturalWidth])"):
            assert alt and width, f"a picture is not shown: {alt}"
            pictures.add(alt)
        panes.update(
            page.locator(".jp-Notebook [role=log]").evaluate_all(
                "all => all.map(l => l.parentNode.firstChild.textContent)"
            )
        )
        assert faults(page) == []
        if not view.evaluate(
            "view => { const was = view.scrollTop; view.scrollTop += 700; return view.scrollTop > was }"
        ):
            break
    assert pictures
    assert panes and all(
        re.search(r": (stopped|finished|killed|ended with exit code \d+)$", title) for title in panes
    ), panes


PARTS = 5  # JupyterLab shows a part within its time on a busy machine as well


@pytest.mark.parametrize("part", range(PARTS))
def test_the_stored_chapters_are_accessible_in_both_themes_before_they_are_trusted(page, lab, part):
    """Several at once in one notebook, which is never run: loading each by itself would take minutes."""
    everything = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "none", "display_name": "none"}})
    for path in sorted(kernels.NOTEBOOKS.glob("*.ipynb"))[part::PARTS]:
        everything.cells += [cell for cell in nbformat.read(path, as_version=4).cells if cell.get("outputs") != []]
    for number, cell in enumerate(everything.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.source = ""  # JupyterLab's own editors are not examined
    (lab.notebooks / "all.ipynb").write_text(nbformat.writes(everything))
    place = urlsplit(lab.url)
    answer = page.request.put(
        f"{place.scheme}://{place.netloc}/lab/api/settings/@jupyterlab/notebook-extension:tracker?{place.query}",
        data=json.dumps({"raw": json.dumps({"windowingMode": "none"})}),  # else Lab has only the cells near the view
    )
    assert answer.ok, answer.text()
    page.goto(lab.address("all.ipynb"))
    api.expect(page.locator(".jp-Notebook .jp-Cell")).to_have_count(len(everything.cells), timeout=3 * WAIT)
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    for theme in ("light", "dark"):
        switch(page, theme)
        assert faults(page) == [], theme
    page.request.put(answer.url, data=json.dumps({"raw": "{}"}))


@pytest.mark.parametrize("picture", PICTURES)
def test_readmes_pictures_can_be_taken_and_are_kept_if_that_is_asked_for(context, lab, tmp_path, picture):
    """With COURSE_PICTURES=1, `notebooks/figures/` gets what JupyterLab shows of these cells as they are stored."""
    notebook, cell, digest = pictured(picture)
    notebook.cells = [nbformat.v4.new_markdown_cell("the selected cell"), cell]
    (lab.notebooks / "picture.ipynb").write_text(nbformat.writes(notebook))
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.set_viewport_size({"width": 1100, "height": 1000})
    page.goto(lab.address("picture.ipynb"))
    api.expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle")
    # smaller letters, as with two entries of JupyterLab's menu *Settings > Theme*, make a smaller file
    page.add_style_tag(content="body { --jp-content-font-size1: 12px; --jp-code-font-size: 12px }")
    output = page.locator(".jp-CodeCell .jp-OutputArea-output")
    api.expect(output).to_be_visible()
    page.wait_for_function("() => [...document.images].every(image => image.complete)")
    found = page.locator(".jp-CodeCell") if "%%terminal" in cell.source else output
    taken = found.screenshot()
    page.close()
    words = b"tEXtShows\0" + digest.encode()  # PNG has a place for words in a picture, after its head of 33 bytes
    words = struct.pack(">I", len(words) - 4) + words + struct.pack(">I", zlib.crc32(words))
    folder = kernels.NOTEBOOKS / "figures" if os.environ.get("COURSE_PICTURES") else tmp_path
    (folder / picture).write_bytes(taken[:33] + words + taken[33:])
    assert len(taken) < 100_000 and all(size > 100 for size in struct.unpack(">II", taken[16:24]))


EXPERIMENT = """%load_ext course_tasks.classroom
%servers
from course_tasks.classroom.experiment import Experiment
Experiment()"""
# keeps what the status line says and counts the page's ticks; to be read from `window`
WATCH = """status => {
    window.said = []; window.ticks = 0; setInterval(() => window.ticks++, 50);
    new MutationObserver(() => window.said.push(status.textContent)).observe(status, {childList: true, subtree: true});
}"""
FOCUSED = """() => {
    const it = document.activeElement;
    return it.labels?.length ? it.labels[0].textContent : it.tagName === "BUTTON" ? it.textContent : "";
}"""
CONTRAST = """element => {
    const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, at) => sum + part * [0.2126, 0.7152, 0.0722][at], 0.05);
    let ground = element;
    while (/rgba\\(.*, 0\\)/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
    const pair = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(light);
    return Math.max(...pair) / Math.min(...pair);
}"""


def tab_to(page: api.Page, name: str) -> None:
    """Press Tab until the control of this name has the focus."""
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED) == name:
            return
    raise AssertionError(f"Tab does not come to {name}")


def test_an_experiment_is_done_with_the_keyboard_alone(page, lab):
    page.locator(".jp-Notebook .jp-Cell").first.click()
    page.keyboard.press("Escape")
    page.keyboard.press("b")
    page.keyboard.press("Enter")
    page.keyboard.insert_text(EXPERIMENT)
    page.keyboard.press("Control+Enter")
    status = page.locator(".jp-Notebook [role=status]")
    api.expect(status).to_have_text("Chosen: 10 x wait for 0.2 s, on threads with concurrency 4.")
    place = re.search(r"Cell \d+/\d+", page.locator("#jp-main-statusbar").text_content())[0]
    tab_to(page, "prefork")
    page.keyboard.press("Enter")
    tab_to(page, "wait")
    tab_to(page, "Concurrency")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    tab_to(page, "Tasks")
    page.keyboard.press("Control+a")
    page.keyboard.type("8")
    tab_to(page, "Seconds each")
    page.keyboard.press("Control+a")
    page.keyboard.type("0.5")
    tab_to(page, "Run")
    api.expect(status).to_have_text("Chosen: 8 x wait for 0.5 s, on prefork with concurrency 2.")
    status.locator("xpath=../..").evaluate(WATCH)
    page.keyboard.press("Enter")
    page.wait_for_function("() => window.said.some(line => /[1-6] of 8 tasks done/.test(line))")
    ticks = page.evaluate("() => window.ticks")
    assert ticks >= 10, "the page is not frozen"
    page.keyboard.press("Enter")
    over = re.compile(r"^Run 1 is over: \d\.\d\d s, [12]\.\d x, slots used: 2\.$")
    api.expect(status).to_have_text(over)
    said = page.evaluate("() => window.said")
    assert any("A run is in progress. Wait for its end." in line for line in said), said
    assert len({line for line in said if "of 8 tasks done" in line}) >= 3, "the progress is shown"
    assert page.evaluate("() => window.ticks") > ticks
    assert page.evaluate(FOCUSED) == "Run", "the focus stays where it was"
    page.keyboard.press("Space")
    api.expect(status).to_contain_text("Run 2 is over")
    picture = page.locator("img[alt*='2: prefork -c 2, wait: 8 tasks used 2 slots']")
    page.wait_for_function("image => image.complete && image.naturalWidth", arg=picture.element_handle())
    api.expect(page.locator(".jp-Notebook .widget-html td").first).to_have_text("1")
    assert page.locator(".jp-Notebook .widget-html tr").count() == 3
    api.expect(page.locator(".jp-Notebook .widget-html pre")).to_contain_text("celery -A course_tasks worker")
    for theme in ("dark", "light"):
        switch(page, theme)
        assert faults(page) == []
        for what in ("[role=status]", ".widget-html td", ".widget-html pre", ".widget-label", ".widget-button"):
            contrast = page.locator(f".jp-Notebook {what}").first.evaluate(CONTRAST)
            assert contrast > 4.5, (theme, what, contrast)
        for toggle in page.locator(".jp-Notebook .widget-toggle-button").all():
            assert toggle.evaluate(CONTRAST) > 4.5, (theme, toggle.text_content())
    api.expect(page.locator("#jp-main-statusbar")).to_contain_text(place)  # no key was a command of JupyterLab's
