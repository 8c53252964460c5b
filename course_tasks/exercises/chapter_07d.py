"""The exercises of chapter 07d."""

import json
import re
import textwrap
from collections.abc import Callable, Mapping
from contextvars import copy_context

from course_tasks.correlation import HEADER, correlation_id
from course_tasks.exercises import Exercise, Question, called
from course_tasks.exercises.project import Project

IMPORT = "from course_tasks.correlation import correlation_id, new_id\n"
NOT_IT = {
    "order": "order succeeded, because it only had to send the others.",
    "charge": "charge succeeded, as its line says. Eve has even paid.",
    "pack": "pack has no line, because a chord does not send its last task when another task has failed. Which one?",
}


def _failed(answer: tuple | list) -> str | None:
    if len(answer) != 2 or not isinstance(answer[0], str):
        return "it takes two texts: the name of a task, and the name of an exception's class."
    task, error = answer
    if isinstance(error, type):  # the class itself says as much as its name
        error = error.__name__
    if task in NOT_IT:
        return NOT_IT[task]
    if task != "reserve":
        return f"the shop has no task {task!r}."
    if error == "ChordError":
        return "ChordError says what became of the chord. Another line says what the task itself raised."
    return None if error == "LookupError" else f"the task is right, but it did not raise {error!r}."


def _outgoing(answer: Callable) -> str | None:
    for current in ("eve-9", "ada-7", None):
        context = copy_context()
        context.run(correlation_id.set, current)
        said = called(context.run, answer)
        if not isinstance(said, Mapping):
            return f"it returns {type(said).__name__}, and should return a dictionary."
        found = {str(name).lower(): value for name, value in said.items()}
        if HEADER in found:
            return f"{HEADER} is the header of Celery's messages. What does a web service look for?"
        if current is None and "x-request-id" in found:
            return f"with no current request it returns {dict(said)}, and should not return this header."
        if current and "x-request-id" not in found:
            return f"with the id {current!r} it returns {dict(said)}. The service looks for X-Request-ID."
        if current and found["x-request-id"] != current:
            return f"with the id {current!r} it returns {dict(said)}. That is another id."
    return None


# Runs a web service with uvicorn, sends it requests, and prints the answers and what was logged.
TRY = """
import json, logging, sys, threading, time
sys.path.insert(0, "")
import httpx, uvicorn
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append([record.getMessage(), getattr(record, "request_correlation_id", None)])
logging.root.addHandler(Keep())
logging.root.setLevel(logging.INFO)
import service
sends = service.client.send_task
def send(name, *args, **options):
    if "zoe" in str((args, options)):
        raise RuntimeError("the shop is closed")
    return sends(name, *args, **options)
service.client.send_task = send
from web import app
server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off"))
thread = threading.Thread(target=server.run, daemon=True)
thread.start()
while not server.started and thread.is_alive():
    time.sleep(0.01)
port = server.servers[0].sockets[0].getsockname()[1]
answers = []
with httpx.Client(trust_env=False, timeout=10) as client:
    for customer, id in (("ada", "ada-7"), ("ben", "ben-8"), ("dan", None), ("eve", "eve] 9")):
        headers = {"X-Request-ID": id} if id else {}
        answer = client.post(f"http://127.0.0.1:{port}/orders/{customer}", headers=headers)
        answers.append([customer, answer.status_code, answer.headers.get_list("X-Request-ID")])
    client.post(f"http://127.0.0.1:{port}/orders/zoe", headers={"X-Request-ID": "zoe-1"})
server.should_exit = True
thread.join(5)
print(json.dumps([answers, records]))
"""


