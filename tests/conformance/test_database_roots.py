"""Checkpoint rows as roots of the snapshot store, on every database: what is forgotten, and what the log says."""

from dataclasses import replace

import pytest
from tests.unit.db.scene import NOW, Scene, new_scene

from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import NotFound
from torpor.core.events import Event, Kind
from torpor.core.retention import Reason, RetentionPolicy
from torpor.db import calls, checkpoints, log, roots, sessions, verify
from torpor.db.database import Database, Transaction

ONE = RetentionPolicy(keep_last=1, keep_hourly=0, keep_daily=0)


async def commit_some(scene: Scene, count: int) -> list[Checkpoint]:
    def work(tx: Transaction) -> list[Checkpoint]:
        return [
            checkpoints.commit(tx, **scene.owner, checkpoint=scene.checkpoint(number, 2), wall_ns=NOW)
            for number in range(count)
        ]

    return await scene.write(work)


async def retain(scene: Scene, policy: RetentionPolicy = ONE, **more: object) -> tuple[int, ...]:
    return await scene.write(lambda tx: roots.retain(tx, **scene.owner, policy=policy, wall_ns=NOW, **more))


async def numbers(scene: Scene) -> list[int]:
    return [root.number for root in await scene.read(roots.list_roots) if root.session_id == scene.session_id]


async def last_event(scene: Scene) -> Event:
    return (await scene.read(lambda tx: log.events(tx, scene.session_id)))[-1]


async def test_retention_forgets_rows_and_says_which(scene: Scene) -> None:
    await commit_some(scene, 5)
    assert await retain(scene) == (1, 2, 3)
    assert await numbers(scene) == [0, 4]
    event = await last_event(scene)
    assert (event.kind, event.data) == (Kind.CHECKPOINT_FORGOTTEN, {"numbers": [1, 2, 3], "reason": "retention"})
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_nothing_to_forget_leaves_no_event(scene: Scene) -> None:
    await commit_some(scene, 2)
    before = await last_event(scene)
    assert await retain(scene) == ()
    assert await last_event(scene) == before


async def test_few_can_wait_until_there_are_more(scene: Scene) -> None:
    await commit_some(scene, 5)
    assert await retain(scene, at_least=4) == ()
    assert await numbers(scene) == [0, 1, 2, 3, 4]
    assert await retain(scene, at_least=3) == (1, 2, 3)


async def test_pinned_and_used_checkpoints_stay(scene: Scene) -> None:
    points = await commit_some(scene, 6)
    await scene.write(lambda tx: roots.pin(tx, **scene.owner, number=2, is_pinned=True, wall_ns=NOW))
    assert await retain(scene, in_use=[points[3].snapshot_id]) == (1, 4)
    assert await numbers(scene) == [0, 2, 3, 5]
    await scene.write(lambda tx: roots.pin(tx, **scene.owner, number=2, is_pinned=False, wall_ns=NOW))
    assert (await last_event(scene)).data == {"number": 2, "pinned": False}
    assert await retain(scene) == (2, 3)


async def test_a_checkpoint_that_is_not_there_cannot_be_pinned(scene: Scene) -> None:
    with pytest.raises(NotFound) as refused:
        await scene.write(lambda tx: roots.pin(tx, **scene.owner, number=7, is_pinned=True, wall_ns=NOW))
    assert refused.value.code == "checkpoint_not_found"


async def test_a_checkpoint_that_another_session_came_from_stays(database: Database, scene: Scene) -> None:
    parent = (await commit_some(scene, 4))[2]
    child = await new_scene(database)
    copied = replace(child.checkpoint(0, 2), snapshot_id=parent.snapshot_id)
    await child.write(lambda tx: checkpoints.commit(tx, **child.owner, checkpoint=copied, wall_ns=NOW))
    plan = await scene.read(lambda tx: roots.plan(tx, scene.session_id, ONE))
    assert plan.kept[2] is Reason.FORKED
    assert await retain(scene) == (1,)


async def test_the_newest_one_that_surely_restores_stays(scene: Scene) -> None:
    """All newer ones were cut amid one long answer: if the node dies now, each of them would need a reset."""

    def work(tx: Transaction) -> None:
        call_id = scene.send(tx)
        head = sessions.get(tx, scene.session_id).head_seq
        for number, taken in enumerate([0, 0, 5, 10, 15]):
            point = scene.checkpoint(number, head, call_id)
            streams = tuple(replace(stream, taken=taken) for stream in point.open_streams)
            checkpoints.commit(tx, **scene.owner, checkpoint=replace(point, open_streams=streams), wall_ns=NOW)

    await scene.write(work)
    assert await retain(scene) == (2, 3)
    open_call = (await scene.read(lambda tx: calls.load_calls(tx, scene.session_id)))[0].call_id
    await scene.write(lambda tx: calls.complete(tx, **scene.owner, call_id=open_call, usage={}, wall_ns=NOW))
    assert await retain(scene) == (1,)


async def test_damaged_rows_are_given_up_by_name_only(scene: Scene) -> None:
    await commit_some(scene, 3)
    damaged = (await scene.read(roots.list_roots))[1]
    await scene.write(lambda tx: roots.forget_damaged(tx, **scene.owner, roots=[damaged], wall_ns=NOW))
    assert await numbers(scene) == [0, 2]
    assert (await last_event(scene)).data == {"numbers": [1], "reason": "damaged"}


async def test_a_moved_checkpoint_names_the_new_snapshot_and_the_log_holds(scene: Scene) -> None:
    points = await commit_some(scene, 2)
    move = scene.move(points[0])
    stale = replace(scene.move(points[1]), seen_id=move.snapshot_id)
    moved = await scene.write(lambda tx: roots.move(tx, **scene.owner, moves=[move, stale], wall_ns=NOW))
    assert [(point.number, point.snapshot_id, point.manifest_digest) for point in moved] == [
        (0, move.snapshot_id, move.manifest_digest)
    ]
    assert [root.snapshot_id for root in await scene.read(roots.list_roots)] == [
        move.snapshot_id,
        points[1].snapshot_id,
    ]
    assert (await last_event(scene)).kind is Kind.CHECKPOINT_REPACKED
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []
    again = scene.move(moved[0])
    await scene.write(lambda tx: roots.move(tx, **scene.owner, moves=[again], wall_ns=NOW))
    assert await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id)) == []


async def test_a_row_that_was_moved_behind_the_logs_back_is_found(scene: Scene) -> None:
    points = await commit_some(scene, 2)
    move = scene.move(points[0])
    await scene.write(lambda tx: roots.move(tx, **scene.owner, moves=[move], wall_ns=NOW))
    back = {"checkpoint_id": move.checkpoint_id, "seen_snapshot_id": move.snapshot_id}
    old = {"snapshot_id": points[0].snapshot_id, "manifest_digest": points[0].manifest_digest}
    await scene.write(lambda tx: tx.run("checkpoint/move_fenced", **scene.owner, **back, **old))
    found = await scene.read(lambda tx: verify.verify_chain(tx, scene.session_id))
    assert [problem.code for problem in found] == ["checkpoint_changed"]
