"""The exercises and the quiz of chapter 09."""

import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from celery import Celery, chain, group
from celery.canvas import Signature
from celery.exceptions import TimeoutError
from celery.result import AsyncResult, EagerResult, GroupResult

from course_tasks.exercises import Exercise, Question, called, published, sent
from course_tasks.exercises.project import Project

PRICES = {"bread": 3, "milk": 2, "cheese": 7}
BASKETS = ["bread", "milk", "bread"], ["cheese"]  # two runs of the program, at the same time


def _with_tax(answer: object) -> str | None:
    if isinstance(answer, Signature):
        return "this is a chain that is not sent. Send it with delay()."
    if isinstance(answer, EagerResult):
        return "apply() runs the calls here, without a worker. Send the chain with delay()."
    if isinstance(answer, GroupResult):
        return "this is the result of a group. Send one chain."
    if not isinstance(answer, AsyncResult):
        return f"the answer should be an AsyncResult, which delay() returns, and this is {answer!r}."
    links = _links(answer)
    if len(links) != 3:
        return f"this is a chain of {len(links)} calls. It should be three." if len(links) > 1 else _single(answer)
    try:
        values = [link.get(timeout=5) for link in links]
    except TimeoutError:
        return "nothing came back within 5 s. Is the worker running? Run its cell again."
    except Exception as error:
        return f"it ended with {type(error).__name__}: {error}."
    first = sent(links[0].id)
    rest = first.chain[::-1] if first else ()
    if first and (names := [first.task, *(call["task"] for call in rest)]) != ["price", "tax", "clean"]:
        return f"the calls are {', '.join(names)}. They should be price, tax, clean."
    if values != [7, 8.4, "clean"]:
        return f"the results are {values}. They should be [7, 8.4, 'clean']."
    if rest and rest[0]["immutable"]:
        return "you have written the price into the call of tax. It should come from the chain."
    return None


def _single(answer: AsyncResult) -> str:
    if sent(answer.id):
        return "this is one call. Join three of them to a chain."
    return "this AsyncResult doesn't know which calls came before it. Put what delay() returned into answer."


def _adds_up(answer: Callable) -> str | None:
    for basket, wanted in ((["bread", "milk", "cheese"], 14.4), (["milk"], 2.4), (["milk", "milk"], 4.8)):
        case = f"for {basket}, "
        with (
            published() as calls,
            mock.patch.object(AsyncResult, "get", autospec=True, side_effect=AsyncResult.get) as get,
        ):
            result = called(answer, list(basket), case=case)
        names = [call.task for call in calls]
        if isinstance(result, GroupResult) or not isinstance(result, AsyncResult):
            return f"{case}it returned {_kind(result)}. It should return the AsyncResult of the last call."
        if not names:
            return f"{case}it has sent nothing."
        if own := {"total", "tax"} & set(names):
            return (
                f"{case}your function has sent {' and '.join(sorted(own))} itself, so it had the prices already. "
                "Let the canvas start these calls."
            )
        if get.called:
            return f"{case}your function waits for a result. It should return the AsyncResult at once."
        try:
            value = result.get(timeout=5)
        except TimeoutError:
            return f"{case}nothing came back within 5 s. Is the worker running? Run its cell again."
        except Exception as error:
            return f"{case}the canvas ended with {type(error).__name__}: {error}."
        if not isinstance(value, int | float) or abs(value - wanted) > 1e-9:
            return f"{case}its result is {value!r}, and it should be {wanted}."
        if names.count("price") < len(basket):
            return f"{case}it didn't send all look-ups of prices at the same time."
    return None


def _kind(value) -> str:
    kinds = {GroupResult: "the results of a group", dict: "a call that is not sent"}
    return next((words for kind, words in kinds.items() if isinstance(value, kind)), repr(value))


def _lists_ids(answer: Callable) -> str | None:
    app = Celery(set_as_current=False)
    steps = [app.signature("step", args=(number,), immutable=True) for number in range(6)]
    cases = {
        "one call": (steps[0],),
        "a chain of three calls": steps[:3],
        "a chord": (group(steps[:3]), steps[3]),
        "a chain with a group in the middle": (steps[0], group(steps[1:4]), steps[4], steps[5]),
        "a group": (group(steps[:3]),),
        "a chain that ends with a group": (steps[0], steps[1], group(steps[2:4])),
    }
    try:
        for name, parts in cases.items():
            result = (chain(*parts, app=app) if len(parts) > 1 else parts[0].clone()).freeze()
            links = _links(result)
            wanted = [each.id for link in links for each in getattr(link, "results", [link])]
            case = f"for {name}, "
            value = called(answer, result, case=case)
            if not isinstance(value, list | tuple):
                return f"{case}it returned {value!r}. It should return a list of ids."
            if list(value) == wanted and all(isinstance(each, str) for each in value):
                continue
            groups = {link.id for link in links if isinstance(link, GroupResult)}
            if groups & {each for each in value if isinstance(each, str)}:
                return f"{case}the list has the id of the group, which is no task."
            if others := [each for each in value if not isinstance(each, str)]:
                return f"{case}the list should have nothing but ids, and it has {type(others[0]).__name__} in it."
            if sorted(map(str, value)) == sorted(wanted):
                return f"{case}these are the right ids in another order. The first task comes first."
            return f"{case}the list has {len(value)} ids of the {len(wanted)} tasks, or others."
    finally:
        app.close()
    return None


