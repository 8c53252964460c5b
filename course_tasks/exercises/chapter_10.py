"""The exercises and the quiz of chapter 10."""

from datetime import timedelta
from typing import Any

from celery.schedules import crontab, schedule

from course_tasks.exercises import Exercise, Question
from course_tasks.exercises.project import Project

# Prints when each entry that sends the task is due on two days, on a clock that goes on minute by minute.
SIMULATED = """
import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo
from celery.schedules import maybe_schedule
from shop import app

app.finalize()
berlin, found = ZoneInfo("Europe/Berlin"), {}
for month, day in ((1, 15), (7, 15), (1, 18), (3, 30), (10, 31)):
    times = found[f"{datetime(2026, month, day):%A, %d %B}"] = []
    for entry in app.conf.beat_schedule.values():
        rule = maybe_schedule(entry["schedule"], app=app)
        rule.app = app
        now = last = datetime(2026, month, day, tzinfo=berlin).astimezone(UTC)
        rule.nowfun = lambda: now.astimezone(app.timezone)
        for _ in range(24 * 60):
            if entry["task"] == "invoices" and rule.is_due(last.astimezone(app.timezone))[0]:
                times.append(f"{now.astimezone(berlin):%H:%M}")
                last = now
            now += timedelta(minutes=1)
print(json.dumps([found, "invoices" in app.tasks]))
"""


def _weekdays(answer: crontab) -> str | None:
    if answer.minute == set(range(60)):
        return "it is due at every minute of its hours, because it names no minute."
    if (answer.minute, answer.hour) != ({30}, {9}):
        return "it isn't due at 9:30, or not only then."
    if answer.day_of_week != {1, 2, 3, 4, 5}:
        return "its days of the week aren't Monday to Friday."
    if answer.day_of_month != set(range(1, 32)) or answer.month_of_year != set(range(1, 13)):
        return "it leaves out some days of the month, or some months."
    return None


def _entry(answer: dict[str, Any]) -> str | None:
    if len(answer) == 1 and isinstance(next(iter(answer.values())), dict):
        return "this is a schedule with an entry in it. The answer should be the entry alone, without its name."
    if answer.get("task") != "report":
        return "its task isn't report."
    rule = answer.get("schedule")
    if isinstance(rule, crontab):
        every = rule.minute == {0, 10, 20, 30, 40, 50} and all(
            (rule.hour == set(range(24)), rule.day_of_week == set(range(7)))
        )
    else:
        seconds = rule.run_every if isinstance(rule, schedule) else rule
        seconds = seconds.total_seconds() if isinstance(seconds, timedelta) else seconds
        every = not isinstance(seconds, bool) and seconds == 600
    if not every:
        hint = "" if isinstance(rule, crontab) else " A number means seconds."
        return f"its schedule isn't every ten minutes.{hint}"
    options = answer.get("options") or {}
    if options.get("queue") != "reports":
        return "its options don't name the queue reports."
    expires = options.get("expires")
    if isinstance(expires, timedelta):
        expires = expires.total_seconds()
    if expires is None:
        return "its messages never expire, so all old reports run after a break."
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        return "its expires isn't a number of seconds."
    if expires == 600:
        return "a report expires after 600 seconds, and beat may send the next one a moment before that. Choose less."
    if expires <= 0:
        return f"with expires {expires:g}, each report has expired before a worker can take it."
    if expires > 600:
        return f"a report expires {expires:g} seconds after it was sent, and the next one is sent after 600."
    return None


def _invoices(folder: str) -> str | None:
    with Project(folder) as project:
        found, known = project.loaded(SIMULATED, "shop.py")
    for day, times in found.items():
        if len(times) != 1:
            return f"on {day}, the invoices are sent {len(times)} times."
        if times != ["06:15"]:
            return f"on {day}, the invoices are sent at {times[0]} in Berlin."
    return None if known else "beat sends `invoices`, and shop.py has no task with this name any more."


SHOP = """%%writefile scratch/invoices/shop.py
from celery import Celery
from celery.schedules import crontab

app = Celery("shop")
{}
app.conf.beat_schedule = {{"invoices": {{"task": "invoices", "schedule": {}}}}}


@app.task(name="invoices")
def invoices():
    return "sent"
"""
PERIODIC = """
@app.task(name="invoices")
def invoices():
    return "sent"

@app.on_after_finalize.connect
def plan(sender, **_):
    sender.add_periodic_task(crontab(hour=6, minute=15), invoices.s())
"""
BERLIN = 'app.conf.timezone = "Europe/Berlin"'
ENTRY = 'answer = {{"task": "report", "schedule": {}, "options": {}}}'

