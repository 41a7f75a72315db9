"""What every driver offers: create a sandbox, start or restore it, pause, save an image, kill.

A sandbox is created from a plan, which owns a directory of its own: FIFOs, bundle, the driver's log. It outlives the
node that made it; `find` hands it to the next one. A created sandbox that nothing runs in yet is a warm slot.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torpor.core.pins import Pins
from torpor.sandbox.rootfs import RootImage

INIT_DIRECTORY = "/.torpor"
"""Where a plan's `init_directory` is inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxPlan:
    """What a sandbox is made of.

    Attributes:
        sandbox_id: unique on this machine, at most 40 characters of `[a-z0-9-]`.
        directory: its own; holds `to-guest`, `from-guest`, `bundle/`, `driver.log`, `made-by`.
        image: the read-only root and what is mounted into it.
        workspace: host directory that is `/workspace` inside, writable.
        init_directory: host directory with `torpor-init`, `/.torpor` inside.
    """

    sandbox_id: str
    directory: Path
    image: RootImage
    workspace: Path
    init_directory: Path

    @property
    def to_guest(self) -> Path:
        return self.directory / "to-guest"

    @property
    def from_guest(self) -> Path:
        return self.directory / "from-guest"

    @property
    def made_by(self) -> Path:
        """Where its driver says which program it made the sandbox with."""
        return self.directory / "made-by"


class Sandbox(Protocol):
    """One isolated machine. Every method raises SandboxFailed when the driver refuses."""

    @property
    def plan(self) -> SandboxPlan: ...

    @property
    def pins(self) -> Pins:
        """Of the driver that it was made with."""
        ...

    async def start(self) -> None:
        """Run PID 1 in a created sandbox."""
        ...

    async def restore(self, image_directory: Path) -> None:
        """Load an image into a created sandbox; its processes run on from there."""
        ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def save_image(self, image_directory: Path) -> None:
        """Write the image into a new or empty directory; the sandbox stays as it was. Not synced to disk."""
        ...

    def open_for_writing(self) -> frozenset[int] | None:
        """Workspace files, by inode, that programs inside may be changing through a mapping, or by a name that they no
        longer have.

        None when the driver can't tell: then every file has to be read.
        """
        ...

    def cpu_seconds(self) -> float | None:
        """Processor time that its programs, as far as they still run, have used; None when the driver can't tell."""
        ...

    def memory_bytes(self) -> int | None:
        """What all of its programs have in memory, with the files that they wrote outside of the workspace; None when
        the driver can't tell.
        """
        ...

    def allow_memory(self, most_bytes: int) -> bool:
        """Let the kernel kill it when it has more `memory_bytes` than that. To be said again now and then: the
        kernel counts other things too. False: there is no such wall here.
        """
        ...

    def was_killed_at_wall(self) -> bool:
        """Whether the kernel did so. It may live, with some of its programs dead: it is of no use any more."""
        ...

    def alive(self) -> bool:
        """Its kernel answers. Never blocks for long."""
        ...

    async def kill(self) -> None:
        """Destroy it and its driver state; done already is fine."""
        ...


class Driver(Protocol):
    @property
    def pins(self) -> dict[str, str]:
        """What an image of this driver needs to be restored: binary hash, CPU features, flags (core/pins.py)."""
        ...

    async def create(self, plan: SandboxPlan) -> Sandbox:
        """Make a sandbox that waits for `start` or `restore`."""
        ...

    def find(self, plan: SandboxPlan) -> Sandbox | None:
        """The sandbox of that id, if the driver knows it (alive or not)."""
        ...

    def sandbox_ids(self) -> Sequence[str]:
        """Ids of all sandboxes that the driver has state of."""
        ...


class Drivers(Protocol):
    """The drivers that can be had here, for each program that made a sandbox."""

    @property
    def present(self) -> Driver:
        """What new sandboxes are made with."""
        ...

    def for_image(self, pins: Pins) -> Driver:
        """The one that wrote an image with these pins, else the present one."""
        ...

    def of_sandbox(self, plan: SandboxPlan) -> Driver:
        """The one that made the sandbox of this plan, else the present one."""
        ...
