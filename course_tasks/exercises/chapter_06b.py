"""The exercises of chapter 06b."""

from collections.abc import Callable

from celery import Celery

from course_tasks.exercises import Exercise, Question, called

# Slots, multiplier, acknowledged late: and how many messages have left the queue when all slots are busy.
GONE = {(2, 4, False): 10, (1, 1, False): 2, (3, 4, False): 15, (4, 1, True): 4, (2, 4, True): 8, (5, 3, True): 15}
QUEUES = {"report": "long", "thumbnail": "short", "mail": "short"}


def _gone(answer: Callable) -> str | None:
    for (slots, multiplier, late), number in GONE.items():
        worker = f"{slots} slot{'s' * (slots > 1)}, multiplier {multiplier}, acknowledged {'late' if late else 'early'}"
        said = called(answer, slots, multiplier, late, case=f"for {worker}, ")
        if said == number:
            continue
        if late:
            why = "a task that is acknowledged late is unacknowledged while it runs, so the limit includes it"
        elif said == slots * multiplier:
            why = f"those are only the reserved ones. The {slots} running tasks have left the queue as well"
        else:
            why = "the limit is the number of slots times the multiplier, and the running tasks come on top"
        return f"for {worker} it says {said!r}, but {number} have left the queue. {why[0].upper()}{why[1:]}."
    return None


def _routes(answer: dict | list | tuple | Callable) -> str | None:
    app = Celery("judge", set_as_current=False)
    app.conf.task_routes = answer
    for task, wanted in QUEUES.items():
        try:
            queue = app.amqp.router.route({}, task).get("queue")
        except Exception as error:
            if isinstance(answer, list | tuple) and all(isinstance(pair, tuple) for pair in answer):
                return "Celery reads a list of pairs only inside another list, as in [[(name, route), (name, route)]]."
            return f"Celery can't read it: {type(error).__name__}: {error}."
        name = queue.name if queue else app.conf.task_default_queue
        if name == wanted:
            continue
        if name == app.conf.task_default_queue:
            return f"nothing is said of {task}, so it goes to the default queue, {name}, which none of the two takes."
        if name in QUEUES.values():
            trouble = "holds up short ones" if name == "short" else "waits for long ones"
            return f"{task} goes to {name}, where it {trouble}."
        return f"{task} goes to {name}, and no worker here takes that queue."
    return None


EXERCISES = {
    "06b-1": Exercise(
        kind=Callable,
        judge=_gone,
        wrong={
            "answer = lambda slots, multiplier, late: slots * multiplier": "only the reserved ones",
            "answer = lambda slots, multiplier, late: slots * (multiplier + 1)": "the limit includes it",
            "answer = lambda slots, multiplier, late: slots + multiplier": "number of slots times the multiplier",
            "answer = lambda slots, multiplier: slots * multiplier": "your function raised TypeError",
        },
        right=(
            "answer = lambda slots, multiplier, late: slots * (multiplier + (not late))",
            "import functools\n\n"
            "@functools.cache\ndef answer(*given):\n"
            "    slots, multiplier, late = map(int, given)\n"
            "    return float(slots * multiplier + slots - slots * late)",
        ),
    ),
    "06b-2": Exercise(
        kind=(dict, list, tuple, Callable),
        judge=_routes,
        wrong={
            'answer = {"report": {"queue": "long"}}': "nothing is said of thumbnail",
            'answer = {task: {"queue": "short"} for task in ("report", "thumbnail", "mail")}': "holds up short ones",
            'answer = {"report": {"queue": "long"}, "*": {"queue": "long"}}': "waits for long ones",
            'answer = {"long": {"queue": "report"}, "short": {"queue": "mail"}}': "nothing is said of report",
            'answer = {"report": {"queue": "slow"}, "*": {"queue": "short"}}': "report goes to slow, and",
            'answer = [("report", {"queue": "long"}), ("*", {"queue": "short"})]': "only inside another list",
        },
        right=(
            'answer = {"*": "short", "report": "long"}',
            "def answer(name, args, kwargs, options, task=None, **more):\n"
            "    return {'queue': 'long' if name == 'report' else 'short'}",
            'answer = [[("report", {"queue": "long"}), ("*", {"queue": "short"})]]',
            "import re\n\nfrom kombu import Queue\n\n"
            'answer = ([(re.compile("thumb.*|mail"), {"queue": "short"}), ("report", {"queue": Queue("long")})],)',
        ),
    ),
}

QUIZ = {
    "06b-1": Question(
        right="a",
        wrong={
            "b": "a worker doesn't share its reserved tasks with another worker. It keeps all of them.",
            "c": "A reserves four messages for each of its slots. How many are that with ten slots?",
            "d": (
                "this counts A's ten running tasks as part of its limit. By default, they were acknowledged when "
                "they started, so the limit doesn't include them."
            ),
        },
    ),
    "06b-2": Question(
        right=(
            "--disable-prefetch",
            "disable-prefetch",
            "disable prefetch",
            "worker_disable_prefetch",
            "worker_disable_prefetch=True",
            "worker_disable_prefetch = True",
        ),
        wrong={
            "--prefetch-multiplier=0": (
                "on the command line, 0 counts as no value, so the worker uses the multiplier from its "
                "configuration. In the configuration, 0 means no limit at all."
            ),
            "--prefetch-multiplier 0": (
                "on the command line, 0 counts as no value, so the worker uses the multiplier from its "
                "configuration. In the configuration, 0 means no limit at all."
            ),
            "--concurrency=2": (
                "with two slots, one report no longer holds up a mail. Two reports at the same time still do."
            ),
            "-c 2": "with two slots, one report no longer holds up a mail. Two reports at the same time still do.",
            "task_acks_late": (
                "that is a setting. Together with multiplier 1 it helps too, but then the tasks must tolerate "
                "running twice. The question asks for an option of `celery worker`."
            ),
            "acks_late": (
                "that is an option of a task. Together with multiplier 1 it helps too, but then the task must "
                "tolerate running twice. The question asks for an option of `celery worker`."
            ),
            "--acks-late": "`celery worker` has no such option.",
            "-O fair": (
                "prefork does this by default. It decides which child process gets the next task, and the worker "
                "takes just as many messages."
            ),
            "-Ofair": (
                "prefork does this by default. It decides which child process gets the next task, and the worker "
                "takes just as many messages."
            ),
            "--pool=threads": "the pool doesn't change how many messages a worker with one slot may take.",
        },
        otherwise=(
            "the chapter compares three pairs of workers. Which option did the pair have on which no short task got "
            "stuck?"
        ),
    ),
    "06b-3": Question(
        right="c",
        wrong={
            "a": "with this option the worker reserves no messages either, so slots would still stay empty in between.",
            "b": (
                "the visibility timeout decides when an unacknowledged message goes back to the queue. It doesn't "
                "make a worker ask for messages sooner."
            ),
            "d": "these tasks only wait, so the processor has almost nothing to do already.",
        },
    ),
    "06b-4": Question(
        right="b",
        wrong={
            "a": "no worker takes a message in advance here, and the mail waits all the same.",
            "c": (
                "six slots are enough for five reports and a mail. When more reports arrive, they fill six slots as "
                "well."
            ),
            "d": (
                "a priority lets a mail overtake the reports in the queue. It doesn't interrupt the reports that "
                "are running."
            ),
        },
    ),
}
