"""Builders of calls and checkpoints: each names only what a test is about."""

from dataclasses import replace

import pytest

from torpor.core.call import Attempt, Call, CallState, RequestKey, ResponseHead
from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.ids import CallId, CheckpointId, SessionId, SnapshotId, StreamId

HEAD = ResponseHead(status=200, reason="OK", headers=(("content-type", "text/event-stream"),))


def key(text: str) -> RequestKey:
    return RequestKey(exact=f"e:{text}", canonical=f"c:{text}", logical=f"l:{text}")


def attempt(number: int = 1, *, finished: bool = True) -> Attempt:
    return Attempt(number=number, head=HEAD, chunk_count=1, body_bytes=3, finished=finished)


def make_call(name: str, seq: int, request: str | RequestKey = "same", **changes: object) -> Call:
    call = Call(
        call_id=CallId(name),
        session_id=SessionId("ses_1"),
        state=CallState.ANSWERED,
        key=key(request) if isinstance(request, str) else request,
        dialect="openai_chat",
        method="POST",
        target="/v1/chat/completions",
        model="m",
        incarnation=1,
        stream=StreamId(16),
        request_bytes=10,
        intended_seq=seq,
        ended_seq=seq + 1,
        attempts=(attempt(),),
        usage={},
    )
    return replace(call, **changes)


def make_stream(call: str | None, *, taken: int = 0, **changes: object) -> OpenStream:
    stream = OpenStream(
        stream=StreamId(16),
        port=4100,
        call_id=CallId(call) if call else None,
        read=10,
        acknowledged=10,
        taken=taken,
    )
    return replace(stream, **changes)


def make_checkpoint(seq: int, *streams: OpenStream, **changes: object) -> Checkpoint:
    point = Checkpoint(
        checkpoint_id=CheckpointId(f"chk_{seq}"),
        session_id=SessionId("ses_1"),
        number=1,
        seq=seq,
        committed_seq=seq + 1,
        cursor_seq=1,
        incarnation=1,
        snapshot_id=SnapshotId("snp_1"),
        manifest_digest="0" * 64,
        has_memory=True,
        open_streams=streams,
        next_stream=20,
        stdout_bytes=0,
        stderr_bytes=0,
        reason="call",
        wall_ns=0,
        freeze_ns=0,
        commit_ns=0,
        raw_bytes=0,
        stored_bytes=0,
    )
    return replace(point, **changes)


class Make:
    """All builders, as one fixture."""

    key = staticmethod(key)
    attempt = staticmethod(attempt)
    call = staticmethod(make_call)
    stream = staticmethod(make_stream)
    checkpoint = staticmethod(make_checkpoint)
    head = HEAD


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make
