"""The chart of who ran what when, drawn from what the tasks return in each pool."""

import base64
import re
from xml.etree import ElementTree

import pytest

from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.gantt import Gantt
from course_tasks.spans import speedup, wall
from course_tasks.tasks import compute, wait


def span(thread: str = "MainThread", start: float = 0, seconds: float = 1, pid: int = 7) -> dict:
    """What the tasks return."""
    return {"pid": pid, "thread": thread, "start": start, "end": start + seconds, "delayed": 0, "seconds": seconds}


def drawn(chart: Gantt) -> ElementTree.Element:
    """The picture that a notebook shows."""
    return ElementTree.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", chart._repr_html_())[1]))


def rects(chart: Gantt, kind: str) -> list[dict[str, float]]:
    found = [rect.attrib for rect in drawn(chart).iter() if rect.get("class") == kind]
    return [{name: float(value) for name, value in rect.items() if name != "class"} for rect in found]


FIRST, SECOND = "ThreadPoolExecutor-0_0", "ThreadPoolExecutor-0_1"


@pytest.mark.parametrize(
    "values, slots",
    [
        ([span(pid=8), span(pid=9), span(pid=8, start=1)], 2),  # prefork
        ([span()], 1),  # solo
        ([span(FIRST), span(SECOND), span(SECOND, start=1), span(FIRST, start=1)], 2),
        ([span("Dummy-1"), span("Dummy-2")], 2),  # greenlets
        ([span("Dummy-1"), span("Dummy-2", start=1)], 1),  # a new greenlet, but the place was free again
        ([span("GreenThread-1"), span("GreenThread-2", start=1), span("GreenThread-3", start=1.5)], 2),
    ],
)
def test_a_slot_is_a_process_a_thread_or_a_place_for_greenlets(values, slots):
    chart = Gantt({"a": values})
    assert f"{len(values)} task{'s' * (len(values) > 1)} used {slots} slot{'s' * (slots > 1)} and took" in repr(chart)
    assert len(rects(chart, "row")) == slots and len(rects(chart, "bar")) == len(values)


def test_the_text_says_how_long_and_how_fast():
    chart = Gantt({"a": [span(), span(pid=8), span(start=1)]})
    assert repr(chart) == "a: 3 tasks used 2 slots and took 2.00 s, 1.5 times as fast as one by one"
    late = Gantt({"a": [span(), span(start=9)]})
    assert repr(late) == "a: 2 tasks used 1 slot and took 10.00 s, 5.0 times as slow as one by one"


def test_real_tasks_are_measured_by_their_own_clocks():
    values = [wait(0.2), compute(0.1)]
    assert all(value["end"] - value["start"] > 0.95 * value["seconds"] for value in values)  # by another clock
    assert wall(values) > 0.95 * 0.3 and speedup(values, delays=False) < 1.05
    assert values[0]["delayed"] == 0 <= values[1]["delayed"] <= values[1]["end"] - values[1]["start"]


def test_a_delay_by_others_can_be_left_out_of_the_speed_up():
    values = [span(pid=8), span(pid=9)]
    late = [value | {"end": 4, "delayed": 3} for value in values]
    assert speedup(values) == speedup(late, delays=False) == 2
    assert (speedup(late), wall(late)) == (0.5, 4)
    assert "4.00 s, 0.5 x" in [text.text for text in drawn(Gantt({"a": late})).iter()]


def test_a_task_may_be_too_short_for_the_clock():
    assert "took 0.00 s" in repr(chart := Gantt({"a": [span(seconds=0)]}))
    assert len(rects(chart, "bar")) == 1


def test_all_panels_have_one_scale_and_begin_with_their_first_task():
    chart = Gantt({"long": [span(start=5, seconds=2)], "short": [span(FIRST)]}, columns=2)
    long, short = rects(chart, "bar")
    assert long["x"] == short["x"] and long["width"] == pytest.approx(2 * short["width"], abs=0.2)
    texts = [text.text for text in drawn(chart).iter() if text.tag.endswith("text")]
    assert texts.count("2 s") == texts.count("0 s") == 2
    assert {"long", "short", "pid 7", "7, thread 1"} <= set(texts)


def test_many_slots_are_drawn_lower_and_stay_in_the_picture():
    chart = Gantt({"many": [span(f"Dummy-{number}") for number in range(61)]})
    bars = rects(chart, "bar")
    assert len(bars) == 61 and bars[0]["height"] < 16
    assert max(bar["y"] + bar["height"] for bar in bars) < float(drawn(chart).get("height"))


def test_a_title_is_escaped():
    chart = Gantt({'<b>"&': [span()]})
    assert "&lt;b&gt;&quot;&amp;: 1 task" in chart._repr_html_()
    assert '<b>"&' in [text.text for text in drawn(chart).iter()]


@pytest.mark.parametrize("panels", [{}, {"a": []}, {"a": [9]}, {"a": [{"pid": 7}]}, {"a": None}])
def test_what_is_no_list_of_spans_gets_one_clear_line(panels):
    with pytest.raises(ClassroomError, match=r"^Gantt takes ") as raised:
        Gantt(panels)
    assert "\n" not in str(raised.value)
