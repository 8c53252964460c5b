"""The exercises and the quiz of chapter 06."""

import math
import time
from collections.abc import Callable

from celery import Celery

from course_tasks.exercises import Exercise, Question, called, unfit_spans
from course_tasks.exercises.project import Project, answers
from course_tasks.spans import at_once

TASKS, ROUNDS, SECONDS = 24, 3, 0.3
NUMBERS = [(8, 4), (10, 10), (11, 10), (9, 2), (3, 8), (7, 3), (10_001, 10_000), (0, 4)]  # of tasks and slots


def _rounds(answer: Callable) -> str | None:
    for tasks, number in NUMBERS:
        said = called(answer, tasks, number, case=f"for {tasks} tasks on {number} slots, ")
        right = math.ceil(tasks / number)
        if said != right or isinstance(said, bool):
            return f"it says {said!r} for {tasks} tasks on {number} slots. They take {right}."
    return None


def _three(answer: list) -> str | None:
    if reason := unfit_spans(answer, TASKS, SECONDS):
        return reason
    together, number = at_once(answer), _slots_of_worker(answer)
    if not number:
        return "no worker that is running now has run them. Is the worker still there? Send the tasks again."
    if together == 1:
        return "they ran one by one. Send all of them before you wait for the first result."
    number = max(together, number)
    if (took := math.ceil(TASKS / number)) != ROUNDS:
        return f"{TASKS} tasks on {number} slot{'s' * (number > 1)} took {took} rounds. Which slots make it {ROUNDS}?"
    if number > TASKS / ROUNDS:
        return f"they took {ROUNDS} rounds, but on {number} slots. Fewer would do."
    if 2 * together <= number:  # a busy machine may leave slots idle, but not half of them in each round
        return f"at most {together} of them ran at the same time, on {number} slots. Send all of them at once."
    return None


def _slots_of_worker(spans: list) -> int:
    """How many slots the worker says it has; 0 if it doesn't answer.

    On a busy machine a worker may be slow to start tasks. Then its spans use fewer slots than it has.
    """
    pids = {span["pid"] for span in spans}
    for told in _stats(Celery(set_as_current=False), lambda told: pids <= _pids(told)).values():
        if pids <= _pids(told):
            return told["pool"]["max-concurrency"]
    return 0


def _pids(told: dict) -> set[int]:
    return {told["pid"], *told["pool"].get("processes", ())}


def _stats(app: Celery, wanted: Callable[[dict], bool]) -> dict[str, dict]:
    """What all workers say about themselves. They are asked up to three times, until one says what is wanted."""
    found: dict[str, dict] = {}
    with app.connection_for_write() as connection:  # not the pool's, which would stay open
        for _ in range(3):  # a worker may not hear the first question in time
            found |= app.control.inspect(timeout=1, connection=connection).stats() or {}
            if any(map(wanted, found.values())):
                break
    return found


PAYMENTS, PAYING, CALLS = 10, 0.12, 4  # how many, seconds for each, how many at the same time


def _payments(folder: str) -> str | None:
    with Project(folder) as project:
        workers = project.worker("python start.py")
        client, deadline = project.client(), time.monotonic() + 20
        found = answers(client, "stats", workers)
        if workers < 2 or len(found) < 2:
            return f"two workers should be running, and {'only one is' if workers < 2 else 'not both answer'}."
        queues = answers(client, "active_queues", workers)
        if any("celery" not in [queue["name"] for queue in each] for each in queues):
            return "the payments are in the queue celery, and not both workers read it."
        if (slots := sum(map(_most_slots, found))) < CALLS:
            return f"the workers have only {slots} slots together. The bank allows {CALLS} calls at the same time."
        payments = [client.send_task("pay", args=(PAYING,)) for _ in range(PAYMENTS)]
        while not all(payment.ready() for payment in payments):
            if failed := [payment for payment in payments if payment.failed()]:
                return f"a payment failed: {failed[0].result}. How many slots do your workers have together?"
            if (calls := int(project.broker.get("open calls") or 0)) > CALLS:
                return f"there were {calls} calls at the same time. How many slots do your workers have together?"
            if time.monotonic() > deadline:
                return f"{PAYMENTS} payments were not done after 20 s. Which queues do the workers read?"
            time.sleep(0.01)
        if slots > CALLS:  # and the machine was too busy to use them
            return f"the bank allows {CALLS} calls at the same time. How many slots do your workers have together?"
        return None


