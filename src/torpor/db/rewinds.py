"""A rewind's rows: the session's past ends at an earlier point, and goes on behind its session.rewound.

What is left stays as it is, in the log and as checkpoints; no recovery looks at it again. The new checkpoint has the
snapshot of the old one and stands at the new head, so that whatever is found behind it was done after the rewind.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.branch import Timeline
from torpor.core.call import Call, changes_outside
from torpor.core.checkpoint import FORKED, REWOUND, Checkpoint, cut_order
from torpor.core.errors import Conflict
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId, new_call_id, new_checkpoint_id
from torpor.core.origin import Origin, Past, Plan, undone
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import ABANDONED
from torpor.db import calls, checkpoints, copies, log, messages, outputs, requests, roots, sessions, waitpoints
from torpor.db.database import Transaction
from torpor.db.fence import held_row
from torpor.db.messages import Box, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphans:
    """What the session did to the outside after a point, and what no rewind takes back.

    Attributes:
        sent: messages that the agent sent out.
        effects: requests that may have changed something.
    """

    sent: Sequence[Message]
    effects: Sequence[Call]

    def __bool__(self) -> bool:
        return bool(self.sent or self.effects)


def past_of(tx: Transaction, session_id: SessionId, *, before_seq: int | None = None) -> Past:
    """Where the session has been, by its rewinds; `before_seq` is how that was earlier."""
    if log.last_of_kind(tx, session_id, Kind.SESSION_REWOUND) is None:
        return Past()
    events = [event for event in log.events(tx, session_id) if before_seq is None or event.seq < before_seq]
    rewinds = [(event.data["to_seq"], event.seq) for event in events if event.kind is Kind.SESSION_REWOUND]
    replaced = {
        CallId(event.data["resamples"]): event.call_id
        for event in events
        if event.kind is Kind.CALL_INTENDED and event.call_id is not None and "resamples" in event.data
    }
    return Past(timeline=Timeline.of_rewinds(rewinds), replaced=replaced)


def list_rewinds(tx: Transaction, session_id: SessionId) -> list[Event]:
    if log.last_of_kind(tx, session_id, Kind.SESSION_REWOUND) is None:
        return []
    return [event for event in log.events(tx, session_id) if event.kind is Kind.SESSION_REWOUND]


def list_orphans(tx: Transaction, session_id: SessionId, origin: Origin, plan: Plan) -> Orphans:
    """What stays done outside although the session goes back."""
    made = calls.load_calls(tx, session_id)
    left = undone(origin, made, past_of(tx, session_id).timeline, plan.kept)
    effects = [call for call in left if not call.is_llm and call.attempts and changes_outside(call.method, call.target)]
    gone = {call.call_id for call in left}
    sent = [message for message in messages.list_after(tx, session_id, Box.OUT) if message.call_id in gone]
    return Orphans(sent=sent, effects=effects)


def rewind(
    tx: Transaction, *, session_id: SessionId, owner_token: int, origin: Origin, plan: Plan, wall_ns: int
) -> Checkpoint:
    """Take the session back; it is asleep afterwards, at the checkpoint that is given. Commit it durably.

    No sandbox of it lives, and none of its calls is `sent`.

    Raises:
        Conflict: `session_ended`; `origin_left`: it is not in the session's past.
    """
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    status = SessionStatus(held_row(tx, session_id, owner_token)["status"])
    if status in ENDED:
        raise Conflict("session_ended", f"cannot rewind session {session_id}: it has {status}")
    made = {call.call_id: call for call in calls.load_calls(tx, session_id)}
    timeline = past_of(tx, session_id).timeline
    if not timeline.holds(origin.past_seq) or not timeline.holds(origin.checkpoint.seq):
        raise Conflict(
            "origin_left", f"cannot rewind session {session_id} to event {origin.past_seq}: an earlier rewind left it"
        )
    left = undone(origin, made.values(), timeline, plan.kept)
    _sleep(tx, owner, status, wall_ns)
    event = _log_it(tx, owner, origin, messages.list_handled(tx, session_id, {call.call_id for call in left}), wall_ns)
    _leave(tx, owner, origin, event.seq, wall_ns)
    anew = [made[call_id] for call_id in plan.anew]
    _forget_what_was_done(tx, owner, [*left, *anew], wall_ns)
    cursor, present = _ask_anew(tx, owner, origin, anew, wall_ns)
    sessions.set_cursor(tx, **owner, cursor_seq=cursor)
    _cut_output(tx, owner, origin.checkpoint, wall_ns)
    return _commit(tx, owner, origin, plan, present, wall_ns)


def _sleep(tx: Transaction, owner: dict[str, Any], status: SessionStatus, wall_ns: int) -> None:
    step: dict[str, Any] = {**owner, "wall_ns": wall_ns, "reason": "rewound by a person"}
    if status not in {SessionStatus.ASLEEP, SessionStatus.RECOVERING}:
        sessions.set_status(tx, **step, status=SessionStatus.RECOVERING)
    if status is not SessionStatus.ASLEEP:
        sessions.set_status(tx, **step, status=SessionStatus.ASLEEP)


def _log_it(
    tx: Transaction, owner: dict[str, Any], origin: Origin, unhandled: Sequence[tuple[int, CallId]], wall_ns: int
) -> Event:
    row = sessions.get(tx, owner["session_id"])
    made = calls.load_calls(tx, owner["session_id"])
    turn = sum(call.is_llm and call.intended_seq <= origin.past_seq for call in made) + (origin.turn is not None)
    data: dict[str, Any] = {"to_seq": origin.past_seq, "checkpoint": origin.checkpoint.number, "turn": turn}
    if unhandled:
        # A fork of what is left has to know: in the row it is another call's by then, or nobody's.
        data["unhandled"] = [[number, call_id] for number, call_id in unhandled]
    draft = EventDraft(kind=Kind.SESSION_REWOUND, incarnation=row.incarnation, data=data)
    return log.append(tx, **owner, drafts=[draft], wall_ns=wall_ns)[0]


def _leave(tx: Transaction, owner: dict[str, Any], origin: Origin, left_seq: int, wall_ns: int) -> None:
    """Mark the checkpoints of what is left, and keep its tip: from there a fork goes on with it."""
    session_id = owner["session_id"]
    before = {point.number for point in checkpoints.list_intact(tx, session_id)}
    checkpoints.leave(tx, **owner, point=origin.checkpoint, left_seq=left_seq)
    after = {point.number for point in checkpoints.list_intact(tx, session_id)}
    tips = [point for point in checkpoints.list_intact(tx, session_id, branches=True) if point.number in before - after]
    if tips:
        tip = max(tips, key=cut_order)
        roots.pin(tx, **owner, number=tip.number, is_pinned=True, wall_ns=wall_ns)


def _forget_what_was_done(tx: Transaction, owner: dict[str, Any], left: Sequence[Call], wall_ns: int) -> None:
    gone = {call.call_id for call in left}
    messages.unhandle(tx, **owner, call_ids=gone)
    for point in waitpoints.open_waitpoints(tx, owner["session_id"]):
        if point.call_id in gone:
            waitpoints.resolve(tx, **owner, point=point, resolution=ABANDONED, wall_ns=wall_ns)


def _ask_anew(
    tx: Transaction, owner: dict[str, Any], origin: Origin, anew: Sequence[Call], wall_ns: int
) -> tuple[int, Mapping[CallId, CallId]]:
    """Intend models' calls once more, each beside the one that it stands for; gives the cursor and the new ids."""
    session_id = owner["session_id"]
    events = {event.seq: event for event in log.events(tx, session_id)}
    cursor = origin.checkpoint.cursor_seq
    present: dict[CallId, CallId] = {}
    for call in anew:
        source = copies.read_source(tx, call, list(events.values()), past_seq=origin.past_seq)
        if source.redacted:
            raise Conflict("request_redacted", f"cannot ask call {call.call_id} anew: its request was redacted")
        if not present:
            cursor = events[call.intended_seq].parent_seq or cursor
        sessions.set_cursor(tx, **owner, cursor_seq=cursor)
        call_id = new_call_id(wall_ns)
        made: dict[str, Any] = {**owner, "call_id": call_id, "wall_ns": wall_ns}
        prepared = requests.prepare(source.body)
        copied = copies.copy(tx, **made, source=source, prepared=prepared, origin={"resamples": call.call_id})
        present[call.call_id] = call_id
        cursor = copied.intended_seq
    return cursor, present


