"""What a notebook loads: the magics (`%load_ext course_tasks.classroom`), `check`, `quiz` and the toolkit."""

from course_tasks import copies, progress
from course_tasks.classroom import course_map
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.pair import notebook_name, show_servers
from course_tasks.classroom.terminal import TerminalMagics
from course_tasks.classroom.toolkit import (
    Spans,
    ask_worker,
    collect,
    follow_log,
    free_port,
    memory,
    run_tasks,
    wait_until,
)
from course_tasks.exercises import check, quiz

__all__ = [
    "ClassroomError",
    "Spans",
    "ask_worker",
    "check",
    "collect",
    "follow_log",
    "free_port",
    "load_ipython_extension",
    "memory",
    "quiz",
    "run_tasks",
    "wait_until",
]


def load_ipython_extension(ipython) -> None:
    """Register the course's magics with a running IPython, give it `quiz`, and note the chapter (IPython calls this).

    Args:
        ipython: the running IPython.
    """
    ipython.register_magics(TerminalMagics)
    ipython.register_magic_function(show_servers, "line", "servers")
    ipython.register_magic_function(course_map.show, "line", "progress")
    ipython.push({"quiz": quiz})
    chapter = copies.number(notebook_name())
    if chapter in copies.chapters():
        _, trouble = progress.note(chapter)
        if trouble:
            print(trouble)
