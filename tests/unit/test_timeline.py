"""The timeline as people read it: every event about a call says which one, in words."""

from typing import Any

from torpor.cli.timeline import CallNumbers, told
from torpor.core.events import GENESIS_HASH, Event, EventDraft, Kind, seal
from torpor.core.ids import CallId, SessionId


def event(kind: Kind, call: str | None = None, **data: Any) -> Event:
    draft = EventDraft(kind=kind, incarnation=1, call_id=CallId(call) if call else None, data=data)
    return seal(session_id=SessionId("ses_1"), seq=1, draft=draft, wall_ns=0, prev_hash=GENESIS_HASH)


def test_a_call_keeps_its_number_whatever_happens_to_it() -> None:
    calls = CallNumbers()
    lines = [
        told(event(Kind.CALL_INTENDED, "a", method="POST", target="/v1/messages", model="m"), calls),
        told(event(Kind.CALL_DIVERGED, "b", pending=["x", "y"]), calls),
        told(event(Kind.CALL_INTENDED, "b", method="POST", target="/v1/messages", model=None), calls),
        told(event(Kind.CALL_REPEATED, "a", stream=9, attempt=1), calls),
        told(event(Kind.CALL_JOINED, "b", stream=5, attempt=1, inherited=True), calls),
        told(event(Kind.CALL_JOINED, "b", stream=7, attempt=1, inherited=False), calls),
        told(event(Kind.CALL_DELIVERED, "a", end="consumed", taken_bytes=3400), calls),
        told(event(Kind.CALL_FAILED, "b", error="upstream_silent"), calls),
    ]
    assert lines == [
        "call 1: POST /v1/messages m",
        "call 2: another one than the log's next, of which 2 were to be repeated",
        "call 2: POST /v1/messages",
        "call 1: made again on connection 9: it is the same call, attempt 1",
        "call 2: connection 5, open at the cut, goes on with attempt 1",
        "call 2: asked again on connection 7: the same answer, attempt 1",
        "call 1: read to its end, 3.4 KB",
        "call 2: upstream_silent",
    ]


def test_a_checkpoint_says_how_long_the_agent_stood_still() -> None:
    made = event(Kind.CHECKPOINT_COMMITTED, number=3, reason="call", freeze_ns=84_000_000, stored_bytes=930_000)
    assert told(made, CallNumbers()) == "#3 (call) froze 84 ms, stored 930 KB"
    seeded = event(Kind.CHECKPOINT_COMMITTED, number=0, reason="start", freeze_ns=0, stored_bytes=3300)
    assert told(seeded, CallNumbers()) == "#0 (start) stored 3.3 KB"


def test_a_refused_adoption_names_no_checkpoint() -> None:
    adopt = event(Kind.RECOVERY_REJECTED, mode="adopt", checkpoint=None, reason="it is paused")
    restore = event(Kind.RECOVERY_REJECTED, mode="restore", checkpoint=4, reason="its pack is gone")
    assert told(adopt, CallNumbers()) == "adopt: it is paused"
    assert told(restore, CallNumbers()) == "restore of checkpoint #4: its pack is gone"
