"""Learn Celery in Jupyter notebooks.

Usage: python3 -m course_tasks COMMAND [options]

  lab [options]      open the course in JupyterLab; the options are JupyterLab's, e.g. --no-browser --port 9999
  reset CHAPTER ...  start chapters anew, e.g. reset 05 05b; what you wrote is kept in my_notebooks/old
  test [options]     run the course's tests; the options are pytest's, e.g. -x notebooks/00_welcome.ipynb
  install [--dev]    prepare everything and stop, e.g. at home before a workshop; --dev adds contributors' tools
  pack [FILE]        write all packages into one file; there `install --from FILE` needs no network. For other
                     computers: --python 3.12 --platform macos-arm64 (linux-x86_64, linux-aarch64, macos-x86_64)
  servers            start the broker and the backend, print their URLs and keep them running until Ctrl-C
  server [options]   run one more server in this terminal; the options are Redis's, e.g. --port 6390
  runsheet [--minutes 120]
                     print an instructor's plan for a course of 90, 120, 240 or 480 minutes, or any other time
  doctor             say what this machine has, what is missing, and what to do about it

  --help, --version  this text; the version of the course

The first command to need it makes the folder .venv here: about 300 MB, a minute or two. Later starts take seconds.
Options after -- go on untouched: `lab -- --help` shows JupyterLab's own help, `test -- --help` that of pytest.
"""

# Standard library only, for this runs before anything is installed. An old Python doesn't come here: see __init__.py.

import argparse
import difflib
import errno
import os
import platform
import re
import shlex
import signal
import socket
import sys
from pathlib import Path


def complain(text, code=1):
    """Print one line for the user to standard error. Returns the exit code that is given."""
    print(f"course_tasks: {text}", file=sys.stderr, flush=True)
    return code


def activate():
    """Put .venv first on PATH and take the user's PYTHONPATH away, for what this process starts or becomes."""
    from course_tasks import doctor
    from course_tasks.install import PYTHON, VENV

    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != str(PYTHON.parent)]
    os.environ["PATH"] = os.pathsep.join([str(PYTHON.parent), *path])
    os.environ["VIRTUAL_ENV"] = str(VENV)
    os.environ.pop("PYTHONHOME", None)
    if text := doctor.python_path():
        complain(f"PYTHONPATH ({os.environ.pop('PYTHONPATH')}) is left out: {text}.")
    doctor.allow_files()


def become(*command):
    """Replace this process by .venv's Python running the command."""
    from course_tasks.install import PYTHON

    os.execv(PYTHON, [PYTHON, *command])


def start_pair():
    """Find or start the broker and the backend, for this process and what it becomes. Returns a servers.Pair."""
    from course_tasks import servers

    pair = servers.ensure()
    if pair.notice:
        print(pair.notice, flush=True)
    return pair


def port_asked(options):
    """The port that `lab` is asked to use, as it was typed; None if JupyterLab may choose one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", "--ServerApp.port", nargs="?")
    return parser.parse_known_args(options)[0].port


def port_problem(port):
    """Say in a line what is wrong with a port for JupyterLab; "" if nothing is."""
    if not re.match(r"[0-9]{1,5}$", port) or int(port) > 65535:
        return f"--port takes a number up to 65535, not {port or 'nothing'}."
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            socket.create_server((host, int(port)), family=family).close()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"Port {port} is taken on this machine. Choose another one, for example --port {int(port) + 1}."
            if error.errno == errno.EACCES:
                return f"Port {port} is reserved for the system. Choose one above 1023, for example --port 9001."
    return ""


def proxy_problem():
    """Say in a line which proxy setting JupyterLab can't read, because it would end with a traceback; "" if none."""
    for names in (("http_proxy", "HTTP_PROXY", "ALL_PROXY"), ("https_proxy", "HTTPS_PROXY")):  # as it looks for them
        name = next(filter(os.environ.get, names), None)
        if name is None:
            break
        if not re.match(r"(https?|socks5h?)://[^/]", os.environ[name]):
            return f"JupyterLab can't read {name}. Write a whole URL there, for example http://proxy.example:3128"
    return ""


def lab(options):
    """Bring the working copies up to date, find or start the servers, and become JupyterLab.

    Returns 1 if the port that is asked for can't be used, or a proxy.
    """
    from course_tasks import copies

    port = port_asked(options)
    if port is not None:
        problem = port_problem(port)
        if problem:
            return complain(problem)
        # people forward this port to their laptops, and on the next one they would meet a stranger
        options = [*options, "--ServerApp.port_retries=0"]
    problem = proxy_problem()
    if problem:
        return complain(problem)
    start_pair()
    for line in copies.update():
        print(line, flush=True)
    ours, theirs = str(Path(__file__).resolve().parent / "jupyter"), os.environ.get("JUPYTER_CONFIG_PATH")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join([ours, theirs] if theirs else [ours])
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # .venv's kernel, even if the user has one of the same name
    become("-m", "jupyterlab", *options)


def test(options):
    """Become pytest."""
    become("-m", "pytest", *options)


