"""The learner's working copies: `my_notebooks/` has the chapters of `notebooks/` without outputs, to work in.

The reference page has a working copy too, so that notes which a learner writes there are in a file of their own.

A copy whose cells are as the course delivered them follows an update of the course. A copy that the learner changed is
never overwritten; `reset` replaces it and keeps it in `my_notebooks/old/`. To exchange a copy takes four steps, and a
kill between any two of them, a full disk or somebody who saves in the meantime costs nothing:

1. the fresh copy is written to a file beside the old one;
2. the old copy is moved to `old/`, into a new folder of its own;
3. the moved file is looked at once more: if it has been saved in the meantime, an update puts it back;
4. the fresh copy gets the free name, and never one that is taken.

Standard library only: the command `reset` works before anything is installed.
"""

import contextlib
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from course_tasks.install import ROOT, Problem

NOTEBOOKS = ROOT / "notebooks"
REFERENCE = "reference"
KEY = "course_tasks"  # in a notebook's metadata
MARK = re.compile(r"\n<!-- delivered: (\w+) -->\n")  # in the reference, where JupyterLab shows no comments
PATIENCE = 30.0  # seconds in which another command of the course has to be done with the folder


def folder() -> Path:
    """The folder of the working copies: `my_notebooks` in the clone, if COURSE_MY_NOTEBOOKS doesn't name another."""
    return Path(os.environ.get("COURSE_MY_NOTEBOOKS") or ROOT / "my_notebooks")


def chapters() -> dict[str, Path]:
    """The course's notebooks by the number that their names begin with: "05b" for `notebooks/05b_pool_limits.ipynb`."""
    found: dict[str, Path] = {}
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb")):
        if re.fullmatch(r"\d\d[a-z]?", number(path.name)):  # any other notebook there is the learner's
            found.setdefault(number(path.name), path)
    return found


def _originals() -> dict[str, Path]:
    """What has a working copy, by the name that `reset` takes: the chapters, and the reference."""
    page = NOTEBOOKS / f"{REFERENCE}.md"
    return chapters() | ({REFERENCE: page} if page.is_file() else {})


def number(name: str) -> str:
    """The number of the chapter that a notebook's name begins with: "05b" of "my_notebooks/05b_pool_limits.ipynb"."""
    return Path(name).stem.partition("_")[0]


def start_page(chapter: str | None) -> str:
    """Where JupyterLab opens.

    Args:
        chapter: the chapter to go on with, "05" for example; None or an unknown one means the first.

    Returns:
        A path under JupyterLab's root: the chapter's working copy, or the course's own notebook if there is no copy.
    """
    known = chapters()
    path = known.get(chapter or "") or next(iter(known.values()))
    return f"{folder().name if (folder() / path.name).is_file() else NOTEBOOKS.name}/{path.name}"


def update() -> list[str]:
    """Give every chapter and the reference a working copy, and bring up to date those that are still as delivered.

    Returns:
        A line for each thing that the learner should know. Empty if all is well.
    """
    try:
        with locked(folder()):
            _link_the_rest()
            return [line for path in _originals().values() if (line := _update(path))]
    except OSError as error:
        place = shown(folder())
        return [f"Can't bring {place} up to date: {reason(error)}. It stays as it was; the next `lab` tries again."]


