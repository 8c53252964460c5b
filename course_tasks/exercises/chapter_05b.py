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
ALLOWED = 2  # seconds

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
    value, state = _run(answer)
    if state == "SUCCESS":
        return f"the worker with {answer['queue']} ran it to its end: {_why(answer)}"
    if type(value).__name__ not in ("TimeLimitExceeded", "SoftTimeLimitExceeded"):
        return f"it was not ended by a limit. It failed with {type(value).__name__}: {value}."
    limit = answer.get("time_limit" if type(value).__name__ == "TimeLimitExceeded" else "soft_time_limit") or 0
    if limit > ALLOWED:
        return f"the worker ended it, but only after {limit:g} s, and it should after at most {ALLOWED} s."
    return None


def _run(options: dict) -> tuple[Any, str]:
    """What became of a task of three seconds that was sent with these options."""
    client = Celery(set_as_current=False)
    try:
        result = client.send_task("wait", args=(3,), **options)
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


def _why(options: dict) -> str:
    limits = [options[name] for name in LIMITS if options.get(name)]
    if not limits:
        return "your options have no time limit (0 counts as none), or its name is misspelt."
    return f"{min(limits):g} s is too long, or this pool doesn't obey that limit."


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


QUESTIONS, SECONDS = 4, 1.0


def _at_once(folder: str) -> str | None:
    with Project(folder) as project:
        project.worker("sh start.sh")
        client = project.client()
        slow = "the worker said that it is ready, but it doesn't run the tasks in time."
        if not _answers(client, count=1, seconds=0, timeout=5):  # a worker's first task may be slow
            return slow
        if not (answers := _answers(client, QUESTIONS, SECONDS, timeout=20)):
            return slow
        if {answer["result"] for answer in answers} != {"in stock"}:
            return f"the tasks return {answers[0]['result']!r}, and no longer 'in stock'."
        if _spread(answers) < 0.9 * SECONDS:  # else at least one of them began when another one had ended
            return None
        return f"they were not asked at the same time: an answer came {_spread(answers):.1f} s after the first one."


def _spread(answers: list[dict]) -> float:
    """The seconds from the first answer to the last one."""
    ends = sorted(datetime.fromisoformat(answer["date_done"]) for answer in answers)
    return (ends[-1] - ends[0]).total_seconds() if ends else 0.0


def _answers(client: Celery, count: int, seconds: float, timeout: float) -> list[dict] | None:
    """What the backend has of so many questions; None if they are not all answered in time.

    If they are clearly not asked at the same time, only the first answers.

    No AsyncResults are kept, because they would look for the project's servers when these are gone.
    """
    ids = [client.send_task("ask", args=(seconds,)).id for _ in range(count)]
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        records = [client.backend.get_task_meta(task_id) for task_id in ids]
        answers = [record for record in records if record["status"] in READY_STATES]
        if len(answers) == count or _spread(answers) > SECONDS:
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
            'answer = {"queue": "threads", "time_limit": 1}': "with threads ran it to its end: 1 s is too long, or",
            'answer = {"queue": "gevent", "soft_time_limit": 1}': "with gevent ran it to its end",
            'answer = {"queue": "solo", "time_limit": 2, "soft_time_limit": 1}': "with solo ran it",
            'answer = {"queue": "prefork", "timelimit": 1}': "or its name is misspelt",
            'answer = {"queue": "prefork", "time_limit": 0}': "(0 counts as none)",
            'answer = {"queue": "prefork", "soft_time_limit": "1"}': "a number of seconds, and this is '1'",
            # gevent ignores the soft limit
            'answer = {"queue": "gevent", "time_limit": 2.5, "soft_time_limit": 1}': "only after 2.5 s",
            'answer = {"queue": "prefork", "time_limit": 30}': "30 s is too long",
            'answer = {"time_limit": 1}': "reads the queue 'celery'",
            'answer = ("prefork", 1)': "should be a dictionary",
        },
        right=(
            'answer = {"queue": "gevent", "time_limit": 1.5}',
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
            _start("--pool=prefork --concurrency=2"): "answer came 1.",
            _start("--pool=solo --concurrency=20"): "at the same time: an answer came",
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
