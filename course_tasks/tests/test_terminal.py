"""The terminal cell in real kernels: what it shows, how it fails, and that it leaves nothing behind."""

import contextlib
import html
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from pathlib import Path

import psutil
import pytest
from billiard import pool

from course_tasks import servers
from course_tasks.authoring import kernels
from course_tasks.classroom.ansi import COLOURS, coloured, plain
from course_tasks.classroom.terminal import SUPERVISOR, Terminal, prepared
from course_tasks.tests.plugin import processes, until

# Python for `python -c "..."`: each says that it is ready and stays; DEAF does so after SIGTERM, too
WAITING = "import time; print('{mark} ready.', flush=True); time.sleep(600)"
DEAF = "import signal; signal.signal(15, signal.SIG_IGN); signal.signal(1, signal.SIG_IGN); " + WAITING


class Kernel:
    """A kernel with the course's extension loaded, or not."""

    def __init__(self, manager, loaded=True):
        self.manager = manager
        self.updates: list[str] = []
        self.written = 0  # characters of all live updates
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)
        assert not loaded or self.run("%load_ext course_tasks.classroom") == []

    def message(self, timeout: float = 60) -> dict:
        """The next message from the kernel; live updates are kept for `updated`."""
        found = self.client.get_iopub_msg(timeout=timeout)
        if found["msg_type"] == "update_display_data":
            self.updates.append(found["content"]["data"]["text/plain"])
            self.written += sum(map(len, found["content"]["data"].values()))
        return found

    def run(self, code: str, wait: bool = True) -> list[dict]:
        """The cell's outputs, live updates left out; with wait=False, its message id."""
        message = self.client.execute(code, stop_on_error=False)
        outputs: list[dict] = []
        while wait:
            found = self.message()
            content, kind = found["content"], found["msg_type"]
            if found["parent_header"].get("msg_id") != message:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            if kind not in ("status", "execute_input", "update_display_data"):
                outputs.append(content)
        return message

    def text(self, code: str) -> str:
        """What the cell printed."""
        return "".join(output["text"] for output in self.run(code))

    def error(self, code: str) -> str:
        """The message of the cell's error, of which the learner must see nothing else."""
        [error] = [output for output in self.run(code) if "ename" in output]
        assert error["traceback"] == [error["evalue"]], "a traceback is shown"
        return error["evalue"]

    def updated(self, text: str, timeout: float = 60) -> bool:
        """Whether a live update of a pane has had `text` in it, or has it within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while not any(text in update for update in self.updates):
            if (left := deadline - time.monotonic()) <= 0:
                return False
            with contextlib.suppress(queue.Empty):
                self.message(left)
        return True


@pytest.fixture
def kernel(pair):
    with kernels.kernel_manager() as manager:
        manager.start_kernel(env=kernels.kernel_environment(), cwd=str(kernels.NOTEBOOKS))
        kernel = Kernel(manager)
        yield kernel
        kernel.client.stop_channels()


@pytest.fixture
def mark():
    """A word that a test's processes have in their command lines, and none of which may be left at its end."""
    mark = f"mark{uuid.uuid4().hex}"
    yield mark
    assert gone(mark), "processes were left behind"


def gone(mark: str, timeout: float = 60) -> bool:
    """Whether all processes with the mark end within `timeout` seconds."""
    _, alive = psutil.wait_procs(processes(mark), timeout)
    return not alive and not processes(mark)


def cell(mark: str, head: str = "%%terminal one", script: str = WAITING) -> str:
    return f'{head}\npython -c "{script.format(mark=mark)}"'


def test_the_pane_shows_the_command_and_the_log_up_to_ready_and_then_follows(kernel, mark):
    script = f"import time; print('\\033[31mred\\033[0m <b>'); print('{mark} ready.', flush=True); input(); print('on')"
    [pane] = kernel.run(f'%%terminal one\nprintf "first\\n"\npython -c "{script}"')
    text, html = pane["data"]["text/plain"], pane["data"]["text/html"]
    assert text.splitlines()[:2] == ["one: running", '$ printf "first\\n"']
    assert text.splitlines()[-3:] == ["first", "red <b>", f"{mark} ready."]
    assert re.search(r'<span style="color:#\w+;">red</span> &lt;b&gt;', html), "colours kept, text escaped"
    assert 'role="log"' in html and "<script" not in html
    kernel.text("%stop one")
    assert kernel.updated("one: stopped")


