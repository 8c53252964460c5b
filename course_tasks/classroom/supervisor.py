"""Runs one shell command in a pseudo-terminal and never lets it outlive the notebook that asked for it.

A program of its own, standard library only: `python supervisor.py COMMAND GROUP`. Its standard input is a pipe
that the kernel holds: `t` sends SIGTERM (Celery's warm stop), `k` SIGKILL, and the end of the file means that
the kernel is gone, by whatever death, so the command goes too. SIGUSR1 does what `t` does: another kernel of the same
course may send it. Its standard output is what the command writes
to its terminal; its exit code is the command's, or 128 plus the signal that ended it.
"""

import contextlib
import ctypes
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

GRACE = 3.0  # seconds between SIGTERM and SIGKILL once the kernel is gone
POLL = 0.05  # seconds between two looks at a group whose shell has ended
ROWS, COLUMNS = 40, 132
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def main(command: str, group: bool) -> int:
    """Run `command` under /bin/sh until it ends; see the module's text.

    Args:
        command: a shell command line.
        group: whether SIGTERM goes to the whole process group (a pipeline, a loop) or to the command alone. Celery's
            prefork pool must get it alone: its children would otherwise drop what they are doing. Of a group, a stop
            waits for all: the shell ends at once, and the programs that it has started may need their time.

    Returns:
        The exit code.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for noticed in (signal.SIGCHLD, signal.SIGUSR1):  # the number of the signal comes out of `wake`
        signal.signal(noticed, lambda *_: None)
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    started, starter = os.pipe()  # not inherited: its end tells that the child has become the command
    pid, terminal = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        if not group:  # a group gets it when its shell ends, and stays deaf to it
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.execv("/bin/sh", ["/bin/sh", "-e", "-c", command])
    os.close(starter)
    os.read(started, 1)  # before that, signals would find no process group, or be ignored
    readers, status, stopping = [0, terminal, wake], None, False
    deadline: float | None = None
    while status is None or (stopping and _exists(pid)):
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        timeout = timeout if status is None else POLL
        ready = select.select(readers, [], [], timeout)[0]
        if terminal in ready and not _copy(terminal):
            readers.remove(terminal)
        orders = (os.read(0, 64) or b"x") if 0 in ready else b""
        if wake in ready and signal.SIGUSR1 in os.read(wake, 64):
            orders += b"t"
        for order in orders:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: all of the group are zombies
                if order == ord("k"):
                    os.killpg(pid, signal.SIGKILL)
                elif group:
                    stopping = True
                    os.killpg(pid, signal.SIGTERM)
                else:
                    os.kill(pid, signal.SIGTERM)
            if order == ord("x"):
                readers.remove(0)
                deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        ended = _reap(pid)
        status = ended if status is None else status
    _sweep(pid)
    while terminal in readers and select.select([terminal], [], [], 0)[0] and _copy(terminal):
        pass
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _exists(group: int) -> bool:
    """Whether a process group has a process."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, 0)
        return True
    return False


def _copy(terminal: int) -> bool:
    """Pass on what the terminal has; False when it is closed (Linux says so with EIO)."""
    try:
        data = os.read(terminal, 65536)
    except OSError:
        return False
    if not data:
        return False
    with contextlib.suppress(BrokenPipeError):  # the kernel is gone: nobody reads, the command still has to end
        while data:
            data = data[os.write(1, data) :]
    return True


def _reap(pid: int) -> int | None:
    """Collect every child that has ended (as subreaper also the command's orphans); the command's wait status."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == pid:
                return ended[1]
    return None


def _sweep(pid: int) -> None:
    """Kill what the command left behind: its process group and, on Linux, any orphan that came to us."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError, FileNotFoundError):
        while True:
            with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:  # noqa: PTH123
                for child in children.read().split():
                    os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] == "group"))
