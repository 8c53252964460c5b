"""The exercises and quiz questions: a module a chapter, with what judges an answer and the wrong answers to refuse."""

import contextlib
import importlib.util
import json
import re
import signal
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from celery import signals

from course_tasks import copies, progress
from course_tasks.spans import FIELDS

DOTS = ("...", "…", "")  # an answer that the learner has not given yet, as a text
RENAMED = 'Change the name in this cell back to the course\'s own, such as "00-1".'
KEPT = 1000  # of the tasks that were sent
PATIENCE = 30  # seconds for a call of a learner's function; some wait for results on purpose
WRITEFILE = re.compile(r"(?s)%%writefile (\S+)\n(.*)")
WIDTH = 90  # letters in a line of an explanation: JupyterLab breaks longer lines in the middle of a word
# What a learner calls the types of answers.
WORDS = {
    "AsyncResult": "an AsyncResult (what send_task and delay return)",
    "Callable": "a function",
    "NoneType": "None",
    "Task": "a task",
    "dict": "a dictionary",
    "float": "a number",
    "frozenset": "a frozenset",
    "function": "a function",
    "generator": "a generator",
    "int": "a whole number",
    "list": "a list",
    "set": "a set",
    "str": "a text",
    "tuple": "a tuple",
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
        right: right answers that are written in an unusual way. The tests try them as well.
        project: for an exercise on a project with a mistake in it, the folder that the notebook's cells write it to.
            That folder is the answer, and each wrong or right one is the source of a cell that writes a file.
    """

    kind: Any
    judge: Callable[[Any], str | None]
    wrong: dict[str, str]
    right: tuple[str, ...] = ()
    project: str = ""


@dataclass(frozen=True)
class Question:
    """One question of a chapter's quiz: either with choices, or for a short text.

    The notebook has the question, and under it the folded answer with its explanation, which `quiz` prints.

    Attributes:
        right: the letter of the right choice; or, for a short text, all texts that are right.
        wrong: for each other choice, or for each wrong text that people are likely to give, why it is wrong.
        otherwise: what to say about any other text. Empty for a question with choices.
        case: whether capitals matter, as in an option of a command.
    """

    right: str | tuple[str, ...]
    wrong: dict[str, str]
    otherwise: str = ""
    case: bool = False

    def judge(self, answer: str) -> str | None:
        """Judge an answer. Blanks, quotes, brackets and a full stop around it make no difference.

        Args:
            answer: a letter or a short text.

        Returns:
            Why the answer is wrong, or None if it is right.
        """

        def plain(text: str) -> str:
            text = " ".join(text.strip(" \t\n.()`'\"").split())
            return text if self.case else text.casefold()

        given = plain(answer)
        if given in map(plain, (self.right,) if isinstance(self.right, str) else self.right):
            return None
        choices = ", ".join(sorted([str(self.right), *self.wrong]))
        otherwise = self.otherwise or f"{answer.strip()!r} is not one of the choices: {choices}."
        return {plain(wrong): reason for wrong, reason in self.wrong.items()}.get(given, otherwise)


@dataclass(frozen=True)
class Sent:
    """A task that this process has sent, as it was asked for.

    Attributes:
        task: its name.
        args: its arguments by position.
        kwargs: its arguments by name.
        chain: the calls that come after it in its chain, the next one last, each as a dictionary.
    """

    task: str
    args: tuple
    kwargs: dict[str, Any]
    chain: tuple[dict, ...] = ()


_sent: dict[str, Sent] = {}


@signals.before_task_publish.connect(weak=False)
def _note_sent(sender: str, body: tuple, headers: dict, **_: Any) -> None:
    if "id" in headers:
        _sent[headers["id"]] = _as_sent(sender, body)
        if len(_sent) > KEPT:
            del _sent[next(iter(_sent))]


def _as_sent(task: str, body: tuple) -> Sent:
    return Sent(task, tuple(body[0]), dict(body[1]), tuple(body[2].get("chain") or ()))


@contextlib.contextmanager
def published() -> Iterator[list[Sent]]:
    """What this process asks for in a `with` block: a list that grows with each task that is sent."""
    found: list[Sent] = []

    def note(sender: str, body: tuple, **_: Any) -> None:
        found.append(_as_sent(sender, body))

    signals.before_task_publish.connect(note, weak=False)
    try:
        yield found
    finally:
        signals.before_task_publish.disconnect(note)


def sent(task_id: str) -> Sent | None:
    """Look up what this process has sent, so that a judge can tell an answer from a made-up one.

    Args:
        task_id: the task's id.

    Returns:
        What was asked for; None if no task of that id is among the last 1000 that this process has sent.
    """
    return _sent.get(task_id)


def was_sent(task: str, *args: Any) -> bool:
    """Whether this process has sent a task with these arguments, by position or by name, of late.

    Args:
        task: the task's name.
        args: its arguments, in their order.
    """
    return any(each.task == task and [*each.args, *each.kwargs.values()] == [*args] for each in _sent.values())


def called(answer: Callable, *args: Any, case: str = "") -> Any:
    """Call a learner's function.

    Args:
        answer: the function.
        args: its arguments.
        case: what the call is about, for the reason, such as "for 8 tasks on 4 slots ".

    Returns:
        What the function returns.

    Raises:
        WrongAnswer: the function raised something, even if that would end a program (SystemExit), or it didn't end in
            30 seconds.
        KeyboardInterrupt: the learner interrupted it.
    """
    try:
        with _limited():
            return answer(*args)
    except KeyboardInterrupt:
        raise
    except _TooLong:
        raise WrongAnswer(f"{case}your function was still running after {PATIENCE} seconds.") from None
    except BaseException as error:
        raise WrongAnswer(f"{case}your function raised {type(error).__name__}: {error}.") from error


class _TooLong(BaseException):
    """Ends a function that takes too long."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """End the code in the `with` block after a while, where that is possible: in the main thread, as in a notebook."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1)  # and again each second, if the function catches everything
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def unfit_spans(answer: list, tasks: int, seconds: float) -> str | None:
    """Why a list is not what `tasks` tasks `wait` of `seconds` seconds returned in a running worker; None if it is."""
    if not all(isinstance(value, dict) and value.keys() >= FIELDS for value in answer):
        return "these are not what the tasks return. run_tasks collects that; a result has it after get()."
    if [value["seconds"] for value in answer] != [seconds] * tasks:
        asked = sorted({value["seconds"] for value in answer})
        return f"these are {len(answer)} tasks of {asked} s, not {tasks} of {seconds} s."
    if all(value["end"] - value["start"] > 3 * seconds for value in answer):  # and the machine can't be that busy
        return f"each of these took more than three times as long as the {seconds} s. Did you send `wait`?"
    if any(value["end"] - value["start"] < 0.98 * seconds for value in answer):  # the two clocks may differ a little
        return f"a task here was faster than the {seconds} s that it had to wait. Take what the tasks really return."
    if not all(map(_is_celery, {value["pid"] for value in answer})):
        return "no worker that is running now has run them. Is the worker still there? Send the tasks again."
    return None


def _is_celery(pid: int) -> bool:
    try:
        return "celery" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def all_of(chapter: str) -> dict[str, Exercise]:
    """The exercises of a chapter.

    Args:
        chapter: its number, "01b" for example.

    Returns:
        The exercises by their names ("01b-1"); none if there is no such chapter.
    """
    return _of_module(chapter, "EXERCISES")


def quiz_of(chapter: str) -> dict[str, Question]:
    """The quiz questions of a chapter.

    Args:
        chapter: its number, "01b" for example.

    Returns:
        The questions by their names ("01b-1"); none if the chapter has no quiz that takes answers.
    """
    return _of_module(chapter, "QUIZ")


def _of_module(chapter: str, what: str) -> dict:
    name = f"{__name__}.chapter_{chapter}"
    known = chapter.isalnum() and importlib.util.find_spec(name)  # with a dot in it, it would be a package
    return getattr(importlib.import_module(name), what, {}) if known else {}


def check(exercise: str, answer: Any) -> None:
    """Print whether the answer to an exercise is still to do, wrong (and why), or right; and remember it.

    Never raises.

    Args:
        exercise: the name in the course's own cell, "01b-1" for example.
        answer: the learner's answer, or dots.
    """
    try:
        print(_verdict(exercise, answer))
    except KeyboardInterrupt:
        print(
            f"☐ {exercise}: not judged, because you have interrupted it. If it ran for long, look for an endless loop."
        )
    except Exception as error:  # a learner's object may do anything when it is looked at
        print(f"❌ {exercise}: your answer could not be judged: {type(error).__name__}: {error}")


def quiz(question: str, answer: Any) -> None:
    """Print whether the answer to a quiz question is still to do, wrong (and why), or right; and remember it.

    Never raises. A right answer is explained.

    Args:
        question: the name in the course's own cell, "01b-1" for example.
        answer: the letter of a choice or a short text; or dots.
    """
    try:
        for line in _quiz_verdict(question, answer).splitlines():
            print(textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False))
    except Exception as error:
        print(f"❌ quiz {question}: your answer could not be judged: {type(error).__name__}: {error}")


