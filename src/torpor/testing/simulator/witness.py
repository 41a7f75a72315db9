"""The outside witness: it knows what upstream was asked, what each socket received and what people were told.

It asserts the ten invariants of RECOVERY section 12 and counts how often each was looked at. It shares no bookkeeping
with the node: what it goes by is upstream's own list, the agents' memory, and the rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from torpor.core.call import CallState
from torpor.core.checkpoint import Checkpoint, holds_barrier
from torpor.core.ids import CallId
from torpor.testing.simulator import kinds
from torpor.testing.simulator.store import COST, WORST_CASE

if TYPE_CHECKING:
    from torpor.testing.simulator.asks import Ask
    from torpor.testing.simulator.guest import Guest, Sandbox
    from torpor.testing.simulator.node import Node
    from torpor.testing.simulator.snapshots import Snapshot
    from torpor.testing.simulator.store import CallRow
    from torpor.testing.simulator.streams import GuestStream, StreamStatus
    from torpor.testing.simulator.world import World

INVARIANTS = {
    1: "sendings = 1 + node deaths while open + refusals; none once completed; a sandbox's death adds none",
    2: "a socket receives a prefix of exactly one attempt, and ends cleanly only if it is answered",
    3: "nothing leaves unless what it depends on is fsynced: its rows, its reservation, a held call's release",
    4: "one owner: no row of a superseded token, one holder of a FIFO pair, one running sandbox",
    5: "a checkpoint has one set of open streams; each is answered, sent again or reset; none hangs",
    6: "an answer is consumed once, not across a rewind; k equal requests are k calls, and a retry is one",
    7: "a barrier call is sent at most once, after its checkpoint, and is unknown without an answer",
    8: "messages, output and exit status are seen by the surviving timeline exactly once",
    9: "memory and workspace are of one cut",
    10: "seq has no gaps, parents are older, a commit is after its checkpoint.seq and of its life, checkpoints restore",
}


class Violation(Exception):
    """An invariant does not hold."""

    def __init__(self, invariant: int, text: str) -> None:
        super().__init__(f"invariant {invariant}: {text}")
        self.invariant = invariant


class Witness:
    """What one schedule looked like from outside."""

    __slots__ = (
        "_asked",
        "_deaths",
        "_final",
        "_last",
        "_paid",
        "_refusals",
        "_sends",
        "_told_exit",
        "checked",
        "confirmed",
        "world",
    )

    def __init__(self, world: World, checked: Counter[int]) -> None:
        self.world = world
        self.checked = checked
        self._sends: defaultdict[CallId, int] = defaultdict(int)
        self._refusals: defaultdict[CallId, int] = defaultdict(int)
        self._deaths: defaultdict[CallId, int] = defaultdict(int)
        self._paid: defaultdict[int, int] = defaultdict(int)
        self._asked: list[dict[int, int]] = [{}]
        self.confirmed: list[int] = []
        self._told_exit: int | None = None
        self._final: frozenset[CallId] = frozenset()
        self._last: Sandbox | None = None

    def check(self, invariant: int, holds: bool, text: str, *values: object) -> None:
        self.checked[invariant] += 1
        if not holds:
            raise Violation(invariant, text.format(*values))

    # --- upstream --------------------------------------------------------------------------------------------------

    def sends(self, node: Node, row: CallRow, sent_transaction: int) -> None:
        """A node sends a call: was it allowed to?"""
        call_id, db = row.call_id, self.world.db
        self.check(3, db.synced >= sent_transaction, "{} leaves before its rows are fsynced", call_id)
        self._sends[call_id] += 1
        sends, deaths = self._sends[call_id], self._deaths[call_id]
        allowed = 1 + deaths + self._refusals[call_id]
        self.check(1, sends <= allowed, "{} is sent {} times after {} deaths of its node", call_id, sends, deaths)
        if node is self.world.node:
            self.check(1, row.state is kinds.SENT, "{} is sent once more, though it is {}", call_id, row.state)
        if db.limit is not None and row.ask.is_llm:
            self._may_spend(node, row, db.limit)
        if row.ask.kind == "barrier":
            self.check(7, sends == 1, "barrier call {} is sent twice", call_id)
            covered = any(holds_barrier(point, call_id) for point in db.checkpoints)
            self.check(7, covered, "barrier call {} is sent without a checkpoint that holds it", call_id)
        if sends == 1 and row.ask.kind != "read":
            self._pays(row)

    def _may_spend(self, node: Node, row: CallRow, limit: int) -> None:
        """A call under a budget leaves only if it is not held, and if all that was sent so far fits at its worst."""
        if node is self.world.node:
            self.check(3, not row.held, "{} is sent while it is held", row.call_id)
        attempts = [attempt for other in self.world.db.calls.values() if other.ask.is_llm for attempt in other.attempts]
        most = sum(COST if attempt.finished else WORST_CASE for attempt in attempts)
        self.check(3, most <= limit, "{} leaves, and {} may be spent of {}", row.call_id, most, limit)

    def _pays(self, row: CallRow) -> None:
        """A new call for a request is right only if every earlier one serves another wish of the agent."""
        index = row.ask.index
        self._paid[index] += 1
        wished = sum(asked.get(index, 0) for asked in self._asked)
        failed = sum(r.state is kinds.FAILED and r.ask.index == index for r in self.world.db.calls.values())
        self.check(
            6,
            self._paid[index] <= wished + failed,
            "{}: request {} is paid {} times, but wished {} times",
            row.call_id,
            index,
            self._paid[index],
            wished,
        )

    def refuses(self, row: CallRow) -> None:
        """Upstream refused a sending for now: the attempt may send it again."""
        self._refusals[row.call_id] += 1

    def node_stopped(self) -> None:
        """A node died or lost the session: what it was waiting for may be sent once more."""
        for row in self.world.db.calls.values():
            if row.state is not kinds.ANSWERED and row.state is not kinds.FAILED:
                self._deaths[row.call_id] += 1

    def after_kill(self) -> None:
        """What must hold at any instant, whoever just died."""
        db = self.world.db
        for call_id, sends in self._sends.items():
            allowed = 1 + self._deaths[call_id] + self._refusals[call_id]
            self.check(1, sends <= allowed, "{} was sent {} times", call_id, sends)
        for sandbox in self.world.sandboxes[-1:]:
            for stream in sandbox.guest.streams.values():
                self._is_prefix(stream)
        last = db.events[-1]
        self.check(10, last[3] is None or last[3] < len(db.events), "event {} is its own ancestor", len(db.events))

    # --- the agent's sockets -----------------------------------------------------------------------------------------

    def asks(self, sandbox: Sandbox, ask: Ask, times: int) -> None:
        """An agent begins to ask something, for the n-th time in its memory."""
        asked = self._asked[-1]
        if asked.get(ask.index, 0) < times:
            asked[ask.index] = times
        self.check(4, sandbox.runs, "an agent runs in a sandbox that does not")

    def consumes(self, sandbox: Sandbox, stream: GuestStream) -> int:
        """An agent read a whole answer with a clean end; returns its serial."""
        received = stream.taken
        served = self.world.upstream.find(received)
        if served is None:
            raise Violation(2, f"stream {stream.sid} ended cleanly with {received!r}, which nobody sent")
        whole = served.whole
        self.check(2, received == whole, "stream {} ended cleanly with {!r} of {!r}", stream.sid, received, whole)
        self.check(2, served.finished, "stream {} ended cleanly, but upstream never finished", stream.sid)
        self.check(6, served.ask is stream.ask, "request {} got the answer of {}", stream.ask.index, served.ask.index)
        answers = sandbox.guest.agent.answers
        self.check(6, all(served.serial != s for s, _ in answers), "answer {} is consumed twice", served.serial)
        row = self.world.db.calls.get(CallId(served.call_id))
        if row is not None:
            holds = self.world.db.timeline.holds(row.intended_seq)
            self.check(6, holds, "{} was undone by a rewind and is consumed after it", row.call_id)
        return served.serial

    def gives_up(self, stream: GuestStream) -> None:
        """A client closes before the end."""
        self._is_prefix(stream)

    def saw_reset(self, sandbox: Sandbox, stream: GuestStream) -> None:
        """A client finds its connection reset."""
        self.check(4, sandbox.alive, "an agent runs in a dead sandbox")
        self._is_prefix(stream)

    def _is_prefix(self, stream: GuestStream) -> None:
        received = stream.taken[: stream.written]
        served = self.world.upstream.find(received)
        if served is not None:
            self.check(2, served.whole.startswith(received), "stream {} received {!r}", stream.sid, received)

    def protocol_error(self, text: str) -> None:
        raise Violation(5, text)

    # --- nodes and sandboxes -----------------------------------------------------------------------------------------

    def wrote(self, node: Node) -> None:
        lease = self.world.db.lease
        self.checked[4] += 1
        if lease is None or lease.owner_token != node.token:
            raise Violation(4, f"node {node.name} wrote with token {node.token}, which is superseded")

    def acquired(self, node: Node) -> None:
        """A node took the session: every other one is a dead owner from here on."""
        rivals = [other for other in self.world.silent if other is not node]
        if rivals and self.world.plan.cluster:
            self.node_stopped()
        elif rivals:
            raise Violation(4, f"node {node.name} took the session from a live owner")

    def opened(self, sandbox: Sandbox) -> None:
        alive = {node.name for node in self.world.live_nodes()}
        holders = sandbox.holders & alive
        self.check(4, len(holders) == 1, "nodes {} hold one FIFO pair", sorted(holders))

    def spawned(self, sandbox: Sandbox) -> None:
        others = [other for other in self.world.sandboxes if other.runs and other is not sandbox]
        self.check(
            4, not others or not sandbox.runs, "incarnation {} starts beside a running sandbox", sandbox.incarnation
        )

    def intended(self, node: Node, row: CallRow) -> None:
        """A call begins."""
        call_id = row.call_id
        sandbox = self.world.sandbox
        newer = sandbox is not None and sandbox.incarnation > row.incarnation and node is self.world.node
        self.check(4, not newer, "{} is of a dead incarnation", call_id)

    def loaded(self, point: Checkpoint, snapshot: Snapshot, guest: Guest) -> None:
        """A snapshot was read for a restore."""
        db = self.world.db
        for call_id, times in self._sends.items():
            row = db.calls.get(call_id)
            if times and row is not None and row.ask.kind == "barrier" and db.timeline.holds(row.intended_seq):
                allowed = row.intended_seq <= point.seq or self.world.below_floor_allowed
                self.check(7, allowed, "recovery goes below barrier call {}, which was sent", call_id)
        self.check(10, not snapshot.damaged, "{} is damaged, and was restored", snapshot.name)
        counter = guest.agent.counter
        self.check(9, counter == snapshot.workspace, "memory {}, workspace {}", counter, snapshot.workspace)

    def restored(self, node: Node, sandbox: Sandbox) -> None:
        """A sandbox was made from a snapshot."""
        agent = sandbox.guest.agent
        self.check(4, node.incarnation <= sandbox.incarnation, "an incarnation number fell")
        asked = self._asked[-1]
        for index, times in agent.asked.items():
            if asked.get(index, 0) < times:
                asked[index] = times

    def same_streams(self, point: Checkpoint, statuses: list[StreamStatus]) -> None:
        """What the restored guest says is what the checkpoint row says."""
        said = {(s.sid, s.read, s.acknowledged, s.taken) for s in statuses if s.end is None}
        noted = {(s.stream, s.read, s.acknowledged, s.taken) for s in point.open_streams}
        self.check(5, said == noted, "checkpoint {} noted {}, its guest says {}", point.number, noted, said)

    def recovered(self, node: Node) -> None:
        """Recovery is over: nothing is sent without anybody waiting for it."""
        for row in self.world.db.calls.values():
            if row.state is kinds.SENT:
                self.check(7, node.pump_alive(row.call_id), "{} is sent, and nobody waits for it", row.call_id)

    def rewound(self, to_seq: int) -> None:
        self.check(10, self.world.db.timeline.holds(to_seq), "a rewind went to where the session never was")
        self._asked.append({})

    # --- people ------------------------------------------------------------------------------------------------------

    def told_message(self, message: int, transaction: int) -> None:
        """A person is told that the message was accepted."""
        self.check(3, self.world.db.synced >= transaction, "message {} is confirmed before it is durable", message)
        self.confirmed.append(message)

    def told_raise(self, transaction: int) -> None:
        """A person is told that the budget was raised."""
        self.check(3, self.world.db.synced >= transaction, "a raise is confirmed before it is durable")

    def told_exit(self, node: Node, code: int, transaction: int) -> None:
        """A person is told how the session ended."""
        self.check(3, self.world.db.synced >= transaction, "an exit is reported before it is durable")
        self.check(8, self._told_exit is None, "an exit is reported twice")
        self._told_exit = code
        self._last = node.sandbox
        self._final = frozenset({*node.redo.pending, *node.redo.joinable, *node.redo.attached})

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """After a schedule: what is left must be one story."""
        self._finish_people()
        self._finish_barriers()
        self._finish_log()

    def _finish_people(self) -> None:
        db = self.world.db
        final = self._last
        if final is None:
            raise Violation(8, "the session ended, and nobody was told")
        agent = final.guest.agent
        self.check(8, db.acknowledged_exit == self._told_exit, "the exit that was told is not the one recorded")
        self.check(
            8, agent.counter == self._told_exit, "told exit {}, the agent has {}", self._told_exit, agent.counter
        )
        self.check(9, agent.counter == final.workspace, "memory and workspace ended apart")
        self.check(8, db.output == agent.printed, "output shows {!r}, the agent wrote {!r}", db.output, agent.printed)
        consumed = Counter(self.world.upstream.answers[serial].message for serial, _ in agent.answers)
        for message in self.confirmed:
            self.check(8, message in db.messages, "message {} was confirmed and is lost", message)
            holder = next((r.call_id for r in db.calls.values() if r.message == message and self._holds(r)), None)
            seen = consumed[message]
            waiting = holder is None or holder in self._final
            self.check(8, seen == 1 or (seen == 0 and waiting), "message {} was seen {} times", message, seen)

    def _holds(self, row: CallRow) -> bool:
        return self.world.db.timeline.holds(row.intended_seq)

    def _finish_barriers(self) -> None:
        for row in self.world.db.calls.values():
            if row.ask.kind == "barrier" and self._sends[row.call_id]:
                node = self.world.node
                open_ = node is not None and node.pump_alive(row.call_id)
                visible = open_ or row.state in _VISIBLE
                self.check(7, visible, "{} was sent and is {}", row.call_id, row.state)

    def _finish_log(self) -> None:
        db = self.world.db
        intended = {1} | {n for n, row in enumerate(db.events, start=1) if row[0] == kinds.CALL_INTENDED}
        for seq, row in enumerate(db.events, start=1):
            if row[3] is not None:
                self.check(10, row[3] < seq and row[3] in intended, "event {} has parent {}", seq, row[3])
        begun = 0
        for seq, row in enumerate(db.events, start=1):
            if row[0] == kinds.INCARNATION_STARTED:
                begun = row[1]
            elif row[0] == kinds.CHECKPOINT_COMMITTED:
                self.check(10, row[1] in (0, begun), "event {} commits a cut of a life before {}", seq, begun)
        for point in db.checkpoints:
            self.check(10, point.seq < point.committed_seq, "checkpoint {} is cut at its own commit", point.number)
            snapshot = self.world.store.snapshots[point.snapshot_id]
            known = not snapshot.damaged or snapshot.name in self.world.damaged
            self.check(10, known, "checkpoint {} was committed and does not restore", point.number)
        if self.world.plan.seed % CHAIN_EVERY == 0:
            previous = "0" * 64
            for seq, event in enumerate(db.sealed(), start=1):
                self.check(10, event.seq == seq and event.prev_hash == previous, "the chain breaks at {}", seq)
                previous = event.hash


CHAIN_EVERY = 64
_VISIBLE = frozenset({CallState.ANSWERED, CallState.FAILED, CallState.UNKNOWN})
