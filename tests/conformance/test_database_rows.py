"""What the rows of a session promise, on every database: status, lease, checkpoints, redo sets and output."""

import pytest
from tests.unit.db.scene import NOW, Scene, acquire, new_scene

from torpor.core.errors import Conflict, InvalidInput, NotFound
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import NodeId, new_session_id
from torpor.core.redo import RedoSet, entry_of
from torpor.core.session import SessionStatus
from torpor.db import calls, checkpoints, log, outputs, redo, sessions, verify
from torpor.db.database import Database, Transaction, open_database
from torpor.testing.clock import FakeClock

# --- sessions -----------------------------------------------------------------------------------------------------


async def test_session_is_found_by_id_name_or_unique_prefix(database: Database) -> None:
    one, other = await new_scene(database, "one"), await new_scene(database)
    for text in (one.session_id, "one", one.session_id[:-1], one.session_id[4:-1]):
        assert (await database.read(lambda tx, text=text: sessions.find(tx, text))).session_id == one.session_id
    with pytest.raises(InvalidInput, match="several ids"):
        await database.read(lambda tx: sessions.find(tx, one.session_id[:8]))
    for text in ("nobody", "", "ses_", "%", "one "):
        with pytest.raises((NotFound, InvalidInput)):
            await database.read(lambda tx, text=text: sessions.find(tx, text))
    listed = await database.read(sessions.list_newest)
    assert {session.session_id for session in listed} == {one.session_id, other.session_id}


async def test_name_is_taken_once(database: Database) -> None:
    await new_scene(database, "mine")
    with pytest.raises(Conflict, match="another session has this name"):
        await new_scene(database, "mine")
    await new_scene(database)
    await new_scene(database)
    assert len(await database.read(sessions.list_newest)) == 3


@pytest.mark.parametrize("name", ["", "ses_x", "a b", "a/b", "x" * 64, "é", "a\n"])
async def test_malformed_name_is_refused(database: Database, name: str) -> None:
    with pytest.raises(InvalidInput):
        await new_scene(database, name)


async def test_status_follows_the_table_and_is_logged(scene: Scene) -> None:
    for status in (SessionStatus.RUNNING, SessionStatus.SUCCEEDED):
        await scene.write(
            lambda tx, status=status: sessions.set_status(
                tx, **scene.owner, status=status, wall_ns=NOW, reason="why", exit_status=3
            )
        )
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: sessions.set_status(tx, **scene.owner, status=SessionStatus.RUNNING, wall_ns=NOW))
    assert refused.value.code == "session_transition_refused"
    session = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    assert (session.status, session.exit_status) == (SessionStatus.SUCCEEDED, 3)
    last = (await scene.read(lambda tx: log.events(tx, scene.session_id)))[-1]
    assert last.data == {"from": "running", "to": "succeeded", "reason": "why", "exit_status": 3}


async def test_lease_names_the_owner_until_it_is_released(scene: Scene) -> None:
    session = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    assert session.lease is not None
    assert (session.lease.owner_token, session.lease.node_id, session.lease.pid) == (1, "node_1", 1)
    owned = await scene.read(lambda tx: sessions.list_of_node(tx, NodeId("node_1")))
    assert owned == [session]
    await scene.write(lambda tx: sessions.release(tx, **scene.owner, wall_ns=NOW))
    session = await scene.read(lambda tx: sessions.get(tx, scene.session_id))
    assert (session.lease, session.owner_token) == (None, 1)
    assert await scene.write(lambda tx: acquire(tx, scene.session_id, seen_token=1)) == 2


async def test_incarnations_only_rise(scene: Scene) -> None:
    await scene.write(lambda tx: sessions.set_incarnation(tx, **scene.owner, incarnation=2, wall_ns=NOW))
    for number in (1, 2):
        with pytest.raises(Conflict, match="not new"):
            await scene.write(
                lambda tx, number=number: sessions.set_incarnation(tx, **scene.owner, incarnation=number, wall_ns=NOW)
            )
    last = (await scene.read(lambda tx: log.events(tx, scene.session_id)))[-1]
    assert (last.kind, last.incarnation) == (Kind.INCARNATION_STARTED, 2)


