"""What a notebook loads: the magics (`%load_ext course_tasks.classroom`), `check`, `quiz` and `free_port`."""

import contextlib
import random
import socket

from course_tasks import copies, progress
from course_tasks.classroom import course_map
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.pair import notebook_name, show_servers
from course_tasks.classroom.terminal import TerminalMagics
from course_tasks.exercises import check, quiz

__all__ = ["ClassroomError", "check", "free_port", "load_ipython_extension", "quiz"]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago.

    It is not one of those from 32768 on that the system gives to outgoing connections, or it might be taken before it
    is used.

    Raises:
        ClassroomError: there is none.
    """
    for port in random.sample(range(15000, 32000), 1000):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise ClassroomError("This machine has no free TCP port from 15000 to 32000. Stop what listens there.")


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
        progress.note(chapter)
