"""What the chapters show: `BrokerView` what waits in queues, `Journey` one task's way, `Gantt` who ran what when."""

from course_tasks.classroom.broker_view import BrokerView
from course_tasks.classroom.gantt import Gantt
from course_tasks.classroom.journey import Journey

__all__ = ["BrokerView", "Gantt", "Journey"]
