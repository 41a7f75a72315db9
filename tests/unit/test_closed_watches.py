"""Claims of torpor.sandbox.closed_watches on images written here; a real one is in tests/integration."""

import gc
import json
import sys
from collections.abc import Sequence

import pytest

from torpor.sandbox.closed_watches import EPOLL, KEY, WATCH, WATCH_FIELDS, UnknownLayout, end_closed_watches

EPOLL_FIELDS = ["vfsfd", "interest", "ready", "readySeq"]
ENTRY, WAITER = "pkg/sentry/vfs.epollInterestEntry", "pkg/waiter.Entry"
TYPES = [
    ("pkg/sentry/kernel.Kernel", ["vfs"]),
    (EPOLL, EPOLL_FIELDS),
    (WATCH, WATCH_FIELDS),
    (KEY, ["file", "num"]),
    (ENTRY, ["next", "prev"]),
    (WAITER, ["eventListener", "mask"]),
]
EDGE_TRIGGERED = 0x8000201D


def piece(content: bytes) -> bytes:
    return len(content).to_bytes(4) + content


def number(value: int) -> bytes:
    pieces = b""
    while value >= 0x80:
        pieces += piece(bytes([value & 0x7F | 0x80]))
        value >>= 7
    return pieces + piece(bytes([value]))


def text(value: str) -> bytes:
    return number(len(value)) + piece(value.encode())


NIL = number(5)


def uint(value: int) -> bytes:
    return number(2) + number(value)


def ref_rest(target: int) -> bytes:
    return number(target) + number(0)


def ref(target: int | None) -> bytes:
    return NIL if target is None else number(6) + ref_rest(target)


def structure(name: str, *fields: bytes) -> bytes:
    type_number = [known for known, _ in TYPES].index(name) + 1
    return number(11) + number(type_number) + number(13) + number(len(fields)) + b"".join(fields)


def watch(epoll: int, file: int, mask: int, *, after: int | None = None, before: int | None = None) -> bytes:
    return structure(
        WATCH,
        ref(epoll),
        structure(KEY, ref(file), uint(9)),
        structure(WAITER, NIL, uint(mask)),
        uint(mask),
        NIL,
        structure(ENTRY, ref(after), ref(before)),
        uint(3383),
        number(9) + number(2) + number(1) + number(84) + number(71),
    )


def interest(*held: tuple[int, int]) -> bytes:
    """A map from files to watches: the first entry has the kinds."""
    rows = number(10) + number(len(held))
    for at, (file, target) in enumerate(held):
        key = structure(KEY, ref(file), uint(9))
        rows += key + ref(target) if at == 0 else key[len(number(11)) :] + ref_rest(target)
    return rows


def graph(types: Sequence[tuple[str, list[str]]], objects: dict[int, bytes]) -> bytes:
    head = number(1 << 63 | len(objects))
    for name, fields in types:
        head += number(17) + text(name) + number(len(fields)) + b"".join(text(field) for field in fields)
    return head + b"".join(uint(one) + value for one, value in objects.items())


def image(objects: dict[int, bytes], types: Sequence[tuple[str, list[str]]] = TYPES) -> bytes:
    about = json.dumps({"compression": "none"}).encode()
    features = graph([("pkg/cpuid.FeatureSet", ["function"])], {1: ref(2), 2: uint(7)})
    return b"gVisorSF" + len(about).to_bytes(8) + about + bytes(32) + features + graph(types, objects)


def epoll(held: int | None) -> bytes:
    return structure(EPOLL, NIL, ref(held), NIL, uint(4))


ONE_CLOSED = {
    1: ref(2),
    2: epoll(5),
    3: watch(2, 20, EDGE_TRIGGERED, before=4),
    4: watch(2, 21, EDGE_TRIGGERED, after=3),
    5: interest((20, 3), (22, 300)),
    300: watch(2, 22, EDGE_TRIGGERED),
}
"""Watch 4 is in no set; watch 3 still has a link to it."""


