"""Collects garbage: mark, plan, sweep. Order, crash points and why it is safe are in docs/collecting.md.

It knows keys and bytes. Which manifests are roots it is told by its caller, each time anew; and it is one collector of
a store at a time, which holds the lease that is `alone`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, Damaged
from torpor.core.ids import KeyId, SnapshotId
from torpor.snapshots.backend import Backend
from torpor.snapshots.condemned import delete_condemned, read_condemned, write_condemned
from torpor.snapshots.garbage import Listing, SweepPlan, plan_sweep, staying, still_garbage
from torpor.snapshots.lease import Lease
from torpor.snapshots.manifest import load_head
from torpor.snapshots.owners import check_alone

GRACE_SECONDS = 3600.0
WAIT_SECONDS = 120.0
"""For how long a collector waits for saves and readers that are under way."""

_THREADS = 16
_DELETED_AT_ONCE = 256

Progress = Callable[[str, int, int], None]
"""Told of each step: what is done, how much of it, of how much."""


@dataclass(frozen=True, slots=True)
class Root:
    """What a row says of a manifest: its digest (hex), and what people call the checkpoint."""

    manifest_digest: str
    told: str


class Roots(Protocol):
    """What rows name. Both methods block."""

    def manifests(self) -> Mapping[str, Root]:
        """By the manifest's key."""
        ...

    def sync(self) -> None:
        """Make durable what `manifests` said last: rows that were deleted must not come back."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What a sweep deleted."""

    manifests: int = 0
    packs: int = 0
    stored_bytes: int = 0


class Collector:
    """One collection of one store."""

    def __init__(
        self,
        backend: Backend,
        roots: Roots,
        alone: Lease,
        *,
        tenant_id: KeyId | None = None,
        grace_seconds: float = GRACE_SECONDS,
        wait_seconds: float = WAIT_SECONDS,
        progress: Progress = lambda _what, _done, _of: None,
    ) -> None:
        self._backend = backend
        self._roots = roots
        self._alone = alone
        self._tenant_id = tenant_id
        self._grace_seconds = grace_seconds
        self._wait_seconds = wait_seconds
        self._progress = progress
        self._named: dict[str, frozenset[str]] = {}

    def plan(self) -> SweepPlan:
        """What a sweep would delete now.

        Raises:
            Conflict: `store_shared`.
            Damaged: `collect_refused`, the manifest of a root can't be read.
        """
        check_alone(self._backend, self._tenant_id)
        listing = self.list_objects()
        roots = self._roots.manifests()
        self.mark(staying(listing, roots, self._grace_seconds), roots)
        return plan_sweep(listing, roots, self._named, self._grace_seconds)

    def unreadable(self, roots: Mapping[str, Root]) -> dict[str, Damaged]:
        """Manifests of roots that are missing or not what was written, with the reason."""
        return {key: found for key, root in roots.items() if isinstance(found := self._read(key, root), Damaged)}

    def list_objects(self) -> Listing:
        """Ages are told by an instant before the listing, so that what is listed late is too young."""
        now_ns = self._backend.now_ns()
        return Listing.of(self._backend.entries(""), now_ns)

    def mark(self, keys: Iterable[str], roots: Mapping[str, Root]) -> Mapping[str, frozenset[str]]:
        """Learn which packs these manifests name; those that are known are not read again, since they never change.

        What a root's head says is true, since the row has the manifest's digest.

        Raises:
            Damaged: `collect_refused`.
        """
        unread = [key for key in keys if key not in self._named]
        unreadable: dict[str, Damaged] = {}

        def read(key: str) -> frozenset[str] | Damaged:
            return self._read(key, roots.get(key))

        with ThreadPoolExecutor(_THREADS, thread_name_prefix="mark") as threads:
            for done, (key, found) in enumerate(zip(unread, threads.map(read, unread), strict=True), 1):
                if not isinstance(found, Damaged):
                    self._named[key] = found
                elif key not in roots and found.code == "snapshot_object_missing":
                    self._named[key] = frozenset()  # Listed late: it is gone.
                else:
                    unreadable[key] = found
                self._progress("reading manifests", done, len(unread))
        if unreadable:
            raise _refused(unreadable, roots)
        return self._named

    def condemn(self, plan: SweepPlan) -> None:
        """Put on the list what is going to be deleted: from here on no save shares it."""
        self._roots.sync()
        write_condemned(self._backend, [entry.key for entry in plan.entries])
        crash_point("collect.condemned")

    def sweep(self) -> Swept:
        """Delete what is on the list of this collector, or of one that died, and is still needed by nobody.

        Raises:
            Conflict: `collect_waited`, somebody is under way for too long; `store_shared`, `lease_lost`.
            Damaged: `collect_refused`. After any of them the list stays.
        """
        condemned = read_condemned(self._backend)
        if not condemned:
            return Swept()
        self._roots.sync()
        self._wait_for_others()
        check_alone(self._backend, self._tenant_id)  # Once more: who came since has no row here.
        roots = self._roots.manifests()
        entries = {entry.key: entry for entry in self._backend.entries("")}
        there = {key for key in entries if key.startswith("manifests/")}
        named = self.mark((there - condemned) | roots.keys(), roots)
        manifests, others = still_garbage(sorted(condemned), roots, named)
        self._delete(manifests, "deleting manifests", "")
        crash_point("collect.manifests_deleted")
        self._delete(others, "deleting packs", "collect.pack_deleted")
        crash_point("collect.swept")
        delete_condemned(self._backend)
        gone = [entries[key] for key in (*manifests, *others) if key in entries]
        return Swept(
            manifests=sum(entry.key in there for entry in gone),
            packs=sum(entry.key.startswith("packs/") for entry in gone),
            stored_bytes=sum(entry.stored_bytes for entry in gone),
        )

    def _read(self, key: str, root: Root | None) -> frozenset[str] | Damaged:
        snapshot_id = SnapshotId(key.removeprefix("manifests/"))
        try:
            return frozenset(load_head(self._backend, snapshot_id, root and root.manifest_digest).pack_names)
        except Damaged as error:
            return error

    def _wait_for_others(self) -> None:
        """Until everybody has ended who may not have seen the list."""
        leases = self._backend.leases
        leases.settle()
        left = leases.wait(leases.held(), self._wait_seconds)
        if left:
            raise Conflict(
                "collect_waited",
                f"cannot collect yet: {len(left)} saves or readers were under way for {self._wait_seconds:.0f} s",
                hint="Nothing was deleted; the next `torpor collect` goes on from here.",
            )

    def _delete(self, keys: Sequence[str], what: str, first: str) -> None:
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            some = keys[start : start + _DELETED_AT_ONCE]
            self._alone.check()
            self._backend.delete_many(some)
            if first and not start:
                crash_point(first)
            self._progress(what, start + len(some), len(keys))


def _refused(unreadable: Mapping[str, Damaged], roots: Mapping[str, Root]) -> Damaged:
    key, first = next(iter(unreadable.items()))
    told = roots[key].told if key in roots else key
    others = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
    return Damaged(
        "collect_refused",
        f"cannot collect: nobody knows what {told} needs{others}: {first}",
        hint="`torpor verify` lists them; mend the store, or `torpor collect --forget-damaged` gives them up.",
    )
