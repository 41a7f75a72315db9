"""Ends the epoll watches of closed files that a save by runsc brings back, before its image is restored.

gVisor leaves links between watches (epollInterest) that it found not ready together. One that the program removed is
still reached by its neighbour's link, so it is saved, and after a restore it reports its closed file once more. Who
keeps a pointer in a watch, as everything on tokio does, follows it into freed memory, and dies of SIGSEGV or hangs.
gVisor 20260330 clears the links (its commit 5d857245b); this is for the versions whose control socket is spoken, which
are older, and whose layout was read (pkg/state, pkg/compressio). A watch ends by getting an event mask of 0, in as many
bytes as before. Nothing else changes, and what is stored never does.

    checkpoint.img   "gVisorSF" | 8 bytes: length n | n bytes of JSON | 32 bytes of hash | piece...
    piece            4 bytes: length | bytes            one for each byte of a number, one for each text
    graph            number: 1 << 63 + count of objects | type... | object...      two: processor features, the kernel
    type             17 | name | count | name of a field...                        they count from 1
    object           2 | its number, which rises | value
    value            kind | what the kind says, see `_Reader.rest`                 zeros and empty ones are kind 5
    text             length | its bytes

The image is large and nearly all of it is of no interest: objects are found by searching for their first bytes, each is
read in full and has to be what it should be, and what is read in all is bounded. If anything is not so, the image is
refused here, and restored as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

OLDEST_WITHOUT_CLOSED_WATCHES = 20260330
"""The first release of runsc that does not save them."""

MAGIC = b"gVisorSF"
HASH_BYTES = 32
OBJECTS = 1 << 63
NUMBERS = (0, 1, 2, 3, 4)
UINT, NIL, REF, TEXT, SLICE, ARRAY, MAP, STRUCT, NO_FIELDS, FIELDS, INTERFACE, TYPE = (2, *range(5, 15), 17)
COMPLEX = (15, 16)

WATCH = "pkg/sentry/vfs.epollInterest"
WATCH_FIELDS = ["epoll", "key", "waiter", "mask", "ready", "epollInterestEntry", "readySeq", "userData"]
EPOLL = "pkg/sentry/vfs.EpollInstance"
KEY = "pkg/sentry/vfs.epollInterestKey"


NUMBER_BYTES_MAX = 10
UNREADABLE = (AttributeError, IndexError, KeyError, ValueError, RecursionError)


class UnknownLayout(Exception):
    """The image is not laid out as this module says."""


@dataclass(frozen=True, slots=True)
class _Ref:
    root: int


@dataclass(frozen=True, slots=True)
class _Struct:
    """A value of a type; `starts` are where its fields begin."""

    type_number: int
    fields: list[Any]
    starts: list[int]


@dataclass(frozen=True, slots=True)
class _Type:
    number: int
    fields: list[str]


_Found: TypeAlias = Mapping[int, _Struct]
"""Objects of one type, by their numbers."""


def end_closed_watches(image: bytes) -> bytearray | None:
    """The bytes of checkpoint.img with the watches of closed files ended; None if it has none.

    Raises:
        UnknownLayout: it can't be read.
    """
    reader = _Reader(image, _begin(image))
    try:
        objects, _ = reader.begin_graph()
        for _ in range(objects):
            reader.object()
        _, types = reader.begin_graph()
        if WATCH not in types:
            return None
        closed = _closed(_Kernel(image, reader.at, types))
    except UNREADABLE as error:
        raise UnknownLayout(f"cannot read the image: {error!r}") from error
    if not closed:
        return None
    mended = bytearray(image)
    for watch in closed:
        _zero(mended, watch.starts[WATCH_FIELDS.index("mask")])
    return mended


def _begin(image: bytes) -> int:
    """Where the first piece is."""
    if not image.startswith(MAGIC):
        raise UnknownLayout("it does not begin as an image")
    return len(MAGIC) + 8 + int.from_bytes(image[len(MAGIC) : len(MAGIC) + 8]) + HASH_BYTES


def _closed(kernel: "_Kernel") -> list[_Struct]:
    """The watches that are in no epoll instance's set."""
    watches, epolls = kernel.all_of(WATCH), kernel.all_of(EPOLL)
    if kernel.types[WATCH].fields != WATCH_FIELDS:
        raise UnknownLayout(f"a watch has the fields {kernel.types[WATCH].fields}")
    open_ones: set[int] = set()
    interest = kernel.types[EPOLL].fields.index("interest")
    for epoll in epolls.values():
        held = epoll.fields[interest]
        if held is not None:
            open_ones.update(kernel.values_by_key(held.root, KEY))
    if not open_ones <= watches.keys() or any(watch.fields[0].root not in epolls for watch in watches.values()):
        raise UnknownLayout(f"of {len(watches)} watches and {len(epolls)} epoll instances some are not found")
    return [watch for number, watch in watches.items() if number not in open_ones]


