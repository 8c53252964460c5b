"""The exercises and the quiz of chapter 04b."""

from collections.abc import Callable

from celery.exceptions import NotRegistered, TimeoutError
from celery.result import AsyncResult, ResultSet

from course_tasks.exercises import Exercise, Question, called, published, sent
from course_tasks.spans import FIELDS, at_once


def _gathered(answer: Callable) -> str | None:
    given = [0.4, 0.3, "soon", 0.2]
    with published() as calls:
        value = called(answer, given, case=f"for {given}, ")
    if isinstance(value, ResultSet):
        return "it returned what the group returned. Ask that for the results, with get(timeout=10, propagate=False)."
    if not isinstance(value, list | tuple):
        return f"it returned {value!r}. It should return the list of all results."
    if any(isinstance(each, AsyncResult) for each in value):
        return "it returned AsyncResults. Ask each of them for its result, with get(timeout=10, propagate=False)."
    if len(value) != len(given):
        return f"it returned {len(value)} values for {len(given)} arguments. A task that fails has its place too."
    if not isinstance(value[2], Exception):
        return f"the third task can't wait for 'soon', and in its place you have {value[2]!r}, not the exception."
    spans = [each for each in value if isinstance(each, dict) and each.keys() >= FIELDS]
    if [each["seconds"] for each in spans] != [0.4, 0.3, 0.2]:
        return "these are not the results of the tasks in the order of the arguments."
    if [call.task for call in calls].count("wait") != len(given):
        return f"it has sent {len(calls)} tasks. It should send {len(given)}, one `wait` for each argument."
    if at_once(spans) < 2:  # type: ignore[arg-type]
        return "the tasks ran one after the other, because you waited for each of them before you sent the next one."
    return None


def _chained(answer: AsyncResult) -> str | None:
    try:
        value = answer.get(timeout=5)
    except NotRegistered as error:
        return f"no worker knows a task called {error}. It is called 'add'."
    except TimeoutError:
        return "nothing came back within 5 s. Is the worker running? Run its cell again."
    except Exception as error:
        return f"it ended with {type(error).__name__}: {error}."
    if value != 10:
        return f"its result is {value!r}, and it should be 10."
    links = [answer]
    while (before := links[-1].parent) is not None:
        links.append(before)
    if len(links) == 1 and not sent(answer.id):
        return "this AsyncResult doesn't know which calls came before it. Put what delay() returned into answer."
    if len(links) == 1:
        return "its result is 10, but it has no parent: it is one call. Join three with |, and send the chain."
    if len(links) != 3:
        return f"its result is 10, by a chain of {len(links)} calls. It should be three calls."
    first = sent(links[-1].id)
    passed_on = first and all(call["task"] == "add" and not call["immutable"] for call in first.chain)
    if first and not (first.task == "add" and passed_on):
        return (
            "its result is 10, but the calls don't pass their results on. Each call of add should use the one before."
        )
    return None


