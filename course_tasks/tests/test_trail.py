"""The picture of a request's way, drawn from lines that a web service and a worker really wrote."""

import base64
import re
from xml.etree import ElementTree

import pytest

from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.trail import Trail

# Of chapter 07d's two services: an order of Ada's that went well, and one of Eve's for which there was no lamp.
WEB = """\
[2026-11-25 03:59:42,885 INFO -] Application startup complete.
[2026-11-25 03:59:43,417 INFO ada-7] an order of ada
[2026-11-25 03:59:43,420 INFO eve-9] an order of eve
[2026-11-25 03:59:43,560 INFO eve-9] 127.0.0.1:52671 - "POST /orders/eve HTTP/1.1" 202
[2026-11-25 03:59:43,564 INFO ada-7] 127.0.0.1:52670 - "POST /orders/ada HTTP/1.1" 202
"""
SHOP = """\
[2026-11-25 03:59:43,532 INFO ada-7] Task order[28b2b50e-1ece-4615-b2b8-aa8c153b67a0] received
[2026-11-25 03:59:43,535 INFO eve-9] Task order[6e0a1f52-9d0a-4f6b-a2a0-35f5d2f2a0f1] received
[2026-11-25 03:59:43,545 INFO ada-7] Task charge[147320a1-7da3-409b-8d79-9d3f405d6d71] received
[2026-11-25 03:59:43,550 INFO ada-7] Task order[28b2b50e-1ece-4615-b2b8-aa8c153b67a0] succeeded in 0.0168003s: None
[2026-11-25 03:59:43,551 INFO ada-7] Task reserve[c68716b4-ef9c-4d5e-be8b-ceb00449b579] received
[2026-11-25 03:59:43,556 INFO eve-9] Task reserve[0d9d2b11-58f5-4c0e-8a2e-f3a1d7a2c7d4] received
[2026-11-25 03:59:43,754 INFO ada-7] Task reserve[c68716b4-ef9c-4d5e-be8b-ceb00449b579] succeeded in 0.2019s: 'a lamp'
[2026-11-25 03:59:43,762 ERROR eve-9] Task reserve[0d9d2b11-58f5-4c0e-8a2e-f3a1d7a2c7d4] raised unexpected: \
LookupError('no lamp left')
Traceback (most recent call last):
  File "shop.py", line 26, in reserve
    raise LookupError("no lamp left")
LookupError: no lamp left
[2026-11-25 03:59:43,770 ERROR eve-9] Chord '87f80069-cf57-4f5d-b3d9-4b8d7c2f3c4d' raised: ChordError("Dependency")
[2026-11-25 03:59:43,851 INFO ada-7] Task pack[17c39d2d-e825-457a-819e-6236169fe79f] received
[2026-11-25 03:59:43,852 INFO ada-7] Task charge[147320a1-7da3-409b-8d79-9d3f405d6d71] succeeded in 0.3065s: 'a charge'
[2026-11-25 03:59:43,954 INFO ada-7] Task pack[17c39d2d-e825-457a-819e-6236169fe79f] succeeded in 0.1017s: 'a parcel'
"""
LINES = (WEB + SHOP).splitlines()


def drawn(trail: Trail) -> ElementTree.Element:
    """The picture that a notebook shows."""
    return ElementTree.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", trail._repr_html_())[1]))


def rects(trail: Trail, kind: str) -> list[dict[str, float]]:
    """Those of the rows; the key to the colours has some as well."""
    found = [rect.attrib for rect in drawn(trail).iter() if rect.get("class") == kind and rect.get("height") != "12"]
    return [{name: float(value) for name, value in rect.items() if name != "class"} for rect in found]


def line(text: str, at: str = "43,000", id: str = "ada-7") -> str:
    return f"[2026-11-25 03:59:{at} INFO {id}] {text}"


RECEIVED, RETRY = "Task again[28b2b50e-1ece] received", "Task again[28b2b50e-1ece] retry: Retry in 0s"


def test_the_text_has_a_line_for_the_request_and_for_each_task_as_they_arrived():
    assert repr(Trail(LINES, "ada-7")).splitlines() == [
        "The trail of ada-7: 5 steps",
        "+0.000 s POST /orders/ada: answered 202 after 0.147 s",
        "+0.115 s order: waited 0.001 s, ran 0.017 s, succeeded",
        "+0.128 s charge: waited 0.000 s, ran 0.306 s, succeeded",
        "+0.134 s reserve: waited 0.001 s, ran 0.202 s, succeeded",
        "+0.434 s pack: waited 0.001 s, ran 0.102 s, succeeded",
    ]