async def test_cursor_stays_within_the_log(scene: Scene) -> None:
    for seq in (0, 3):
        with pytest.raises(Conflict, match="not in its log"):
            await scene.write(lambda tx, seq=seq: sessions.set_cursor(tx, **scene.owner, cursor_seq=seq))


async def test_forgotten_session_leaves_no_row(database: Database) -> None:
    kept, gone = await new_scene(database), await new_scene(database)

    def fill(tx: Transaction, scene: Scene) -> None:
        call_id = scene.answer(tx, b"x", body=b'{"messages":["%s"]}' % (b"same" * 300))
        scene.send(tx)
        head = sessions.get(tx, scene.session_id).head_seq
        checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(0, head), wall_ns=NOW)
        redo.store(tx, **scene.owner, incarnation=0, redo=RedoSet([entry_of(calls.load_call(tx, call_id))]))
        outputs.append_output(tx, **scene.owner, channel=1, incarnation=0, position=0, data=b"x", wall_ns=NOW)

    for scene in (kept, gone):
        await scene.write(lambda tx, scene=scene: fill(tx, scene))
    await gone.write(lambda tx: sessions.forget(tx, **gone.owner), durable=True)
    assert [session.session_id for session in await database.read(sessions.list_newest)] == [kept.session_id]
    assert await database.read(lambda tx: log.events(tx, gone.session_id)) == []
    assert await database.read(lambda tx: calls.load_calls(tx, gone.session_id)) == []
    assert await database.read(lambda tx: outputs.read(tx, gone.session_id, 1)) == b""
    assert await database.read(lambda tx: verify.verify_chain(tx, kept.session_id)) == []


async def test_missing_session_is_not_found(database: Database) -> None:
    with pytest.raises(NotFound):
        await database.read(lambda tx: sessions.get(tx, new_session_id(NOW)))


# --- checkpoints --------------------------------------------------------------------------------------------------


async def test_checkpoint_comes_back_as_it_was_committed(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        call_id = scene.send(tx)
        head = sessions.get(tx, scene.session_id).head_seq
        point = checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(0, head, call_id), wall_ns=NOW)
        assert point.committed_seq == head + 1
        assert checkpoints.get(tx, point.checkpoint_id) == point
        assert checkpoints.list_intact(tx, scene.session_id) == [point]
        event = log.events(tx, scene.session_id)[-1]
        assert (event.kind, event.seq) == (Kind.CHECKPOINT_COMMITTED, point.committed_seq)

    await scene.write(work)
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_checkpoint_that_fails_leaves_neither_row_nor_event(scene: Scene) -> None:
    with pytest.raises(Conflict) as refused:
        await scene.write(
            lambda tx: checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(0, 99), wall_ns=NOW)
        )
    assert refused.value.code == "checkpoint_refused"
    assert (await scene.read(lambda tx: sessions.get(tx, scene.session_id))).head_seq == 2


async def test_checkpoint_numbers_rise(scene: Scene) -> None:
    await scene.write(lambda tx: checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(1, 2), wall_ns=NOW))
    for number in (0, 1):
        with pytest.raises(Conflict):
            await scene.write(
                lambda tx, number=number: checkpoints.commit(
                    tx, **scene.owner, checkpoint=scene.checkpoint(number, 2), wall_ns=NOW
                )
            )


async def test_damaged_checkpoint_is_no_longer_offered(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        points = [
            checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(number, 2), wall_ns=NOW)
            for number in range(3)
        ]
        first, second, _ = (point.checkpoint_id for point in points)
        checkpoints.mark_damaged(tx, **scene.owner, checkpoint_id=second, damage="a pack is gone")
        checkpoints.forget(tx, **scene.owner, checkpoint_id=first)
        assert checkpoints.list_intact(tx, scene.session_id) == [points[2]]
        assert checkpoints.list_damaged(tx, scene.session_id) == {second: "a pack is gone"}
        with pytest.raises(NotFound):
            checkpoints.forget(tx, **scene.owner, checkpoint_id=first)

    await scene.write(work)


