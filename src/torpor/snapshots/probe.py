"""Sees for itself that a store keeps the promise of `Backend.put`: an object that exists is never written to again.

Some servers that speak S3 take no notice of `If-None-Match` and answer 200 to the second write: two nodes could
overwrite each other's objects there, and neither would know. So it is tried, with an object of the probe's own.
"""

import secrets

from torpor.core.crash import crash_point
from torpor.core.errors import MachineUnfit
from torpor.snapshots.backend import Backend

_FIRST, _SECOND = b"Torpor wrote this first.", b"This must be refused."


def probe(backend: Backend) -> None:
    """Create an object, create it again with other bytes, which must be refused, and remove it.

    A kill -9 in between leaves a tiny object of the kind `probes`, which nothing refers to.

    Raises:
        MachineUnfit: `storage_unsafe`; and as the backend does.
    """
    key = f"probes/{secrets.token_hex(16)}"
    was_new = backend.put(key, _FIRST)
    crash_point("store.probe_created")
    was_replaced = backend.put(key, _SECOND)
    is_kept = backend.get(key) == _FIRST
    backend.delete(key)
    if backend.exists(key):
        reason = "an object that was deleted is still there"
    elif was_replaced or not is_kept:
        reason = "it let a second write replace an object that existed, so nodes could overwrite each other's snapshots"
    elif not was_new:
        reason = "it refused to create an object that did not exist"
    else:
        return
    raise MachineUnfit(
        "storage_unsafe",
        f"cannot use store {backend.name}: {reason}",
        hint="Use a store that honours `If-None-Match: *` when an object is put, or the local directory.",
    )
