"""The indexes of the newest snapshots, in memory: what the next save of a session is compared with. Thread-safe."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from torpor.core.ids import KeyId, SnapshotId
from torpor.snapshots.manifest import SnapshotRef
from torpor.snapshots.pack import PackIndex
from torpor.snapshots.pages import PageIndex

ITEMS_MAX = 2_000_000
"""24 bytes a page, about 40 an object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes:
    """What a save needs to know of its parent."""

    pages: PageIndex
    object_packs: tuple[PackIndex, ...]

    @property
    def items(self) -> int:
        return self.pages.pages + sum(pack.items for pack in self.object_packs)


class IndexCache:
    """Of a line of snapshots the last two, since a save may overtake the commit of the one before it."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[SnapshotId, KeyId], tuple[Indexes, SnapshotId | None]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, ref: SnapshotRef) -> bool:
        return _key(ref) in self._known

    def recall(self, ref: SnapshotRef) -> Indexes | None:
        with self._lock:
            known = self._known.get(_key(ref))
            if known is None:
                return None
            self._known.move_to_end(_key(ref))
            return known[0]

    def remember(self, ref: SnapshotRef, indexes: Indexes, parent: SnapshotId | None) -> None:
        """Keep the indexes of a new snapshot; its grandparent's, and what was used longest ago if there is too much,
        go.
        """
        with self._lock:
            self._known[_key(ref)] = indexes, parent
            if parent is not None and (before := self._known.get((parent, ref.key.id))) and before[1] is not None:
                self._known.pop((before[1], ref.key.id), None)
            while len(self._known) > 1 and sum(known.items for known, _ in self._known.values()) > ITEMS_MAX:
                self._known.popitem(last=False)

    def forget(self, ref: SnapshotRef) -> None:
        with self._lock:
            self._known.pop(_key(ref), None)


def _key(ref: SnapshotRef) -> tuple[SnapshotId, KeyId]:
    return ref.id, ref.key.id
