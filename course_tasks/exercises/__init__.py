"""The exercises: a module a chapter, with what judges an answer and the wrong answers that it must refuse."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        kind: the type, or types, that an answer has to be of.
        judge: takes an answer of that type; returns why it is wrong, or None if it is right.
        wrong: plausible wrong answers as Python, put in the learner's place by the tests, each with a part of the
            reason that it must be given.
    """

    kind: type | tuple[type, ...]
    judge: Callable[[Any], str | None]
    wrong: dict[str, str]


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
        wanted = " or ".join(kind.__name__ for kind in kinds)
        return f"✘ {exercise}: the answer is to be of type {wanted}, and this one is of type {type(answer).__name__}."
    reason = found.judge(answer)
    return f"✘ {exercise}: {reason}" if reason else f"✔ {exercise}: right."