EXERCISES = {
    "10-1": Exercise(
        kind=crontab,
        judge=_weekdays,
        wrong={
            'answer = crontab(hour=9, day_of_week="mon-fri")': "names no minute",
            'answer = crontab(hour=9, minute=0, day_of_week="mon-fri")': "it isn't due at 9:30",
            "answer = crontab(hour=9, minute=30)": "Monday to Friday",
            'answer = crontab(hour=9, minute=30, day_of_week="1-5", day_of_month=1)': "some days of the month",
            'answer = "30 9 * * mon-fri"': "should be",
        },
        right=(
            'answer = crontab.from_string("30 9 * * 1-5")',
            "answer = crontab(30, 9, [1, 2, 3, 4, 5])",
        ),
    ),
    "10-2": Exercise(
        kind=dict,
        judge=_entry,
        wrong={
            ENTRY.format(600, '{"queue": "reports"}'): "never expire",
            ENTRY.format(10, '{"queue": "reports", "expires": 9}'): "isn't every ten minutes",
            ENTRY.format(600, '{"expires": 590}'): "don't name the queue",
            ENTRY.format(600, '{"queue": "reports", "expires": 3600}'): "expires 3600 seconds",
            ENTRY.format(600, '{"queue": "reports", "expires": timedelta(minutes=10)}'): "a moment before that",
            ENTRY.replace("report", "reports").format(600, "{}"): "its task isn't report",
            ENTRY.format(600, '{"queue": "reports", "expires": 0}'): "has expired before a worker",
            ENTRY.format(600, "{}") + "\nanswer = {'report': answer}": "the entry alone",
        },
        right=(
            ENTRY.format('crontab(minute="*/10")', 'dict(queue="reports", expires=599.5)'),
            ENTRY.format("timedelta(minutes=10)", '{"queue": "reports", "expires": 300}'),
        ),
    ),
    "10-3": Exercise(
        kind=str,
        judge=_invoices,
        project="scratch/invoices",
        wrong={
            SHOP.format(BERLIN, "crontab(hour=6)"): "sent 60 times",
            SHOP.format("", "crontab(hour=6, minute=15)"): "15 January, the invoices are sent at 07:15 in Berlin",
            SHOP.format("", "crontab(hour=5, minute=15)"): "15 July, the invoices are sent at 07:15",
            SHOP.format(BERLIN, "crontab(minute=15)"): "sent 24 times",
            SHOP.format(BERLIN, 'crontab(15, 6, day_of_week="mon-fri")'): "on Sunday, 18 January",
            SHOP.format(BERLIN, 'crontab(15, 6, day_of_month="1-30")'): "on Saturday, 31 October",
            SHOP.format(BERLIN, "crontab(15, 6)").replace('task(name="invoices")', 'task(name="invoice")'): (
                "no task with this name"
            ),
        },
        right=(
            SHOP.format('app.conf.update(timezone="Europe/Berlin")', 'crontab.from_string("15 6 * * *")'),
            SHOP.format('app.conf["timezone"] = "Europe/Paris"', "crontab(15, 6)"),
            SHOP.partition("app.conf.beat")[0].format(BERLIN) + PERIODIC,
        ),
    ),
}

QUIZ = {
    "10-1": Question(
        right=("60", "sixty"),
        wrong={
            "1": "only a crontab with a minute is due once. What is the minute, if you leave it out?",
            "24": "the hour is given. What is the minute, if you leave it out?",
        },
        otherwise="answer with one number. What is the minute, if you leave it out?",
    ),
    "10-2": Question(
        right="b",
        wrong={
            "a": "by default a beat has no lock. That is what RedBeat adds.",
            "c": "a beat doesn't notice the others, unless they share a pidfile.",
        },
    ),
    "10-3": Question(
        right=("1", "once", "one"),
        wrong={
            "6": "that would be all missed runs. Does beat make up for them?",
            "0": "beat reads in its schedule file when it last sent the task, so it knows that the task is overdue.",
        },
        otherwise="answer with one number. Does beat make up for missed runs?",
    ),
    "10-4": Question(
        right="b",
        wrong={
            "a": "the message doesn't say that the date is Berlin's. What does a worker make of a date without a zone?",
            "c": "the worker would have to read the date as one that is past. It reads it as a later one.",
            "d": "that setting plays no part, nor does the sender's. What does a worker make of a date without a zone?",
        },
    ),
}
