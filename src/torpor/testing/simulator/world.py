"""One simulated session with everything around it, and the loop that lets one thing happen at a time."""

from __future__ import annotations

from collections import Counter
from random import Random

from torpor.core.errors import TorporError
from torpor.testing.simulator import kinds
from torpor.testing.simulator.faults import HAPPENINGS, decide_unknown, hibernate, raise_budget, send_message
from torpor.testing.simulator.guest import Guest, Sandbox
from torpor.testing.simulator.node import Node
from torpor.testing.simulator.recovery import Recovery
from torpor.testing.simulator.rules import Rules
from torpor.testing.simulator.scheduler import SOON, Plan, kill
from torpor.testing.simulator.snapshots import SnapshotStore
from torpor.testing.simulator.store import Cut, Database
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

    def __init__(
        self,
        seed: int,
        rules: Rules,
        *,
        trace: list[str] | None = None,
        stats: Counter[str] | None = None,
        checked: Counter[int] | None = None,
    ) -> None:
        self._rng = Random(seed)
        self.random = self._rng.random
        self.plan = Plan(seed, self._rng)
        self.rules = rules
        self.trace = trace
        self.stats: Counter[str] = stats if stats is not None else Counter()
        self.steps = 0
        self._nonce = 0
        self.boot_id = "boot-1"
        self.db = Database(rules, self.plan.limit)
        self.store = SnapshotStore()
        self.witness = Witness(self, checked if checked is not None else Counter())
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
        random, db, happenings = self.random, self.db, self.plan.happenings
        while not db.ended or (self.sandbox is not None and self.sandbox.alive):
            self.steps += 1
            if happenings and happenings[-1][0] <= self.steps:
                self._happen(happenings.pop()[1])
                continue
            node, sandbox, chance = self.node, self.sandbox, random()
            if node is None:
                moved = sandbox is not None and chance > 0.1 and sandbox.step()
                if not moved:
                    self.start_node()
                    continue
            elif chance > 0.9 and self.silent and self._progress_of_silent():
                continue
            elif sandbox is None:
                moved = node.step()
            elif chance < 0.5:
                moved = sandbox.step() or node.step()
            else:
                moved = node.step() or sandbox.step()
            if not moved and not self._progress_of_others() and not self._unstick():
                raise Violation(5, "nothing moves any more, and the session has not ended")
            if self.steps > STEPS_MAX:
                raise Violation(5, f"the session has not ended after {STEPS_MAX} steps")

    def goes_on(self) -> bool:
        """Count one more step of whoever moves now; False when something happens at it."""
        self.steps += 1
        happenings = self.plan.happenings
        return not happenings or happenings[-1][0] > self.steps

    def _progress_of_silent(self) -> bool:
        """In a cluster a silent owner may go on, not knowing that it was replaced."""
        if not self.plan.cluster:
            return False
        other = self.silent[-1]
        return other.step() or (other.sandbox is not None and other.sandbox.step())

    def _progress_of_others(self) -> bool:
        if self.silent and self._progress_of_silent():
            return True
        return bool(self.people.ready) and self.people.step(self.random, self.goes_on)

    def _happen(self, what: str) -> None:
        if self.trace is not None:
            self.note(f"=== {what}")
        if HAPPENINGS[what](self):
            self.stats[what] += 1
            self.witness.after_kill()

    def _unstick(self) -> bool:
        """Everything waits for somebody outside: let the world do what it would do in time."""
        if self.node is None:
            self.start_node()
        elif self.db.limit is not None and self.db.held() and raise_budget(self):
            pass
        elif self.needs_person:
            self.needs_person = False
            self.below_floor_allowed = True
            self.node.wake("person")
        elif decide_unknown(self, self.node):
            return True
        elif self.plan.sleepy and self.db.status is kinds.RUNNING and hibernate(self):
            self.plan.sleepy -= 1
        elif self.sent_messages < self.plan.messages:
            send_message(self)
        elif self.plan.cluster and self.silent:
            self.silent.pop()
        else:
            return False
        return True

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
            self.count_if_held("node")
        else:
            self.silent.remove(node)
            if self.plan.cluster:
                self.destroy(node.sandbox)

    def kill_silent_owner(self) -> None:
        """SIGKILL through its pidfd."""
        self.silent.pop()
        self.witness.node_stopped()
        self.count_if_held("node")

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
        point = Cut(seq=self.db.head).committed(self.db, snapshot, has_memory=False)
        node.write((kinds.CHECKPOINT_COMMITTED, 0, None, None, point))
        self.db.fsync()

    def next_nonce(self) -> int:
        self._nonce += 1
        return self._nonce

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.random() < probability

    def committed(self) -> None:
        """A checkpoint was committed: from now on a kill takes the session back to it."""
        self.stats["checkpoints"] += 1
        plan = self.plan
        if plan.kills_after_commit and self.random() < 0.6:
            plan.kills_after_commit -= 1
            self._add_kill()

    def held(self) -> None:
        """The budget made the session wait: it may die now, at every step until somebody raises it."""
        self.stats["held"] += 1
        plan = self.plan
        if plan.kills_while_held and self.random() < 0.6:
            plan.kills_while_held -= 1
            self._add_kill()

    def _add_kill(self) -> None:
        happenings = self.plan.happenings
        happenings.append((self.steps + int(self.random() * SOON), kill(self.random)))
        happenings.sort(reverse=True)

    def count_if_held(self, died: str) -> None:
        if self.db.limit is not None and self.db.held():
            self.stats[f"{died} died while a call was held"] += 1

    def count(self, what: str) -> None:
        self.stats[what] += 1

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.steps:4}  {text}")
