"""`Listener`: hears what a block sends with a client, and what the workers tell of tasks meanwhile."""

import contextlib
import itertools
import re
import threading
import time
from typing import Self

from celery import Celery
from celery.signals import after_task_publish

from course_tasks.classroom.errors import ClassroomError

WAIT = 5.0  # seconds that the end of the block waits for the last event
ANSWER = 1.5  # seconds in which workers have to answer; one that is busy in the solo pool can't
CONNECT, LISTEN = 5.0, 20.0  # seconds in which the broker has to answer, and in which our own listening has to work
LEAVE = 1.0  # seconds in which it has to end; it looks ten times a second whether it should
RETRY = re.compile(r"^Retry\(Retry\(\.\.\.\), (.*), [^,]*\)$")  # an event's text around a task's own error
FINAL = {"succeeded", "failed", "revoked", "rejected"}


class Listener:
    """What `Journey` and `Canvas` share: from the beginning of a `with` block to its end, it collects events.

    Workers without `-E` send none, so those that run are told to when the block begins. A subclass says what is wrong
    with a block, and what happens at its end.

    Args:
        client: the Celery app that the block sends with, on a Redis or Valkey broker.
        wait: seconds that the end of the block waits for the last event, unless it has come.

    Raises:
        ClassroomError: this is no Celery app, its broker does not answer, or something is wrong with the block.
    """

    def __init__(self, client: Celery, wait: float = WAIT):
        self._name = type(self).__name__
        if not isinstance(client, Celery):
            raise ClassroomError(
                f"{self._name} takes a Celery app, as in {self._name}(client), not a {type(client).__name__}."
            )
        self._client, self._wait = client, wait
        self._signal = f"{self._name.lower()}-listens"  # an event of our own
        self._changed = threading.Condition()
        self._begin()

    def _begin(self) -> None:
        self._sent: list[dict] = []  # what the signal told of each task sent
        self._events: list[dict] = []  # of all tasks: "received" may come before the signal
        self._workers: set[str] = set()
        self._note = ""
        self._over = threading.Event()  # one for each block, for the thread of the block before may still be at work
        self._listens = False

    def __enter__(self) -> Self:
        self._begin()
        try:
            with self._channel() as channel:
                self._thread = threading.Thread(
                    target=self._listen, args=[self._over], name=self._name.lower(), daemon=True
                )
                self._thread.start()
                self._find_itself()
                self._wake(channel)
        except BaseException as error:
            self._over.set()
            if isinstance(error, ClassroomError) or not isinstance(error, Exception):
                raise
            raise ClassroomError(f"{self._name} can't listen to the broker: {error}") from None
        after_task_publish.connect(self._published, weak=False, dispatch_uid=id(self))
        return self

    def __exit__(self, kind, error, traceback) -> None:
        after_task_publish.disconnect(dispatch_uid=id(self))
        trouble = self._trouble()
        try:
            if not trouble:
                self._finish()
        finally:
            self._over.set()
            # kombu's channels share a dictionary of queues: one that closes while another begins to listen may fail,
            # and leave its connections open
            self._thread.join(LEAVE)
            # an answer sent in the moment in which its queue was given up makes that queue again, for ever
            with contextlib.suppress(Exception), self._channel() as channel:
                channel.client.delete(self._answers)
        if trouble and kind is None:
            raise ClassroomError(trouble)

    # for subclasses

    def _trouble(self) -> str:
        """What is wrong with the block, in one line; empty if nothing is."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Wait for what is still to come, and put together what is known; it still listens."""
        raise NotImplementedError

    # listening

    def _listen(self, over: threading.Event) -> None:
        """Collect events until the block is over; runs in a thread, and must not fail with a traceback."""

        def heard(event: dict) -> None:
            with self._changed:
                if over.is_set():
                    return
                if event["type"] == self._signal:
                    self._listens = self._listens or event["block"] == id(over)
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
                dispatcher.send(self._signal, block=id(self._over))
                with self._changed:
                    self._changed.wait_for(lambda: self._listens or self._over.is_set(), 0.02)
                if self._over.is_set() or time.monotonic() > deadline:
                    raise ClassroomError(self._note or f"{self._name} can't hear the broker's events.")

    def _wake(self, channel) -> None:
        """Have the running workers send events, and wait until each has said that it does.

        A worker is known by the queue that it has for orders. It makes that when it starts, and may listen to it a
        moment after "ready." only, so those that don't answer are told again.
        """
        # One for all orders: each mailbox has a queue of its own for the answers. Not control's own: once that has
        # a queue, the copies of it that later orders use would wait there, and have the answers sent elsewhere.
        # And a connection of its own: one that has given up may still read a late answer, and the client's next order
        # on it would take that for its own.
        mailbox = self._client.control.mailbox(channel.connection.client)
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

    def _published(self, sender=None, headers=None, body=None, routing_key=None, **_) -> None:
        task = {"id": headers["id"], "name": sender, "queue": routing_key, "when": time.time()}
        with self._changed:
            self._sent.append(task | {"headers": headers, "body": body})

    @contextlib.contextmanager
    def _channel(self):
        """A channel to the broker, which gets a moment to answer; a ClassroomError if it is of another kind."""
        with self._client.connection_for_read() as connection:
            if connection.transport.driver_type != "redis":
                raise ClassroomError(f"{self._name} needs a Redis or Valkey broker. This is {connection.as_uri()}.")
            connection.ensure_connection(max_retries=1, interval_start=0.2, timeout=CONNECT)
            yield connection.default_channel