def test_a_closed_watch_gets_an_empty_mask_and_nothing_else_changes() -> None:
    before = image(ONE_CLOSED)
    after = end_closed_watches(before)
    assert after is not None
    wordy_zero = b"".join(piece(bytes([byte])) for byte in (0x80, 0x80, 0x80, 0x80, 0))
    assert len(wordy_zero) == len(number(EDGE_TRIGGERED))
    closed = ONE_CLOSED[4]
    ended = closed[::-1].replace((number(2) + number(EDGE_TRIGGERED))[::-1], (number(2) + wordy_zero)[::-1], 1)[::-1]
    assert after == before.replace(closed, ended)


def test_the_image_is_let_go_at_once_and_waits_for_no_garbage_collection() -> None:
    """A node that sleeps and wakes all day makes hardly any garbage else, so that would come late."""
    made = image(ONE_CLOSED)
    held = sys.getrefcount(made)
    gc.disable()
    try:
        assert end_closed_watches(made) is not None
        assert sys.getrefcount(made) == held
    finally:
        gc.enable()


def test_an_image_whose_watches_are_all_open_is_left_alone() -> None:
    assert end_closed_watches(image({**ONE_CLOSED, 5: interest((20, 3), (21, 4), (22, 300))})) is None


def test_every_watch_of_an_epoll_instance_that_was_closed_is_ended() -> None:
    after = end_closed_watches(image({1: ref(2), 2: epoll(None), 3: watch(2, 20, EDGE_TRIGGERED)}))
    assert after is not None
    assert after.count(number(EDGE_TRIGGERED)) == 1  # Its waiter's.


def test_an_epoll_instance_with_an_empty_set_holds_no_watch_open() -> None:
    after = end_closed_watches(image({1: ref(2), 2: epoll(4), 3: watch(2, 20, EDGE_TRIGGERED), 4: interest(), 5: NIL}))
    assert after is not None


def test_an_image_without_epoll_is_left_alone() -> None:
    assert end_closed_watches(image({1: uint(1)}, TYPES[:1])) is None


def test_a_watch_with_other_fields_is_refused() -> None:
    other = [(name, [*fields[:-1], "else"] if name == WATCH else fields) for name, fields in TYPES]
    with pytest.raises(UnknownLayout, match="fields"):
        end_closed_watches(image(ONE_CLOSED, other))


def test_a_set_that_is_not_to_be_found_is_refused_rather_than_taken_for_empty() -> None:
    with pytest.raises(UnknownLayout, match="map 6 is there 0 times"):
        end_closed_watches(image({**ONE_CLOSED, 2: epoll(6)}))


def test_a_set_with_a_watch_that_is_not_to_be_found_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="not found"):
        end_closed_watches(image({**ONE_CLOSED, 5: interest((20, 3), (22, 301))}))


def test_a_watch_of_an_epoll_instance_that_is_not_to_be_found_is_refused() -> None:
    with pytest.raises(UnknownLayout, match="not found"):
        end_closed_watches(image({**ONE_CLOSED, 4: watch(7, 21, EDGE_TRIGGERED, after=3)}))


def test_an_image_that_ends_too_early_is_never_changed() -> None:
    whole = image(ONE_CLOSED)
    outcomes: set[bool] = set()
    for end in range(0, len(whole) - len(uint(300) + ONE_CLOSED[300]), 7):
        try:
            assert end_closed_watches(whole[:end]) is None
            outcomes.add(True)
        except UnknownLayout:
            outcomes.add(False)
    assert outcomes == {True, False}  # Amid the types nothing says yet that there are watches.


def test_rows_that_need_no_bytes_cannot_be_more_than_the_image_has() -> None:
    endless = number(9) + number(1 << 60) + NIL
    features = graph([("pkg/cpuid.FeatureSet", ["function"])], {1: endless})
    whole = image(ONE_CLOSED)
    begin = 16 + int.from_bytes(whole[8:16]) + 32
    with pytest.raises(UnknownLayout, match="rows"):
        end_closed_watches(whole[:begin] + features)


def test_what_looks_like_watches_without_end_is_refused() -> None:
    """Each begins as a watch does and holds all that follow: reading them one by one would take the square of it."""
    opening = number(2) + number(9) + structure(WATCH)[: -len(number(0))] + number(len(WATCH_FIELDS))
    with pytest.raises(UnknownLayout, match="room"):
        end_closed_watches(image({1: ref(2), 2: opening * 900}))
