"""`pack` and `install --from`: real processes in copies of the clone that need a few small wheels, made here."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from course_tasks.pack import HERE
from course_tasks.tests.plugin import free_ports
from course_tasks.tests.test_launcher import LINE, READY, Clone

PYTHON = "{}.{}".format(*sys.version_info)
# a build backend by the name of the real one, for `-e .`: as much of it as pip calls
BACKEND = """
import pathlib, zipfile

def build_editable(folder, config_settings=None, metadata_directory=None):
    info, name = "course_tasks-0.1.0.dist-info/", "course_tasks-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr("course_tasks.pth", str(pathlib.Path.cwd()))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: course_tasks\\nVersion: 0.1.0\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "\\n".join(name + ",," for name in [*wheel.namelist(), info + "RECORD"]))
    return name
"""


def make_wheel(folder, name, version, files, tag="py3-none-any", requires=""):
    info = f"{name}-{version}.dist-info/"
    files = files | {
        f"{info}METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}",
        f"{info}WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}RECORD"]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A complete clone, with the wheels that it and its file were made of."""
    folder = tmp_path_factory.mktemp("packed")
    clone = Clone(folder / "the clone")
    wheels = folder / "wheels"
    wheels.mkdir()
    (folder / "tiny-1.0-py3-none-any.whl").rename(wheels / "tiny-1.0-py3-none-any.whl")
    packaging = importlib.metadata.distribution("packaging")
    code = {str(path): path.read_text() for path in packaging.files if path.suffix == ".py"}
    make_wheel(wheels, "packaging", packaging.version, code)
    make_wheel(wheels, "flit_core", "3.12.0", {"flit_core/__init__.py": "", "flit_core/buildapi.py": BACKEND})
    make_wheel(wheels, "pip", "99", {"no_pip.py": ""})
    make_wheel(wheels, "uv", "1.0", {"no_uv.py": ""})
    make_wheel(wheels, "forlinux", "1.0", {"for_linux.py": ""}, "cp312-cp312-manylinux_2_17_aarch64")
    make_wheel(wheels, "formac", "1.0", {"for_mac.py": ""}, "cp312-abi3-macosx_11_0_arm64")
    make_wheel(wheels, "early", "1.0", {"early.py": ""})
    make_wheel(wheels, "early", "2.0", {"early.py": ""})
    platforms = "forlinux==1.0 ; sys_platform == 'linux' and platform_machine == 'aarch64'\n"
    platforms += "formac==1.0 ; sys_platform == 'darwin'\n"
    needs = "Requires-Dist: early\n" + "".join(f"Requires-Dist: {line}\n" for line in platforms.splitlines())
    make_wheel(wheels, "needy", "1.0", {"needy.py": ""}, requires=needs)
    (clone.root / "requirements.txt").write_text(
        f"# pins\n-c course_tasks/constraints.txt\n-e .\ntiny==1.0\nneedy==1.0\npackaging=={packaging.version}\n"
    )
    early = "early==1.0 ; python_full_version < '3.12.3'\nearly==2.0 ; python_full_version >= '3.12.3'\n"
    pins = f"{platforms}{early}needy==1.0\ntiny==1.0\nuv==1.0\n"
    (clone.root / "course_tasks" / "constraints.txt").write_text(pins)
    clone.wheels = {"PIP_FIND_LINKS": str(wheels)}
    code, out, err = clone.run("install", **clone.wheels)
    assert code == 0, out + err
    return clone


def pack(clone, *options):
    """Write a file; the names of the packages in it, with their versions."""
    file = clone.root.parent / "file.zip"
    code, out, err = clone.run("pack", str(file), *options, **clone.wheels)
    assert code == 0 and "install --from file.zip" in out, err
    with zipfile.ZipFile(file) as archive:
        return file, {"-".join(name.split("-")[:2]) for name in archive.namelist() if name.endswith(".whl")}


ALWAYS = {"flit_core-3.12.0", "pip-99", "tiny-1.0", "uv-1.0", "needy-1.0"}