def test_the_pane_grows_and_tail_prints_what_is_new_since_the_last_look(kernel, mark, tmp_path):
    go = tmp_path / mark
    kernel.run(f"%%terminal one\necho ' ready.'\nwhile [ ! -e {go} ]; do sleep 0.02; done; echo more; sleep 600")
    assert kernel.text("%tail one") == "(nothing new)\n"
    go.touch()
    assert kernel.updated("more")
    assert kernel.text("%tail one") == "more\n"
    assert kernel.text("%tail one") == "(nothing new)\n"
    assert kernel.text("%stop one") == "one: stopped\n"


def test_a_worker_a_task_and_its_lines_alone(kernel, mark):
    worker = (
        f"python -m celery -A course_tasks worker --loglevel=INFO --pool=threads -c 2 --without-mingle -n {mark}@%h"
    )
    [pane] = kernel.run(f"%%terminal worker\n{worker}")
    assert pane["data"]["text/plain"].endswith(" ready.")
    kernel.run("from course_tasks.celery import app\none, two = [app.send_task('add', args=(n, n)) for n in (1, 2)]")
    lines = kernel.text("%tail worker --task {two.id}").splitlines()
    assert len(lines) == 2 and lines[0].endswith("received") and lines[1].endswith(": 4")
    assert kernel.text("%stop worker") == "worker: stopped\n"
    assert "Warm shutdown" in kernel.text("%tail worker")


def test_beat_a_server_and_a_script_are_known_to_be_ready(kernel, mark, tmp_path):
    beat = f"python -m celery -A course_tasks beat --schedule {tmp_path}/{mark}"
    assert "maxinterval" in kernel.run(f"%%terminal beat\n{beat}")[0]["data"]["text/plain"]
    # a relative path, for one of a socket has 107 characters at most
    server = f"cd {tmp_path}\n{shlex.quote(servers.find_server()[0])} --port 0 --unixsocket {mark} --save ''"
    assert "eady to accept connections" in kernel.run(f"%%terminal server\n{server}")[0]["data"]["text/plain"]
    [script] = kernel.run('%%terminal script\npython -c "print(6 * 7)"')
    assert script["data"]["text/plain"].splitlines()[0] == "script: finished"
    assert script["data"]["text/plain"].splitlines()[-1] == "42"
    assert kernel.text("%stop beat server script") == "beat: stopped\nserver: stopped\nscript: finished\n"


def test_several_are_stopped_together(kernel, mark, tmp_path):
    """Each ends when all have been told to: one after the other, the first would never end."""
    others = f"iter(lambda: len(os.listdir('{tmp_path}')) < 3, False)"
    for name in ("one", "two", "three"):
        stop = f"(open('{tmp_path}/{name}', 'x'), [time.sleep(0.02) for _ in {others}], exit())"
        script = f"import os, signal; signal.signal(15, lambda *_: {stop}); {WAITING}"
        kernel.run(cell(mark, f"%%terminal {name}", script))
    assert kernel.text("%stop") == "one: stopped\ntwo: stopped\nthree: stopped\n"


def test_an_order_that_comes_too_late_leaves_nothing_to_write():
    terminal = Terminal("one", "true", re.compile("never"))
    assert terminal.wait(lambda: not terminal.running, 60)
    terminal.order(b"k")
    terminal.process.stdin.close()


def test_kill_leaves_no_child_of_a_prefork_worker(kernel, mark):
    worker = f"python -m celery -A course_tasks worker --pool=prefork -c 2 --without-mingle -n {mark}@%h"
    kernel.run(f"%%terminal worker --ready 'celery@|{mark}@.* ready'\n{worker} --loglevel=INFO")
    assert len(processes(mark)) >= 4  # supervisor, main process, two children
    assert kernel.text("%kill worker") == "worker: killed\n"
    assert gone(mark)


def test_running_the_cell_again_replaces_the_command(kernel, mark):
    kernel.run(cell(mark))
    [first] = [process for process in processes(mark) if "-I" not in process.cmdline()]
    printed = "".join(output.get("text", "") for output in kernel.run(cell(mark)))
    assert printed == "one was running, and was stopped first.\n"
    assert not first.is_running()
    kernel.text("%stop one")


