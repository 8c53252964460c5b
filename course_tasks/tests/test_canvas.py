"""`Canvas`, from outside: a real worker runs canvases of all kinds, and a kernel shows one."""

import base64
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from celery import chain, chord, group
from celery.exceptions import TimeoutError
from celery.signals import after_task_publish

from course_tasks.classroom import ClassroomError
from course_tasks.classroom.canvas import Canvas
from course_tasks.exercises.project import Project
from course_tasks.tests.plugin import until
from course_tasks.tests.test_live import viewing

DEMO = """
import time
from celery import Celery, chord

app = Celery("demo")


@app.task(name="plus")
def plus(x, y=0):
    return x + y


@app.task(name="total")
def total(numbers):
    return sum(numbers)


@app.task(name="slow")
def slow(x, seconds=0.3):
    time.sleep(seconds)
    return x


@app.task(name="boom")
def boom(*_):
    raise ValueError("boom")


@app.task(name="flaky", bind=True)
def flaky(self, x):
    if self.request.retries < 2:
        raise self.retry(exc=OSError("away"), countdown=0.1)
    return x


@app.task(name="turn", bind=True)
def turn(self, x):
    raise self.replace(chord([plus.s(x, 1), plus.s(x, 2)], total.s()))


@app.task(name="parent")
def parent(x):
    plus.delay(x, 2)
    plus.delay(x, 1)
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The client of a worker with four threads, and its signatures."""
    folder = tmp_path_factory.mktemp("demo")
    Path(folder, "demo.py").write_text(DEMO)
    with Project(str(folder)) as project:
        project.worker("celery -A demo worker --pool=threads -c 4 --without-mingle")
        yield project.client()


def call(client, name: str, *args, immutable: bool = False, **kwargs):
    return client.signature(name, args=args, kwargs=kwargs, immutable=immutable)


def seen(client, send, wait: float = 20) -> list[str]:
    """The lines about what a function sends, the blanks in them made one each."""
    with Canvas(client, wait) as canvas:
        send()
    assert not after_task_publish.receivers, "what is sent after the block is no part of it"
    text = canvas._repr_mimebundle_()["text/plain"]
    assert text == str(canvas)
    return [re.sub(" +", " ", line).strip() for line in text.splitlines()]


def test_a_chain_a_group_and_a_chord_are_seen_with_what_waits_for_what(demo):
    def mixed():
        steps = [call(demo, "slow", 1), call(demo, "plus", 2)]
        between = group(chain(*steps), call(demo, "plus", 5, immutable=True), call(demo, "slow"))
        body = call(demo, "total") | call(demo, "plus", y=7)
        chain(call(demo, "plus", 1, 2), between, body)()

    for _ in range(3):
        assert seen(demo, mixed) == [
            "canvas of 7 tasks: 7 succeeded",
            "1 plus(1, 2) succeeded: 3",
            "2 slow(3, 1) after 1 succeeded: 3",
            "3 plus(3, 2) after 2 succeeded: 5",
            "4 plus(5) after 1 succeeded: 5",
            "5 slow(3) after 1 succeeded: 3",
            "6 total([5, 5, 3]) after 3 to 5 succeeded: 13",
            "7 plus(13, y=7) after 6 succeeded: 20",
        ]


def test_the_links_after_a_failure_are_never_sent(demo):
    links = call(demo, "plus", 1, 2) | call(demo, "boom") | call(demo, "plus", 3)
    assert seen(demo, links.delay)[1:] == [
        "1 plus(1, 2) succeeded: 3",
        "2 boom(3) after 1 failed: ValueError('boom')",
        "3 plus(…, 3) after 2 never sent",
    ]
    unfit = call(demo, "plus", 1) | call(demo, "total", 2)  # the worker sees that when it sends the second one
    [_, first, second] = seen(demo, unfit.delay)
    assert first.startswith("1 plus(1) failed: TypeError('total() takes 1 positional argument but 2 were given'")
    assert second == "2 total(…, 2) after 1 never sent"
    header = [call(demo, "slow", 1), call(demo, "boom")]
    assert seen(demo, chord(header, call(demo, "total")).delay) == [
        "canvas of 3 tasks: 1 succeeded, 1 failed, 1 never sent",
        "1 slow(1) succeeded: 1",
        "2 boom() failed: ValueError('boom')",
        "3 total(…) after 1, 2 never sent",
    ]


def test_retries_revoked_and_expired_tasks_are_said_so(demo):
    header = [call(demo, "flaky", 1), call(demo, "plus", 1).set(countdown=0.5, expires=0.1)]
    assert seen(demo, chord(header, call(demo, "total")).delay)[1:] == [
        "1 flaky(1) succeeded: 1 (after 2 retries)",
        "2 plus(1) revoked: it had expired",
        "3 total(…) after 1, 2 never sent",
    ]

    def revoked():
        result = (call(demo, "plus", 1).set(countdown=1) | call(demo, "plus", 1)).delay()
        until(lambda: demo.control.inspect(timeout=0.3).scheduled(), "the worker has it")
        result.parent.revoke()

    assert seen(demo, revoked)[1:] == ["1 plus(1) revoked", "2 plus(…, 1) after 1 never sent"]


