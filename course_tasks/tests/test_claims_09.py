"""Claims of chapters 09 and on that no cell proves: see test_claims.py."""

import json
import re
import time

import psutil
import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError, TaskRevokedError
from celery.exceptions import TimeoutError as ResultTimeout
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

@app.task(name="weigh")
def weigh(item):
    Redis.from_url(os.environ["CELERY_BROKER_URL"], socket_timeout=90).blpop("weighed", 60)
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

@app.task(name="countdown")
def countdown(number):
    if number:
        countdown.delay(number - 1)
    return number

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
    bare = till.client()
    bare.backend_cls = "disabled://"
    links = [call(bare, "price", "milk", queue="bare"), call(bare, "twice", queue="bare")]
    chain(*links, call(bare, "tell", queue="bare"), app=bare).delay()
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
        "write the same canvas as `chain(chord(header, total.s()), tax.s(20))`. Its tree is complete.",
        "(`chain(header, total.s(), tax.s(20))` doesn't help, because Celery makes the same chord of it as before.",
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
    assert ways(chain(header, total, twice)) == ["task", "group"]
    for calls in (1, 2):
        header = group([call(client, "price", "milk")] * calls)
        assert ways(chain(chord(header, total), twice)) == ["task", "task", "group"]
    till.broker.delete("celery")
    till.worker(WORKER)
    assert chain(chord(header, total), twice).delay().get(timeout=20) == 2 * (4 + 4)


def test_a_chord_stores_each_result_twice_keeps_the_order_and_counts_a_repeated_task_once(till):
    stands(
        "09",
        "The list is in the order of the header, whichever task is ready first.",
        "every result of the header goes into Redis twice: once as the result of its task, and once for the chord.",
        "so that a task that runs twice is counted once",
        "Only `.c` is left. It says that the chord is complete, and it disappears after five minutes.",
    )
    client = till.client()
    slow, quick = call(client, "weigh", "bread"), call(client, "count")
    result = chord([slow, quick], call(client, "order"), app=client).delay()
    [repeated] = [text for text in till.broker.lrange("celery", 0, -1) if b'"count"' in text]
    till.broker.lpush("celery", repeated)
    till.worker(WORKER)
    key = f"celery-taskset-meta-{result.parent.id}"
    until(lambda: till.log().count("succeeded in") == 2, "the quick one has run twice")
    [part] = till.backend.zrange(key + ".j", 0, -1)
    assert json.loads(part)[3] in (1, 2) and result.parent.results[1].result in (1, 2)
    till.broker.rpush("weighed", "bread")
    assert result.get(timeout=20) == [5, json.loads(part)[3]]
    until(lambda: till.backend.keys(key + "*") == [f"{key}.c".encode()], "only .c is left")
    assert 200 < till.backend.ttl(f"{key}.c") <= 300


def test_a_chord_that_has_lost_its_keys_never_starts_its_body(till):
    stands(
        "09",
        "If the backend loses these keys, the body never starts.",
        "Until then there is no message for the body anywhere.",
    )
    stands("09b", "The same happens if the backend loses the chord's keys.")
    client = till.client()
    till.worker(WORKER)
    header = [call(client, "price", "milk"), call(client, "weigh", "bread")]
    result = chord(header, call(client, "total", queue="look"), app=client).delay()
    key = f"celery-taskset-meta-{result.parent.id}"
    until(lambda: till.backend.zcard(key + ".j"), "the first result is counted")
    assert till.broker.llen("look") == 0
    till.backend.delete(*till.backend.keys(key + "*"))
    till.broker.rpush("weighed", "bread")
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
        "And you get a list of lists.",
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
    assert price.chunks([("milk",), ("bread",), ("cheese",)], 2).delay().get(timeout=20) == [[4, 5], [6]]


def test_the_results_between_are_in_the_backend_and_a_chord_needs_one(till):
    stands(
        "09",
        "You can't reach the results between, although the backend has them.",
        "A chord needs a backend that works",
    )
    client = till.client()
    till.worker(WORKER)
    header = group(call(client, "price", "milk"), call(client, "price", "bread"))
    assert (header | call(client, "total") | call(client, "twice")).delay().get(timeout=20) == 18
    stored = [json.loads(till.backend.get(key))["result"] for key in till.backend.keys("celery-task-meta-*")]
    assert sorted(stored) == [4, 5, 9, 18]
    with Celery(broker=till.environment["CELERY_BROKER_URL"], set_as_current=False) as bare:
        bare.backend_cls = "disabled://"
        with pytest.raises(NotImplementedError):
            chord([call(bare, "price", "milk")], call(bare, "total"), app=bare).delay()


