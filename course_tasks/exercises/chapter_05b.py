"""The exercises and the quiz of chapter 05b."""

import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from celery import Celery, _find_option_with_arg
from celery.exceptions import TimeoutError
from celery.states import READY_STATES

from course_tasks.exercises import Exercise, Question, WrongAnswer, called
from course_tasks.exercises.project import Project

QUEUES = ("prefork", "threads", "gevent", "solo")  # of the chapter's workers
LIMITS = ("time_limit", "soft_time_limit")
LASTS, ALLOWED = 1.8, 1  # seconds

COMMANDS = (
    "-P gevent -c 10",
    "--pool gevent",
    "--loglevel=INFO --pool=gevent --concurrency=10",
    "-Pgevent -c 10",
    "-P prefork -P gevent",
    "--pool=threads --pool=gevent",
    "-P gevent --pool=prefork",
    "--pool=prefork -n gevent@%h",
    "-Q gevent -P threads",
    "-n -Pgevent@%h",
    "-c 4",
)


def _ended(answer: dict) -> str | None:
    if answer.get("queue") not in QUEUES:
        return f"no worker of this chapter reads the queue {answer.get('queue', 'celery')!r}."
    if odd := [limit for name in LIMITS if not isinstance(limit := answer.get(name) or 0, int | float)]:
        return f"a limit is a number of seconds, and this is {odd[0]!r}."
    limits = [limit for name in LIMITS if (limit := answer.get(name))]
    if not limits:
        return "your options have no time limit (0 counts as none), or its name is misspelt."
    if min(limits) > ALLOWED:
        return f"{min(limits):g} s is too long. The worker should end it after at most {ALLOWED} s."
    value, state = _run(answer)
    if state == "SUCCESS":
        return f"the worker with {answer['queue']} ran it to its end. Its pool doesn't obey that limit."
    if type(value).__name__ not in ("TimeLimitExceeded", "SoftTimeLimitExceeded"):
        return f"it was not ended by a limit. It failed with {type(value).__name__}: {value}."
    limit = answer.get("time_limit" if type(value).__name__ == "TimeLimitExceeded" else "soft_time_limit") or 0
    if limit > ALLOWED:
        return f"the worker ended it, but only after {limit:g} s, and it should after at most {ALLOWED} s."
    return None


def _run(options: dict) -> tuple[Any, str]:
    """What became of a task that was sent with these options."""
    client = Celery(set_as_current=False)
    try:
        result = client.send_task("wait", args=(LASTS,), **options)
        try:
            return result.get(timeout=20, propagate=False), result.state
        finally:
            result.forget()
    except TimeoutError:
        raise WrongAnswer("nobody has run it within 20 s. Does the worker run?") from None
    except Exception as error:
        raise WrongAnswer(f"send_task refused these options: {type(error).__name__}: {error}.") from error
    finally:
        client.close()


def _patched(answer: Callable) -> str | None:
    for options in COMMANDS:
        words = f"celery -A shop worker {options}".split()
        said, right = called(answer, [*words], case=f"for the options {options}, "), _celery_patches(words)
        if not isinstance(said, bool):
            return f"for the options {options} it returns {said!r}. It should return True or False."
        if said != right:
            return (
                f"for the options {options} it returns {said}. Celery {'patches' if right else 'does not patch'} there."
            )
    return None


def _celery_patches(words: list[str]) -> bool:
    """What Celery itself finds in a command, before it reads its options."""
    try:
        return _find_option_with_arg(words, ["-P"], ["--pool"]) == "gevent"
    except KeyError:
        return False


QUESTIONS, SECONDS = 4, 0.3


def _at_once(folder: str) -> str | None:
    with Project(folder) as project:
        client = project.client()
        start = time.monotonic()
        project.worker("sh start.sh")
        slow = "the worker said that it is ready, but it doesn't run the tasks in time."
        patience = (time.monotonic() - start) / 2  # a task of no seconds takes a small part of what a start takes
        if not _answers(client, _ask(client, 1, seconds=0), patience):
            return slow
        if not (answers := _answers(client, _ask(client, QUESTIONS, SECONDS), timeout=20)):
            return slow
        if {answer["result"] for answer in answers} != {"in stock"}:
            return f"the tasks return {answers[0]['result']!r}, and no longer 'in stock'."
        ends = sorted(map(_end, answers))
        if len(answers) == QUESTIONS and ends[-1] - ends[0] < 0.9 * SECONDS:
            return None
        return "they were not asked at the same time: some had to wait until others were answered."


def _end(answer: dict) -> float:
    """When the task was done, in seconds since 1970."""
    return datetime.fromisoformat(answer["date_done"]).timestamp()


def _ask(client: Celery, count: int, seconds: float) -> list[str]:
    """Send so many questions; the ids. AsyncResults would look for the project's servers when these are gone."""
    return [client.send_task("ask", args=(seconds,)).id for _ in range(count)]


