"""What outlives a process: the database as a log of transactions, written versus fsynced.

`kill -9` of a node loses nothing that was written. A power cut keeps what was fsynced and any beginning of the rest.
Every fact is a row, and the state is a fold over them, so that a power cut folds again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torpor.core.branch import Timeline
from torpor.core.call import CALL_TRANSITIONS, Attempt, Call, CallState, ResponseHead
from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.errors import Conflict
from torpor.core.events import Event, EventDraft, Kind, seal
from torpor.core.ids import CallId, CheckpointId, NodeId, SessionId, SnapshotId
from torpor.core.lease import Lease, check_owner_token
from torpor.core.money import Account
from torpor.core.origin import Past
from torpor.core.redo import RedoEntry
from torpor.core.session import ENDED, SessionStatus, check_transition
from torpor.testing.simulator import kinds
from torpor.testing.simulator.asks import Ask
from torpor.testing.simulator.rules import Rules

SESSION = SessionId("ses_simulated")
WORST_CASE, COST = 2, 1
"""What a model call may cost, and does, if its answer ends properly."""
ROOT_SEQ = 1

Row: TypeAlias = tuple[str, int, CallId | None, int | None, Any]
"""(kind, incarnation, call, parent_seq, data)"""


class AttemptRow:
    __slots__ = ("chunks", "finished", "head", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.head: ResponseHead | None = None
        self.chunks: list[bytes] = []
        self.finished = False


def new_entry(call_id: CallId, ask: Ask, spelling: int, seq: int) -> RedoEntry:
    return RedoEntry(call_id=call_id, key=ask.keys[spelling], intended_seq=seq, is_llm=ask.is_llm, method=ask.method)


class CallRow:
    """The present state of a call; `as_call` is the value that the rules judge."""

    __slots__ = (
        "ask",
        "attempts",
        "call_id",
        "ended_seq",
        "held",
        "incarnation",
        "intended_seq",
        "message",
        "spelling",
        "state",
        "stream",
        "value",
    )

    def __init__(self, call_id: CallId, ask: Ask, spelling: int, incarnation: int, stream: int, seq: int) -> None:
        self.call_id = call_id
        self.ask = ask
        self.spelling = spelling
        self.incarnation = incarnation
        self.stream = stream
        self.intended_seq = seq
        self.ended_seq: int | None = None
        self.state = CallState.INTENDED
        self.held = False
        """It has a waitpoint that nobody has resolved."""
        self.attempts: list[AttemptRow] = []
        self.value: Call | None = None
        self.message: int | None = None
        """The message that answered it, for a call that receives one."""

    def entry(self) -> RedoEntry:
        return new_entry(self.call_id, self.ask, self.spelling, self.intended_seq)

    def as_call(self) -> Call:
        """The call as it is now; made once for each state."""
        if self.value is None:
            self.value = self._make_call()
        return self.value

    def _make_call(self) -> Call:
        ask = self.ask
        return Call(
            call_id=self.call_id,
            session_id=SESSION,
            state=self.state,
            key=ask.keys[self.spelling],
            dialect="openai_chat" if ask.is_llm else "raw",
            method=ask.method,
            target="/",
            model=None,
            incarnation=self.incarnation,
            stream=self.stream,  # pyright: ignore[reportArgumentType]
            request_bytes=ask.length,
            intended_seq=self.intended_seq,
            ended_seq=self.ended_seq,
            attempts=tuple(
                Attempt(
                    number=attempt.number,
                    head=attempt.head,
                    chunk_count=len(attempt.chunks),
                    body_bytes=0,
                    finished=attempt.finished,
                )
                for attempt in self.attempts
            ),
            usage={},
            is_llm=ask.is_llm,
            barrier=ask.kind == "barrier",
        )

    def become(self, state: CallState) -> None:
        if state not in CALL_TRANSITIONS[self.state]:
            raise AssertionError(f"{self.call_id}: {state} does not follow {self.state}")
        self.state = state
        self.value = None


class Incarnation:
    """One incarnation's first redo set, inherited streams, and the checkpoint it came from, as its row has them."""

    __slots__ = ("attached", "cursor", "joinable", "pending", "point", "streams")

    def __init__(
        self,
        *,
        pending: tuple[CallId, ...],
        joinable: tuple[CallId, ...],
        attached: frozenset[CallId],
        streams: dict[int, CallId | None],
        cursor: int,
        point: int,
    ) -> None:
        self.pending = pending
        self.joinable = joinable
        self.attached = attached
        self.streams = streams
        self.cursor = cursor
        self.point = point