@pytest.mark.parametrize(
    "source, message",
    [
        ("%%terminal one\nno-such-command-{mark} --option", r"one died .* \(exit code 127\)[\s\S]*no-such-command-"),
        ('%%terminal one\npython -c "print(5); {mark}"', r"one died .* \(exit code 1\)[\s\S]*\n5\n[\s\S]*NameError"),
        ("%%terminal one\ncd /no-such-{mark}\necho here", r"one died .* \(exit code \d\)[\s\S]*no-such-"),
        ("%%terminal one\ntrue\nfalse", r"one died .* \(exit code 1\)[\s\S]*It wrote nothing"),
        ('%%terminal one\necho "{mark}', r"one died [\s\S]*[Uu]nterminated|unexpected EOF"),
        (
            "%%terminal one --timeout 0.5\npython -c \"import time; '{mark}'; time.sleep(600)\"",
            r"one was not ready after 0.5 s",
        ),
        (
            "%%terminal one --timeout 0.5\n: celery worker; sleep 600; : {mark}",
            r"stopped\. Without --loglevel=INFO, a worker doesn't say when it is ready\.",
        ),
        (
            "%%terminal one --timeout 0.5\n: celery worker -l info; sleep 600; : {mark}",
            r"so it was stopped\.\nIt wrote",
        ),
        ("%servers or not", r"%servers takes nothing, and this says 'or not'"),
        ("%progress 05", r"%progress takes nothing, and this says '05'"),
        ("%%terminal one --ready '(['\necho {mark}", r"--ready takes a regular expression"),
        ("%%terminal one\n# nothing but a comment {mark}", r"There is no command for 'one'"),
        ("%tail nobody", r"no terminal called 'nobody'.*none yet"),
        ("%stop nobody", r"no terminal called 'nobody'.*none yet"),
    ],
)
def test_what_can_go_wrong_has_one_clear_message(kernel, mark, source, message):
    assert re.search(message, kernel.error(source.replace("{mark}", mark)))
    assert gone(mark)


@pytest.mark.parametrize("line", ["%%terminal\necho", "%tail", "%%terminal one --nonsense\necho", "%kill"])
def test_a_wrong_option_has_one_clear_line(kernel, line):
    [output] = kernel.run(line)
    assert output["name"] == "stderr" and re.fullmatch(r"UsageError: .*\n", output["text"])


def test_a_task_that_does_not_end_is_said_so(kernel, mark):
    kernel.run(cell(mark))
    assert "has not said within 0.3 s" in kernel.error("%tail one --task 123 --timeout 0.3")
    kernel.text("%stop one")


SLOW = """%%terminal one
echo ' ready.'
for n in 1 2 3; do sleep 0.2; echo "line $n [done]"; echo between; done
sleep 600 # {mark}"""


def test_a_log_is_followed_up_to_the_line_that_was_waited_for(kernel, mark):
    kernel.run("from course_tasks.classroom import follow_log\nimport re")
    kernel.run(SLOW.replace("{mark}", mark))
    assert kernel.text("print(follow_log('one', '[done]', times=2))") == (
        "['line 1 [done]', 'between', 'line 2 [done]']\n"
    )
    assert kernel.text('%tail one --until "3 [done]"') == "between\nline 3 [done]\n"
    assert kernel.text("print(follow_log('one', re.compile('b.*n$')))") == "['between']\n"
    error = kernel.error("follow_log('one', 'between', times=2, seconds=0.3)")
    assert error.startswith("one: 'between' is in 0 of its 0 new lines, not in 2, after 0.3 s.\nIts last lines:\n")
    assert error.endswith("line 3 [done]\nbetween")
    kernel.run("%stop one")


def test_a_log_that_ends_is_not_waited_for(kernel):
    kernel.run("%%terminal one\necho ' ready.'\nread line < /dev/null || true")
    start = time.monotonic()
    error = kernel.error("%tail one --until never --timeout 600")
    assert "'never' is in 0 of its " in error and "and it is not running (finished)." in error
    assert "ended (finished)" in kernel.error("%tail one --task 123 --timeout 600")
    assert time.monotonic() - start < 300, "nobody waits for what can't come"


