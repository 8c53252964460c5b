"""The exercises and the quiz of chapter 05."""

import time
from collections.abc import Callable

from celery.exceptions import TimeoutError

from course_tasks.exercises import Exercise, Question, called, unfit_spans
from course_tasks.exercises.project import Project, answers
from course_tasks.spans import at_once

# What the task wait returns in each pool, and the pid of the worker's main process.
SEEN = {
    "solo": (70, 70, ["MainThread", "MainThread"]),
    "prefork": (70, 71, ["MainThread", "MainThread"]),
    "threads": (70, 70, ["ThreadPoolExecutor-0_0", "ThreadPoolExecutor-0_1"]),
    "gevent": (70, 70, ["Dummy-7", "Dummy-8"]),
    "eventlet": (70, 70, ["GreenThread-7", "GreenThread-8"]),
}


def _fast(answer: list) -> str | None:
    if reason := unfit_spans(answer, 8, 0.5):
        return reason
    together = at_once(answer)
    if together == 1:
        return "they ran one by one: either the pool has one slot, or you waited for each before you sent the next one."
    if together < 4:
        busy = "(If your pool has ten, the machine was busy: send them again.)"
        return f"at most {together} of them ran at the same time. Which pool has more slots? {busy}"
    return None


def _pool(answer: Callable) -> str | None:
    for name, (main, pid, threads) in SEEN.items():
        values = [
            {"pid": pid, "thread": thread, "start": 1.0, "end": 2.0, "delayed": 0.0, "seconds": 1.0}
            for thread in threads
        ]
        said = called(answer, main, values, case=f"for tasks of {name}, ")
        if said != name:
            where = "the main process" if pid == main else "another process"
            return f"it says {said!r} of tasks that ran in {where}, in threads called {threads}. That was {name}."
    return None


NUMBERS, FETCHES = 45_000_000, 4  # at least half a second of work for each photo


def _fetches_in_time(folder: str) -> str | None:
    with Project(folder) as project:
        workers = project.worker("python start.py")
        client = project.client()
        told = answers(client, "active_queues", workers)
        read = [queue["name"] for queues in told for queue in queues]
        for name, queue in (("thumbnail", "computing"), ("fetch", "waiting")):
            if len(told) == workers and queue not in read:
                return f"no worker reads the queue {queue!r}, so nobody runs a {name}."
            try:  # a worker's first task may be slow
                client.send_task(name, args=(0,), queue=queue).get(timeout=20)
            except TimeoutError:
                return f"no worker has run a {name} from the queue {queue!r} within 20 s."
        photos = [client.send_task("thumbnail", args=(NUMBERS,), queue="computing") for _ in range(8)]
        deadline = time.monotonic() + 20
        while project.log().count("Task thumbnail[") < 3 and time.monotonic() < deadline:  # one more has been received
            time.sleep(0.02)
        # several, because a worker that is free may take one while another worker stands still
        fetches = [client.send_task("fetch", args=(0.05,), queue="waiting") for _ in range(FETCHES)]
        deadline = time.monotonic() + 60
        waits = "while thumbnails are computed, a fetch still has to wait."
        while not all(fetch.ready() for fetch in fetches):
            if any(photo.ready() for photo in photos) or time.monotonic() > deadline:
                return waits
            time.sleep(0.02)
        last = max(fetch.date_done for fetch in fetches)
        if any(photo.ready() and photo.date_done < last for photo in photos):
            return waits
        if any({"waiting", "computing"} <= {queue["name"] for queue in queues} for queues in told):
            return "one of the workers reads both queues. When all its slots compute, a fetch that it has taken waits."
        return None


def _start(*workers: str) -> str:
    """A cell that writes start.py, for workers with these options."""
    lists = ",\n    ".join(
        f'subprocess.Popen("{COMMAND} {options} -n w{number}@%h".split())' for number, options in enumerate(workers)
    )
    return f"""%%writefile scratch/photos/start.py
import subprocess

workers = [
    {lists},
]
for worker in workers:
    worker.wait()
"""


COMMAND = "celery -A photos worker --loglevel=INFO --without-mingle"
RUN = 'answer = run_tasks(client, "{}", args=({},), count=8, queue="{}")'

