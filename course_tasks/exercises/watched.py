"""A Redis client for judges, which sees each request of a learner's function before it is sent."""

import os
from collections.abc import Callable
from typing import Any

from redis import Redis
from redis.connection import Connection, ConnectionPool

from course_tasks.exercises import called

MOST = 100  # requests; a function that sends more would go on without end
PATIENCE = 12  # seconds for an answer, as a function may wait for one on purpose


class Dead(BaseException):
    """Ends a function in the middle of its work, as the end of its process would."""


class Endless(BaseException):
    """Ends a function that never stops."""


class Watched:
    """Gives a learner's function a Redis client, and does something just before one of its requests.

    A request is what goes to the server at once: a command, a whole pipeline, or the call of a script. Requests that
    name none of the keys don't count, such as those of a new connection. The server is the backend, where the
    notebook's own client of the broker would find nothing.

    Args:
        keys: the names that make a request count. They are deleted at the end of the `with` block.

    Attributes:
        server: a client of the same server that nobody watches.
        requests: how many requests the latest call made.
    """

    def __init__(self, *keys: str):
        self._url, self._keys = os.environ["CELERY_RESULT_BACKEND"], keys
        self.server = Redis.from_url(self._url)
        self.requests = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.server.delete(*self._keys)
        self.server.close()

    def call(self, answer: Callable, *args: Any, before: int = 0, do: Callable[[], Any] | None = None) -> Any:
        """Call a function with a client and more arguments.

        Args:
            answer: the function.
            args: what it gets after the client.
            before: the number of the request before which to do something, counted from 1.
            do: what to do then. If nothing is given, the function dies.

        Returns:
            What the function returned.

        Raises:
            WrongAnswer: it raised something. The cause is `Dead` or `Endless` if that was our doing.
        """
        self.requests = 0

        def look(request: bytes) -> None:
            if not any(key.encode() in request for key in self._keys):
                return
            self.requests += 1
            if self.requests > MOST:
                raise Endless
            if before and self.requests == before and do:
                do()
            elif before and self.requests >= before and not do:  # what is dead doesn't clean up either
                raise Dead

        class Looking(Connection):
            def send_packed_command(self, command, check_health=True):
                look(command.encode() if isinstance(command, str) else b"".join(command))
                super().send_packed_command(command, check_health)

        pool = ConnectionPool.from_url(self._url, connection_class=Looking, socket_timeout=PATIENCE)
        with Redis(connection_pool=pool) as broker:
            try:
                return called(answer, broker, *args)
            finally:
                pool.disconnect()
