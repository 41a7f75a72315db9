"""Whether sandboxes work on this machine, found out by doing it: boot, checkpoint, kill, restore, relay a request.

The same examination decides at `torpor setup` and explains at `torpor doctor`.
"""

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import TorporError, innermost
from torpor.sandbox import process
from torpor.sandbox.cgroups import CgroupV2, cgroup_for
from torpor.sandbox.closed_watches import OLDEST_WITHOUT_CLOSED_WATCHES
from torpor.sandbox.control import CONTROL_VERSIONS
from torpor.sandbox.driver import Sandbox, SandboxPlan
from torpor.sandbox.frames import AgentSpec
from torpor.sandbox.gvisor import NAMESPACE, GvisorDriver, Runsc
from torpor.sandbox.link import Link
from torpor.sandbox.rootfs import host_image
from torpor.sandbox.streams import Stream

SHELL = (
    "exec 3<>/dev/tcp/127.0.0.1/4100; printf 'GET /before HTTP/1.1\\r\\n\\r\\n' >&3; "
    'read -r answer <&3; test "$answer" = after-the-restore'
)
"""The agent of the test: one request, sent before the checkpoint and answered after the restore."""

FORBIDDING = (
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ("user.max_user_namespaces", "0", "10000"),
)
"""Settings that forbid user namespaces to ordinary users: the value that does, and one that does not."""

ROUND_TRIP = ("boot", "checkpoint", "kill", "restore", "relay")
MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, and a private directory made in it