def reset(names: list[str]) -> list[str]:
    """Give chapters fresh working copies, and keep the old ones in `old/`.

    Args:
        names: the chapters as "05" or "05_pools.ipynb"; "reference" for the reference.

    Returns:
        A line for each chapter, which says where the old copy is.

    Raises:
        Problem: there is no such chapter (then nothing is done), or a file can't be written.
    """
    known = _originals()
    if not names:
        raise Problem("Which chapter? For example: python3 -m course_tasks reset 05")
    for name in names:
        if number(name) not in known:
            near = difflib.get_close_matches(number(name), known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"The chapters are {', '.join(chapters())}."
            raise Problem(f"There is no chapter {name}. {hint}")
    try:
        with locked(folder()):
            _link_the_rest()
            return [_reset(known[chapter]) for chapter in dict.fromkeys(map(number, names))]
    except OSError as error:
        raise Problem(f"Can't reset: {reason(error)}. Everything you wrote is still in {shown(folder())}.") from None


def _update(source: Path) -> str:
    """Bring one copy up to date if it is as delivered. Returns a line for the learner, or "" if there is none."""
    copy = folder() / source.name
    try:
        fresh = _fresh(source)
    except Problem as problem:
        return str(problem)
    how = f"python3 -m course_tasks reset {number(source.name)}"
    if os.path.lexists(copy):
        try:
            mine = _read(copy)
        except (OSError, ValueError):
            kind = "notebook" if copy.suffix == ".ipynb" else "text"
            return f"{shown(copy)} can't be read as a {kind}, so it stays as it is. For a fresh one: {how}"
        if _digest(mine) != _delivered(mine):
            current = _delivered(fresh) in (_digest(mine), _delivered(mine))
            newer = "there is a newer version. You have changed yours, so it stays. To get the new one and keep yours"
            return "" if current else f"{shown(copy)}: {newer}: {how}"
        if _delivered(mine) == _delivered(fresh):
            return ""
    old = _exchange(copy, fresh, keep=False)
    return f"{shown(copy)} was saved while it was replaced. What was saved is kept: {shown(old)}" if old else ""


def _reset(source: Path) -> str:
    copy = folder() / source.name
    old = _exchange(copy, _fresh(source), keep=True)
    line = f"{shown(copy)} is a fresh copy now."
    if not _as_delivered(copy):
        line = f"{shown(copy)} was saved by another program at this moment: close it there, and reset it again."
    return f"{line} Your old copy is {shown(old)}. If it is open: File > Reload Notebook from Disk." if old else line


def _exchange(copy: Path, fresh: dict[str, Any], keep: bool) -> Path | None:
    """Put a fresh notebook in the place of a copy.

    Args:
        copy: the copy, which may be missing.
        fresh: the notebook.
        keep: whether the old copy stays in `old/`; if not, it is removed, provided that it is as delivered.

    Returns:
        Where the old copy is kept, or None.
    """
    new = copy.with_name(f".new-{copy.name}")
    old = None
    try:
        with new.open("x", encoding="utf-8") as file:
            file.write(_written(fresh, copy))
        if os.path.lexists(copy):
            old = set_aside(copy)
        saved_meanwhile = old is not None and not keep and not _as_delivered(old)
        with contextlib.suppress(FileExistsError):  # a program has saved it anew at this moment, and that one stays
            _place(old if old is not None and saved_meanwhile else new, copy)
    finally:
        new.unlink(missing_ok=True)
    if old is not None and not keep and os.path.lexists(old) and _as_delivered(old):
        old.unlink()
    if old is not None:
        _remove_empty(old.parent, old.parent.parent)
    return old if old is not None and os.path.lexists(old) else None


def set_aside(path: Path) -> Path:
    """Move a file to `old/` beside it, into a new folder that has no other file.

    Args:
        path: the file, or whatever else is there.

    Returns:
        Where it is now: `old/05_pools-1/05_pools.ipynb`, for example.

    Raises:
        OSError: it can't be moved; then it stays.
    """
    old = path.parent / "old"
    old.mkdir(exist_ok=True)
    for count in itertools.count(1):
        place = old / f"{path.stem}-{count}"
        with contextlib.suppress(FileExistsError):
            place.mkdir()
            break
    try:
        return path.rename(place / path.name)
    except OSError:
        _remove_empty(place, old)
        raise


def _place(source: Path, target: Path) -> None:
    """Move a file to a name that is free; raise FileExistsError if it isn't. A link can't overwrite, a rename can."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(target) from None
        source.rename(target)
    else:
        source.unlink()


def _remove_empty(*folders: Path) -> None:
    for place in folders:
        with contextlib.suppress(OSError):  # it is not empty
            place.rmdir()


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Hold a folder's lock, so that of two commands one waits for the other; make the folder if it is missing.

    Args:
        place: the folder. Its leftovers of a killed command are removed.

    Raises:
        OSError: the folder can't be made, or another program has held its lock for PATIENCE seconds.
    """
    import fcntl  # not on Windows, where the command line ends earlier

    if not os.path.lexists(place):
        place.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + PATIENCE
        while True:  # the system drops the lock when its holder ends, however it ends; a suspended program keeps it
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "another command of the course is using it", str(place)) from None
                time.sleep(0.01)
        for leftover in place.glob(".new-*"):
            with contextlib.suppress(OSError):  # a folder, which is nobody's leftover
                leftover.unlink()
        _remove_empty(*place.glob("old/*-[0-9]*"))
        yield
    finally:
        os.close(handle)