def _links(result: AsyncResult | GroupResult | None) -> list:
    """A result and those before it in its chain; the first one comes first."""
    return [*_links(result.parent), result] if result is not None else []


def _orders(folder: str) -> str | None:
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        project.worker("celery -A shop worker --pool=threads -c 4 --without-mingle --without-gossip")
        runs = [pool.submit(project.run, f"python order.py {' '.join(basket)}") for basket in BASKETS]
        for basket, run in zip(BASKETS, runs, strict=True):
            total = sum(PRICES[item] for item in basket)
            # what Python or Celery complain about at the program's end doesn't count
            printed = [line.strip() for line in run.result().splitlines() if line.startswith("total:")]
            if printed != [f"total: {total}"]:
                found = repr(printed[0]) if printed else "no line that begins with 'total:'"
                return f"for {' '.join(basket)} it printed {found}. It should print 'total: {total}'."
        log = project.settled_log()
    lookups = [line for line in log.splitlines() if "Task shop.price[" in line]
    if not lookups:
        return "the total is right, but no worker has looked up the prices."
    if sum("] received" in line for line in lookups) < sum(map(len, BASKETS)):
        return "the workers have looked up some of the prices only."
    if log.count("Task shop.total[") < 2 * len(BASKETS):  # received, and succeeded
        return "the workers look up the prices, but order.py still adds them up itself."
    other = [id for id, price in re.findall(r"\[(\S+)\] succeeded in \S+ (\d+)", log) if int(price) == PRICES["cheese"]]
    large = [line for line in lookups if not any(id in line for id in other)]
    if max(itertools.accumulate(1 if "] received" in line else -1 for line in large)) < len(BASKETS[0]):
        return "the workers look up one price after the other. Send all look-ups before you wait."
    return None


def _order(code: str) -> str:
    """A cell that writes order.py."""
    return f"""%%writefile scratch/basket/order.py
import sys

from celery import chain, chord, group
from shop import price, total

lookups = [price.s(item) for item in sys.argv[1:]]
{code}
"""


