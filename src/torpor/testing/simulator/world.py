"""One simulated session with everything around it, and the loop that lets one thing happen at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Hashable
from random import Random

from torpor.core.call import CallState
from torpor.core.errors import TorporError
from torpor.core.events import Kind
from torpor.core.session import SessionStatus
from torpor.testing.simulator.guest import Guest, Sandbox
from torpor.testing.simulator.node import Node, make_checkpoint
from torpor.testing.simulator.recovery import Recovery
from torpor.testing.simulator.rules import Rules
from torpor.testing.simulator.scheduler import Plan
from torpor.testing.simulator.store import MESSAGE_ACCEPTED, Database, SnapshotStore
from torpor.testing.simulator.tasks import TaskSet
from torpor.testing.simulator.upstream import Upstream
from torpor.testing.simulator.witness import Violation, Witness

STEPS_MAX = 4000


class World:
    """All state of one schedule.

    Attributes:
        node: the process that drives the session, or is about to; None when none lives.
        silent: processes that stopped answering and were replaced, or will be; in a cluster they may run on.
        sandboxes: every sandbox so far; the last one is the newest.
    """

    __slots__ = (
        "_nonce",
        "_rng",
        "below_floor_allowed",
        "boot_id",
        "damaged",
        "db",
        "names",
        "needs_person",
        "node",
        "people",
        "plan",
        "random",
        "recovery",
        "rules",
        "sandbox",
        "sandboxes",
        "sent_messages",
        "silent",
        "stats",
        "steps",
        "store",
        "trace",
        "upstream",
        "witness",
    )

    def __init__(self, seed: int, rules: Rules, *, trace: list[str] | None = None) -> None:
        self._rng = Random(seed)
        self.random = self._rng.random
        self.plan = Plan(seed, self._rng)
        self.rules = rules
        self.trace = trace
        self.stats: Counter[str] = Counter()
        self.steps = 0
        self._nonce = 0
        self.boot_id = "boot-1"
        self.db = Database(rules)
        self.store = SnapshotStore()
        self.witness = Witness(self)
        self.upstream = Upstream(self)
        self.recovery = Recovery(self)
        self.people = TaskSet()
        self.sandbox: Sandbox | None = None
        self.sandboxes: list[Sandbox] = []
        self.node: Node | None = None
        self.silent: list[Node] = []
        self.names = 0
        self.sent_messages = 0
        self.needs_person = False
        self.below_floor_allowed = False
        self.damaged: set[str] = set()

    # --- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Let the schedule happen, then have it judged.

        Raises:
            Violation: an invariant does not hold.
        """
        try:
            self._run()
            self.witness.finish()
        except (TorporError, AssertionError, LookupError, ValueError) as error:
            raise Violation(0, f"the rules contradict each other: {error!r}") from error

    def _run(self) -> None:
        self.start_node()
        happenings = self.plan.happenings
        while not self.db.ended or (self.sandbox is not None and self.sandbox.alive):
            self.steps += 1
            if happenings and happenings[-1][0] <= self.steps:
                self._happen(happenings.pop()[1])
            elif not self._progress() and not self._unstick():
                raise Violation(5, "nothing moves any more, and the session has not ended")
            if self.steps > STEPS_MAX:
                raise Violation(5, f"the session has not ended after {STEPS_MAX} steps")

    def _progress(self) -> bool:
        """One step of anyone, chosen by chance."""
        random = self.random
        chance = random()
        sandbox, node = self.sandbox, self.node
        if node is None and chance < 0.1:
            self.start_node()
            return True
        if chance > 0.9 and self.silent and self._progress_of_silent():
            return True
        if chance < 0.5:
            if sandbox is not None and sandbox.step():
                return True
            if node is not None and node.step():
                return True
        else:
            if node is not None and node.step():
                return True
            if sandbox is not None and sandbox.step():
                return True
        return self._progress_of_others()

    def _progress_of_silent(self) -> bool:
        """In a cluster a silent owner may go on, not knowing that it was replaced."""
        if not self.plan.cluster:
            return False
        other = self.silent[-1]
        return other.step() or (other.sandbox is not None and other.sandbox.step())

    def _progress_of_others(self) -> bool:
        if self.silent and self._progress_of_silent():
            return True
        return bool(self.people.ready) and self.people.step(self.random)

    def _unstick(self) -> bool:
        """Everything waits for somebody outside: let the world do what it would do in time."""
        if self.node is None:
            self.start_node()
        elif self.needs_person:
            self.needs_person = False
            self.below_floor_allowed = True
            self.node.wake("person")
        elif self._decide_unknown(self.node):
            return True
        elif self.plan.sleepy and self.db.status is SessionStatus.RUNNING and self._hibernate():
            self.plan.sleepy -= 1
        elif self.sent_messages < self.plan.messages:
            self._send_message()
        elif self.plan.cluster and self.silent:
            self.silent.pop()
        else:
            return False
        return True

    # --- what happens ----------------------------------------------------------------------------------------------

    def _happen(self, what: str) -> None:
        if self.trace is not None:
            self.note(f"=== {what}")
        done = _HAPPENINGS[what](self)
        if done is not False:
            self.stats[what] += 1

    def _kill_node(self) -> bool:
        if self.node is None:
            return False
        self.stop_node(self.node)
        return True

    def _kill_sandbox(self) -> bool:
        if self.sandbox is None or not self.sandbox.alive:
            return False
        self.sandbox.alive = False
        return True

    def _kill_both(self) -> bool:
        return self._kill_node() | self._kill_sandbox()

    def _power_cut(self) -> bool:
        self._kill_both()
        for other in self.silent:
            self.destroy(other.sandbox)
            self.witness.node_stopped()
        self.silent.clear()
        kept = self.db.synced + int(self.random() * (len(self.db.transactions) - self.db.synced + 1))
        self.db.lose(kept)
        self.store.lose_unsynced()
        self.people.clear()
        for message in range(1, self.sent_messages + 1):
            if message not in self.witness.confirmed:
                self.people.add(self._say(message))
        self.boot_id = f"boot-{self.steps}"
        return True

    def _silence_node(self) -> bool:
        """The owner stops answering; who replaces it is on another machine in a cluster, else on this one."""
        node = self.node
        if node is None or node.token == 0:
            return False
        self.node = None
        self.silent.append(node)
        if self.plan.cluster:
            if self.sandbox is not None and self.rules.watchdog_pauses:
                self.sandbox.stopped = True
            self.sandbox = None
        return True

    def _send_message(self) -> bool:
        if self.sent_messages == self.plan.messages:
            return False
        self.sent_messages += 1
        self.people.add(self._say(self.sent_messages))
        return True

    def _say(self, message: int) -> Generator[Hashable | None, None, None]:
        """A person's message, or a resolved waitpoint: written with its wake request in one transaction."""
        rules = self.rules
        yield
        if message in self.db.messages:
            # A power cut lost the confirmation, not the message; saying it again is the same message.
            self.witness.told_message(message, self.db.synced)
            return
        rows = [(MESSAGE_ACCEPTED, 0, None, None, message)]
        if self.db.status is SessionStatus.ASLEEP and rules.wake_with_the_message:
            rows.append((Kind.SESSION_STATUS.value, 0, None, None, SessionStatus.WAKING))  # pyright: ignore[reportArgumentType]
        written = self.db.append(None, *rows)
        if rules.fsync_before_telling:
            self.db.fsync()
        yield
        self.witness.told_message(message, written)
        if self.node is not None:
            self.node.resolved()

    def _checkpoint(self) -> bool:
        node = self.node
        if node is None or not node.serving:
            return False
        node.life.add(node.checkpoint())
        return True

    def _hibernate(self) -> bool:
        node = self.node
        if node is None or not node.serving:
            return False
        node.life.add(node.hibernate())
        return True

    def _rewind(self) -> bool:
        """A person goes back to some checkpoint of the present timeline."""
        node = self.node
        if node is None or not node.serving or self.db.status is not SessionStatus.RUNNING:
            return False
        points = [point for point in self.db.checkpoints if self.db.timeline.holds(point.seq)]
        point = points[int(self.random() * len(points))]
        if self.store.snapshots[point.snapshot_id].damaged:
            return False
        node.control.clear()
        node.control.add(self.recovery.rewind(node, point))
        return True

    def _damage(self) -> bool:
        """A bit flips in the newest snapshot, never in the workspace at the start: that one has copies."""
        if len(self.db.checkpoints) < 2:
            return False
        snapshot = self.store.snapshots[self.db.checkpoints[-1].snapshot_id]
        snapshot.damaged = True
        self.damaged.add(snapshot.name)
        return True

    def _decide_unknown(self, node: Node) -> bool:
        """A person decides about an effect of unknown outcome: it did not happen."""
        for row in self.db.calls.values():
            if row.state is CallState.UNKNOWN and node.serving:
                node.append((Kind.CALL_FAILED.value, node.incarnation, row.call_id, None, None))
                self.db.fsync()
                node.wake(row.call_id)
                self.count("unknown, decided by a person")
                return True
        return False

    # --- processes ---------------------------------------------------------------------------------------------------

    def start_node(self) -> None:
        self.names += 1
        self.node = Node(self, self.names)
        self.node.control.add(self.recovery.boot(self.node))

    def live_nodes(self) -> list[Node]:
        return [*self.silent, self.node] if self.node is not None else self.silent

    def stop_node(self, node: Node) -> None:
        """A process is gone, with all that it had not written."""
        if node is self.node:
            self.node = None
            self.witness.node_stopped()
        else:
            self.silent.remove(node)
            if self.plan.cluster:
                self.destroy(node.sandbox)

    def kill_silent_owner(self) -> None:
        """SIGKILL through its pidfd."""
        self.silent.pop()
        self.witness.node_stopped()

    def got_flock(self, node: Node) -> bool:
        """Whether the lock is to be had; in a cluster: whether the lease ran out."""
        return self.plan.cluster or all(other is node for other in self.live_nodes())

    def sandbox_near(self, node: Node) -> Sandbox | None:
        """The session's sandbox on this node's machine. A silent owner of a cluster is on another one."""
        return self.sandbox if node is self.node else node.sandbox

    def fresh_guest(self) -> Guest:
        return Guest(self.plan.agent())

    def spawn(self, node: Node, sandbox: Sandbox) -> Sandbox:
        self.sandboxes.append(sandbox)
        if node is self.node:
            self.sandbox = sandbox
        else:
            # Its node has been silent and starts it late: the watchdog stops that as well.
            sandbox.stopped = self.rules.watchdog_pauses
        self.witness.spawned(sandbox)
        return sandbox

    def destroy(self, sandbox: Sandbox | None) -> None:
        if sandbox is not None:
            sandbox.alive = False

    def commit_first(self, node: Node, snapshot: str) -> None:
        point = make_checkpoint(number=0, seq=self.db.head, snapshot=snapshot, has_memory=False)
        node.append((Kind.CHECKPOINT_COMMITTED.value, 0, None, None, point))
        self.db.fsync()

    def next_nonce(self) -> int:
        self._nonce += 1
        return self._nonce

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random() < probability

    def count(self, what: str) -> None:
        self.stats[what] += 1

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.steps:4}  {text}")


_HAPPENINGS = {
    "kill node": World._kill_node,
    "kill sandbox": World._kill_sandbox,
    "kill both": World._kill_both,
    "power cut": World._power_cut,
    "silence node": World._silence_node,
    "message": World._send_message,
    "checkpoint": World._checkpoint,
    "hibernate": World._hibernate,
    "rewind": World._rewind,
    "damage": World._damage,
}
