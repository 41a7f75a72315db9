"""A simulated node: one process with its lease, its tasks, and the state that `kill -9` takes from it.

It cuts, commits, puts to sleep and ends a session; `recovery` is how it gets one back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable
from typing import TYPE_CHECKING

from torpor.core.branch import ContextTree
from torpor.core.call import CallState
from torpor.core.checkpoint import Checkpoint, OpenStream, holds_barrier
from torpor.core.errors import Superseded
from torpor.core.ids import CallId, StreamId
from torpor.core.redo import RedoSet
from torpor.core.session import SessionStatus
from torpor.testing.simulator import kinds
from torpor.testing.simulator.asks import Ask
from torpor.testing.simulator.gateway import (
    ON_BUDGET,
    ON_COMMIT,
    ON_LOGGED,
    ON_RESOLVED,
    ON_SETTLED,
    ON_STATUS_CHANGE,
    Gateway,
)
from torpor.testing.simulator.guest import Guest, Sandbox
from torpor.testing.simulator.store import ROOT_SEQ, Cut, Incarnation, Row
from torpor.testing.simulator.streams import StreamStatus
from torpor.testing.simulator.tasks import Task, TaskSet

if TYPE_CHECKING:
    from torpor.testing.simulator.world import World


class Node:
    """One node process that drives the session.

    Attributes:
        life: tasks of the present incarnation. lasting: pumps and commits, which outlive it. control: recovery.
        serving: the incarnation is connected; before that nothing of it is served.
        holding: delivery is held for a cut; `held` is what would have been sent.
        cutting: number of the cut under way, 0 for none.
        uncommitted: how many cuts are still to be committed.
    """

    __slots__ = (
        "_all_tasks",
        "control",
        "cut_count",
        "cutting",
        "db",
        "gateway",
        "held",
        "holding",
        "incarnation",
        "lasting",
        "life",
        "name",
        "nonce",
        "pumps",
        "queue",
        "redo",
        "restored_from",
        "sandbox",
        "serving",
        "token",
        "tree",
        "uncommitted",
        "world",
    )

    def __init__(self, world: World, name: int) -> None:
        self.world = world
        self.name = name
        self.db = world.db
        self.token = 0
        self.nonce = 0
        self.incarnation = 0
        self.sandbox: Sandbox | None = None
        self.pumps: dict[CallId, int] = {}
        self.queue: list[Callable[[], object]] = []
        self.life = TaskSet()
        self.lasting = TaskSet()
        self.control = TaskSet()
        self._all_tasks = (self.life, self.lasting, self.control)
        self.cut_count = 0
        self.restored_from = 0
        self.uncommitted = 0
        self.forget_incarnation()

    def forget_incarnation(self) -> None:
        """What this process knew of a sandbox that is gone."""
        self.life.clear()
        self.gateway = Gateway(self)
        self.redo = RedoSet()
        self.tree = ContextTree(ROOT_SEQ)
        self.serving = False
        self.holding = False
        self.held: list[tuple[str, int, int, object]] = []
        self.cutting = 0
        self.queue.clear()
        if not self.world.rules.pump_outlives_sandbox:
            self.lasting.clear()
            self.pumps.clear()
            self.uncommitted = 0

    # --- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step of this process; a write that is refused as superseded ends it."""
        try:
            sandbox, random = self.sandbox, self.world.random
            chance = random()
            if sandbox is not None:
                if not sandbox.alive:
                    self.lose_sandbox(sandbox)
                    return True
                frames = sandbox.to_host
                if frames and (chance < 0.5 or not self._has_task()):
                    self.gateway.receive(frames.popleft())
                    while frames and chance < 0.3 and self.world.goes_on():
                        chance *= 1.6
                        self.gateway.receive(frames.popleft())
                    return True
            # Recovery before all, and the incarnation's tasks only once it is served.
            tasks = self.lasting
            if self.control.ready:
                tasks = self.control
            elif self.serving and self.life.ready and (chance < 0.85 or not tasks.ready):
                tasks = self.life
            return tasks.step(random, self.world.goes_on)
        except Superseded:
            self.world.count("superseded")
            self.world.stop_node(self)
            return True

    def _has_task(self) -> bool:
        return bool(self.lasting.ready or self.control.ready or (self.serving and self.life.ready))

    def lose_sandbox(self, sandbox: Sandbox) -> None:
        """The FIFO pair broke: whatever of the dead incarnation is still in it is dropped with it."""
        rules = self.world.rules
        leftover = [] if rules.closed_fifo_is_dropped else list(sandbox.to_host)
        self.sandbox = None
        self.control.clear()
        self.forget_incarnation()
        if self.db.status in _WITH_SANDBOX:
            self.control.add(self.world.recovery.recover(self))
            for frame in leftover:
                self.gateway.receive(frame)

    def append(self, *rows: Row) -> int:
        """One transaction, after everything that was decided before it."""
        if self.queue:
            self.flush()
        return self.write(*rows)

    def write(self, *rows: Row) -> int:
        """One transaction; for `append` and for what `log_later` queued.

        Raises:
            Superseded: another node acquired the session.
        """
        if self.world.trace is not None:
            self.world.note(f"node {self.name} writes " + "; ".join(f"{r[0]} {r[2] or ''} {show(r[4])}" for r in rows))
        number = self.db.append(self.token, *rows)
        self.world.witness.wrote(self)
        return number

    def log_later(self, write: Callable[[], object]) -> None:
        """Queue what was just decided in memory: rows are written in the order of the decisions, some time later."""
        if not self.queue:
            self.lasting.add(self._write_queue())
        self.queue.append(write)

    def _write_queue(self) -> Task:
        self.flush()
        return
        yield  # never reached: it makes this a task

    def flush(self) -> None:
        """Write every queued decision."""
        queue, self.queue = self.queue, []
        for write in queue:
            write()
        self.wake(ON_LOGGED)

    def set_status(self, status: SessionStatus) -> None:
        self.append((kinds.SESSION_STATUS, self.incarnation, None, None, status))
        self.db.fsync()
        self.wake(ON_STATUS_CHANGE)
        self.wake(ON_BUDGET)

    def wake(self, key: Hashable) -> None:
        for tasks in self._all_tasks:
            if key in tasks.parked:
                tasks.ready += tasks.parked.pop(key)

    def send(self, kind: str, sid: int = 0, arg: int = 0, payload: object = None) -> None:
        """One frame to the guest, kept back while a cut holds delivery."""
        if self.holding and self.world.rules.hold_during_cut:
            self.held.append((kind, sid, arg, payload))
        elif self.sandbox is not None:
            self.sandbox.to_guest.append((self.nonce, kind, sid, arg, payload))

    def wait_for(self, kind: str) -> Generator[Hashable | None, None, tuple[int, list[StreamStatus]]]:
        """Wait for a frame of this type and take it."""
        while kind not in self.gateway.answers:
            yield kind
        return self.gateway.answers.pop(kind)

    @property
    def runs(self) -> bool:
        """Whether the agent runs, though one of its calls may be held."""
        status = self.db.status
        return status is kinds.RUNNING or status is kinds.WAITING

    def pump_alive(self, call_id: CallId) -> bool:
        return call_id in self.pumps

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def checkpoint(self) -> Task:
        """Cut, resume, and commit in the background (RECOVERY 3)."""
        if self.cutting or not self.runs:
            return
        number = self._begin_cut()
        cut, guest, workspace = yield from self._cut(number)
        self.uncommitted += 1
        self.lasting.add(self._commit_behind(number, cut, guest, workspace))

    def _begin_cut(self) -> int:
        self.cut_count += 1
        self.cutting = self.cut_count
        self.holding = True
        return self.cut_count

    def _cut(
        self, number: int, *, stay_paused: bool = False
    ) -> Generator[Hashable | None, None, tuple[Cut, Guest, int]]:
        sandbox = self.sandbox
        assert sandbox is not None
        rules = self.world.rules
        sandbox.to_guest.append((self.nonce, "BARRIER", 0, number, None))
        _, statuses = yield from self.wait_for("BARRIER_ACK")
        cut = self._note_cut(statuses)
        yield
        sandbox.paused = True
        yield
        guest = sandbox.guest.copy()
        if not rules.workspace_while_paused:
            yield
            self.resume(number)
            for _ in range(4):
                yield
        workspace = sandbox.workspace
        if not rules.seq_of_the_cut:
            cut.seq = self.db.head
        if not stay_paused and rules.workspace_while_paused:
            self.resume(number)
        return cut, guest, workspace

    def resume(self, number: int) -> None:
        """Let the guest run on and deliver what was held."""
        sandbox = self.sandbox
        assert sandbox is not None
        sandbox.paused = False
        sandbox.to_guest.append((self.nonce, "RELEASE", 0, number, None))
        self.holding = False
        held, self.held = self.held, []
        for frame in held:
            self.send(*frame)

    def _note_cut(self, statuses: list[StreamStatus]) -> Cut:
        """The cut, all of one instant: log head, open streams, redo set, cursor, output.

        It names a call only if the log has it by then: one that is still to be written comes after the cut.
        """
        all_calls = not self.world.rules.cut_names_logged_calls_only
        streams: list[OpenStream] = []
        for status in statuses:
            if status.end is not None:
                continue
            known = self.gateway.streams.get(status.sid)
            named = known is not None and (all_calls or known.call_id in self.db.calls)
            streams.append(
                OpenStream(
                    stream=StreamId(status.sid),
                    port=4100,
                    call_id=known.call_id if known is not None and named else None,
                    read=status.read,
                    acknowledged=status.acknowledged,
                    taken=status.taken,
                    attempt=known.attempt if known is not None else 1,
                )
            )
        return Cut(
            seq=self.db.head,
            cursor=self.tree.cursor,
            incarnation=self.incarnation,
            streams=tuple(streams),
            output=self.gateway.output.position,
            pending=self.redo.pending,
            joinable=tuple(call_id for call_id in self.redo.joinable if all_calls or call_id in self.db.calls),
        )

    def _commit_behind(self, number: int, cut: Cut, guest: Guest, workspace: int) -> Task:
        yield from self._commit(number, cut, guest, workspace)
        self.uncommitted -= 1
        self.wake(ON_SETTLED)

    def settle(self) -> Task:
        """Wait until every cut is committed: amid the next life its output would not be what the log shows by then."""
        while self.uncommitted and self.world.rules.settle_before_restore:
            yield ON_SETTLED

    def _commit(self, number: int, cut: Cut, guest: Guest, workspace: int) -> Task:
        """Packs first, then the one transaction that makes the snapshot a checkpoint."""
        snapshot = self.world.store.stage(guest, workspace)
        yield
        if self.world.rules.packs_before_commit:
            snapshot.synced = True
            yield
        if self.queue:
            self.flush()
        self.write((kinds.CHECKPOINT_COMMITTED, cut.incarnation, None, None, cut.committed(self.db, snapshot.name)))
        self.db.fsync()
        self.world.committed()
        if self.cutting == number:
            self.cutting = 0
        self.wake(ON_COMMIT)
        if not snapshot.synced:
            yield
            snapshot.synced = True

    def is_covered(self, call_id: CallId) -> bool:
        """Whether a barrier call may be sent: a checkpoint of this life, or the one it came from, holds its stream."""
        return any(
            holds_barrier(point, call_id)
            and (point.incarnation == self.incarnation or point.number == self.restored_from)
            for point in self.db.checkpoints
        )

    # --- sleep and end -------------------------------------------------------------------------------------------

    def hibernate(self) -> Task:
        """Cut, commit, and delete the sandbox if nothing came in the meantime (RECOVERY 8)."""
        if self.cutting or self.db.status is not kinds.RUNNING:
            return
        number = self._begin_cut()
        self.set_status(SessionStatus.HIBERNATING)
        yield
        cut, guest, workspace = yield from self._cut(number, stay_paused=True)
        yield from self._commit(number, cut, guest, workspace)
        yield
        if self._may_sleep(cut, guest):
            self.set_status(SessionStatus.ASLEEP)
            self.world.count("slept")
            yield
            self.world.destroy(self.sandbox)
            self.sandbox = None
            self.forget_incarnation()
            self.resolved()
        else:
            self.set_status(SessionStatus.RUNNING)
            self.resume(number)

    def _may_sleep(self, cut: Cut, guest: Guest) -> bool:
        """Every thread waits, and every stream waits for something that has not happened.

        "Nothing was resolved since the cut" is not enough: what was resolved just before it is not in the image either.
        """
        if not self.world.rules.sleep_only_if_nothing_waits:
            return all(seq <= cut.seq for seq in self.db.messages.values())
        waiting = all(
            stream.call_id is not None
            and stream.taken == 0
            and self.db.calls[stream.call_id].ask.kind == "receive"
            and self.db.calls[stream.call_id].state is CallState.INTENDED
            for stream in cut.streams
        )
        blocked = bool(cut.streams) and guest.agent.blocked(guest.streams)
        return waiting and blocked and self.db.free_message() is None

    def wake_up(self) -> None:
        """A message came for a session that sleeps."""
        if not self.control.busy and self.sandbox is None:
            self.control.add(self.world.recovery.recover(self))

    def finish(self, code: int) -> Task:
        """The agent ended: its status is committed before init may go (RECOVERY 11)."""
        rules = self.world.rules
        while not self.runs:
            yield ON_STATUS_CHANGE
        rest = self.gateway.output.finish()
        rows: list[Row] = []
        if rest.differs_at is not None and rules.missing_output_counts:
            rows.append((kinds.OUTPUT, self.incarnation, None, None, (rest.differs_at, b"")))
        rows.append((kinds.AGENT_EXITED, self.incarnation, None, None, code))
        rows.append((kinds.SESSION_STATUS, self.incarnation, None, None, SessionStatus.SUCCEEDED))
        if not rules.exit_commits_before_telling:
            self.world.witness.told_exit(self, code, 0)
            yield
        ended = self.append(*rows)
        if rules.fsync_before_telling:
            self.db.fsync()
        if rules.exit_commits_before_telling:
            self.world.witness.told_exit(self, code, ended)
        yield
        self.send("EXIT_ACK")
        yield
        self.world.destroy(self.sandbox)

    def resolved(self) -> None:
        """A message was written, by whomever."""
        self.wake(ON_RESOLVED)
        if self.db.status is kinds.WAKING:
            self.wake_up()


def show(value: object) -> str:
    """A value of a row or a frame, short enough for a trace."""
    if isinstance(value, Checkpoint):
        streams = [(s.stream, s.call_id, s.read, s.acknowledged, s.taken) for s in value.open_streams]
        return f"seq {value.seq} streams {streams} pending {value.pending_redo} joinable {value.joinable}"
    if isinstance(value, Incarnation):
        return f"from {value.point}, pending {value.pending} joinable {value.joinable} attached {set(value.attached)}"
    if isinstance(value, tuple):
        return " ".join(show(item) for item in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if isinstance(value, Ask):
        return f"{value.kind}#{value.index}"
    if isinstance(value, bytes):
        return repr(value[-12:])
    return "" if value is None or isinstance(value, list) else str(value)


_WITH_SANDBOX = frozenset(
    {
        SessionStatus.CREATED,
        SessionStatus.RUNNING,
        SessionStatus.WAITING,
        SessionStatus.HIBERNATING,
        SessionStatus.WAKING,
        SessionStatus.RECOVERING,
    }
)
