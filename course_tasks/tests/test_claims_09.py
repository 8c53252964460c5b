"""Claims of chapters 09 and on that no cell proves: see test_claims.py."""

import json
import time

import psutil
import pytest
from celery import chain, chord, group
from celery.result import GroupResult

from course_tasks.tests.plugin import logged, node_stats, stands, until

# --- 09 ------------------------------------------------------------------------------------------------------

TILL = """
import os
import time
from celery import Celery
from redis import Redis

app = Celery("till")
if os.environ.get("NO_BACKEND"):
    app.backend_cls = "disabled://"

@app.task(name="price")
def price(item, seconds=0):
    time.sleep(seconds)
    return len(item)

@app.task(name="twice")
def twice(number):
    return 2 * number

@app.task(name="total")
def total(numbers):
    return sum(numbers)

@app.task(name="order")
def order(numbers):
    return numbers

@app.task(name="count")
def count():
    return Redis.from_url(os.environ["CELERY_BROKER_URL"]).incr("counted")

@app.task(name="tell")
def tell(value):
    Redis.from_url(os.environ["CELERY_BROKER_URL"]).rpush("told", value)
"""
WORKER = "celery -A till worker --pool=threads -c 4 --without-mingle --without-gossip"


@pytest.fixture
def till(project):
    (project.folder / "till.py").write_text(TILL)
    return project


def call(client, name, *args, immutable=False, **options):
    return client.signature(name, args=args, immutable=immutable).set(**options)


def test_a_worker_without_the_code_of_the_next_call_cannot_compare_and_a_chain_needs_no_backend(till):
    stands(
        "09",
        "A worker without the code of `clean` can't compare anything. Then `clean` itself fails.",
        "Your client isn't needed any more, and a chain needs no backend.",
    )
    client = till.client()
    unknown = chain(call(client, "price", "milk"), call(client, "clean", queue="other"), app=client).delay()
    till.environment["NO_BACKEND"] = ""
    till.worker(WORKER)
    assert unknown.parent.get(timeout=20) == 4 and till.broker.llen("other") == 1
    till.broker.delete("other")
    till.environment["NO_BACKEND"] = "1"
    till.worker(WORKER.replace("till worker", "till worker -Q bare -n bare@%h"))
    links = [call(client, "price", "milk", queue="bare"), call(client, "twice", queue="bare")]
    chain(*links, call(client, "tell", queue="bare"), app=client).delay()
    until(lambda: till.broker.lrange("told", 0, -1) == [b"8"], "the last call has run")


def test_each_message_of_a_chain_carries_what_is_left(till):
    stands(
        "09",
        "But each of the hundred messages has to carry what is still left.",
        "Over the whole chain that is about 1.4 MB, and with 1000 calls it is more than 100 MB.",
        "The worker that runs `price` takes the rest out of the message and sends it on with the next call.",
    )
    client = till.client()

    def first_message(length: int) -> int:
        chain([call(client, "price", "milk")] + [call(client, "twice", queue="look")] * (length - 1)).delay()
        size = len(till.broker.rpop("celery"))
        return size

    one, hundred = first_message(1), first_message(100)
    step = (hundred - one) / 99
    assert 1.2e6 < sum(one + number * step for number in range(100)) < 1.8e6
    assert sum(one + number * step for number in range(1000)) > 100e6
    till.worker(WORKER)
    chain([call(client, "price", "milk")] + [call(client, "twice", queue="look")] * 99).delay()
    until(lambda: till.broker.llen("look"), "the second message")
    assert abs(len(till.broker.rpop("look")) - (hundred - step)) < 200


def test_what_a_client_sends_of_a_canvas_and_which_parents_its_result_has(till):
    stands(
        "09",
        "For this canvas, the client has sent only one message.",
        "The message for `price` contains everything that comes after it, the group and the body as well.",
        "Celery 5.7 makes the header the parent of the *last* result.",
        "write the same canvas as `chain(header, total.s(), tax.s(20))`. Its tree is complete.",
    )
    client = till.client()
    pair = group(call(client, "twice"), call(client, "twice"))

    def ways(canvas) -> list[str]:
        result, found = canvas.delay(), []
        while result is not None:
            found.append("group" if isinstance(result, GroupResult) else "task")
            result = result.parent
        return found

    total, twice = call(client, "total"), call(client, "twice")
    assert ways(call(client, "price", "milk") | pair | total | twice) == ["task", "task", "group", "task"]
    assert till.broker.llen("celery") == 1
    till.broker.delete("celery")
    header = group(call(client, "price", "milk"), call(client, "price", "bread"))
    assert ways(header | total | twice) == ways(chord(header, total | twice)) == ["task", "group"]
    assert ways(chain(header, total, twice, app=client)) == ["task", "task", "group"]


