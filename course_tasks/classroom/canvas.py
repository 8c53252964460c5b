"""`Canvas`: which tasks a canvas has, which waits for which, and what becomes of each, as text and as a picture."""

import ast
import contextlib
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterable
from operator import itemgetter

from IPython import get_ipython
from IPython.display import display

from course_tasks.classroom.canvas_picture import Part, drawn
from course_tasks.classroom.drawing import image, preformatted
from course_tasks.classroom.listening import FINAL, RETRY, Listener

SHOWN = 30  # tasks, at most; what became of the others is counted
LONG = 60  # letters of a task's arguments, or of its result
ERROR = 100  # letters of an exception
SETTLE = 0.3  # seconds without news after which nothing more is expected: a task may have sent one that nobody planned
INTERVAL = 0.25  # seconds between two pictures while the block is at work
PAUSE = 0.05  # seconds between two looks at whether all is over
NOTHING = {"text/plain": "", "text/html": "<span></span>"}
OVER = FINAL | {"never sent"}
WRAPPER = "ExceptionWithTraceback()"


class Canvas(Listener):
    """Listens while a block sends a canvas, and shows its tasks: one line and one box for each.

    `with Canvas(client) as canvas:` around the sending, then `canvas` as a cell's last expression. The block's end
    waits until every task is over, or for `wait` seconds. In JupyterLab the picture is there as soon as something is
    sent, and follows what happens until the block has ended.

    What is still to be sent is known from the messages that the client sends, as a chain and the body of a chord travel
    in them. All else is known from the events of workers, which are told to send some, as by `Journey`. A task that
    another one has sent, with no plan for it, counts as coming after that one.

    A line has the number of its task, its arguments as far as they are known, the numbers of those that it waits for,
    and what became of it. The order is that of the signatures. There are no times and no ids, so the text is the same
    in every run, as long as the same becomes of each task.

    Args:
        client: the Celery app that the block sends with, on a Redis or Valkey broker.
        wait: seconds that the end of the block waits for the last event, unless it has come.

    Raises:
        ClassroomError: this is no Celery app, its broker does not answer, or the block sent no task.
    """

    def _begin(self) -> None:
        super()._begin()
        self._parts: list[Part] = []
        self._errors: dict[str, str] = {}  # what the backend has, by the task's id

    def __enter__(self) -> "Canvas":
        super().__enter__()
        # JupyterLab says in which cell the code is. A program that runs a notebook doesn't, and it would store this
        # place as an output.
        if (getattr(get_ipython(), "parent_header", None) or {}).get("metadata", {}).get("cellId"):
            place = display(NOTHING, raw=True, display_id=True)
            follows = threading.Thread(target=self._follow, args=[self._over, place], name="canvas-live", daemon=True)
            follows.start()
        return self

    def _follow(self, over: threading.Event, place) -> None:
        """Show the picture until the block is over, and take it away then, as the canvas itself is shown below."""
        shown = None
        while not over.wait(INTERVAL):
            with self._changed:
                parts = self._known()
            if parts and (bundle := self._bundle(parts)) != shown:
                place.update(shown := bundle, raw=True)
        place.update(NOTHING, raw=True)

    def _trouble(self) -> str:
        return "" if self._sent else "A Canvas follows what its block sends, and it has sent no task."

    def _finish(self) -> None:
        news, heard = time.monotonic(), -1
        deadline = news + self._wait
        while True:
            with self._changed:
                self._parts, before, heard = self._known(), heard, len(self._events)
            now = time.monotonic()
            news = now if heard != before else news
            left = self._open(self._parts)
            silent = not self._workers and not heard
            if self._over.is_set() or silent or now > deadline or (not left and now - news > SETTLE):
                break
            self._over.wait(PAUSE)
        if left and not self._note:
            self._note = "No worker runs." if silent else f"Not over after {self._wait:g} s: {_numbers(left)}."

    def _open(self, parts: list[Part]) -> list[int]:
        """The numbers of the tasks that are not over."""
        return [number for number, part in enumerate(parts, start=1) if part.state not in OVER]

    # what was heard

    def _known(self) -> list[Part]:
        """The tasks, in their order, with what became of each up to now."""
        plan = Plan()
        for sent in self._sent:
            plan.message(sent)
        about: dict[str, list[dict]] = {}
        for event in sorted(self._events, key=itemgetter("timestamp")):
            about.setdefault(event["uuid"], []).append(event)
        plan.adopt(about)
        parts: dict[str, Part] = {}
        published = Counter(sent["id"] for sent in self._sent)
        for part in plan.ordered():
            parts[part.id] = part
            before = [parts[id].state for id in part.after if id in parts]
            events = [self._plain(event) for event in about.get(plan.ids.get(part.id, part.id), [])]
            _tell(part, events, published[part.id], before)
        return list(parts.values())

    def _plain(self, event: dict) -> dict:
        """An event, with the backend's error if that is about Celery's own wrapper around an exception.

        It is if the exception wasn't raised by the task, but by what Celery does at its end.
        """
        if event.get("exception") != WRAPPER:
            return event
        if event["uuid"] not in self._errors:
            with contextlib.suppress(Exception):  # with no backend, or one that is away, the wrapper has to do
                meta = self._client.backend.get_task_meta(event["uuid"], cache=False)
                if isinstance(meta["result"], Exception):
                    self._errors[event["uuid"]] = repr(meta["result"])
        return event | {"exception": self._errors.get(event["uuid"], WRAPPER)}

    # what it shows

    def __repr__(self) -> str:
        return self._text(self._parts) if self._parts else self._trouble() or "This Canvas has not ended."

    def _repr_mimebundle_(self, **_) -> dict[str, str]:
        return self._bundle(self._parts) if self._parts else {"text/plain": repr(self)}

    def _text(self, parts: list[Part]) -> str:
        ends = Counter(part.state for part in parts)
        number = len(parts)
        lines = [f"canvas of {number} task{'s' * (number > 1)}: " + _counted(ends)]
        shown = parts[:SHOWN]
        numbers = {part.id: number for number, part in enumerate(parts, start=1)}
        column = [_numbers(sorted(numbers[id] for id in part.after if id in numbers)) for part in shown]
        column = [f"after {text}" if text else "" for text in column]
        rows = [(part.call, after) for part, after in zip(shown, column, strict=True)]
        widths = [max(len(text) for text in texts) for texts in zip(*rows, strict=True)]
        for part, row in zip(shown, rows, strict=True):
            cells = [f"{text:<{width}}" for text, width in zip(row, widths, strict=True) if width]
            lines.append("  ".join([f"{numbers[part.id]:>2}", *cells, part.how]))
        if len(parts) > SHOWN:
            rest = Counter(part.state for part in parts[SHOWN:])
            lines.append(f"and {len(parts) - SHOWN} more: {_counted(rest)}")
        return "\n".join([*lines, self._note] if self._note else lines)

    def _bundle(self, parts: list[Part]) -> dict[str, str]:
        text = self._text(parts)
        alt = "; ".join(re.sub(" +", " ", line.strip()) for line in text.splitlines())
        return {"text/plain": text, "text/html": image(f"A {alt}", drawn(parts[:SHOWN])) + preformatted(text)}