EXERCISES = {
    "09-1": Exercise(
        kind=object,
        judge=_with_tax,
        wrong={
            'answer = chain(price.s("cheese"), tax.s(20), clean.s()).delay()': "it ended with TypeError: clean()",
            'answer = chain(price.s("cheese"), tax.s(20)).delay()': "a chain of 2 calls",
            'answer = chain(price.s("cheese"), clean.si(), tax.s(20)).delay()': "it ended with TypeError",
            'answer = chain(price.s("cheese"), tax.si(7, 20), clean.si()).delay()': "written the price into the call",
            'answer = chain(price.s("milk"), tax.s(20), clean.si()).delay()': "the results are [2, 2.4, 'clean']",
            "answer = chain(echo.si(7), echo.si(8.4), clean.si()).delay()": "the calls are echo, echo, clean",
            "answer = clean.delay()": "this is one call",
            "answer = app.AsyncResult(chain(price.s('cheese'), tax.s(20), clean.si()).delay().id)": "doesn't know",
            'answer = group(price.s("cheese"), clean.si()).delay()': "the result of a group",
            'answer = price.s("cheese") | tax.s(20) | clean.si()': "not sent",
            'answer = chain(price.s("cheese"), tax.s(20), clean.si()).apply()': "runs the calls here",
            "answer = 8.4": "should be an AsyncResult",
        },
        right=(
            'answer = (price.si(item="cheese") | tax.s(percent=20) | clean.si()).apply_async()',
            "calls = [app.signature('price', args=('cheese',)), app.signature('tax', args=(20,))]\n"
            "answer = chain(calls + [app.signature('clean', immutable=True)])()",
        ),
    ),
    "09-2": Exercise(
        kind=Callable,
        judge=_adds_up,
        wrong={
            "answer = lambda basket: chain(group(price.s(item) for item in basket), total.s(), tax.s(20)).delay()": (
                "for ['milk'], the canvas ended with TypeError"
            ),
            "answer = lambda basket: chord([price.s(item) for item in basket], total.s()).delay()": "its result is 12",
            "def answer(basket):\n"
            "    prices = group(price.s(item) for item in basket)().get(timeout=5)\n"
            "    return chain(total.s(prices), tax.s(20)).delay()": "so it had the prices already",
            "answer = lambda basket: group(price.s(item) for item in basket).delay()": "the results of a group",
            "def answer(basket):\n"
            "    result = chord([price.s(item) for item in basket], total.s() | tax.s(20)).delay()\n"
            "    result.get(timeout=10)\n"
            "    return result": "your function waits for a result",
            "answer = lambda basket: chord([price.s(item) for item in basket], total.s() | tax.s(20))": (
                "a call that is not sent"
            ),
            "answer = lambda basket: sum(price(item) for item in basket) * 1.2": "it returned 14.",
            'answer = lambda basket: app.AsyncResult("made-up")': "it has sent nothing",
            "answer = lambda basket: chord([price.s(item) for item in basket], tax.s(20)).delay()": "TypeError",
            "answer = lambda basket: basket.nothing": "your function raised AttributeError",
        },
        right=(
            "answer = lambda basket: (group([price.s(item) for item in basket]) | total.s() | tax.s(20))()",
            "def answer(basket):\n"
            "    header = (app.signature('price', kwargs={'item': item}) for item in basket)\n"
            "    return chord(list(header))(chain(total.s(), tax.s(percent=20)))",
        ),
    ),
    "09-3": Exercise(
        kind=Callable,
        judge=_lists_ids,
        wrong={
            "answer = lambda result: [result.id]": "for a chain of three calls, the list has 1 ids of the 3 tasks",
            "def answer(result):\n"
            "    ids = []\n"
            "    while result is not None:\n"
            "        ids.append(result.id)\n"
            "        result = result.parent\n"
            "    return ids": "these are the right ids in another order",
            "def answer(result):\n"
            "    return ([] if result.parent is None else answer(result.parent)) + [result.id]": "the id of the group",
            "answer = lambda result: result.as_list()[::-1]": "for a chord, ",
            "def answer(result):\n"
            "    ids = []\n"
            "    while result is not None:\n"
            "        ids.insert(0, getattr(result, 'results', result.id))\n"
            "        result = result.parent\n"
            "    return ids": "nothing but ids",
            "answer = lambda result: result": "It should return a list of ids",
        },
        right=(
            "def answer(result):\n"
            "    if result is None:\n"
            "        return ()\n"
            "    members = result.results if hasattr(result, 'results') else [result]\n"
            "    return (*answer(result.parent), *(member.task_id for member in members))",
            "from collections import deque\n\n"
            "def answer(result):\n"
            "    ids = deque()\n"
            "    while result is not None:\n"
            "        ids.extendleft(each.id for each in reversed(result.results)) if hasattr(result, 'results') "
            "else ids.appendleft(result.id)\n"
            "        result = result.parent\n"
            "    return list(ids)",
        ),
    ),
    "09-4": Exercise(
        kind=str,
        judge=_orders,
        project="scratch/basket",
        wrong={
            _order('print("total:", chord(lookups, total.s()).delay())'): "It should print 'total: 8'",
            _order('print("total:", sum(group(lookups)().get(timeout=10)))'): "still adds them up itself",
            _order(
                "prices = [lookup.delay().get(timeout=10) for lookup in lookups]\n"
                'print("total:", total.delay(prices).get(timeout=10))'
            ): "one price after the other",
            _order(
                "first = lookups[0].delay().get(timeout=10)\n"
                "rest = group(lookups[1:]).delay().get(timeout=10) if lookups[1:] else []\n"
                'print("total:", total.delay([first, *rest]).get(timeout=10))'
            ): "Send all look-ups before you wait",
            _order('print("total:", total.s([lookup() for lookup in lookups]).delay().get(timeout=10))'): (
                "no worker has looked up the prices"
            ),
            _order('print("total:", chain(group(lookups), total.s())().get(timeout=10))'): "ended with an error",
        },
        right=(
            _order('print("total:", (group(lookups) | total.s())().get(timeout=10))'),
            _order(
                "sent = [lookup.delay() for lookup in lookups]\n"
                "prices = [each.get(timeout=10) for each in sent]\n"
                'print("total:", total.apply_async([prices]).get(timeout=10))'
            ),
        ),
    ),
}

QUIZ = {
    "09-1": Question(
        right="c",
        wrong={
            "a": "`tax` comes after `clean`, so it gets the result of `clean`. A chain doesn't remember older results.",
            "b": "the 20 that you have written comes after the result, so it is the `percent`.",
            "d": "an immutable call gets nothing from the one before. Its own result is passed on as always.",
        },
    ),
    "09-2": Question(
        right=("1", "one", "1 message", "one message"),
        wrong={
            "2": "the group isn't sent before `price` is done, and a worker sends it.",
            "3": "the three parts of a chain aren't sent together. The later ones are inside the first message.",
            "4": "there will be four tasks, but you have sent only the first of them.",
            "0": "sending a chain puts a message into the queue, whether a worker runs or not.",
        },
        otherwise="answer with one number. Which of the calls can be sent before a worker has done anything?",
    ),
    "09-3": Question(
        right="d",
        wrong={
            "a": "the body has not been sent yet. No task waits inside a worker here.",
            "b": "you could end the client after sending, and the body would still run.",
            "c": "the broker knows nothing about chords. At this time it has no message for the body.",
        },
    ),
    "09-4": Question(
        right="d",
        wrong={
            "a": "the first message would have to contain all the later calls, which is about 27 MB.",
            "b": "that works, but sending 100,000 messages takes a minute or more, and they need about 100 MB.",
            "c": "one slot would make all the calls, and the first exception would make all of them fail.",
        },
    ),
}
