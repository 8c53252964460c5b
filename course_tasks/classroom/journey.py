"""`Journey`: what one task really went through, from the client to its end, as text and as a picture."""

import contextlib
import re
import time
from datetime import datetime
from operator import itemgetter

from celery import states

from course_tasks.classroom.drawing import image, preformatted
from course_tasks.classroom.journey_picture import Step, bars_of, drawn
from course_tasks.classroom.listening import FINAL, RETRY, Listener

WHEN = itemgetter("timestamp")


class Journey(Listener):
    """Listens while a block sends one task, and shows the way that this task went.

    `with Journey(client) as journey:` around the sending, then `journey` as a cell's last expression. "sent" is known
    from Celery's signal in this process, once the broker has the message. All else is known from the events that
    workers send about their tasks. Workers without `-E` send none, so those that run are told to (as by `celery
    control enable_events`: they go on with it after the block, and log it once). They tell no more than their node
    names: which process of a pool ran the task is not in an event.

    The times are the clock's of the machine where each thing happened. All in one machine, as in this course, they
    agree; from several machines, the steps are as wrong as their clocks differ, and may even seem to go backwards.

    Args:
        client: the Celery app that the block sends with, on a Redis or Valkey broker.
        wait: seconds that the end of the block waits for the task's last event, unless it has come.

    Raises:
        ClassroomError: this is no Celery app, its broker does not answer, or the block sent no task or several.
    """

    def _begin(self) -> None:
        super()._begin()
        self._steps: list[Step] = []
        self._end = 0.0  # when it stopped listening
        self._stored = False

    def _trouble(self) -> str:
        number = len(self._sent)
        if number == 1:
            return ""
        return f"A Journey follows one task, and its block has sent {number or 'none'}. Send one inside `with`."

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        if not self._steps:
            return {"text/plain": self._trouble()}
        text = "\n".join([f"task {self._sent[0]['name']}", *self._lines()])
        if self._note:
            text += f"\n{self._note}"
        alt = "; ".join(re.sub(r"^\+\S+ s +(\S+) +", r"\1 ", line) for line in self._lines())
        bars = bars_of(self._steps, None if self._ended() else self._end, self._stored)
        picture = image(f"The way of task {self._sent[0]['name']}: {alt}", drawn(bars))
        return {"text/plain": text, "text/html": picture + preformatted(text)}

    # what was heard

    def _about(self) -> list[dict]:
        """The events about the task, in the order in which things happened.

        A task that is retried sends its next message itself, and a worker may receive that before it has told that
        the attempt before is over: the retry was then no later than that.
        """
        events = [dict(event) for event in self._events if event.get("uuid") == self._sent[0]["id"]]
        received = {event.get("retries"): event["timestamp"] for event in events if event["type"] == "task-received"}
        retried = sorted(filter(lambda event: event["type"] == "task-retried", events), key=WHEN)
        for attempt, event in enumerate(retried, start=1):
            event["timestamp"] = min(event["timestamp"], received.get(attempt, event["timestamp"]))
        return sorted(events, key=lambda event: (event["timestamp"], event["type"] == "task-received"))

    def _ended(self) -> bool:
        return any(event["type"][5:] in FINAL and not event.get("requeue") for event in self._about())

    def _retries_told(self) -> bool:
        events = self._about()
        told = sum(event["type"] == "task-retried" for event in events)
        return told >= max((event.get("retries") or 0 for event in events), default=0)

    def _finish(self) -> None:
        """Wait for the last event, and put together what is known."""
        with self._changed:
            if self._workers or self._about():
                self._changed.wait_for(lambda: self._over.is_set() or self._ended(), self._wait)
                # a busy worker may tell of a retry after the end only, or never, if it died
                self._changed.wait_for(lambda: self._over.is_set() or not self._ended() or self._retries_told(), 2)
            events = self._about()
            ended = self._ended()
        [sent] = self._sent
        sent["when"] = min([sent["when"], *map(WHEN, events)])  # the signal may come after a worker has the message
        self._end = time.time() - sent["when"]
        self._steps = [Step("sent", 0.0, f"by the client, to queue {sent['queue']!r}")]
        for event in events:
            step = Step(event["type"][5:], event["timestamp"] - sent["when"], f"by worker {event['hostname']}")
            if eta := event.get("eta"):
                due = max(0.0, datetime.fromisoformat(eta).timestamp() - sent["when"])
                step.where += f", to be started at {due:+.3f} s"
            if "exception" in event:
                step.where += ": " + RETRY.sub(r"\1", event["exception"])
            self._steps.append(step)
        if ended:
            self._stored = self._in_backend(sent["id"])
            self._steps[-1].where += "; stored in the backend" if self._stored else ""
        elif not self._note:
            self._note = self._silence(sent) if not events else f"No more was heard within {self._wait:g} s."

    def _in_backend(self, task: str) -> bool:
        """Whether the backend has the task's end; False if there is none, or it does not answer."""
        with contextlib.suppress(Exception):
            backend = self._client.backend
            return backend.decode(backend.get(backend.get_key_for_task(task)))["status"] in states.READY_STATES
        return False

    def _silence(self, sent: dict) -> str:
        """Why there was no event at all."""
        try:
            with self._channel() as channel:
                for step in channel.priority_steps:
                    newest = channel.client.lrange(channel._q_for_pri(sent["queue"], step), 0, 999)
                    if any(sent["id"].encode() in message for message in newest):
                        return f"No worker has taken it: it waits in queue {sent['queue']!r}."
        except Exception as error:
            return f"Whether a worker has taken it is not known: {error}"
        return f"It is not in queue {sent['queue']!r} any more, but no worker has told of it."

    def _lines(self) -> list[str]:
        return [f"{step.when:+.3f} s  {step.what:<9}  {step.where}" for step in self._steps]
