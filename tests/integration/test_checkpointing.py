"""The pipeline from cut to commit: what is overtaken, skipped, kept in memory, and what waits for what."""

import asyncio
import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
from tests.integration.checkpoint_stage import CLOCK, MEGABYTE, stage

from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import Conflict
from torpor.core.events import Kind
from torpor.core.ids import CallId, SessionId, SnapshotId
from torpor.core.pacing import EVERY_TURN_PPM, SHARE_PPM
from torpor.runtime.staging import Staging
from torpor.snapshots.condemned import delete_condemned, write_condemned
from torpor.snapshots.scan import FRESH_NS


async def test_a_newer_cut_takes_the_place_of_the_one_that_waits_and_nothing_that_was_changed_is_lost(
    scratch: Path,
) -> None:
    async with stage(scratch) as made:
        made.be("one")
        await made.hold_a_commit()
        (made.workspace / "early").write_text("written before the cut that is dropped")
        made.be("two")
        await made.checkpointer.take("manual")
        assert made.staged == 2
        made.be("three")
        await made.checkpointer.take("manual")
        assert made.staged == 2, "the one that was dropped is freed"
        made.be("what is now")
        made.backend.open.set()
        await made.checkpointer.settle()
        assert await made.numbers() == [0, 1, 3]
        [dropped] = await made.events(Kind.CHECKPOINT_OVERTAKEN)
        assert dropped.data == {"number": 2, "reason": "manual", "by": 3}
        _, one, three = await made.records.checkpoints()
        assert made.restored(one) == ("one", "one")
        assert made.restored(three) == ("three", "three")
        assert (made.directory / "restored-2/workspace/early").exists()
        assert not (made.directory / "restored-1/workspace/early").exists()
        assert made.snapshots.verify(made.store.ref(three)) == []
        assert made.staged == 1, "the newest image is kept for a restore"
        assert made.staging.cached(three.snapshot_id, three.raw_bytes) is not None


async def test_a_store_that_only_the_dropped_cut_had_seen_is_in_the_next(scratch: Path) -> None:
    """Stores through a mapping move no time while the page is dirty, and the file is closed by then."""
    async with stage(scratch) as made:
        path = made.workspace / "mapped"
        path.write_bytes(bytes(4096))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as mapped:
            mapped[:3] = b"old"
            changed_ns = path.stat().st_ctime_ns
            while CLOCK.wall_ns() < changed_ns + 2 * FRESH_NS:
                await asyncio.sleep(0.01)
            made.sandbox.open_files = frozenset({path.stat().st_ino})
            assert await made.checkpointer.take_and_commit("manual") is not None
            await made.hold_a_commit()
            mapped[:3] = b"new"
            await made.checkpointer.take("manual")
        made.sandbox.open_files = frozenset()
        await made.checkpointer.take("manual")
        assert path.stat().st_ctime_ns == changed_ns
        made.backend.open.set()
        await made.checkpointer.settle()
        assert await made.numbers() == [0, 1, 2, 4]
        made.restored((await made.records.checkpoints())[-1])
        assert (made.directory / "restored-1/workspace/mapped").read_bytes()[:3] == b"new"


async def test_who_asks_gets_a_checkpoint_that_is_at_least_as_new_as_the_question(scratch: Path) -> None:
    async with stage(scratch) as made:
        await made.hold_a_commit()
        made.be("asked")
        asked_at = (await made.records.position())[0]
        asking = made.tasks.create_task(made.checkpointer.take_and_commit("agent"))
        await made.cuts(2)
        made.be("newer")
        await made.checkpointer.take("call")
        made.backend.open.set()
        got = await asking
        assert got is not None
        assert got.number == 3
        assert got.seq >= asked_at
        assert made.restored(got) == ("newer", "newer")
        assert got in await made.records.checkpoints()


async def test_who_asked_is_told_when_the_newer_checkpoint_fails(scratch: Path) -> None:
    async with stage(scratch) as made:
        await made.hold_a_commit()
        asking = made.tasks.create_task(made.checkpointer.take_and_commit("manual"))
        await made.cuts(2)
        await made.checkpointer.take("manual")
        made.backend.refused = made.backend.manifests + 2  # After the one in progress.
        made.backend.open.set()
        assert await asking is None
        assert await made.numbers() == [0, 1]
        [failed] = await made.events(Kind.CHECKPOINT_FAILED)
        assert failed.data["code"] == "no_space"
        made.be("after")
        point = await made.checkpointer.take_and_commit("manual")
        assert point is not None
        assert made.restored(point) == ("after", "after")


