"""The terminal cell: `%%terminal NAME` over a shell command, and `%tail`, `%stop` and `%kill` to go with it."""

import atexit
import codecs
import collections
import contextlib
import html
import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.display import display

from course_tasks.classroom.ansi import coloured, plain
from course_tasks.classroom.drawing import pane
from course_tasks.classroom.errors import ClassroomError
from course_tasks.servers import runtime_directory

SUPERVISOR = Path(__file__).with_name("supervisor.py")
# What a program says when it can be used: a worker, a Redis or Valkey server, celery beat, an ASGI server.
READY = r" ready\.$|[Rr]eady to accept connections|\. maxinterval -> |Uvicorn running on "
# A command that starts a worker, and the option without which it doesn't say so.
WORKER, TELLS = r"\bcelery\b.*\bworker\b", r"(?i)(?:--loglevel|-l)[\s=]*(?:info|debug)\b"
# How a worker says that it is done with a task, one way or another.
DONE = r"\] (succeeded in|raised (un)?expected|ignored|rejected|INTERNAL ERROR)|Discarding revoked task|Terminat"
KEPT, SHOWN, PRINTED = 20_000, 300, 1000  # lines: kept in the log, shown in the pane, printed by %tail
KEPT_SIZE, SHOWN_SIZE, PRINTED_SIZE = 10_000_000, 60_000, 100_000  # the same in characters
LONGEST = 2000  # characters that are kept of a line
INTERVAL = 0.15  # seconds between two updates of a pane: smooth to the eye, light for the browser
STOPPED = 45.0  # seconds to wait for a stop: a prefork worker without a task may take over 30 (chapter 03c)
RATE = 500_000  # characters a second that a pane's updates may have: a larger pane is updated less often
# In a container, where people are root, a worker would begin each pane with eight lines about that.
NOT_ROOT = "ignore:You're running the worker with superuser privileges"
FORCED = ("FORCE_COLOR", "CLICOLOR_FORCE")
# A word of a shell's command; a redirection, which may stand anywhere in it; and what stands before its name.
WORD = r"""(?:[^\s"'\\;&|()<>`#]|(?<=\S)\#|"(?:[^"\\]|\\.)*"|'[^']*'|\\.|\$\([^()]*\)|`[^`]*`)+"""
REDIRECTION = rf"\d*(?:>>|<>|>\||[<>])&?[ \t]*{WORD}"
BEFORE = rf"(?:[A-Za-z_]\w*=(?:{WORD})?|{REDIRECTION}|\\\n)"
SIMPLE = rf"(?s)(\s*(?:{BEFORE}[ \t]+)*)({WORD})(?:[ \t]+(?:{REDIRECTION}|{WORD}))*[ \t]*(?:(?<=\s)#.*)?"


