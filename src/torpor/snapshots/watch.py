"""Which directories of a workspace something happened in since a cut: an inotify watch on each of them.

Owns the watches and what was heard of them; which directories need a look for other reasons is the
capture's to say (docs/snapshot-format.md has the argument why silence means that nothing changed). Each watch
speaks once, so what is heard is bounded and a busy agent pays for one event a directory and cut. When the
machine has no watch left, or events were lost, it says so and everything has to be looked at.

Thread-safe, because a life may end while a capture is under way.
"""

import ctypes
import errno
import itertools
import logging
import os
import struct
import threading
import weakref
from collections.abc import Iterable, Iterator

logger = logging.getLogger(__name__)

_MODIFY, _ATTRIB, _CLOSE_WRITE = 0x2, 0x4, 0x8
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x40, 0x80, 0x100, 0x200, 0x400, 0x800
_OVERFLOWED, _IGNORED = 0x4000, 0x8000
_ONLY_DIRECTORY, _ONCE = 0x0100_0000, 0x8000_0000
_HEARD = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16
_generations = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryWatch:
    """The watches of one life's workspace.

    Each cut has a number, its *generation*, which no other cut of this process has. What was heard before a
    cut is kept until another is compared with that one or a later one.
    """

    def __init__(self) -> None:
        """Raises OSError when the machine gives no more watches."""
        descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if descriptor < 0:
            raise _last_error()
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._paths: dict[int, bytes] = {}
        self._heard: dict[int, set[bytes]] = {}
        self._since_last: set[bytes] = set()
        self._cut = 0
        self.close = weakref.finalize(self, os.close, descriptor)

    def arm(self, directory: int, path: bytes) -> None:
        """Watch an open directory; nothing may change in it until what it holds was listed.

        A failure is no error: from then on nothing is known.
        """
        with self._lock:
            if not self.close.alive:
                return
            name = b"/proc/self/fd/%d" % directory
            number = _libc.inotify_add_watch(self._descriptor, name, ctypes.c_uint32(_HEARD | _ONLY_DIRECTORY | _ONCE))
            if number < 0:
                error = _last_error()
                logger.warning("no more directories are watched, captures look at all files: %s", error)
                self.close()
                return
            self._paths[number] = path

    def begin_cut(self, since: int) -> frozenset[bytes] | None:
        """Directories that need a look, compared with the cut `since`; None when it must be all of them.

        What runs in the workspace must stand still until `end_cut`.
        """
        with self._lock:
            if not self._listen():
                self._heard.clear()
            self._cut = next(_generations)
            self._heard[self._cut] = self._since_last
            self._since_last = set()
            if since not in self._heard or since == self._cut:
                return None
            self._heard = {cut: paths for cut, paths in self._heard.items() if cut >= since}
            return frozenset(path for cut, paths in self._heard.items() if cut > since for path in paths)

    def end_cut(self, unsettled: Iterable[bytes]) -> int:
        """The cut's generation. The directories given need a look at the next, whatever is heard of them."""
        with self._lock:
            self._since_last.update(unsettled)
            return self._cut if self.close.alive else 0

    def _listen(self) -> bool:
        """Note what was heard; False when something was lost."""
        complete = self.close.alive
        for number, mask in self._events():
            path = self._paths.get(number)
            if mask & _OVERFLOWED or (path is None and not mask & _IGNORED):
                complete = False
            elif path is not None:
                self._since_last.add(path)
            if mask & _IGNORED:
                self._paths.pop(number, None)
        return complete and self.close.alive

    def _events(self) -> Iterator[tuple[int, int]]:
        """(watch number, mask) of everything that is queued."""
        while self.close.alive:
            try:
                data = os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                logger.warning("the watch of a workspace ended, captures look at all files: %s", error)
                self.close()
                return
            at = 0
            while at < len(data):
                number, mask, _, name_bytes = _EVENT.unpack_from(data, at)
                at += _EVENT.size + name_bytes
                yield number, mask


def open_watch() -> DirectoryWatch | None:
    """None when the machine gives no more watches: then captures look at all files."""
    try:
        return DirectoryWatch()
    except OSError as error:
        logger.warning("no directories are watched, captures look at all files: %s", error)
        return None


def _last_error() -> OSError:
    number = ctypes.get_errno() or errno.EIO
    return OSError(number, os.strerror(number))
