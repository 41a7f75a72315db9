"""A sandbox that is being made while its session ends: it is found again, or it would run for good."""

import asyncio
import os
from pathlib import Path

import pytest

from torpor.core.clock import SystemClock
from torpor.runtime.home import Home
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.gvisor import GvisorDriver
from torpor.sandbox.rootfs import host_image
from torpor.sandbox.tools import inspect_runsc

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(120)]


async def test_a_sandbox_whose_maker_is_cancelled_is_found_and_can_be_killed(scratch: Path, runsc: Path) -> None:
    clock = SystemClock()
    driver = GvisorDriver(runsc=inspect_runsc(runsc, clock), state_directory=scratch / "runsc", clock=clock)
    (scratch / "one" / "workspace").mkdir(parents=True)
    plan = SandboxPlan(
        sandbox_id=f"one-{os.getpid()}",
        directory=scratch / "one",
        image=host_image(scratch / "images", []),
        workspace=scratch / "one" / "workspace",
        init_directory=Home(scratch / "home").init_directory(),
    )
    making = asyncio.ensure_future(driver.create(plan))
    while not plan.made_by.exists() or not (scratch / "one" / "driver.log").exists():
        await asyncio.sleep(0)  # until runsc has been started
    making.cancel()
    with pytest.raises(asyncio.CancelledError):
        await making
    sandbox = driver.find(plan)
    assert sandbox is not None
    assert sandbox.alive()
    await sandbox.kill()
    assert not sandbox.alive()
