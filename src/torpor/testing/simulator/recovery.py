"""How a simulated node gets a session back: acquire, adopt, else restore down the ladder, and rewind on request."""

from __future__ import annotations

from collections.abc import Generator, Hashable
from typing import TYPE_CHECKING, Any, TypeAlias

from torpor.core.branch import ContextTree
from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint, OpenStream, StreamFate, stream_fate_after_rewind
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, StreamId
from torpor.core.lease import TakeOver, next_owner_token
from torpor.core.output import OutputTrack
from torpor.core.redo import RedoEntry, RedoSet, follow
from torpor.core.session import ENDED, SessionStatus
from torpor.testing.simulator import kinds
from torpor.testing.simulator.guest import Sandbox
from torpor.testing.simulator.store import ROOT_SEQ, SESSION, Incarnation, Row
from torpor.testing.simulator.streams import STDOUT, HostStream, StreamStatus
from torpor.testing.simulator.tasks import Task

if TYPE_CHECKING:
    from torpor.testing.simulator.node import Node
    from torpor.testing.simulator.world import World

Steps: TypeAlias = Generator[Hashable | None, None, bool]


class Recovery:
    """The recovery tasks of any node of this world."""

    __slots__ = ("world",)

    def __init__(self, world: World) -> None:
        self.world = world

    def boot(self, node: Node) -> Task:
        """A new process takes the session over, then does what its status asks for."""
        world, db = self.world, node.db
        while True:
            verdict = world.rules.take_over(
                db.lease, boot_id=world.boot_id, got_flock=world.got_flock(node), owner_answers=False
            )
            if verdict is TakeOver.ACQUIRE:
                break
            if verdict is TakeOver.KILL_FIRST:
                world.kill_silent_owner()
            yield
        node.token = next_owner_token(db.lease)
        db.append(None, (kinds.LEASE_ACQUIRED, 0, None, None, (node.token, node.name, world.boot_id)))
        db.fsync()
        world.witness.acquired(node)
        yield
        if db.status in ENDED or db.status is kinds.ASLEEP:
            world.destroy(world.sandbox_near(node))
            return
        yield from self.recover(node)

    def recover(self, node: Node) -> Task:
        """The ladder: adopt the live sandbox, or restore the newest eligible checkpoint, or an older one."""
        db = node.db
        rows = self._settle_calls(node)
        if node.runs or db.status is SessionStatus.HIBERNATING:
            rows.append((kinds.SESSION_STATUS, 0, None, None, SessionStatus.RECOVERING))
        if rows:
            node.append(*rows)
            db.fsync()
            yield
        found = self.world.sandbox_near(node)
        if found is not None and found.alive and node.sandbox is None and db.status is not kinds.WAKING:
            adopted = yield from self._adopt(node, found)
            if adopted:
                self.world.count("adopted")
                return
            node.sandbox = None
            node.forget_incarnation()
        if self.world.rules.destroy_before_restore:
            self.world.destroy(self.world.sandbox_near(node))
        yield
        yield from node.settle()
        if not db.checkpoints:
            yield from self._make_checkpoint_zero(node)
        yield from self._restore(node)

    def _settle_calls(self, node: Node) -> list[Row]:
        """Calls whose pump died with its node are torn, or unknown."""
        rows: list[Row] = []
        for row in node.db.calls.values():
            if row.state is kinds.SENT and row.call_id not in node.pumps:
                state = self.world.rules.state_without_pump(row.as_call())
                kind = kinds.CALL_TORN if state is CallState.TORN else kinds.CALL_UNKNOWN
                rows.append((kind, node.incarnation, row.call_id, None, state))
        return rows

    def _make_checkpoint_zero(self, node: Node) -> Task:
        """The seeded workspace, before the agent starts."""
        snapshot = self.world.store.stage(None, 0)
        snapshot.synced = True
        yield
        self.world.commit_first(node, snapshot.name)
        yield

    # --- adoption ------------------------------------------------------------------------------------------------

    def _adopt(self, node: Node, sandbox: Sandbox) -> Steps:
        """Go on with a sandbox that outlived its node, unless one of its streams cannot go on."""
        db = node.db
        self._open(node, sandbox)
        sandbox.paused = False
        node.send("HELLO")
        acknowledged, statuses = yield from node.wait_for("STATUS")
        node.restored_from = db.incarnations[sandbox.incarnation].point
        inherited = db.incarnations[sandbox.incarnation].streams
        streams: list[OpenStream] = []
        for status in statuses:
            bound = (sandbox.incarnation, status.sid)
            call_id = db.streams[bound] if bound in db.streams else inherited.get(status.sid)
            if status.end is not None:
                self._note_closed(node, sandbox, status, call_id)
                continue
            attempts = len(db.calls[call_id].attempts) if call_id is not None and call_id in db.calls else 0
            streams.append(_open_stream(status, call_id, max(1, attempts)))
        if not self.world.rules.every_stream_goes_on(streams, db.all_calls(), node.pump_alive):
            return False
        node.redo, node.tree = self._rebuild(node)
        node.gateway.output = OutputTrack(acknowledged, db.output[acknowledged:])
        bound_streams = self._connect(node, streams)
        yield from self._go_live(node, bound_streams, acknowledged)
        return True

    def _note_closed(self, node: Node, sandbox: Sandbox, status: StreamStatus, call_id: CallId | None) -> None:
        """The client closed while no node listened; what CLOSED would have said stands in the status."""
        if call_id is not None and self.world.rules.status_tells_how_closed:
            assert status.end is not None
            end = self.world.rules.stream_end(status.end)
            node.append((kinds.CALL_DELIVERED, sandbox.incarnation, call_id, None, (end, status.sid)))
        node.send("FORGET", status.sid)

    def _rebuild(self, node: Node) -> tuple[RedoSet, ContextTree]:
        """The incarnation's redo set and cursor as the dead node had them, from the log."""
        db = node.db
        first = db.incarnations[node.incarnation]
        redo = RedoSet(
            _entries(node, first.pending),
            joinable=_entries(node, first.joinable),
            attached=_entries(node, first.attached),
        )
        events: list[Event] = []
        tree = self._tree(node, first.cursor)
        for seq, (kind, incarnation, call_id, _, data) in enumerate(db.events, start=1):
            if incarnation != node.incarnation or kind not in _OF_A_CALL:
                continue
            events.append(_event(seq, kind, call_id, data))
            if kind == kinds.CALL_INTENDED:
                tree.rewind(seq)
            elif kind == kinds.CALL_REPEATED and call_id is not None:
                tree.reach(db.calls[call_id].intended_seq)
        return follow(redo, events, db.all_calls()), tree

    # --- restore -------------------------------------------------------------------------------------------------

    def _restore(self, node: Node) -> Task:
        """Try checkpoints in the order of the rules; below a barrier call that was sent only by a person's word."""
        world, db = self.world, node.db
        while True:
            calls = db.all_calls()
            floor = 0 if world.below_floor_allowed else world.rules.recovery_floor(calls.values(), db.timeline)
            points = [db.streams_at(p) for p in db.checkpoints if db.timeline.holds(p.seq) and p.seq >= floor]
            for point in world.rules.restore_order(points, calls, node.pump_alive):
                started = yield from self._start_from(node, point)
                if started:
                    return
                node.append((kinds.RECOVERY_REJECTED, 0, None, None, point.number))
                yield
            world.needs_person = True
            yield "person"

    def _start_from(self, node: Node, point: Checkpoint) -> Steps:
        """Load and verify, then let a new incarnation live; False when the snapshot is damaged."""
        world, db = self.world, node.db
        snapshot = world.store.snapshots[point.snapshot_id]
        if snapshot.damaged and world.rules.verify_snapshots:
            return False
        guest = snapshot.guest.copy() if snapshot.guest is not None else world.fresh_guest()
        world.witness.loaded(point, snapshot, guest)
        world.count("restored: newest" if point.number == len(db.checkpoints) - 1 else "restored: older")
        calls = db.all_calls() if world.rules.side_paths_count else self._calls_on_path(node)
        redo = world.rules.redo_set(calls.values(), point, db.timeline)
        incarnation = db.incarnation + 1
        first = Incarnation(
            pending=redo.pending,
            joinable=redo.joinable,
            attached=redo.attached,
            streams={stream.stream: stream.call_id for stream in point.open_streams},
            cursor=point.cursor_seq,
            point=point.number,
        )
        node.append((kinds.INCARNATION_STARTED, incarnation, None, None, first))
        db.fsync()
        yield
        sandbox = world.spawn(node, Sandbox(world, guest, snapshot.workspace, incarnation))
        world.witness.restored(node, sandbox)
        yield
        self._open(node, sandbox)
        node.restored_from = point.number
        node.redo = redo
        node.tree = self._tree(node, point.cursor_seq)
        node.gateway.output = OutputTrack(point.stdout_bytes, db.output[point.stdout_bytes :])
        node.send("HELLO")
        _, statuses = yield from node.wait_for("STATUS")
        world.witness.same_streams(point, statuses)
        for status in statuses:
            if status.end is not None:
                node.send("FORGET", status.sid)
        streams = self._connect(node, list(point.open_streams))
        yield from self._go_live(node, streams, point.stdout_bytes)
        return True

    def _open(self, node: Node, sandbox: Sandbox) -> None:
        """Open the FIFO pair with a new link nonce."""
        node.forget_incarnation()
        node.sandbox = sandbox
        node.incarnation = sandbox.incarnation
        node.nonce = self.world.next_nonce()
        sandbox.holders.add(node.name)
        self.world.witness.opened(sandbox)

    def _calls_on_path(self, node: Node) -> dict[CallId, Call]:
        """Only ancestors of the cursor: what "the current branch" would be if it were read as the tree's."""
        db = node.db
        tree = self._tree(node, ROOT_SEQ)
        for seq, (kind, _, call_id, _, _) in enumerate(db.events, start=1):
            if kind == kinds.CALL_INTENDED:
                tree.rewind(seq)
            elif kind == kinds.CALL_REPEATED and call_id is not None:
                tree.reach(db.calls[call_id].intended_seq)
        path = set(tree.ancestors())
        return {call_id: call for call_id, call in db.all_calls().items() if call.intended_seq in path}

    def _tree(self, node: Node, cursor: int) -> ContextTree:
        tree = ContextTree(ROOT_SEQ)
        for seq, (kind, _, _, parent, _) in enumerate(node.db.events, start=1):
            if kind == kinds.CALL_INTENDED and parent is not None:
                tree.load(seq, parent)
        tree.rewind(cursor)
        return tree

    # --- both ----------------------------------------------------------------------------------------------------

    def _connect(self, node: Node, streams: list[OpenStream]) -> list[HostStream]:
        """Decide each stream that the guest holds; returns those that get an answer."""
        world, db = self.world, node.db
        bound: list[HostStream] = []
        for stream in streams:
            if not world.rules.resume_restored_streams:
                continue
            row = db.calls.get(stream.call_id) if stream.call_id is not None else None
            call = row.as_call() if row is not None else None
            alive = row is not None and node.pump_alive(row.call_id)
            fate = world.rules.stream_fate(stream, call, pump_alive=alive)
            host = node.gateway.streams[stream.stream] = HostStream(stream.stream)
            host.taken = stream.taken
            if fate is StreamFate.RECEIVE:
                position = stream.acknowledged if world.rules.host_takes_guests_position else stream.read
                host.received = position
                node.send("RESUME", stream.stream, position)
                continue
            assert row is not None
            host.call_id, host.ask, host.spelling = row.call_id, row.ask, row.spelling
            host.received = row.ask.length
            host.logged = True
            if fate is StreamFate.RESET:
                world.count("streams reset")
                node.gateway.reset(host)
            else:
                node.send("ACK", stream.stream, row.ask.length)
                node.send("RESUME", stream.stream, stream.read)
                bound.append(host)
        return bound

    def _go_live(self, node: Node, streams: list[HostStream], output: int) -> Task:
        """Deliver nothing before ALIVE."""
        yield
        node.send("RESUME", STDOUT, output)
        node.send("RESTORED", 0, node.incarnation)
        yield from node.wait_for("ALIVE")
        for stream in streams:
            if stream.end is None:
                node.gateway.bind(stream)
        node.serving = True
        node.set_status(SessionStatus.RUNNING)
        self.world.witness.recovered(node)

    def rewind(self, node: Node, point: Checkpoint) -> Task:
        """Back to a checkpoint on a person's word.

        The sandbox goes first: what it did after the row would belong to the new stretch.
        """
        db = node.db
        self.world.destroy(self.world.sandbox_near(node))
        node.sandbox = None
        node.forget_incarnation()
        node.set_status(SessionStatus.RECOVERING)
        yield
        point = db.streams_at(point)
        output = point.stdout_bytes
        rows: list[Row] = [(kinds.SESSION_REWOUND, 0, None, None, (point.seq, output))]
        for stream in point.open_streams:
            old = db.calls.get(stream.call_id) if stream.call_id is not None else None
            if old is None:
                continue
            fate = stream_fate_after_rewind(stream, old.as_call(), pump_alive=node.pump_alive(old.call_id))
            if fate is StreamFate.RESAMPLE:
                parent = db.events[old.intended_seq - 1][3]
                data = (old.ask, old.spelling, old.stream, old.call_id)
                rows.append((kinds.CALL_INTENDED, 0, db.next_call_id(), parent, data))
        node.append(*rows)
        db.fsync()
        self.world.witness.rewound(point.seq)
        yield from self.recover(node)