def test_without_network_a_file_is_enough(packed, tmp_path):
    file, names = pack(packed)
    assert names >= ALWAYS and not {"formac-1.0", "forlinux-1.0"} & {*names} - (
        {"forlinux-1.0"} if "aarch64" in HERE else set()
    )
    clone = Clone(tmp_path / "elsewhere it is")
    for name in ("requirements.txt", "course_tasks/constraints.txt"):
        shutil.copy(packed.root / name, clone.root / name)
    refusing = {
        "PIP_NO_INDEX": "",
        "PIP_INDEX_URL": f"http://127.0.0.1:{next(free_ports())}/",
        "PIP_TARGET": "/nowhere",
    }
    empty = ["unshare", "-n"] if os.geteuid() == 0 and subprocess.run(["unshare", "-n", "true"]).returncode == 0 else []
    code, out, err = clone.run("install", "--from", str(file), prefix=empty, **refusing)
    assert (code, err) == (0, "") and out.endswith(READY)
    assert clone.works() and not (clone.venv / "wheels").exists()
    assert clone.run("install", prefix=empty, **refusing) == (0, READY, "")
    code, out, err = clone.run("install", "--from", "mistyped.zip")
    assert (code, out) == (1, "") and LINE.fullmatch(err) and "No such file or directory" in err


def test_a_file_for_other_pythons_and_platforms(packed):
    options = ["--python", "3.12", "--python", "3.13", "--platform", "linux-aarch64", "--platform", "macos-arm64"]
    code, _, err = packed.run("pack", "x.zip", *options, **packed.wheels)
    assert code == 1 and LINE.fullmatch(err[err.rstrip().rfind("\n") + 1 :])
    assert "for Python 3.13 on linux-aarch64 can't be had" in err and not (packed.root / "x.zip").exists()
    file, names = pack(packed, *options[:2], *options[4:])
    assert names == ALWAYS | {"forlinux-1.0", "formac-1.0", "early-1.0", "early-2.0"} | {
        name for name in names if name.startswith("packaging")
    }
    with zipfile.ZipFile(file) as archive:
        assert json.loads(archive.read("course.json"))["for"] == ["3.12 on linux-aarch64", "3.12 on macos-arm64"]


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--python", "3.9"], 1, "--python takes 3.12, say, and not 3.9"),
        (["--python", "three"], 1, "--python takes 3.12, say, and not three"),
        (["--platform", "windows"], 2, "'linux-x86_64', 'linux-aarch64', 'macos-arm64', 'macos-x86_64'"),
        (["--fast"], 2, "pack takes no --fast"),
        (["nowhere/at/all.zip"], 1, "nowhere/at/all.zip: No such file or directory. Name another file"),
        (["course_tasks"], 1, "course_tasks: Is a directory. Name another file"),
    ],
)
def test_wrong_words_are_one_line(packed, options, code, text):
    ended, out, err = packed.run("pack", *options, **packed.wheels)
    assert ended == code and LINE.fullmatch(err) and text in err
    assert "Downloading" not in out, "what is wrong is said before the download"


def test_a_file_that_does_not_fit_is_one_line_and_changes_nothing(packed, tmp_path):
    file, _ = pack(packed)
    clone = Clone(tmp_path / "clone")
    for name in ("requirements.txt", "course_tasks/constraints.txt"):
        shutil.copy(packed.root / name, clone.root / name)
    whole = file.read_bytes()
    at = whole.index(b"tiny runs")
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        manifest = json.loads(archive.read("course.json"))
        other.writestr("course.json", json.dumps(manifest | {"for": ["3.99 on plan-9"]}))
        with zipfile.ZipFile(tmp_path / "strange.zip", "w") as strange:
            strange.writestr("course.json", json.dumps(["strange"]))
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "spoilt.zip").write_bytes(whole[:at] + b"?" + whole[at + 1 :])
    (tmp_path / "text.zip").write_text("no zip")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    for name, text in {
        "missing.zip": "No such file or directory",
        ".": "Is a directory",
        "cut.zip": "damaged",
        "spoilt.zip": "damaged",
        "text.zip": "damaged",
        "empty.zip": "damaged",
        "strange.zip": "damaged",
        "other.zip": f"is for Python 3.99 on plan-9, and this is {PYTHON} on {HERE}",
    }.items():
        code, out, err = clone.run("install", "--from", str(tmp_path / name))
        assert (code, out) == (1, "") and LINE.fullmatch(err) and text in err, name
    with (clone.root / "requirements.txt").open("a") as pins:
        pins.write("# of a later day\n")
    code, out, err = clone.run("install", "--from", str(file))
    assert (code, out) == (1, "") and LINE.fullmatch(err) and "another version of the course" in err
    assert not clone.venv.exists()
