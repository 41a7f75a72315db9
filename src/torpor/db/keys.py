"""Rows of wrapped keys: the tenant's secret, and one key a session, which comes and goes with the session's row.

Knows no key: what is in a row is made and opened above. All rows are wrapped by one master key, and change it together.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torpor.core.errors import Conflict
from torpor.core.ids import KeyId, SessionId
from torpor.db.database import Row, Transaction
from torpor.db.fence import refusal

TENANT = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """Attributes:
    whose: the tenant's id, or the session's.
    master_id: of the key that wraps it.
    """

    whose: str
    key_id: KeyId
    master_id: KeyId
    wrapped: bytes


Rewrap = Callable[[WrappedKey], WrappedKey]
"""The same key, wrapped by another master."""


def tenant(tx: Transaction) -> WrappedKey | None:
    row = tx.one("key/find_tenant", tenant_id=TENANT)
    return None if row is None else _key_of(row, "tenant_id")


def add_tenant(tx: Transaction, key: WrappedKey) -> WrappedKey:
    """Keep the tenant's secret, and return the one that is kept: the first wins. Commit it durably."""
    tx.run(
        "key/insert_tenant_if_absent",
        tenant_id=TENANT,
        key_id=key.key_id,
        master_id=key.master_id,
        wrapped=key.wrapped,
    )
    kept = tenant(tx)
    assert kept is not None
    return kept


def add_session(tx: Transaction, *, session_id: SessionId, owner_token: int, key: WrappedKey) -> None:
    """Give a session its key, in the transaction that makes the session.

    Raises:
        Conflict: `master_key_changed`.
    """
    added = tx.run(
        "key/insert_of_session_fenced",
        tenant_id=TENANT,
        session_id=session_id,
        owner_token=owner_token,
        key_id=key.key_id,
        master_id=key.master_id,
        wrapped=key.wrapped,
    )
    if not added:
        raise refusal(tx, session_id, owner_token, _changed())


def of_session(tx: Transaction, session_id: SessionId) -> WrappedKey | None:
    row = tx.one("key/find_of_session", session_id=session_id)
    return None if row is None else _key_of(row, "session_id")


def list_sessions(tx: Transaction) -> list[WrappedKey]:
    return [_key_of(row, "session_id") for row in tx.all("key/list_of_sessions")]


def rewrap_all(tx: Transaction, seen_master_id: KeyId, rewrap: Rewrap) -> int:
    """Change the master key of every row; gives how many rows that were. Commit it durably.

    Raises:
        Conflict: `master_key_changed`, they are not wrapped by the one that the caller saw.
    """
    found = tenant(tx)
    if found is None:
        return 0
    after = rewrap(found)
    changed = tx.run(
        "key/rewrap_tenant_if_unchanged",
        tenant_id=TENANT,
        master_id=after.master_id,
        wrapped=after.wrapped,
        seen_master_id=seen_master_id,
    )
    rows = list_sessions(tx)
    for row in rows:
        after = rewrap(row)
        changed += tx.run(
            "key/rewrap_of_session_if_unchanged",
            session_id=row.whose,
            master_id=after.master_id,
            wrapped=after.wrapped,
            seen_master_id=seen_master_id,
        )
    if changed != 1 + len(rows):
        raise _changed()
    return changed


def _key_of(row: Row, whose: str) -> WrappedKey:
    return WrappedKey(
        whose=row[whose],
        key_id=KeyId(row["key_id"]),
        master_id=KeyId(row["master_id"]),
        wrapped=bytes(row["wrapped"]),
    )


def _changed() -> Conflict:
    return Conflict(
        "master_key_changed", "cannot wrap a key: the master key was changed meanwhile", hint="Do it once more."
    )