def _cut_output(tx: Transaction, owner: dict[str, Any], point: Checkpoint, wall_ns: int) -> None:
    """A life without output but for an end: what is written from the point on supersedes what was."""
    number = sessions.get(tx, owner["session_id"]).incarnation + 1
    tx.run("session/set_incarnation_fenced", **owner, incarnation=number)
    for channel, position in ((outputs.STDOUT, point.stdout_bytes), (outputs.STDERR, point.stderr_bytes)):
        if outputs.high_water(tx, owner["session_id"], channel) > position:
            end: dict[str, Any] = {"channel": channel, "position": position, "incarnation": number, "data": b""}
            outputs.append_output(tx, **owner, **end, wall_ns=wall_ns)


def _commit(
    tx: Transaction,
    owner: dict[str, Any],
    origin: Origin,
    plan: Plan,
    present: Mapping[CallId, CallId],
    wall_ns: int,
) -> Checkpoint:
    point, row = origin.checkpoint, sessions.get(tx, owner["session_id"])
    numbers = [one["number"] for one in tx.all("checkpoint/list_points", session_id=owner["session_id"])]
    own = replace(
        point,
        checkpoint_id=new_checkpoint_id(wall_ns),
        number=max(numbers) + 1,
        seq=row.head_seq,
        cursor_seq=row.cursor_seq,
        open_streams=Past(replaced=present).point(point).open_streams,
        # A fork's image from before its first life is told the fork's environment whenever it is restored.
        reason=FORKED if point.reason == FORKED else REWOUND,
        freeze_ns=0,
        commit_ns=0,
        stored_bytes=0,
        pending_redo=plan.pending,
        joinable=plan.joinable,
    )
    return checkpoints.commit(tx, **owner, checkpoint=own, wall_ns=wall_ns)
