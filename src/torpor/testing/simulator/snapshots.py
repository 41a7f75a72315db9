"""The snapshot store that outlives every process: what is staged, and what is durable."""

from __future__ import annotations

from torpor.testing.simulator.guest import Guest


class Snapshot:
    """One image with the workspace of its cut. Its packs survive a power cut only when synced."""

    __slots__ = ("damaged", "guest", "name", "synced", "workspace")

    def __init__(self, name: str, guest: Guest | None, workspace: int) -> None:
        self.name = name
        self.guest = guest
        self.workspace = workspace
        self.synced = False
        self.damaged = False


class SnapshotStore:
    """Snapshots by name; those that no checkpoint names are garbage."""

    __slots__ = ("snapshots",)

    def __init__(self) -> None:
        self.snapshots: dict[str, Snapshot] = {}

    def stage(self, guest: Guest | None, workspace: int) -> Snapshot:
        snapshot = Snapshot(f"snp_{len(self.snapshots) + 1}", guest, workspace)
        self.snapshots[snapshot.name] = snapshot
        return snapshot

    def lose_unsynced(self) -> None:
        """A power cut: packs that were not fsynced have holes, which their hashes show."""
        for snapshot in self.snapshots.values():
            if not snapshot.synced:
                snapshot.damaged = True
