"""A session's inbox and outbox: texts from outside and to the outside, numbered in each box, each with its event.

The inbox's cursor counts what was handled, not what was delivered: a message belongs to the call that took it, which
is answered from the log when a restored agent makes it again. So a message is handled once on every path.
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torpor.core.errors import Conflict
from torpor.core.events import EventDraft, Kind
from torpor.core.ids import CallId, SessionId
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import WaitpointKind
from torpor.db import blocks, sessions, waitpoints
from torpor.db.blobs import Stored
from torpor.db.database import Row, Transaction
from torpor.db.fence import held_row, refusal
from torpor.db.log import append


class Box(StrEnum):
    IN = "in"
    OUT = "out"


KIND_OF = {Box.IN: Kind.MESSAGE_RECEIVED, Box.OUT: Kind.MESSAGE_SENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One row of the message table, with its text.

    Attributes:
        call_id: in the inbox the call that handled it, None while none did; in the outbox the one that sent it.
        text: what was written, or what redaction left of it.
    """

    session_id: SessionId
    box: Box
    number: int
    seq: int
    wall_ns: int
    call_id: CallId | None
    text: str


def deliver(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    text: str,
    wall_ns: int,
    stored: Stored | None = None,
) -> Message:
    """Put a message into the inbox; the agent's oldest call that waits for one handles it. Commit it durably.

    Args:
        stored: the text as it was stored ahead of this transaction, if it was.

    Raises:
        Conflict: `session_ended`.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    status = SessionStatus(held_row(tx, session_id, owner_token)["status"])
    if status in ENDED:
        raise Conflict("session_ended", f"cannot send to session {session_id}: it has {status}")
    message = _put(tx, owner, Box.IN, text, None, wall_ns, stored)
    for point in waitpoints.open_waitpoints(tx, session_id):
        if point.kind is WaitpointKind.MESSAGE and point.call_id is not None:
            resolution = {"number": message.number}
            waitpoints.resolve(tx, **owner, point=point, resolution=resolution, wall_ns=wall_ns)
            _handle(tx, owner, message.number, point.call_id)
            break
    return message


def bring(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    message: Message,
    call_id: CallId | None,
    wall_ns: int,
) -> None:
    """Put a message of a fork's parent into its inbox, under the parent's number.

    Args:
        call_id: the call that handled it already, if that is the fork's too.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    _put(tx, owner, Box.IN, message.text, call_id, wall_ns, None, number=message.number)


def begin_from(tx: Transaction, *, session_id: SessionId, owner_token: int, inbox: int, outbox: int) -> None:
    """Let a fork's numbers go on where its parent's were, since the agent remembers those."""
    begun = {"session_id": session_id, "owner_token": owner_token, "inbox": inbox, "outbox": outbox}
    if not tx.run("session/set_boxes_fenced", **begun):
        raise refusal(tx, session_id, owner_token, sessions.changed(session_id))


def begun_from(tx: Transaction, session_id: SessionId, box: Box) -> int:
    """The highest number that a fork's past had used when it began; 0 for a session that began by itself."""
    row = tx.one("session/find_by_id", session_id=session_id)
    return 0 if row is None else row[f"{box}box_from"] or 0


def list_handled(tx: Transaction, session_id: SessionId, call_ids: Collection[CallId]) -> list[tuple[int, CallId]]:
    """The numbers of the messages that these calls handle now, each with its call."""
    rows = tx.all("message/list_handled", session_id=session_id)
    return [(row["number"], CallId(row["call_id"])) for row in rows if row["call_id"] in call_ids]


def unhandle(tx: Transaction, *, session_id: SessionId, owner_token: int, call_ids: Collection[CallId]) -> None:
    """The calls that handled these messages were undone: some other call handles them."""
    held_row(tx, session_id, owner_token)
    for call_id in call_ids:
        tx.run("message/unhandle_fenced", session_id=session_id, owner_token=owner_token, call_id=call_id)


def take(tx: Transaction, *, session_id: SessionId, owner_token: int, call_id: CallId) -> Message | None:
    """The message that a call handles, the first that none did unless it has one already; None: there is none."""
    held_row(tx, session_id, owner_token)
    own: dict[str, Any] = {"session_id": session_id, "box": Box.IN.value, "call_id": call_id}
    row = tx.one("message/find_of_call", **own)
    if row is None:
        row = tx.one("message/find_first_unhandled", session_id=session_id)
        if row is None:
            return None
        _handle(tx, {"session_id": session_id, "owner_token": owner_token}, row["number"], call_id)
    return _message_of(tx, row)


def send(
    tx: Transaction,
    *,
    session_id: SessionId,
    owner_token: int,
    call_id: CallId,
    text: str,
    wall_ns: int,
    stored: Stored | None = None,
) -> Message:
    """Put a message of the agent's into the outbox. Commit it durably."""
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    return _put(tx, owner, Box.OUT, text, call_id, wall_ns, stored)


def list_after(tx: Transaction, session_id: SessionId, box: Box, number: int = 0) -> list[Message]:
    """The messages of a box behind a number, in order.

    Raises:
        Damaged: `block_damaged`.
    """
    rows = tx.all("message/list_after", session_id=session_id, box=box.value, number=number)
    return [_message_of(tx, row) for row in rows]


def last_number(tx: Transaction, session_id: SessionId, box: Box) -> int:
    """The highest number that the box, or that of the past that a fork comes from, has used."""
    last = tx.one("message/find_last_number", session_id=session_id, box=box.value)
    return 0 if last is None else last["number"]


def _put(
    tx: Transaction,
    owner: dict[str, Any],
    box: Box,
    text: str,
    call_id: CallId | None,
    wall_ns: int,
    stored: Stored | None,
    number: int | None = None,
) -> Message:
    session_id: SessionId = owner["session_id"]
    held = held_row(tx, session_id, owner["owner_token"])
    content = text.encode("utf-8", "surrogatepass")
    digest = blocks.put(tx, **owner, data=content, stored=stored)
    number = number or 1 + last_number(tx, session_id, box)
    draft = EventDraft(
        kind=KIND_OF[box],
        incarnation=held["incarnation"],
        call_id=call_id,
        data={"number": number, "bytes": len(content)},
        refs=(digest.hex(),),
    )
    seq = append(tx, **owner, drafts=[draft], wall_ns=wall_ns)[0].seq
    row: dict[str, Any] = {"box": box.value, "number": number, "seq": seq, "call_id": call_id}
    if not tx.run("message/insert_fenced", **owner, **row, wall_ns=wall_ns, digest=digest, size_bytes=len(content)):
        raise refusal(tx, session_id, owner["owner_token"], sessions.changed(session_id))
    return Message(session_id=session_id, box=box, number=number, seq=seq, wall_ns=wall_ns, call_id=call_id, text=text)


def _handle(tx: Transaction, owner: dict[str, Any], number: int, call_id: CallId) -> None:
    if not tx.run("message/handle_fenced", **owner, number=number, call_id=call_id):
        raise refusal(tx, owner["session_id"], owner["owner_token"], sessions.changed(owner["session_id"]))


def _message_of(tx: Transaction, row: Row) -> Message:
    session_id = SessionId(row["session_id"])
    return Message(
        session_id=session_id,
        box=Box(row["box"]),
        number=row["number"],
        seq=row["seq"],
        wall_ns=row["wall_ns"],
        call_id=CallId(row["call_id"]) if row["call_id"] is not None else None,
        text=blocks.read(tx, session_id, bytes(row["digest"])).data.decode("utf-8", "surrogatepass"),
    )
