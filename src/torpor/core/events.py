"""The event envelope and its hash chain.

An event is never changed. `seq` counts from 1 without gaps in one session; `parent_seq` makes the context events a
tree (rewind, divergence and fork are parent pointers); bookkeeping events have none. `hash` is SHA-256 over the
canonical JSON of all other fields, `prev_hash` included: redacting a block leaves the chain valid, because events hold
only the block's digest.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torpor.core.ids import CallId, SessionId

GENESIS_HASH = "0" * 64


class Kind(StrEnum):
    """What happened. `CONTEXT_KINDS` carry `parent_seq`, the rest is bookkeeping."""

    SESSION_CREATED = "session.created"
    SESSION_STATUS = "session.status"
    SESSION_REWOUND = "session.rewound"
    """A person went back; data: to_seq, the cut's. It begins the next stretch of the timeline."""
    SESSION_REDACTED = "session.redacted"
    """Content was masked for good; data: the digest of each mask, by what it masks."""
    INCARNATION_STARTED = "incarnation.started"
    INCARNATION_ENDED = "incarnation.ended"
    LEASE_ACQUIRED = "lease.acquired"
    CALL_INTENDED = "call.intended"
    CALL_SENT = "call.sent"
    CALL_RETRIED = "call.retried"
    """The provider refused it for now, and the same attempt is sent again; data: status, retry, wait_ms."""
    CALL_ANSWERING = "call.answering"
    CALL_COMPLETED = "call.completed"
    CALL_FAILED = "call.failed"
    CALL_TORN = "call.torn"
    CALL_UNKNOWN = "call.unknown"
    """A barrier effect was sent and its answer never came: it waits for a person's decision."""
    CALL_REPEATED = "call.repeated"
    CALL_JOINED = "call.joined"
    CALL_DELIVERED = "call.delivered"
    """Its stream ended; data: end (a StreamEnd), taken_bytes. Logged before init may forget the stream."""
    CALL_DIVERGED = "call.diverged"
    """The agent left the log's path; data: pending (calls that were awaited), orphaned (effects among them), policy."""
    STREAM_RESET = "stream.reset"
    AGENT_TOLD = "agent.told"
    """A note of Torpor's own went to the model with this call, whose logged request is without it; refs: the text."""
    NOTE_ADDED = "note.added"
    """The agent wrote something down; refs: the text."""
    CHECKPOINT_COMMITTED = "checkpoint.committed"
    CHECKPOINT_FAILED = "checkpoint.failed"
    CHECKPOINT_SKIPPED = "checkpoint.skipped"
    """The turn that began with this call has none; data: reason (`share` or `memory`), owed_ms."""
    CHECKPOINT_OVERTAKEN = "checkpoint.overtaken"
    """A newer cut took its place before its commit began; data: number, reason, by (the newer one's number)."""
    CHECKPOINT_FORGOTTEN = "checkpoint.forgotten"
    """Rows were deleted, so that their snapshots may be collected; data: numbers, reason."""
    CHECKPOINT_PINNED = "checkpoint.pinned"
    CHECKPOINT_REPACKED = "checkpoint.repacked"
    """Its row names another snapshot with the same contents; data: what of checkpoint.committed is no longer so."""
    RECOVERY_CHOSEN = "recovery.chosen"
    RECOVERY_REJECTED = "recovery.rejected"
    OUTPUT_DIFFERED = "output.differed"
    WAITPOINT_CREATED = "waitpoint.created"
    WAITPOINT_RESOLVED = "waitpoint.resolved"
    MESSAGE_RECEIVED = "message.received"
    """Somebody sent the session a message; data: number, bytes; refs: the text."""
    MESSAGE_SENT = "message.sent"
    """The agent sent a message out; data: number, bytes; refs: the text."""
    BUDGET_CHANGED = "budget.changed"
    MEMORY_EXCEEDED = "memory.exceeded"
    """The sandbox took so much that the session is parked; data: used_bytes, limit_bytes, perhaps killed."""
    MEMORY_CHANGED = "memory.changed"
    """Its limit is another from its next life on; data: limit_bytes."""
    AGENT_EXITED = "agent.exited"
    AGENT_RESTARTED = "agent.restarted"
    """It failed and begins again; data: exit_status, signal, restart, restarts_max, failed_seq."""


CONTEXT_KINDS = frozenset({Kind.SESSION_CREATED, Kind.CALL_INTENDED, Kind.CALL_COMPLETED, Kind.CALL_FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class EventDraft:
    """What the caller knows of an event before it is appended.

    Attributes:
        data: small JSON object (strings, whole numbers, booleans, null, lists, objects; no floats).
        refs: SHA-256 digests (hex) of the blocks that belong to it.
        parent_seq: for context events, the event that it follows in the tree.
    """

    kind: Kind
    incarnation: int
    call_id: CallId | None = None
    parent_seq: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refs: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of the event log."""

    session_id: SessionId
    seq: int
    parent_seq: int | None
    incarnation: int
    wall_ns: int
    kind: Kind
    call_id: CallId | None
    data: Mapping[str, Any]
    refs: tuple[str, ...]
    prev_hash: str
    hash: str


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: object) -> str:
    """The one spelling of a JSON value that hashes are taken of: sorted keys, no spaces, no floats, no NaN."""
    return _CANONICAL.encode(value)


def event_hash(*, session_id: SessionId, seq: int, draft: EventDraft, wall_ns: int, prev_hash: str) -> str:
    """SHA-256 (hex) that chains an event to its predecessor."""
    fields = {
        "session": session_id,
        "seq": seq,
        "parent_seq": draft.parent_seq,
        "incarnation": draft.incarnation,
        "wall_ns": wall_ns,
        "kind": draft.kind.value,
        "call": draft.call_id,
        "data": dict(draft.data),
        "refs": list(draft.refs),
        "prev_hash": prev_hash,
    }
    return hashlib.sha256(canonical_json(fields).encode("utf-8", "surrogatepass")).hexdigest()


def seal(*, session_id: SessionId, seq: int, draft: EventDraft, wall_ns: int, prev_hash: str) -> Event:
    """Make the event that follows `prev_hash`."""
    return Event(
        session_id=session_id,
        seq=seq,
        parent_seq=draft.parent_seq,
        incarnation=draft.incarnation,
        wall_ns=wall_ns,
        kind=draft.kind,
        call_id=draft.call_id,
        data=draft.data,
        refs=tuple(draft.refs),
        prev_hash=prev_hash,
        hash=event_hash(session_id=session_id, seq=seq, draft=draft, wall_ns=wall_ns, prev_hash=prev_hash),
    )
