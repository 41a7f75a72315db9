"""What every database owes Torpor, whichever it is: atomic functions, one fence, a log without gaps."""

import asyncio
import inspect
import re
import threading
from collections.abc import Awaitable
from types import ModuleType

import pytest
from tests.conformance.fork_rows import FORK_AREAS, fork_arguments
from tests.unit.db.scene import HEAD, NOW, REQUEST_HEAD, Scene, StaleFirst, acquire, new_scene, wrapped_key

from torpor.core.call import CallState
from torpor.core.errors import Conflict, Superseded
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import new_session_id
from torpor.core.redo import RedoSet, entry_of
from torpor.core.retention import RetentionPolicy
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Question, WaitpointKind
from torpor.db import (
    answers,
    blocks,
    budgets,
    calls,
    checkpoints,
    children,
    keys,
    log,
    messages,
    outputs,
    questions,
    redaction,
    redo,
    requests,
    roots,
    sessions,
    sleeping,
    verify,
    waitpoints,
)
from torpor.db.children import OnCancel
from torpor.db.database import Database, Transaction, open_database
from torpor.db.statements import statements
from torpor.testing.clock import FakeClock

NOTE = EventDraft(kind=Kind.OUTPUT_DIFFERED, incarnation=0)


def append(tx: Transaction, scene: Scene, *drafts: EventDraft) -> list[int]:
    return [event.seq for event in log.append(tx, **scene.owner, drafts=drafts or [NOTE], wall_ns=NOW)]


# --- transactions -------------------------------------------------------------------------------------------------


async def test_function_that_fails_leaves_no_row(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        append(tx, scene)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await scene.write(work)
    assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 2
    assert await scene.write(lambda tx: append(tx, scene)) == [3]


async def test_reader_sees_one_state_while_a_writer_commits(scene: Scene) -> None:
    reading, written = threading.Event(), threading.Event()

    def read_twice(tx: Transaction) -> tuple[int, int]:
        before = sessions.get(tx, scene.session_id).head_seq
        reading.set()
        assert written.wait(10)
        return before, len(log.events(tx, scene.session_id))

    async with asyncio.TaskGroup() as tasks:
        seen = tasks.create_task(scene.read(read_twice))
        await asyncio.to_thread(reading.wait, 10)
        await scene.write(lambda tx: append(tx, scene), durable=True)
        written.set()
    assert seen.result() == (2, 2)
    assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 3


async def test_a_write_that_fails_undoes_nothing_of_those_that_waited_with_it(scene: Scene) -> None:
    holding, release = threading.Event(), threading.Event()

    def hold(tx: Transaction) -> None:
        holding.set()
        assert release.wait(10)

    def append_and_fail(tx: Transaction) -> None:
        append(tx, scene)
        raise LookupError("changed its mind")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scene.write(hold))
        await asyncio.to_thread(holding.wait, 10)
        works = [lambda tx: append(tx, scene), append_and_fail, lambda tx: append(tx, scene)]
        waiting = [tasks.create_task(_caught(scene.write(work, durable=True))) for work in works]
        await asyncio.sleep(0)
        release.set()
    first, failed, last = [task.result() for task in waiting]
    assert first == [3]
    assert isinstance(failed, LookupError)
    assert last == [4]
    assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 4


async def _caught(writing: Awaitable[list[int]]) -> list[int] | Exception:
    try:
        return await writing
    except LookupError as error:
        return error


async def test_cancelled_write_that_did_not_start_leaves_no_row(scene: Scene) -> None:
    holding, release = threading.Event(), threading.Event()

    def hold(tx: Transaction) -> None:
        holding.set()
        assert release.wait(10)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(scene.write(hold))
        await asyncio.to_thread(holding.wait, 10)
        queued = tasks.create_task(scene.write(lambda tx: append(tx, scene)))
        await asyncio.sleep(0)
        queued.cancel()
        await asyncio.wait([queued])
        assert queued.cancelled()
        release.set()
    assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 2