def _verdict(exercise: str, answer: Any) -> str:
    chapter = str(exercise).partition("-")[0]
    found = all_of(chapter).get(exercise)
    if found is None:
        return f"There is no exercise {exercise!r}. {RENAMED}"
    if answer is ... or (type(answer) in (tuple, list) and answer and all(map(_is_dots, answer))):
        line = f"☐ {exercise}: still to do. Put your answer in place of the dots (...), and run both cells again."
        return line + _remember(chapter, "exercises", exercise, "open")[1]
    if found.project and _as_delivered(chapter, found.project):
        line = f"☐ {exercise}: still to do. Mend the project in {found.project}, and run this cell again."
        return line + _remember(chapter, "exercises", exercise, "open")[1]
    reason: str | None
    if not isinstance(answer, found.kind):
        kinds = found.kind if isinstance(found.kind, tuple) else (found.kind,)
        wanted = " or ".join(map(in_words, kinds))
        reason = f"the answer should be {wanted}, and this is {in_words(type(answer))}."
    else:
        try:
            reason = found.judge(answer)
        except WrongAnswer as error:
            reason = str(error)
    if reason:
        return f"❌ {exercise}: {reason}" + _remember(chapter, "exercises", exercise, "wrong")[1]
    states, notice = _remember(chapter, "exercises", exercise, "right")
    names = all_of(chapter)
    count = sum(states.get(name) == "right" for name in names)
    return f"✅ {exercise}: right. {count} of {len(names)} in this chapter.{notice}"


