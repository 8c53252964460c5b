"""The exercises of chapter 05."""

from collections.abc import Callable

from course_tasks.exercises import Exercise, Question, called, unfit_spans
from course_tasks.spans import slots, speedup

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
    number, factor = len(slots(answer)), speedup(answer, delays=False)
    if factor >= 4:
        return None
    if number < 4:
        return f"they were {factor:.1f} times as fast, on {number} slot{'s' * (number > 1)}. Which pool has more slots?"
    return f"they were {factor:.1f} times as fast, on {number} slots. Send all of them before you wait for one."


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


RUN = 'answer = run_tasks(client, "{}", args=({},), count=8, queue="{}")'

EXERCISES = {
    "05-1": Exercise(
        kind=list,
        judge=_fast,
        wrong={
            RUN.format("wait", 0.5, "solo"): "on 1 slot.",
            RUN.format("wait", 0.5, "prefork"): "on 2 slots. Which",
            RUN.format("wait", 0.1, "gevent"): "8 tasks of [0.1] s",
            RUN.format("compute", 0.5, "gevent"): "on 1 slot. Which pool has more",
            'answer = [client.send_task("wait", args=(0.5,), queue="gevent") for _ in range(8)]\n'
            "for result in answer:\n"
            "    result.get(timeout=60)": ("not what the tasks return"),
        },
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