async def test_a_commit_waits_for_a_collection_that_has_its_parents_packs_on_its_list(scratch: Path) -> None:
    """The list is as a collector leaves it that began before the parent was committed, until it reads the row."""
    async with stage(scratch) as made:
        made.be("parent")
        parent = await made.checkpointer.take_and_commit("manual")
        assert parent is not None
        packs = made.snapshots.pack_names(parent.snapshot_id, parent.manifest_digest)
        write_condemned(made.backend, packs)
        while not made.backend.condemned_read.locked():
            await made.backend.condemned_read.acquire()
        made.be("child")
        committing = made.tasks.create_task(made.checkpointer.take_and_commit("manual"))
        for _ in range(2):
            await made.backend.condemned_read.acquire()
        assert await asyncio.to_thread(lambda: made.backend.leases.wait(made.backend.leases.held(), 60)) == set()
        delete_condemned(made.backend)
        child = await committing
        assert child is not None
        assert made.restored(child) == ("child", "child")
        assert await made.events(Kind.CHECKPOINT_FAILED) == []
        assert made.snapshots.pack_names(child.snapshot_id, child.manifest_digest)


async def test_the_last_checkpoint_of_a_life_waits_for_its_commit_and_the_agent_stands_still(scratch: Path) -> None:
    async with stage(scratch) as made:
        await made.hold_a_commit()
        made.be("last")
        stopping = made.tasks.create_task(made.checkpointer.take_last("stop", AsyncExitStack()))
        await made.cuts(2)
        assert made.sandbox.is_paused
        made.backend.open.set()
        last = await stopping
        assert last is not None
        assert last.reason == "stop"
        assert made.restored(last) == ("last", "last")
        assert made.sandbox.is_paused
        assert made.sandbox.plan.directory.joinpath("paused").exists()
        os.kill(made.sandbox._init.process.pid, signal.SIGCONT)


async def test_turns_are_skipped_while_the_session_owes_and_who_asks_is_not(scratch: Path) -> None:
    async with stage(scratch, share_ppm=SHARE_PPM) as made:
        await made.turn(1, lost_seconds=30.0)
        await made.turn(2)
        await made.turn(3)
        await made.checkpointer.settle()
        assert [point.reason for point in await made.records.checkpoints()] == ["start", "call"]
        skipped = await made.events(Kind.CHECKPOINT_SKIPPED)
        assert [event.call_id for event in skipped] == ["call_2", "call_3"]
        assert all(event.data["reason"] == "share" for event in skipped)
        assert 20_000 < skipped[0].data["owed_ms"] <= 30_000
        assert await made.checkpointer.take_and_commit("manual") is not None
        await made.checkpointer.take("age")
        await made.checkpointer.settle()
        assert [point.reason for point in await made.records.checkpoints()] == ["start", "call", "manual", "age"]


async def test_the_first_turn_of_a_life_is_never_skipped(scratch: Path) -> None:
    async with stage(scratch, share_ppm=SHARE_PPM) as made:
        await made.turn(1, lost_seconds=30.0)
        await made.checkpointer.settle()
        made.checkpointer.end_life()
        newest = (await made.records.checkpoints())[-1]
        await made.checkpointer.begin_life(made.life, newest, next_number=2)
        await made.turn(2)
        await made.turn(3)
        await made.checkpointer.settle()
        assert [event.call_id for event in await made.events(Kind.CHECKPOINT_SKIPPED)] == ["call_3"]
        assert await made.numbers() == [0, 1, 2]


async def test_a_turn_whose_answer_was_not_there_before_costs_nothing(scratch: Path) -> None:
    async with stage(scratch, share_ppm=1) as made:
        for number in range(3):
            await made.checkpointer.take_turn(CallId(f"call_{number}"), lambda: None)
        await made.checkpointer.settle()
        assert await made.events(Kind.CHECKPOINT_SKIPPED) == []