EXERCISES = {
    "05-1": Exercise(
        kind=list,
        judge=_fast,
        wrong={
            RUN.format("wait", 0.5, "solo"): "they ran one by one",
            RUN.format("wait", 0.5, "prefork"): "at most 2 of them",
            RUN.format("wait", 0.1, "gevent"): "8 tasks of [0.1] s",
            RUN.format("compute", 0.5, "threads"): "Did you send `wait`",
            'made_up = {"pid": 1, "thread": "Dummy-1", "start": 1.0, "end": 1.5, "delayed": 0.0, "seconds": 0.5}\n'
            "answer = 8 * [made_up]": "no worker that is running now",
            "answer = []\n"
            "for _ in range(8):\n"
            '    answer += run_tasks(client, "wait", args=(0.5,), queue="threads")': "you waited for each",
            'answer = [client.send_task("wait", args=(0.5,), queue="gevent") for _ in range(8)]\n'
            "for result in answer:\n"
            "    result.get(timeout=60)": ("not what the tasks return"),
        },
        right=(
            'answer = [*run_tasks(client, "wait", (0.5,), 8, "threads")]',
            "from celery import group\n\n"
            'call = client.signature("wait", kwargs={"seconds": 0.5}, queue="eventlet")\n'
            "answer = group([call] * 8).apply_async().get(timeout=20)",
        ),
    ),
    "05-2": Exercise(
        kind=Callable,
        judge=_pool,
        wrong={
            "answer = lambda main, values: 'solo' if values[0]['thread'] == 'MainThread' else 'threads'": (
                "That was prefork"
            ),
            "answer = lambda main, values: 'prefork' if values[0]['pid'] != main else 'gevent'": "That was solo",
            "def answer(main, values):\n"
            "    if values[0]['pid'] != main:\n"
            "        return 'prefork'\n"
            "    return 'solo' if values[0]['thread'] == 'MainThread' else 'threads'": "That was gevent",
            "answer = 'prefork'": "should be a function",
        },
        right=(
            "from operator import itemgetter\n\n"
            "def answer(main, spans):\n"
            "    [pid], names = {*map(itemgetter('pid'), spans)}, ''.join(span['thread'] for span in spans)\n"
            "    kinds = {'Pool': 'threads', 'Dummy': 'gevent', 'Green': 'eventlet', '': 'solo'}\n"
            "    return next(kind for part, kind in kinds.items() if part in names) if pid == main else 'prefork'",
            "class Pool:\n"
            "    def __call__(self, main, spans):\n"
            "        match spans[-1]['thread'].rstrip('-_0123456789'), spans[-1]['pid'] == main:\n"
            "            case _, False:\n"
            "                return 'prefork'\n"
            "            case name, _:\n"
            "                names = {'MainThread': 'solo', 'Dummy': 'gevent', 'GreenThread': 'eventlet'}\n"
            "                return names.get(name, 'threads')\n"
            "answer = Pool()",
        ),
    ),
    "05-3": Exercise(
        kind=str,
        judge=_fetches_in_time,
        project="scratch/photos",
        wrong={
            _start("--pool=gevent -c 100 -Q waiting,computing"): "a fetch still has to wait",
            _start("--pool=prefork -c 2 -Q waiting,computing"): "still has to wait.",
            _start("--pool=solo -Q waiting,computing"): "while thumbnails are computed",
            _start("--pool=gevent -c 20 -Q waiting,computing", "--pool=gevent -c 20 -Q waiting"): "reads both queues",
            _start("--pool=gevent -c 20 -Q waiting"): "no worker reads the queue 'computing'",
            _start("--pool=gevents -c 20 -Q waiting"): "ended before it was ready",
        },
        right=(
            _start("--pool=solo -Q computing", "--pool=threads -c 5 -Q waiting"),
            _start("--pool=gevent -c 20 -Q waiting", "--pool=gevent -c 20 -Q computing"),
        ),
    ),
}

QUIZ = {
    "05-1": Question(
        right=("0", "zero", "none", "no", "no child processes", "no children", "0 child processes", "0 children"),
        wrong={
            "50": "50 is the number of slots. What is a slot of this pool?",
            "4": "the number of processors is the default, and you gave another number. What does that number count?",
            "1": "you counted the main process itself. The question is about its children.",
            "51": "this is the main process and 50 more. What does `--concurrency` count in this pool?",
        },
        otherwise="answer with one number. What does `--concurrency` count in this pool?",
    ),
    "05-2": Question(
        right="c",
        wrong={
            "a": "the additional threads share one interpreter with the others.",
            "b": "greenlets help when tasks wait, and these tasks compute.",
            "d": "at the moment, all tasks together use about as much as one processor can do.",
        },
    ),
    "05-3": Question(
        right="d",
        wrong={
            "a": (
                "without a number, prefork has one slot per processor. With two slots the tasks take about 200 seconds."
            ),
            "b": "solo ignores the number and runs one task at a time. That takes about 400 seconds.",
            "c": "greenlets are cheap, but two of them are only two slots. The tasks take about 200 seconds.",
        },
    ),
    "05-4": Question(
        right="b",
        wrong={
            "a": "all greenlets of a worker share one thread, so they can only take turns.",
            "c": "Python interrupts threads like that, but gevent doesn't interrupt a greenlet.",
            "d": "these tasks have started already, and a started task stays in its worker.",
        },
    ),
}
