"""The exercises: a module a chapter, with what judges an answer and the wrong answers that it must refuse."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What a learner calls the types of answers.
WORDS = {
    "AsyncResult": "a receipt (an AsyncResult)",
    "Callable": "a function",
    "NoneType": "None",
    "Task": "a task",
    "dict": "a dictionary",
    "float": "a number",
    "function": "a function",
    "int": "a whole number",
    "list": "a list",
    "str": "a text",
}


class WrongAnswer(Exception):
    """Says why an answer is wrong: `str(error)` is the reason."""


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        kind: the type, or a tuple of types, that an answer should have.
        judge: takes an answer of that type. Returns why it is wrong (or raises WrongAnswer), or None if it is right.
        wrong: plausible wrong answers as Python, put in the learner's place by the tests, each with a part of the
            reason that it must be given.
    """

    kind: Any
    judge: Callable[[Any], str | None]
    wrong: dict[str, str]


def called(answer: Callable, *args: Any, case: str = "") -> Any:
    """Call a learner's function.

    Args:
        answer: the function.
        args: its arguments.
        case: what the call is about, for the reason, such as "for 8 tasks on 4 slots ".

    Returns:
        What the function returns.

    Raises:
        WrongAnswer: the function raised something, even if that would end a program (SystemExit).
        KeyboardInterrupt: the learner interrupted it.
    """
    try:
        return answer(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise WrongAnswer(f"{case}your function raised {type(error).__name__}: {error}.") from error


def all_of(chapter: str) -> dict[str, Exercise]:
    """The exercises of a chapter ("00") by their names ("00-1"); none if there is no such chapter."""
    name = f"{__name__}.chapter_{chapter}"
    return importlib.import_module(name).EXERCISES if importlib.util.find_spec(name) else {}


def check(exercise: str, answer: Any) -> None:
    """Print whether the answer is still to do, wrong (and why), or right. Never raises."""
    try:
        print(_verdict(exercise, answer))
    except Exception as error:  # a learner's object may do anything when it is looked at
        print(f"✘ {exercise}: your answer could not be judged: {type(error).__name__}: {error}")


def _verdict(exercise: str, answer: Any) -> str:
    found = all_of(str(exercise).partition("-")[0]).get(exercise)
    if found is None:
        return f"There is no exercise {exercise!r}: the name in the course's own cell has to stay as it was."
    if answer is ...:
        return f"☐ {exercise}: still to do. Put your answer in place of the dots (...), and run both cells again."
    if not isinstance(answer, found.kind):
        kinds = found.kind if isinstance(found.kind, tuple) else (found.kind,)
        wanted = " or ".join(map(_in_words, kinds))
        return f"✘ {exercise}: the answer should be {wanted}, and this is {_in_words(type(answer))}."
    try:
        reason = found.judge(answer)
    except WrongAnswer as error:
        reason = str(error)
    return f"✘ {exercise}: {reason}" if reason else f"✔ {exercise}: right."


def _in_words(kind: Any) -> str:
    return WORDS.get(kind.__name__, f"an object of type {kind.__name__}")
