"""The gVisor driver: sandboxes by `runsc`, as root or as an ordinary user through a user namespace.

What it never does, and why: no `runsc exec` (its descendants die at a restore), no checkpoint without `--leave-running`
(a failed one destroys the sandbox), no FIFO end opened read-write for the sandbox (the save would drain it).
"""

import asyncio
import contextlib
import json
import logging
import os
import platform
import select
import signal
import stat
import threading
from collections.abc import Coroutine, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torpor.core import pins
from torpor.core.clock import Clock
from torpor.core.errors import SandboxFailed
from torpor.sandbox import control, process
from torpor.sandbox.cgroups import Cgroup, cgroup_at, cgroup_for
from torpor.sandbox.closed_watches import UnknownLayout, end_closed_watches
from torpor.sandbox.cpu import cpu_features
from torpor.sandbox.driver import INIT_DIRECTORY, SandboxPlan

logger = logging.getLogger(__name__)

KILL_SECONDS = 10
ROOM_BYTES_MIN = 32 << 20
"""Who has too much already is parked, not killed for a page more."""
LEAVING_SECONDS = 2
"""After the sandbox's kernel its programs die by themselves, and leave their cgroup."""
IMAGE_FILES = ("checkpoint.img", "pages_meta.img", "pages.img")
CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
)
"""Inside the sandbox only; its kernel runs without any on the host."""

NAMESPACE = ("unshare", "-Urm", "--propagation", "private")
"""Runs a command as root of a user namespace of its own, in which an ordinary user may mount and chroot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runsc:
    """A usable runsc.

    Attributes:
        path: the binary.
        version: as `runsc --version` says.
        sha256: of the binary; an image restores only with the binary that wrote it.
    """

    path: Path
    version: str
    sha256: str


class GvisorDriver:
    """Sandboxes of one runsc binary and one state directory."""

    def __init__(self, *, runsc: Runsc, state_directory: Path, clock: Clock, deadline_seconds: float = 60) -> None:
        self.runsc = runsc
        self.clock = clock
        self.deadline_seconds = deadline_seconds
        self.state_directory = state_directory
        self.rootless = os.geteuid() != 0
        self.direct = runsc.version in control.CONTROL_VERSIONS
        state_directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def pins(self) -> dict[str, str]:
        return {
            pins.DRIVER: "gvisor",
            pins.RUNSC: self.runsc.sha256,
            pins.RUNSC_VERSION: self.runsc.version,
            pins.MACHINE: platform.machine(),
            pins.CPU_FEATURES: cpu_features(),
            pins.FLAGS: " ".join(self._flags()),
        }

    def _flags(self) -> list[str]:
        """Global flags; they are part of every image and must be the same at its restore.

        Without directfs the sandbox's kernel runs as nobody with no capabilities, and its file server opens files for
        it. That takes a host user `nobody` to become, which a user namespace of one user does not have; there the
        kernel is that user, in a namespace of its own.
        """
        return [
            "--platform=systrap",
            "--network=none",
            "--overlay2=root:memory",
            "--ignore-cgroups",
            "--host-uds=none",
            f"--directfs={'true' if self.rootless else 'false'}",
        ]

    def command(self, *words: str, namespace: bool = False) -> list[str]:
        """The argv of a runsc command; create and restore need their own user namespace for an ordinary user."""
        prefix = NAMESPACE if namespace and self.rootless else ()
        return [*prefix, str(self.runsc.path), f"--root={self.state_directory}", *self._flags(), *words]

    async def create(self, plan: SandboxPlan) -> "GvisorSandbox":
        bundle = plan.directory / "bundle"
        bundle.mkdir(parents=True, exist_ok=True, mode=0o700)
        (bundle / "config.json").write_text(json.dumps(bundle_config(plan)))
        plan.made_by.write_text(self.runsc.sha256)
        cgroup = self._make_cgroup(plan.sandbox_id)
        entering = [] if cgroup is None else cgroup.entering()
        for fifo in (plan.to_guest, plan.from_guest):
            fifo.unlink(missing_ok=True)
            os.mkfifo(fifo, 0o600)
        # Opening one end of a FIFO waits for the other: hold both for a moment, so that neither open blocks.
        with contextlib.ExitStack() as ends:
            for fifo in (plan.to_guest, plan.from_guest):
                ends.callback(os.close, os.open(fifo, os.O_RDWR | os.O_CLOEXEC))
            stdin = os.open(plan.to_guest, os.O_RDONLY | os.O_CLOEXEC)
            ends.callback(os.close, stdin)
            stdout = os.open(plan.from_guest, os.O_WRONLY | os.O_CLOEXEC)
            ends.callback(os.close, stdout)
            creating = process.run_attached(
                [*entering, *self.command("create", f"--bundle={bundle}", plan.sandbox_id, namespace=True)],
                stdin_fd=stdin,
                stdout_fd=stdout,
                stderr_path=plan.directory / "driver.log",
                deadline_seconds=self.deadline_seconds,
                clock=self.clock,
            )
            await _to_its_end(creating)
        return GvisorSandbox(driver=self, plan=plan)

    def find(self, plan: SandboxPlan) -> "GvisorSandbox | None":
        known = (self.state_file(plan.sandbox_id), self.cgroup_note(plan.sandbox_id))
        return GvisorSandbox(driver=self, plan=plan) if any(file.exists() for file in known) else None

    def sandbox_ids(self) -> Sequence[str]:
        found = {file.name.partition("_sandbox:")[0] for file in self.state_directory.glob("*_sandbox:*.state")}
        return sorted(found | {file.stem for file in self.state_directory.glob("*.cgroup")})

    def _make_cgroup(self, sandbox_id: str) -> Cgroup | None:
        """A cgroup for a new sandbox, if there can be one. It is noted before it is made, and the note goes last."""
        cgroup = cgroup_for(sandbox_id)
        if cgroup is None:
            return None
        self.cgroup_note(sandbox_id).write_text(str(cgroup.path))
        if cgroup.make():
            return cgroup
        self.cgroup_note(sandbox_id).unlink()
        return None

    def cgroup_note(self, sandbox_id: str) -> Path:
        """Says where the sandbox's cgroup is, for whoever adopts or kills it."""
        return self.state_directory / f"{sandbox_id}.cgroup"

    def state_file(self, sandbox_id: str) -> Path:
        return self.state_directory / f"{sandbox_id}_sandbox:{sandbox_id}.state"


