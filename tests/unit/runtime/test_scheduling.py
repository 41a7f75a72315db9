"""Which sessions a node daemon begins, when, how many at a time, and what it does with those that it can't run.

Owners are only told apart here; that they do their work is for the tests with sandboxes.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import cast

import pytest
from tests.unit.db.scene import NOW, Scene, new_scene

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, MachineUnfit
from torpor.core.ids import NodeId, SessionId
from torpor.core.session import SessionStatus
from torpor.db import sessions, sleeping
from torpor.db.database import Database, open_database
from torpor.runtime import scheduling
from torpor.runtime.home import Home
from torpor.runtime.joining import Aside
from torpor.runtime.leasing import Holder, acquire_free_lock
from torpor.runtime.owner import Owner
from torpor.runtime.scheduling import (
    KERNEL_BYTES,
    LOOK_SECONDS,
    NEW_SESSION_BYTES,
    RETRY_SECONDS,
    SPARE_MEMORY_BYTES,
    Scheduler,
    Wish,
)
from torpor.testing.clock import FakeClock

YEAR = 365 * 24 * 3600
SECOND = 1_000_000_000


class Session:
    """Stands for the owner of one session."""

    def __init__(self, stage: "Stage", session_id: SessionId) -> None:
        self._stage = stage
        self._session_id = session_id
        self.begun = asyncio.Event()
        self.over = asyncio.Event()
        self.stays = False
        self.ran = False
        self.tier = None

    async def run(self) -> None:
        self.ran = True
        if self._stage.begin_at_once:
            self.begun.set()
        await self.over.wait()
        await self._stage.set_wake(self._session_id, None)

    async def leave(self, deadline_seconds: float) -> None:
        assert deadline_seconds > 0

    async def retire(self) -> bool:
        if not self.stays:
            self.over.set()
        return not self.stays


class Stage:
    """A scheduler on a real database."""

    def __init__(self, home: Home, database: Database, clock: Clock, idle_seconds_max: float | None) -> None:
        self.home = home
        self.database = database
        self.begin_at_once = True
        self.may_own = asyncio.Event()
        self.may_own.set()
        self.refuse: Exception | None = None
        self.wishes: list[Wish] = []
        self.waits_for: dict[SessionId, asyncio.Event] = {}
        self.owned: dict[SessionId, Session] = {}
        self.changed = asyncio.Event()
        self.scheduler = Scheduler(
            home=home, database=database, clock=clock, own=self._own, starts_max=2, idle_seconds_max=idle_seconds_max
        )

    @contextlib.asynccontextmanager
    async def _own(self, session_id: SessionId, wish: Wish, aside: Aside) -> AsyncGenerator[Owner]:
        self.wishes.append(wish)
        if self.refuse is not None:
            raise self.refuse
        if session_id in self.waits_for:
            async with aside():
                await self.waits_for[session_id].wait()
        await self.may_own.wait()
        self.owned[session_id] = Session(self, session_id)
        self.changed.set()
        yield cast("Owner", self.owned[session_id])

    async def session(self, wake_ns: int | None, **spec: object) -> SessionId:
        scene = await new_scene(self.database, **spec)
        await scene.write(lambda tx: sleeping.set_wake(tx, **scene.owner, wake_ns=wake_ns))
        self.home.session(scene.session_id).mkdir(parents=True)
        return scene.session_id

    async def set_wake(self, session_id: SessionId, wake_ns: int | None) -> None:
        scene = Scene(self.database, session_id, 1)
        await scene.write(lambda tx: sleeping.set_wake(tx, **scene.owner, wake_ns=wake_ns))

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await self.changed.wait()


@contextlib.asynccontextmanager
async def stage(directory: Path, clock: Clock, idle_seconds_max: float | None = None) -> AsyncGenerator[Stage]:
    home = Home(directory)
    home.prepare()
    database = await open_database(home.database_url, clock=clock)
    made = Stage(home, database, clock, idle_seconds_max)
    running = asyncio.ensure_future(made.scheduler.run())
    try:
        yield made
    finally:
        made.scheduler.stop()
        for session in made.owned.values():
            session.begun.set()
        await running
        await database.close()


async def test_only_what_is_due_begins_and_a_sleeper_of_years_when_its_time_comes(scratch: Path) -> None:
    clock = FakeClock(wall_ns=NOW)
    async with stage(scratch, clock) as made:
        running = await made.session(sleeping.NOW)
        due = NOW + 10 * YEAR * SECOND
        sleeper, waiting, stopped = [await made.session(at) for at in (due, sleeping.WHEN_RESOLVED, None)]
        made.scheduler.look()
        await made.until(lambda: set(made.owned) == {running})
        clock.advance(10 * YEAR - 1)
        made.scheduler.look()
        with pytest.raises(Conflict, match="another node has it"):
            await made.scheduler.start(sleeper, Wish())
        clock.advance(1)
        made.scheduler.look()
        await made.until(lambda: set(made.owned) == {running, sleeper})
        assert {waiting, stopped}.isdisjoint(made.owned)


async def test_a_timer_that_comes_while_nothing_happens_is_noticed(scratch: Path) -> None:
    class Hurrying(FakeClock):
        """Each look at the time takes a while."""

        def wall_ns(self) -> int:
            self.advance(0.01)
            return super().wall_ns()

    async with stage(scratch, Hurrying(wall_ns=NOW)) as made:
        sleeper = await made.session(NOW + SECOND // 5)
        made.scheduler.look()
        await made.until(lambda: sleeper in made.owned)
    assert LOOK_SECONDS > 1


async def test_so_many_begin_at_a_time_and_the_next_when_one_lives(scratch: Path) -> None:
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        made.begin_at_once = False
        for _ in range(4):
            await made.session(sleeping.NOW)
        made.scheduler.look()
        await made.until(lambda: len(made.owned) == 2)
        await asyncio.sleep(0)
        assert len(made.scheduler.runs) == 4
        assert len(made.owned) == 2
        next(iter(made.owned.values())).begun.set()
        await made.until(lambda: len(made.owned) == 3)


async def test_who_waits_for_another_session_takes_nobodys_place_and_gets_one_again(scratch: Path) -> None:
    """Two may begin at a time: the two that wait let a third begin, and then wait for its place."""
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        made.begin_at_once = False
        answered = asyncio.Event()
        children = {await made.session(None) for _ in range(3)}
        made.waits_for = dict.fromkeys(children, answered)
        for child in children:
            await made.set_wake(child, sleeping.NOW)
        made.scheduler.look()
        await made.until(lambda: len(made.wishes) == 3)
        others = [await made.session(sleeping.NOW) for _ in range(2)]
        made.scheduler.look()
        await made.until(lambda: set(made.owned) == set(others))
        answered.set()
        await asyncio.sleep(0)
        assert children.isdisjoint(made.owned)
        for number in (3, 4, 5):
            next(one for one in made.owned.values() if not one.begun.is_set()).begun.set()
            await made.until(lambda number=number: len(made.owned) >= number)
        assert children < set(made.owned)


class Memory:
    """What the machine has to spare, and how often somebody asked."""

    def __init__(self, spare_bytes: int) -> None:
        self.spare_bytes = spare_bytes
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        return self.spare_bytes


async def test_a_session_begins_only_with_memory_to_spare_beside_those_that_run(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first begins in any case, since nobody would make room for it; the next when one is over."""
    memory = Memory(SPARE_MEMORY_BYTES + NEW_SESSION_BYTES - 1)
    monkeypatch.setattr(scheduling, "available_memory", memory)
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        for _ in range(3):
            await made.session(sleeping.NOW)
        made.scheduler.look()
        await made.until(lambda: memory.asked >= 2)
        for number in (1, 2):
            assert len(made.owned) == number
            list(made.owned.values())[-1].over.set()
            await made.until(lambda number=number: len(made.owned) > number)
        assert len(made.owned) == 3


