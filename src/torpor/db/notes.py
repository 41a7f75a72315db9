"""Texts of events: notes (the agent's and Torpor's own), questions, answers, messages. Each is a block, which its
event names, so that it can be erased.

The block and the event are one transaction of the caller's. Events from before notes were blocks hold the text in
`data`, for good.
"""

from dataclasses import dataclass
from typing import Any

from torpor.core.events import Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId
from torpor.db import blocks
from torpor.db.database import Transaction
from torpor.db.log import append

NOTE_KINDS = frozenset({Kind.NOTE_ADDED, Kind.AGENT_TOLD})
TEXT_KINDS = NOTE_KINDS | {
    Kind.WAITPOINT_CREATED,
    Kind.WAITPOINT_RESOLVED,
    Kind.MESSAGE_RECEIVED,
    Kind.MESSAGE_SENT,
}


@dataclass(frozen=True, slots=True)
class Note:
    """A note as it can be read: what was written, or what redaction left of it."""

    text: str
    redacted: bool


def add(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    kind: Kind,
    incarnation: int,
    call_id: CallId,
    text: str,
    wall_ns: int,
) -> Event:
    """Append a note: its text as a block, and the event."""
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    content = text.encode("utf-8", "surrogatepass")
    digest = blocks.put(tx, **owner, data=content)
    draft = EventDraft(
        kind=kind, incarnation=incarnation, call_id=call_id, data={"bytes": len(content)}, refs=(digest.hex(),)
    )
    return append(tx, **owner, drafts=[draft], wall_ns=wall_ns)[0]


def has_text(event: Event) -> bool:
    """Whether somebody wrote something that the event is about."""
    return event.kind in NOTE_KINDS or block_of(event) is not None


def block_of(event: Event) -> bytes | None:
    """The digest of the block that an event's text is; None for an event without one, and for a note from before."""
    return bytes.fromhex(event.refs[0]) if event.kind in TEXT_KINDS and event.refs else None


def read(tx: Transaction, event: Event) -> Note:
    """The text of an event that has one.

    Raises:
        Damaged: `block_damaged`.
    """
    digest = block_of(event)
    if digest is None:
        return Note(event.data["text"], redacted=False)
    content = blocks.read(tx, event.session_id, digest)
    return Note(content.data.decode("utf-8", "surrogatepass"), content.redacted)


def get(tx: Transaction, event: Event) -> str:
    """The text as it was written.

    Raises:
        Damaged: `block_damaged`.
        Conflict: `block_redacted`.
    """
    digest = block_of(event)
    if digest is None:
        return event.data["text"]
    return blocks.get(tx, event.session_id, digest).decode("utf-8", "surrogatepass")
