"""The one error that a learner sees from the classroom's own code."""


class ClassroomError(Exception):
    """What went wrong in the classroom, and what to do about it. A notebook shows this text alone, no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def refuse_words(magic: str, line: str) -> None:
    """Raise ClassroomError if a magic that takes no words is given some; a comment is none."""
    if words := line.partition("#")[0].strip():
        raise ClassroomError(f"%{magic} takes nothing, and this says {words!r}. Write it alone in its line.")
