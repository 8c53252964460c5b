"""The one error that a learner sees from the classroom's own code."""


class ClassroomError(Exception):
    """What went wrong in the classroom, and what to do about it. A notebook shows this text alone, no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
