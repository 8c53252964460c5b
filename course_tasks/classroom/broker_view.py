"""`BrokerView`: a pane below a cell with the number of messages in a Redis or Valkey broker, kept up to date."""

import collections
import html
import json
import os
import threading
import time
from dataclasses import dataclass, field

from IPython import get_ipython
from IPython.display import display
from kombu.transport.redis import PRIORITY_STEPS, Channel
from redis import Redis
from redis.exceptions import AuthenticationError, ConnectionError, RedisError, TimeoutError

from course_tasks.classroom.drawing import pane
from course_tasks.classroom.errors import ClassroomError
from course_tasks.servers import without_secrets

INTERVAL = 0.25  # seconds between two looks at the broker
TIMEOUT = 1.0  # seconds until a broker that is silent counts as away
HISTORY = 30  # seconds of it in the pane, one block each
ATTRIBUTED = 1000  # with more unacknowledged messages than that, their queues are not looked up
BLOCKS = " ▁▂▃▄▅▆▇█"
# What kombu adds to a queue's name for the lists of its messages that have priorities; nothing for the first one
PRIORITIES = [f"{Channel.sep}{step}" if step else "" for step in PRIORITY_STEPS]

_showing: dict = {}  # what is shown, by cell and by content; a view that takes the place of another stops it


@dataclass
class Counts:
    """What one look at the broker found; `trouble` is the reason if it found nothing."""

    waiting: dict[str, int] = field(default_factory=dict)
    unacked: dict[str, int] | None = None  # by queue; None: too many to tell, or not as kombu writes them
    total: int = 0  # unacknowledged messages, of all queues of this database
    trouble: str = ""