@pytest.mark.parametrize(
    "code, message",
    [
        ("follow_log('two', 'text')", "There is no terminal called 'two'"),
        ("follow_log('one', '')", "Wait for a text, such as 'ready.', or a compiled regular expression, not ''."),
        ("follow_log('one', 5)", "or a compiled regular expression, not 5."),
        ("%tail one --until text --times 0", "A text can be waited for in 1 line or more, not in 0."),
        ("%tail one --until text --task 123", "takes one of --task, --until and --save, not several."),
        ("%%terminal one --lines 0\necho", "--lines takes a whole number from 1 to 300, not 0."),
        ("%%terminal one --lines 301\necho", "--lines takes a whole number from 1 to 300, not 301."),
    ],
)
def test_a_wrong_wish_has_one_clear_line(kernel, code, message):
    kernel.run("from course_tasks.classroom import follow_log")
    kernel.run("%%terminal one\necho ' ready.'")
    assert message in kernel.error(code)


def test_a_short_pane_shows_the_last_lines_and_tail_has_all_of_them(kernel, mark):
    script = f"for n in 1 2 3 4; do echo line $n; done; echo ' ready.'; echo more; sleep 600 # {mark}"
    [pane] = kernel.run(f"%%terminal one --lines 2\n{script}")
    assert pane["data"]["text/plain"].splitlines() == ["one: running", f"$ {script}", "line 4", " ready."]
    assert "line 4" in pane["data"]["text/html"] and "line 3\n" not in pane["data"]["text/html"]
    kernel.run("%tail one --until more")
    kernel.run("%stop one")
    assert kernel.updated("one: stopped")
    assert kernel.updates[-1].splitlines()[2:] == [" ready.", "more"], "the live pane is short too"
    again = kernel.run(f"%%terminal one\n{script}")
    assert "line 1" in again[0]["data"]["text/plain"]
    kernel.run("%kill one")
    [output] = kernel.run("%%terminal one --lines few\necho")
    assert output["text"].startswith("UsageError: ") and output["text"].count("\n") == 1


COUNTING = """import os
from course_tasks.classroom import terminal
os.environ["COURSE_RECORDING"] = "1"  # no live pane, which looks at the lines as well
looks, plain = [], terminal.plain
terminal.plain = lambda line: (looks.append(line), plain(line))[1]"""


def test_a_task_is_looked_for_in_each_line_once(kernel, mark):
    """In a long log, looking at all of it again with each new line would take the time that the reader needs."""
    kernel.run(COUNTING)
    slowly = "[(time.sleep(0.005), print('task[12345678]', n, flush=True)) for n in range(100)]"
    script = f"import time; print(' ready.'); [print('line', n) for n in range(400)]; {slowly}; time.sleep(600)"
    kernel.run(f'%%terminal one\npython -c "{script}; {mark!r}"')
    [printed, _] = kernel.run("%tail one --task 12345678 --timeout 2")
    assert printed["text"].count("task[12345678]") >= 50
    [looks] = [output for output in kernel.run("len(looks)") if "data" in output]
    assert int(looks["data"]["text/plain"]) < 2000, "500 lines, each looked at once, and once more to print it"
    kernel.run("%kill one")


def test_a_warm_stop_that_takes_too_long_is_said_so_and_kill_helps(kernel, mark):
    kernel.run(cell(mark, script=DEAF))
    assert "%kill one" in kernel.error("%stop one --timeout 0.5")
    assert kernel.text("%kill one") == "one: killed\n"


@pytest.mark.parametrize("stop", ["%%terminal one\necho", "%stop one"])
def test_a_stop_has_the_time_that_a_prefork_child_may_take_for_its_last_result(kernel, mark, stop):
    longest = pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT * pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_INTERVAL
    slow = f"import signal, time; signal.signal(15, lambda *_: (time.sleep({longest + 2}), exit())); "
    kernel.run(cell(mark, script=slow + WAITING))
    assert re.match("one was running, and was stopped first|one: stopped", kernel.run(stop)[0].get("text", ""))


HALF_STARTED = """import time
from course_tasks.classroom.terminal import Terminal
started = Terminal.__init__
Terminal.__init__ = lambda *given: (started(*given), time.sleep(2))[0]"""


