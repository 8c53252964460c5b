"""Learn Celery in Jupyter notebooks.

Usage: python3 -m course_tasks COMMAND [options]

  lab [options]      open the course in JupyterLab; the options are JupyterLab's, e.g. --no-browser --port 9999
  reset CHAPTER ...  start chapters anew, e.g. reset 05 05b; what you wrote is kept in my_notebooks/old
  test [options]     run the course's tests; the options are pytest's, e.g. -x notebooks/00_welcome.ipynb
  install [--dev]    prepare everything and stop, e.g. at home before a workshop; --dev adds contributors' tools
  servers            start the broker and the backend, print their URLs and keep them running until Ctrl-C
  server [options]   run one more server in this terminal; the options are Redis's, e.g. --port 6390
  runsheet [--minutes 120]
                     print an instructor's plan for a course of 90, 120, 240 or 480 minutes, or any other time
  doctor             say what this machine has, what is missing, and what to do about it

  --help, --version  this text; the version of the course

The first command to need it makes the folder .venv here: about 300 MB, a minute or two. Later starts take seconds.
Options after -- go on untouched: `lab -- --help` shows JupyterLab's own help, `test -- --help` that of pytest.
"""

# Standard library only, for this runs before anything is installed. This file must parse and import on Python 3.6
# as well, so that an old Python gets one clear line instead of a SyntaxError; what it needs of the course it
# imports after that.

import argparse
import difflib
import errno
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

OLDEST, NEWEST = (3, 11), (3, 13)  # the Pythons that the course is tested with


def complain(text, code=1):
    """Print one line for the user to standard error. Returns the exit code that is given."""
    print(f"course_tasks: {text}", file=sys.stderr, flush=True)
    return code


def activate():
    """Put .venv first on PATH, for this process and what it starts or becomes."""
    from course_tasks.install import PYTHON, VENV

    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != str(PYTHON.parent)]
    os.environ["PATH"] = os.pathsep.join([str(PYTHON.parent), *path])
    os.environ["VIRTUAL_ENV"] = str(VENV)
    os.environ.pop("PYTHONHOME", None)


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


IN_VENV = {"lab": lab, "test": test, "servers": servers}
COMMANDS = [*IN_VENV, "install", "reset", "runsheet", "doctor", "server"]


def run(command, options):
    """Carry out a command. Returns its exit code, if this process does not become another one."""
    from course_tasks import copies, doctor, install, runsheet
    from course_tasks.servers import ServerError

    own = options[1:] if options[:1] == ["--"] else options
    try:
        if command == "server":  # in the folder where it is asked for, and with any Python
            return server(own)
        os.chdir(install.ROOT)
        if command == "doctor":
            return doctor.main()
        if command == "reset":
            return print("\n".join(copies.reset(own)))
        if command == "runsheet":
            return runsheet.main(own)
        install.install(dev=command == "install" and "--dev" in options)
        if command == "install":
            return print("Ready. Next: python3 -m course_tasks lab")
        activate()
        if not install.inside_venv():
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
    if sys.version_info[:2] < OLDEST:
        return complain(too_old())
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
    wrong = [option for option in options if (command, option) != ("install", "--dev")]
    if wrong and command in ("install", "doctor", "servers"):
        return complain(f"{command} takes no {wrong[0]}. See: python3 -m course_tasks --help", 2)
    if sys.version_info[:2] > NEWEST and sys.prefix == sys.base_prefix:  # in .venv it has been said
        complain(f"Warning: Python {platform.python_version()} is newer than the course was tested with.")
    return run(command, options)


def too_old():
    """The line for a Python that is too old. Names one that is new enough, if this machine has it."""
    name, hint = "python3.13", "With one installed"
    for newer in ("python3.13", "python3.12", "python3.11"):
        if shutil.which(newer) and subprocess.call([newer, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            name, hint = newer, "This machine has one"
            break
    now = platform.python_version()
    return f"The course needs Python 3.11 or newer, and this is {now}. {hint}: {name} -m course_tasks lab"


def version():
    """The version of the course."""
    import tomllib  # not before Python 3.11

    from course_tasks.install import ROOT

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