def test_callbacks_replaced_tasks_and_tasks_that_a_task_sends(demo):
    after = [call(demo, "plus", 10), call(demo, "boom", 3)]
    assert seen(demo, lambda: call(demo, "plus", 1, 2).apply_async(link=after))[1:] == [
        "1 plus(1, 2) succeeded: 3",
        "2 plus(3, 10) after 1 succeeded: 13",
        "3 boom(3, 3) after 1 failed: ValueError('boom')",
    ]
    assert seen(demo, (call(demo, "turn", 1) | call(demo, "plus", 1)).delay)[1:] == [
        "1 turn(1) replaced by total([2, 3]); succeeded: 5",
        "2 plus(5, 1) after 1 succeeded: 6",
        "3 plus(1, 1) after 1 succeeded: 2",
        "4 plus(1, 2) after 1 succeeded: 3",
    ]
    assert seen(demo, call(demo, "parent", 1).delay)[1:] == [
        "1 parent(1) succeeded: None",
        "2 plus(1, 1) after 1 succeeded: 2",
        "3 plus(1, 2) after 1 succeeded: 3",
    ]


def test_what_is_not_over_in_time_is_named(demo):
    links = call(demo, "slow", 1, 2) | call(demo, "plus", 1)
    start = time.monotonic()
    assert seen(demo, lambda: [links.delay(), demo.send_task("plus", (1,), queue="nobody")], wait=0.5) == [
        "canvas of 3 tasks: 1 not received, 1 not sent yet, 1 running",
        "1 slow(1, 2) running",
        "2 plus(…, 1) after 1 not sent yet",
        "3 plus(1) not received",
        "Not over after 0.5 s: 1 to 3.",
    ]
    assert time.monotonic() - start < 30, "and it doesn't wait for ever"


def test_many_tasks_are_counted_and_an_id_used_twice_is_said_so(demo):
    many = seen(demo, group(call(demo, "plus", n) for n in range(33)).delay)
    assert many[0] == "canvas of 33 tasks: 33 succeeded" and many[-1] == "and 3 more: 3 succeeded"

    def twice():
        one = call(demo, "plus", 1)
        one.freeze()
        one.delay()
        one.delay()

    assert seen(demo, twice)[1:] == ["1 plus(1) succeeded: 1 (sent 2 times with the same id)"]

    @demo.task(name="plus")
    def plus(x, y=0):
        return x + y

    pieces = seen(demo, plus.chunks([(1, 2), (3, 4), (5, 6)], 2).delay)
    assert pieces[1:] == ["1 celery.starmap of plus succeeded: [3, 7]", "2 celery.starmap of plus succeeded: [11]"]


def test_the_picture_has_a_box_for_each_task_and_the_same_words(demo):
    with Canvas(demo) as canvas:
        chord([call(demo, "plus", n) for n in (1, 2)] + [call(demo, "boom")], call(demo, "total")).delay()
    page = canvas._repr_mimebundle_()["text/html"]
    alt, source = re.search(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,([^"]+)"', page).groups()
    assert alt.startswith("A canvas of 4 tasks: 2 succeeded, 1 failed, 1 never sent; 1 plus(1) succeeded: 1; ")
    svg = ElementTree.fromstring(base64.b64decode(source))
    boxes = svg.findall(".//{*}rect")
    assert [box.get("class") for box in boxes] == ["bar", "bar", "bad", "row"]
    assert len(svg.findall(".//{*}path")) == 3
    assert len({box.get("x") for box in boxes[:3]}) == 1 and float(boxes[3].get("x")) > float(boxes[0].get("x"))
    words = [text.text for text in svg.findall(".//{*}text")]
    assert {"1 plus(1)", "succeeded: 1", "4 total(…)", "never sent"} <= set(words)
    for box in boxes:
        assert float(box.get("x")) >= 0 and float(box.get("x")) + float(box.get("width")) <= float(svg.get("width"))
        assert float(box.get("y")) + float(box.get("height")) <= float(svg.get("height"))


def test_a_block_that_sends_nothing_and_one_that_fails(demo):
    with pytest.raises(ClassroomError, match=r"^A Canvas follows what its block sends, and it has sent no task\.$"):
        seen(demo, lambda: None)
    with pytest.raises(ClassroomError, match=r"^Canvas takes a Celery app, as in Canvas\(client\), not a str\.$"):
        Canvas("demo")
    with pytest.raises(TimeoutError), Canvas(demo) as canvas:
        call(demo, "slow", 1).delay().get(timeout=0.01)
    assert "succeeded: 1" in str(canvas), "an error in the block passes through, and the canvas is still awaited"


def test_jupyterlab_shows_it_while_it_runs(pair):
    with viewing() as kernel:
        kernel.run("import time\nfrom celery import Celery\nfrom course_tasks.classroom.canvas import Canvas")
        kernel.run("client = Celery()")
        block = "with Canvas(client) as canvas:\n    client.send_task('add', (4, 5))\n    time.sleep(1)\n"
        kernel.in_cell(block + "canvas", "a-cell")
        assert "not received" in kernel.updates[0] and kernel.updates[-1] == ""
        number = len(kernel.updates)
        [last] = kernel.run(block + "canvas")
        assert last["data"]["text/plain"].splitlines()[1:] == [" 1  add(4, 5)  not received", "No worker runs."]
        assert len(kernel.updates) == number, "elsewhere only the end is shown"
