"""A cgroup around each sandbox, where this machine lets us make one: a wall that no program passes by being fast.

The kernel kills a sandbox that takes more than the wall says; so the wall stands behind the limit at which a session is
parked (runtime/memory.py), and is moved as the sandbox grows by what is not its programs' memory. It holds everything
that the sandbox's processes touched first: the memory of its programs, their kernel's own, images that were saved to
memory, and files read or written, which the kernel can let go of.

Only an empty cgroup is ever removed, and no process is found or killed by it: whoever has the wrong one does no harm.
Under version 2 no cgroup with processes may have children with limits. So it is made beside the node's own cgroup, not
in it: a service that systemd starts again could not be put into a cgroup that has such children.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

ENTER = '{ echo $$ > "$0"; } 2> /dev/null; exec "$@"'
"""A shell's: without the wall a sandbox is better than none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cgroup:
    """One sandbox's. Kernel interface: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.

    Nothing here raises: what can't be read is nothing, what can't be written is left.
    """

    path: Path

    WALL: ClassVar[str]
    NO_WALL: ClassVar[str]
    USED: ClassVar[str]
    EVENTS: ClassVar[str]
    SETTINGS: ClassVar[Mapping[str, str]]

    def make(self) -> bool:
        """Make it, without a wall; False: it can't be had."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError:
            return False
        for name, value in self.SETTINGS.items():
            self._write(name, value)
        return True

    def entering(self) -> list[str]:
        """What goes before the argv of a command that is to run in it, with all that it starts."""
        return ["/bin/sh", "-c", ENTER, str(self.path / "cgroup.procs")]

    def set_wall(self, wall_bytes: int | None) -> None:
        """Kill its processes when they have so much; None: never. Fails where they have more already and can't let go
        of it.
        """
        self._write(self.WALL, self.NO_WALL if wall_bytes is None else str(wall_bytes))

    def held_bytes(self) -> int:
        """What they have and the kernel can't take away, for files that are read can be read again."""
        used = int(self._read(self.USED) or 0)
        stat = _numbers(self._read("memory.stat"))
        return used - stat.get("active_file", 0) - stat.get("inactive_file", 0)

    def has_killed(self) -> bool:
        """Whether the kernel killed one of its processes at the wall."""
        return _numbers(self._read(self.EVENTS)).get("oom_kill", 0) > 0 and self._reached_wall()

    def remove(self) -> bool:
        """Remove it; False: there are processes in it still. Gone already is fine."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _reached_wall(self) -> bool:
        """If not, the whole machine, or a cgroup above, was short of memory."""
        raise NotImplementedError

    def _read(self, name: str) -> str:
        with suppress(OSError):
            return (self.path / name).read_text()
        return ""

    def _write(self, name: str, value: str) -> None:
        with suppress(OSError):
            (self.path / name).write_text(value)


class CgroupV1(Cgroup):
    """Of the memory controller's own hierarchy."""

    WALL = "memory.limit_in_bytes"
    NO_WALL = "-1"
    USED = "memory.usage_in_bytes"
    EVENTS = "memory.oom_control"
    SETTINGS: ClassVar = {"memory.swappiness": "0"}  # What is swapped out would not count.

    def _reached_wall(self) -> bool:
        return int(self._read("memory.failcnt") or 0) > 0


class CgroupV2(Cgroup):
    """Of the one hierarchy."""

    WALL = "memory.max"
    NO_WALL = "max"
    USED = "memory.current"
    EVENTS = "memory.events"
    # What is swapped out would not count; and a sandbox that lost one of its processes is of no use.
    SETTINGS: ClassVar = {"memory.swap.max": "0", "memory.oom.group": "1"}

    def _reached_wall(self) -> bool:
        return _numbers(self._read(self.EVENTS)).get("oom", 0) > 0


def cgroup_at(path: Path) -> Cgroup:
    """The one of a path that was noted; whether it is still there shows."""
    return CgroupV2(path=path) if (path / "cgroup.controllers").exists() else CgroupV1(path=path)


def cgroup_for(sandbox_id: str, proc: Path = Path("/proc")) -> Cgroup | None:
    """Where this process may make the cgroup of a sandbox; None: nowhere.

    Args:
        proc: where `self/mountinfo` and `self/cgroup` are.
    """
    name = f"torpor-{sandbox_id}"
    for kind, mounted_at, own in _hierarchies(proc):
        if kind == "cgroup" and os.access(own, os.W_OK):
            return CgroupV1(path=own / name)
        beside = _beside(own, mounted_at) if kind == "cgroup2" else None
        if beside is not None:
            return CgroupV2(path=beside / name)
    return None


def _hierarchies(proc: Path) -> Iterator[tuple[str, Path, Path]]:
    """Each that may control memory: its kind, where it is mounted, and this process' own cgroup in it."""
    own = dict[str, str]()
    for line in _lines(proc / "self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            own["cgroup2"] = path
        elif "memory" in controllers.split(","):
            own["cgroup"] = path
    for line in _lines(proc / "self/mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        root, mounted_at = mount.split()[3:5]
        kind, _, options = filesystem.split()[:3]
        if kind not in own or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        with suppress(ValueError):  # It is mounted from a place that this process is not in.
            yield kind, Path(mounted_at), Path(mounted_at) / Path(own[kind]).relative_to(root)


def _beside(own: Path, mounted_at: Path) -> Path | None:
    """The nearest cgroup from a process' own upwards whose children have limits and where it may make one.

    None also if that were to leave a limit behind that somebody set for the process.
    """
    for above in (own, *own.parents):
        controllers = " ".join(_lines(above / "cgroup.subtree_control")).split()
        if "memory" in controllers and all(os.access(file, os.W_OK) for file in (above, above / "cgroup.procs")):
            return above
        if above == mounted_at or _lines(above / "memory.max") not in ([], ["max"]):
            return None
    return None


def _lines(file: Path) -> list[str]:
    with suppress(OSError):
        return file.read_text().splitlines()
    return []


def _numbers(text: str) -> dict[str, int]:
    """Of a file of the kernel's with a name and a number a line."""
    return {name: int(number) for name, _, number in (line.partition(" ") for line in text.splitlines())}
