"""What a learner has answered so far, and where they stopped: `progress.json` beside their working copies.

Standard library only: JupyterLab's settings read it as well. Several kernels may write it at once.
"""

import contextlib
import json
from typing import Any

from course_tasks import copies

VERSION = 1
STATES = ("open", "wrong", "right")


def empty() -> dict[str, Any]:
    """The progress of somebody who starts: no answers to exercises or quiz questions, and no chapter."""
    return {"version": VERSION, "exercises": {}, "quiz": {}, "last": None}


def read() -> dict[str, Any]:
    """What progress.json says; the empty progress if it is missing or damaged.

    Returns:
        "exercises" and "quiz", each with the states ("open", "wrong" or "right") by name ("05b-1"), and "last", the
        chapter ("05b") where the learner was last, or None.
    """
    try:
        return _read()
    except (OSError, ValueError):
        return empty()


def note(chapter: str, kind: str = "", name: str = "", state: str = "") -> tuple[dict[str, Any], str]:
    """Write down where the learner is, and the state of one answer. What was right once stays right.

    Args:
        chapter: where the learner is, "05b" for example.
        kind: "exercises" or "quiz"; nothing if there is no answer to write down.
        name: the name of the exercise or question.
        state: "open", "wrong" or "right".

    Returns:
        The progress as `read` returns it, with this in it, and a line for the learner if something went wrong: the
        file was damaged and has been set aside, or it can't be written.
    """
    path, progress, notice = copies.folder() / "progress.json", empty(), ""
    try:
        with copies.locked(path.parent):
            try:
                progress = _read()
            except (IsADirectoryError, ValueError):
                kept = copies.set_aside(path)
                notice = (
                    f"Your progress file was damaged. It was moved to {copies.shown(kept)}, and a new one was started."
                )
            _add(progress, chapter, kind, name, state)
            new = path.with_name(f".new-{path.name}")
            try:
                new.write_text(json.dumps(progress, indent=1) + "\n", encoding="utf-8")
                new.replace(path)
            finally:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
    except OSError as error:
        progress, notice = read(), f"Your progress can't be saved: {copies.reason(error)}."
        _add(progress, chapter, kind, name, state)
    return progress, notice


def _add(progress: dict[str, Any], chapter: str, kind: str, name: str, state: str) -> None:
    progress["last"] = chapter
    if kind and progress[kind].get(name) != "right":
        progress[kind][name] = state


def _read() -> dict[str, Any]:
    """The file's content, or the empty progress if there is none. Raises OSError, or ValueError if it is damaged."""
    try:
        progress = json.loads((copies.folder() / "progress.json").read_text(encoding="utf-8"))
        states = [*progress["exercises"].values(), *progress["quiz"].values()]
        sound = progress["version"] == VERSION and all(state in STATES for state in states)
        sound = sound and isinstance(progress["last"], str | None)
    except (FileNotFoundError, NotADirectoryError):
        return empty()
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError("not a progress file") from error
    if not sound:
        raise ValueError("not a progress file")
    return progress
