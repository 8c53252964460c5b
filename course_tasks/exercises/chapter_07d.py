"""The exercises of chapter 07d."""

from collections.abc import Callable
from contextvars import copy_context

from course_tasks.correlation import HEADER, correlation_id
from course_tasks.exercises import Exercise, Question, called

IMPORT = "from course_tasks.correlation import correlation_id, new_id\n"
NOT_IT = {
    "order": "order succeeded: it had only to send the others.",
    "charge": "charge succeeded, as its line says: Eve has paid, even.",
    "pack": "pack has no line: a chord's last task is not sent when another task has failed. Which one?",
}


def _failed(answer: tuple | list) -> str | None:
    if len(answer) != 2 or not all(isinstance(part, str) for part in answer):
        return "it takes two strings: a task's name, and the name of an exception's class."
    task, error = answer
    if task in NOT_IT:
        return NOT_IT[task]
    if task != "reserve":
        return f"the shop has no task {task!r}."
    if error == "ChordError":
        return "ChordError tells what became of the chord. Another line tells what the task itself raised."
    return None if error == "LookupError" else f"the task is right, but it did not raise {error!r}."


def _outgoing(answer: Callable) -> str | None:
    for current in ("eve-9", "ada-7", None):
        context = copy_context()
        context.run(correlation_id.set, current)
        said = called(context.run, answer)
        if not isinstance(said, dict):
            return f"it returns {type(said).__name__}, and should return a dictionary."
        found = {str(name).lower(): value for name, value in said.items()}
        if HEADER in found:
            return f"{HEADER} is the header of Celery's messages. What does a web service look for?"
        if current is None and found:
            return f"with no current request it returns {said}, and should return no header."
        if current and list(found) != ["x-request-id"]:
            return f"with the id {current!r} it returns {said}. The service looks for X-Request-ID, and for no other."
        if current and found["x-request-id"] != current:
            return f"with the id {current!r} it returns {said}: that is another trail."
    return None


EXERCISES = {
    "07d-1": Exercise(
        kind=(tuple, list),
        judge=_failed,
        wrong={
            'answer = ("pack", "LookupError")': "pack has no line",
            'answer = ("charge", "LookupError")': "charge succeeded",
            'answer = ("reserve", "ChordError")': "what became of the chord",
            'answer = ("reserve", "no lamp left")': "did not raise 'no lamp left'",
            'answer = [line for line in grep("eve-9") if " ERROR " in line]': "the shop has no task",
        },
    ),
    "07d-2": Exercise(
        kind=Callable,
        judge=_outgoing,
        wrong={
            f"{IMPORT}current = correlation_id.get()\n"
            "answer = lambda: {'X-Request-ID': current} if current else {}": "looks for X-Request-ID, and for no other",
            f'{IMPORT}answer = lambda: {{"X-Request-ID": correlation_id.get()}}': "should return no header",
            f'{IMPORT}answer = lambda: {{"X-Request-ID": new_id()}} if correlation_id.get() else {{}}': (
                "that is another trail"
            ),
            f"{IMPORT}answer = lambda: {{HEADER: correlation_id.get()}}": "the header of Celery's messages",
            'answer = {"X-Request-ID": "eve-9"}': "should be a function",
        },
    ),
}

QUIZ = {
    "07d-1": Question(
        right="d",
        wrong={
            "a": "the search looks for the id, and the id is the same on both machines.",
            "b": "the worker does log later, but `sort` knows only the times that it finds in the lines.",
            "c": "`sort` compares text, and the lines of both logs begin with a time in the same format.",
        },
    ),
    "07d-2": Question(
        right="b",
        wrong={
            "a": "the bracket would end the id's place in a line, and the rest would look like a message.",
            "c": "`new_id` accepts ASCII letters only, and `ë` isn't one.",
            "d": "a blank separates the parts of a line, so only a part of this id would be read as the id.",
        },
    ),
    "07d-3": Question(
        right="a",
        wrong={
            "b": "`ada-7` is a perfectly ordinary id. A pattern that refuses it would also refuse Ada's own request.",
            "c": "HTTPS protects a request on its way. The sender can still write any id into it.",
            "d": "a task sees only the id, and it is the same for both of them.",
        },
    ),
    "07d-4": Question(
        right=(
            "X-Request-ID",
            "the header X-Request-ID",
            "the X-Request-ID header",
            "X-Request-ID header",
            "X-Request-ID:",
        ),
        wrong={
            "request_correlation_id": "this is the header of Celery's messages. A web service looks for another one.",
            "correlation_id": "this is the name of the variable. Which header does the middleware `with_id` read?",
            "X-Correlation-ID": "other services use this name. Which header does the middleware `with_id` read?",
            "traceparent": "this is the header of OpenTelemetry. Which header does the middleware `with_id` read?",
            "HEADER": (
                "this is the name of a constant, for the header of Celery's messages. A web service looks for "
                "another one."
            ),
        },
        otherwise="look at the middleware `with_id`. Which header does it read?",
    ),
}