async def test_a_cut_is_never_compared_with_what_is_stored_and_then_not_committed(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector may take that, when its lease is lost."""
    async with stage(scratch) as made:
        made.be("one")
        committed = await made.checkpointer.take_and_commit("manual")
        assert committed is not None
        stored, go_on = asyncio.Event(), asyncio.Event()

        async def refuse(_: Checkpoint) -> Checkpoint:
            stored.set()
            await go_on.wait()
            raise Conflict("lease_lost", "cannot commit: the test says so")

        made.be("two")
        with monkeypatch.context() as patched:
            patched.setattr(made.records, "commit_checkpoint", refuse)
            await made.checkpointer.take("manual")
            await stored.wait()
            await made.checkpointer.take("manual")
            waiting = made.checkpointer._queue._waiting
            assert waiting is not None
            base = waiting[1].base.ref
            assert base is not None
            assert base.id == committed.snapshot_id
        go_on.set()
        await made.checkpointer.settle()
        assert await made.numbers() == [0, 1, 3]
        assert made.restored((await made.records.checkpoints())[-1]) == ("two", "two")


async def test_with_a_share_of_always_no_turn_is_skipped(scratch: Path) -> None:
    async with stage(scratch, share_ppm=EVERY_TURN_PPM) as made:
        for number in range(3):
            await made.turn(number, lost_seconds=30.0)
            await made.checkpointer.settle()
        assert await made.numbers() == [0, 1, 2, 3]


@contextmanager
def small_memory(path: Path, megabytes: int) -> Iterator[Path]:
    """A memory-backed directory of that size."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=1777", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


async def test_a_cut_that_does_not_fit_into_memory_waits_if_it_was_asked_for_and_a_turn_is_skipped(
    scratch: Path,
) -> None:
    """100 MiB hold one image of 40, and 32 are always left free."""
    with small_memory(scratch / "memory", 100) as memory:
        async with stage(scratch, memory=memory) as made:
            made.sandbox.memory = os.urandom(40 * MEGABYTE)
            await made.hold_a_commit()
            assert not made.staging.has_room(40 * MEGABYTE)
            await made.turn(1)
            [skipped] = await made.events(Kind.CHECKPOINT_SKIPPED)
            assert skipped.data["reason"] == "memory"
            asking = made.tasks.create_task(made.checkpointer.take_and_commit("manual"))
            while not made.checkpointer._cutting.locked():
                await asyncio.sleep(0)
            assert made.staged == 1
            made.backend.open.set()
            got = await asking
            assert got is not None
            assert await made.numbers() == [0, 1, 2]
            assert made.staged == 1, "the image that was kept for a restore made room for it"
            assert await made.events(Kind.CHECKPOINT_FAILED) == []


async def test_images_of_sleeping_sessions_go_before_a_turn_is_skipped(scratch: Path) -> None:
    """150 MiB hold two images of 40 and no third, as 32 are always left free."""
    with small_memory(scratch / "memory", 150) as memory:
        async with stage(scratch, memory=memory) as made:
            asleep, old = Staging(scratch, SessionId("ses_asleep"), memory), SnapshotId("snp_old")
            asleep.begin(old, 0)
            (asleep.image(old) / "pages.img").write_bytes(os.urandom(40 * MEGABYTE))
            asleep.complete(old)
            made.sandbox.memory = os.urandom(40 * MEGABYTE)
            await made.hold_a_commit()
            assert list(asleep.images().values()) == [40 * MEGABYTE]
            assert not made.staging.has_room(40 * MEGABYTE)
            await made.turn(1)
            assert await made.events(Kind.CHECKPOINT_SKIPPED) == []
            assert asleep.images() == {}
            made.backend.open.set()
            await made.checkpointer.settle()
            assert await made.numbers() == [0, 1, 2]


async def test_a_cut_that_will_never_fit_fails_and_the_agent_runs_on(scratch: Path) -> None:
    with small_memory(scratch / "memory", 60) as memory:
        async with stage(scratch, memory=memory) as made:
            made.sandbox.memory = os.urandom(20 * MEGABYTE)
            assert await made.checkpointer.take_and_commit("manual") is not None
            made.checkpointer._expected_bytes = 50 * MEGABYTE
            assert await made.checkpointer.take_and_commit("manual") is None
            assert not made.sandbox.is_paused
            [failed] = await made.events(Kind.CHECKPOINT_FAILED)
            assert failed.data["code"] == "no_staging_space"