def _link_the_rest() -> None:
    """Put what else `notebooks/` has beside the copies, so that their links work, and a `scratch` of their own.

    Where a file system has no symbolic links, copies do: only what is missing is copied, and nothing is overwritten.
    """
    with contextlib.suppress(FileExistsError):
        (folder() / "scratch").mkdir()
    for entry in NOTEBOOKS.iterdir():
        link = folder() / entry.name
        if entry.suffix == ".ipynb" or entry.name == "scratch" or entry.name[0] == ".":
            continue
        if entry.name == f"{REFERENCE}.md":
            if link.is_symlink() and link.resolve() == entry.resolve():  # as older versions of the course had it
                link.unlink()
            continue
        if os.path.lexists(link):
            continue
        try:
            link.symlink_to(os.path.relpath(entry, folder()))
        except OSError:
            shutil.copytree(entry, link) if entry.is_dir() else shutil.copy(entry, link)


def _read(path: Path) -> dict[str, Any]:
    """A notebook's JSON, or a text as if it were a notebook's one cell. Raises OSError; ValueError if it is neither."""
    if not path.is_file():
        raise ValueError("not a file")
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        mark = MARK.search(text)
        metadata = {KEY: {"delivered": mark[1]}} if mark else {}
        return {"cells": [{"cell_type": "markdown", "source": MARK.sub("", text)}], "metadata": metadata}
    try:
        notebook = json.loads(text)
        _digest(notebook)
        _delivered(notebook)
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError("not a notebook") from error
    return notebook


def _fresh(source: Path) -> dict[str, Any]:
    """A chapter as it is delivered: without outputs, and knowing what was delivered. Raises Problem if damaged."""
    try:
        notebook = _read(source)
    except ValueError:
        place = shown(source)
        raise Problem(f"{place} is damaged. Move it away, and get it again with: git checkout {place}") from None
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell.update(execution_count=None, outputs=[])
        else:  # the button that opens a terminal, in the folder of the notebook
            cell["source"] = "".join(cell["source"]).replace('"cwd": "notebooks"', f'"cwd": "{folder().name}"')
    notebook["metadata"][KEY] = {"delivered": _digest(notebook)}
    return notebook


def _written(notebook: dict[str, Any], path: Path) -> str:
    """What a file contains that `_read` reads as this notebook."""
    if path.suffix == ".ipynb":
        return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    return f"{notebook['cells'][0]['source']}\n<!-- delivered: {_delivered(notebook)} -->\n"


def _digest(notebook: dict[str, Any]) -> str:
    """What the cells say, whether they were run or not, as a short text: equal if all cells are, in the same order."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _delivered(notebook: dict[str, Any]) -> str | None:
    """The digest of what the course delivered, or None if the notebook isn't from the course."""
    return notebook["metadata"].get(KEY, {}).get("delivered")


def _as_delivered(path: Path) -> bool:
    try:
        notebook = _read(path)
    except (OSError, ValueError):
        return False
    return _digest(notebook) == _delivered(notebook)


def shown(path: Path) -> str:
    """A path as the learner knows it: from the clone's folder on, if it is in there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def reason(error: OSError) -> str:
    """What went wrong, and with which file."""
    return f"{error.strerror} ({shown(Path(error.filename))})" if error.filename else str(error.strerror)