async def test_a_new_session_needs_no_more_than_it_may_take(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one begins where others wait; a large limit is not taken for a need."""
    small = 64 << 20
    memory = Memory(SPARE_MEMORY_BYTES + small + KERNEL_BYTES)
    monkeypatch.setattr(scheduling, "available_memory", memory)
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        first = await made.session(sleeping.NOW)
        await made.scheduler.start(first, Wish())
        large = await made.session(sleeping.NOW, memory_bytes_max=1 << 40)
        made.scheduler.look()
        await made.until(lambda: memory.asked >= 1)
        little = await made.session(sleeping.NOW, memory_bytes_max=small)
        made.scheduler.look()
        await made.until(lambda: little in made.owned)
        assert large not in made.owned
        memory.spare_bytes = SPARE_MEMORY_BYTES + NEW_SESSION_BYTES
        made.owned[little].over.set()
        await made.until(lambda: large in made.owned)


async def test_what_a_session_will_need_that_begins_is_not_promised_twice(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for one, and it has not taken it yet."""
    memory = Memory(SPARE_MEMORY_BYTES + NEW_SESSION_BYTES)
    monkeypatch.setattr(scheduling, "available_memory", memory)
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        made.begin_at_once = False
        for _ in range(2):
            await made.session(sleeping.NOW)
        made.scheduler.look()
        await made.until(lambda: memory.asked >= 1)
        assert len(made.owned) == 1
        made.begin_at_once = True
        next(iter(made.owned.values())).begun.set()
        await made.until(lambda: len(made.owned) == 2)


async def test_who_is_being_acquired_when_it_stops_is_let_go_for_the_next(scratch: Path) -> None:
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        made.may_own.clear()
        session = await made.session(sleeping.NOW)
        made.scheduler.look()
        await made.until(lambda: bool(made.wishes))
        made.scheduler.stop()
        made.may_own.set()
    assert not made.owned[session].ran
    due = await open_database(Home(scratch).database_url, clock=FakeClock(wall_ns=NOW))
    assert [found.session_id for found in await due.read(lambda tx: sleeping.list_due(tx, NOW))] == [session]
    await due.close()


async def test_one_that_can_not_begin_is_told_and_tried_again_later_and_later(scratch: Path) -> None:
    clock = FakeClock(wall_ns=NOW)
    async with stage(scratch, clock) as made:
        made.refuse = MachineUnfit("no_staging_space", "cannot stage an image: no room")
        session = await made.session(sleeping.NOW)
        with pytest.raises(Conflict) as refused:
            await made.scheduler.start(session, Wish(let_go=True))
        assert refused.value.code == "no_staging_space"
        for times in (2, 3):

            def has_been_tried(times: int = times) -> bool:
                """Time goes on meanwhile: it may have been tried before the clock moved."""
                clock.advance(RETRY_SECONDS)
                made.scheduler.look()
                return made.scheduler.failures[session].times >= times

            await made.until(has_been_tried)
        await made.until(lambda: not made.scheduler.runs)
        tries = len(made.wishes)
        made.scheduler.look()
        await made.scheduler._database.read(lambda tx: None)
        assert len(made.wishes) == tries
        made.refuse = None
        await made.scheduler.start(session, Wish(boot=True))
        assert made.wishes[0] == Wish(let_go=True)
        assert made.wishes[-1] == Wish(boot=True)
        made.owned[session].over.set()
        await made.until(lambda: not made.scheduler.runs and not made.scheduler.failures)


async def test_another_nodes_session_is_left_to_it(scratch: Path) -> None:
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        session = await made.session(sleeping.NOW)
        other = Holder(node_id=NodeId("node_2"), pid=1, socket=Path("/nowhere"))
        lock = acquire_free_lock(made.home.lock(session), other)
        assert lock is not None
        with pytest.raises(Conflict) as refused:
            await made.scheduler.start(session, Wish())
        assert refused.value.code == "session_not_due"
        lock.release()
        await made.scheduler.start(session, Wish())
        assert session in made.owned


async def test_stop_puts_all_to_sleep_and_leaves_what_can_not_be(scratch: Path) -> None:
    async with stage(scratch, FakeClock(wall_ns=NOW)) as made:
        first, second = [await made.session(sleeping.NOW) for _ in range(2)]
        for session in (first, second):
            await made.scheduler.start(session, Wish())
        made.owned[second].stays = True
    due = made.owned
    assert due[first].over.is_set()
    assert not due[second].over.is_set()
    assert made.scheduler.runs == {}


async def test_it_ends_by_itself_only_when_nothing_will_need_it(scratch: Path) -> None:
    clock = FakeClock(wall_ns=NOW)
    async with stage(scratch, clock, idle_seconds_max=60) as made:
        sleeper = await made.session(sleeping.WHEN_RESOLVED)
        clock.advance(61)
        made.scheduler.look()
        await made.scheduler._looked.wait()
        assert not made.scheduler._stopping
        await made.set_wake(sleeper, None)

        def has_ended() -> bool:
            """It may have read the row before it was changed, and the clock after."""
            clock.advance(61)
            made.scheduler.look()
            return made.scheduler._stopping

        await made.until(has_ended)


async def test_who_ends_is_not_due_any_more(scratch: Path) -> None:
    clock = FakeClock(wall_ns=NOW)
    database = await open_database(Home(scratch).database_url, clock=clock)
    scene = await new_scene(database)
    await scene.write(lambda tx: sleeping.set_wake(tx, **scene.owner, wake_ns=sleeping.NOW))
    assert [found.session_id for found in await scene.read(lambda tx: sleeping.list_due(tx, NOW))] == [scene.session_id]
    status = {"status": SessionStatus.CANCELLED, "wall_ns": NOW}
    await scene.write(lambda tx: sessions.set_status(tx, **scene.owner, **status))
    assert await scene.read(lambda tx: sleeping.list_due(tx, NOW)) == []
    assert await scene.read(lambda tx: sleeping.next_wake(tx, NOW)) == (None, 0)
    await database.close()
