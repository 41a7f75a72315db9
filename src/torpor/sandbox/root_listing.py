"""What a root image shows, as digests: where two machines' listings are equal, one restores what the other has cut.

A restored sandbox opens the files again that it had open, and refuses those whose size or time is another. To read all
of /usr for that would take minutes, so of what is mounted names, sizes and times are compared, not contents; of the
host image's own root, whose copies of /etc are small and made anew on each machine, the contents.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torpor.sandbox.rootfs import RootImage

_COMPILED = b"__pycache__"
"""Python writes into it when somebody outside imports something; nobody has such a file open."""

Progress = Callable[[str, int, int], None]


def root_listing(image: RootImage, progress: Progress) -> dict[str, str]:
    """A digest (hex) of the root and of each mount, by the path where it is seen."""
    trees = [("/", image.root, image.name == "host")]
    trees += [(mount.destination, mount.source, False) for mount in image.mounts]
    listed: dict[str, str] = {}
    for done, (seen, source, read_contents) in enumerate(trees, 1):
        listed[seen] = _digest(Path(source), read_contents=read_contents)
        progress("looking at the root image", done, len(trees))
    return listed


def first_difference(one: Mapping[str, str], other: Mapping[str, str]) -> str | None:
    """The first path whose trees are not equal; None if all are."""
    return next((path for path in sorted({*one, *other}) if one.get(path) != other.get(path)), None)


def _digest(source: Path, *, read_contents: bool) -> str:
    digest = hashlib.sha256()
    path = os.fsencode(source)
    for line in _lines(path, b"", os.lstat(path), read_contents=read_contents):
        digest.update(line + b"\0")
    return digest.hexdigest()


def _lines(path: bytes, name: bytes, found: os.stat_result, *, read_contents: bool) -> Iterator[bytes]:
    """One for the path, then those of what is in it, in the order of names, then an end.

    Nothing for what is empty, with nothing but such in it: mount points, and files that hide others, come and go.
    """
    if stat.S_ISREG(found.st_mode):
        if found.st_size:
            yield b"%s %o %d %s" % (name, found.st_mode & 0o777, found.st_size, _told(path, found, read_contents))
    elif stat.S_ISLNK(found.st_mode):
        yield name + b" -> " + os.fsencode(Path(os.fsdecode(path)).readlink())
    elif stat.S_ISDIR(found.st_mode):
        with os.scandir(path) as entries:
            inside = sorted((entry for entry in entries if entry.name != _COMPILED), key=lambda entry: entry.name)
        is_empty = True
        for entry in inside:
            below = entry.stat(follow_symlinks=False)
            for line in _lines(entry.path, entry.name, below, read_contents=read_contents):
                if is_empty:
                    yield name + b"/"
                is_empty = False
                yield line
        if not is_empty:
            yield b"/"
    else:
        yield b"%s %o" % (name, stat.S_IFMT(found.st_mode))


def _told(path: bytes, found: os.stat_result, read_contents: bool) -> bytes:
    if not read_contents:
        return b"%d" % int(found.st_mtime)
    with Path(os.fsdecode(path)).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