@pytest.mark.parametrize("before", ["", HALF_STARTED], ids=["waiting", "half started"])
def test_interrupting_a_start_stops_it(kernel, mark, before):
    kernel.run(before)
    kernel.run(cell(mark, "%%terminal one --ready never"), wait=False)
    until(lambda: processes(mark), "the command runs")
    kernel.manager.interrupt_kernel()
    while (found := kernel.message())["msg_type"] != "error":
        pass
    assert "Interrupted" in found["content"]["evalue"] and len(found["content"]["traceback"]) == 1
    assert gone(mark)


def test_interrupting_another_cell_leaves_the_worker_alone(kernel, mark):
    kernel.run(cell(mark))
    # short sleeps: Python begins a sleep even if the interrupt has come in the moment before
    kernel.run("import time; print('now', flush=True)\nwhile True: time.sleep(0.02)", wait=False)
    while not kernel.message()["content"].get("text", "").startswith("now"):
        pass
    kernel.manager.interrupt_kernel()
    while kernel.message()["content"].get("ename") != "KeyboardInterrupt":
        pass
    assert processes(mark)
    kernel.text("%stop one")


@pytest.mark.parametrize("how", ["restart", "shutdown", "now", "sigkill", "supervisor"])
def test_no_end_of_the_kernel_leaves_anything_behind(kernel, mark, how, tmp_path):
    asked = tmp_path / "asked"
    polite = f"import signal, pathlib; signal.signal(15, lambda *_: exit(pathlib.Path('{asked}').touch())); {WAITING}"
    kernel.run(cell(mark, script=DEAF))
    kernel.run(cell(mark, "%%terminal two", polite))
    assert len(processes(mark)) == 4
    if how == "restart":
        kernel.manager.restart_kernel()
        assert kernel.updated("two: stopped"), "its pane goes on saying that it runs"
    elif how == "shutdown":
        kernel.manager.shutdown_kernel()
    elif how == "now":  # SIGKILL, to the whole process group
        kernel.manager.shutdown_kernel(now=True)
    elif how == "sigkill":
        psutil.Process(kernel.manager.provisioner.process.pid).send_signal(signal.SIGKILL)
    elif sys.platform == "linux":
        supervisors = [process for process in processes(mark) if "-I" in process.cmdline()]
        for process in supervisors:  # all found before the first is killed, which takes its command with it
            process.kill()
    else:
        pytest.skip("only Linux ends a child with its parent")
    assert gone(mark)
    assert asked.exists() is (how != "supervisor"), "SIGTERM comes first"


def test_a_command_that_ends_leaves_none_of_its_children(kernel, mark):
    script = WAITING.format(mark=mark)
    background = f'python -c "{script}" &\n'
    if sys.platform == "linux":
        background += f'setsid python -c "{script}" &\n'
    [pane] = kernel.run(f"%%terminal one --ready never\n{background}sleep 0.5")
    assert pane["data"]["text/plain"].startswith("one: finished")
    assert gone(mark)


