"""`Calls`: what its text and its picture say."""

import base64
import re
import xml.etree.ElementTree as ET

import pytest

from course_tasks.classroom import ClassroomError
from course_tasks.classroom.calls import Calls

ROWS = {"fixed": [10.0, 10.1, 10.4, 11.2], "backoff": [20.0, 23.1]}


def test_the_text_counts_calls_and_the_most_in_half_a_second():
    assert repr(Calls(ROWS)) == (
        "fixed: 4 calls in 1.2 s, at most 3 in half a second\nbackoff: 2 calls in 3.1 s, at most 1 in half a second"
    )
    assert repr(Calls({"one": [7]})) == "one: 1 call in 0.0 s, at most 1 in half a second"


def test_the_picture_has_a_bar_for_each_half_second_with_calls_on_one_scale():
    page = Calls(ROWS)._repr_html_()
    assert 'alt="Calls over time. fixed: 4 calls' in page
    drawing = ET.fromstring(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]))
    bars = [bar for bar in drawing.findall(".//{*}rect") if bar.get("class") == "bar" and float(bar.get("height"))]
    heights = [float(bar.get("height")) for bar in bars]
    assert len(bars) == 4 and heights[0] == pytest.approx(3 * heights[1], rel=0.01) and heights[2] == heights[3]
    lefts = [float(bar.get("x")) for bar in bars]
    assert lefts[0] == lefts[2] and lefts[3] > lefts[1], "each row begins with its first call"
    assert lefts[3] + float(bars[3].get("width")) <= float(drawing.get("width"))


def test_names_are_escaped():
    ET.fromstring(Calls({"<b>&": [1]}).svg())


@pytest.mark.parametrize("rows", [{}, {"fixed": []}, {"fixed": ["now"]}, {"fixed": 1}, [1, 2], None])
def test_other_things_are_refused_in_one_line(rows):
    with pytest.raises(ClassroomError) as raised:
        Calls(rows)
    assert "\n" not in str(raised.value)