def test_a_chain_makes_no_chord_of_a_header_with_one_call_but_chord_does(till):
    stands(
        "09",
        "With only one call in the header, this is no chord but a chain, and `total` gets a single number instead of a "
        "list.",
        "Use `chord`, so that it works for a basket with one item, too.",
    )
    client = till.client()
    till.worker(WORKER)
    header, order = group(call(client, "price", "milk")), call(client, "order")
    assert chain(header, order, call(client, "twice")).delay().get(timeout=20) == 8
    assert chord(header, order, app=client).delay().get(timeout=20) == [4]


def test_a_saved_group_is_gone_when_it_is_deleted(till):
    stands("09", "save it in the backend (and delete it when nobody needs it any more)")
    client = till.client()
    prices = group([call(client, "price", "milk"), call(client, "price", "bread")], app=client).delay()
    prices.save()
    assert [each.id for each in client.GroupResult.restore(prices.id)] == [each.id for each in prices]
    prices.delete()
    assert client.GroupResult.restore(prices.id) is None and not till.backend.exists(f"celery-taskset-meta-{prices.id}")


def test_a_task_that_sends_the_next_one_is_the_parent_of_its_result(till):
    stands("09", "you get the first result only, and the others are its `children`")
    client = till.client()
    till.worker(WORKER)
    first = client.send_task("countdown", args=(2,))
    first.get(timeout=20)
    until(lambda: till.log().count("succeeded in") == 3, "all three have run")
    assert [value for _, value in first.collect(timeout=20)] == [2, 1, 0]


# --- 09b -----------------------------------------------------------------------------------------------------


def test_the_worker_that_finds_an_error_runs_the_error_callback_with_three_arguments(project):
    stands(
        "09b",
        "It is called with the request of the failed task, its exception, and the traceback.",
        "the worker that found the error makes this call itself",
    )
    (project.folder / "press.py").write_text(PRESS)
    project.worker("celery -A press worker --pool=threads -c 1 -n press@%h --without-mingle --without-gossip")
    client = project.client()
    fail = client.signature("fail", app=client)
    fail.apply_async(link_error=client.signature("complain", app=client))
    logged(project, "complaint: fail ValueError str press")


@pytest.mark.parametrize("option, end", [("", "Task ok[cancelled] succeeded"), ("--statedb=known", "Discarding")])
def test_a_worker_forgets_revoked_ids_when_it_is_restarted_without_a_file_for_them(project, option, end):
    stands(
        "09b",
        "only in their memory, unless you start them with `--statedb` and the name of a file.",
        "If at some moment none of them is running before the chain goes on, the next ones don't know that it was",
    )
    (project.folder / "press.py").write_text(PRESS)
    worker = f"celery -A press worker --pool=solo -n {{}}@%h --without-mingle --without-gossip {option}"
    project.worker(worker.format("one"))
    client = project.client()
    pid = node_stats(client, "one")["pid"]
    client.control.revoke("cancelled", reply=True, timeout=10, limit=1)
    client.control.shutdown()
    until(lambda: not psutil.pid_exists(pid), "the worker ends")
    project.worker(worker.format("two"))
    client.send_task("ok", task_id="cancelled")
    logged(project, end)


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


@pytest.fixture
def parts(project):
    (project.folder / "parts.py").write_text(PARTS)
    return project


PARTS_WORKER = "celery -A parts worker --pool=threads -c {} --without-mingle --without-gossip"


def test_a_group_goes_on_and_get_raises_an_error_while_another_call_still_runs(parts):
    stands("09b", "A group goes on, and `get` raises an error as soon as it finds one")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(2))
    result = group([call(client, "held", "go"), call(client, "fail", "no")], app=client).delay()
    with pytest.raises(ValueError, match="no"):
        result.get(timeout=60)
    assert not result.results[0].ready()
    parts.broker.set("go", 1)
    assert result.results[0].get(timeout=20) == "held"


def test_an_error_callback_runs_once_wherever_the_chain_fails(parts):
    stands(
        "09b",
        "It is called once for each of them. In the chain, the call is about the task that failed.",
        "`on_error` adds a signature that runs when a part of the canvas fails.",
    )
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    note = call(client, "note")
    links = [call(client, "ok"), call(client, "fail", "no", immutable=True), call(client, "ok")]
    chain(*links, app=client).on_error(note).delay()
    until(lambda: parts.broker.llen("notes"), "a note about the chain")
    call(client, "ok").delay().get(timeout=20)  # it comes after all that the failed task's slot had to do
    assert parts.broker.lrange("notes", 0, -1) == [b"fail ValueError"]
    chord([call(client, "fail", "no"), call(client, "ok")], call(client, "join").on_error(note), app=client).delay()
    until(lambda: parts.broker.llen("notes") >= 2, "a note about the chord")
    call(client, "ok").delay().get(timeout=20)
    assert parts.broker.lrange("notes", 0, -1) == [b"fail ValueError", b"join ChordError"]


