"""What is done before a transaction and after it, because it is slow: large content put into the store, or deleted.

First the bytes, durable, then the row that names them; first the row goes, then the bytes. A kill between leaves an
object that no row names (docs/event-log.md). Only the owner of a session does these things.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torpor.core.crash import crash_point
from torpor.core.errors import MachineUnfit
from torpor.core.ids import CallId, SessionId
from torpor.core.money import Bill
from torpor.db import answers, blobs, blocks, calls
from torpor.db.answers import Packed
from torpor.db.blobs import BLOB_BYTES_MIN, Stored
from torpor.db.database import Database, Transaction
from torpor.db.redaction import Plan
from torpor.db.requests import PreparedBody


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """One session's large content, as its owner writes it."""

    database: Database
    session_id: SessionId
    owner_token: int

    async def request(self, body: PreparedBody) -> PreparedBody:
        """Store the large pieces of a body that are new, for the transaction that stores the body.

        Raises:
            MachineUnfit: `no_space`, `storage_failed`.
        """
        large = {digest: piece for piece, digest in body.by_digest() if len(piece) >= BLOB_BYTES_MIN}
        if not large:
            return body

        def find_new(tx: Transaction) -> list[bytes]:
            return [digest for digest in large if not blocks.is_there(tx, self.session_id, digest)]

        new = await self.database.read(find_new)
        return replace(body, stored={digest: await self._store(large[digest]) for digest in new})

    async def text(self, text: str) -> Stored | None:
        """Store a text that is large, for the transaction that makes it a block; None: it is small.

        Raises:
            MachineUnfit: `no_space`, `storage_failed`.
        """
        content = text.encode("utf-8", "surrogatepass")
        if len(content) < BLOB_BYTES_MIN:
            return None
        digest = blocks.digest_of(content)
        is_there = await self.database.read(lambda tx: blocks.is_there(tx, self.session_id, digest))
        return None if is_there else await self._store(content)

    async def answer(self, call_id: CallId, attempt: int) -> Packed | None:
        """Read and store an answer to which nothing is added any more, for the transaction that closes its attempt.

        Where the store fails to take it the answer stays in its chunk rows, where it is safe. None without a store.
        """
        if self.database.blobs is None:
            return None
        packed, body = await self.database.read(lambda tx: answers.read(tx, call_id, attempt))
        try:
            return replace(packed, stored=await self._store(body), ahead=True)
        except MachineUnfit:
            return replace(packed, ahead=True)

    async def drop_chunks(self, call_id: CallId, attempt: int) -> None:
        """Drop the chunks of an answer whose row was made ahead, a few at a time."""
        for last in await self.database.read(lambda tx: list(answers.batches(tx, call_id, attempt))):

            def drop(tx: Transaction, last: int = last) -> None:
                answers.drop_chunks(tx, **self._fence, call_id=call_id, attempt=attempt, last=last)

            await self.database.write(drop, durable=False)
            crash_point("chunks.dropped")

    async def drop_rest(self) -> None:
        """Go on where a kill kept others from dropping chunks."""
        for call_id, attempt in await self.database.read(lambda tx: answers.list_with_chunks(tx, self.session_id)):
            await self.drop_chunks(call_id, attempt)

    async def tear_open(self, *, wall_ns: int, bills: Mapping[CallId, Bill] | None = None) -> list[CallId]:
        """`calls.tear_open` of calls whose pumps are dead, however long their answers got; durable on return."""
        found = await self.database.read(lambda tx: calls.list_long_sent(tx, self.session_id))
        answered = [await self.answer(call_id, attempt) for call_id, attempt in found]
        packed = {answer.call_id: answer for answer in answered if answer is not None}
        torn = await self.database.write(
            lambda tx: calls.tear_open(tx, **self._fence, wall_ns=wall_ns, bills=bills, packed=packed), durable=True
        )
        await self.drop_rest()
        return torn

    async def masks(self, plan: Plan) -> None:
        """Store the masked contents of a plan that are large, for the transaction that carries it out."""
        for masked in [*plan.blocks.values(), *plan.answers.values()]:
            if len(masked) >= BLOB_BYTES_MIN:
                plan.stored[blocks.digest_of(masked)] = await self._store(masked)

    async def _store(self, content: bytes) -> Stored:
        return await asyncio.to_thread(blobs.store, self.database.blobs, self.session_id, content)

    @property
    def _fence(self) -> Any:
        return {"session_id": self.session_id, "owner_token": self.owner_token}


async def find_left_over(database: Database, session_id: SessionId) -> list[str]:
    """The keys of a session's blobs that no row names; while it has an owner, also those that are on their way."""
    if database.blobs is None:
        return []
    there = await asyncio.to_thread(database.blobs.list, blobs.prefix_of(session_id))
    named = await database.read(lambda tx: blobs.list_named_of(tx, session_id)) if there else frozenset[str]()
    return [key for key in there if key not in named]


async def sweep(database: Database, session_id: SessionId) -> None:
    """Delete the blobs of a session that no row names. Only while its lock keeps everybody else from putting one."""
    for key in await find_left_over(database, session_id):
        assert database.blobs is not None
        await asyncio.to_thread(database.blobs.delete, key)
