"""`%servers`: this notebook's broker and backend, and who else works there."""

import contextlib
import os
import shlex
import socket

import psutil

from course_tasks import servers
from course_tasks.classroom.errors import ClassroomError, refuse_words
from course_tasks.classroom.terminal import whose
from course_tasks.jupyter.first_cell import notebook_name

PATIENCE = 1.0  # seconds in which workers have to answer


def show_servers(line: str = "") -> None:
    """Find the broker and the backend, or start them, and print where they are.

    Where the notebook's name is known, it also prints which database the notebook has and what a terminal outside of
    JupyterLab needs to share it. On servers that are not the course's own, where notebooks can't have databases of
    their own, it prints which workers answer already.

    Args:
        line: what follows the magic; it takes nothing.

    Raises:
        ClassroomError: there are no usable servers, or the line has words in it.
    """
    refuse_words("servers", line)
    name = notebook_name()
    os.environ["COURSE_NOTEBOOK"] = name  # for the terminal cells: see `whose`
    try:
        pair = servers.ensure(name)
    except servers.ServerError as error:
        raise ClassroomError(str(error)) from None
    print(f"broker:  {servers.without_secrets(pair.broker)}\nbackend: {servers.without_secrets(pair.backend)}")
    if pair.notice:
        print(pair.notice)
    if pair.script and name:
        database = pair.broker.rpartition("/")[2]
        print(f"Database {database} belongs to {name} alone.")
        print("To use it in a terminal outside JupyterLab, or opened before, type this there:")
        print(f". {shlex.quote(pair.script)}")
    if not pair.script and (answering := _workers(pair.broker)):
        print("These workers already use this broker, and they may take this notebook's tasks:", *answering, sep="\n  ")
        print("%stop --everywhere stops those that notebooks of this copy of the course have started.")


def _workers(broker: str) -> list[str]:
    """A line for each worker that answers, except for those of this kernel."""
    from celery import Celery  # not in the module: most notebooks have a pair of their own, and don't wait for this

    app = Celery(broker=broker, set_as_current=False)
    limits = {"max_retries": 1, "socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE}
    app.conf.broker_transport_options = limits
    found = []
    try:
        with app.connection_for_write() as connection:  # not the pool's, which would stay open
            answers = app.control.broadcast("stats", reply=True, timeout=PATIENCE, connection=connection)
    except Exception:  # `ensure` has just reached this broker; if it goes away now, the next cell says so
        return []
    for node, stats in sorted((pair for answer in answers for pair in answer.items()), key=lambda pair: pair[0]):
        owner = ""
        with contextlib.suppress(psutil.Error, KeyError, TypeError):  # it has ended, or is another user's
            # the number of a process in a container or on another machine means nothing here
            process = psutil.Process(stats["pid"] if node.endswith(f"@{socket.gethostname()}") else None)
            if os.getpid() in (parent.pid for parent in process.parents()):
                continue
            owner = whose(process)
        found.append(f"{node}: {owner or 'not from this copy of the course'}")
    return found