def _answers(client: Celery, ids: list[str], timeout: float) -> list[dict] | None:
    """What the backend has of these questions; None if there is no answer in time.

    If one of them is missing when the first answer is old enough, only those that are there.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        now = time.time()
        records = [client.backend.get_task_meta(task_id) for task_id in ids]
        answers = [record for record in records if record["status"] in READY_STATES]
        if len(answers) == len(ids) or (answers and min(map(_end, answers)) < now - SECONDS):
            return answers
        time.sleep(0.02)
    return None


def _start(options: str) -> str:
    """A cell that writes start.sh."""
    command = f"celery -A stock worker --loglevel=INFO --without-mingle {options}"
    return f"%%writefile scratch/stock/start.sh\nexec {command}\n"


WORDS = "def answer(words):\n    return {}"

EXERCISES = {
    "05b-1": Exercise(
        kind=dict,
        judge=_ended,
        wrong={
            'answer = {"queue": "threads", "time_limit": 1}': "with threads ran it to its end. Its pool doesn't obey",
            'answer = {"queue": "gevent", "soft_time_limit": 1}': "with gevent ran it to its end",
            'answer = {"queue": "solo", "time_limit": 0.8, "soft_time_limit": 0.5}': "with solo ran it",
            'answer = {"queue": "prefork", "timelimit": 1}': "or its name is misspelt",
            'answer = {"queue": "prefork", "time_limit": 0}': "(0 counts as none)",
            'answer = {"queue": "prefork", "soft_time_limit": "1"}': "a number of seconds, and this is '1'",
            # gevent ignores the soft limit
            'answer = {"queue": "gevent", "time_limit": 1.4, "soft_time_limit": 1}': "only after 1.4 s",
            'answer = {"queue": "prefork", "time_limit": 30}': "30 s is too long",
            'answer = {"time_limit": 1}': "reads the queue 'celery'",
            'answer = ("prefork", 1)': "should be a dictionary",
        },
        right=(
            'answer = {"queue": "gevent", "time_limit": 0.7}',
            'answer = dict(queue="prefork", soft_time_limit=1, time_limit=60)',
        ),
    ),
    "05b-2": Exercise(
        kind=Callable,
        judge=_patched,
        wrong={
            WORDS.format("'gevent' in words"): "--pool=gevent --concurrency=10 it returns False",
            WORDS.format("any('gevent' in word for word in words)"): "-Pgevent -c 10 it returns True",
            WORDS.format("'-P gevent' in ' '.join(words)"): "--pool gevent it returns False",
            WORDS.format(
                "any(form in ' '.join(words) for form in ('-P gevent', '--pool gevent', '--pool=gevent'))"
            ): "-P prefork -P gevent it returns True",
            "import re\n\n" + WORDS.format("re.search('(-P |--pool[ =])gevent', ' '.join(words))"): (
                "It should return True or False"
            ),
            WORDS.format("words[words.index('-P') + 1] == 'gevent'"): "your function raised ValueError",
            "answer = True": "should be a function",
        },
        right=(
            "import re\n\n"
            "def answer(words):\n"
            "    found = re.search(r'(?m)^(?:-P\\n|--pool\\n|--pool=)(.*)$', '\\n'.join(words))\n"
            "    return bool(found) and found[1] == 'gevent'",
            "def answer(words):\n"
            "    match words:\n"
            "        case ['-P' | '--pool', pool, *_]:\n"
            "            return pool == 'gevent'\n"
            "        case [word, *more]:\n"
            "            return word == '--pool=gevent' if word.startswith('--pool=') else answer(more)\n"
            "    return False",
        ),
    ),
    "05b-3": Exercise(
        kind=str,
        judge=_at_once,
        project="scratch/stock",
        wrong={
            _start("--pool=gevent --concurrency=100"): "they were not asked at the same time",
            _start("--pool=prefork --concurrency=2"): "some had to wait",
            _start("--pool=solo --concurrency=20"): "until others were answered",
            _start("-Pgevent --concurrency=20"): "it doesn't run the tasks in time",
            _start("--pool=thread --concurrency=20"): "ended before it was ready",
        },
        right=(
            _start("-Pthreads -c 4"),
            _start("-c 5 --pool=processes"),
        ),
    ),
}

QUIZ = {
    "05b-1": Question(
        right="b",
        wrong={
            "a": "prefork does that by ending a child process. Nobody can end a thread from outside.",
            "c": "`soft_time_limit` does that, and it needs prefork.",
            "d": "a worker doesn't check whether its pool can do what a message asks for.",
        },
    ),
    "05b-2": Question(
        right=(
            "-P gevent",
            "--pool=gevent",
            "--pool gevent",
            '-P "gevent"',
            '--pool="gevent"',
            "celery -A shop worker -P gevent -c 10 -Q mails",
            "celery -A shop worker --pool=gevent -c 10 -Q mails",
            "celery -A shop worker --pool gevent -c 10 -Q mails",
        ),
        wrong={
            "-Pgevent": "the option is written like this now, and Celery doesn't find it in time.",
            "-P=gevent": (
                "a short option takes no `=`. Celery would look for a pool called `=gevent` and refuse to start."
            ),
            "-P": "write the whole option, with the name of the pool.",
            "--pool": "write the whole option, with the name of the pool.",
            "gevent": "this is only the name of the pool. Write the option as well.",
            "-c 10": "this option is fine: it gives the worker ten slots.",
            "-c10": "`-c 10` was fine already. Another option is the problem.",
            "--concurrency=10": "`-c 10` was fine already. Another option is the problem.",
            "-Q mails": "this option is fine: it names the queue.",
            "--pool=threads": "tasks would run, but the worker should keep its pool.",
            "-P threads": "tasks would run, but the worker should keep its pool.",
            "--pool=prefork": "tasks would run, but the worker should keep its pool.",
            "-P prefork": "tasks would run, but the worker should keep its pool.",
        },
        otherwise=(
            "answer with the option that names the pool, in a form that Celery finds before it reads its options."
        ),
        case=True,
    ),
    "05b-3": Question(
        right="b",
        wrong={
            "a": "this works only if the driver lets other greenlets run while it waits, and nobody knows that.",
            "c": "a solo worker has one slot, so the thirty tasks would wait one after the other.",
        },
    ),
    "05b-4": Question(
        right="a",
        wrong={
            "b": "this is true of prefork. A solo worker has no process besides the main one.",
            "c": "the probe gives up long before that, and then it counts as failed.",
            "d": "a solo worker doesn't interrupt a task to do something else.",
        },
    ),
}
