"""Which pages are new, and where each one goes."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.snapshots.making import IDS, page, pages

from torpor.snapshots.manifest import decode_extents, encode_extents
from torpor.snapshots.pages import (
    PAGES_PER_PACK,
    Extent,
    extents_of,
    plan_pages,
)


def ids(numbers: Sequence[int]) -> list[bytes]:
    return [number.to_bytes(16, "big") for number in numbers]


def test_page_is_found_wherever_it_moved_to() -> None:
    known = dict(zip(IDS.of_pages(memoryview(pages([1, 2, 3]))), [10, 11, 12], strict=True))
    plan = plan_pages(IDS.of_pages(memoryview(pages([9, 3, 1, 2]))), known, first_pack=1)
    assert plan.new == [0]
    assert list(plan.places) == [1 << 32, 12, 10, 11]


def test_page_that_occurs_twice_is_stored_once() -> None:
    plan = plan_pages(IDS.of_pages(memoryview(pages([5, 6, 5]))), {}, first_pack=0)
    assert plan.new == [0, 1]
    assert list(plan.places) == [0, 1, 0]


def test_short_last_page_equals_itself_padded_with_zeros() -> None:
    short = page(1)[:100]
    assert IDS.of_pages(memoryview(page(2) + short)) == IDS.of_pages(memoryview(page(2) + short.ljust(4096, b"\0")))


def test_empty_image_has_no_pages() -> None:
    assert IDS.of_pages(memoryview(b"")) == []
    assert list(extents_of([])) == []


def test_new_pages_overflow_into_the_next_pack() -> None:
    plan = plan_pages(ids(range(PAGES_PER_PACK + 2)), {}, first_pack=7)
    assert list(extents_of(plan.places)) == [Extent(PAGES_PER_PACK, 7, 0), Extent(2, 8, 0)]


def test_extents_never_run_over_the_end_of_a_pack() -> None:
    """The last item of one pack and the first of the next are not neighbours."""
    end = (3 << 32) + 0xFFFFFFFF
    assert list(extents_of([end - 1, end])) == [Extent(2, 3, 0xFFFFFFFE)]
    assert list(extents_of([5, 4 << 32])) == [Extent(1, 0, 5), Extent(1, 4, 0)]


def test_dense_image_is_left_where_it_is() -> None:
    image = ids(range(5000))
    known = dict(zip(image, range(5000), strict=True))
    assert plan_pages(image, known, first_pack=1).new == []


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40))
def test_each_page_of_a_plan_is_at_the_place_of_its_content(before: list[int], after: list[int]) -> None:
    first = plan_pages(ids(before), {}, first_pack=0)
    stored = {page: before[number] for page, number in enumerate(first.new)}
    known = dict(zip(first.ids, first.places, strict=True))
    second = plan_pages(ids(after), known, first_pack=1)
    stored |= {(1 << 32) + page: after[number] for page, number in enumerate(second.new)}
    assert [stored[place] for place in second.places] == after
    assert set(second.new) == {after.index(number) for number in set(after) - set(before)}


PLACES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2**32 - 1)), max_size=50)


@given(PLACES)
def test_extents_round_trip_through_places_and_bytes(pairs: list[tuple[int, int]]) -> None:
    places = [pack << 32 | item for pack, item in pairs]
    extents = list(extents_of(places))
    assert [extent.place + at for extent in extents for at in range(extent.count)] == places
    assert decode_extents(encode_extents(extents)) == extents
