"""Claims of torpor.sandbox.frames: what goes in comes out, and nothing hostile gets through or grows."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.errors import InvalidInput, SandboxFailed
from torpor.sandbox.frames import (
    ENCODED_BYTES_MAX,
    PAYLOAD_BYTES_MAX,
    AgentSpec,
    Closed,
    Frame,
    FrameReader,
    FromGuest,
    Phase,
    ToGuest,
    encode,
    pack_life,
    pack_spec,
    parse_status,
)

NONCE = b"12345678"
OTHER = b"87654321"

frames = st.builds(
    Frame,
    nonce=st.just(NONCE),
    type=st.integers(0, 255),
    stream=st.integers(0, 2**32 - 1),
    arg=st.integers(0, 2**64 - 1),
    payload=st.binary(max_size=600),
)


def status_record(
    *streams: tuple[int, ...],
    version: int = 1,
    phase: int = 1,
    next_stream: int = 20,
    count: int | None = None,
) -> bytes:
    head = struct.pack(
        "<IIQiIQQQII", version, phase, 3, 0, 7, next_stream, 0, 0, 0, len(streams) if count is None else count
    )
    return head + b"".join(struct.pack("<IHBBQQQQQ", *stream) for stream in streams)


@given(st.lists(frames), st.lists(st.integers(1, 40)))
def test_frames_survive_any_cutting_of_the_byte_stream(sent: list[Frame], cuts: list[int]) -> None:
    data = b"\0" + b"".join(encode(frame) for frame in sent)
    reader, got = FrameReader(NONCE), []
    for cut in cuts:
        got += reader.feed(data[:cut])
        data = data[cut:]
    got += reader.feed(data)
    assert got == sent
    assert reader.dropped == 0


def test_the_largest_frame_fits_and_a_larger_one_is_dropped() -> None:
    largest = Frame(nonce=NONCE, type=FromGuest.DATA, payload=bytes(range(1, 256)) * 129)
    largest = Frame(nonce=NONCE, type=FromGuest.DATA, payload=largest.payload[:PAYLOAD_BYTES_MAX])
    assert len(largest.payload) == PAYLOAD_BYTES_MAX
    larger = Frame(nonce=NONCE, type=FromGuest.DATA, payload=largest.payload + b"!")
    reader = FrameReader(NONCE)
    assert reader.feed(encode(largest)) == [largest]
    assert reader.feed(encode(larger)) == []
    assert reader.dropped == 1


def test_an_encoded_frame_has_its_zero_at_the_end_alone() -> None:
    data = encode(Frame(nonce=bytes(8), type=ToGuest.DATA, payload=bytes(3000)))
    assert data.index(b"\0") == len(data) - 1


def test_frames_of_an_old_nonce_are_dropped() -> None:
    old = Frame(nonce=OTHER, type=FromGuest.OPEN, stream=16)
    new = Frame(nonce=NONCE, type=FromGuest.STATUS)
    reader = FrameReader(NONCE)
    assert reader.feed(encode(old) + encode(new)) == [new]
    assert reader.dropped == 1


def test_half_a_frame_of_a_dead_peer_does_not_swallow_the_next() -> None:
    half = encode(Frame(nonce=OTHER, type=FromGuest.DATA, payload=b"x" * 500))[:100]
    status = Frame(nonce=NONCE, type=FromGuest.STATUS)
    assert FrameReader(NONCE).feed(half + b"\0" + encode(status)) == [status]


def test_one_flipped_bit_drops_the_frame() -> None:
    good = encode(Frame(nonce=NONCE, type=FromGuest.DATA, payload=b"the request"))
    for position in range(len(good) - 1):
        for bit in range(8):
            bad = bytearray(good)
            bad[position] ^= 1 << bit
            assert FrameReader(NONCE).feed(bytes(bad)) == []


def test_a_reader_without_nonce_takes_the_frames_of_every_link() -> None:
    hello = Frame(nonce=OTHER, type=ToGuest.HELLO)
    assert FrameReader(None).feed(encode(hello)) == [hello]


@given(st.lists(st.binary(max_size=300)))
def test_no_bytes_raise_and_a_good_frame_after_them_arrives(noise: list[bytes]) -> None:
    good = Frame(nonce=NONCE, type=FromGuest.PONG, arg=4)
    reader = FrameReader(NONCE)
    for piece in noise:
        assert reader.feed(piece) == []
    assert reader.feed(b"\0" + encode(good)) == [good]


def test_a_run_without_a_zero_is_not_kept() -> None:
    reader = FrameReader(NONCE)
    for _ in range(100):
        assert reader.feed(b"x" * 65_536) == []
        assert len(reader._run) <= ENCODED_BYTES_MAX
    good = Frame(nonce=NONCE, type=FromGuest.PONG)
    assert reader.feed(b"\0" + encode(good)) == [good]
    assert reader.dropped == 1


def test_a_status_is_read() -> None:
    status = parse_status(
        status_record((1, 0, 1, 0, 50, 40, 0, 0, 50), (17, 4100, 0, 1 | 4 | 8, 900, 100, 80, 30, 200))
    )
    assert (status.phase, status.incarnation, status.next_stream) == (Phase.RUNNING, 3, 20)
    stdout, call = status.streams
    assert (stdout.stream, stdout.kind, stdout.resumable) == (1, "output", True)
    assert (call.stream, call.port, call.kind) == (17, 4100, "call")
    assert (call.half_closed, call.closed, call.fin_received, call.resumable) == (True, None, True, False)
    assert (call.read, call.acknowledged, call.taken, call.written, call.sent) == (900, 100, 80, 30, 200)


def test_a_status_says_how_each_stream_ended() -> None:
    ended = [(16 + n, 1, 0, flags, 5, 0, 3, 3, 0) for n, flags in enumerate((0, 2, 4 | 16, 32))]
    closed = [stream.closed for stream in parse_status(status_record(*ended)).streams]
    assert closed == [None, Closed.GONE, Closed.CONSUMED, Closed.RESET]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"", "has 0 bytes"),
        (status_record(version=3), "version 3"),
        (status_record(phase=4), "phase 4"),
        (status_record(next_stream=3), "next stream would be 3"),
        (status_record(count=1), "for 1 streams"),
        (status_record(count=2**32 - 1), "for 4294967295 streams"),
        (status_record() + b"!", "for 0 streams"),
        (status_record((16, 1, 0, 0, 0, 0, 0, 0, 0), (16, 1, 0, 0, 0, 0, 0, 0, 0)), "twice"),
        (status_record((20, 1, 0, 0, 0, 0, 0, 0, 0)), "stream 20 as class 0"),
        (status_record((3, 1, 1, 0, 0, 0, 0, 0, 0)), "stream 3 as class 1"),
        (status_record((16, 1, 2, 0, 0, 0, 0, 0, 0)), "stream 16 as class 2"),
        (status_record((16, 1, 0, 2 | 16, 0, 0, 0, 0, 0)), "can't have ended"),
        (status_record((16, 1, 0, 16, 0, 0, 0, 0, 0)), "can't have ended"),
        (status_record((16, 1, 0, 16 | 4, 0, 0, 5, 4, 0)), "can't have ended"),
        (status_record((1, 0, 1, 2, 0, 0, 0, 0, 0)), "can't have ended"),
        (status_record((16, 1, 0, 0, 5, 6, 0, 0, 0)), "contradict"),
        (status_record((16, 1, 0, 0, 5, 0, 0, 0, 6)), "contradict"),
        (status_record((16, 1, 0, 0, 0, 0, 5, 6, 0)), "contradict"),
        (
            status_record(*((n, 1, 0, 0, 0, 0, 0, 0, 0) for n in range(16, 273)), next_stream=400),
            "257 streams",
        ),
    ],
)
def test_a_status_that_contradicts_itself_is_a_violation(record: bytes, reason: str) -> None:
    with pytest.raises(SandboxFailed, match=reason) as failed:
        parse_status(record)
    assert failed.value.code == "link_protocol"


@given(st.binary(max_size=400))
def test_no_status_raises_anything_but_a_violation(record: bytes) -> None:
    try:
        parse_status(record)
    except SandboxFailed as failed:
        assert failed.code == "link_protocol"


def test_a_spec_is_counted_strings() -> None:
    spec = AgentSpec(arguments=("python", "agent.py"), cwd="/workspace", environment={"A": "1", "B": "x=y"})
    assert pack_spec(spec) == b"/workspace\x002\0python\0agent.py\x002\0A=1\0B=x=y\0"


@pytest.mark.parametrize(
    "spec",
    [
        AgentSpec(arguments=(), cwd="/", environment={}),
        AgentSpec(arguments=("",), cwd="/", environment={}),
        AgentSpec(arguments=("a\0b",), cwd="/", environment={}),
        AgentSpec(arguments=("a",), cwd="/", environment={"A=B": "c"}),
        AgentSpec(arguments=("a",), cwd="/", environment={"": "c"}),
        AgentSpec(arguments=("a",), cwd="/", environment={"A": "x" * 2 * 1024 * 1024}),
    ],
)
def test_a_spec_that_cannot_be_passed_is_refused(spec: AgentSpec) -> None:
    with pytest.raises(InvalidInput) as refused:
        pack_spec(spec)
    assert refused.value.code == "agent_spec_unusable"


def test_a_life_carries_two_numbers_entropy_and_changes() -> None:
    packed = pack_life(1, 2, b"e" * 64, {"A": "b"})
    assert packed == struct.pack("<QQ", 1, 2) + b"e" * 64 + b"A=b\0"
    with pytest.raises(ValueError, match="entropy"):
        pack_life(1, 2, b"short")
