"""The exercises and the quiz of chapter 03d."""

from collections.abc import Callable

from celery import Celery

from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project

INTERNAL = "deprecated_settings"


def _unknown(answer: Callable) -> str | None:
    for settings, wrong in (
        ({"task_time_limt": 3, "result_expires": 60}, {"task_time_limt"}),
        ({"result_expires": 60, "task_acks_late": True}, set()),
        (
            {"worker_acks_late": True, "task_track_started": True, "includes": ["stock"]},
            {"worker_acks_late", "includes"},
        ),
    ):
        app = Celery("an app of the judge", set_as_current=False)
        app.conf.update(settings)
        case = f"for an app with the settings {', '.join(settings)}, "
        given = called(answer, app, case=case)
        if given is None:
            return "it returned None. Does your function end with return?"
        if not isinstance(given, list | tuple | set | frozenset | dict):
            return f"{case}it returned {given!r}, and it should return a list of names."
        if INTERNAL in given:
            return f"{case}the list contains {INTERNAL}, which Celery has put there itself."
        if missing := sorted(wrong - set(given)):
            return f"{case}{missing[0]} is missing in what your function returned."
        if more := sorted(set(given) - wrong, key=str):
            return f"{case}your function returned {more[0]!r} as well, which isn't a name that was set by mistake."
    return None


def _office(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("python -m celery -A office worker --pool=solo --without-mingle --without-gossip")
        client = project.client()
        known = next(iter((client.control.inspect(timeout=10, limit=1).registered() or {"": []}).values()))
        if "mail.send" not in known:
            return f"the worker starts, but it knows only {', '.join(known) or 'no task at all'}. mail.send is missing."
        if "office.opening_hours" not in known:
            return "the worker knows mail.send now, but office.opening_hours is missing."
        sent = client.send_task("mail.send", args=(5,)).get(timeout=10)
        return None if sent == "5 letters" else f"mail.send(5) returned {sent!r}, and it should return '5 letters'."


def _app(lines: str, end: str = "") -> str:
    task = '@app.task\ndef opening_hours():\n    return "7 to 18"\n'
    return f"%%writefile scratch/office/office.py\nfrom celery import Celery\n\n{lines}\n\n\n{task}{end}"


UNKNOWN = "from celery.app.defaults import SETTING_KEYS\n\n\ndef unknown(app):\n    {}\n\n\nanswer = unknown"

EXERCISES = {
    "03d-1": Exercise(
        kind=Callable,
        judge=_unknown,
        wrong={
            UNKNOWN.format("return [name for name in app.conf.table() if name not in SETTING_KEYS]"): (
                "the list contains deprecated_settings"
            ),
            UNKNOWN.format('return ["task_time_limt"]'): "as well, which isn't",
            UNKNOWN.format("return []"): "task_time_limt is missing",
            UNKNOWN.format("print([name for name in app.conf.table() if name not in SETTING_KEYS])").replace(
                "print(", "sorted("
            ): "it returned None",
            UNKNOWN.format("return [name for name in conf if name not in SETTING_KEYS]"): "task_time_limt",
            'answer = ["task_time_limt"]': "should be a function",
        },
        right=(
            UNKNOWN.format('return app.conf.table().keys() - SETTING_KEYS - {"deprecated_settings"}')
            .replace("return ", "return set(")
            .replace('"}', '"})'),
            UNKNOWN.format(
                'return [line.split(":")[0] for line in app.conf.humanize().splitlines()\n            '
                'if line.split(":")[0] not in {*SETTING_KEYS, "deprecated_settings"}]'
            ),
        ),
    ),
    "03d-2": Exercise(
        kind=str,
        judge=_office,
        project="scratch/office",
        wrong={
            _app('app = Celery("office", include=["mial"])'): "No module named 'mial'",
            _app('app = Celery("office")\napp.autodiscover_tasks()'): "it knows only office.opening_hours",
            _app('app = Celery("office")\n\n\n@app.task(name="mail.send")\ndef send(letters):\n    return letters'): (
                "mail.send(5) returned 5"
            ),
            "%%writefile scratch/office/office.py\nfrom celery import Celery\n\n"
            'app = Celery("mail", include=["mail"])\n': "office.opening_hours is missing",
            _app("import mail\n\napp = Celery('office')"): "ended before it was ready",
        },
        right=(
            _app('app = Celery("office")\napp.conf.imports = ("mail",)'),
            _app('app = Celery("office")', "\n\nimport mail  # noqa\n"),
            _app('app = Celery("office")\napp.autodiscover_tasks(["mail"])'),
        ),
    ),
}

QUIZ = {
    "03d-1": Question(
        right="a",
        wrong={
            "b": "a message contains the name and the arguments of the task, but no code.",
            "c": "Python reads a module's file once per process, when the module is imported.",
            "d": "that was `--autoreload`, and Celery no longer has this option.",
        },
    ),
    "03d-2": Question(
        right="c",
        wrong={
            "a": "an old worker doesn't know the argument, so until it is replaced these tasks fail.",
            "b": "a message from before may still wait in the queue. Without a default, a new worker would fail on it.",
            "d": "a message contains the name and the arguments of the task, and no code.",
        },
    ),
    "03d-3": Question(
        right="d",
        wrong={
            "a": "`app.conf` accepts every name, like a dictionary.",
            "b": "a worker doesn't compare the names of your settings with anything at its start.",
            "c": "the worker doesn't know that this name should mean something.",
        },
    ),
}