class Terminal:
    """One shell command at work in the background, and its log.

    Args:
        name: what the learner calls it.
        command: one or more lines of shell; see `prepared`.
        ready: regular expression; the first line of the log that matches says that the command is ready.
        shown: how many lines of the log the pane shows.
    """

    def __init__(self, name: str, command: str, ready: re.Pattern, shown: int = SHOWN):
        self.name, self.command, self.shown = name, command.strip(), shown
        self.log: collections.deque[str] = collections.deque()  # with its colours
        self.size = 0  # characters in the log
        self.unfinished = ""  # the line that is being written
        self.count = 0  # lines ever written, of which the log keeps the last
        self.seen = 0  # lines that the pane's first text or %tail has shown
        self.ready_at: int | None = None  # lines written up to the ready line
        self.running = True
        self.ordered: str | None = None  # the end that was asked for
        self.changed = threading.Condition()
        # ipykernel asks programs for colours even in a pipe; in a terminal they see for themselves
        environment = {name: value for name, value in os.environ.items() if name not in FORCED}
        environment["TERM"] = "xterm-256color"
        environment["PYTHONWARNINGS"] = ",".join(filter(None, [environment.get("PYTHONWARNINGS"), NOT_ROOT]))
        environment["COURSE_TERMINAL"] = name  # these two tell other kernels of this clone whose it is
        environment["COURSE_TERMINAL_HOME"] = str(runtime_directory())
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        script, group = prepared(self.command, environment)
        self.process = subprocess.Popen(
            [sys.executable, "-I", SUPERVISOR, script, "group" if group else "single"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Jupyter signals the kernel's whole process group, at its end with SIGKILL
        )
        self._ready = ready
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def state(self) -> str:
        """`running`, or how it ended."""
        if self.running:
            return "running"
        code = self.process.returncode
        return self.ordered or (f"ended with exit code {code}" if code else "finished")

    def _read(self) -> None:
        """Take the command's output into the log, in pieces: a line may be longer than there is memory."""
        assert self.process.stdout  # a pipe
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        line, more = "", 0  # the line's beginning, and how many characters of it are not kept
        while data := os.read(self.process.stdout.fileno(), 65536):
            new = []
            for number, part in enumerate(decode(data).split("\n")):
                if number:
                    new.append(_shortened(line, more))
                    line, more = "", 0
                # a progress bar returns to the beginning of its line; at a line's end, a return doesn't count
                written = (line + part).rstrip("\r")
                returned = (line + part)[len(written) :][:1]
                if "\r" in written:
                    written, more = written.rpartition("\r")[2], 0
                more += max(0, len(written) - LONGEST)
                line = written[:LONGEST] + returned
            self._add(new, _shortened(line, more))
        self._add([_shortened(line, more)] * bool(line), "")
        self.process.wait()
        with self.changed:
            self.running = False
            self.changed.notify_all()

    def _add(self, lines: list[str], unfinished: str) -> None:
        """Add lines to the log, and drop old ones if they are too many."""
        ready = next((at for at, line in enumerate(lines, start=1) if self._ready.search(plain(line))), None)
        with self.changed:
            if self.ready_at is None and ready:
                self.ready_at = self.count + ready
            self.log.extend(lines)
            self.count += len(lines)
            self.size += sum(map(len, lines))
            while len(self.log) > KEPT or self.size > KEPT_SIZE:
                self.size -= len(self.log.popleft())
            self.unfinished = unfinished
            self.changed.notify_all()

    def lines(self, start: int = 0, end: int | None = None) -> list[str]:
        """The lines of the log numbered from `start` up to `end`, of those that are kept."""
        with self.changed:
            new = list(itertools.islice(reversed(self.log), max(0, self.count - start)))[::-1]
            return new if end is None else new[: max(0, end - self.count + len(new))]

    def wait(self, condition, timeout: float | None) -> bool:
        """Wait until `condition()` holds, looking whenever the log grows or ends; False after `timeout` seconds."""
        with self.changed:
            return self.changed.wait_for(condition, timeout)

    def find(self, matches: Callable[[str], object], start: int, times: int, timeout: float) -> tuple[int, int]:
        """Wait until enough lines match, or the command ends. Each line is looked at once, without its colours.

        Args:
            matches: called with a line; returns something true if it matches.
            start: the number of the first line to look at.
            times: how many lines have to match.
            timeout: how many seconds to wait at most.

        Returns:
            How many lines matched, and the number of lines up to the last one that was looked at.
        """
        found, at, deadline = 0, start, time.monotonic() + timeout
        over = False
        while not over:
            self.wait(lambda: self.count > at or not self.running, max(0.0, deadline - time.monotonic()))  # noqa: B023
            with self.changed:
                over = not self.running or time.monotonic() >= deadline
                at = max(at, self.count - len(self.log))
                lines = self.lines(at)
            for line in lines:  # without the lock, for the reader needs it
                found, at = found + bool(matches(plain(line))), at + 1
                if found == times:
                    return found, at
        return found, at

    def order(self, letter: bytes) -> None:
        """Ask the supervisor for a signal: b"t" for SIGTERM, b"k" for SIGKILL."""
        self.ordered = "killed" if letter == b"k" else "stopped"
        assert self.process.stdin  # a pipe
        with contextlib.suppress(BrokenPipeError):  # it ended in the meantime
            os.write(self.process.stdin.fileno(), letter)  # with a buffer, closing it would fail, too

    def bundle(self, end: int | None = None) -> dict[str, str]:
        """What a notebook shows of it: the command, the state and the log's last lines, as text and as HTML."""
        log = _last_of(
            [*self.lines(0, end), *([self.unfinished] if end is None and self.unfinished else [])], self.shown
        )
        title = f"{self.name}: {self.state}"
        text = "\n".join([title, *(f"$ {line}" for line in self.command.splitlines()), *map(plain, log)])
        return {"text/plain": text, "text/html": _pane(self.name, title, self.command, log)}

    def show(self) -> None:
        """Show the pane in the running cell, and keep it up to date for as long as the command runs."""
        self.seen = self.count if self.ready_at is None else self.ready_at
        shown = display(self.bundle(self.seen), raw=True, display_id=True)
        if "COURSE_RECORDING" not in os.environ:  # a stored output must not depend on when it was taken
            threading.Thread(target=self._update, args=[shown], daemon=True).start()

    def _update(self, shown) -> None:
        drawn = (self.seen, "running", "")
        while drawn[1] == "running":
            self.wait(lambda: (self.count, self.state, self.unfinished) != drawn, timeout=None)  # noqa: B023
            drawn = (self.count, self.state, self.unfinished)
            bundle = self.bundle()
            shown.update(bundle, raw=True)
            time.sleep(max(INTERVAL, sum(map(len, bundle.values())) / RATE))


def _shortened(line: str, more: int) -> str:
    """A line of the log, which says how many characters of it are not kept."""
    return line.rstrip("\r") + f" … ({more:,} more characters)" * bool(more)


def _last_of(lines: list[str], number: int, size: int = SHOWN_SIZE) -> list[str]:
    """The last lines: so many at most, and so many characters."""
    sizes = itertools.accumulate(map(len, reversed(lines[-number:])))
    fit = sum(1 for _ in itertools.takewhile(lambda total: total <= size, sizes))
    return lines[len(lines) - fit :]


def prepared(command: str, environment: Mapping[str, str] = os.environ) -> tuple[str, bool]:
    """The script to run, which does what the command does in a shell, and how it is stopped.

    If the last command is a program, it takes the shell's place by `exec`, so that signals reach the program itself.
    A builtin, a function, a loop, a pipeline or a list of commands can't do that.

    Args:
        command: what the learner wrote.
        environment: where programs are found.

    Returns:
        The script, and whether signals go to the whole process group, because the shell stays.
    """

    def shell(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/sh", *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    lines = command.splitlines(keepends=True)
    while lines and re.match(r"\s*(#|$)", lines[-1]):
        lines.pop()
    at = len(lines) - 1
    while at > 0 and lines[at - 1].endswith("\\\n"):
        at -= 1
    head, last = "".join(lines[: max(at, 0)]), "".join(lines[max(at, 0) :]).rstrip("\n")
    if not (found := re.fullmatch(SIMPLE, last)):
        return command, True
    # a bracket can't begin a command: if the shell doesn't mind, it is in a text or a document that has not ended
    if head and (shell("-n", "-c", head).returncode or not shell("-n", "-c", f"{head}\n)").returncode):
        return command, True
    name = found[2]
    if name == "exec":
        return command, False
    redefined = rf"\b{re.escape(name)}\s*(?:=|\(\s*\))|\bfunction\s+{re.escape(name)}\b|\btrap\b|\bset -\w*[vx]"
    if re.search(r"[$`]", name) or re.search(redefined, head):
        return command, True
    if "/" not in name and "/" not in shell("-c", f"command -v {name}").stdout:
        return command, True
    return f"{head}{last[: found.start(2)]}exec {last[found.start(2) :]}", False


def _pane(name: str, title: str, command: str, log: list[str]) -> str:
    """The pane as HTML with inline styles only: a notebook that is not trusted yet loses all else."""
    body = coloured([*(f"\x1b[1;2m$ {part}\x1b[0m" for part in command.splitlines()), *log])
    style = "line-height:1.35;flex:none;white-space:pre-wrap;word-break:normal;overflow-wrap:anywhere"
    # column-reverse: a box that starts scrolled to its end, so it follows the log with no script
    # the second max-height is for a small window; JupyterLab removes it until the notebook is trusted
    box = "max-height:38em;max-height:min(38em,60vh);overflow:auto;display:flex;flex-direction:column-reverse"
    return pane(html.escape(title), body, f"log of {name}", style=style, box=box)


@contextlib.contextmanager
def _uninterrupted():
    """Hold an interrupt back until the block is done: what is half started can't be ended."""
    if threading.current_thread() is not threading.main_thread():  # a subshell's, which no interrupt reaches
        yield
        return
    held = []
    usual = signal.signal(signal.SIGINT, lambda *_: held.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if held:
        raise KeyboardInterrupt


def _unquoted(text: str) -> str:
    """A magic's option without the quotes around it, which IPython leaves there."""
    return text[1:-1] if re.fullmatch(r"(?s)(['\"]).*\1", text) else text


def _print(name: str, lines: list[str], nothing: str, count: int | None = None) -> None:
    """Print lines of a log, or what there is to say without any. Of too many for a notebook, print the last ones."""
    shown = _last_of(lines, PRINTED, PRINTED_SIZE)
    if left := (len(lines) if count is None else count) - len(shown):
        print(f"({left:,} lines before these are left out. %tail {name} --save FILE writes the log to a file.)")
    print("\n".join(shown) or nothing)


def _last(terminal: Terminal, lines: int = 12) -> str:
    """The end of a log, for a message."""
    log = [plain(line) for line in terminal.lines()[-lines:]]
    return "\nIts last lines:\n" + "\n".join(log) if log else "\nIt wrote nothing."


def whose(process: psutil.Process) -> str:
    """The terminal cell in which a process runs, if it belongs to this copy of the course.

    Returns:
        The terminal's name and the notebook's, as in "worker of 05_pools"; "" for any other process.

    Raises:
        psutil.Error: the process has ended, or is another user's.
    """
    environment = process.environ()
    if environment.get("COURSE_TERMINAL_HOME") != str(runtime_directory()):
        return ""
    return f"{environment.get('COURSE_TERMINAL')} of {environment.get('COURSE_NOTEBOOK') or 'another notebook'}"


def supervisors() -> Iterator[tuple[psutil.Process, str]]:
    """The supervisors of all terminals of this copy of the course that run, in whatever kernel, and whose they are."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended in the meantime, or is another user's
            if str(SUPERVISOR) in process.cmdline() and (name := whose(process)):
                yield process, name


@magics_class
class TerminalMagics(Magics):
    """`%%terminal`, `%tail`, `%stop` and `%kill`. One set for a kernel; its terminals end with it."""

    def __init__(self, shell):
        super().__init__(shell)
        self.terminals: dict[str, Terminal] = {}
        atexit.register(self.close)

    def close(self) -> None:
        """End every terminal: what the end of the kernel does anyway, but waited for."""
        running = [terminal for terminal in self.terminals.values() if terminal.running]
        for terminal in running:
            terminal.ordered = "stopped"
            assert terminal.process.stdin  # a pipe
            terminal.process.stdin.close()
        for terminal in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                terminal.process.wait(4)  # the supervisor gives the command 3 s

    def _named(self, names: list[str]) -> list[Terminal]:
        for name in names:
            if name not in self.terminals:
                known = ", ".join(self.terminals) or "none yet"
                raise ClassroomError(f"There is no terminal called {name!r} in this notebook. Started here: {known}.")
        return [self.terminals[name] for name in names]

    @magic_arguments()
    @argument("name", help="what to call it, for %%tail, %%stop and %%kill")
    @argument("--ready", default=READY, help="regular expression for the line that says: ready")
    @argument("--timeout", type=float, default=30, help="seconds to wait for that line (default: 30)")
    @argument("--lines", type=int, default=SHOWN, help=f"how many lines of the log to show (default: {SHOWN})")
    @cell_magic
    def terminal(self, line: str, cell: str) -> None:
        """Run the cell's shell command in the background, and follow its log below the cell.

        The cell ends when the command says that it is ready, or has finished. If it dies before, or is not ready
        in time, the cell fails and shows the end of the log. Running the cell again replaces the command. The pane
        may be a short one, with `--lines`; `%tail` prints every line.

        The cell is run as `/bin/sh -e -c` would run it: any shell code will do, and the first command that fails ends
        it. If the last command is a program, such as a worker, `%stop` sends SIGTERM to that program alone, and a
        prefork worker finishes its tasks. If it is something else, such as a pipeline, a loop, a function or `wait`,
        all that the cell has started gets SIGTERM.
        """
        options = parse_argstring(self.terminal, line)
        if not re.search(r"^\s*[^#\s]", cell, re.MULTILINE):
            raise ClassroomError(f"There is no command for {options.name!r}: write one below the first line.")
        if not 1 <= options.lines <= SHOWN:
            raise ClassroomError(f"--lines takes a whole number from 1 to {SHOWN}, not {options.lines}.")
        if options.name in self.terminals and self.terminals[options.name].running:
            self._end([self.terminals[options.name]], b"t", STOPPED)
            print(f"{options.name} was running, and was stopped first.")
        try:
            ready = re.compile(_unquoted(options.ready))
        except re.error as error:
            raise ClassroomError(f"--ready takes a regular expression, and this is none: {error}.") from None
        try:
            with _uninterrupted():
                terminal = self.terminals[options.name] = Terminal(options.name, cell, ready, options.lines)
            over = terminal.wait(lambda: terminal.ready_at is not None or not terminal.running, options.timeout)
        except KeyboardInterrupt:
            self._end([terminal], b"k", 10)
            raise ClassroomError(f"Interrupted: {options.name} was stopped before it was ready.") from None
        if not over:
            self._end([terminal], b"k", 10)
            text = f"{options.name} was not ready after {options.timeout:g} s, so it was stopped."
            if options.ready == READY and re.search(WORKER, cell) and not re.search(TELLS, cell):
                text += " Without --loglevel=INFO, a worker doesn't say when it is ready."
            raise ClassroomError(f"{text}{_last(terminal)}")
        if terminal.ready_at is None and (code := terminal.process.wait()):
            raise ClassroomError(f"{options.name} died before it was ready (exit code {code}).{_last(terminal)}")
        terminal.show()

    @magic_arguments()
    @argument("name", help="which terminal")
    @argument("--task", help="a task's id: wait for its end, and print the lines about it only")
    @argument("--until", metavar="TEXT", help="wait for a text, and print the new lines up to it")
    @argument("--times", type=int, default=1, help="in how many lines that text has to appear (default: 1)")
    @argument("--timeout", type=float, help="seconds to wait (default: 15 for a task, 20 for a text)")
    @argument("--save", metavar="FILE", help="write the whole log to a file instead")
    @line_magic
    def tail(self, line: str) -> None:
        """Print what the log has gained since the last look, or its last 1,000 lines if that is more.

        The log itself keeps up to 20,000 lines, and 2,000 characters of each; `--save` writes it to a file.
        """
        options = parse_argstring(self.tail, line)
        [terminal] = self._named([options.name])
        if sum(map(bool, (options.task, options.until, options.save))) > 1:
            raise ClassroomError("%tail takes one of --task, --until and --save, not several.")
        if options.save:
            self._save(terminal, Path(_unquoted(options.save)))
            return
        if options.task:
            self._tail_task(terminal, options.task, 15 if options.timeout is None else options.timeout)
            return
        start = terminal.seen
        if options.until:
            seconds = 20 if options.timeout is None else options.timeout
            new = self.follow(options.name, _unquoted(options.until), options.times, seconds)
        else:
            terminal.seen = terminal.count
            new = [plain(line) for line in terminal.lines(start, terminal.seen)]
        _print(terminal.name, new, "(nothing new)", terminal.seen - start)

    def _save(self, terminal: Terminal, path: Path) -> None:
        lines = terminal.lines()
        number = (
            f"all {len(lines):,}" if len(lines) == terminal.count else f"the last {len(lines):,} of {terminal.count:,}"
        )
        try:
            path.write_text("".join(f"{plain(line)}\n" for line in lines), encoding="utf-8")
        except OSError as error:
            raise ClassroomError(f"Can't write to {path}: {error.strerror}.") from None
        print(f"Saved {number} lines: {path}")

    def _tail_task(self, terminal: Terminal, task: str, timeout: float) -> None:
        # a log format may shorten ids to their first eight characters, as the course's own does
        names = (task, f"[{task:.8}]")

        def about(line: str) -> bool:
            return any(name in line for name in names)

        ended, _ = terminal.find(lambda line: about(line) and re.search(DONE, line), 0, 1, timeout)
        _print(terminal.name, list(filter(about, map(plain, terminal.lines()))), "(nothing about this task)")
        if not ended:
            when = f"within {timeout:g} s" if terminal.running else f"before it ended ({terminal.state})"
            raise ClassroomError(f"{terminal.name} has not said {when} that this task is over.")

    def follow(self, name: str, text: str | re.Pattern[str], times: int, seconds: float) -> list[str]:
        """What `follow_log` does, and `%tail --until`; see there."""
        [terminal] = self._named([name])
        if type(times) is not int or times < 1:
            raise ClassroomError(f"A text can be waited for in 1 line or more, not in {times!r}.")
        if not text or not isinstance(text, str | re.Pattern):
            raise ClassroomError(f"Wait for a text, such as 'ready.', or a compiled regular expression, not {text!r}.")
        pattern = text if isinstance(text, re.Pattern) else re.compile(re.escape(text))
        start = terminal.seen
        found, end = terminal.find(pattern.search, start, times, seconds)
        if found < times:
            wanted = f"{pattern.pattern if text is pattern else text!r} is in {found} of its {end - start} new lines"
            why = f"after {seconds:g} s" if terminal.running else f"and it is not running ({terminal.state})"
            raise ClassroomError(f"{name}: {wanted}, not in {times}, {why}.{_last(terminal)}")
        terminal.seen = end
        return [plain(line) for line in terminal.lines(start, end)]

    @magic_arguments()
    @argument("names", nargs="*", help="which terminals; all that run in this notebook if none is named")
    @argument("--everywhere", action="store_true", help="all that run in any notebook of this copy of the course")
    @argument("--timeout", type=float, default=STOPPED, help=f"seconds to wait for their ends (default: {STOPPED:g})")
    @line_magic
    def stop(self, line: str) -> None:
        """Stop terminals, all together: SIGTERM, on which a worker finishes its running tasks first."""
        options = parse_argstring(self.stop, line)
        if options.everywhere and options.names:
            raise ClassroomError("%stop --everywhere takes no names: it stops the terminals of all notebooks.")
        if options.everywhere:
            self._stop_everywhere(options.timeout)
            return
        running = [name for name, terminal in self.terminals.items() if terminal.running]
        self._end_and_say(options.names or running, b"t", options.timeout)

    @magic_arguments()
    @argument("names", nargs="+", help="which terminals")
    @line_magic
    def kill(self, line: str) -> None:
        """Kill terminals with SIGKILL, as if the plug had been pulled."""
        self._end_and_say(parse_argstring(self.kill, line).names, b"k", 10)

    def _stop_everywhere(self, timeout: float) -> None:
        own = [terminal for terminal in self.terminals.values() if terminal.running]
        pids = {terminal.process.pid for terminal in own}
        others = {process: name for process, name in supervisors() if process.pid not in pids}
        for process in others:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGUSR1)
        for terminal in own:
            terminal.order(b"t")
        deadline = time.monotonic() + timeout
        for terminal in own:
            terminal.wait(lambda: not terminal.running, deadline - time.monotonic())  # noqa: B023
        _, busy = psutil.wait_procs(others, max(0.0, deadline - time.monotonic()))
        own_busy = [terminal for terminal in own if terminal.running]
        ends = [(f"{terminal.name} of this notebook", terminal in own_busy) for terminal in own]
        ends += [(name, process in busy) for process, name in others.items()]
        print(
            "\n".join(f"{name}: {'still busy' if late else 'stopped'}" for name, late in ends) or "Nothing is running."
        )
        if busy or own_busy:
            raise ClassroomError(
                f"Some are still busy after {timeout:g} s, because a warm stop waits for running tasks. "
                "Wait and run this again, or use %kill in their notebooks."
            )

    def _end_and_say(self, names: list[str], letter: bytes, timeout: float) -> None:
        terminals = self._named(names)
        self._end(terminals, letter, timeout)
        print("\n".join(f"{terminal.name}: {terminal.state}" for terminal in terminals) or "Nothing is running.")

    def _end(self, terminals: list[Terminal], letter: bytes, timeout: float) -> None:
        for terminal in terminals:
            if terminal.running:
                terminal.order(letter)
        deadline = time.monotonic() + timeout
        for terminal in terminals:
            if not terminal.wait(lambda: not terminal.running, deadline - time.monotonic()):  # noqa: B023
                raise ClassroomError(
                    f"{terminal.name} is still busy after {timeout:g} s: a warm stop waits for running tasks. "
                    f"Look with %tail {terminal.name}; %kill {terminal.name} ends it at once."
                )
