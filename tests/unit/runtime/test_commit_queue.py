"""One cut in progress, one waiting, and whoever asked learns what became of the cut that served it."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from torpor.runtime.commit_queue import CommitQueue


async def test_a_newer_cut_takes_the_place_of_the_one_that_waits() -> None:
    queue = CommitQueue[str]()
    assert queue.put("first") is None
    assert await queue.next() == (1, "first")
    assert queue.put("second") is None
    assert queue.put("third") == "second"
    queue.done(1)
    assert await queue.next() == (3, "third")
    queue.done(3)
    assert queue.idle


async def test_who_asked_for_a_cut_that_was_overtaken_waits_for_the_newer_one() -> None:
    queue = CommitQueue[str]()
    queue.put("first")
    await queue.next()
    queue.put("second")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(queue.known(2))
        queue.put("third")
        queue.done(1)
        await asyncio.sleep(0)
        assert not waiting.done()
        number, _ = await queue.next()
        queue.done(number)
    assert waiting.done()


async def test_what_is_known_needs_no_wait() -> None:
    queue = CommitQueue[str]()
    await queue.known(0)
    queue.put("first")
    number, _ = await queue.next()
    queue.done(number)
    await queue.known(1)


@given(st.lists(st.sampled_from(["put", "next", "done"]), max_size=60))
def test_never_more_than_one_waits_and_every_cut_has_one_fate(plan: list[str]) -> None:
    async def play() -> None:
        queue = CommitQueue[int]()
        overtaken, committed = list[int](), list[int]()
        made, waiting, in_progress = 0, None, None
        for step in plan:
            if step == "put":
                made += 1
                dropped = queue.put(made)
                assert dropped == waiting
                overtaken += [] if dropped is None else [dropped]
                waiting = made
            elif step == "next" and waiting is not None and in_progress is None:
                number, in_progress = await queue.next()
                assert number == in_progress == waiting
                waiting = None
            elif step == "done" and in_progress is not None:
                queue.done(in_progress)
                committed.append(in_progress)
                in_progress = None
                await queue.known(committed[-1])
            assert queue.newest == made
            assert queue.idle == (waiting is None and in_progress is None)
        fates = sorted([*overtaken, *committed, *(cut for cut in (waiting, in_progress) if cut is not None)])
        assert fates == list(range(1, made + 1))
        assert committed == sorted(committed)

    asyncio.run(play())
