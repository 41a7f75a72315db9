"""The list of what a collector is about to delete: one object, there while a sweep is under way.

Why it is needed, and read, is in docs/collecting.md.
"""

from collections.abc import Sequence

from torpor.core.errors import Damaged, MachineUnfit, NotFound
from torpor.snapshots.backend import Backend

_KEY = "condemned/objects"


def read_condemned(backend: Backend) -> frozenset[str]:
    """Keys that nobody may come to need any more. Read it with a lease in hand, and share nothing that is on it."""
    try:
        return frozenset(backend.get(_KEY).decode().split("\n"))
    except NotFound:
        return frozenset()


def write_condemned(backend: Backend, keys: Sequence[str]) -> None:
    """Make the list, or as much of it as there is space for: on a full disk a short one makes room for the next.

    Raises:
        MachineUnfit: no_space, not even for one key.
    """
    while keys:
        try:
            backend.put(_KEY, "\n".join(keys).encode())
        except MachineUnfit as full:
            if full.code != "no_space" or len(keys) == 1:
                raise
            keys = keys[: len(keys) // 2]
        else:
            return


def is_condemned(key: str) -> Damaged:
    """Why a save does not refer to a pack that is there."""
    return Damaged(
        "snapshot_condemned",
        f"cannot refer to {key}: a collection that is under way has it on its list",
        hint="What checkpoints need is taken off it before anything is deleted: then it can be referred to again.",
    )


def delete_condemned(backend: Backend) -> None:
    backend.delete(_KEY)
