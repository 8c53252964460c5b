"""What a notebook loads: the magics (`%load_ext course_tasks.classroom`), `check`, `quiz` and the toolkit."""

import os
from pathlib import Path

from course_tasks import copies, progress
from course_tasks.classroom import course_map
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.pair import show_servers
from course_tasks.classroom.terminal import TerminalMagics
from course_tasks.classroom.toolkit import (
    Spans,
    ask_worker,
    collect,
    follow_log,
    free_port,
    memory,
    run_tasks,
    send_under,
    wait_until,
)
from course_tasks.exercises import check, quiz
from course_tasks.jupyter.first_cell import notebook_name

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
    "send_under",
    "wait_until",
]


def load_ipython_extension(ipython) -> None:
    """Register the course's magics with a running IPython, give it `quiz`, and note the chapter (IPython calls this).

    Doing it again is safe: the terminals that run stay as they are.

    Args:
        ipython: the running IPython.

    Raises:
        ClassroomError: the chapter has no folder for its files, and it can't be made.
    """
    if "TerminalMagics" not in ipython.magics_manager.registry:
        ipython.register_magics(TerminalMagics)
    ipython.register_magic_function(show_servers, "line", "servers")
    ipython.register_magic_function(course_map.show, "line", "progress")
    ipython.push({"quiz": quiz})

    def forget(*_) -> None:
        """Forget that it is loaded, or IPython would print that when a learner runs the first cell again."""
        ipython.extension_manager.loaded.discard(__name__)
        ipython.events.unregister("post_execute", forget)

    ipython.events.register("post_execute", forget)
    chapter = copies.number(notebook_name())
    _enter_folder(ipython.user_ns.get("__vsc_ipynb_file__"), chapter in copies.chapters())
    if chapter in copies.chapters():
        _, trouble = progress.note(chapter)
        if trouble:
            print(trouble)


def _enter_folder(notebook: str | None, is_chapter: bool) -> None:
    """Work in the notebook's folder, as Jupyter does, and have a folder `scratch` there for the chapter's files.

    Args:
        notebook: its path, if VS Code has told it. VS Code may start kernels elsewhere, such as in the home folder.
        is_chapter: whether the notebook is known to be one of the course's. Where its name is unknown, as with nbclient
            and papermill, it may be one.
    """
    here = Path.cwd()
    place = Path(notebook).parent if notebook and is_chapter else here
    if place == here and not (here / "scratch").is_dir() and here == copies.NOTEBOOKS.parent:
        place = copies.NOTEBOOKS
    try:
        os.chdir(place)
        if is_chapter:
            Path("scratch").mkdir(exist_ok=True)
    except OSError as error:
        raise ClassroomError(
            f"This chapter writes files to the folder {place / 'scratch'}, which can't be used: {error.strerror}. "
            "Copy the notebook into a folder of your own, and open it there."
        ) from None
    if place != here:
        print(f"The kernel was started in {here}. Now it works in {place}, where the notebook is.")
    elif not is_chapter and not notebook_name() and not Path("scratch").is_dir():
        print(f"A chapter writes files to the folder scratch, and {place} has none. Run it in the course's notebooks.")
