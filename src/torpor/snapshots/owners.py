"""Whose rows name what is in a store: an object for each tenant that ever saved there.

What no row of its own database names is garbage to a collector. In a store that two databases share, that would be the
other one's snapshots; so it asks first.
"""

from torpor.core.errors import Conflict
from torpor.core.ids import KeyId
from torpor.snapshots.backend import Backend

_PREFIX = "owners/"


class Signature:
    """Says that a tenant saves in a store: made within the lease of a save, and durable before its first object is.

    Not before: who only reads, or adopts a living sandbox, must not need a store that can be written to.
    """

    def __init__(self, backend: Backend, tenant_id: KeyId) -> None:
        self._backend = backend
        self._key = _PREFIX + tenant_id
        self._is_there = False

    def make(self) -> None:
        """Once; done already, by this process or another, is fine.

        Raises:
            MachineUnfit: no_space, storage_failed, storage_unreachable. The next time it is tried again.
        """
        if not self._is_there:
            if not self._backend.exists(self._key):
                self._backend.put(self._key, b"")
            self._is_there = True


def check_alone(backend: Backend, tenant_id: KeyId | None) -> None:
    """Raises Conflict: `store_shared`, another tenant saves here too."""
    others = [key for key in backend.list(_PREFIX) if key != f"{_PREFIX}{tenant_id}"]
    if others:
        raise Conflict(
            "store_shared",
            f"cannot collect: {len(others)} other TORPOR_HOMEs keep snapshots in this store",
            hint=f"Give each its own store or prefix. If one is gone for good, delete the object {others[0]}.",
        )
