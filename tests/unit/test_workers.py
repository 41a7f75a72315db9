"""The host's end of workers: records cut from hostile bytes, and inits that are too old."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.errors import Conflict, SandboxFailed
from torpor.sandbox.frames import PAYLOAD_BYTES_MAX, WORKERS_MAX
from torpor.sandbox.workers import Record, RecordReader, check_can_work, encode

RECORDS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=300)), max_size=8)


@given(RECORDS, st.data())
def test_records_are_cut_from_any_pieces(records: list[tuple[int, bytes]], data: st.DataObject) -> None:
    wire, reader, found = b"".join(encode(bytes([kind]), payload) for kind, payload in records), RecordReader(), []
    while wire:
        piece = data.draw(st.integers(1, len(wire)))
        found += reader.feed(wire[:piece])
        wire = wire[piece:]
    assert found == [Record(kind=bytes([kind]), payload=payload) for kind, payload in records]


def test_a_record_that_is_too_long_is_refused_before_it_is_held() -> None:
    with pytest.raises(SandboxFailed, match="its record has"):
        RecordReader().feed(struct.pack("<BI", ord("O"), PAYLOAD_BYTES_MAX + 1))


@pytest.mark.parametrize("payload", [b"", b"\1\2\3", b"\1\2\3\4\5"])
def test_a_number_that_is_none_is_refused(payload: bytes) -> None:
    with pytest.raises(SandboxFailed):
        _ = Record(kind=b"X", payload=payload).number


def test_a_failure_is_printable_whatever_it_is() -> None:
    number, text = Record(kind=b"F", payload=struct.pack("<i", 2) + b"no \x1b[2J\xff such").failure
    assert (number, text) == (2, "no ?[2J\ufffd such")
    assert Record(kind=b"F", payload=b"\1").failure == (0, "")


def test_an_old_init_and_a_busy_one_start_no_worker() -> None:
    check_can_work(2, WORKERS_MAX - 1)
    with pytest.raises(Conflict, match="its init is too old for exec"):
        check_can_work(1, 0)
    with pytest.raises(Conflict, match="32 others"):
        check_can_work(2, WORKERS_MAX)
