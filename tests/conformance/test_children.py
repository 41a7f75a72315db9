"""Children in the database: bound once, their end looked up, their spending the parent's."""

from collections.abc import Callable
from typing import TypeVar

import pytest
from tests.unit.db.scene import NOW, Scene, acquire, new_scene

from torpor.core.errors import Conflict
from torpor.core.ids import SessionId, new_session_id
from torpor.core.money import Account
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import budgets, calls, children, sessions, sleeping, waitpoints
from torpor.db.children import OnCancel
from torpor.db.database import Database, Transaction

T = TypeVar("T")


async def begin(parent: Scene, on_cancel: OnCancel = OnCancel.CANCEL) -> tuple[SessionId, Waitpoint]:
    """A child as `Recorder.begin_child` binds it."""

    def work(tx: Transaction) -> tuple[SessionId, Waitpoint]:
        child_id = new_session_id(NOW)
        sessions.create(tx, session_id=child_id, name=None, spec={}, wall_ns=NOW)
        kin = {"kind": WaitpointKind.CHILD, "call_id": None, "data": {"child": child_id}}
        point = waitpoints.create(tx, **parent.owner, **kin, wall_ns=NOW)
        bound = {"child_id": child_id, "waitpoint_id": point.waitpoint_id, "on_cancel": on_cancel}
        children.add(tx, **parent.owner, **bound)
        return child_id, point

    return await parent.write(work)


async def end(parent: Scene, child_id: SessionId, exit_status: int) -> None:
    """As the child's own node does."""

    def work(tx: Transaction) -> None:
        owner = {"session_id": child_id, "owner_token": acquire(tx, child_id, seen_token=0)}
        sessions.set_status(tx, **owner, status=SessionStatus.RUNNING, wall_ns=NOW)
        ended = SessionStatus.FAILED if exit_status else SessionStatus.SUCCEEDED
        sessions.set_status(tx, **owner, status=ended, wall_ns=NOW, exit_status=exit_status)

    await parent.write(work)


async def seen(parent: Scene, look: Callable[[Transaction], T]) -> T:
    return await parent.read(look)


async def test_a_child_is_due_and_its_end_resolves_its_waitpoint(scene: Scene) -> None:
    child_id, point = await begin(scene)
    assert [session.session_id for session in await seen(scene, lambda tx: sleeping.list_due(tx, NOW))] == [child_id]
    assert await seen(scene, lambda tx: children.parent_of(tx, child_id)) == scene.session_id
    settle = lambda tx: children.settle(tx, **scene.owner, point=point, wall_ns=NOW)  # noqa: E731
    assert (await scene.write(settle)).is_open
    await end(scene, child_id, 3)
    assert await seen(scene, lambda tx: children.has_ended(tx, point))
    assert (await scene.write(settle)).resolution == {"status": "failed", "exit_status": 3}


async def test_a_forgotten_child_resolves_too(scene: Scene) -> None:
    child_id, point = await begin(scene)
    await scene.write(lambda tx: sessions.forget(tx, session_id=child_id, owner_token=0))
    settled = await scene.write(lambda tx: children.settle(tx, **scene.owner, point=point, wall_ns=NOW))
    assert settled.resolution == {"status": "forgotten", "exit_status": None}


async def test_a_session_that_was_run_becomes_nobodys_child(scene: Scene, database: Database) -> None:
    other = await new_scene(database)
    await other.write(lambda tx: sessions.set_status(tx, **other.owner, status=SessionStatus.RUNNING, wall_ns=NOW))
    bound = {"child_id": other.session_id, "waitpoint_id": "wp_1", "on_cancel": OnCancel.CANCEL}
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: children.add(tx, **scene.owner, **bound))
    assert refused.value.code == "child_not_new"


