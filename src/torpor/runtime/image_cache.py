"""Raw images of sessions that no node runs, kept in memory so that `torpor resume` need not rebuild them. Bounded.

An image goes when it is older than the time or does not fit the size, the oldest first, and all of them go when
memory is short: each is a copy of a snapshot in the store. Nobody takes one that is in use: who owns a session holds
a shared flock on the session's directory here for as long, and only what can be locked alone is touched. Unfinished
images of dead nodes are garbage.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from torpor.config import read_image_cache
from torpor.core.clock import Clock

MEMORY_DIRECTORY = Path("/dev/shm")  # noqa: S108 - private subdirectories, mode 0700, checked to be ours
COMPLETE = "complete"
"""The mark of an image that is whole; its time is the image's."""
HOME_MARK = "home"
"""A link in a TORPOR_HOME's directory to that TORPOR_HOME."""
TEND_SECONDS = 15
PRESSURE_FILE = Path("/proc/pressure/memory")
PRESSURE_PERCENT_MAX = 10.0
"""Of the last ten seconds, in which some process waited for memory."""


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """What sleeping sessions may keep in memory: so much in all, and each for so long."""

    bytes_max: int
    seconds_max: int


NOTHING = CacheLimits(bytes_max=0, seconds_max=0)


class ImageCache:
    """What the sessions of one TORPOR_HOME that no node runs keep in memory."""

    def __init__(self, directory: Path, limits: CacheLimits, clock: Clock) -> None:
        self._directory = directory
        self._limits = limits
        self._clock = clock

    async def tend(self) -> None:
        """Bring it within its limits, or free all of it when memory is short."""
        limits = NOTHING if memory_is_short() else self._limits
        await asyncio.to_thread(trim, self._directory, limits, self._clock.wall_ns())

    async def tend_forever(self) -> None:
        while True:
            await self.tend()
            await asyncio.sleep(TEND_SECONDS)


def staging_directory(home: Path, memory_directory: Path = MEMORY_DIRECTORY) -> Path:
    """Where all sessions of a TORPOR_HOME stage their images."""
    name = hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:12]
    return memory_directory / f"torpor-{os.geteuid()}-{name}"


def open_image_cache(home: Path, clock: Clock) -> ImageCache:
    """With the limits that the user says.

    Raises:
        InvalidInput: config.toml is malformed.
    """
    return ImageCache(staging_directory(home), CacheLimits(*read_image_cache(home)), clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Idle:
    """One snapshot's directory of a session that no node runs."""

    path: Path
    bytes: int
    made_ns: int
    is_whole: bool


def trim(directory: Path, limits: CacheLimits, wall_ns: int) -> int:
    """Bring the images below a TORPOR_HOME's directory within the limits; gives the bytes that this freed."""
    freed = kept = 0
    if not _is_ours(directory):
        return 0
    with contextlib.ExitStack() as locks:
        sessions = [path for path in directories(directory) if locks.enter_context(_taken(path))]
        found = [idle for session in sessions for idle in _images(session)]
        for idle in sorted(found, key=lambda idle: idle.made_ns, reverse=True):
            is_young = wall_ns - idle.made_ns < limits.seconds_max * 1_000_000_000
            if idle.is_whole and is_young and kept + idle.bytes <= limits.bytes_max:
                kept += idle.bytes
            else:
                shutil.rmtree(idle.path, ignore_errors=True)
                freed += idle.bytes
        for path in sessions:
            with contextlib.suppress(OSError):  # Somebody's image is in it, or it went already.
                path.rmdir()
        remove_if_empty(directory)
    return freed


def free(session_directory: Path) -> None:
    """Free all images of a session, unless somebody holds them."""
    with _taken(session_directory) as is_taken:
        if is_taken:
            shutil.rmtree(session_directory, ignore_errors=True)


def mark(directory: Path, home: Path) -> None:
    """Say in a TORPOR_HOME's directory whose it is."""
    with contextlib.suppress(FileExistsError, FileNotFoundError):  # It is gone: who makes it again marks it.
        (directory / HOME_MARK).symlink_to(home.resolve())


def remove_if_empty(directory: Path) -> None:
    """Remove a TORPOR_HOME's directory if no session has anything in it."""
    link = directory / HOME_MARK
    with contextlib.suppress(OSError):  # It went already.
        if {path.name for path in directory.iterdir()} != {HOME_MARK}:
            directory.rmdir()
            return
        home = link.readlink()
        link.unlink()
        try:
            directory.rmdir()
        except OSError:  # A session has begun meanwhile.
            mark(directory, home)


def free_orphans(memory_directory: Path = MEMORY_DIRECTORY) -> None:
    """Free what this user's TORPOR_HOMEs that are gone keep in memory, but for what somebody holds.

    A directory that says nothing of its TORPOR_HOME may be anybody's, and is left alone.
    """
    for directory in memory_directory.glob(f"torpor-{os.geteuid()}-*"):
        if not _is_ours(directory) or not (directory / HOME_MARK).is_symlink():
            continue
        try:
            (directory / HOME_MARK).stat()
        except FileNotFoundError:
            trim(directory, NOTHING, 0)
        except OSError:
            continue  # Perhaps it is there.


def memory_is_short() -> bool:
    """Whether processes of this machine wait for memory, as far as its kernel counts that."""
    try:
        words = PRESSURE_FILE.read_text().split()
    except OSError:
        return False
    averages = dict(word.split("=") for word in words[1:4])
    return words[0] == "some" and float(averages["avg10"]) >= PRESSURE_PERCENT_MAX


def hold(session_directory: Path) -> int | None:
    """Keep `trim` away from a session's directory until the descriptor that this gives is closed; None: it is gone."""
    try:
        descriptor = os.open(session_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), session_directory.stat()):
            return descriptor
    os.close(descriptor)
    return None


@contextlib.contextmanager
def _taken(session_directory: Path) -> Generator[bool]:
    """Whether nobody holds the directory; then nobody does until the end."""
    try:
        descriptor = os.open(session_directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _images(session_directory: Path) -> Iterator[_Idle]:
    for path in directories(session_directory):
        mark = path / COMPLETE
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        is_whole = mark.exists()
        yield _Idle(path=path, bytes=size, made_ns=(mark if is_whole else path).stat().st_mtime_ns, is_whole=is_whole)


def _is_ours(directory: Path) -> bool:
    """Others may write to the memory directory, and have made one of that name."""
    try:
        status = directory.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def directories(parent: Path) -> list[Path]:
    """The directories in it; none if it is not there."""
    found = parent.iterdir() if parent.is_dir() else ()
    return [path for path in found if path.is_dir() and not path.is_symlink()]
