"""What a real sandbox's epoll says after a kill and a restore: nothing of files that were closed before."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from torpor.core.clock import SystemClock
from torpor.runtime.home import Home
from torpor.sandbox.closed_watches import end_closed_watches
from torpor.sandbox.control import CONTROL_VERSIONS
from torpor.sandbox.driver import Sandbox, SandboxPlan
from torpor.sandbox.frames import AgentSpec
from torpor.sandbox.gvisor import IMAGE_FILES, GvisorDriver
from torpor.sandbox.link import Link
from torpor.sandbox.rootfs import host_image
from torpor.sandbox.tools import inspect_runsc

pytestmark = [pytest.mark.runsc, pytest.mark.timeout(120)]

AGENT = """
import os, select, socket, sys
watched = select.epoll()
kept, closed = os.pipe(), os.pipe()
for reader, _ in (kept, closed):
    watched.register(reader, select.EPOLLIN | select.EPOLLET)
for _, writer in (kept, closed):
    os.write(writer, b"x")
assert len(watched.poll()) == 2, "not found ready together"
watched.unregister(closed[0])
for end in closed:
    os.close(end)
host = socket.create_connection(("127.0.0.1", 4100))
host.sendall(b"cut now")
host.recv(1)
os.write(kept[1], b"y")
[(reader, events)] = watched.poll()
sys.exit(0 if (reader, events) == (kept[0], select.EPOLLIN) else 3)
"""
"""Closes one of two files that were found ready together, and after its restore looks at the other."""


@asynccontextmanager
async def linked(sandbox: Sandbox) -> AsyncIterator[Link]:
    link = await Link.open(to_guest=sandbox.plan.to_guest, from_guest=sandbox.plan.from_guest, clock=SystemClock())
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(link.run())
        try:
            yield link
        finally:
            link.close()


async def test_a_restored_epoll_does_not_report_what_was_closed_before(scratch: Path, runsc: Path) -> None:
    clock = SystemClock()
    found = inspect_runsc(runsc, clock)
    driver = GvisorDriver(runsc=found, state_directory=scratch / "runsc", clock=clock)
    python = Path(sys.executable).resolve()
    image = host_image(scratch / "images", [python.parents[1]])

    def plan(name: str) -> SandboxPlan:
        directory = scratch / name
        (directory / "workspace").mkdir(parents=True)
        return SandboxPlan(
            sandbox_id=f"{name}-{os.getpid()}",
            directory=directory,
            image=image,
            workspace=directory / "workspace",
            init_directory=Home(scratch / "home").init_directory(),
        )

    first, second = await driver.create(plan("first")), await driver.create(plan("second"))
    try:
        await first.start()
        async with linked(first) as link:
            agent = AgentSpec(arguments=(str(python), "-c", AGENT), environment={}, cwd="/workspace")
            await link.start(agent, incarnation=1, wall_ns=clock.wall_ns(), entropy=bytes(64))
            stream = await link.accept()
            assert await stream.receive() == b"cut now"
            status = await link.cut(20)
            await first.pause()
            await first.save_image(scratch / "image")
        await first.kill()

        saved = (scratch / "image" / IMAGE_FILES[0]).read_bytes()
        if found.version in CONTROL_VERSIONS:
            assert end_closed_watches(saved) is not None, "the image does not have what this is about"
        await second.restore(scratch / "image")
        assert (scratch / "image" / IMAGE_FILES[0]).read_bytes() == saved, "what was saved has changed"
        async with linked(second) as link:
            await link.restored(
                incarnation=2,
                wall_ns=clock.wall_ns(),
                slept_ns=0,
                entropy=bytes(64),
                environment={},
                deadline_seconds=30,
            )
            for entry in status.streams:
                if entry.kind == "output":
                    link.inherit(entry.stream, position=entry.read, acknowledged=entry.read)
            await link.inherit(stream.id, position=len(b"cut now"), acknowledged=0).send(0, b"!")
            assert os.waitstatus_to_exitcode(await link.wait_exit()) == 0, "it reported a file that was closed"
            link.acknowledge_exit()
    finally:
        await first.kill()
        await second.kill()
