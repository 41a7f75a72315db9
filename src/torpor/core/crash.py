"""Named places where a test kills this process, as `kill -9` would; outside of tests a call costs one look-
up.

TORPOR_CRASH_POINT=name kills at the first pass, name:K at the K-th. A name says what is already done.
"""

import os
import signal
from collections import Counter

CRASH_POINTS: dict[str, str] = {
    "call.intended": "a call under a budget, or for Torpor itself, never sent: the restored or adopted stream sends it",
    "call.sent": "a sent call that the upstream may never have seen: torn, and sent as the next attempt",
    "call.retried": "a call that the provider refused for now: torn, and sent as the next attempt",
    "call.received": "part of an answer, written and not delivered: torn, and sent as the next attempt",
    "blob.stored": "an object that no row names: the session's next owner deletes it, or puts it again",
    "chunks.dropped": "an answer, and some of its chunk rows, which nobody reads: the next owner drops the rest",
    "redaction.stored": "everything as it was, and objects with masks that no row names",
    "redaction.committed": "masked rows, and the old bytes in objects, the WAL and the search index",
    "session.forgotten": "objects and the directory of a session that is gone",
    "call.completed": "a whole answer that was not delivered: delivered from the log",
    "waitpoint.created": "a call that is intended and held: its stream finds the waitpoint again, nothing was sent",
    "waitpoint.resolved": "a resolution that nobody was told of: who waited asks again when a node runs it",
    "message.received": "a message that nobody was told of: who waited looks again when a node runs it",
    "call.delivered": "a stream whose end is logged and that init still knows: the next node lets it go",
    "checkpoint.cut": "a sandbox that waits at the barrier; the next HELLO ends it",
    "checkpoint.paused": "a paused sandbox with its mark; the next node resumes it",
    "checkpoint.imaged": "a paused sandbox with its mark, and an image in memory that nobody names",
    "checkpoint.resumed": "an image in memory that nobody names",
    "checkpoint.skipped": "a turn without a checkpoint: what was answered since the last one comes from the log",
    "checkpoint.overtaken": "two images in memory that nobody names, one of them said to be dropped",
    "checkpoint.stored": "a whole snapshot that no checkpoint names",
    "checkpoint.committed": "a checkpoint; its image is still staged in memory",
    "retention.forgotten": "snapshots that no row names: garbage for a collection",
    "collect.condemned": "a list of garbage that no save shares any more; the next collection goes on from it",
    "collect.manifests_deleted": "packs on that list, which no manifest names; the next collection deletes them",
    "collect.pack_deleted": "the same, with some packs gone",
    "collect.swept": "a list of what is gone; the next collection removes it",
    "divergence.failed": "a session that failed by its policy, and its sandbox; the next sweep kills it",
    "child.created": "a session that nobody runs: the parent's call, carried out again, finds it by its id",
    "child.seeded": "the same, with its workspace",
    "memory.exceeded": "a sandbox that is too large, or was killed for it: adopted or restored, it comes to that again",
    "restart.decided": "a sandbox whose agent failed and is to begin again: the next node goes on with that",
    "exit.committed": "an ended session whose sandbox is still there; the next sweep kills it",
    "hibernate.begun": "a session on its way to sleep, whose sandbox runs: adopted",
    "session.asleep": "a paused sandbox of a session that sleeps; the next node kills it and restores",
    "hibernate.freed": "a session that sleeps; a node wakes it when it is due",
    "wake.begun": "a session that wakes; the next node climbs the ladder for it",
    "fork.stored": "manifests that no row names, and no child",
    "fork.committed": "all children of a fork, asleep; nobody was told of them",
    "fork.joined": "a parent's whole answer in its child's log, which was not delivered: delivered from there",
    "rewind.freed": "a session without a sandbox, as it was: it is restored where it would have been",
    "rewind.committed": "a session that was taken back, asleep; nobody was told of it",
    "keys.master_made": "a master key that wraps nothing: the next start takes it",
    "keys.next_made": "a next master key that wraps nothing: the next rotation removes it",
    "keys.rewrapped": "keys wrapped by the next master key, which still has its other name: it is used from there",
    "keys.rotated": "the new master key in its place; old rows may be in the WAL",
    "backend.partial_created": "an empty partial file, invisible, removed when the store is opened again",
    "backend.partial_written": "a partial file with bytes, invisible, removed when the store is opened again",
    "backend.linked": "a whole object that nobody was told of, and its partial name",
    "store.probe_created": "the object that a store was tried with, which nothing refers to",
    "snapshot.pack_written": "a pack that no manifest names",
    "snapshot.packs_durable": "packs that no manifest names",
    "repack.stored": "a repacked snapshot that no row names; the old ones are all there",
    "repack.moved": "some rows name repacked snapshots, others the old ones: all are whole",
    "import.stored": "a snapshot that no row names, and a directory that the session's next import removes",
    "import.committed": "a session with one checkpoint, and the directory that its file was unpacked into",
    "snapshot.manifest_written": "a whole snapshot that no checkpoint names",
}

_passes: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Die here if the environment says so."""
    wanted = os.environ.get("TORPOR_CRASH_POINT")
    if wanted is None:
        return
    if name not in CRASH_POINTS:
        raise ValueError(f"crash point {name!r} is not registered")
    target, _, at_pass = wanted.partition(":")
    if target == name:
        _passes[name] += 1
        if _passes[name] == int(at_pass or "1"):
            os.kill(os.getpid(), signal.SIGKILL)
