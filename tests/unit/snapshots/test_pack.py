"""A pack's bytes: what is in comes out, and nothing else is ever taken for it."""

from dataclasses import replace

import pytest
from tests.unit.snapshots.making import IDS, page

from torpor.core.errors import Damaged
from torpor.snapshots.pack import PackBuilder, PackIndex


def object_pack() -> tuple[PackIndex, bytes]:
    builder = PackBuilder(IDS, holds_pages=False)
    for items in ([b"one", b"", b"three"], [b"x" * 10_000]):
        builder.add_frame(b"".join(items), [IDS.of_object(item) for item in items], [len(item) for item in items])
    return builder.finish()


def page_pack() -> tuple[PackIndex, bytes]:
    builder = PackBuilder(IDS, holds_pages=True)
    for numbers in (range(3), range(3, 5)):
        raw = [page(number) for number in numbers]
        builder.add_frame(b"".join(raw), [IDS.of_page(item) for item in raw])
    return builder.finish()


@pytest.mark.parametrize("make", [object_pack, page_pack])
def test_every_flipped_byte_is_found_and_the_pack_is_named(make) -> None:
    pack, data = make()
    for at in range(0, len(data), max(1, len(data) // 3000)):
        bad = bytearray(data)
        bad[at] ^= 1
        with pytest.raises(Damaged, match=pack.ref.key) as caught:
            PackIndex(pack.ref, bytes(bad[: pack.ref.head_bytes])).check(bytes(bad), IDS)
        assert caught.value.code == "snapshot_damaged"


@pytest.mark.parametrize("make", [object_pack, page_pack])
def test_truncated_or_extended_pack_is_damaged(make) -> None:
    pack, data = make()
    for bad in (data[:-1], data + b"\0", b"", data[: pack.ref.head_bytes - 1]):
        with pytest.raises(Damaged, match=pack.ref.key):
            PackIndex(pack.ref, bad[: pack.ref.head_bytes]).check(bad, IDS)


def test_index_read_back_describes_the_same_pack() -> None:
    pack, data = object_pack()
    again = PackIndex(pack.ref, data[: pack.ref.head_bytes])
    assert again.frames == pack.frames
    assert list(again.objects()) == [
        (IDS.of_object(item), len(item)) for item in (b"one", b"", b"three", b"x" * 10_000)
    ]
    assert [again.frame_of(item) for item in range(4)] == [0, 0, 0, 1]


def test_equal_items_make_packs_that_have_nothing_in_common() -> None:
    one, other = page_pack(), page_pack()
    assert one[0].ref.secret != other[0].ref.secret
    assert one[0].ref.name != other[0].ref.name
    places = range(one[0].ref.head_bytes, len(one[1]))
    assert sum(one[1][at] == other[1][at] for at in places) < len(places) / 100


def test_a_pack_opens_with_its_own_key_alone() -> None:
    pack, data = page_pack()
    other, _ = page_pack()
    with pytest.raises(Damaged, match=pack.ref.key):
        PackIndex(replace(pack.ref, secret=other.ref.secret), data[: pack.ref.head_bytes])


def test_frames_of_a_pack_do_not_pass_for_each_other() -> None:
    """Both are of equal length, and each is sealed as what it is."""
    builder = PackBuilder(IDS, holds_pages=True)
    for number in (1, 2):
        builder.add_frame(page(number), [IDS.of_page(page(number))])
    pack, data = builder.finish()
    first, second = (data[frame.offset : frame.offset + frame.stored_bytes] for frame in pack.frames)
    assert len(first) == len(second)
    with pytest.raises(Damaged, match="frame 0"):
        pack.open_frame(pack.frames[0], second)


def test_a_key_is_not_told_by_what_is_printed() -> None:
    pack, _ = page_pack()
    assert "secret" not in repr(pack.ref)
    assert str(pack.ref.secret) not in repr(pack.ref)


def test_bytes_that_changed_after_they_were_hashed_are_never_stored() -> None:
    builder = PackBuilder(IDS, holds_pages=True)
    builder.add_frame(page(2), [IDS.of_page(page(1))])
    with pytest.raises(Damaged, match="item 0"):
        builder.finish()