def _most_slots(told: dict) -> int:
    return told["autoscaler"]["max"] if "autoscaler" in told else told["pool"]["max-concurrency"]


def _start(*workers: str) -> str:
    """A cell that writes start.py, for workers with these options."""
    commands = ",\n    ".join(
        f'"celery -A bank worker --loglevel=INFO --without-mingle {options}"' for options in workers
    )
    return f"""%%writefile scratch/bank/start.py
import subprocess

commands = [
    {commands},
]
workers = [subprocess.Popen(command.split()) for command in commands]
for worker in workers:
    worker.wait()
"""


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
            "answer = lambda tasks, slots: int(tasks / slots + 0.999)": "it says 1 for 10001 tasks",
            "answer = lambda tasks, slots: tasks > slots or math.ceil(tasks / slots)": "it says True for 8 tasks",
            "answer = 3": "should be a function",
        },
        right=(
            "answer = lambda tasks, slots: -(-tasks // slots)",
            "def answer(tasks, slots):\n    full, left = divmod(tasks, slots)\n    return full + (left > 0)",
            "class Rounds:\n"
            "    def __call__(self, tasks, slots):\n"
            "        return float(len(range(0, tasks, slots)))\n"
            "answer = Rounds()",
        ),
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
            "answer = []\n"
            "for _ in range(6):\n"
            '    answer += run_tasks(client, "wait", args=(0.3,), count=4, queue="threads")': (
                "at most 4 of them ran at the same time, on 8 slots"
            ),
            "answer = []\n"
            "for _ in range(24):\n"
            '    answer += run_tasks(client, "wait", args=(0.001,), queue="threads")\n'
            "for number, span in enumerate(answer):\n"
            "    span.update(seconds=0.3, start=number, end=number + 0.3)": "they ran one by one",
            "answer = [\n"
            '    {"pid": 1, "thread": n % 8, "start": n // 8, "end": n // 8 + 0.3, "delayed": 0, "seconds": 0.3}\n'
            "    for n in range(24)\n"
            "]": "no worker that is running now",
        },
        right=(
            "from celery import group\n\n"
            'call = client.signature("wait", kwargs={"seconds": 0.3}, queue="threads")\n'
            "answer = group([call] * 24).apply_async().get(timeout=20)",
            'sent = [client.send_task("wait", (0.3,), queue="threads") for _ in range(24)]\n'
            "answer = [result.get(timeout=20) for result in reversed(sent)]",
        ),
    ),
    "06-3": Exercise(
        kind=str,
        judge=_payments,
        project="scratch/bank",
        wrong={
            _start(
                "--pool=threads -c 3 -n one@%h", "--pool=threads -c 3 -n two@%h"
            ): "How many slots do your workers have together?",
            _start("--pool=threads -c 1 -n one@%h", "--pool=threads -c 1 -n two@%h"): "the workers have only 2 slots",
            _start("--pool=threads -c 4 -n one@%h"): "and only one is",
            _start("--pool=threads -n one@%h", "--pool=threads -n two@%h -Q others"): "not both workers read it",
            _start("--pool=thread -n one@%h"): "ended before it was ready",
        },
        right=(
            _start("--pool=threads -c 1 -n one@%h", "--pool=gevent -c 3 -n two@%h"),
            _start("--pool=prefork -n one@%h", "--pool=threads --autoscale=2,2 -n two@%h".replace("threads", "gevent")),
        ),
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
        right="d",
        wrong={
            "a": "the number holds for each worker, and two workers are running.",
            "b": "a broker gives a message to any worker that asks. It doesn't know which tasks must not overlap.",
            "c": "several workers can read the same queue, and they often do that to get more done.",
        },
    ),
}
