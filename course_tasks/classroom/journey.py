"""`Journey`: what one task really went through, from the client to its end, as text and as a picture."""

import contextlib
import html
import itertools
import re
import threading
import time
from datetime import datetime
from operator import itemgetter

from celery import Celery, states
from celery.signals import after_task_publish

from course_tasks.classroom.drawing import image
from course_tasks.classroom.errors import ClassroomError
from course_tasks.classroom.journey_picture import Step, bars_of, drawn

WAIT = 5.0  # seconds that the end of the block waits for the task's last event
ANSWER = 1.5  # seconds in which workers have to answer; one that is busy in the solo pool can't
LISTEN = 5.0  # seconds in which our own listening has to work
LEAVE = 1.0  # seconds in which it has to end; it looks ten times a second whether it should
WHEN = itemgetter("timestamp")
RETRY = re.compile(r"^Retry\(Retry\(\.\.\.\), (.*), [^,]*\)$")  # an event's text around a task's own error
FINAL = {"succeeded", "failed", "revoked", "rejected"}


class Journey:
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

    def __init__(self, client: Celery, wait: float = WAIT):
        if not isinstance(client, Celery):
            raise ClassroomError(f"Journey takes a Celery app, as in Journey(client), not a {type(client).__name__}.")
        self._client, self._wait = client, wait
        self._changed = threading.Condition()
        self._begin()

    def _begin(self) -> None:
        self._sent: list[dict] = []  # what the signal told of each task sent
        self._events: list[dict] = []  # of all tasks: "received" may come before the signal
        self._workers: set[str] = set()
        self._steps: list[Step] = []
        self._end = 0.0  # when it stopped listening
        self._note = ""
        self._over = threading.Event()  # one for each block, for the thread of the block before may still be at work
        self._listens = self._stored = False

    def __enter__(self) -> "Journey":
        self._begin()
        try:
            with self._channel() as channel:
                self._thread = threading.Thread(target=self._listen, args=[self._over], name="journey", daemon=True)
                self._thread.start()
                self._find_itself()
                self._wake(channel)
        except BaseException as error:
            self._over.set()
            if isinstance(error, ClassroomError) or not isinstance(error, Exception):
                raise
            raise ClassroomError(f"Journey can't listen to the broker: {error}") from None
        after_task_publish.connect(self._published, weak=False, dispatch_uid=id(self))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        after_task_publish.disconnect(dispatch_uid=id(self))
        try:
            if len(self._sent) == 1:
                self._finish()
        finally:
            self._over.set()
            # kombu's channels share a dictionary of queues: one that closes while another begins to listen may fail,
            # and leave its connections open
            self._thread.join(LEAVE)
            # an answer sent in the moment in which its queue was given up makes that queue again, for ever
            with contextlib.suppress(Exception), self._channel() as channel:
                channel.client.delete(self._answers)
        if len(self._sent) != 1 and kind is None:
            raise ClassroomError(self._trouble())

    def _trouble(self) -> str:
        number = len(self._sent)
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
        words = f'<pre style="font-size:var(--jp-code-font-size);white-space:pre-wrap">{html.escape(text)}</pre>'
        return {"text/plain": text, "text/html": picture + words}

    # listening

    def _listen(self, over: threading.Event) -> None:
        """Collect events until the block is over; runs in a thread, and must not fail with a traceback."""

        def heard(event: dict) -> None:
            with self._changed:
                if over.is_set():
                    return
                if event["type"] == "journey-listens":
                    self._listens = self._listens or event["journey"] == id(over)
                elif event["type"].startswith("task-"):
                    self._events.append(event)
                self._changed.notify_all()

        try:
            with self._client.connection_for_read() as connection:
                receiver = self._client.events.Receiver(connection, handlers={"*": heard})
                receiver.on_iteration = lambda: setattr(receiver, "should_stop", over.is_set())
                for _ in receiver.consume(limit=None, safety_interval=0.05, wakeup=False):
                    pass
        except Exception as error:
            with self._changed:
                if not over.is_set():
                    self._note = f"The connection to the broker was lost on the way: {error}"
                    over.set()
                    self._changed.notify_all()

    def _find_itself(self) -> None:
        """Send events of our own until one comes back: from then on, none is missed."""
        deadline = time.monotonic() + LISTEN
        with self._client.events.default_dispatcher() as dispatcher:
            while not self._listens:
                dispatcher.send("journey-listens", journey=id(self._over))
                with self._changed:
                    self._changed.wait_for(lambda: self._listens or self._over.is_set(), 0.02)
                if self._over.is_set() or time.monotonic() > deadline:
                    raise ClassroomError(self._note or "Journey can't hear the broker's events.")

    def _wake(self, channel) -> None:
        """Have the running workers send events, and wait until each has said that it does.

        A worker is known by the queue that it has for orders. It makes that when it starts, and may listen to it a
        moment after "ready." only, so those that don't answer are told again.
        """
        with self._client.connection_or_acquire() as connection:
            # One for all orders: each mailbox has a queue of its own for the answers. Not control's own: once that has
            # a queue, the copies of it that later orders use would wait there, and have the answers sent elsewhere.
            mailbox = self._client.control.mailbox(connection)
            self._answers = mailbox.reply_queue.name
            suffix = f".{mailbox.namespace}.pidbox"
            answered: set[str] = set()
            start, pause = time.monotonic(), 0.05
            while (passed := time.monotonic() - start) < ANSWER:
                bound = {row[-1] for row in channel.get_table(f"{mailbox.namespace}.pidbox")}
                missing = {name.removesuffix(suffix) for name in bound if name.endswith(suffix)} - answered
                if missing:
                    replies = mailbox.call(sorted(missing), "enable_events", timeout=min(pause, ANSWER - passed))
                    late = itertools.chain(*mailbox.unclaimed.values())  # answers to the orders before this one
                    answered.update(name for reply in [*replies, *late] for name in reply)
                    mailbox.unclaimed.clear()
                    pause *= 2
                elif answered or passed > 0.3:
                    break
                else:
                    time.sleep(0.02)
        self._workers = answered | missing

    def _published(self, sender=None, headers=None, routing_key=None, **_) -> None:
        self._sent.append({"id": headers["id"], "name": sender, "queue": routing_key, "when": time.time()})

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

    def _finish(self) -> None:
        """Wait for the last event, and put together what is known."""
        with self._changed:
            if self._workers or self._about():
                self._changed.wait_for(lambda: self._over.is_set() or self._ended(), self._wait)
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

    @contextlib.contextmanager
    def _channel(self):
        """A channel to the broker, which gets a moment to answer; a ClassroomError if it is of another kind."""
        with self._client.connection_for_read() as connection:
            if connection.transport.driver_type != "redis":
                raise ClassroomError(f"Journey needs a Redis or Valkey broker. This is {connection.as_uri()}.")
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=LISTEN)
            yield connection.default_channel

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