def servers(options):
    """Find or start the servers, print where they are, and wait for Ctrl-C or SIGTERM."""
    from course_tasks.servers import without_secrets

    pair = start_pair()
    stopping = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    print(f"Broker:  {without_secrets(pair.broker)}\nBackend: {without_secrets(pair.backend)}")
    if pair.script:
        print(f"In another terminal, type this line first:\n. {shlex.quote(pair.script)}")
    print("Ctrl-C ends this.", flush=True)
    signal.sigwait(stopping)


def server(options):
    """Become one more Redis or Valkey server, in the folder where it is asked for. It has no password."""
    from course_tasks.servers import find_server

    path, _ = find_server()
    os.execv(path, [path, "--logfile", "/dev/stdout", *options])  # with a log file named, it draws no logo


def pack(options):
    """Write all packages into one file."""
    from course_tasks import pack

    asked = understood("pack", options)
    pack.write(Path(asked.file), asked.python, asked.platform)


IN_VENV = {"lab": lab, "test": test, "servers": servers, "pack": pack}
COMMANDS = [*IN_VENV, "install", "reset", "runsheet", "doctor", "server"]


def understood(command, options):
    """The options of a command that has options of its own. Exits with 2 if they are wrong."""
    from course_tasks.pack import PLATFORMS

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    if command == "install":
        parser.add_argument("--dev", action="store_true")
        parser.add_argument("--from", dest="pack", metavar="FILE", type=Path)
    if command == "pack":
        parser.add_argument("file", nargs="?", default="course-packages.zip")
        parser.add_argument("--python", action="append", metavar="VERSION")
        parser.add_argument("--platform", action="append", choices=PLATFORMS)
    try:
        known, wrong = parser.parse_known_args(options)
        problem = f"{command} takes no {wrong[0]}" if wrong else ""
        if command == "install" and known.dev and known.pack:
            problem = "A file of `pack` is for learners, so install takes --dev or --from"
    except argparse.ArgumentError as error:
        problem = f"{command}: {error}"
    if problem:
        sys.exit(complain(f"{problem}. See: python3 -m course_tasks --help", 2))
    return known


def run(command, options):
    """Carry out a command. Returns its exit code, if this process does not become another one."""
    from course_tasks import copies, doctor, install, runsheet
    from course_tasks.servers import ServerError

    own = options[1:] if options[:1] == ["--"] else options
    asked = understood(command, options) if command not in ("lab", "test", "reset", "runsheet", "server") else None
    try:
        if command == "server":  # in the folder where it is asked for, and with any Python
            return server(own)
        os.chdir(install.ROOT)
        if not os.environ.get("HOME"):  # with an empty one, Jupyter makes a folder named ~
            os.environ.pop("HOME", None)
        if command == "doctor":
            if install.is_ready() and not install.inside_venv():
                become("-E", "-m", "course_tasks", command)  # where it can ask the user's own servers
            return doctor.main()
        if command == "reset":
            return print("\n".join(copies.reset(own)))
        if command == "runsheet":
            return runsheet.main(own)
        if problem := doctor.obstacle(folder_only=command in ("install", "pack")):
            return complain(problem)
        install.install(dev=getattr(asked, "dev", False), pack=getattr(asked, "pack", None))
        if command == "install":
            return print("Ready. Next: python3 -m course_tasks lab")
        unwanted = os.environ.get("PYTHONPATH")
        activate()
        if unwanted or not install.inside_venv():
            become("-m", "course_tasks", command, *options)
        return IN_VENV[command](own)
    except (install.Problem, ServerError) as error:
        return complain(error)
    except KeyboardInterrupt:
        return complain("Stopped. Nothing needs cleaning up: the same command goes on from here.", 130)


def main(argv):
    """The command line. Returns the exit code: 0 or None done, 1 failed, 2 not understood, 130 stopped by Ctrl-C."""
    if not __package__:
        return complain("Start it with -m, in the folder of the course: python3 -m course_tasks lab", 2)
    if os.name == "nt":
        return complain("On Windows the course runs in WSL 2: type `wsl --install`, and clone the course in there.")
    command, options = (argv[0], argv[1:]) if argv else ("--help", [])
    before_dashes = options[: options.index("--")] if "--" in options else options
    asks_help = {"-h", "--help"}.intersection(before_dashes)
    if command in ("-h", "--help") or (command in COMMANDS and asks_help):
        return print(__doc__.strip())
    if command == "--version":
        return print(f"course_tasks {version()}, Python {platform.python_version()}")
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"The commands are {', '.join(COMMANDS)}."
        return complain(f"There is no command {command}. {hint}", 2)
    return run(command, options)


def carefully(argv):
    """The command line, even if what it prints can't be written. Returns the exit code."""
    try:
        code = main(argv)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # whoever reads it has seen enough, as in `doctor | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it ends
        return 1
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return complain(error)


def version():
    """The version of the course."""
    import tomllib  # not before Python 3.11

    from course_tasks.install import ROOT

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


if __name__ == "__main__":
    sys.exit(carefully(sys.argv[1:]))
