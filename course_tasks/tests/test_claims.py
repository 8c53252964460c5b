"""Claims of the chapters that no cell proves, because such a cell would only be in a learner's way.

Each test quotes the sentence, sees that it still stands in its chapter, and tries it. A test that needs a worker
takes `project`: an empty folder with servers of its own (see exercises/project.py).
"""

import inspect

import pytest
from celery.result import AsyncResult

from course_tasks import copies
from course_tasks.exercises.project import Project
from course_tasks.tests.plugin import cells


@pytest.fixture
def project(tmp_path):
    """An empty folder, and a broker and a backend for what is written there."""
    with Project(str(tmp_path)) as project:
        yield project


def stands(chapter: str, *sentences: str) -> None:
    """Check that sentences are in a chapter's text still, whatever the line breaks."""
    text = " ".join("\n".join(cell.source for cell in cells(copies.chapters()[chapter], "markdown")).split())
    for sentence in sentences:
        assert " ".join(sentence.split()) in text, f"chapter {chapter} no longer says: {sentence}"


# --- 00 ------------------------------------------------------------------------------------------------------


def test_get_waits_for_ever_if_it_is_not_told_how_long():
    stands("00", "Without a `timeout`, `get` would wait for ever")
    assert inspect.signature(AsyncResult.get).parameters["timeout"].default is None


# --- 01 ------------------------------------------------------------------------------------------------------


# --- 01b -----------------------------------------------------------------------------------------------------


# --- 02 ------------------------------------------------------------------------------------------------------


# --- 02b -----------------------------------------------------------------------------------------------------


# --- 03 ------------------------------------------------------------------------------------------------------


# --- 03b -----------------------------------------------------------------------------------------------------


# --- 04 ------------------------------------------------------------------------------------------------------


# --- 04b -----------------------------------------------------------------------------------------------------


# --- 05 ------------------------------------------------------------------------------------------------------


# --- 05b -----------------------------------------------------------------------------------------------------


# --- 06 ------------------------------------------------------------------------------------------------------


# --- 06b -----------------------------------------------------------------------------------------------------


# --- 07 ------------------------------------------------------------------------------------------------------


# --- 07b -----------------------------------------------------------------------------------------------------


# --- 07c -----------------------------------------------------------------------------------------------------


# --- 07d -----------------------------------------------------------------------------------------------------
