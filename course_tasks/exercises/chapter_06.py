"""The exercises of chapter 06."""

import math
from collections.abc import Callable

from celery import Celery

from course_tasks.exercises import Exercise, Question, called, unfit_spans
from course_tasks.spans import slots

TASKS, ROUNDS, SECONDS = 24, 3, 0.3
NUMBERS = [(8, 4), (10, 10), (11, 10), (9, 2), (3, 8), (7, 3), (0, 4)]  # of tasks and slots


def _rounds(answer: Callable) -> str | None:
    for tasks, number in NUMBERS:
        said = called(answer, tasks, number, case=f"for {tasks} tasks on {number} slots, ")
        if said != (right := math.ceil(tasks / number)):
            return f"it says {said!r} for {tasks} tasks on {number} slots. They take {right}."
    return None


def _three(answer: list) -> str | None:
    if reason := unfit_spans(answer, TASKS, SECONDS):
        return reason
    number, fewest = max(len(slots(answer)), _slots_of_worker(answer)), math.ceil(TASKS / ROUNDS)
    if (took := math.ceil(TASKS / number)) != ROUNDS:
        return f"{TASKS} tasks on {number} slot{'s' * (number > 1)} took {took} rounds. Which slots make it {ROUNDS}?"
    return f"they took {ROUNDS} rounds, but on {number} slots. Fewer would do." if number > fewest else None


def _slots_of_worker(spans: list) -> int:
    """How many slots the worker says it has; 0 if it doesn't answer.

    On a busy machine a worker may be slow to start tasks. Then its spans use fewer slots than it has.
    """
    pids = {span["pid"] for span in spans}
    app = Celery(set_as_current=False)
    with app.connection_for_write() as connection:  # not the pool's, which would stay open
        for _ in range(3):  # it may not hear the first question in time
            for told in (app.control.inspect(timeout=1, connection=connection).stats() or {}).values():
                if pids <= {told["pid"], *told["pool"].get("processes", ())}:
                    return told["pool"]["max-concurrency"]
    return 0


RUN = 'answer = run_tasks(client, "wait", args=(0.3,), count={}, queue="{}")'

EXERCISES = {
    "06-1": Exercise(
        kind=Callable,
        judge=_rounds,
        wrong={
            "answer = lambda tasks, slots: tasks / slots": "it says 1.1 for 11 tasks",
            "answer = lambda tasks, slots: tasks // slots": "it says 1 for 11 tasks",
            "answer = lambda tasks, slots: tasks // slots + 1": "it says 3 for 8 tasks on 4",
            "answer = lambda tasks, slots: round(tasks / slots)": "it says 1 for 11 tasks on 10 slots. They",
            "answer = lambda tasks, slots: max(1, math.ceil(tasks / slots))": "it says 1 for 0 tasks",
            "answer = 3": "should be a function",
        },
    ),
    "06-2": Exercise(
        kind=list,
        judge=_three,
        wrong={
            RUN.format(24, "prefork"): "on 3 slots took 8 rounds",
            RUN.format(24, "gevent"): "on 10 slots. Fewer",
            RUN.format(8, "threads"): "these are 8 tasks",
            'answer = [client.send_task("wait", args=(0.3,), queue="threads") for _ in range(24)]\n'
            "for result in answer:\n"
            "    result.get(timeout=60)": "not what the tasks return",
        },
    ),
}

QUIZ = {
    "06-1": Question(
        right=("12", "12 s", "12 seconds", "about 12", "about 12 s", "about 12 seconds", "12.0", "twelve", "12 sec"),
        wrong={
            "10": "this is 100 / 30 * 3. A round can't be shorter than a task, even if some slots stay empty.",
            "9": "three rounds of 30 tasks are only 90 tasks.",
            "4": "you have the number of rounds. Now multiply by the length of a round.",
            "3": "that needs a slot for each of the 100 tasks.",
            "300": "one slot needs that long, and there are 30.",
        },
        otherwise="first find the number of rounds, and then multiply by the length of a round.",
    ),
    "06-2": Question(
        right="c",
        wrong={
            "a": "without a number, prefork would have two slots here as well.",
            "b": "`auto` counts processors too, and this machine has two.",
            "d": "the tasks wait for the network, so the processors have almost nothing to do.",
        },
    ),
    "06-3": Question(
        right="a",
        wrong={
            "b": "the machine still has four processors, and all of them were busy before.",
            "c": "the processes take turns, and that costs very little.",
            "d": "Celery makes as many children as you ask for.",
        },
    ),
    "06-4": Question(
        right="d",
        wrong={
            "a": "the number holds for each worker, and two workers are running.",
            "b": "a broker gives a message to any worker that asks. It doesn't know which tasks must not overlap.",
            "c": "several workers can read the same queue, and they often do that to get more done.",
        },
    ),
}