class Plan:
    """The tasks that messages and events tell of, and which waits for which."""

    def __init__(self):
        self.parts: dict[str, Part] = {}  # in the order in which the signatures have them
        self.ids: dict[str, str] = {}  # the real ids of callbacks, which have none before they are sent
        self._callbacks: dict[str, list[tuple[str, str]]] = {}  # of a task: key and name of each

    def message(self, sent: dict) -> None:
        """Add what a message has: its task, the rest of its chain, the body of its chord, its callbacks."""
        headers, (_, _, embed) = sent["headers"], sent["body"]
        # a worker that sends tells of what it sent by events only, so what is here comes from the client
        part = self._add(sent["id"], _call(sent["name"], headers["argsrepr"], headers["kwargsrepr"]), [])
        self._then(part.id, embed.get("callbacks"), embed.get("chord"), embed.get("chain"))

    def _add(self, id: str, call: str, after: Iterable[str]) -> Part:
        part = self.parts.setdefault(id, Part(id, call))
        part.after += [each for each in after if each not in part.after]
        return part

    def _then(self, id: str, callbacks, chord, chain) -> list[str]:
        """Add what follows a task. Returns the ids at its end."""
        for number, signature in enumerate(callbacks or []):
            key = signature["options"].get("task_id") or f"{id}/{number}"
            self._callbacks.setdefault(id, []).append((key, signature["task"]))
            self._signature(signature, [id], key)
        ends = [id]
        for signature in reversed(chain or []):
            ends = self._signature(signature, ends)
        return self._signature(chord, ends) if chord else ends

    def _signature(self, signature: dict, after: list[str], id: str = "") -> list[str]:
        """Add what a signature stands for. Returns the ids of the tasks whose end is its end."""
        kwargs, options = signature["kwargs"], signature.get("options", {})
        match signature.get("subtask_type"):
            case "chain":
                ends = after
                for link in kwargs["tasks"]:
                    ends = self._signature(link, ends)
                return ends
            case "group":
                members = [self._signature(member, after) for member in kwargs["tasks"]]
                return list(itertools.chain(*members))
            case "chord":
                header = kwargs["header"]
                if isinstance(header, dict):
                    header = header["kwargs"]["tasks"]
                members = [self._signature(member, after) for member in header]
                return self._signature(kwargs["body"], list(itertools.chain(*members)))
        call = _planned(signature)
        part = self._add(options.get("task_id") or id or f"{after}/{call}", call, after)
        return self._then(part.id, options.get("link"), options.get("chord"), options.get("chain"))

    def adopt(self, about: dict[str, list[dict]]) -> None:
        """Add the tasks that only events tell of, if they were sent by known ones, and the arguments of all."""
        strangers = {}
        for id, events in about.items():
            for event in events:
                if event["type"] == "task-received":
                    strangers[id] = (event.get("parent_id"), event["name"], _told(event))
                    break
        for key, (_, _, call) in strangers.items():
            if key in self.parts:
                self.parts[key].call = call
        left = {id: told for id, told in strangers.items() if id not in self.parts}
        parents = list(self.parts)
        real: dict[str, str] = {}
        for key in parents:  # it grows
            id = self.ids.get(key, key)
            children = sorted((name, call, child) for child, (parent, name, call) in left.items() if parent == id)
            for name, call, child in children:
                del left[child]
                own = next((own for own, planned in self._callbacks.get(key, []) if planned == name), None)
                if own and own not in real:
                    self._callbacks[key].remove((own, name))
                    self.ids[own] = real[own] = child
                    self.parts[own].call = call
                else:
                    self._add(child, call, [key])
                    parents.append(child)

    def ordered(self) -> list[Part]:
        """The tasks in the order of the signatures, each after those that it waits for."""
        done: dict[str, Part] = {}
        left = dict(self.parts)
        while left:
            ready = (part for part in left.values() if all(id in done or id not in left for id in part.after))
            part = next(ready, None) or next(iter(left.values()))
            done[part.id] = left.pop(part.id)
        return list(done.values())