EXERCISES = {
    "04b-1": Exercise(
        kind=Callable,
        judge=_gathered,
        wrong={
            'answer = lambda given: group(client.signature("wait", args=(one,)) for one in given).delay()': (
                "it returned what the group returned"
            ),
            'answer = lambda given: [client.send_task("wait", args=(one,)) for one in given]': "returned AsyncResults",
            'answer = lambda given: [client.send_task("wait", args=(one,)).get(timeout=10, propagate=False)'
            " for one in given]": "ran one after the other",
            "def answer(given):\n"
            '    sent = [client.send_task("wait", args=(one,)) for one in given]\n'
            "    return [result.get(timeout=10) for result in sent]": "your function raised TypeError",
            "def answer(given):\n"
            '    results = group(client.signature("wait", args=(one,)) for one in given).delay()\n'
            "    return results.get(timeout=10, propagate=False)[::-1]": ("not the exception"),
            "def answer(given):\n"
            '    sent = [client.send_task("wait", args=(one,)) for one in given if one != "soon"]\n'
            "    return [result.get(timeout=10) for result in sent]": "3 values for 4 arguments",
            "answer = lambda given: [{'seconds': one} for one in given]": "the third task can't wait",
            "def answer(given):\n"
            "    made_up = dict(pid=1, thread='Thread-1', start=1.0, end=2.0, delayed=0.0)\n"
            "    return [ValueError(one) if one == 'soon' else {**made_up, 'seconds': one} for one in given]": (
                "it has sent 0 tasks"
            ),
        },
        right=(
            "def answer(given):\n"
            '    sent = [client.send_task("wait", kwargs={"seconds": one}) for one in given]\n'
            "    return tuple(result.get(timeout=10, propagate=False) for result in sent)",
            "def answer(given):\n"
            '    sent = {one: client.send_task("wait", args=(one,)) for one in given}\n'
            "    for result in sent.values():\n"
            "        result.wait(timeout=10, propagate=False)\n"
            "    return [sent[one].result for one in given]",
        ),
    ),
    "04b-2": Exercise(
        kind=AsyncResult,
        judge=_chained,
        wrong={
            'answer = client.send_task("add", args=(3 + 3, 4))': "it has no parent",
            'answer = (client.signature("add", args=(3, 3)) | client.signature("add", args=(4,))).delay()': (
                "by a chain of 2 calls"
            ),
            'answer = (client.signature("add", args=(1, 2)) | client.signature("add", args=(3,))).delay()': (
                "its result is 6"
            ),
            'answer = (client.signature("add", args=(1, 2)) | client.signature("add", args=(3, 4))).delay()': (
                "it ended with TypeError"
            ),
            'answer = group(client.signature("add", args=(1, n)) for n in (2, 3, 4)).delay()': "be an AsyncResult",
            'calls = [client.signature("add", args=pair, immutable=True) for pair in ((1, 2), (3, 3), (6, 4))]\n'
            "answer = (calls[0] | calls[1] | calls[2]).delay()": "don't pass their results on",
            'chain = client.signature("add", args=(1, 2)) | client.signature("add", args=(3,))\n'
            'answer = client.AsyncResult((chain | client.signature("add", args=(4,))).delay().id)': (
                "doesn't know which calls came before it"
            ),
        },
        right=(
            "from celery import chain\n\nfrom course_tasks.tasks import add\n\n"
            "answer = chain(add.s(1, 2), add.s(3), add.s(4)).apply_async()",
            'numbers = [client.signature("add", args=(n,)) for n in (2, 3, 4)]\n'
            "answer = (numbers[0].clone(args=(1,)) | numbers[1] | numbers[2]).apply_async(countdown=0.1)",
        ),
    ),
}

QUIZ = {
    "04b-1": Question(
        right="c",
        wrong={
            "a": (
                "a message leaves the queue before its task runs, so an empty queue doesn't tell you that anything "
                "is done."
            ),
            "b": "`send_task` has sent all of the messages already. The client could even stop now.",
            "d": "Redis doesn't look at the time in a message. It hands these messages out like any others.",
        },
    ),
    "04b-2": Question(
        right=("1", "one", "1 message", "one message"),
        wrong={
            "0": "something would have to look at `expires` first, and Redis doesn't do that.",
            "zero": "something would have to look at `expires` first, and Redis doesn't do that.",
            "none": "something would have to look at `expires` first, and Redis doesn't do that.",
            "60": "60 is the number of seconds. `llen` counts the messages in a queue.",
            "2": "`expires` adds no second message. One call of `send_task` sends one message.",
        },
        otherwise="answer with one number. `llen` counts the messages in a queue.",
    ),
    "04b-3": Question(
        right="b",
        wrong={
            "a": "`iter_native` works like that. This loop asks for one result after the other.",
            "c": "each `get` waits for its own task. It doesn't take the result of another one.",
            "d": "`get` gives up after 90 seconds, and the first task takes only 60.",
        },
    ),
    "04b-4": Question(
        right="a",
        wrong={
            "b": "a task keeps its slot until it ends, even if it only waits.",
            "c": "that error comes from a check, and `disable_sync_subtasks=False` switches the check off.",
            "d": "a worker doesn't know what its tasks are waiting for. This one keeps its ten slots.",
        },
    ),
}
