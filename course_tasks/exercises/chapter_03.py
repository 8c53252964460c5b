"""The exercises and the quiz of chapter 03."""

import re
import shlex
import socket
from collections.abc import Callable

import click
from celery import Celery
from celery.bin.celery import celery as program
from celery.bin.worker import worker
from celery.utils.nodenames import default_nodename, host_format

from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.toolkit import ask_worker
from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project


def _tasks_of(answer: Callable) -> str | None:
    for name in ("first", "shop"):
        node = f"{name}@{socket.gethostname()}"
        try:
            registered = ask_worker(Celery(set_as_current=False), name, "registered", 5)
        except ClassroomError as error:
            return str(error)
        given = called(answer, name, case=f"for {name!r}, ")
        if given is None:
            return "it returned None. Does your function end with return?"
        if isinstance(given, dict):
            kind = "answers of nodes, by their names" if node in given else "figures, not of names of tasks"
            return f"for {name!r} it returned a dictionary of {kind}. Return the list of the tasks' names."
        names = [str(task) for task in given] if isinstance(given, list | tuple | set | frozenset) else None
        if names is None:
            return f"for {name!r} it returned {given!r}, and it should return a list of names."
        if any(task.startswith("celery.") for task in names):
            return "these are the tasks of an app in this notebook, and Celery's own are among them. Ask the worker."
        if set(names) != set(registered):
            return f"for {name!r} it returned {sorted(names)}, but that worker has other tasks. Ask the worker."
    return None