def _tell(part: Part, events: list[dict], published: int, before: list[str]) -> None:
    """Say what became of a task, from its events and from what became of those that it waits for."""
    kinds = [event["type"][5:] for event in events]
    ends = [event for event in events if event["type"][5:] in FINAL and not event.get("requeue")]
    retries = kinds.count("retried")
    if ends:
        end = ends[-1]
        part.state = part.how = end["type"][5:]
        if part.state == "succeeded":
            part.how += f": {_short(end['result'])}"
        elif part.state == "failed":
            part.how += f": {_short(end['exception'], ERROR)}"
        elif part.state == "revoked" and end.get("expired"):
            part.how += ": it had expired"
    elif kinds:
        last = kinds[-1] if kinds[-1] != "received" or not retries else "retried"
        part.state = {"started": "running", "retried": "waits for a retry"}.get(last, "not started")
        part.how = part.state
        if part.state == "waits for a retry":
            errors = [event["exception"] for event in events if event["type"] == "task-retried"]
            part.how += " after " + _short(RETRY.sub(r"\1", errors[-1]))
    elif published or all(state == "succeeded" for state in before):
        part.state = part.how = "not received"
    elif any(state in OVER - {"succeeded"} for state in before):
        part.state = part.how = "never sent"
    else:
        part.state = part.how = "not sent yet"
    received = list(dict.fromkeys(_told(event) for event in events if event["type"] == "task-received"))
    if published > 1:
        part.how += f" (sent {published} times with the same id)"
    elif len(received) > 1:
        part.call, part.how = received[0], f"replaced by {received[-1]}; {part.how}"
    if retries and part.state != "waits for a retry":
        part.how += f" (after {retries} retr{'y' if retries == 1 else 'ies'})"


def _counted(ends: Counter) -> str:
    """How many tasks ended in each way; those that succeeded come first."""
    order = ["succeeded", "failed", "revoked", "rejected", "never sent"]
    ranks = sorted(ends, key=lambda state: (order.index(state) if state in order else len(order), state))
    return ", ".join(f"{ends[state]} {state}" for state in ranks)


def _numbers(numbers: list[int]) -> str:
    """Numbers in few words, as in "1, 3 to 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _short(text: str, room: int = LONG) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


def _told(event: dict) -> str:
    return _call(event["name"], event["args"], event["kwargs"])


def _call(name: str, args: str, kwargs: str) -> str:
    """A task with arguments, from the texts that messages and events have of these."""
    if name in ("celery.map", "celery.starmap") and (inner := re.search(r"'task': '([^']+)', ", kwargs)):
        return f"{name} of {inner[1]}"
    words = [args.removeprefix("(").removesuffix(")").removesuffix(",")] if args not in ("()", "[]") else []
    if kwargs != "{}":
        with contextlib.suppress(ValueError, SyntaxError):
            pairs = ast.literal_eval(kwargs)
            words += [f"{key}={value!r}" for key, value in pairs.items()]
            kwargs = ""
        words += [f"**{kwargs}"] if kwargs else []
    return f"{name}({_short(', '.join(words))})"


def _planned(signature: dict) -> str:
    """A task that is not sent yet: what it gets from those before is still open."""
    words = [] if signature.get("immutable") else ["…"]
    words += [repr(arg) for arg in signature["args"]]
    words += [f"{key}={value!r}" for key, value in signature["kwargs"].items()]
    return f"{signature['task']}({_short(', '.join(words))})"