# What people write in a shell, each with whether it ends in a program. That gets the shell's place, so that SIGTERM
# reaches it alone.
SCRIPTS = [
    ("echo one; echo two", False),
    ("python -c 'print(5)'", True),
    ("echo hello", False),
    ("true\npython -c 'exit(3)'", True),
    ("for n in 1 2 3; do\n  echo $n\ndone", False),
    ("for n in 1 2 3; do echo $n; done", False),
    ("if true; then\n  python -c 'print(1)'\nelse\n  echo no\nfi", False),
    ("case x in\nx) echo yes;;\nesac", False),
    ('while read line; do echo "<$line>"; done <<END\na\nb\nEND', False),
    ("cat <<END\n# no comment\nexit 5\n\nEND", False),
    ("cat > f.py <<'END'\nprint(\"$HOME \\\\\")\nEND\npython f.py", True),
    ("cat <<END\nexit 5", False),
    ('greet() { echo "hello $1"; }\ngreet you', False),
    ("greet() {\n  python -c 'print(2)'\n}\ngreet", False),
    ("python() { echo mine; }\npython -c 'print(1)'", False),
    ("! false", False),
    ("! true", False),
    ("cd /\npwd", False),
    ("cd /no-such-folder", False),
    ("export A=5", False),
    ("A=5\nexport A\npython -c 'import os; print(os.environ[\"A\"])'", True),
    ("B='x  y'\nA=$B C=~/x python -c 'import os; print(os.environ[\"A\"], os.environ[\"C\"])'", True),
    ("A=5", False),
    ("python -c 'print(1)' &\nwait", False),
    ("python -c 'print(1)' | cat", False),
    ("(exit 4)", False),
    ("{ echo a; echo b; }", False),
    ("false\necho never", False),
    ("false || echo saved", False),
    ("test -d / && echo there", False),
    ("set -u\necho $no_such_variable", False),
    ("trap 'echo bye' EXIT\npython -c 'print(1)'", False),
    ("set -x\npython -c 'print(1)'", False),
    ("alias say='echo said'\nsay it", False),
    ("exec python -c 'print(1)'", True),
    ("python -c 'print(\"two\nlines\")'", False),
    ("python \\\n  -c \\\n  'print(1)'", True),
    ("echo one\\\ntwo", False),
    ("python -c 'print(1)' # (a comment; with | this)", True),
    ("python -c 'print(1)'\n# a comment below\n", True),
    ("python -c 'import sys; print(sys.argv[1:])' '(' \"|;&\" \\; a\\ b \"$(echo c)\" $(echo d e)", True),
    ("python -c 'print(1)' > out\ncat out", True),
    ("2>&1 > /dev/null python -c 'import sys; print(1, file=sys.stderr)'", True),
    ("P=python\n$P -c 'print(1)'", False),
    ("umask 077; umask", False),
    ("printf '%s\\n' a b", False),
    ("no-such-command --option", False),
    ("A=5 no-such-command", False),
    ("python -c 'exit(", False),
    ("if true; then echo", False),
    ("echo )", False),
    ("exit 7", False),
    ("kill -9 $$", False),
]


