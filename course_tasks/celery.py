"""The course's Celery app: what a producer sends with and what a worker runs."""

from celery import Celery

from course_tasks.servers import urls

# Your own project writes its two addresses here. The course asks `urls` where its servers are, so that a worker in
# any terminal finds them. CELERY_BROKER_URL and CELERY_RESULT_BACKEND, where set, win: Celery sees to that itself.
broker, backend = urls()

# A real project would call correlation.install(app) below. Here chapter 07 does so, in apps of its own, to teach it.
app = Celery("course_tasks", broker=broker, backend=backend, include=["course_tasks.tasks"])

app.conf.update(
    # JSON only, in and out: a pickle message can run any code in whoever reads it.
    accept_content=["json"],
    task_serializer="json",
    result_serializer="json",
    # Times in messages and schedules are in UTC, whatever zone a machine is in.
    enable_utc=True,
    timezone="UTC",
    # Results leave the backend after an hour; Celery's day may fill a small one.
    result_expires=3600,
    # A task that runs is STARTED; else it would stay PENDING, which an unknown id is too.
    task_track_started=True,
    # A silent server is an error within a minute, where Celery would wait for ever (broker) or for many minutes
    # (backend). If the backend is down, `get` gives up after about 4 s, where with Celery's defaults it takes about 19.
    broker_transport_options={"socket_timeout": 5},
    redis_socket_timeout=5,
    result_backend_transport_options={"retry_policy": {"max_retries": 5}},
    # Log lines that fit a terminal: the time without the date, and the first letters of a task's id.
    worker_log_format="[%(asctime)s %(levelname)s] %(message)s",
    worker_task_log_format="[%(asctime)s %(levelname)s] %(task_name)s[%(task_id).8s]: %(message)s",
    worker_log_datefmt="%H:%M:%S",
    worker_task_log_datefmt="%H:%M:%S",
)
