"""The exercises of chapter 07."""

from collections.abc import Callable

from course_tasks.exercises import Exercise, called

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
