"""What a notebook loads with `%load_ext course_tasks.classroom`: the terminal cell, `%servers`, and `check`."""

from course_tasks import servers
from course_tasks.exercises import check

__all__ = ["ClassroomError", "check", "load_ipython_extension"]


class ClassroomError(Exception):
    """What went wrong in the classroom, for the learner: shown as this text alone, with no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def load_ipython_extension(ipython) -> None:
    """Register the course's magics with a running IPython (IPython calls this)."""
    from course_tasks.classroom.terminal import TerminalMagics

    ipython.register_magics(TerminalMagics)
    ipython.register_magic_function(_servers, "line", "servers")


def _servers(line: str) -> None:
    """Find the broker and the backend, or start them, and print where they are."""
    try:
        pair = servers.ensure()
    except servers.ServerError as error:
        raise ClassroomError(str(error)) from None
    print(f"broker:  {pair.broker}\nbackend: {pair.backend}")
    if pair.notice:
        print(pair.notice)
