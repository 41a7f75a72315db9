"""Keeps the number of object packs that a snapshot names small, so that the thousandth restores like the
first.

Each save adds one small pack, of which soon little is needed. Packs without a needed object are dropped; when
too many are left, those with the least needed bytes are written anew as one.
"""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from torpor.snapshots.backend import Backend
from torpor.snapshots.content_ids import ContentIds
from torpor.snapshots.objects import ObjectReader, ObjectWriter
from torpor.snapshots.pack import PackIndex

OBJECT_PACKS_MAX = 32
_FOLD_TO_PACKS = 16
_FOLD_RAW_BYTES_MAX = 8 * 1024 * 1024


def fold_packs(
    backend: Backend, ids: ContentIds, packs: Sequence[PackIndex], needed: Callable[[], AbstractSet[bytes]]
) -> tuple[tuple[PackIndex, ...], int]:
    """Packs that together hold everything needed, and the bytes that were stored for it.

    `needed` is only asked when there are too many packs, because it costs a walk over the whole tree.
    """
    if len(packs) <= OBJECT_PACKS_MAX:
        return tuple(packs), 0
    wanted = needed()
    holding = [(pack, {digest: length for digest, length in pack.objects() if digest in wanted}) for pack in packs]
    kept = [(pack, digests) for pack, digests in holding if digests]
    smallest = sorted(kept, key=lambda pair: sum(pair[1].values()))
    folded, raw_bytes = list[PackIndex](), 0
    writer = ObjectWriter(backend, ids, {})
    for pack, digests in smallest[: len(kept) - _FOLD_TO_PACKS]:
        raw_bytes += sum(digests.values())
        if raw_bytes > _FOLD_RAW_BYTES_MAX:
            break
        reader = ObjectReader(backend, ids, [pack])
        for digest in digests:
            writer.put(reader.get(digest))
        folded.append(pack)
    writer.finish()
    left = tuple(pack for pack, _ in kept if pack not in folded)
    return (*left, *writer.packs), writer.stored_bytes
