"""A fork's rows: a session with its parent's past, as far as its agent may still ask for it, and one checkpoint.

What the agent's memory does not have of that past comes along in copies: the calls that were open (db/copies.py), its
waitpoints, and the messages that no call had handled. Everything is in the caller's transaction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.checkpoint import FORKED, Checkpoint, OpenStream
from torpor.core.errors import Conflict
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, SessionId, SnapshotId, WaitpointId, new_checkpoint_id
from torpor.core.origin import Origin, Plan
from torpor.core.session import SessionStatus
from torpor.core.waitpoint import Waitpoint, WaitpointKind
from torpor.db import blocks, calls, checkpoints, copies, keys, log, messages, sessions, sleeping, waitpoints
from torpor.db.copies import Source
from torpor.db.database import Transaction
from torpor.db.keys import WrappedKey
from torpor.db.messages import Box, Message
from torpor.db.requests import PreparedBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """One call of the plan, and how a child gets it.

    Attributes:
        joins: it gets the parent's answer.
        told: what is sent in place of its body, and what call.intended says of that.
    """

    source: Source
    joins: bool
    told: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What children have of their parent, read at one instant.

    Attributes:
        waitpoints: as they were where the children begin.
        inbox: the messages that are not handled yet, or by a call that comes along.
        last: the highest number that each box had used.
    """

    parent: sessions.Session
    origin: Origin
    plan: Plan
    calls: Sequence[Copied]
    waitpoints: Sequence[Waitpoint]
    inbox: Sequence[Message]
    last: Mapping[Box, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """What a child has for itself.

    Attributes:
        call_ids: of its copies, by the parent's call.
        bodies: the requests of its copies, by the parent's call, stored ahead as far as they are large.
        message: the first one in its inbox that is its own.
        wake_ns: when a node is to run it; see `sleeping`.
    """

    session_id: SessionId
    name: str | None
    spec: Mapping[str, Any]
    key: WrappedKey
    snapshot_id: SnapshotId
    manifest_digest: str
    call_ids: Mapping[CallId, CallId]
    bodies: Mapping[CallId, PreparedBody]
    message: str | None
    wake_ns: int | None


def read_past(tx: Transaction, session_id: SessionId, origin: Origin, plan: Plan) -> Past:
    """Raises:
    Conflict: `request_redacted`, a call would have to be sent of whose request only a mask is left.
    Damaged: as `copies.read_source`.
    """
    events = log.events(tx, session_id)
    wanted = [*((call_id, True) for call_id in plan.kept), *((call_id, False) for call_id in plan.anew)]
    made = {call.call_id: call for call in calls.load_calls(tx, session_id)}
    copied: list[Copied] = []
    for call_id, joins in sorted(wanted, key=lambda one: made[one[0]].intended_seq):
        source = copies.read_source(tx, made[call_id], events, past_seq=origin.past_seq)
        if source.redacted and not (joins and source.answer is not None):
            raise Conflict("request_redacted", f"cannot copy call {call_id}: a part of its request was redacted")
        copied.append(Copied(source=source, joins=joins, told={}))
    past = [event for event in events if event.seq <= origin.past_seq]
    answered = {one.source.call.call_id for one in copied if one.joins and one.source.answer is not None}
    return Past(
        parent=sessions.get(tx, session_id),
        origin=origin,
        plan=plan,
        calls=copied,
        waitpoints=_waitpoints_then(tx, session_id, past, answered),
        inbox=_inbox_then(tx, session_id, made, origin, answered, _handlers_then(events, origin.past_seq)),
        last={box: _last_number(tx, session_id, past, box) for box in Box},
    )


def create(tx: Transaction, past: Past, child: Child, *, wall_ns: int) -> Checkpoint:
    """Make one child, asleep at its checkpoint. Commit it durably, together with its siblings.

    Raises:
        Conflict: `session_name_taken`; `master_key_changed`.
        NotFound: the parent is gone.
    """
    parent, point = past.parent, past.origin.checkpoint
    made = sessions.create(
        tx,
        session_id=child.session_id,
        name=child.name,
        spec=child.spec,
        wall_ns=wall_ns,
        budget_nanousd=parent.budget_nanousd,
        parent=sessions.Parent(session_id=parent.session_id, seq=past.origin.past_seq),
    )
    owner: dict[str, Any] = {"session_id": child.session_id, "owner_token": made.owner_token}
    keys.add_session(tx, **owner, key=child.key)
    if point.incarnation:
        tx.run("session/set_incarnation_fenced", **owner, incarnation=point.incarnation)
    opened = _copy_calls(tx, owner, past, child, wall_ns)
    _copy_waitpoints(tx, owner, past, child, wall_ns)
    messages.begin_from(tx, **owner, inbox=past.last[Box.IN], outbox=past.last[Box.OUT])
    for message in past.inbox:
        handler = child.call_ids.get(message.call_id) if message.call_id is not None else None
        messages.bring(tx, **owner, message=message, call_id=handler, wall_ns=wall_ns)
    committed = _commit(tx, owner, past, child, opened, wall_ns)
    if child.message is not None:
        messages.deliver(tx, **owner, text=child.message, wall_ns=wall_ns)
    sessions.set_status(tx, **owner, status=SessionStatus.ASLEEP, wall_ns=wall_ns, reason="forked")
    sleeping.set_wake(tx, **owner, wake_ns=child.wake_ns)
    return committed


def _copy_calls(
    tx: Transaction, owner: dict[str, Any], past: Past, child: Child, wall_ns: int
) -> dict[CallId, OpenStream]:
    """Gives the open streams as they are from now on, by the parent's call."""
    streams = {stream.call_id: stream for stream in past.origin.checkpoint.open_streams if stream.call_id is not None}
    moved: dict[CallId, OpenStream] = {}
    for one in past.calls:
        old = one.source.call
        stream = streams.get(old.call_id)
        touched = stream is not None and stream.taken > stream.untouched_bytes
        seen = stream.attempt if stream is not None and touched else None
        origin: dict[str, Any] = dict(one.told)
        # A person, a message or a time answers each child by itself; only what was answered by then comes along.
        if one.joins and (old.is_llm or one.source.answer is not None):
            origin["joins"] = {"session": old.session_id, "call": old.call_id, "attempt": seen}
        call_id = child.call_ids[old.call_id]
        made: dict[str, Any] = {**owner, "call_id": call_id, "wall_ns": wall_ns}
        copies.copy(tx, **made, source=one.source, prepared=child.bodies[old.call_id], origin=origin)
        answer = one.source.answer
        is_whole = answer is not None and seen in {None, answer.attempt.number}
        if one.joins and answer is not None and is_whole:
            copies.take_answer(tx, **made, answer=answer, joined=old.call_id)
        if stream is not None:
            # The answer is the copy's first attempt, whichever of the parent's it was.
            moved[old.call_id] = replace(stream, call_id=call_id, attempt=1)
    return moved


def _copy_waitpoints(tx: Transaction, owner: dict[str, Any], past: Past, child: Child, wall_ns: int) -> None:
    for point in past.waitpoints:
        made = waitpoints.create(
            tx,
            **owner,
            kind=point.kind,
            call_id=child.call_ids.get(point.call_id) if point.call_id is not None else None,
            data={name: value for name, value in point.data.items() if name != "text"},
            due_ns=point.due_ns,
            text=_copy_text(tx, owner, point.session_id, point.data.get("text")),
            waitpoint_id=point.waitpoint_id,
            wall_ns=wall_ns,
        )
        if point.resolution is not None:
            resolution = {name: value for name, value in point.resolution.items() if name != "text"}
            said = _copy_text(tx, owner, point.session_id, point.resolution.get("text"))
            waitpoints.resolve(tx, **owner, point=made, resolution=resolution, text=said, wall_ns=wall_ns)


def _copy_text(tx: Transaction, owner: dict[str, Any], source: SessionId, digest: str | None) -> str | None:
    if digest is None:
        return None
    return blocks.put(tx, **owner, data=blocks.read(tx, source, bytes.fromhex(digest)).data).hex()


def _commit(
    tx: Transaction,
    owner: dict[str, Any],
    past: Past,
    child: Child,
    opened: Mapping[CallId, OpenStream],
    wall_ns: int,
) -> Checkpoint:
    point = past.origin.checkpoint
    row = sessions.get(tx, child.session_id)
    streams = [opened.get(stream.call_id, stream) if stream.call_id else stream for stream in point.open_streams]
    own = replace(
        point,
        checkpoint_id=new_checkpoint_id(wall_ns),
        session_id=child.session_id,
        number=0,
        seq=row.head_seq,
        cursor_seq=row.cursor_seq,
        snapshot_id=child.snapshot_id,
        manifest_digest=child.manifest_digest,
        open_streams=tuple(streams),
        reason=FORKED,
        freeze_ns=0,
        commit_ns=0,
        stored_bytes=0,
        pending_redo=tuple(child.call_ids[call_id] for call_id in past.plan.pending),
        joinable=tuple(child.call_ids[call_id] for call_id in past.plan.joinable),
    )
    return checkpoints.commit(tx, **owner, checkpoint=own, wall_ns=wall_ns)


def _waitpoints_then(
    tx: Transaction, session_id: SessionId, past: Sequence[Event], answered: set[CallId]
) -> list[Waitpoint]:
    """The waitpoints of the past, open unless they were resolved in it, or for an answer that comes along."""
    named = {Kind.WAITPOINT_CREATED: set[WaitpointId](), Kind.WAITPOINT_RESOLVED: set[WaitpointId]()}
    for event in past:
        if event.kind in named:
            named[event.kind].add(WaitpointId(event.data["waitpoint"]))
    found: list[Waitpoint] = []
    for point in waitpoints.list_of_session(tx, session_id):
        is_known = point.waitpoint_id in named[Kind.WAITPOINT_CREATED] or point.call_id in answered
        stays = point.waitpoint_id in named[Kind.WAITPOINT_RESOLVED] or point.call_id in answered
        # A budget is the child's own. A call that waits for a message looks into the child's inbox, and then waits.
        is_made_anew = point.kind is WaitpointKind.BUDGET or (point.kind is WaitpointKind.MESSAGE and not stays)
        if is_known and not is_made_anew:
            found.append(point if stays else replace(point, resolved_ns=None, resolution=None))
    return found


def _handlers_then(events: Sequence[Event], past_seq: int) -> dict[int, CallId]:
    """Who handled the messages, by number, that rewinds since then took from their calls: the first one says it."""
    handlers: dict[int, CallId] = {}
    for event in events:
        if event.kind is Kind.SESSION_REWOUND and event.seq > past_seq:
            for number, call_id in event.data.get("unhandled", []):
                handlers.setdefault(number, CallId(call_id))
    return handlers


def _inbox_then(
    tx: Transaction,
    session_id: SessionId,
    made: Mapping[CallId, calls.Call],
    origin: Origin,
    answered: set[CallId],
    handlers: Mapping[int, CallId],
) -> list[Message]:
    found: list[Message] = []
    for message in messages.list_after(tx, session_id, Box.IN):
        call_id = handlers.get(message.number, message.call_id)
        handler = made.get(call_id) if call_id is not None else None
        if call_id in answered:
            found.append(replace(message, call_id=call_id))
        elif message.seq <= origin.past_seq and _is_unhandled(handler, origin):
            found.append(replace(message, call_id=None))
    return found


def _is_unhandled(handler: calls.Call | None, origin: Origin) -> bool:
    """Whether no call of the past had got a message: its handler came later, or was still open at the cut."""
    opened = {stream.call_id for stream in origin.checkpoint.open_streams}
    return handler is None or handler.intended_seq > origin.past_seq or handler.call_id in opened


def _last_number(tx: Transaction, session_id: SessionId, past: Sequence[Event], box: Box) -> int:
    begun = messages.begun_from(tx, session_id, box)
    kind = messages.KIND_OF[box]
    return max((event.data["number"] for event in past if event.kind is kind), default=begun)
