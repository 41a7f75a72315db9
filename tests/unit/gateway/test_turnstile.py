"""One decides at a time; who stepped aside is waited for by those that may depend on it, and by nobody else."""

import asyncio

import pytest

from torpor.gateway.turnstile import Turnstile


async def settle() -> None:
    """Let every task go as far as it can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_decisions_are_made_one_at_a_time() -> None:
    turnstile, go_on = Turnstile(), asyncio.Event()
    order: list[int] = []

    async def decide(number: int) -> None:
        async with turnstile.turn():
            order.append(number)
            await go_on.wait()
            order.append(-number)

    async with asyncio.TaskGroup() as tasks:
        for number in (1, 2):
            tasks.create_task(decide(number))
        await settle()
        assert order == [1]
        go_on.set()
    assert order == [1, -1, 2, -2]


async def test_others_decide_once_one_has_stepped_aside() -> None:
    turnstile, written = Turnstile(), asyncio.Event()
    order: list[int] = []

    async def decide(number: int) -> None:
        async with turnstile.turn() as turn:
            turn.step_aside()
            turn.step_aside()
            order.append(number)
            await written.wait()
            order.append(-number)

    async with asyncio.TaskGroup() as tasks:
        for number in (1, 2, 3):
            tasks.create_task(decide(number))
        await settle()
        assert order == [1, 2, 3]
        written.set()


@pytest.mark.parametrize("how", ["a cut", "a decision that depends on it"])
async def test_who_may_depend_on_one_that_stepped_aside_waits_and_keeps_others_out(how: str) -> None:
    turnstile, written = Turnstile(), asyncio.Event()
    order: list[str] = []

    async def aside() -> None:
        async with turnstile.turn() as turn:
            turn.step_aside()
            await written.wait()
            order.append("written")

    async def depend() -> None:
        if how == "a cut":
            async with turnstile.alone():
                order.append("alone")
        else:
            async with turnstile.turn() as turn:
                await turn.alone()
                order.append("alone")

    async def later() -> None:
        async with turnstile.turn():
            order.append("later")

    async with asyncio.TaskGroup() as tasks:
        for work in (aside, depend, later):
            tasks.create_task(work())
            await settle()
        assert order == []
        written.set()
    assert order == ["written", "alone", "later"]


@pytest.mark.parametrize("aside", [False, True])
async def test_a_decision_that_fails_or_is_cancelled_ends_its_turn(aside: bool) -> None:
    turnstile = Turnstile()

    async def hang() -> None:
        async with turnstile.turn() as turn:
            if aside:
                turn.step_aside()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        hanging = tasks.create_task(hang())
        await settle()
        hanging.cancel()
    with pytest.raises(ZeroDivisionError):
        async with turnstile.turn() as turn:
            if aside:
                turn.step_aside()
            raise ZeroDivisionError
    async with asyncio.timeout(5), turnstile.alone():
        pass