def _words(answer: str) -> tuple[list[str], str]:
    """The words of the last command in a shell text, and the folder that it changed to."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*(%%terminal.*|#.*)$", "", answer))
    text = re.sub(r"\d>&\d", "", text)
    text = re.sub(r"\$\(hostname\)|`hostname`|\$\{?HOSTNAME\}?", socket.gethostname(), text)
    reader = shlex.shlex(text.strip().replace("\n", ";"), posix=True, punctuation_chars=True)
    reader.wordchars += "%@:,$"
    commands: list[list[str]] = [[]]
    redirected = False
    for word in reader:
        if set(word) <= set(";&") and word != "&":
            commands.append([])
            redirected = False
        elif set(word) <= set("|<>&"):
            redirected = True  # where the output goes makes no difference
        elif not redirected:
            commands[-1].append(word)
    commands = [command for command in commands if command]
    folder = next((command[1].rstrip("/") for command in commands if command[0] == "cd" and len(command) > 1), "")
    words = commands[-1] if commands else []
    while words and re.fullmatch(r"\w+=.*|exec|env", words[0]):
        words = words[1:]
    return words, folder


def _command(answer: str) -> str | None:
    try:
        words, folder = _words(answer)
        if re.fullmatch(r"(.*/)?python[\d.]*", words[0] if words else "") and words[1:2] == ["-m"]:
            words = words[2:]
        if not re.fullmatch(r"(.*/)?celery", words[0] if words else ""):
            return "the command should begin with celery, or with python -m celery."
        before, after, _ = program.make_parser(click.Context(program)).parse_args(words[1:])
        if after[:1] != ["worker"]:
            return "it does not say what to start: the word worker is missing."
        options, rest, _ = worker.make_parser(click.Context(worker)).parse_args(after[1:])
    except click.UsageError as error:
        said = error.format_message()
        if "-A" in said or "--app" in said:
            return f"Celery says: {said} It belongs before the word worker."
        if "--name" in said:
            return f"Celery says: {said} The node name is given with -n."
        return f"Celery says: {said}"
    except ValueError as error:
        return f"a shell could not read it: {error}."
    module = re.fullmatch(r"(scratch\.)?shop([:.]app)?", str(before.get("app")))
    if not module:
        return "it does not say which app: give -A with the name of the module, without .py."
    if module[1] and folder.endswith("scratch"):
        return "in the folder scratch, the module is called shop and not scratch.shop."
    if rest:
        return f"Celery would stop at {rest[0]!r}, which is neither an option nor the value of one."
    if options.get("pool", options.get("pool_cls")) != "solo":
        return "the pool is not solo."
    node = host_format(default_nodename(str(options.get("hostname"))))
    if node == "celery@night":
        return "the node name lacks the machine: it should end in @%h."
    if node != f"night@{socket.gethostname()}":
        return f"the node name becomes {node}, not night@{socket.gethostname()}: give it with -n."
    queues = [queue for queue in str(options.get("queues")).split(",") if queue]
    if "orders" not in queues:
        return "the queue is not orders: give it with -Q."
    return None if queues == ["orders"] else "it takes messages from other queues as well, not only from orders."


def _bakery(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("python -m celery -A bakery worker --pool=solo --without-mingle --without-gossip")
        client = project.client()
        known = next(iter((client.control.inspect(timeout=10, limit=1).registered() or {"": []}).values()))
        if "bread.bake" not in known:
            return (
                f"the worker starts, but it knows only {', '.join(known) or 'no task at all'}. bread.bake is missing."
            )
        if "bakery.opening_hours" not in known:
            return "the worker knows bread.bake now, but bakery.opening_hours is missing."
        baked = client.send_task("bread.bake", args=(5,)).get(timeout=10)
        return None if baked == "5 loaves" else f"bread.bake(5) returned {baked!r}, and it should return '5 loaves'."


def _app(lines: str, end: str = "", top: str = "") -> str:
    task = '@app.task\ndef opening_hours():\n    return "7 to 18"\n'
    return f"%%writefile scratch/bakery/bakery.py\n{top}from celery import Celery\n\n{lines}\n\n\n{task}{end}"


EXERCISES = {
    "03-1": Exercise(
        kind=Callable,
        judge=_tasks_of,
        wrong={
            "answer = lambda name: client.control.inspect([f'{name}@' + os.uname().nodename]).registered()": (
                "a dictionary of answers of nodes"
            ),
            'answer = lambda name: ask_worker(client, name, "stats")': "a dictionary of figures",
            "answer = lambda name: sorted(client.tasks)": "Celery's own are among them",
            'answer = lambda name: ask_worker(client, "first", "registered")': "for 'shop' it returned ['add', ",
            'answer = lambda name: ["add"]': "for 'first' it returned ['add']",
            'def ask(name):\n    ask_worker(client, name, "registered")\n\n\nanswer = ask': "it returned None",
            'answer = ask_worker(client, "first", "registered")': "should be a function",
            'answer = lambda name: str(ask_worker(client, name, "registered"))': "should return a list of names",
            "answer = lambda: []": "your function raised TypeError",
        },
        right=(
            "import functools\nanswer = functools.partial(ask_worker, client, question='registered')",
            "def ask(name):\n    node = f'{name}@{os.uname().nodename}'\n"
            "    return set(client.control.inspect([node], timeout=5, limit=1).registered()[node])\n\n\nanswer = ask",
        ),
    ),
    "03-2": Exercise(
        kind=str,
        judge=_command,
        wrong={
            'answer = "celery worker --app=shop --pool=solo -n night@%h -Q orders"': "belongs before the word worker",
            'answer = "celery --app=shop worker --pool=solo --name=night -Q orders"': "The node name is given with -n",
            'answer = "celery --app=shop worker --pool=solo -n night -Q orders"': "lacks the machine",
            'answer = "celery --app=shop worker --pool=solo -n night@%h"': "the queue is not orders",
            'answer = "celery -A shop --pool=solo worker"': "Celery says: No such option",
            'answer = "celery -A shop.py worker --pool=solo -n night@%h -Q orders"': "without .py",
            'answer = "celery -A shop worker -n night@%h -Q orders"': "the pool is not solo",
            'answer = "celery -A shop worker --pool=solo -n night@%h -Q orders,celery"': "from other queues as well",
            'answer = "celery -A shop worker --pool=solo -n day@%h -Q orders"': "the node name becomes day@",
            'answer = "cd scratch; celery -A scratch.shop worker -P solo -n night@%h -Q orders"': "not scratch.shop",
            'answer = "echo celery -A shop worker -P solo -n night@%h -Q orders"': "should begin with celery",
            'answer = "celery -A shop -P solo -n night@%h -Q orders"': "No such option '-P'",
        },
        right=(
            'answer = "cd scratch && .venv/bin/celery --app shop:app worker -P solo -Qorders -n night@$(hostname)"',
            'answer = """%%terminal night\ncd scratch\npython3.11 -m celery -A shop worker --pool=solo \\\\\n'
            '    --hostname=night@%h --queues=orders --loglevel=INFO 2>&1 | tee night.log\n"""',
            "answer = \"celery -A scratch.shop worker -n 'night@%h' -P solo -c 1 -Q orders\"",
        ),
    ),
    "03-3": Exercise(
        kind=str,
        judge=_bakery,
        project="scratch/bakery",
        wrong={
            _app('app = Celery("bakery")'): "it knows only bakery.opening_hours",
            _app('app = Celery("bakery", include=["bred"])'): "No module named 'bred'",
            _app('app = Celery("bakery")', top="from bread import bake\n"): "ended before it was ready",
            _app('app = Celery("bakery")\n\n\n@app.task(name="bread.bake")\ndef bake(loaves):\n    return loaves'): (
                "bread.bake(5) returned 5"
            ),
            "%%writefile scratch/bakery/bakery.py\nfrom celery import Celery\n\n"
            'app = Celery("bread", include=["bread"])\n': "bakery.opening_hours is missing",
        },
        right=(
            _app('app = Celery("bakery")\napp.conf.imports = ("bread",)'),
            _app('app = Celery("bakery")', "\n\nimport bread  # noqa\n"),
            _app('app = Celery("bakery")\napp.autodiscover_tasks(["bread"])'),
        ),
    ),
}

QUIZ = {
    "03-1": Question(
        right="c",
        wrong={
            "a": "the worker has thrown the message away, so no other worker will get it.",
            "b": "after a restart, the worker imports the same modules as before. The notebook isn't one of them.",
            "d": "`delay` sends the same name, and the worker doesn't know a task of that name.",
        },
    ),
    "03-2": Question(
        right=("office.mail.send",),
        wrong={
            "send": 'that would be the name with `@app.task(name="send")`.',
            "mail.send": "the first part of the name is the whole name of the module, as the worker imports it.",
            "office.mail": "that is the module. It may contain several tasks, so the name needs one more part.",
            "__main__.send": (
                "`__main__` is the name of a notebook, or of a file that is run as a script. This file is imported."
            ),
        },
        otherwise="without `name=`, Celery makes the name out of the module and the function, as in `shop.price`.",
    ),
    "03-3": Question(
        right="b",
        wrong={
            "a": (
                "Celery doesn't switch to another kind of broker by itself. If Redis is down, a worker keeps trying "
                "its address."
            ),
            "c": "then the worker doesn't start at all, and Celery says `Unable to load celery application`.",
            "d": "`-Q` chooses queues. It doesn't change the address of the broker.",
        },
    ),
}
