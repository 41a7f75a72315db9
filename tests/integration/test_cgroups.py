"""The cgroup of a real sandbox: it holds all of it, is found by whoever comes later, and goes with it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from torpor.core.clock import SystemClock
from torpor.runtime.home import Home
from torpor.sandbox.cgroups import cgroup_for
from torpor.sandbox.driver import SandboxPlan
from torpor.sandbox.gvisor import GvisorDriver
from torpor.sandbox.rootfs import host_image
from torpor.sandbox.tools import inspect_runsc

pytestmark = [
    pytest.mark.runsc,
    pytest.mark.timeout(120),
    pytest.mark.skipif(cgroup_for("probe") is None, reason="no cgroup with a limit can be made here"),
]


@pytest.fixture
def driver(scratch: Path, runsc: Path) -> Iterator[GvisorDriver]:
    clock = SystemClock()
    made = GvisorDriver(runsc=inspect_runsc(runsc, clock), state_directory=scratch / "runsc", clock=clock)
    yield made
    assert made.sandbox_ids() == []


def plan_of(scratch: Path, number: int) -> SandboxPlan:
    directory = scratch / str(number)
    (directory / "workspace").mkdir(parents=True)
    return SandboxPlan(
        sandbox_id=f"cgroup-{os.getpid()}-{number}",
        directory=directory,
        image=host_image(scratch / "images", []),
        workspace=directory / "workspace",
        init_directory=Home(scratch / "home").init_directory(),
    )


def place_of(driver: GvisorDriver, plan: SandboxPlan) -> Path:
    return Path(driver.cgroup_note(plan.sandbox_id).read_text())


async def test_every_process_of_a_sandbox_is_in_it_and_it_goes_with_the_sandbox(
    driver: GvisorDriver, scratch: Path
) -> None:
    plan = plan_of(scratch, 1)
    sandbox = await driver.create(plan)
    place = place_of(driver, plan)
    pids = sandbox.pids()
    assert pids is not None
    assert set(map(str, pids)) <= set((place / "cgroup.procs").read_text().split())
    found = driver.find(plan)  # by another node, which moves the wall where it was made
    assert found is not None
    assert found.allow_memory(1 << 30)
    await found.kill()
    assert not place.exists()


async def test_what_was_made_before_a_sandbox_was_is_found_and_removed(driver: GvisorDriver, scratch: Path) -> None:
    """As a kill leaves it after the note, and after the cgroup."""
    noted, made = plan_of(scratch, 1), plan_of(scratch, 2)
    for plan in (noted, made):
        cgroup = cgroup_for(plan.sandbox_id)
        assert cgroup is not None
        driver.cgroup_note(plan.sandbox_id).write_text(str(cgroup.path))
    place = place_of(driver, made)
    place.mkdir()
    assert driver.sandbox_ids() == [noted.sandbox_id, made.sandbox_id]
    for plan in (noted, made):
        left = driver.find(plan)
        assert left is not None
        assert not left.alive()
        await left.kill()
    assert not place.exists()


async def test_one_with_somebody_elses_process_is_left_until_that_is_gone(driver: GvisorDriver, scratch: Path) -> None:
    plan = plan_of(scratch, 1)
    sandbox = await driver.create(plan)
    place = place_of(driver, plan)
    with subprocess.Popen(["sleep", "600"]) as stranger:
        (place / "cgroup.procs").write_text(str(stranger.pid))
        await sandbox.kill()
        assert not sandbox.alive()
        assert stranger.poll() is None
        assert driver.sandbox_ids() == [plan.sandbox_id]
        stranger.kill()
    left = driver.find(plan)
    assert left is not None
    await left.kill()
    assert not place.exists()


async def test_the_first_sandbox_is_killed_without_the_eleventh(driver: GvisorDriver, scratch: Path) -> None:
    first, eleventh = plan_of(scratch, 1), plan_of(scratch, 10)
    kept = await driver.create(eleventh)
    await (await driver.create(first)).kill()
    assert kept.alive()
    assert driver.sandbox_ids() == [eleventh.sandbox_id]
    await kept.kill()
