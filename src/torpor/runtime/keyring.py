"""The keys of one TORPOR_HOME while they are in memory: made, opened and rotated, in the order of docs/keys.md.

What the database keeps of them is wrapped by the master key; what leaves here goes into the snapshot store, which
seals with it.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from functools import partial

from torpor.core.crash import crash_point
from torpor.core.errors import Conflict, Damaged, MachineUnfit
from torpor.core.ids import KeyId, SessionId
from torpor.db import keys
from torpor.db.database import Database
from torpor.db.keys import WrappedKey
from torpor.runtime.master_key import MasterKey, MasterKeys
from torpor.snapshots.cipher import Key, NotAuthentic, new_key, unwrap, wrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What a rotation did: from which master key to which, where that one is, and how many keys it wraps now."""

    before: KeyId
    after: KeyId
    place: str
    wrapped: int


class Keyring:
    """The master key and the tenant's secret, opened. Build it with `open_keyring`."""

    def __init__(self, database: Database, master: MasterKey, tenant: Key) -> None:
        self._database = database
        self._master = master
        self.tenant = tenant

    def new_session_key(self, session_id: SessionId) -> tuple[Key, WrappedKey]:
        """A key for a session to be, and the row to keep of it."""
        key = new_key()
        return key, _wrapped(self._master, key, session_id, _about_session(session_id))

    async def session_key(self, session_id: SessionId) -> Key:
        """Raises:
        Conflict: `session_key_missing`.
        Damaged: `key_damaged`.
        """
        row = await self._database.read(lambda tx: keys.of_session(tx, session_id))
        if row is None:
            raise Conflict(
                "session_key_missing",
                f"cannot read the snapshots of session {session_id}: it has no key",
                hint="An imported session has no snapshots; a key that was deleted is gone for good.",
            )
        return _unwrapped(self._master, row, _about_session(session_id))


async def open_keyring(database: Database, masters: MasterKeys) -> Keyring:
    """Open the keys, making them if there are none.

    Raises:
        MachineUnfit: `master_key_missing`, `master_key_wrong`.
        InvalidInput: `master_key_unusable`.
        Damaged: `key_damaged`.
    """
    row = await database.read(keys.tenant)
    if row is None:
        first = await asyncio.to_thread(masters.first)
        secret = _wrapped(first, new_key(), keys.TENANT, _ABOUT_TENANT)
        row = await database.write(lambda tx: keys.add_tenant(tx, secret), durable=True)
    try:
        master = await asyncio.to_thread(masters.with_id, row.master_id)
    except MachineUnfit:  # A rotation came between the row and the file: after it both are of one key again.
        row = await database.read(keys.tenant)
        assert row is not None
        master = await asyncio.to_thread(masters.with_id, row.master_id)
    return Keyring(database, master, _unwrapped(master, row, _ABOUT_TENANT))


async def rotate(database: Database, masters: MasterKeys) -> Rotation:
    """Wrap everything by a new master key, and drop the old one.

    Raises:
        As `open_keyring`, and InvalidInput: `master_key_in_environment`.
    """
    await open_keyring(database, masters)
    locking = contextlib.ExitStack()
    await asyncio.to_thread(locking.enter_context, masters.lock())
    with locking:
        row = await database.read(keys.tenant)
        assert row is not None
        before = await asyncio.to_thread(masters.with_id, row.master_id)
        after = await asyncio.to_thread(masters.make_next, before)
        change = partial(keys.rewrap_all, seen_master_id=before.key.id, rewrap=partial(_rewrapped, before, after))
        wrapped = await database.write(change, durable=True)
        crash_point("keys.rewrapped")
        after = await asyncio.to_thread(masters.take_next, after)
        crash_point("keys.rotated")
    # Who reads an older state keeps the WAL as it is: then it goes with the last process that closes the database.
    with contextlib.suppress(Conflict):
        await database.settle()
    return Rotation(before=before.key.id, after=after.key.id, place=after.place, wrapped=wrapped)


_ABOUT_TENANT = f"tenant {keys.TENANT}"


def _about_session(session_id: str) -> str:
    return f"session {session_id}"


def _wrapped(master: MasterKey, key: Key, whose: str, about: str) -> WrappedKey:
    sealed = wrap(master.key, key, about)
    return WrappedKey(whose=whose, key_id=key.id, master_id=master.key.id, wrapped=sealed)


def _unwrapped(master: MasterKey, row: WrappedKey, about: str) -> Key:
    try:
        key = unwrap(master.key, row.wrapped, about)
    except NotAuthentic as error:
        raise _damaged(row) from error
    if key.id != row.key_id:
        raise _damaged(row)
    return key


def _rewrapped(before: MasterKey, after: MasterKey, row: WrappedKey) -> WrappedKey:
    about = _ABOUT_TENANT if row.whose == keys.TENANT else _about_session(row.whose)
    return _wrapped(after, _unwrapped(before, row, about), row.whose, about)


def _damaged(row: WrappedKey) -> Damaged:
    return Damaged("key_damaged", f"cannot open key {row.key_id} of {row.whose}: its row is not what was kept")