def _open_stream(status: StreamStatus, call_id: CallId | None, attempt: int) -> OpenStream:
    return OpenStream(
        stream=StreamId(status.sid),
        port=4100,
        call_id=call_id,
        read=status.read,
        acknowledged=status.acknowledged,
        taken=status.taken,
        attempt=attempt,
    )


def _entries(node: Node, ids: Any) -> list[RedoEntry]:
    return [node.db.calls[call_id].entry() for call_id in ids]


def _event(seq: int, kind: str, call_id: CallId | None, row_data: Any) -> Event:
    """A row as the event that `follow` reads."""
    data: dict[str, Any] = {}
    if kind == kinds.CALL_INTENDED:
        data["stream"] = row_data[2]
    elif kind == kinds.CALL_REPEATED:
        data["stream"] = row_data
    elif kind == kinds.CALL_DELIVERED:
        data["end"], data["stream"] = row_data
    return Event(
        session_id=SESSION,
        seq=seq,
        parent_seq=None,
        incarnation=0,
        wall_ns=0,
        kind=Kind(kind),
        call_id=call_id,
        data=data,
        refs=(),
        prev_hash="",
        hash="",
    )


_OF_A_CALL = frozenset(
    {kinds.CALL_INTENDED, kinds.CALL_REPEATED, kinds.CALL_DELIVERED, kinds.CALL_DIVERGED, kinds.CALL_FAILED}
)