class BrokerView:
    """How many messages wait in each queue, and how many are with a worker and not acknowledged yet.

    As a cell's last expression it shows a pane, which a thread refreshes four times a second until `stop()`, the end
    of the kernel, or another view in the same cell or of the same queues. It only reads, with one connection that
    is called `broker-view` in the broker's CLIENT LIST, and waits for a broker that is away.

    Redis knows lists, not queues: a worker that takes a message moves it to one hash, `unacked`, which all queues of
    the database share. The messages in there are counted by the routing key they were sent with, and for messages
    sent to a queue by its name that is the queue. What is there with any other key is counted as "elsewhere".

    Args:
        queues: names of queues, at least one; one that does not exist is empty.
        url: of the broker, `redis://...`; by default the environment's CELERY_BROKER_URL.

    Raises:
        ClassroomError: there is no name of a queue or no URL of a Redis or Valkey server.
    """

    def __init__(self, *queues: str, url: str | None = None):
        if not queues or not all(isinstance(queue, str) and queue for queue in queues):
            raise ClassroomError('BrokerView takes names of queues, such as BrokerView("celery").')
        url = os.environ.get("CELERY_BROKER_URL") if url is None else url
        if not url:
            raise ClassroomError("BrokerView finds no CELERY_BROKER_URL: run %servers first, or give it a url=.")
        self.queues = tuple(dict.fromkeys(queues))
        try:
            self.place = without_secrets(url)
            self._server = Redis.from_url(
                url,
                client_name="broker-view",
                decode_responses=True,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
            )
        except (ValueError, AttributeError, TypeError):
            raise ClassroomError(
                "BrokerView reads a URL such as redis://localhost:6379/0, and was given another."
            ) from None
        self._tags: dict[str, str] = {}  # the routing keys of unacknowledged messages, by delivery tag
        self._history = {queue: collections.deque([0] * HISTORY, HISTORY) for queue in self.queues}
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def stop(self) -> None:
        """End the thread and the connection; the pane stays as it is."""
        self._stopped.set()
        if self._thread:
            self._thread.join()  # a look takes TIMEOUT at most
        self._server.close()

    def _ipython_display_(self) -> None:
        cell = (getattr(get_ipython(), "parent_header", None) or {}).get("metadata", {}).get("cellId")
        self.stop()
        for key in [("cell", cell), ("content", self.place, self.queues)]:
            if key in _showing:
                _showing[key].stop()
            if key[1]:
                _showing[key] = self
        for past in self._history.values():
            past.extend([0] * HISTORY)
        bundle = self._bundle(self._look())
        shown = display(bundle, raw=True, display_id=True)
        if "COURSE_RECORDING" not in os.environ:  # a stored output must not depend on when it was taken
            self._stopped.clear()
            self._thread = threading.Thread(target=self._follow, args=[shown, bundle], name="broker-view", daemon=True)
            self._thread.start()

    def _follow(self, shown, drawn: dict[str, str]) -> None:
        block = time.monotonic()
        while not self._stopped.wait(INTERVAL):
            while block + 1 <= time.monotonic():
                block += 1
                for past in self._history.values():
                    past.append(0)
            if (bundle := self._bundle(self._look())) != drawn:
                shown.update(drawn := bundle, raw=True)

    def _look(self) -> Counts:
        """Ask the broker; never raises."""
        try:
            with self._server.pipeline(transaction=False) as pipe:
                for queue in self.queues:
                    for priority in PRIORITIES:
                        pipe.llen(queue + priority)
                pipe.hlen("unacked")
                *lengths, total = pipe.execute()
            steps = len(PRIORITIES)
            waiting = {queue: sum(lengths[at * steps : (at + 1) * steps]) for at, queue in enumerate(self.queues)}
            return Counts(waiting, self._attributed() if total <= ATTRIBUTED else None, total)
        except (ConnectionError, TimeoutError) as error:
            if not isinstance(error, AuthenticationError):
                return Counts(trouble="The broker does not answer. This view goes on as soon as it does.")
            return Counts(trouble=f"The broker refuses: {error}")
        except RedisError as error:
            return Counts(trouble=f"The broker refuses: {error}")

    def _attributed(self) -> dict[str, int] | None:
        """The unacknowledged messages by routing key; each message is read once. None: these are not kombu's."""
        try:
            tags = list(map(str, self._server.hkeys("unacked")))
            if new := [tag for tag in tags if tag not in self._tags]:
                for tag, value in zip(new, self._server.hmget("unacked", new), strict=True):
                    if value is not None:  # None: acknowledged in the meantime
                        self._tags[tag] = json.loads(value)[2]
        except (ValueError, LookupError, TypeError):
            return None
        self._tags = {tag: self._tags[tag] for tag in tags if tag in self._tags}
        return collections.Counter(self._tags.values())

    def _bundle(self, counts: Counts) -> dict[str, str]:
        """The pane as text and as HTML with inline styles only: a notebook that is not trusted yet loses all else."""
        width = max(map(len, self.queues))
        lines, pasts = [], []
        for queue in self.queues if not counts.trouble else ():
            waiting = counts.waiting[queue]
            past = self._history[queue]
            past[-1] = max(past[-1], waiting)
            unacked = "" if counts.unacked is None else f"   {counts.unacked.get(queue, 0):>4} unacked"
            lines.append(f"{queue:<{width}}   {waiting:>4} waiting{unacked}")
            top = max(8, *past)
            pasts.append("".join(BLOCKS[-(-number * 8 // top)] for number in past))
        if counts.trouble:
            lines.append(counts.trouble)
        elif counts.unacked is None:
            lines.append(f"{counts.total} unacked in all queues of this broker's database")
        elif elsewhere := counts.total - sum(counts.unacked.get(queue, 0) for queue in self.queues):
            lines.append(f"{elsewhere} unacked elsewhere in this broker's database")
        title = f"broker {self.place}"
        rows = [html.escape(line) for line in lines]
        for at, drawn in enumerate(pasts):
            rows[at] += f'   <span aria-hidden="true" style="color:#8ab8ff">{drawn}</span>'
        blocks = f" (blocks: waiting in the last {HISTORY} s)"
        heading = f'{html.escape(title)}<span aria-hidden="true" style="font-weight:normal">{blocks}</span>'
        about, style = f"messages in {', '.join(self.queues)}", "line-height:1.5;white-space:pre-wrap"
        shown = pane(heading, "\n".join(rows), about, "status", style)
        return {"text/plain": "\n".join([title, *lines]), "text/html": shown}