class GvisorSandbox:
    """One runsc container, root of its sandbox, with torpor-init as PID 1."""

    def __init__(self, *, driver: GvisorDriver, plan: SandboxPlan) -> None:
        self.driver = driver
        self._plan = plan
        self._wall = threading.Lock()
        """Held while the wall is moved, which is also done by threads."""
        self._saving = False
        self._most_bytes: int | None = None
        self._killed_at_wall = False

    @property
    def plan(self) -> SandboxPlan:
        return self._plan

    @property
    def pins(self) -> pins.Pins:
        return self.driver.pins

    async def start(self) -> None:
        await self._command("start", self._plan.sandbox_id, namespace=True)

    async def restore(self, image_directory: Path) -> None:
        if not self.driver.direct:
            bundle = self._plan.directory / "bundle"
            await self._command(
                "restore",
                f"--image-path={image_directory}",
                f"--bundle={bundle}",
                "--detach",
                self._plan.sandbox_id,
                namespace=True,
            )
            return
        with contextlib.ExitStack() as files:
            mended = await asyncio.to_thread(_without_closed_watches, image_directory / IMAGE_FILES[0])
            descriptors = [_open(files, image_directory / name, os.O_RDONLY) for name in IMAGE_FILES]
            if mended is not None:
                descriptors[0] = _in_memory(files, mended)
            await self._control("Network.CreateLinksAndRoutes", control.LOOPBACK_LINKS)
            await self._control("containerManager.Restore", {"HavePagesFile": True}, descriptors)

    async def pause(self) -> None:
        if self.driver.direct:
            await self._control("containerManager.Pause")
        else:
            await self._command("pause", self._plan.sandbox_id)

    async def resume(self) -> None:
        if self.driver.direct:
            await self._control("containerManager.Resume")
        else:
            await self._command("resume", self._plan.sandbox_id)

    async def save_image(self, image_directory: Path) -> None:
        image_directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._without_wall():
            await self._save_image(image_directory)

    async def _save_image(self, image_directory: Path) -> None:
        if not self.driver.direct:
            await self._command(
                "checkpoint",
                f"--image-path={image_directory}",
                "--compression=none",
                "--leave-running",
                self._plan.sandbox_id,
            )
            return
        with contextlib.ExitStack() as files:
            flags = os.O_CREAT | os.O_EXCL | os.O_RDWR
            descriptors = [_open(files, image_directory / name, flags) for name in IMAGE_FILES]
            options = {"Metadata": {"compression": "none"}, "have_pages_file": True, "Resume": True}
            await self._control("containerManager.Checkpoint", options, descriptors)

    def open_for_writing(self) -> frozenset[int] | None:
        state = self._state()
        if state is None:
            return None
        device = self._plan.workspace.stat().st_dev
        found: set[int] = set()
        try:
            for pid in (state["sandbox"]["pid"], state["goferPid"]):
                found.update(_open_for_writing(Path(f"/proc/{pid}"), device))
        except PermissionError:
            return None
        return frozenset(found)

    def cpu_seconds(self) -> float | None:
        # The programs run in children of the sandbox's kernel, which itself takes 3 % of a processor at rest.
        pids = self.pids()
        return None if pids is None else process.cpu_seconds_below(pids[0])

    def memory_bytes(self) -> int | None:
        # The pages of all programs are in one file in memory, from which freed ones are cut out.
        pids = self.pids()
        return None if pids is None else process.bytes_of_open_file(pids[0], "/memfd:runsc-memory")

    def allow_memory(self, most_bytes: int) -> bool:
        with self._wall:
            self._most_bytes = most_bytes
            cgroup, used = self._cgroup(), self.memory_bytes()
            if cgroup is None or used is None:
                return False
            if not self._saving:
                cgroup.set_wall(cgroup.held_bytes() + max(most_bytes - used, ROOM_BYTES_MIN))
            return True

    @contextlib.contextmanager
    def _without_wall(self) -> Generator[None]:
        """While an image is saved: the pages of its files are the sandbox's, who writes them, until they are freed."""
        with self._wall:
            self._saving = True
            cgroup = self._cgroup()
            if cgroup is not None:
                cgroup.set_wall(None)
        try:
            yield
        finally:
            self._saving = False
            if self._most_bytes is not None:
                self.allow_memory(self._most_bytes)

    def was_killed_at_wall(self) -> bool:
        cgroup = self._cgroup()
        return self._killed_at_wall or (cgroup is not None and cgroup.has_killed())

    def _cgroup(self) -> Cgroup | None:
        try:
            return cgroup_at(Path(self.driver.cgroup_note(self._plan.sandbox_id).read_text()))
        except FileNotFoundError:
            return None

    def alive(self) -> bool:
        state = self._state()
        return state is not None and control.answers(state["sandbox"]["controlSocketPath"])

    async def kill(self) -> None:
        sandbox_id = self._plan.sandbox_id
        self._killed_at_wall = self.was_killed_at_wall()
        for pid in self.pids() or ():
            await asyncio.to_thread(_kill_if_ours, pid, sandbox_id)
        # Not `runsc delete`: it waits for zombies that whoever is PID 1 here may take seconds to reap. Nothing runs any
        # more, and what is left of a container without network, and without cgroups of runsc's, is its state files.
        note = self.driver.cgroup_note(sandbox_id)
        for leftover in self.driver.state_directory.glob(f"*{sandbox_id}*"):
            # The eleventh sandbox of a session has the name of the first one in its own.
            if leftover != note and not leftover.name.partition(sandbox_id)[2][:1].isdigit():
                leftover.unlink(missing_ok=True)
        await self._remove_cgroup(note)

    async def _remove_cgroup(self, note: Path) -> None:
        cgroup = self._cgroup()
        if cgroup is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVING_SECONDS):
                # The kernel tells nobody under version 1 when the last process is gone.
                while not cgroup.remove():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                note.unlink(missing_ok=True)
                return
        logger.warning("cgroup %s has processes that are not the sandbox's: the next sweep looks again", cgroup.path)

    def pids(self) -> tuple[int, int] | None:
        """Host pids of the sandbox's kernel and of its file server."""
        state = self._state()
        return None if state is None else (state["sandbox"]["pid"], state["goferPid"])

    def _state(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.driver.state_file(self._plan.sandbox_id).read_text())
        except (FileNotFoundError, ValueError):
            return None

    async def _control(self, method: str, argument: object = None, files: Sequence[int] = ()) -> None:
        state = self._state()
        if state is None:
            raise SandboxFailed("sandbox_gone", f"cannot reach sandbox {self._plan.sandbox_id}: it is not there")
        call = asyncio.to_thread(
            control.control_call,
            state["sandbox"]["controlSocketPath"],
            method,
            argument,
            files,
            deadline_seconds=self.driver.deadline_seconds,
        )
        await call

    async def _command(self, *words: str, namespace: bool = False, check: bool = True) -> None:
        finished = await process.run(
            self.driver.command(*words, namespace=namespace),
            deadline_seconds=self.driver.deadline_seconds,
            clock=self.driver.clock,
            check=False,
        )
        if check and finished.exit_status != 0:
            reason = finished.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise SandboxFailed("sandbox_refused", f"cannot {words[0]} sandbox {self._plan.sandbox_id}: {reason[0]}")