def test_an_error_callback_with_one_parameter_is_sent_as_a_task(parts):
    stands("09b", "it is sent as a task, and it gets only the id of the failed task.")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    failed = call(client, "fail", "no").on_error(call(client, "note_id")).delay()
    until(lambda: parts.broker.llen("notes"), "a note about the failed task")
    assert parts.broker.lrange("notes", 0, -1) == [failed.id.encode()]
    logged(parts, "Task note_id[")


def test_each_task_of_a_group_gets_its_error_callback(parts):
    stands("09b", "If three of them fail, it is called three times.")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    header = [call(client, "fail", str(number)) for number in range(3)]
    group([*header, call(client, "ok")], app=client).on_error(call(client, "note")).delay()
    until(lambda: parts.broker.llen("notes") >= 3, "three notes")
    call(client, "ok").delay().get(timeout=20)
    assert parts.broker.lrange("notes", 0, -1) == [b"fail ValueError"] * 3


@pytest.mark.parametrize("backend", ["", "db+sqlite:///{}/results"])
def test_a_chord_asks_a_backend_that_can_t_count_again_and_again(parts, tmp_path, backend):
    stands(
        "09",
        "For a backend that can't count, such as a database, the client also sends the task `celery.chord_unlock`. It "
        "asks again and again whether all are done.",
    )
    client = parts.client()
    if backend:
        client.backend_cls = backend.format(tmp_path)
    chord([call(client, "ok"), call(client, "ok")], call(client, "join"), app=client).delay()
    sent = [json.loads(message)["headers"]["task"] for message in parts.broker.lrange("celery", 0, -1)]
    assert sorted(sent) == ["celery.chord_unlock"] * bool(backend) + ["ok", "ok"]
    if backend:
        parts.environment["CELERY_RESULT_BACKEND"] = backend.format(tmp_path)
        asks = parts.broker.rpop("celery", 3)
        parts.broker.lpush("celery", *(message for message in asks if b"chord_unlock" in message))
        parts.worker(PARTS_WORKER.format(1))
        until(lambda: len(re.findall(r"Task celery.chord_unlock\S+ retry", parts.log())) >= 2, "it asks twice")


def test_a_chord_error_names_the_header_task_that_failed(parts):
    stands("09b", "With the id alone, you get a `ChordError`, which names the page in its text.")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    body = chord([call(client, "ok"), call(client, "fail", "no")], call(client, "join"), app=client).delay()
    with pytest.raises(ChordError, match=body.parent.results[1].id):
        client.AsyncResult(body.id).get(timeout=60)


def test_header_tasks_that_are_acknowledged_late_come_back_after_a_crash(parts):
    stands(
        "09b",
        "Give the header tasks `acks_late=True` and `reject_on_worker_lost=True`, so that they come back",
        "header tasks may run twice",
    )
    client = parts.client()
    parts.worker("celery -A parts worker --pool=prefork -c 1 --without-mingle --without-gossip")
    result = chord([call(client, "dies_once"), call(client, "ok")], call(client, "join"), app=client).delay()
    assert result.get(timeout=60) == "back+ok"
    assert parts.broker.get("tries") == b"2"


def test_revoke_stores_revoked_at_once_and_a_cancelled_link_is_discarded(parts):
    stands(
        "09b",
        "The worker stored `REVOKED` for the other two at once, so a client that waits for the last task gets a "
        "`TaskRevokedError`.",
        "Then the second one was sent, and the worker discarded it",
    )
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    last = chain(call(client, "held", "go"), call(client, "ok"), call(client, "ok"), app=client).delay()
    second = last.parent
    until(lambda: parts.broker.exists("started"), "the first one runs")
    for result in (last, second, second.parent):
        result.revoke()
    until(lambda: last.state == second.state == "REVOKED", "both are stored as revoked")
    with pytest.raises(TaskRevokedError):
        last.get(timeout=20)
    parts.broker.set("go", 1)
    logged(parts, f"Discarding revoked task: ok[{second.id}]")
    assert second.parent.get(timeout=20) == "held"


def test_the_members_of_a_group_behind_a_failed_link_get_no_error(parts):
    stands("09b", "if the chain ends in a group, nobody stores the error for the members of the group.")
    stands(
        "09b",
        "Then `get` waits for ever",
        "the last one gets the error. But if the chain ends in a group, its members get none.",
    )
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    ok, fail = call(client, "ok"), call(client, "fail", "no")
    middle = chain(fail, group([ok, ok]), call(client, "join"), call(client, "twice"), app=client).delay()
    end = chain(fail, group([ok, ok]), app=client).delay()
    until(lambda: end.parent.state == middle.state == "FAILURE", "both chains have failed")
    call(client, "ok").delay().get(timeout=20)
    assert {member.state for member in [*end, *middle.parent.parent]} == {"PENDING"}
    with pytest.raises(ResultTimeout):
        end.get(timeout=1)


