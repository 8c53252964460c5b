"""All that .venv needs in one file, for places without network: `pack` writes it, `install --from` reads it.

The file is a zip of wheels and of MANIFEST, which says what they are for. What reads it is standard library only.
"""

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

from course_tasks.install import PINS, PYTHON, ROOT, VERSION, Problem, say, settings

MANIFEST = "course.json"


def _linux(machine: str) -> list[str]:
    """The tags of wheels for Linux from glibc 2.5 to 2.28, which is Debian 10 and RHEL 8; the oldest are preferred."""
    old = [f"manylinux{name}_{machine}" for name in ("1", "2010", "2014")]
    return [f"manylinux_2_{minor}_{machine}" for minor in range(5, 29)] + old


def _macos(machine: str) -> list[str]:
    """The tags of wheels for macOS up to 14; each includes the older ones."""
    return [f"macosx_{version}_{machine}" for version in ("10_15", "11_0", "12_0", "13_0", "14_0")]


PLATFORMS = {
    "linux-x86_64": _linux("x86_64"),
    "linux-aarch64": _linux("aarch64"),
    "macos-arm64": _macos("arm64"),
    "macos-x86_64": _macos("x86_64"),
}
HERE = f"{'macos' if sys.platform == 'darwin' else 'linux'}-{platform.machine()}"


def _pins() -> str:
    return hashlib.sha256(b"\0".join((ROOT / name).read_bytes() for name in PINS[:2])).hexdigest()


def write(file: Path, pythons: list[str] | None, platforms: list[str] | None) -> None:
    """Write a file with the wheels for each of the Pythons on each of the platforms. Runs in .venv.

    Args:
        file: is made, or replaced when everything is there.
        pythons: versions such as "3.12"; None for this one.
        platforms: names from PLATFORMS; None for this one.

    Raises:
        Problem: a package can't be had, or the file not written.
    """
    targets = [(python, name) for python in pythons or [VERSION] for name in platforms or [HERE]]
    for python, name in targets:
        if not re.fullmatch(r"3\.(1[1-9]|[2-9]\d)", python):
            raise Problem(f"The course needs Python 3.11 or newer, so --python takes 3.12, say, and not {python}.")
        if name not in PLATFORMS:
            raise Problem(f"There are no packages for {name}. Name another platform: {', '.join(PLATFORMS)}.")
    _check_place(file)
    new = file.with_name(f"{file.name}.new")
    manifest = {"pins": _pins(), "for": [" on ".join(pair) for pair in targets]}
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        for python, name in targets:
            say(f"Downloading for Python {python} on {name}.")
            _download(python, name, folder)
        try:
            with zipfile.ZipFile(new, "w") as archive:  # not compressed, for wheels are
                archive.writestr(MANIFEST, json.dumps(manifest))
                for wheel in sorted(Path(folder).iterdir()):
                    archive.write(wheel, wheel.name)
            new.replace(file)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise _unwritable(file, error) from None
    say(f"{file} is written ({file.stat().st_size / 1e6:.0f} MB). With it, in the folder of the same course elsewhere:")
    say(f"python3 -m course_tasks install --from {file.name}")


def _unwritable(file: Path, error: OSError) -> Problem:
    return Problem(f"Can't write {file}: {error.strerror}. Name another file, or make room for it.")


def _check_place(file: Path) -> None:
    """Raises Problem if the file can't be written: better now than after the download."""
    try:
        tempfile.TemporaryFile(dir=file.absolute().parent).close()
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise _unwritable(file, error) from None


def _download(python: str, name: str, folder: str) -> None:
    """Fetch the wheels for a Python on a platform.

    Markers can tell patch releases of Python apart, and which one it is there, nobody knows: so what the first of them
    needs, and then what only the last one needs.
    """
    first = _needed(f"{python}.0", name)
    pip = [str(PYTHON), "-Im", "pip"]
    only = ["--only-binary", ":all:", "--no-deps", "--ignore-requires-python", "--implementation", "cp"]
    tags = [word for tag in PLATFORMS[name] for word in ("--platform", tag)]
    for needed in filter(None, (first, _needed(f"{python}.99", name) - first)):
        command = [*pip, "download", "-d", folder, *only, "--python-version", python, *tags, *sorted(needed)]
        if subprocess.run(command, env=settings(pip), cwd=ROOT, stdin=subprocess.DEVNULL).returncode:
            raise Problem(f"Some package for Python {python} on {name} can't be had: pip says above which, and why.")


def _needed(python: str, name: str) -> set[str]:
    """What a complete .venv is made of there, with the versions, by what the packages here say that they need."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    system, _, machine = name.partition("-")
    there = {
        "python_full_version": python,
        "python_version": python.rpartition(".")[0],
        "os_name": "posix",
        "sys_platform": {"macos": "darwin"}.get(system, system),
        "platform_system": {"macos": "Darwin"}.get(system, "Linux"),
        "platform_machine": machine,
    }

    def listed(name: str) -> list[Requirement]:
        return [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line[:1].isalnum()]

    def holds(requirement: Requirement, extra: str = "") -> bool:
        return not requirement.marker or requirement.marker.evaluate(there | {"extra": extra})

    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in listed(PINS[1]) if holds(pin)}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    needed = {"pip", *build}  # pip for a Python without ensurepip
    todo = [
        (requirement, extra)
        for requirement in (*filter(holds, listed(PINS[0])), Requirement("uv"))
        for extra in ("", *requirement.extras)
    ]
    seen = set()
    while todo:
        requirement, extra = todo.pop()
        package = canonicalize_name(requirement.name)
        needed.add(package + pins.get(package, str(requirement.specifier)))
        if (package, extra) not in seen:
            seen.add((package, extra))
            # one that isn't here is for there only, and needs nothing
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                for text in importlib.metadata.requires(package) or []:
                    if holds(further := Requirement(text), extra):
                        todo += [(further, extra) for extra in ("", *further.extras)]
    return needed


def opened(file: Path) -> zipfile.ZipFile:
    """Open a file of `pack` and see that it is whole and fits.

    Raises:
        Problem: it isn't, or doesn't.
    """
    again = "Make it anew with `python3 -m course_tasks pack`, in a clone of the same version"
    try:
        archive = zipfile.ZipFile(file)
        manifest = json.loads(archive.read(MANIFEST))
        pins, targets = manifest["pins"], manifest["for"]
        broken = archive.testzip() is not None
    except OSError as error:
        raise Problem(f"Can't read {file}: {error.strerror}.") from None
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError):
        broken = True
    if broken:
        raise Problem(f"{file} is damaged, or not made by `pack`. Copy it once more, or make it anew.")
    if pins != _pins():
        raise Problem(f"{file} was made from another version of the course. {again}.")
    if f"{VERSION} on {HERE}" not in targets:
        text = f"{file} is for Python {', '.join(targets)}, and this is {VERSION} on {HERE}"
        raise Problem(f"{text}. {again}, with --python {VERSION} --platform {HERE}.")
    return archive