async def test_a_fork_of_the_parent_waits_for_the_same_child_and_has_it_not(scene: Scene, database: Database) -> None:
    child_id, point = await begin(scene)

    def fork(tx: Transaction) -> Scene:
        fork_id = new_session_id(NOW)
        parent = sessions.Parent(session_id=scene.session_id, seq=1)
        sessions.create(tx, session_id=fork_id, name=None, spec={}, wall_ns=NOW, parent=parent)
        made = Scene(database=database, session_id=fork_id, owner_token=acquire(tx, fork_id, seen_token=0))
        kept = {"kind": point.kind, "call_id": None, "data": point.data, "waitpoint_id": point.waitpoint_id}
        waitpoints.create(tx, **made.owner, **kept, wall_ns=NOW)
        for status in (SessionStatus.RUNNING, SessionStatus.HIBERNATING):
            sessions.set_status(tx, **made.owner, status=status, wall_ns=NOW)
        assert sleeping.fall_asleep(tx, **made.owner, cut_seq=10**9, at_latest=None, wall_ns=NOW)
        return made

    made = await scene.write(fork)
    await end(scene, child_id, 3)
    assert (await made.read(lambda tx: sessions.get(tx, made.session_id))).wake_ns == sleeping.NOW
    own = await made.read(lambda tx: waitpoints.find(tx, made.session_id, point.waitpoint_id))
    assert own is not None
    settled = await made.write(lambda tx: children.settle(tx, **made.owner, point=own, wall_ns=NOW))
    assert settled.resolution == {"status": "failed", "exit_status": 3}
    assert await made.read(lambda tx: children.list_of(tx, made.session_id)) == []


async def test_a_parent_that_sleeps_is_due_when_its_child_has_ended(scene: Scene) -> None:
    child_id, _ = await begin(scene)

    def sleep(tx: Transaction) -> bool:
        for status in (SessionStatus.RUNNING, SessionStatus.HIBERNATING):
            sessions.set_status(tx, **scene.owner, status=status, wall_ns=NOW)
        return sleeping.fall_asleep(tx, **scene.owner, cut_seq=10**9, at_latest=None, wall_ns=NOW)

    assert await scene.write(sleep)
    before = await seen(scene, lambda tx: sessions.get(tx, scene.session_id))
    await end(scene, child_id, 0)
    after = await seen(scene, lambda tx: sessions.get(tx, scene.session_id))
    assert (before.wake_ns, after.wake_ns) == (sleeping.WHEN_RESOLVED, sleeping.NOW)


async def test_a_parent_that_sleeps_is_due_when_its_child_is_forgotten(scene: Scene) -> None:
    child_id, _ = await begin(scene)

    def sleep(tx: Transaction) -> bool:
        for status in (SessionStatus.RUNNING, SessionStatus.HIBERNATING):
            sessions.set_status(tx, **scene.owner, status=status, wall_ns=NOW)
        return sleeping.fall_asleep(tx, **scene.owner, cut_seq=10**9, at_latest=None, wall_ns=NOW)

    assert await scene.write(sleep)
    await scene.write(lambda tx: sessions.forget(tx, session_id=child_id, owner_token=0))
    after = await seen(scene, lambda tx: sessions.get(tx, scene.session_id))
    assert after.wake_ns == sleeping.NOW


async def test_a_parent_does_not_fall_asleep_over_a_child_that_has_ended(scene: Scene) -> None:
    child_id, _ = await begin(scene)
    await end(scene, child_id, 0)

    def sleep(tx: Transaction) -> bool:
        for status in (SessionStatus.RUNNING, SessionStatus.HIBERNATING):
            sessions.set_status(tx, **scene.owner, status=status, wall_ns=NOW)
        return sleeping.fall_asleep(tx, **scene.owner, cut_seq=10**9, at_latest=None, wall_ns=NOW)

    assert not await scene.write(sleep)


async def test_what_a_child_spends_is_the_parents(scene: Scene, database: Database) -> None:
    child_id, _ = await begin(scene)

    def spend(tx: Transaction) -> None:
        tx.run("budget/set_limit_fenced", **scene.owner, budget_nanousd=100, wall_ns=NOW)
        token = acquire(tx, child_id, seen_token=0)
        child = Scene(database=database, session_id=child_id, owner_token=token)
        sent = child.intend(tx).call_id
        calls.mark_sent(tx, **child.owner, call_id=sent, wall_ns=NOW, reserved_nanousd=30)

    await scene.write(spend)
    expected = Account(limit=100, spent=0, reserved=30)
    for session_id in (scene.session_id, child_id):
        assert await seen(scene, lambda tx, session_id=session_id: budgets.account(tx, session_id)) == expected
    stranger = await new_scene(database)
    assert await seen(scene, lambda tx: budgets.account(tx, stranger.session_id)) == Account(
        limit=None, spent=0, reserved=0
    )
    with pytest.raises(Conflict) as refused:
        await scene.write(lambda tx: budgets.add(tx, session_id=child_id, owner_token=1, amount_nanousd=1, wall_ns=NOW))
    assert refused.value.code == "budget_shared"
