"""The exercises of chapter 07."""

import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from course_tasks.exercises import Exercise, Question, called, sent
from course_tasks.exercises.project import Project

LOG = [
    "[10:31:07 INFO -] Connected to the broker",
    "[10:31:07 INFO ada-7] Task order[1f2e3d4c] received",
    "[10:31:07 INFO ada-7] order[1f2e3d4c]: an order",
    "[10:31:08 WARNING ben-8] card refused, see [ada-7] and ada-7] for the same card",
    "[10:31:08 INFO 90ab] Task pack[90ab] received",
    "[10:31:09 INFO ada-7] Task order[1f2e3d4c] succeeded in 0.1s: None",
]
COUNTED = {"ada-7": 3, "ben-8": 1, "90ab": 1}
OTHERS = ["[10:31:10 WARNING zoe_1.2] card refused", "[10:31:10 INFO -] zoe_1.2] is no id here"]
LOGS = [(LOG, COUNTED), (OTHERS, {"zoe_1.2": 1}), ([], {})]


def _eve(answer: list) -> str | None:
    if not all(isinstance(line, str) for line in answer):
        return "these are not lines of the log. follow_log returns those."
    if others := [line for line in answer if " eve-9] " not in line]:
        return f"this line is not about eve-9: {others[0]}"
    if not answer:
        return "there is no line about eve-9. The client gives a request its id, and `request` does that."
    if any("card refused" in line for line in answer):
        return "her card was refused, as in every order for more than 100. This order should be for 20."
    ended = sum(" succeeded in " in line for line in answer)
    if ended > 6:
        return f"{ended} tasks have ended in these lines. One order has six, so keep the lines of one order only."
    if ended < 6:
        return f"in these lines, {ended} of her six tasks have ended. All lines about the six have the id."
    if len(answer) != 17:
        return f"these are {len(answer)} lines, but her six tasks have logged 17."
    order = sent(next(iter(re.findall(r" Task order\[(.+?)\] received", "\n".join(answer))), ""))
    if order is None:
        return "this notebook has sent no such order. Take the lines from the worker's log."
    return None if 20 in (*order.args, *order.kwargs.values()) else "that order was not for 20."


def _requests(answer: Callable) -> str | None:
    for log, counted in LOGS:
        said = called(answer, list(log), case=f"for a log of {len(log)} lines, ")
        if not isinstance(said, dict):
            return f"it returns an object of type {type(said).__name__}, but it should return a dictionary."
        if "-" in said:
            return "it counts -, which stands for no request."
        if said != counted:
            return f"for this log it returns {said}, but it should return {counted}:\n" + "\n".join(log)
    return None


REQUESTS = {"eve-9": 20, "zoe-3": 300}
TASKS = {"order": 2, "mail": 4}  # order sends a mail
LINE = re.compile(r"\[[^]]* (?P<id>\S+)\] Task (?P<task>\w+)\[(?P<own>[^]]+)\] succeeded in ")


def _market(folder: str) -> str | None:
    with ThreadPoolExecutor() as pool, Project(folder) as project:
        web = pool.submit(project.run, "python web.py")
        project.worker("celery -A market worker --pool=threads --concurrency=4 --without-mingle --without-gossip")
        web.result()
        deadline, quiet = time.monotonic() + 20, 0
        while len(ended := _ended(project)) < sum(TASKS.values()) and time.monotonic() < deadline and quiet < 25:
            time.sleep(0.02)
            left = project.broker.llen("celery") or project.log().count(" received\n") > len(ended)
            quiet = 0 if left else quiet + 1  # for half a second there has been nothing to do
        tasks = Counter(line["task"] for line in ended)
        if tasks != TASKS:
            return f"the tasks that have run are {dict(sorted(tasks.items()))}, but it should be {TASKS}."
        owns = Counter(line["own"] for line in ended)
        if common := [own for own, number in owns.items() if number > 1]:
            return f"several tasks have the id {common[0]}. Each task should have an id of its own."
        if others := [line for line in ended if line["id"] not in REQUESTS]:
            return f"the lines about {others[0]['task']} have the id {others[0]['id']}, which is no id of a request."
        for id, price in REQUESTS.items():
            for text in (f"mailed: a bill of {price}", f"mailed: thank you for {price}"):
                if f" {id}] {text}\n" not in project.log():
                    return f"the line {text!r} should be logged, with the id {id}."
        return None


