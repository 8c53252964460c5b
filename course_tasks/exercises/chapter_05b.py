"""The exercises of chapter 05b."""

from collections.abc import Callable

from celery.result import AsyncResult

from course_tasks.exercises import Exercise, called

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