def bundle_config(plan: SandboxPlan) -> dict[str, Any]:
    """The OCI runtime spec of a plan. The agent's own arguments are not in it: init gets them over the link."""
    capabilities = list(CAPABILITIES)
    binds = [(mount.source, mount.destination, "ro") for mount in plan.image.mounts]
    binds += [(str(plan.init_directory), INIT_DIRECTORY, "ro"), (str(plan.workspace), "/workspace", "rw")]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [f"{INIT_DIRECTORY}/torpor-init"],
            "env": [f"PATH={plan.image.path}"],
            "cwd": "/",
            "terminal": False,
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(
                ("bounding", "effective", "inheritable", "permitted", "ambient"), capabilities
            ),
        },
        "root": {"path": plan.image.root, "readonly": False},
        "hostname": "torpor",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            *(
                {"destination": target, "type": "bind", "source": source, "options": [mode, "rbind"]}
                for source, target, mode in binds
            ),
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]},
    }


def _open(files: contextlib.ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    files.callback(os.close, descriptor)
    return descriptor


async def _to_its_end(creating: Coroutine[Any, Any, object]) -> None:
    """Make a sandbox even if the caller is cancelled: half made it has processes, and no state by which it is found."""
    made = asyncio.ensure_future(creating)
    try:
        await asyncio.shield(made)
    except asyncio.CancelledError:
        await asyncio.wait([made])
        made.exception()  # seen: what counts for the caller is that it was cancelled
        raise


def _without_closed_watches(state: Path) -> bytearray | None:
    """What to restore instead of the image's file of the kernel's objects; None: that file itself."""
    try:
        return end_closed_watches(state.read_bytes())
    except UnknownLayout as unknown:
        logger.warning("an image is restored as it is, which may bring watches of closed files back: %s", unknown)
        return None


def _in_memory(files: contextlib.ExitStack, content: bytearray) -> int:
    """A file in memory, at its beginning."""
    file = files.enter_context(os.fdopen(os.memfd_create("checkpoint"), "w+b"))
    file.write(content)
    file.seek(0)
    return file.fileno()


def _open_for_writing(process_directory: Path, device: int) -> Iterator[int]:
    """Inodes of the regular files of a device that a process holds open with write access.

    Not by path: the process lives in another root, where the files have other names. A file that is open by a name that
    was removed, and has another, counts too: what is done to it makes no event at the name that it has.
    """
    for entry in os.scandir(process_directory / "fd"):
        try:
            status = entry.stat()
            if status.st_dev != device or not stat.S_ISREG(status.st_mode):
                continue
            flags = (process_directory / "fdinfo" / entry.name).read_text().partition("flags:")[2].split()[0]
            is_removed = status.st_nlink > 0 and str(Path(entry.path).readlink()).endswith(" (deleted)")
        except FileNotFoundError:
            continue  # Closed meanwhile.
        if int(flags, 8) & os.O_ACCMODE or is_removed:
            yield status.st_ino


def _kill_if_ours(pid: int, sandbox_id: str) -> None:
    """SIGKILL a pid of a state file and wait for its end, unless the number belongs to another process by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if sandbox_id.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            select.select([descriptor], [], [], KILL_SECONDS)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(descriptor)
