"""Whose rows name what is in a store: an object for each tenant that ever saved there.

What no row of its own database names is garbage to a collector. In a store that two databases share, that would be the
other one's snapshots; so it asks first.
"""

from torpor.core.errors import Conflict
from torpor.core.ids import KeyId
from torpor.snapshots.backend import Backend

_PREFIX = "owners/"


def sign_store(backend: Backend, tenant_id: KeyId) -> None:
    """Say that this tenant saves here; durable before its first object is."""
    if not backend.exists(_PREFIX + tenant_id):
        backend.put(_PREFIX + tenant_id, b"")


def check_alone(backend: Backend, tenant_id: KeyId | None) -> None:
    """Raises Conflict: `store_shared`, another tenant saves here too."""
    others = [key for key in backend.list(_PREFIX) if key != f"{_PREFIX}{tenant_id}"]
    if others:
        raise Conflict(
            "store_shared",
            f"cannot collect: {len(others)} other TORPOR_HOMEs keep snapshots in this store",
            hint=f"Give each its own store or prefix. If one is gone for good, delete the object {others[0]}.",
        )