def _quiz_verdict(question: str, answer: Any) -> str:
    chapter = str(question).partition("-")[0]
    found = quiz_of(chapter).get(question)
    if found is None:
        return f"There is no quiz question {question!r}. {RENAMED}"
    if answer is ... or (isinstance(answer, str) and answer.strip() in DOTS):
        line = f"☐ quiz {question}: still to do. Put your answer in place of the dots, and run this cell again."
        return line + _remember(chapter, "quiz", question, "open")[1]
    if isinstance(answer, str):
        reason = found.judge(answer)
    else:
        reason = f'an answer is a text in quotes, such as "a". This is {in_words(type(answer))}.'
    if reason:
        return f"❌ quiz {question}: {_unmarked(reason)}" + _remember(chapter, "quiz", question, "wrong")[1]
    notice = _remember(chapter, "quiz", question, "right")[1]
    return f"✅ quiz {question}: right. {explanation(question)}".rstrip() + notice


def _is_dots(answer: Any) -> bool:
    return answer is ... or (isinstance(answer, str) and answer.strip() in DOTS[:2])


def _as_delivered(chapter: str, folder: str) -> bool:
    """Whether the files of a project are still what the course's notebook writes, or are not written yet."""
    notebook = json.loads(copies.chapters()[chapter].read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = [match for match in map(WRITEFILE.match, sources) if match and match[1].startswith(f"{folder}/")]
    files = {Path(match[1]): match[2] for match in found}
    return all(not path.exists() or path.read_text().strip() == text.strip() for path, text in files.items())


def _remember(chapter: str, kind: str, name: str, state: str) -> tuple[dict[str, str], str]:
    """Note the state of an answer; returns all states of that kind, and a further line if there was trouble."""
    states, trouble = progress.note(chapter, kind, name, state)
    return states[kind], f"\n{trouble}" if trouble else ""


def explanation(question: str) -> str:
    """What the chapter's folded answer says about a quiz question.

    Args:
        question: its name, "01b-1" for example.

    Returns:
        Plain text on one line, without the answer itself; empty if the notebook can't be read.
    """
    chapter, _, number = question.partition("-")
    try:
        notebook = json.loads(copies.chapters()[chapter].read_text(encoding="utf-8"))
        text = "\n\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
        summary = f"<summary>Answer to question {number}</summary>"
        [folded] = re.findall(rf"(?s)<details>{summary}\s+\*\*.*?\*\*\s+(.*?)\s+</details>", text)
    except Exception:  # whatever a learner has made of the notebook, the answer is right
        return ""
    return _unmarked(folded)


def _unmarked(text: str) -> str:
    """Markdown as plain text on one line."""
    unlinked = re.sub(r"\[([^\]]*)\]\([^)]*\)|</?\w[^>]*>", r"\1", text)
    return " ".join(re.sub(r"`|\*\*|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)", "", unlinked).split())


def in_words(kind: Any) -> str:
    """What a learner calls a type, with its article: "a list" for `list`, for example."""
    return WORDS.get(kind.__name__, f"an object of type {kind.__name__}")
