"""A pack's bytes: what is in comes out, and nothing else is ever taken for it."""

from hashlib import sha256

import pytest
from tests.unit.snapshots.making import page

from torpor.core.errors import Damaged
from torpor.snapshots.pack import PackBuilder, PackIndex


def object_pack() -> tuple[PackIndex, bytes]:
    builder = PackBuilder(holds_pages=False)
    for items in ([b"one", b"", b"three"], [b"x" * 10_000]):
        builder.add_frame(b"".join(items), [sha256(item).digest() for item in items], [len(item) for item in items])
    return builder.finish()


def page_pack() -> tuple[PackIndex, bytes]:
    builder = PackBuilder(holds_pages=True)
    for numbers in (range(3), range(3, 5)):
        raw = [page(number) for number in numbers]
        builder.add_frame(b"".join(raw), [sha256(item).digest()[:16] for item in raw])
    return builder.finish()


@pytest.mark.parametrize("make", [object_pack, page_pack])
def test_every_flipped_byte_is_found_and_the_pack_is_named(make) -> None:
    pack, data = make()
    for at in range(0, len(data), max(1, len(data) // 3000)):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(Damaged, match=pack.ref.key) as caught:
            PackIndex(pack.ref, bytes(bad[: pack.ref.index_bytes])).check(bytes(bad))
        assert caught.value.code == "snapshot_damaged"


@pytest.mark.parametrize("make", [object_pack, page_pack])
def test_truncated_or_extended_pack_is_damaged(make) -> None:
    pack, data = make()
    for bad in (data[:-1], data + b"\0", b"", data[: pack.ref.index_bytes - 1]):
        with pytest.raises(Damaged, match=pack.ref.key):
            PackIndex(pack.ref, bad[: pack.ref.index_bytes]).check(bad)


def test_index_read_back_describes_the_same_pack() -> None:
    pack, data = object_pack()
    again = PackIndex(pack.ref, data[: pack.ref.index_bytes])
    assert again.frames == pack.frames
    assert list(again.objects()) == [
        (sha256(item).digest(), len(item)) for item in (b"one", b"", b"three", b"x" * 10_000)
    ]
    assert [again.frame_of(item) for item in range(4)] == [0, 0, 0, 1]


def test_equal_items_make_an_equal_pack() -> None:
    assert page_pack()[1] == page_pack()[1]


def test_bytes_that_changed_after_they_were_hashed_are_never_stored() -> None:
    builder = PackBuilder(holds_pages=True)
    builder.add_frame(page(2), [sha256(page(1)).digest()[:16]])
    with pytest.raises(Damaged, match="item 0"):
        builder.finish()
