"""The exercises of chapter 07."""

from collections.abc import Callable

from course_tasks.exercises import Exercise, Question, called

LOG = [
    "[10:31:07 INFO -] Connected to the broker",
    "[10:31:07 INFO ada-7] Task order[1f2e3d4c] received",
    "[10:31:07 INFO ada-7] order[1f2e3d4c]: an order",
    "[10:31:08 WARNING ben-8] card refused, see [ada-7] and ada-7] for the same card",
    "[10:31:08 INFO 90ab] Task pack[90ab] received",
    "[10:31:09 INFO ada-7] Task order[1f2e3d4c] succeeded in 0.1s: None",
]
COUNTED = {"ada-7": 3, "ben-8": 1, "90ab": 1}


def _eve(answer: list) -> str | None:
    if not all(isinstance(line, str) for line in answer):
        return "these are not lines of the log. follow_log returns those."
    if others := [line for line in answer if " eve-9] " not in line]:
        return f"this line is not of eve-9: {others[0]}"
    if not answer:
        return "there is no line of eve-9: it is the client that gives a request its id. request does so."
    ended = sum(" succeeded in " in line for line in answer)
    if any("card refused" in line for line in answer):
        return "her card was refused: that order was for more than 20."
    if ended != 6:
        return f"{ended} of her tasks are over in these lines, and should be six. The id is in all of them."
    return None if len(answer) == 17 else f"these are {len(answer)} lines, and all six tasks together logged 17."


def _requests(answer: Callable) -> str | None:
    said = called(answer, LOG, case="for a log of six lines, ")
    if not isinstance(said, dict):
        return f"it returns {type(said).__name__}, and should return a dictionary."
    if "-" in said:
        return "it counts -, which stands for no request."
    return None if said == COUNTED else f"for this log it says {said}, and should say {COUNTED}:\n" + "\n".join(LOG)


EXERCISES = {
    "07-1": Exercise(
        kind=list,
        judge=_eve,
        wrong={
            'request("eve-9", 20)\nlines = follow_log("shop", " succeeded in ", times=6)\n'
            'answer = [line for line in lines if " eve-9] " in line and "order[" in line]': "1 of her tasks are over",
            'client.send_task("order", args=(20,), queue="shop")\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=6) if " eve-9] " in line]': (
                "there is no line of eve-9"
            ),
            'request("eve-9", 20)\nrequest("ada-7", 20)\nanswer = follow_log("shop", " succeeded in ", times=12)': (
                "this line is not of eve-9"
            ),
            'request("eve-9", 200)\n'
            'answer = [line for line in follow_log("shop", " succeeded in ", times=6) if " eve-9] " in line]': (
                "more than 20"
            ),
        },
    ),
    "07-2": Exercise(
        kind=Callable,
        judge=_requests,
        wrong={
            "from collections import Counter\n\n\ndef answer(lines):\n"
            "    return Counter(line.partition(']')[0].split()[-1] for line in lines)": "it counts -",
            "def answer(lines):\n"
            "    return {id: sum(id in line for line in lines) for id in ('ada-7', 'ben-8', '90ab')}": "'ada-7': 4",
            "def answer(lines):\n    return [line.partition(']')[0].split()[-1] for line in lines]": "it returns list",
            "answer = {'ada-7': 11, 'ben-8': 12}": "should be a function",
        },
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