def _keeps_ids(folder: str) -> str | None:
    with Project(folder) as project:
        answers, records = project.loaded(TRY, "web.py")
        messages = [json.loads(message)["headers"] for message in project.broker.lrange("shop", 0, -1)]
    for customer, status, ids in answers:
        if status != 200 or len(ids) != 1:
            return f"the order of {customer} was answered with the status {status} and {len(ids)} headers X-Request-ID."
    if len(messages) != len(answers):
        return f"{len(answers)} orders came in, and {len(messages)} messages are in the queue."
    seen = set()
    for (customer, _, [id]), headers in zip(answers, reversed(messages), strict=True):
        given = {"ada": "ada-7", "ben": "ben-8"}.get(customer, id)
        if id != given:
            return f"the request had the id {given}, and its answer has {id!r}."
        if not FIT.fullmatch(id) or id in seen:
            return f"the order of {customer} came without a good id, and was answered with {id!r}. new_id makes one."
        seen.add(id)
        if headers.get(HEADER) != id:
            return f"the message about the order of {customer} has {headers.get(HEADER)!r} as its id."
        for what, text in (
            ("own line", f"an order of {customer}"),
            ("line about the answer", f'"POST /orders/{customer} '),
        ):
            found = [of for line, of in records if text in line]
            if not found:
                return f"the log has no line with {text.strip()!r}."
            if len(found) > 1:
                return f"the log has {len(found)} lines with {text.strip()!r}. One of them should not be there."
            if found != [id]:
                return f"the {what} of {customer}'s request has the id {found[0]!r}, and the answer has {id!r}."
    crashed = [of for line, of in records if "Exception in ASGI application" in line]
    if not crashed:
        return "if the service crashes, the log doesn't say so any more. Let the exception pass through the middleware."
    if crashed != ["zoe-1"]:
        return f"if the service crashes, the line above the traceback has {crashed[0]!r} instead of the request's id."
    return None


FIT = re.compile(r"\w[\w.-]{0,63}", re.ASCII)


def _web(body: str, app: str = "BaseHTTPMiddleware(routes, with_id)", more: str = "") -> str:
    """A cell that writes web.py with another middleware."""
    return f"""%%writefile scratch/ben/web.py
{more}
from course_tasks.correlation import correlation_id, new_id
from service import order
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route

async def with_id(request, call_next):
{textwrap.indent(textwrap.dedent(body).strip(), "    ")}

routes = Starlette(routes=[Route("/orders/{{customer}}", order, methods=["POST"])])
app = {app}
"""


SET = 'correlation_id.set(new_id(request.headers.get("X-Request-ID")))\n'
ANSWER = 'response = await call_next(request)\nresponse.headers["X-Request-ID"] = {}\n'
PLAIN = """
class WithId:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        correlation_id.set(id := new_id(given))

        async def answer(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"X-Request-ID", id.encode())]
            await send(message)

        await self.app(scope, receive, answer)
"""


def _careful(instead: str) -> str:
    """A cell that writes web.py with a middleware that does something when the service crashes."""
    call = "await self.app(scope, receive, answer)"
    careful = f"try:\n            {call}\n        except Exception:\n            {instead}"
    return _web("pass", app="WithId(routes)").replace("\napp = ", f"{PLAIN.replace(call, careful)}\n\napp = ")