class Cut:
    """What a checkpoint's row says of the instant of its cut; the commit adds the rest."""

    __slots__ = ("cursor", "incarnation", "joinable", "output", "pending", "seq", "streams")

    def __init__(
        self,
        *,
        seq: int,
        cursor: int = ROOT_SEQ,
        incarnation: int = 0,
        streams: tuple[OpenStream, ...] = (),
        output: int = 0,
        pending: tuple[CallId, ...] = (),
        joinable: tuple[CallId, ...] = (),
    ) -> None:
        self.seq = seq
        self.cursor = cursor
        self.incarnation = incarnation
        self.streams = streams
        self.output = output
        self.pending = pending
        self.joinable = joinable

    def committed(self, db: Database, snapshot: str, *, has_memory: bool = True) -> Checkpoint:
        """The checkpoint that the very next row commits, with the fields that the rules look at."""
        return Checkpoint(
            checkpoint_id=CheckpointId(snapshot),
            session_id=SESSION,
            number=len(db.checkpoints),
            seq=self.seq,
            committed_seq=db.head + 1,
            cursor_seq=self.cursor,
            incarnation=self.incarnation,
            snapshot_id=SnapshotId(snapshot),
            manifest_digest="",
            has_memory=has_memory,
            open_streams=self.streams,
            next_stream=0,
            stdout_bytes=self.output,
            stderr_bytes=0,
            reason="call",
            wall_ns=0,
            freeze_ns=0,
            commit_ns=0,
            raw_bytes=0,
            stored_bytes=0,
            pending_redo=self.pending,
            joinable=self.joinable,
        )


