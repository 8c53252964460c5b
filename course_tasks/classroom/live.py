"""What the chapters show: `BrokerView` what waits in queues, `Journey` one task's way, `Gantt` who ran what when,
`Experiment` what a choice of pool and tasks comes to, and `Trail` one request's way through the logs."""

from course_tasks.classroom.broker_view import BrokerView
from course_tasks.classroom.experiment import Experiment
from course_tasks.classroom.gantt import Gantt
from course_tasks.classroom.journey import Journey
from course_tasks.classroom.trail import Trail

__all__ = ["BrokerView", "Experiment", "Gantt", "Journey", "Trail"]