def test_nobody_stores_anything_behind_a_revoked_head(parts):
    stands(
        "09b",
        "If you revoke the first task of a chain before it runs, the others are never sent. But unlike after a "
        "failure, nobody stores anything for them.",
    )
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    last = chain(call(client, "ok", countdown=6), call(client, "ok"), call(client, "ok"), app=client).delay()
    last.parent.parent.revoke()
    logged(parts, f"Discarding revoked task: ok[{last.parent.parent.id}]")
    call(client, "ok").delay().get(timeout=20)
    assert last.parent.state == last.state == "PENDING"
    stands("09b", "A client that knows only the last task's id would wait for ever.", "raises `TaskRevokedError`.)")
    with pytest.raises(TaskRevokedError):
        last.get(timeout=5)
    with pytest.raises(ResultTimeout):
        client.AsyncResult(last.id).get(timeout=1)


def test_two_tasks_of_a_frozen_signature_have_one_result(parts):
    stands("09b", "Two tasks ran under one id, so there is only one result in the backend.")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    order = call(client, "ok")
    order.freeze()
    result, _ = order.apply_async(), order.apply_async()
    until(lambda: parts.log().count(f"Task ok[{result.id}] succeeded") == 2, "both have run")
    assert len(parts.backend.keys("celery-task-meta-*")) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "gevent"])
def test_which_pools_obey_a_revoke_of_a_task_that_waits_for_a_free_slot(parts, pool):
    stands(
        "09b",
        "Suppose you revoke a task that a worker has already taken, and that only waits for a free slot. Then a "
        "prefork worker discards it, but with threads or gevent it runs nevertheless.",
    )
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1).replace("threads", pool))
    call(client, "held", "go").delay()
    until(lambda: parts.broker.exists("started"), "the slot is taken")
    waiting = call(client, "ok").delay()
    logged(parts, f"Task ok[{waiting.id}] received")
    waiting.revoke()
    logged(parts, "Tasks flagged as revoked")
    parts.broker.set("go", 1)
    end = "Discarding revoked task: ok[{}]" if pool == "prefork" else "Task ok[{}] succeeded"
    logged(parts, end.format(waiting.id))


def test_nothing_after_replace_runs(parts):
    stands("09b", "| the lines after `replace` don't run |")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))
    assert call(client, "swap").delay().get(timeout=20) == "ok"
    call(client, "ok").delay().get(timeout=20)
    assert not parts.broker.exists("after")


def test_a_chord_in_a_task_s_place_that_fails_leaves_that_task_without_an_end(parts):
    stands(
        "09b", "But if one of the pages fails, only `send` gets the `ChordError`. Nobody stores an end for `chapter`,"
    )
    stands("09b", "and an `on_error` of the chain isn't called.")
    client = parts.client()
    parts.worker(PARTS_WORKER.format(1))

    def error_of(*links) -> tuple:
        last = chain(*links, app=client).on_error(call(client, "note")).delay()
        return last, type(last.get(timeout=20, propagate=False)).__name__

    send, error = error_of(call(client, "swap_chord", "no"), call(client, "ok"))
    assert error == "ChordError"
    _, error = error_of(call(client, "fail", "no"), call(client, "ok"))
    assert error == "ValueError"
    until(lambda: parts.broker.lrange("notes", 0, -1) == [b"fail ValueError"], "one call of on_error")
    assert send.parent.state == "PENDING"


PARTS = """
import os
import signal
import time
from celery import Celery, chord
from redis import Redis
app = Celery("parts")
broker = Redis.from_url(os.environ["CELERY_BROKER_URL"])
@app.task(name="ok")
def ok(*_):
    return "ok"
@app.task(name="fail")
def fail(text):
    raise ValueError(text)
@app.task(name="join")
def join(texts):
    return "+".join(texts)
@app.task(name="note")
def note(request, error, traceback):
    broker.rpush("notes", f"{request.task} {type(error).__name__}")
@app.task(name="note_id")
def note_id(task_id):
    broker.rpush("notes", task_id)
@app.task(name="held")
def held(key):
    broker.set("started", 1)
    while not broker.exists(key):
        time.sleep(0.02)
    return "held"
@app.task(name="dies_once", acks_late=True, reject_on_worker_lost=True)
def dies_once():
    if broker.incr("tries") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "back"
@app.task(name="swap", bind=True)
def swap(self):
    self.replace(ok.s())
    broker.set("after", 1)
@app.task(name="swap_chord", bind=True)
def swap_chord(self, text):
    self.replace(chord([ok.s(), fail.s(text)], join.s()))
"""
