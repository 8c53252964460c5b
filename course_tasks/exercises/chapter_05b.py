"""The exercises of chapter 05b."""

from collections.abc import Callable

from celery.result import AsyncResult

from course_tasks.exercises import Exercise, Question, called

COMMANDS = {
    "celery -A shop worker -P gevent -c 10": True,
    "celery -A shop worker --pool gevent": True,
    "celery -A shop worker --pool=gevent --concurrency=10": True,
    "celery -A shop worker -Pgevent -c 10": False,
    "celery -A shop worker --pool=prefork -n gevent@%h": False,
    "celery -A shop worker": False,
}


def _ended(answer: AsyncResult) -> str | None:
    try:
        value = answer.get(timeout=10, propagate=False)
    except Exception as error:
        return f"nothing is known of it: {type(error).__name__}: {error}. Does a worker take from that queue?"
    if answer.state == "SUCCESS":
        return f"it ran to its end, and returned {value!r}: that pool did not keep to the limit, or it was too long."
    if answer.state == "REVOKED":
        return "you revoked it. Let the worker end it by itself."
    if type(value).__name__ not in ("TimeLimitExceeded", "SoftTimeLimitExceeded"):
        return f"it failed for another reason: {type(value).__name__}: {value}."
    return None


def _patched(answer: Callable) -> str | None:
    for command, right in COMMANDS.items():
        said = called(answer, command, case=f"for {command!r}, ")
        if said is not right:
            return f"it says {said!r} of {command!r}. Celery {'patches' if right else 'does not patch'} there."
    return None


SEND = 'answer = client.send_task("nap", args=({},), queue="{}", {})'

EXERCISES = {
    "05b-1": Exercise(
        kind=AsyncResult,
        judge=_ended,
        wrong={
            SEND.format(3, "threads", "time_limit=1"): "it ran to its end",
            SEND.format(3, "prefork", "timelimit=1"): "returned 'finished'",
            SEND.format(9, "prefork", "")
            + "\nwait_until(lambda: answer.state == 'STARTED')\nanswer.revoke(terminate=True)": "you revoked it",
            SEND.format("'3'", "prefork", "time_limit=1"): "it failed for another reason",
        },
    ),
    "05b-2": Exercise(
        kind=Callable,
        judge=_patched,
        wrong={
            "answer = lambda command: 'gevent' in command": "worker -Pgevent -c 10'. Celery does not",
            "answer = lambda command: '-P gevent' in command": "--pool gevent'. Celery patches there",
            "answer = lambda command: '-P gevent' in command or '--pool gevent' in command": "--pool=gevent",
            "answer = True": "should be a function",
        },
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
        right="d",
        wrong={
            "a": "tasks share a global variable if they run in one process, as with threads or gevent.",
            "b": "with prefork, the main process runs no tasks, so its own dictionary stays empty.",
            "c": "a child runs many tasks one after the other, and it keeps its variables in between.",
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