def test_a_chord_stores_each_result_twice_keeps_the_order_and_counts_a_repeated_task_once(till):
    stands(
        "09",
        "The list is in the order of the header, whichever task is ready first.",
        "every result of the header goes into Redis twice: once as the result of its task, and once for the chord.",
        "so that a task that runs twice is counted once",
    )
    client = till.client()
    slow, quick = call(client, "price", "bread", 1), call(client, "count")
    result = chord([slow, quick], call(client, "order"), app=client).delay()
    [repeated] = [text for text in till.broker.lrange("celery", 0, -1) if b'"count"' in text]
    till.broker.lpush("celery", repeated)
    till.worker(WORKER)
    key = f"celery-taskset-meta-{result.parent.id}"
    until(lambda: till.log().count("succeeded in") == 2, "the quick one has run twice")
    [part] = till.backend.zrange(key + ".j", 0, -1)
    assert json.loads(part)[3] in (1, 2) and result.parent.results[1].result in (1, 2)
    assert result.get(timeout=20) == [5, json.loads(part)[3]]


def test_a_chord_that_has_lost_its_keys_never_starts_its_body(till):
    stands(
        "09",
        "If the backend loses these keys, the body never starts.",
        "Until then there is no message for the body anywhere.",
    )
    stands("09b", "The same happens if the backend loses the chord's keys.")
    client = till.client()
    till.worker(WORKER)
    header = [call(client, "price", "milk"), call(client, "price", "bread", 1)]
    result = chord(header, call(client, "total", queue="look"), app=client).delay()
    key = f"celery-taskset-meta-{result.parent.id}"
    until(lambda: till.backend.zcard(key + ".j"), "the first result is counted")
    assert till.broker.llen("look") == 0
    till.backend.delete(*till.backend.keys(key + "*"))
    assert result.parent.results[1].get(timeout=20) == 5
    call(client, "price", "end").delay().get(timeout=20)
    time.sleep(0.3)
    assert till.broker.llen("look") == 0 and result.state == "PENDING"


def test_one_exception_makes_a_whole_piece_fail_and_its_calls_run_in_one_slot(till):
    stands(
        "09",
        "If one call raises an exception, the whole piece has failed, and the results of its other calls are lost.",
        "Its calls run one after the other in one slot",
        "`celery.starmap`, a task that every worker has",
    )
    client = till.client()

    @client.task(name="price")
    def price(item, seconds=0): ...

    till.worker(WORKER)
    pieces = price.chunks([("milk",), (5,), ("bread",), ("cheese", 0.3), ("bread", 0.3)], 3).delay()
    bad, good = pieces.results
    assert good.get(timeout=20) == [6, 5] and isinstance(bad.get(timeout=20, propagate=False), TypeError)
    logged(till, "succeeded in")
    assert "Task price[" not in till.log()
    seconds = [
        float(line.rpartition(" in ")[2].partition("s:")[0]) for line in till.log().splitlines() if "succeeded" in line
    ]
    assert seconds[0] >= 0.6


# --- 09b -----------------------------------------------------------------------------------------------------


def test_the_worker_that_finds_an_error_runs_the_error_callback_with_three_arguments(project):
    stands(
        "09b",
        "It is called with the request of the failed task, its exception, and the traceback.",
        "The worker that found the error makes this call itself.",
    )
    (project.folder / "press.py").write_text(PRESS)
    project.worker("celery -A press worker --pool=threads -c 1 -n press@%h --without-mingle --without-gossip")
    client = project.client()
    fail = client.signature("fail", app=client)
    fail.apply_async(link_error=client.signature("complain", app=client))
    logged(project, "complaint: fail ValueError str press")


def test_a_worker_forgets_revoked_ids_when_it_is_restarted(project):
    stands(
        "09b",
        "If all of them are restarted before the chain goes on, they have forgotten that it was cancelled.",
    )
    (project.folder / "press.py").write_text(PRESS)
    worker = "celery -A press worker --pool=solo -n {}@%h --without-mingle --without-gossip"
    project.worker(worker.format("one"))
    client = project.client()
    pid = node_stats(client, "one")["pid"]
    client.control.revoke("cancelled", reply=True, timeout=10, limit=1)
    client.control.shutdown()
    until(lambda: not psutil.pid_exists(pid), "the worker ends")
    project.worker(worker.format("two"))
    client.send_task("ok", task_id="cancelled")
    logged(project, "Task ok[cancelled] succeeded")


PRESS = """
from celery import Celery
app = Celery("press")
@app.task(name="fail")
def fail():
    raise ValueError("no text")
@app.task(name="ok")
def ok():
    return "ok"
@app.task(name="complain")
def complain(request, error, traceback):
    where = request.hostname.partition("@")[0]
    print(f"complaint: {request.task} {type(error).__name__} {type(traceback).__name__} {where}")
"""