def _ended(project: Project) -> list[re.Match]:
    return list(filter(None, map(LINE.match, project.log().splitlines())))


def _web(*lines: str, before: str = "install(client)\n") -> str:
    """A cell that writes web.py, with these lines for each request."""
    body = "\n    ".join(lines)
    return f"""%%writefile scratch/market/web.py
from celery import Celery
from course_tasks.correlation import HEADER, correlation_id, install

client = Celery("web")
{before}
for id, price in [("eve-9", 20), ("zoe-3", 300)]:
    {body}
"""


SET = "token = correlation_id.set(id)"
RESET = "correlation_id.reset(token)"
ORDER = 'client.send_task("order", args=(price,))'
BILL = 'client.send_task("mail", args=(f"a bill of {price}",))'
TOGETHER = """%%writefile scratch/market/web.py
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from course_tasks.correlation import correlation_id
from market import mail, order

def serve(id, price):
    correlation_id.set(id)
    order.delay(price)
    mail.apply_async(kwargs={"text": f"a bill of {price}"})

with ThreadPoolExecutor() as threads:
    for given in [("eve-9", 20), ("zoe-3", 300)]:
        threads.submit(copy_context().run, serve, *given)
"""

EXERCISES = {
    "07-1": Exercise(
        kind=list,
        judge=_eve,
        wrong={
            'request("eve-9", "order", 20)\nlines = follow_log("shop", " succeeded in ", times=6)\n'
            'answer = [line for line in lines if " eve-9] " in line and "order[" in line]': "1 of her six tasks",
            'client.send_task("order", args=(20,), queue="shop")\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=6) if " eve-9] " in line]': (
                "there is no line about eve-9"
            ),
            'request("eve-9", "order", 20)\nrequest("ada-7", "order", 20)\n'
            'answer = follow_log("shop", " succeeded in ", times=12)': "this line is not about eve-9",
            'request("eve-9", "order", 200)\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=6) if " eve-9] " in line]': (
                "for more than 100"
            ),
            'request("eve-9", "order", 30)\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=6) if " eve-9] " in line]': (
                "that order was not for 20"
            ),
            'request("eve-9", "order", 20)\nrequest("eve-9", "order", 20)\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=12) if " eve-9] " in line]': (
                "12 tasks have ended"
            ),
            'answer = [f"[10:31:07 INFO eve-9] Task t[{n}] succeeded in 0.1s: None" for n in range(6)]\n'
            'answer += ["[10:31:07 INFO eve-9] Task order[1f2e3d4c] received"] * 11': "has sent no such order",
            'request("eve-9", "order", 20)\nanswer = "\\n".join(follow_log("shop", " succeeded in ", times=6))': (
                "should be a list"
            ),
        },
        right=(
            "from course_tasks.correlation import HEADER\n\n"
            'client.send_task("order", kwargs={"price": 20}, queue="shop", headers={HEADER: "eve-9"})\n'
            'answer = [*filter(lambda line: "eve-9" in line, follow_log("shop", "succeeded", times=6))]',
            'request("eve-9", "order", 20)\nfollow_log("shop", " succeeded in ", times=6)\n'
            "%tail shop --save scratch/shop.log\n"
            'with open("scratch/shop.log") as log:\n    answer = [line for line in log if " eve-9] " in line][-17:]',
        ),
    ),
    "07-2": Exercise(
        kind=Callable,
        judge=_requests,
        wrong={
            "from collections import Counter\n\n\ndef answer(lines):\n"
            "    return Counter(line.partition(']')[0].split()[-1] for line in lines)": "it counts -",
            "def answer(lines):\n"
            "    return {id: sum(id in line for line in lines) for id in ('ada-7', 'ben-8', '90ab')}": "'ada-7': 4",
            "def answer(lines):\n    return [line.partition(']')[0].split()[-1] for line in lines]": "of type list",
            "answer = {'ada-7': 11, 'ben-8': 12}": "should be a function",
            "answer = lambda lines: {'ada-7': 3, 'ben-8': 1, '90ab': 1}": "should return {'zoe_1.2': 1}",
            "import re\n\n\ndef answer(lines):\n"
            "    ids = re.findall(r'(\\w+-\\d+)\\]', '\\n'.join(lines))\n"
            "    return {id: ids.count(id) for id in ids}": "for this log it returns {'ada-7': 5",
            "def answer(lines):\n"
            "    ids = [line.split()[2].rstrip(']') for line in lines]\n"
            "    return {id: ids.count(id) for id in {*ids} - {'-'}} or None": "of type NoneType",
        },
        right=(
            "import re\nfrom collections import Counter\n\n\n"
            "class Requests:\n"
            "    def __call__(self, lines):\n"
            "        found = (re.match(r'\\[\\S+ \\w+ ([\\w.][\\w.-]*)\\]', line) for line in lines)\n"
            "        return Counter(match[1] for match in found if match)\n\n\n"
            "answer = Requests()",
            "from collections import defaultdict\n\n\n"
            "def answer(lines):\n"
            "    found = defaultdict(float)\n"
            "    while lines:\n"
            "        _, _, id, *_ = lines.pop().replace(']', ' ', 1).split()\n"
            "        if id != '-':\n"
            "            found[id] += 1\n"
            "    return found",
        ),
    ),
    "07-3": Exercise(
        kind=str,
        judge=_market,
        project="scratch/market",
        wrong={
            _web(ORDER, BILL, SET): "which is no id of a request",
            _web(*(f"{call[:-1]}, task_id=id)" for call in (ORDER, BILL)), before=""): "several tasks have the id",
            _web(ORDER[:-1] + ", task_id=id)", BILL, before=""): "the lines about mail have the id",
            _web(SET, ORDER, RESET, BILL): "the lines about mail",
            _web(SET, ORDER, BILL, RESET, before=""): "no id of a request",
            _web(ORDER, BILL, before='install(client)\ncorrelation_id.set("eve-9")'): "with the id zoe-3",
            _web(SET, ORDER, RESET): "but it should be",
            _web(SET, ORDER, BILL, RESET, before="correlation.install(client)"): "NameError",
        },
        right=(
            TOGETHER,
            _web(*(call[:-1] + ", headers={HEADER: id})" for call in (ORDER, BILL)), before=""),
            _web(*(call[:-1] + ", root_id=id)" for call in (BILL, ORDER)), before=""),
        ),
    ),
}