EXERCISES = {
    "07d-1": Exercise(
        kind=(tuple, list),
        judge=_failed,
        wrong={
            'answer = ("pack", "LookupError")': "pack has no line",
            'answer = ("charge", "LookupError")': "charge succeeded",
            'answer = ("reserve", "ChordError")': "what became of the chord",
            'answer = ("reserve", "no lamp left")': "did not raise 'no lamp left'",
            'answer = ("ship", "LookupError")': "the shop has no task",
        },
        right=(
            'answer = ["reserve", LookupError]',
            'answer = tuple("reserve LookupError".split())',
        ),
    ),
    "07d-2": Exercise(
        kind=Callable,
        judge=_outgoing,
        wrong={
            f"{IMPORT}current = correlation_id.get()\n"
            "answer = lambda: {'X-Request-ID': current} if current else {}": "The service looks for X-Request-ID",
            f'{IMPORT}answer = lambda: {{"X-Request-ID": correlation_id.get()}}': "should not return this header",
            f'{IMPORT}answer = lambda: {{"X-Request-ID": new_id()}} if correlation_id.get() else {{}}': (
                "That is another id"
            ),
            f"{IMPORT}answer = lambda: {{'request_correlation_id': correlation_id.get()}}": (
                "the header of Celery's messages"
            ),
            'answer = {"X-Request-ID": "eve-9"}': "should be a function",
        },
        right=(
            f"{IMPORT}import httpx\n\n"
            "def answer():\n"
            "    headers = httpx.Headers({'User-Agent': 'shop'})\n"
            "    if (current := correlation_id.get()) is not None:\n"
            "        headers['x-request-id'] = current\n"
            "    return headers",
            f"{IMPORT}answer = lambda: {{name: id for name in ['X-Request-ID'] if (id := correlation_id.get())}}",
        ),
    ),
    "07d-3": Exercise(
        kind=str,
        judge=_keeps_ids,
        project="scratch/ben",
        wrong={
            _web(
                f"{SET}try:\n    {ANSWER.format('correlation_id.get()').strip().replace(chr(10), chr(10) + '    ')}\n"
                "    return response\nfinally:\n    correlation_id.set(None)"
            ): "line about the answer of ada's request has the id '-'",
            _web("correlation_id.set(new_id())\n" + ANSWER.format("correlation_id.get()") + "return response"): (
                "the request had the id ada-7"
            ),
            _web(
                'correlation_id.set(request.headers.get("X-Request-ID", "none"))\n'
                + ANSWER.format("correlation_id.get()")
                + "return response"
            ): "was answered with 'eve] 9'",
            _web(SET + "return await call_next(request)"): "0 headers X-Request-ID",
            _web(SET + ANSWER.replace("await ", "").format("correlation_id.get()") + "return response"): "status 500",
            _careful("correlation_id.set(None)\n            raise"): "the line above the traceback has '-'",
            _careful("pass"): "the log doesn't say so any more",
            "%%writefile scratch/ben/web.py\ndef with_id(": "`web.py` ended with an error: SyntaxError",
            _web(ANSWER.format('new_id(request.headers.get("X-Request-ID"))') + SET + "return response"): (
                "the message about the order of ada has None"
            ),
        },
        right=(
            _web("pass", app="WithId(routes)").replace("\napp = ", f"{PLAIN}\n\napp = "),
            _web(
                'id = new_id(request.headers.get("X-Request-ID"))\n'
                "copy_context().run(correlation_id.get)\ncorrelation_id.set(id)\n"
                + ANSWER.format("id")
                + "return response",
                more="from contextvars import copy_context",
            ),
        ),
    ),
}

QUIZ = {
    "07d-1": Question(
        right="d",
        wrong={
            "a": "the search looks for the id, and the id is the same on both machines.",
            "b": "the worker does log later, but `sort` knows only the times that it finds in the lines.",
            "c": "`sort` compares text, and the lines of both logs begin with a time in the same format.",
        },
    ),
    "07d-2": Question(
        right="b",
        wrong={
            "a": "the bracket would end the id's place in a line, and the rest would look like a message.",
            "c": "`new_id` accepts ASCII letters only, and `ë` isn't one.",
            "d": "a blank separates the parts of a line, so only a part of this id would be read as the id.",
        },
    ),
    "07d-3": Question(
        right="a",
        wrong={
            "b": "`ada-7` is a perfectly ordinary id. A pattern that refuses it would also refuse Ada's own request.",
            "c": "HTTPS protects a request on its way. The sender can still write any id into it.",
            "d": "a task sees only the id, and it is the same for both of them.",
        },
    ),
    "07d-4": Question(
        right=(
            "X-Request-ID",
            "the header X-Request-ID",
            "the X-Request-ID header",
            "X-Request-ID header",
            "X-Request-ID:",
        ),
        wrong={
            "request_correlation_id": "this is the header of Celery's messages. A web service looks for another one.",
            "correlation_id": "this is the name of the variable. Which header does the middleware `with_id` read?",
            "X-Correlation-ID": "other services use this name. Which header does the middleware `with_id` read?",
            "traceparent": "this is the header of OpenTelemetry. Which header does the middleware `with_id` read?",
            "HEADER": (
                "this is the name of a constant, for the header of Celery's messages. A web service looks for "
                "another one."
            ),
        },
        otherwise="look at the middleware `with_id`. Which header does it read?",
    ),
}
