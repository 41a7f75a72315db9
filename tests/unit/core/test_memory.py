"""Sizes of memory as people write them."""

import pytest

from torpor.core.errors import InvalidInput
from torpor.core.memory import mark_of, parse_memory, told, wall_of


@pytest.mark.parametrize(
    ("text", "size"), [("64M", 64 << 20), ("2G", 2 << 30), ("2g", 2 << 30), ("1T", 1 << 40), ("268435456", 1 << 28)]
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "G", "63M", "0", "-1G", "1.5G", "2GB", "²G", "1" * 30])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_memory(text)
    assert refused.value.code == "memory_malformed"


def test_the_mark_leaves_room_for_what_is_taken_until_the_agent_stands_still() -> None:
    assert mark_of(1000) == 900
    assert told(900 << 20) == "900 MiB"


def test_the_wall_is_behind_the_limit_with_room_for_what_is_no_programs_memory() -> None:
    assert wall_of(100 << 20) == 164 << 20
    assert wall_of(100 << 30) == 112 << 30