QUIZ = {
    "07-1": Question(
        right="c",
        wrong={
            "a": "the backend doesn't know which task was sent first. It has only one record for this id.",
            "b": "Celery doesn't check whether an id is already in use. It sends both messages, and both tasks run.",
            "d": (
                "both tasks run to their end. `get` waits for a record under this id, no matter which task has "
                "written it."
            ),
        },
    ),
    "07-2": Question(
        right="b",
        wrong={
            "a": "`-` stands for lines that belong to no request. Here the task of a request is running.",
            "c": "Celery writes a task's id only into its own lines about the task and into those of task loggers.",
            "d": "the worker's log also has the lines of other loggers. `cards` in the shop is one of them.",
        },
    ),
    "07-3": Question(
        right=("ada-7", "[ada-7]", "ada"),
        wrong={
            "ben-8": (
                "this id is only a word in the message. Look for the id in the brackets at the beginning of the line."
            ),
            "ben": (
                "this name is only a word in the message. Look for the id in the brackets at the beginning of the line."
            ),
            "5c1d9f02": "that is the id of a task, and its line says that this task succeeded.",
            "77e0b3aa": "that is the id of a task. The question asks for the id of the request.",
        },
        otherwise="answer with one of the two ids that stand in the brackets at the beginning of the lines.",
    ),
    "07-4": Question(
        right="d",
        wrong={
            "a": "`pack` has no such argument either, and its lines have the id.",
            "b": "then the request's id would be the id of a task again, and two tasks of one request would share it.",
            "c": "`refund` would first have to know which id it should set, and it has only its price.",
        },
    ),
}
