"""Live views for the chapters: `BrokerView` shows what waits in queues, `Journey` one task's way through the system."""

from course_tasks.classroom.broker_view import BrokerView
from course_tasks.classroom.journey import Journey

__all__ = ["BrokerView", "Journey"]
