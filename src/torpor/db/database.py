"""The seam between Torpor and a database: transactions are plain functions, mostly run on the database's own thread.

A function that fails is rolled back; one that returns is committed. It is atomic against cancellation too: a task that
is cancelled before its function started leaves no trace, afterwards the function runs to its end before the
cancellation is delivered. Functions must be quick, must not touch the event loop, and may not keep the transaction.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from torpor.core.clock import Clock
from torpor.core.errors import InvalidInput

Row = Mapping[str, Any]
Value = str | int | bytes | None
T = TypeVar("T")


class BlobStore(Protocol):
    """Where large bodies lie: immutable objects by key, durable when `put` returns. A snapshot store's backend is one.

    Synchronous, and maybe slow: never call it on the event loop, and change it in no transaction.
    """

    def put(self, key: str, data: bytes) -> bool:
        """Create the object; False if the key is there, and is left alone.

        Raises:
            MachineUnfit: `no_space`, `storage_failed`.
        """
        ...

    def get(self, key: str) -> bytes:
        """Raises NotFound (`object_not_found`)."""
        ...

    def delete(self, key: str) -> None:
        """Absent afterwards, whether it was there or not."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All keys that begin so."""
        ...


class Transaction(Protocol):
    """Runs statements of queries/ by name. Raises only TorporErrors."""

    def one(self, query: str, /, **values: Value) -> Row | None:
        """The first row, or None."""
        ...

    def all(self, query: str, /, **values: Value) -> list[Row]: ...

    def run(self, query: str, /, **values: Value) -> int:
        """The number of rows that the statement wrote or deleted."""
        ...

    def fetch(self, key: str, /) -> bytes:
        """The object that a row names, from the blob store. Raises NotFound (`object_not_found`)."""
        ...


class Database(Protocol):
    """Where sessions live.

    Attributes:
        blobs: where their large bodies are; None keeps new ones in rows, however large.

    Raises (from every method):
        Conflict: `database_busy`, another process held the database for too long; `row_conflict`, a constraint;
            `database_closed`.
        MachineUnfit: `no_space`, `database_unopenable`, `database_io_failed`.
        Damaged: `database_damaged`.
    """

    @property
    def blobs(self) -> BlobStore | None: ...

    async def write(self, work: Callable[[Transaction], T], /, *, durable: bool, brief: bool = False) -> T:
        """Run `work` alone among all writers, after those that came before it.

        Its rows survive the death of every process.

        Args:
            durable: they and those of every earlier write have also reached the disk when this returns.
            brief: it is a few statements on little data, and may run on the caller's thread.
        """
        ...

    async def read(self, work: Callable[[Transaction], T], /) -> T:
        """Run `work` on one consistent state. Neither waits for a writer nor makes one wait."""
        ...

    async def settle(self) -> None:
        """Leave no byte of what was overwritten or deleted in any file of the database.

        Raises:
            Conflict: `database_busy`, another process still reads an older state.
        """
        ...

    async def close(self) -> None:
        """Wait for the work under way and let go of the files."""
        ...


async def open_database(url: str, *, clock: Clock, blobs: BlobStore | None = None) -> Database:
    """Open the database and bring its schema up to date.

    Args:
        url: `sqlite:///` and an absolute path, which is taken as it stands; the file is created if it is not there.
        blobs: the store of large bodies; the same one each time, since rows name its objects.

    Raises:
        InvalidInput: the URL names no database that Torpor knows.
        Conflict: `schema_newer`, a later version of Torpor has used this database.
    """
    scheme, _, path = url.partition("://")
    if scheme != "sqlite" or not path.startswith("/"):
        raise InvalidInput(
            "database_url_unknown",
            f"cannot open database {url!r}: the URL is not sqlite:/// and an absolute path",
            hint="For example sqlite:///home/me/.local/share/torpor/torpor.db.",
        )
    from torpor.db.sqlite import open_sqlite

    return await open_sqlite(f"/{path.lstrip('/')}", clock=clock, blobs=blobs)
