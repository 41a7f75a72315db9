"""What may happen to a simulated session: kills of every kind, people, damage. Each returns whether it could happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torpor.core.session import SessionStatus
from torpor.testing.simulator import kinds
from torpor.testing.simulator.gateway import ON_BUDGET
from torpor.testing.simulator.store import Row
from torpor.testing.simulator.tasks import Task

if TYPE_CHECKING:
    from torpor.testing.simulator.node import Node
    from torpor.testing.simulator.world import World


def kill_node(world: World) -> bool:
    if world.node is None:
        return False
    world.stop_node(world.node)
    return True


def kill_sandbox(world: World) -> bool:
    if world.sandbox is None or not world.sandbox.alive:
        return False
    world.sandbox.alive = False
    world.count_if_held("sandbox")
    return True


def kill_both(world: World) -> bool:
    return kill_node(world) | kill_sandbox(world)


def power_cut(world: World) -> bool:
    kill_both(world)
    for other in world.silent:
        world.destroy(other.sandbox)
        world.witness.node_stopped()
    world.silent.clear()
    kept = world.db.synced + int(world.random() * (len(world.db.transactions) - world.db.synced + 1))
    world.db.lose(kept)
    world.store.lose_unsynced()
    world.people.clear()
    for message in range(1, world.sent_messages + 1):
        if message not in world.witness.confirmed:
            world.people.add(say(world, message))
    world.boot_id = f"boot-{world.steps}"
    return True


def silence_node(world: World) -> bool:
    """The owner stops answering; who replaces it is on another machine in a cluster, else on this one."""
    node = world.node
    if node is None or node.token == 0:
        return False
    world.node = None
    world.silent.append(node)
    if world.plan.cluster:
        if world.sandbox is not None and world.rules.watchdog_pauses:
            world.sandbox.stopped = True
        world.sandbox = None
    return True


def send_message(world: World) -> bool:
    if world.sent_messages == world.plan.messages:
        return False
    world.sent_messages += 1
    world.people.add(say(world, world.sent_messages))
    return True


def say(world: World, message: int) -> Task:
    """A person's message, or a resolved waitpoint: written with its wake request in one transaction."""
    rules = world.rules
    if message in world.db.messages:
        # A power cut lost the confirmation, not the message; saying it again is the same message.
        world.witness.told_message(message, world.db.synced)
        return
    rows: list[Row] = [(kinds.WAITPOINT_RESOLVED, 0, None, None, message)]
    if world.db.status is kinds.ASLEEP and rules.wake_with_the_message:
        rows.append((kinds.SESSION_STATUS, 0, None, None, SessionStatus.WAKING))
    written = world.db.append(None, *rows)
    if rules.fsync_before_telling:
        world.db.fsync()
    yield
    world.witness.told_message(message, written)
    if world.node is not None:
        world.node.resolved()


def raise_budget(world: World) -> bool:
    if world.db.limit is None or world.db.ended:
        return False
    world.people.add(_raise(world))
    return True


def _raise(world: World) -> Task:
    """A person raises the budget: the limit, every held call's release and the status are one transaction."""
    rules, db = world.rules, world.db
    if db.limit is None or db.ended:
        return
    rows: list[Row] = [(kinds.BUDGET_CHANGED, 0, None, None, db.limit + 1 + int(world.random() * 3))]
    rows += [(kinds.WAITPOINT_RESOLVED, 0, call_id, None, None) for call_id in db.held()]
    if db.status is kinds.WAITING:
        rows.append((kinds.SESSION_STATUS, 0, None, None, SessionStatus.RUNNING))
    written = db.append(None, *rows)
    if rules.fsync_before_telling:
        db.fsync()
    yield
    world.witness.told_raise(written)
    if world.node is not None and rules.raise_wakes_held_calls:
        world.node.wake(ON_BUDGET)


def checkpoint(world: World) -> bool:
    node = world.node
    if node is None or not node.serving:
        return False
    node.life.add(node.checkpoint())
    return True


def hibernate(world: World) -> bool:
    node = world.node
    if node is None or not node.serving:
        return False
    node.life.add(node.hibernate())
    return True


def rewind(world: World) -> bool:
    """A person goes back to some checkpoint of the present timeline."""
    node = world.node
    if node is None or not node.serving or not node.runs:
        return False
    points = [point for point in world.db.checkpoints if world.db.timeline.holds(point.seq)]
    point = points[int(world.random() * len(points))]
    if world.store.snapshots[point.snapshot_id].damaged:
        return False
    node.control.clear()
    node.control.add(world.recovery.rewind(node, point))
    return True


def damage(world: World) -> bool:
    """A bit flips in the newest snapshot, never in the workspace at the start: that one has copies."""
    if len(world.db.checkpoints) < 2:
        return False
    snapshot = world.store.snapshots[world.db.checkpoints[-1].snapshot_id]
    snapshot.damaged = True
    world.damaged.add(snapshot.name)
    return True


def decide_unknown(world: World, node: Node) -> bool:
    """A person decides about an effect of unknown outcome: it did not happen."""
    for row in world.db.calls.values():
        if row.state is kinds.UNKNOWN and node.serving:
            node.append((kinds.CALL_FAILED, node.incarnation, row.call_id, None, None))
            world.db.fsync()
            node.wake(row.call_id)
            world.count("unknown, decided by a person")
            return True
    return False


HAPPENINGS: dict[str, Callable[[World], bool]] = {
    "kill node": kill_node,
    "kill sandbox": kill_sandbox,
    "kill both": kill_both,
    "power cut": power_cut,
    "silence node": silence_node,
    "message": send_message,
    "raise budget": raise_budget,
    "checkpoint": checkpoint,
    "hibernate": hibernate,
    "rewind": rewind,
    "damage": damage,
}