@pytest.mark.parametrize("script, alone", SCRIPTS)
def test_a_script_does_what_it_does_in_a_shell(script, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shell = subprocess.run(
        ["/bin/sh", "-e", "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    terminal = Terminal("one", script, re.compile("never"))
    assert terminal.wait(lambda: not terminal.running, 60)
    code = terminal.process.returncode
    assert (terminal.lines(), code) == (
        shell.stdout.splitlines(),
        shell.returncode % 256 if shell.returncode >= 0 else 128 - shell.returncode,
    )
    assert prepared(script)[1] is not alone


def test_a_pipelines_programs_are_stopped_warmly_too(kernel, mark, tmp_path):
    """The shell itself ends at once by SIGTERM; what it has started needs its time."""
    done = tmp_path / "done"
    slow = f"signal.signal(15, lambda *_: (time.sleep(1), open('{done}', 'x'), exit())); {WAITING}"
    kernel.run(cell(mark, script=f"import signal; {slow}") + " | cat")
    assert kernel.text("%stop one") == "one: stopped\n"
    assert done.exists()


# --- limits ---------------------------------------------------------------------------------------------------


def ended(script: str) -> Terminal:
    """A command of Python, in this process, that has ended."""
    terminal = Terminal("one", f"{shlex.quote(sys.executable)} -c {shlex.quote(script)}", re.compile("never"))
    assert terminal.wait(lambda: not terminal.running, 60)
    return terminal


def test_long_lines_are_shortened_with_a_mark_and_the_pane_stays_small(kernel, mark):
    script = f"import time; print(' ready.'); [print('z' * 100000) for _ in range(300)]; time.sleep(1); '{mark}'"
    kernel.run(f'%%terminal one\npython -c "{script}"')
    assert kernel.updated("one: finished")
    assert "\n" + "z" * 2000 + " … (98,000 more characters)" in kernel.updates[-1]
    assert kernel.written < 10e6, "300 lines of 100,000 characters are not sent again and again"
    assert len(kernel.updates[-1]) < 70_000


def test_a_line_without_an_end_needs_no_memory():
    tracemalloc.start()
    terminal = ended("import sys; [sys.stdout.write('y' * 1000) for _ in range(10000)]; print('end'); print('next')")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert terminal.lines() == ["y" * 2000 + " … (9,998,003 more characters)", "next"]
    assert peak < 3e6


def test_a_log_of_long_lines_keeps_the_last_ones_only():
    terminal = ended("for n in range(9000): print(n, 'x' * 1990)")
    assert terminal.count == 9000 and terminal.lines()[-1].startswith("8999 x")
    assert sum(map(len, terminal.lines())) <= 10e6 and len(terminal.lines()) > 4000
    assert terminal.lines(8998) == terminal.lines()[-2:]
    assert terminal.lines(8997, 8998) == [terminal.lines()[-3]]
    assert terminal.lines(0, 10) == [], "no longer kept"


@pytest.mark.parametrize(
    "script, line",
    [
        (r"print('10 %\r20 %\r30 %')", "30 %"),
        (r"[print(n, end='\r') for n in range(5)]", "4"),
        (
            r"import sys, time; [(sys.stdout.write(f'\r{n}'), sys.stdout.flush(), time.sleep(.01)) for n in range(9)]",
            "8",
        ),
        (r"print('x' * 5000 + '\rshort')", "short"),
        (r"import sys; sys.stdout.buffer.write(b'caf\xc3\xa9 \xff')", "café \ufffd"),
        (r"print('tail' + 'x' * 2000 + '\r')", "tail" + "x" * 1996 + " … (4 more characters)"),
    ],
)
def test_a_progress_bar_is_one_line(script, line):
    assert ended(script).lines() == [line]


def test_the_pane_shows_the_line_that_is_being_written(kernel, mark):
    script = f"print(' ready.\\nName? ', end='', flush=True); input(); '{mark}'"
    [pane] = kernel.run(f'%%terminal one\npython -c "{script}"')
    assert pane["data"]["text/plain"].endswith(" ready."), "stored outputs don't depend on the moment"
    assert kernel.updated("\nName? ")
    assert kernel.text("%tail one") == "(nothing new)\n"
    kernel.run("%kill one")
    assert kernel.text("%tail one") == "Name? \n"


def test_tail_prints_so_much_only_and_saves_the_rest(kernel, tmp_path):
    kernel.run("%%terminal one --ready never\npython -c \"for n in range(25000): print('line', n)\"")
    shown = kernel.text("%tail one").splitlines()
    assert shown == ["(nothing new)"], "the pane has shown them"
    kernel.updates.clear()
    kernel.run("%%terminal one\npython -c \"print(' ready.')\nfor n in range(25000): print('line', n)\"")
    assert kernel.updated("one: finished")
    printed = kernel.text("%tail one")
    assert len(printed) < 110_000
    notice, *lines = printed.splitlines()
    assert lines == [f"line {n}" for n in range(24000, 25000)]
    assert notice == "(24,000 lines before these are left out. %tail one --save FILE writes the log to a file.)"
    path = tmp_path / "the log.txt"
    assert kernel.text(f"%tail one --save '{path}'") == f"Saved the last 20,000 of 25,001 lines: {path}\n"
    assert path.read_text().splitlines() == [f"line {n}" for n in range(5000, 25000)]
    assert "No such file or directory" in kernel.error("%tail one --save /no-such-folder/log.txt")
    assert "Is a directory" in kernel.error(f"%tail one --save {tmp_path}")
    kernel.run("%%terminal one\nprintf ' ready.\\n\\033[31mred\\033[0m\\n'")
    assert kernel.text(f"%tail one --save '{path}'") == f"Saved all 2 lines: {path}\n"
    assert path.read_text() == " ready.\nred\n"


def test_a_search_in_the_log_does_not_hold_the_reader_up():
    terminal = ended("print(1)")
    others = []

    def matches(line):
        others.append(threading.Thread(target=terminal.lines))
        others[0].start()
        others[0].join(60)
        return not others[0].is_alive()

    assert terminal.find(matches, 0, 1, 60) == (1, 1)


def test_a_search_in_a_flood_of_lines_ends_in_time(kernel, mark):
    kernel.run(f"%%terminal one\necho ' ready.'; while :; do echo {mark}; done")
    assert "is in 0 of its" in kernel.error("%tail one --until never --timeout 0.2")
    kernel.run("%kill one")


RED, GREEN, BLUE, BOLD = COLOURS[1], COLOURS[2], COLOURS[4], "bold"


@pytest.mark.parametrize(
    "line, parts",
    [
        ("\x1b[31mred\x1b[0m no", [("red", RED), (" no", "")]),
        ("\x1b[31mred\x1b[39m no", [("red", RED), (" no", "")]),
        ("\x1b[31mred\x1b[m no", [("red", RED), (" no", "")]),
        ("\x1b[1mbold\x1b[22m no", [("bold", BOLD), (" no", "")]),
        ("\x1b[1;31m\x1b[92;22mgreen\x1b[39;1mbold", [("green", GREEN), ("bold", BOLD)]),
        ("\x1b[31mred\x1b[30mblack", [("red", RED), ("black", "")]),
        ("\x1b[38;5;34mgreen\x1b[38;5;4mblue", [("green", GREEN), ("blue", BLUE)]),
        ("\x1b[38;5;196;22mred", [("red", RED)]),
        ("\x1b[38;5;244mgrey\x1b[38;5;16mblack", [("grey", COLOURS[7]), ("black", "")]),
        ("\x1b[38;2;200;10;10mred\x1b[38;2;0;0;90mblue", [("red", RED), ("blue", BLUE)]),
        (
            "\x1b[48;5;31mno \x1b[48;2;1;31;32mno \x1b[41mno\x1b[49m no",
            [("no no no no", "")],
        ),
        ("\x1b[38mno \x1b[38;5mno \x1b[38;9;31mno \x1b[38:5:34mno", None),
        ("\x1b[4;3;7;58;5;31mno", None),
        ("\x1b]0;a title\x07text", [("text", "")]),
        ("\x1b]8;;http://example.org\x1b\\a link\x1b]8;;\x1b\\ on", [("a link on", "")]),
        ("\x1b]8;;no end", [("", "")]),
        ("\x1b(B\x1b[?25l\x1b[2K\x1b=a\x07\x08b\x1b[1;2Hc\td\x7f\x1b", [("abc\td", "")]),
        ("\x1b[32;<b>&\x1b[m", None),
    ],
)
def test_colours_and_other_sequences(line, parts):
    drawn = coloured([line])
    assert "\x1b" not in drawn and "\x07" not in drawn
    assert html.unescape(re.sub("</?span[^>]*>", "", drawn)) == plain(line) + "\n"
    if parts:
        styles = {"": "", BOLD: "font-weight:bold;"}
        wanted = [(text, styles.get(style, f"color:{style};")) for text, style in parts]
        assert (
            drawn == "".join(f'<span style="{style}">{text}</span>' if style else text for text, style in wanted) + "\n"
        )


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh")
@pytest.mark.parametrize("moved", [False, True])
def test_labs_zsh_reads_all_of_the_users_settings(tmp_path, moved):
    """Those may be in another folder, which `.zshenv` names."""
    home, other = tmp_path / "home", tmp_path / "other"
    for folder in (home, other):
        folder.mkdir()
        (folder / ".zshrc").write_text(f"RC={folder.name}; PATH=/usr/bin:/bin\n")
    (home / ".zshenv").write_text(f"ENV=read; {f'ZDOTDIR={other}' if moved else ''}\n")
    ours = Path(SUPERVISOR).parents[1] / "jupyter" / "zsh"
    done = subprocess.check_output(
        ["zsh", "-i", "-c", "echo $ENV $RC $ZDOTDIR ${USER_ZDOTDIR-unset} $VIRTUAL_ENV"],
        env={"HOME": str(home), "ZDOTDIR": str(ours), "USER_ZDOTDIR": str(home), "PATH": os.environ["PATH"]},
        stderr=subprocess.DEVNULL,
        text=True,
    )
    place = other if moved else home
    assert done.splitlines()[-1] == f"read {place.name} {place} unset {Path(sys.prefix)}"


def test_that_root_runs_a_worker_is_not_said_each_time(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    root = "You're running the worker with superuser privileges: this is\nabsolutely not recommended!"
    [line] = ended(f"import warnings; warnings.warn({root!r}); warnings.warn('other')").lines()
    assert line.endswith("UserWarning: other")


def test_colours_are_not_forced_on_a_program_in_a_pipe(kernel):
    [pane] = kernel.run("%%terminal colours\nenv | grep -c -e FORCE_COLOR -e CLICOLOR_FORCE || true")
    assert pane["data"]["text/plain"].splitlines()[-1] == "0"