class Database:
    """One session's rows. `append` refuses a superseded owner token in its own statement."""

    __slots__ = (
        "acknowledged_exit",
        "call_count",
        "calls",
        "checkpoints",
        "ended",
        "events",
        "incarnation",
        "incarnations",
        "lease",
        "limit",
        "messages",
        "output",
        "replaced",
        "rewinds",
        "rules",
        "status",
        "streams",
        "synced",
        "timeline",
        "transactions",
    )

    def __init__(self, rules: Rules, limit: int | None = None) -> None:
        self.rules = rules
        self.transactions: list[tuple[Row, ...]] = []
        self.synced = 0
        self.call_count = 0
        self._empty()
        self.append(0, (kinds.SESSION_CREATED, 0, None, None, limit))
        self.fsync()

    def _empty(self) -> None:
        self.events: list[Row] = []
        self.calls: dict[CallId, CallRow] = {}
        self.checkpoints: list[Checkpoint] = []
        self.status = SessionStatus.CREATED
        self.limit: int | None = None
        self.ended = False
        self.lease: Lease | None = None
        self.incarnation = 0
        self.incarnations: dict[int, Incarnation] = {}
        self.streams: dict[tuple[int, int], CallId] = {}
        self.messages: dict[int, int] = {}
        self.output = b""
        self.rewinds: list[tuple[int, int]] = []
        self.timeline = Timeline()
        self.replaced: dict[CallId, CallId] = {}
        self.acknowledged_exit: int | None = None

    def append(self, token: int | None, *rows: Row) -> int:
        """One transaction; None is a writer that holds no lease (a person's message). Returns its number.

        Raises:
            Superseded: the token is not the session's.
        """
        if token is not None and self.lease is not None and self.rules.check_owner_token:
            check_owner_token(SESSION, presented=token, current=self.lease.owner_token)
        self.transactions.append(rows)
        self._fold(rows)
        return len(self.transactions)

    def fsync(self) -> None:
        self.synced = len(self.transactions)

    def lose(self, keep: int) -> None:
        """A power cut: only the first `keep` transactions were on the disk."""
        self.transactions = self.transactions[:keep]
        self.synced = keep
        self._empty()
        for rows in self.transactions:
            self._fold(rows)

    @property
    def head(self) -> int:
        return len(self.events)

    def next_call_id(self) -> CallId:
        self.call_count += 1
        return CallId(f"c{self.call_count}")

    def all_calls(self) -> dict[CallId, Call]:
        return {call_id: row.as_call() for call_id, row in self.calls.items()}

    def free_message(self) -> int | None:
        """The oldest message that no receiving call of this timeline was answered with.

        A call is the timeline's by its beginning: one that was open at a rewind's cut keeps its answer and message.
        """
        holds = self.timeline.holds
        taken = {row.message for row in self.calls.values() if row.message is not None and holds(row.intended_seq)}
        return next((message for message in self.messages if message not in taken), None)

    def account(self) -> Account:
        """Where the session stands under its budget: an attempt costs its worst case, until it ended properly."""
        spent = reserved = 0
        for row in self.calls.values():
            if row.ask.is_llm:
                for attempt in row.attempts:
                    if attempt.finished:
                        spent += COST
                    elif row.state is kinds.SENT and attempt is row.attempts[-1]:
                        reserved += WORST_CASE
                    elif self.rules.unknown_costs_count:
                        spent += WORST_CASE
        return Account(limit=self.limit, spent=spent, reserved=reserved)

    def held(self) -> list[CallId]:
        """Calls that the budget holds."""
        return [row.call_id for row in self.calls.values() if row.held]

    def streams_at(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with calls that a later rewind asked anew standing for the ones that were open at its cut."""
        return Past(replaced=self.replaced).point(checkpoint)

    def sealed(self) -> list[Event]:
        """The log with its hash chain; costly, so made only where it is checked."""
        events: list[Event] = []
        previous = "0" * 64
        for seq, (kind, incarnation, call_id, parent, _) in enumerate(self.events, start=1):
            draft = EventDraft(kind=Kind(kind), incarnation=incarnation, call_id=call_id, parent_seq=parent)
            event = seal(session_id=SESSION, seq=seq, draft=draft, wall_ns=seq, prev_hash=previous)
            events.append(event)
            previous = event.hash
        return events

    def _fold(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            kind = row[0]
            if kind not in kinds.NO_EVENTS:
                self.events.append(row)
            fold = _FOLDS.get(kind)
            if fold is not None:
                fold(self, row)


def _fold_created(db: Database, row: Row) -> None:
    db.limit = row[4]


def _fold_status(db: Database, row: Row) -> None:
    check_transition(SESSION, db.status, row[4])
    db.status = row[4]
    db.ended = row[4] in ENDED


def _fold_lease(db: Database, row: Row) -> None:
    token, node, boot_id = row[4]
    db.lease = Lease(session_id=SESSION, owner_token=token, node_id=NodeId(str(node)), boot_id=boot_id, pid=node)


def _fold_incarnation(db: Database, row: Row) -> None:
    db.incarnation = row[1]
    db.incarnations[row[1]] = row[4]


def _fold_intended(db: Database, row: Row) -> None:
    ask, spelling, sid, replaced = row[4]
    call_id = row[2]
    assert call_id is not None
    db.calls[call_id] = CallRow(call_id, ask, spelling, row[1], sid, db.head)
    if replaced is not None:
        db.replaced[replaced] = call_id
    else:
        db.streams[row[1], sid] = call_id


def _fold_repeated(db: Database, row: Row) -> None:
    assert row[2] is not None
    db.streams[row[1], row[4]] = row[2]


def _fold_sent(db: Database, row: Row) -> None:
    call = _call(db, row)
    call.become(CallState.SENT)
    call.attempts.append(AttemptRow(len(call.attempts) + 1))


def _fold_head(db: Database, row: Row) -> None:
    call = _call(db, row)
    call.attempts[-1].head = row[4]
    call.value = None


def _fold_chunk(db: Database, row: Row) -> None:
    call = _call(db, row)
    call.attempts[-1].chunks.append(row[4])
    call.value = None


def _fold_completed(db: Database, row: Row) -> None:
    call = _call(db, row)
    call.become(CallState.ANSWERED)
    call.attempts[-1].finished = True
    call.ended_seq = db.head
    call.message = row[4]


def _fold_failed(db: Database, row: Row) -> None:
    call = _call(db, row)
    call.become(CallState.FAILED)
    call.ended_seq = db.head


def _fold_torn(db: Database, row: Row) -> None:
    _call(db, row).become(row[4])


def _fold_checkpoint(db: Database, row: Row) -> None:
    db.checkpoints.append(row[4])


def _fold_waitpoint(db: Database, row: Row) -> None:
    _call(db, row).held = True


def _fold_resolved(db: Database, row: Row) -> None:
    """A message for the session, or the end of a call's hold."""
    if row[2] is None:
        db.messages[row[4]] = db.head
    else:
        _call(db, row).held = False


def _fold_budget(db: Database, row: Row) -> None:
    db.limit = row[4]


def _fold_output(db: Database, row: Row) -> None:
    offset, fresh = row[4]
    db.output = db.output[:offset] + fresh


def _fold_rewound(db: Database, row: Row) -> None:
    to_seq, output = row[4]
    db.rewinds.append((to_seq, db.head))
    db.timeline = Timeline.of_rewinds(db.rewinds)
    db.output = db.output[:output]


def _fold_exited(db: Database, row: Row) -> None:
    if db.acknowledged_exit is not None:
        raise Conflict("exit_twice", "cannot end the session: it ended before")
    db.acknowledged_exit = row[4]


def _call(db: Database, row: Row) -> CallRow:
    assert row[2] is not None
    return db.calls[row[2]]


_FOLDS: dict[str, Callable[[Database, Row], None]] = {
    kinds.SESSION_CREATED: _fold_created,
    kinds.SESSION_STATUS: _fold_status,
    kinds.LEASE_ACQUIRED: _fold_lease,
    kinds.INCARNATION_STARTED: _fold_incarnation,
    kinds.CALL_INTENDED: _fold_intended,
    kinds.CALL_REPEATED: _fold_repeated,
    kinds.CALL_SENT: _fold_sent,
    kinds.HEAD: _fold_head,
    kinds.CHUNK: _fold_chunk,
    kinds.CALL_COMPLETED: _fold_completed,
    kinds.CALL_FAILED: _fold_failed,
    kinds.CALL_TORN: _fold_torn,
    kinds.CALL_UNKNOWN: _fold_torn,
    kinds.CHECKPOINT_COMMITTED: _fold_checkpoint,
    kinds.WAITPOINT_CREATED: _fold_waitpoint,
    kinds.WAITPOINT_RESOLVED: _fold_resolved,
    kinds.BUDGET_CHANGED: _fold_budget,
    kinds.OUTPUT: _fold_output,
    kinds.SESSION_REWOUND: _fold_rewound,
    kinds.AGENT_EXITED: _fold_exited,
}
