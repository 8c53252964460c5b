"""The exercises of chapter 03b."""

from celery.app.task import Task

from course_tasks.exercises import Exercise, Question, called


def _active(answer: list | dict) -> str | None:
    if isinstance(answer, dict):
        return "this is a dictionary, by the names of the nodes. Take the list of one node out of it."
    if not answer:
        return "the list is empty: the task had not begun yet, or was over. Ask while its state is STARTED."
    if not all(isinstance(task, dict) and "name" in task for task in answer):
        return "these are names of tasks that the worker knows. Ask active(), which is about tasks that run."
    if "late" not in {task["name"] for task in answer}:
        return f"these are not runs of late, but of {answer[0]['name']}."
    machine = str(answer[0].get("hostname"))
    return None if machine.startswith("late@") else f"this is the list of the worker {machine}, not of late."


def _late(answer: Task) -> str | None:
    if answer.name != "bill":
        return f"its name is {answer.name}: without name= Celery makes one from the module and the function."
    if not answer.acks_late:
        return "it is acknowledged before it runs, so a killed worker loses it."
    if answer.ignore_result:
        return "it stores no result. Leave ignore_result out."
    value = called(answer, "Ada", case='for bill("Ada"), ')
    return None if value == "Ada" else f'bill("Ada") returns {value!r}, and should return the customer.'


BILL = "app = Celery('billing')\n\n\n@app.task({})\ndef bill(customer):\n    {}\n\n\nanswer = bill"

EXERCISES = {
    "03b-1": Exercise(
        kind=(list, dict),
        judge=_active,
        wrong={
            'answer = client.control.inspect([f"late@{socket.gethostname()}"], timeout=5, limit=1).active()': (
                "Take the list of one node"
            ),
            "node = f'late@{socket.gethostname()}'\n"
            "answer = client.control.inspect([node], timeout=5, limit=1).active()[node]": "the list is empty",
            "node = f'late@{socket.gethostname()}'\n"
            "answer = client.control.inspect([node], timeout=5, limit=1).registered()[node]": "Ask active()",
        },
    ),
    "03b-2": Exercise(
        kind=Task,
        judge=_late,
        wrong={
            BILL.format('name="bill"', "return customer"): "acknowledged before it runs",
            BILL.format("acks_late=True", "return customer"): "without name=",
            BILL.format('name="bill", acks_late=True', "pass"): "returns None",
            "def bill(customer):\n    return customer\n\n\nanswer = bill": "should be a task",
        },
    ),
}

QUIZ = {
    "03b-1": Question(
        right="c",
        wrong={
            "a": "a worker stores `STARTED` when it begins a task. A task that waits for a worker is `PENDING`.",
            "b": "an expired record is gone, and the state would be `PENDING`.",
            "d": (
                "this happens to messages that are not acknowledged yet. By default, the message of a running task is."
            ),
        },
    ),
    "03b-2": Question(
        right=("2", "two", "2 nodes", "two nodes", "2 nodes online"),
        wrong={
            "3": "three workers answer, but Celery doesn't count answers.",
            "1": "not all three workers have the same name.",
        },
        otherwise="answer with a number from 0 to 3.",
    ),
    "03b-3": Question(
        right="b",
        wrong={
            "a": "a warm stop does wait for the running task, but here it gets only ten seconds.",
            "c": (
                "a worker gives back messages that it hasn't acknowledged. By default, a running task's message "
                "isn't one of them."
            ),
            "d": "a process can't ignore SIGKILL, because the system itself ends the process.",
        },
    ),
    "03b-4": Question(
        right="d",
        wrong={
            "a": "the message was not acknowledged yet, so the broker still has a copy of it.",
            "b": "Celery doesn't know how far a function has come, so it can't go on in the middle of it.",
            "c": "the first worker had no time to store a state, and the second one doesn't watch over the first.",
        },
    ),
}