REMEDIES = {
    "program_missing": "Install util-linux (unshare), or set TORPOR_RUNSC to a runsc of 2024 or later.",
    "command_failed": "If it speaks of namespaces: allow unprivileged user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), or run as root.",
    "link_lost": "The sandbox died: set TORPOR_RUNSC to another release of runsc.",
    "sandbox_refused": "This runsc and this kernel don't get along: set TORPOR_RUNSC to another release.",
    "link_silent": "The sandbox started but its init did not speak: see the driver.log named above.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `fatal`: without it no session runs."""

    check: str
    ok: bool
    detail: str
    remedy: str = ""
    fatal: bool = True


def look_around(clock: Clock) -> list[Finding]:
    """What can be said of the machine without running a sandbox."""
    return [_privilege(clock), _staging(), _swap(), _limits(clock)]


async def examine(home: Path, runsc: Runsc, init_directory: Path, clock: Clock) -> list[Finding]:
    """Look at the machine, then do the round trip; findings in order, up to the first fatal failure."""
    findings = [Finding(check="runsc", ok=True, detail=f"{runsc.path} ({runsc.version})")]
    findings += [*_watches(runsc), *look_around(clock)]
    if any(finding.fatal and not finding.ok for finding in findings):
        return findings
    scratch = Path(tempfile.mkdtemp(prefix="selftest-", dir=home))
    images = Path(tempfile.mkdtemp(prefix="torpor-selftest-", dir=MEMORY))
    driver = GvisorDriver(runsc=runsc, state_directory=scratch / "runsc", clock=clock)
    done: list[Finding] = []
    try:
        async for finding in _round_trip(driver, scratch, images, init_directory, clock):
            done.append(finding)  # noqa: PERF401 - those before a failure are to be kept
    except (TorporError, OSError, ExceptionGroup) as error:
        cause = innermost(error)
        remedy = REMEDIES.get(getattr(cause, "code", ""), "`torpor --verbose doctor` shows each command that it runs.")
        done.append(Finding(check=ROUND_TRIP[len(done)], ok=False, detail=str(cause), remedy=remedy))
    finally:
        for name in driver.sandbox_ids():
            await _leftover(driver, scratch, init_directory, name).kill()
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(images, ignore_errors=True)
    return [*findings, *done]


def _watches(runsc: Runsc) -> list[Finding]:
    """Of releases before the one that fixed it only those are mended whose images can be read."""
    date = re.search(r"20\d{6}", runsc.version)
    if runsc.version in CONTROL_VERSIONS or date is None or int(date[0]) >= OLDEST_WITHOUT_CLOSED_WATCHES:
        return []
    detail = f"runsc {runsc.version} brings epoll watches of closed files back: programs on tokio may die at a restore"
    remedy = (
        f"Run `torpor setup` without TORPOR_RUNSC, or set that to a release from {OLDEST_WITHOUT_CLOSED_WATCHES} on."
    )
    return [Finding(check="closed watches", ok=False, detail=detail, remedy=remedy, fatal=False)]


def _privilege(clock: Clock) -> Finding:
    """Root, or a user namespace: made for real, for a machine may forbid it in many ways."""
    if os.geteuid() == 0:
        return Finding(
            check="privilege", ok=True, detail="root; the sandbox's kernel runs as nobody without capabilities"
        )
    detail = f"ordinary user {os.geteuid()}, through a user namespace"
    if shutil.which("unshare") is None:
        return Finding(check="privilege", ok=False, detail=detail, remedy="Install util-linux: `unshare` is missing.")
    tried = process.run_blocking([*NAMESPACE, "true"], deadline_seconds=20, clock=clock, check=False)
    if tried.exit_status == 0:
        return Finding(check="privilege", ok=True, detail=detail)
    return Finding(check="privilege", ok=False, detail=f"{detail}: {tried.explain()}", remedy=_namespace_remedy())


def _namespace_remedy() -> str:
    """Which of the known ways this machine forbids user namespaces in."""
    for setting, forbidding, allowing in FORBIDDING:
        file = Path("/proc/sys", setting.replace(".", "/"))
        if file.exists() and file.read_text().strip() == forbidding:
            return f"As root: sysctl {setting}={allowing}. Or run Torpor as root."
    return (
        "No setting of the kernel forbids it, so it is the container or chroot around this: allow it there (Docker: "
        "--security-opt seccomp=unconfined), or run Torpor as root."
    )


def _limits(clock: Clock) -> Finding:
    """What `--memory` can hold, said before somebody counts upon more; a cgroup is made for real, and entered."""
    detail = "measured from outside, twice a second: no cgroup holds what an agent takes faster than that"
    cgroup = cgroup_for(f"selftest-{os.getpid()}")
    if cgroup is not None and cgroup.make():
        within = [*cgroup.entering(), "cat", "/proc/self/cgroup"]
        tried = process.run_blocking(within, deadline_seconds=20, clock=clock, check=False)
        if cgroup.path.name.encode() in tried.stdout:
            version = "2" if isinstance(cgroup, CgroupV2) else "1"
            behind = f"a cgroup (version {version}) stops what an agent takes faster than that"
            detail = f"measured from outside, twice a second; {behind}"
        cgroup.remove()
    return Finding(check="memory limits", ok=True, detail=detail)


def _staging() -> Finding:
    check = "memory for images"
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    kinds = [kind for _, where, kind, *_ in mounts if where == str(MEMORY)]
    if not kinds or kinds[-1] not in {"tmpfs", "ramfs"}:
        detail = f"{MEMORY} is not in memory: images, which hold the agent's memory, would reach a disk"
        return Finding(check=check, ok=False, detail=detail, remedy=f"mount -t tmpfs -o size=2G tmpfs {MEMORY}")
    free = shutil.disk_usage(MEMORY).free
    ok = free >= 256 << 20
    remedy = "" if ok else f"Free some, or enlarge it: mount -o remount,size=2G {MEMORY}"
    return Finding(check=check, ok=ok, detail=f"{free >> 20} MiB free in {MEMORY}", remedy=remedy)


def _swap() -> Finding:
    swaps = Path("/proc/swaps").read_text().splitlines()[1:] if Path("/proc/swaps").exists() else []
    if not swaps:
        return Finding(check="swap", ok=True, detail="none: images never reach a disk unencrypted", fatal=False)
    remedy = "Use encrypted swap, or none: images hold the agent's memory."
    return Finding(check="swap", ok=False, detail="images in memory may be swapped out", remedy=remedy, fatal=False)


async def _round_trip(
    driver: GvisorDriver, scratch: Path, images: Path, init_directory: Path, clock: Clock
) -> AsyncGenerator[Finding]:
    first = _plan(scratch, init_directory, "selftest-1")
    started = clock.monotonic()
    sandbox = await driver.create(first)
    await sandbox.start()
    async with _linked(sandbox, clock) as link:
        agent = AgentSpec(arguments=("/bin/bash", "-c", SHELL), environment={"PATH": "/usr/bin:/bin"}, cwd="/workspace")
        await link.start(agent, incarnation=1, wall_ns=clock.wall_ns(), entropy=os.urandom(64))
        yield Finding(check="boot", ok=True, detail=_took(clock, started))
        stream = await link.accept()
        request = await stream.receive()
        while b"\r\n\r\n" not in request:
            request += await stream.receive()
        started = clock.monotonic()
        status = await link.cut(20)
        await sandbox.pause()
        await sandbox.save_image(images / "image")
        await sandbox.resume()
        link.release()
        yield Finding(check="checkpoint", ok=True, detail=_took(clock, started))
    await sandbox.kill()
    yield Finding(check="kill", ok=not sandbox.alive(), detail="the first sandbox is gone")
    started = clock.monotonic()
    second = await driver.create(_plan(scratch, init_directory, "selftest-2"))
    await second.restore(images / "image")
    async with _linked(second, clock) as link:
        await link.restored(
            incarnation=2,
            wall_ns=clock.wall_ns(),
            slept_ns=0,
            entropy=os.urandom(64),
            environment={},
            deadline_seconds=30,
        )
        yield Finding(check="restore", ok=True, detail=_took(clock, started))
        kept: Stream = link.inherit(stream.id, position=len(request), acknowledged=0)
        for entry in status.streams:
            if entry.kind == "output":
                link.inherit(entry.stream, position=entry.read, acknowledged=entry.read)
        await kept.send(0, b"after-the-restore\n")
        ended = await link.wait_exit()
        yield Finding(
            check="relay", ok=ended == 0, detail="a request from before the checkpoint was answered after the restore"
        )
        link.acknowledge_exit()
    await second.kill()


@contextlib.asynccontextmanager
async def _linked(sandbox: Sandbox, clock: Clock) -> AsyncGenerator[Link]:
    """A link that is read meanwhile."""
    link = await Link.open(to_guest=sandbox.plan.to_guest, from_guest=sandbox.plan.from_guest, clock=clock)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(link.run())
        try:
            yield link
        finally:
            link.close()


def _plan(scratch: Path, init_directory: Path, name: str) -> SandboxPlan:
    directory = scratch / name
    (directory / "workspace").mkdir(parents=True, exist_ok=True)
    return SandboxPlan(
        sandbox_id=f"{name}-{os.getpid()}",
        directory=directory,
        image=host_image(scratch / "images", []),
        workspace=directory / "workspace",
        init_directory=init_directory,
    )


def _leftover(driver: GvisorDriver, scratch: Path, init_directory: Path, sandbox_id: str) -> Sandbox:
    found = driver.find(_plan(scratch, init_directory, sandbox_id.rpartition("-")[0]))
    assert found is not None
    return found


def _took(clock: Clock, started: float) -> str:
    return f"{(clock.monotonic() - started) * 1000:.0f} ms"