async def test_cancelled_write_that_runs_ends_before_the_cancellation_is_delivered(scene: Scene) -> None:
    running, release = threading.Event(), threading.Event()

    def work(tx: Transaction) -> None:
        running.set()
        assert release.wait(10)
        append(tx, scene)

    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(scene.write(work))
        await asyncio.to_thread(running.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        release.set()
        await asyncio.wait([task])
        assert task.cancelled()
    assert len(await scene.read(lambda tx: log.events(tx, scene.session_id))) == 3


# --- the fence ----------------------------------------------------------------------------------------------------

AREAS: list[ModuleType] = [
    *(sessions, log, calls, answers, requests, blocks, checkpoints, roots, redo, outputs, redaction, budgets),
    *(waitpoints, questions, messages, keys, sleeping, children, *FORK_AREAS),
]
WRITERS = {
    f"{area.__name__.rpartition('.')[2]}.{name}": function
    for area in AREAS
    for name, function in inspect.getmembers(area, inspect.isfunction)
    if function.__module__ == area.__name__ and "owner_token" in inspect.signature(function).parameters
    if not name.startswith("_")
}


class Rows:
    """A session in which every writing function has something to write, and the arguments to do so."""

    def __init__(self, tx: Transaction, scene: Scene, writer: str) -> None:
        self.scene = scene
        self.bare = scene.intend(tx).call_id
        tx.run("request/delete_of_session_fenced", **scene.owner)
        output = {"channel": 1, "incarnation": 0, "wall_ns": NOW}
        outputs.append_output(tx, **scene.owner, **output, position=0, data=b"hello")
        self.answered = scene.answer(tx, b"x", b"y")
        self.thick = scene.with_chunks(tx, has_row=True).call_id
        self.packed = scene.with_chunks(tx, has_row=False)
        self.open = scene.send(tx)
        scene.add_chunks(tx, self.open, b"first")
        self.sent = scene.intend(tx).call_id
        calls.mark_sent(tx, **scene.owner, call_id=self.sent, wall_ns=NOW)
        self.intended = scene.intend(tx)
        self.body = requests.prepare(b'{"messages":["new"]}')
        self.request = requests.store(tx, **scene.owner, head=REQUEST_HEAD, body=self.body)
        seq = sessions.get(tx, scene.session_id).head_seq
        for number in (2, 1, 0):  # of three, retention may forget the one in the middle
            point = scene.checkpoint(2 - number, seq, self.open)
            self.checkpoint = checkpoints.commit(tx, **scene.owner, checkpoint=point, wall_ns=NOW)
        redo.store(tx, **scene.owner, incarnation=0, redo=self.redo_set(tx))
        keys.add_tenant(tx, wrapped_key(keys.TENANT))
        tx.run("budget/set_limit_fenced", **scene.owner, budget_nanousd=5, wall_ns=NOW)
        waiting = {"kind": WaitpointKind.BUDGET, "call_id": None, "data": {}}
        waitpoints.wait_on(tx, **scene.owner, **waiting, wall_ns=NOW)
        asking = {"question": Question(text="Go on?"), "due_ns": None, "wall_ns": NOW}
        self.question = questions.ask(tx, **scene.owner, **asking, call_id=self.intended.call_id)
        self.kin = self.question
        if writer == "children.settle":
            kin = {"kind": WaitpointKind.CHILD, "call_id": None, "data": {"child": "ses_gone"}}
            self.kin = waitpoints.create(tx, **scene.owner, **kin, wall_ns=NOW)
        self.bound = {"child_id": new_session_id(NOW), "waitpoint_id": self.question.waitpoint_id}
        sessions.create(tx, session_id=self.bound["child_id"], name=None, spec={}, wall_ns=NOW)
        messages.deliver(tx, **scene.owner, text="first", wall_ns=NOW)
        sessions.set_status(tx, **scene.owner, status=SessionStatus.RUNNING, wall_ns=NOW)
        if writer == "sleeping.fall_asleep":
            sessions.set_status(tx, **scene.owner, status=SessionStatus.HIBERNATING, wall_ns=NOW)
        self.call = scene.new_call()

    def redo_set(self, tx: Transaction) -> RedoSet:
        return RedoSet([entry_of(calls.load_call(tx, self.answered))])

    def arguments(self, tx: Transaction) -> dict[str, dict[str, object]]:
        chunk = calls.Chunk(number=1, offset_ns=1, data=b"z")
        point = self.checkpoint.checkpoint_id
        budget = WaitpointKind.BUDGET
        return {
            **fork_arguments(
                tx, self.scene.session_id, self.answered, opened=self.open, intended=self.intended.call_id
            ),
            "sessions.release": {"wall_ns": NOW},
            "sessions.set_status": {"status": SessionStatus.WAITING, "wall_ns": NOW},
            "sessions.set_incarnation": {"incarnation": 1, "wall_ns": NOW},
            "sessions.set_cursor": {"cursor_seq": 1},
            "sessions.wake_waiting": {},
            "sessions.forget": {},
            "children.add": {**self.bound, "on_cancel": OnCancel.CANCEL},
            "children.settle": {"point": self.kin, "wall_ns": NOW},
            "sleeping.fall_asleep": {"cut_seq": 10**9, "at_latest": None, "wall_ns": NOW},
            "sleeping.set_wake": {"wake_ns": NOW},
            "log.hold": {"wall_ns": NOW},
            "log.append": {"drafts": [NOTE, NOTE], "wall_ns": NOW},
            "calls.intend": {"call": self.call, "head": REQUEST_HEAD, "body": self.body, "wall_ns": NOW},
            "calls.mark_sent": {"call_id": self.intended.call_id, "wall_ns": NOW},
            "calls.note_retry": {"call_id": self.sent, "facts": {"status": 529}, "wall_ns": NOW},
            "calls.record_head": {"call_id": self.sent, "attempt": 1, "head": HEAD, "wall_ns": NOW},
            "calls.append_chunks": {"call_id": self.open, "attempt": 1, "chunks": [chunk]},
            "calls.complete": {"call_id": self.open, "usage": {}, "wall_ns": NOW},
            "calls.fail": {"call_id": self.open, "error": "e", "response": (HEAD, b"sorry"), "wall_ns": NOW},
            "calls.tear": {"call_id": self.open, "wall_ns": NOW},
            "calls.tear_open": {"wall_ns": NOW},
            "calls.doubt": {"call_id": self.open},
            "answers.store": {"packed": self.packed},
            "answers.drop_chunks": {"call_id": self.thick, "attempt": 1, "last": 0},
            "answers.redact": {"call_id": self.answered, "attempt": 1, "masked": b"**"},
            "requests.store": {"head": REQUEST_HEAD, "body": requests.prepare(b"never seen")},
            "requests.attach": {"call_id": self.bare, "request": self.request},
            "blocks.put": {"data": b"block"},
            "blocks.redact": {"digest": self.request.manifest, "masked": b"*"},
            "redaction.apply": {
                "plan": redaction.plan_pattern(tx, self.scene.session_id, re.compile(b"x|hello|accept")),
                "wall_ns": NOW,
            },
            "budgets.admit": {"call_id": self.intended.call_id, "needed_nanousd": 10, "wall_ns": NOW},
            "budgets.add": {"amount_nanousd": 1, "wall_ns": NOW},
            "waitpoints.wait_on": {"kind": budget, "call_id": self.intended.call_id, "data": {}, "wall_ns": NOW},
            "waitpoints.create": {"kind": WaitpointKind.TIMER, "call_id": self.sent, "wall_ns": NOW},
            "waitpoints.wait": {"kind": budget, "wall_ns": NOW},
            "questions.ask": {"call_id": self.sent, "question": Question(text="?"), "due_ns": None, "wall_ns": NOW},
            "questions.answer": {"waitpoint_id": self.question.waitpoint_id, "text": "yes", "wall_ns": NOW},
            "waitpoints.resolve": {"point": self.question, "resolution": {}, "wall_ns": NOW},
            "messages.deliver": {"text": "to it", "wall_ns": NOW},
            "messages.take": {"call_id": self.sent},
            "messages.send": {"call_id": self.sent, "text": "from it", "wall_ns": NOW},
            "waitpoints.resolve_all": {"kind": budget, "resolution": {}, "wall_ns": NOW},
            "checkpoints.commit": {"checkpoint": self.scene.checkpoint(3, self.checkpoint.seq), "wall_ns": NOW},
            "checkpoints.insert": {"checkpoint": self.scene.checkpoint(3, self.checkpoint.seq)},
            "checkpoints.mark_damaged": {"checkpoint_id": point, "damage": "a pack is gone"},
            "checkpoints.forget": {"checkpoint_id": point},
            "roots.bring": {"checkpoint": self.scene.checkpoint(3, self.checkpoint.seq), "wall_ns": NOW},
            "roots.retain": {"policy": RetentionPolicy(keep_last=1, keep_hourly=0, keep_daily=0), "wall_ns": NOW},
            "roots.forget_damaged": {"roots": roots.list_roots(tx)[:1], "wall_ns": NOW},
            "roots.pin": {"number": self.checkpoint.number, "is_pinned": True, "wall_ns": NOW},
            "roots.move": {"moves": [self.scene.move(self.checkpoint)], "wall_ns": NOW},
            "redo.store": {"incarnation": 1, "redo": self.redo_set(tx)},
            "keys.add_session": {"key": wrapped_key(self.scene.session_id)},
            "redo.consume": {"incarnation": 0, "call_id": self.answered},
            "outputs.append_output": {"channel": 1, "incarnation": 0, "position": 5, "data": b" you", "wall_ns": NOW},
        }


@pytest.mark.parametrize("name", sorted(WRITERS))
async def test_stale_token_cannot_write(scene: Scene, name: str) -> None:
    rows = await scene.write(lambda tx: Rows(tx, scene, name))
    await scene.write(lambda tx: acquire(tx, scene.session_id, seen_token=scene.owner_token))
    head = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    with pytest.raises(Superseded) as refused:
        await scene.write(lambda tx: WRITERS[name](tx, **scene.owner, **rows.arguments(tx)[name]))
    assert refused.value.code == "owner_superseded"
    assert await scene.read(lambda tx: sessions.get(tx, scene.session_id)) == head


@pytest.mark.parametrize("name", sorted(WRITERS))
async def test_each_statement_checks_the_token_itself(scene: Scene, name: str) -> None:
    def work(tx: Transaction) -> None:
        rows = Rows(tx, scene, name)
        guarded = StaleFirst(tx)
        WRITERS[name](guarded, **scene.owner, **rows.arguments(tx)[name])
        assert guarded.tried

    await scene.write(work)


async def test_every_fenced_statement_was_tried(scene: Scene) -> None:
    tried: set[str] = set()

    def work(tx: Transaction, name: str) -> None:
        rows = Rows(tx, scene, name)
        guarded = StaleFirst(tx)
        WRITERS[name](guarded, **scene.owner, **rows.arguments(tx)[name])
        tried.update(guarded.tried)
        raise UndoneError

    for name in WRITERS:
        with pytest.raises(UndoneError):
            await scene.write(lambda tx, name=name: work(tx, name))
    assert {name for name in statements() if name.endswith("_fenced")} <= tried


class UndoneError(Exception):
    """Rolls a transaction back."""


@pytest.mark.parametrize("name", sorted(WRITERS))
async def test_deleted_session_cannot_be_written(scene: Scene, name: str) -> None:
    rows = await scene.write(lambda tx: Rows(tx, scene, name))
    arguments = await scene.read(rows.arguments)
    await scene.write(lambda tx: sessions.forget(tx, **scene.owner))
    with pytest.raises(Superseded):
        await scene.write(lambda tx: WRITERS[name](tx, **scene.owner, **arguments[name]))


def test_each_writing_statement_is_fenced_by_name_and_text() -> None:
    unfenced = {
        *("session/insert_session", "session/acquire_if_unchanged"),
        # No node's: they change what wraps a key, for all sessions at once.
        *("key/insert_tenant_if_absent", "key/rewrap_tenant_if_unchanged", "key/rewrap_of_session_if_unchanged"),
    }
    for name, text in statements().items():
        if name.startswith(("search/", "transfer/insert_")):
            continue  # the index is nobody's; a session that is being imported is no node's
        words = [line for line in text.splitlines() if not line.startswith("--")]
        if words[0].split()[0] in {"INSERT", "UPDATE", "DELETE"} and name not in unfenced:
            assert name.endswith("_fenced") or name == "log/hold_head", name
            assert "owner_token = :owner_token" in text, name


async def test_of_two_acquirers_that_saw_the_same_token_one_wins(database: Database) -> None:
    scene = await new_scene(database)
    token = await database.write(lambda tx: acquire(tx, scene.session_id, seen_token=1), durable=True)
    assert token == 2
    with pytest.raises(Superseded):
        await database.write(lambda tx: acquire(tx, scene.session_id, seen_token=1), durable=True)


# --- the log ------------------------------------------------------------------------------------------------------


async def test_no_gaps_under_two_writers(database_url: str) -> None:
    one, other = (
        await open_database(database_url, clock=FakeClock()),
        await open_database(database_url, clock=FakeClock()),
    )
    scene = await new_scene(one)

    def read_and_append(tx: Transaction) -> None:
        head = sessions.get(tx, scene.session_id).head_seq
        assert append(tx, scene, NOTE, NOTE) == [head + 1, head + 2]

    async def write_many(database: Database) -> None:
        for _ in range(100):
            await database.write(read_and_append, durable=False)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(write_many(one))
        tasks.create_task(write_many(other))
    events = await one.read(lambda tx: log.events(tx, scene.session_id))
    assert [event.seq for event in events] == list(range(1, 403))
    assert await other.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []
    await one.close()
    await other.close()


async def test_events_are_given_back_as_they_were_appended(scene: Scene) -> None:
    draft = EventDraft(
        kind=Kind.STREAM_RESET,
        incarnation=3,
        data={"text": "é\ud800\0", "list": [1, None, True, {"deep": {}}], "big": 2**63},
        refs=("ab" * 32,),
    )
    appended = await scene.write(lambda tx: log.append(tx, **scene.owner, drafts=[draft, draft], wall_ns=NOW))
    assert await scene.read(lambda tx: log.events(tx, scene.session_id, after_seq=2)) == appended
    assert await scene.read(lambda tx: log.events(tx, scene.session_id, after_seq=2, limit=1)) == appended[:1]


# --- calls --------------------------------------------------------------------------------------------------------


async def test_call_goes_its_way_from_intent_to_answer(scene: Scene) -> None:
    call_id = await scene.write(lambda tx: scene.answer(tx, b"hel", b"lo", body=b'{"messages":[1]}'))
    call = await scene.read(lambda tx: calls.load_call(tx, call_id))
    assert (call.state, call.model, call.usage) == (CallState.ANSWERED, "m\ud800\0", {"input_tokens": 1})
    [attempt] = call.attempts
    assert (attempt.head, attempt.chunk_count, attempt.body_bytes, attempt.finished) == (HEAD, 2, 5, True)
    assert await scene.read(lambda tx: calls.load_calls(tx, scene.session_id)) == [call]
    chunks = await scene.read(lambda tx: calls.load_chunks(tx, call_id, 1, from_number=1))
    assert [chunk.data for chunk in chunks] == [b"lo"]
    assert await scene.read(lambda tx: requests.get_request(tx, call_id)) == (REQUEST_HEAD, b'{"messages":[1]}')
    events = await scene.read(lambda tx: log.events(tx, scene.session_id, after_seq=2))
    assert [event.kind.value for event in events] == [
        "call.intended",
        "call.sent",
        "call.answering",
        "call.completed",
    ]
    assert [event.parent_seq for event in events] == [1, None, None, call.intended_seq]
    session = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    assert session.cursor_seq == call.intended_seq


async def test_torn_call_is_sent_again_as_its_next_attempt(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        call_id = scene.send(tx)
        scene.add_chunks(tx, call_id, b"par", b"tial")
        pumped = scene.send(tx)
        assert calls.tear_open(tx, **scene.owner, pumped=frozenset({pumped}), wall_ns=NOW) == [call_id]
        assert calls.load_call(tx, pumped).state is CallState.SENT
        with pytest.raises(Conflict, match="cannot add chunk"):
            scene.add_chunks(tx, call_id, b"late", first=2)
        assert calls.mark_sent(tx, **scene.owner, call_id=call_id, wall_ns=NOW).number == 2
        with pytest.raises(Conflict, match="cannot add chunk"):
            scene.add_chunks(tx, call_id, b"late", first=2)
        calls.record_head(tx, **scene.owner, call_id=call_id, attempt=2, head=HEAD, wall_ns=NOW)
        scene.add_chunks(tx, call_id, b"whole", attempt=2)
        calls.complete(tx, **scene.owner, call_id=call_id, usage={}, wall_ns=NOW)
        first, second = calls.load_call(tx, call_id).attempts
        assert (first.chunk_count, first.body_bytes, first.finished) == (2, 7, False)
        assert (second.chunk_count, second.body_bytes, second.finished) == (1, 5, True)

    await scene.write(work)
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_failed_call_keeps_the_gateways_own_response(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        denied, cut = scene.intend(tx).call_id, scene.send(tx)
        scene.add_chunks(tx, cut, b"some")
        for call_id in (denied, cut):
            calls.fail(tx, **scene.owner, call_id=call_id, error="denied", response=(HEAD, b"no"), wall_ns=NOW)
        [only] = calls.load_call(tx, denied).attempts
        assert (only.finished, only.body_bytes) == (True, 2)
        first, own = calls.load_call(tx, cut).attempts
        assert (first.finished, own.finished) == (False, True)
        assert [chunk.data for chunk in calls.load_chunks(tx, cut, own.number)] == [b"no"]

    await scene.write(work)
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


@pytest.mark.parametrize("number", [0, 2])
async def test_chunks_have_no_gaps_and_no_doubles(scene: Scene, number: int) -> None:
    call_id = await scene.write(scene.send)
    await scene.write(lambda tx: scene.add_chunks(tx, call_id, b"zero"))
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: scene.add_chunks(tx, call_id, b"other", first=number))
    assert refused.value.code == "chunk_refused"


async def test_call_states_follow_their_table(scene: Scene) -> None:
    answered = await scene.write(lambda tx: scene.answer(tx, b"x"))
    for step in (calls.mark_sent, calls.tear):
        with pytest.raises(Conflict, match="cannot move call"):
            await scene.write(lambda tx, step=step: step(tx, **scene.owner, call_id=answered, wall_ns=NOW))
    with pytest.raises(Conflict, match="cannot move call"):
        await scene.write(lambda tx: calls.complete(tx, **scene.owner, call_id=answered, usage={}, wall_ns=NOW))
    headless = await scene.write(lambda tx: scene.intend(tx).call_id)
    await scene.write(lambda tx: calls.mark_sent(tx, **scene.owner, call_id=headless, wall_ns=NOW))
    with pytest.raises(Conflict, match="no head"):
        await scene.write(lambda tx: calls.complete(tx, **scene.owner, call_id=headless, usage={}, wall_ns=NOW))