def test_lines_in_any_order_and_of_other_requests_change_nothing():
    assert repr(Trail(LINES[::-1], "ada-7")) == repr(Trail(LINES, "ada-7"))
    assert repr(Trail([text for text in LINES if " ada-7] " in text], "ada-7")) == repr(Trail(LINES, "ada-7"))


def test_what_failed_and_what_is_not_over_is_shown():
    trail = Trail(LINES, "eve-9")
    assert repr(trail).splitlines()[2:] == ["+0.115 s order: not over", "+0.136 s reserve: failed after 0.206 s"]
    assert len(rects(trail, "bad")) == 1
    [wait] = rects(trail, "wait")  # up to the last line
    [bad] = rects(trail, "bad")
    assert wait["x"] + wait["width"] > bad["x"] + bad["width"]


def test_a_bar_begins_where_the_task_started_to_run():
    trail = Trail(LINES, "ada-7")
    bars = rects(trail, "bar")
    assert len(bars) == 5 == len(rects(trail, "row"))
    request, order, charge, reserve, pack = bars
    assert request["x"] < order["x"] < charge["x"] < reserve["x"] < pack["x"]
    assert charge["width"] / reserve["width"] == pytest.approx(0.306 / 0.202, rel=0.02)
    assert pack["x"] + pack["width"] <= float(drawn(trail).get("width"))
    texts = {text.text for text in drawn(trail).iter() if text.tag.endswith("text")}
    assert {"ada-7, 0.54 s", "POST /orders/ada", "reserve", "waited", "ran", "failed"} < texts


def test_a_line_of_the_tasks_own_tells_when_it_started_if_it_did_not_succeed():
    lines = [line(RECEIVED), line("again[28b2b50e]: begins", "43,250"), line(RETRY, "43,300")]
    assert repr(Trail(lines, "ada-7")).splitlines()[1] == "+0.000 s again: waited 0.250 s, ran 0.050 s, retried"


def test_a_task_that_started_at_once_reads_like_the_others():
    lines = [line(RECEIVED), line("Task again[28b2b50e-1ece] succeeded in 0.1004s: None", "43,100")]
    assert repr(Trail(lines, "ada-7")).splitlines()[1] == "+0.000 s again: waited 0.000 s, ran 0.100 s, succeeded"


def test_each_run_of_a_task_is_a_step():
    again = [line(RECEIVED), line(RETRY, "43,100"), line(RECEIVED, "43,200")]
    assert [step.how for step in Trail(again, "ada-7").steps] == ["retried", "not over"]


def test_a_request_that_ended_badly_is_bad():
    trail = Trail([line('127.0.0.1:5 - "GET /x HTTP/1.1" 500')], "ada-7")
    assert [(step.name, step.how, step.bad) for step in trail.steps] == [("GET /x", "answered 500", True)]
    assert drawn(trail).get("width")  # although all was one moment


def test_hostile_names_are_escaped_and_long_ones_shortened():
    trail = Trail(
        [line('127.0.0.1:5 - "GET /<b>&" HTTP/1.1" 200'), line(f"Task {'x' * 90}[28b2b50e] received")], "ada-7"
    )
    assert "<b>" not in trail._repr_html_() and "x" * 21 + "…" in [text.text for text in drawn(trail).iter()]


@pytest.mark.parametrize(
    "lines, id, said",
    [
        ("a line", "ada-7", "takes a list of lines"),
        ([9], "ada-7", "takes a list of lines"),
        (None, "ada-7", "takes a list of lines"),
        (LINES, None, "takes a list of lines"),
        ([], "ada-7", "None of these 0 lines has the id 'ada-7'"),
        (LINES, "ada", "They have: -, ada-7, eve-9."),
        (["[03:59:43 INFO ada-7] short"], "ada-7", "another format"),
        (LINES, "-", "mention neither a request"),
    ],
)
def test_what_is_no_trail_gets_one_clear_line(lines, id, said):
    with pytest.raises(ClassroomError) as raised:
        Trail(lines, id)
    assert said in str(raised.value) and "\n" not in str(raised.value)