# --- the redo set -------------------------------------------------------------------------------------------------


async def test_redo_entry_is_consumed_once_and_only_by_its_incarnation(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        ids = [scene.answer(tx, b"x"), scene.answer(tx, b"y"), scene.send(tx)]
        entries = [entry_of(calls.load_call(tx, call_id)) for call_id in ids]
        stored = RedoSet(entries[:1], joinable=entries[1:2], attached=entries[2:])
        redo.store(tx, **scene.owner, incarnation=1, redo=stored)
        with pytest.raises(Conflict, match="no more"):
            redo.consume(tx, **scene.owner, incarnation=1, call_id=ids[0])
        sessions.set_incarnation(tx, **scene.owner, incarnation=1, wall_ns=NOW)
        redo.consume(tx, **scene.owner, incarnation=1, call_id=ids[0])
        with pytest.raises(Conflict, match="no more"):
            redo.consume(tx, **scene.owner, incarnation=1, call_id=ids[0])
        loaded = redo.load(tx, scene.session_id, 1)
        assert (loaded.pending, loaded.joinable, loaded.attached) == ((ids[0],), (ids[1],), (ids[2],))
        assert loaded.consumed == {ids[0]}
        sessions.set_incarnation(tx, **scene.owner, incarnation=2, wall_ns=NOW)
        with pytest.raises(Conflict, match="no more"):
            redo.consume(tx, **scene.owner, incarnation=1, call_id=ids[1])

    await scene.write(work)


async def test_redo_set_is_stored_once(scene: Scene) -> None:
    def work(tx: Transaction) -> None:
        call = calls.load_call(tx, scene.answer(tx, b"x"))
        for _ in range(2):
            redo.store(tx, **scene.owner, incarnation=1, redo=RedoSet([entry_of(call)]))

    with pytest.raises(Conflict) as refused:
        await scene.write(work)
    assert refused.value.code == "row_conflict"


async def test_redo_set_holds_calls_of_its_own_session_only(database: Database) -> None:
    mine, theirs = await new_scene(database), await new_scene(database)
    call_id = await theirs.write(lambda tx: theirs.answer(tx, b"x"))
    call = await theirs.read(lambda tx: calls.load_call(tx, call_id))
    with pytest.raises(Conflict):
        await mine.write(lambda tx: redo.store(tx, **mine.owner, incarnation=1, redo=RedoSet([entry_of(call)])))


# --- output -------------------------------------------------------------------------------------------------------


async def say(scene: Scene, incarnation: int, position: int, data: bytes, channel: int = 1) -> None:
    await scene.write(
        lambda tx: outputs.append_output(
            tx,
            **scene.owner,
            channel=channel,
            incarnation=incarnation,
            position=position,
            data=data,
            wall_ns=NOW,
        )
    )


async def begin(scene: Scene, incarnation: int) -> None:
    await scene.write(lambda tx: sessions.set_incarnation(tx, **scene.owner, incarnation=incarnation, wall_ns=NOW))


async def test_later_incarnation_supersedes_output_from_its_first_byte(scene: Scene) -> None:
    await say(scene, 0, 0, b"hello ")
    await say(scene, 0, 6, b"world, how are you")
    await begin(scene, 1)
    await say(scene, 1, 8, b"XX")
    await begin(scene, 2)
    await begin(scene, 3)
    await say(scene, 3, 7, b"o")
    await say(scene, 3, 8, b"!")
    await say(scene, 3, 9, b"err", channel=2)

    def check(tx: Transaction) -> None:
        assert outputs.read(tx, scene.session_id, 1) == b"hello wo!"
        assert outputs.read(tx, scene.session_id, 1, 4) == b"o wo!"
        assert outputs.read(tx, scene.session_id, 1, 100) == b""
        assert outputs.high_water(tx, scene.session_id, 1) == 9
        assert outputs.high_water(tx, scene.session_id, 2) == 12
        found = outputs.pieces(tx, scene.session_id, 1, 2, limit_bytes=5)
        assert [(piece.position, piece.incarnation, piece.data) for piece in found] == [
            (2, 0, b"llo "),
            (6, 0, b"w"),
        ]

    await scene.read(check)


async def test_output_has_no_gaps(scene: Scene) -> None:
    await say(scene, 0, 0, b"hello")
    for incarnation, position in ((0, 4), (0, 6), (1, 5)):
        with pytest.raises(Conflict) as refused:
            await say(scene, incarnation, position, b"x")
        assert refused.value.code == "output_refused"
    await begin(scene, 1)
    with pytest.raises(Conflict):
        await say(scene, 1, 6, b"x")
    with pytest.raises(Conflict):
        await say(scene, 0, 5, b"x")
    await say(scene, 1, 5, b"!")
    assert await scene.read(lambda tx: outputs.read(tx, scene.session_id, 1)) == b"hello!"


@pytest.mark.parametrize("rows", [63, 64, 65, 128])
async def test_each_row_of_output_is_read_once_however_many_there_are(scene: Scene, rows: int) -> None:
    """They are read 64 at a time: after a full lot there may be nothing more."""

    def fill(tx: Transaction) -> None:
        for at in range(0, 4 * rows, 4):
            outputs.append_output(
                tx, **scene.owner, channel=1, incarnation=0, position=at, data=b"%03d\n" % (at // 4), wall_ns=NOW
            )

    await scene.write(fill)
    whole = b"".join(b"%03d\n" % number for number in range(rows))
    for start in (0, 2, 4 * rows - 1, 4 * rows):
        assert await scene.read(lambda tx, start=start: outputs.read(tx, scene.session_id, 1, start)) == whole[start:]


async def test_long_output_is_read_from_the_middle(scene: Scene) -> None:
    def fill(tx: Transaction) -> None:
        for at in range(0, 3000, 10):
            outputs.append_output(
                tx, **scene.owner, channel=1, incarnation=0, position=at, data=b"%09d\n" % at, wall_ns=NOW
            )

    await scene.write(fill)
    whole = b"".join(b"%09d\n" % at for at in range(0, 3000, 10))
    for start in (0, 5, 1280, 2999, 3000):
        assert await scene.read(lambda tx, start=start: outputs.read(tx, scene.session_id, 1, start)) == whole[start:]


async def test_events_of_one_append_share_one_fate(scene: Scene) -> None:
    bad = EventDraft(kind=Kind.STREAM_RESET, incarnation=0, data={"not json": object()})
    good = EventDraft(kind=Kind.STREAM_RESET, incarnation=0)
    with pytest.raises(TypeError):
        await scene.write(lambda tx: log.append(tx, **scene.owner, drafts=[good, bad], wall_ns=NOW))
    assert (await scene.read(lambda tx: sessions.get(tx, scene.session_id))).head_seq == 2


# --- calls ---------------------------------------------------------------------------------------------------------


async def test_call_of_another_session_is_not_found(database: Database) -> None:
    mine, theirs = await new_scene(database), await new_scene(database)
    call_id = await theirs.write(theirs.send)
    with pytest.raises(NotFound):
        await mine.write(lambda tx: calls.tear(tx, **mine.owner, call_id=call_id, wall_ns=NOW))
    with pytest.raises(Conflict):
        await mine.write(lambda tx: mine.add_chunks(tx, call_id, b"x"))


async def test_closed_database_refuses(database_url: str) -> None:
    database = await open_database(database_url, clock=FakeClock())
    await database.close()
    await database.close()
    with pytest.raises(Conflict) as refused:
        await database.write(lambda tx: None, durable=False)
    assert refused.value.code == "database_closed"
    with pytest.raises(Conflict):
        await database.read(lambda tx: None)


async def test_rows_are_there_after_reopening(database_url: str) -> None:
    first = await open_database(database_url, clock=FakeClock())
    scene = await new_scene(first, "mine")
    await first.close()
    second = await open_database(database_url, clock=FakeClock())
    found = await second.read(lambda tx: sessions.find(tx, "mine"))
    assert (found.session_id, found.spec) == (scene.session_id, {"argv": ["a\udcff"]})
    await second.close()