def _zero(image: bytearray, at: int) -> None:
    """Make the number that stands there 0. A number may have more bytes than it needs, so its length stays."""
    reader = _Reader(bytes(image[at : at + 64]), 0)
    if reader.number() == NIL:
        return
    first = at + reader.at
    reader.number()
    end = at + reader.at
    image[first + 4 : end : 5] = b"\x80" * ((end - first) // 5 - 1) + b"\0"


class _Kernel:
    """The objects of the second graph, found by search."""

    def __init__(self, image: bytes, start: int, types: Mapping[str, _Type]) -> None:
        self._image = image
        self._start = start
        self.types = types
        self._spare_bytes = 2 * len(image)  # What is looked for does not overlap.

    def all_of(self, name: str) -> _Found:
        """Every object of a type. Those looked for here are no part of another object."""
        if name not in self.types:
            return {}
        wanted = self.types[name]
        begins = _piece(STRUCT) + _pieces(wanted.number) + _piece(FIELDS) + _pieces(len(wanted.fields))
        found: dict[int, _Struct] = {}
        for at in self._each(begins):
            number = self._number_before(at)
            if number is not None and (read := self._whole(at, number)) is not None:
                found[number] = read
        return found

    def values_by_key(self, number: int, key: str) -> list[int]:
        """The numbers of the objects that a map has as values. Raises UnknownLayout if that map is not to be found."""
        candidates: list[list[int]] = []
        for at in self._each(_piece(UINT) + _pieces(number) + _piece(MAP)):
            entries = self._whole(at + 5 + len(_pieces(number)), number)
            if entries is not None and all(
                isinstance(one, _Struct) and one.type_number == self.types[key].number and isinstance(other, _Ref)
                for one, other in entries
            ):
                candidates.append([other.root for _, other in entries])
        if len(candidates) != 1:
            raise UnknownLayout(f"map {number} is there {len(candidates)} times")
        return candidates[0]

    def _each(self, begins: bytes) -> Iterator[int]:
        at = self._image.find(begins, self._start)
        while at >= 0:
            yield at
            at = self._image.find(begins, at + 1)

    def _number_before(self, at: int) -> int | None:
        """The number of the object that begins there, or None if no number stands before."""
        for first in range(at - 5, at - 5 * NUMBER_BYTES_MAX, -5):
            if self._image[first - 1] < 0x80:  # The byte before is no part of the number.
                kind = self._image[first - 5 : first]
                return _Reader(self._image, first).number() if kind == _piece(UINT) else None
        return None

    def _whole(self, at: int, number: int) -> Any:
        """The value that begins there, if an object with a higher number follows it, or nothing."""
        if self._spare_bytes < 0:
            raise UnknownLayout("it has more that looks like a watch than it has room for")
        reader = _Reader(self._image, at)
        try:
            value = reader.value()
            followed = reader.at == len(self._image) or (reader.number() == UINT and reader.number() > number)
        except UNREADABLE:
            return None
        finally:
            self._spare_bytes -= reader.at - at
        return value if followed else None


class _Reader:
    """Reads on from a place in the image."""

    def __init__(self, image: bytes, at: int) -> None:
        self._image = image
        self.at = at

    def begin_graph(self) -> tuple[int, dict[str, _Type]]:
        """How many objects it has, and its types by name."""
        objects = self.number()
        if not objects & OBJECTS:
            raise ValueError("no objects")
        types: dict[str, _Type] = {}
        while (before := self.at) < len(self._image) and self.number() == TYPE:
            name = self.piece(self.number()).decode()
            fields = [self.piece(self.number()).decode() for _ in range(self.number())]
            types[name] = _Type(len(types) + 1, fields)
        self.at = before
        return objects ^ OBJECTS, types

    def object(self) -> Any:
        if self.number() != UINT:
            raise ValueError("an object has no number")
        self.number()
        return self.value()

    def value(self) -> Any:
        return self.rest(self.number())

    def rest(self, kind: int) -> Any:
        """What follows a kind."""
        return _BY_KIND[kind](self)

    def number(self) -> int:
        number = shift = 0
        while True:
            byte = self.piece(1)[0]
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    def piece(self, count: int) -> bytes:
        """One piece, which has to have that many bytes."""
        start = self.at + 4
        if int.from_bytes(self._image[self.at : start]) != count or start + count > len(self._image):
            raise ValueError(f"no piece of {count} bytes at {self.at}")
        self.at = start + count
        return self._image[start : self.at]

    def ref(self) -> _Ref:
        """An object's number, and the way into it: positions (twice their value) and names (by their length)."""
        root, steps = self.number(), self.number()
        for _ in range(steps):
            step = self.number()
            if step & 1:
                self.piece((step >> 1) + 1)
        if steps:
            self.type_of()
        return _Ref(root)

    def alike(self, columns: int) -> list[Any]:
        """Rows of values; only those of the first row have their kinds before them."""
        count = self.number()
        if count == 0:
            return []
        if count > len(self._image):
            raise ValueError(f"{count} rows at {self.at}")
        kinds: list[int] = []
        first: list[Any] = []
        for _ in range(columns):
            kinds.append(self.number())
            first.append(self.rest(kinds[-1]))
        return [first, *([self.rest(kind) for kind in kinds] for _ in range(count - 1))]

    def struct(self) -> _Struct:
        number, before, kind = self.number(), self.at, self.number()
        if kind != FIELDS:  # One field stands alone, and none is a kind too.
            return _Struct(number, [] if kind == NO_FIELDS else [self.rest(kind)], [before])
        fields: list[Any] = []
        starts: list[int] = []
        for _ in range(self.number()):
            starts.append(self.at)
            fields.append(self.value())
        return _Struct(number, fields, starts)

    def type_of(self) -> None:
        """A type's number, or a pointer, an array, a slice, a map of such, or nothing."""
        kind = self.number()
        if kind in (0, 2):
            self.number()
        for _ in range({1: 1, 2: 1, 3: 1, 4: 2}.get(kind, 0)):
            self.type_of()


# Of the class, and not of each reader: bound to a reader it would be a cycle, which keeps the image until it is found.
_BY_KIND: dict[int, Callable[[_Reader], Any]] = {
    **dict.fromkeys(NUMBERS, _Reader.number),
    **dict.fromkeys(COMPLEX, lambda reader: (reader.number(), reader.number())),
    **dict.fromkeys((NIL, NO_FIELDS), lambda _: None),
    REF: lambda reader: reader.ref(),
    TEXT: lambda reader: reader.piece(reader.number()),
    SLICE: lambda reader: (reader.number(), reader.number(), reader.ref()),
    ARRAY: lambda reader: reader.alike(1),
    MAP: lambda reader: reader.alike(2),
    STRUCT: lambda reader: reader.struct(),
    INTERFACE: lambda reader: (reader.type_of(), reader.value()),
}


def _piece(byte: int) -> bytes:
    return bytes((0, 0, 0, 1, byte))


def _pieces(number: int) -> bytes:
    """A number as it stands in an image."""
    pieces = b""
    while number >= 0x80:
        pieces += _piece(number & 0x7F | 0x80)
        number >>= 7
    return pieces + _piece(number)
