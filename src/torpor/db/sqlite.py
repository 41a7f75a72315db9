"""SQLite behind the Database protocol: one writer thread, two reader threads, WAL, and every sqlite3 error translated.

Other processes may use the same file; SQLite's own locks keep the writers apart. Writes that wait together are
committed together, each in a savepoint of its own, so that many streams share one sync. A commit that must be durable
runs with synchronous=FULL, which syncs the WAL with all earlier commits in it; the others run with NORMAL, which syncs
nothing, and a brief one of these runs where it is asked for if nobody else is writing: two changes of threads would
take longer. The WAL is copied into the file between commits, not within one. After a failed sync nothing can be
promised any more (the kernel may have dropped the pages): all later writes are refused.
"""

import asyncio
import logging
import os
import sqlite3
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, MachineUnfit, NotFound, TorporError
from torpor.db.database import BlobStore, Database, Row, Transaction, Value
from torpor.db.migrations import migrate
from torpor.db.sqlite_errors import SYNC_FAILURES, translated
from torpor.db.statements import statements

T = TypeVar("T")
logger = logging.getLogger(__name__)

BUSY_TIMEOUT_SECONDS = 10.0
READERS = 2
WRITES_PER_COMMIT_MAX = 64
COMMITS_PER_COPY = 200
"""The WAL is copied into the file behind a commit of the writer's thread, once there were so many; some 1000 pages.

That is mostly at the end of an answer. Brief writes have it done by one of them after four times as many.
"""


class SqliteTransaction:
    """The statements of one connection; `SqliteDatabase` puts BEGIN and COMMIT around them."""

    def __init__(self, connection: sqlite3.Connection, blobs: BlobStore | None) -> None:
        self._connection = connection
        self._blobs = blobs
        self._statements = statements()

    def one(self, query: str, /, **values: Value) -> Row | None:
        return self._connection.execute(self._statements[query], values).fetchone()

    def all(self, query: str, /, **values: Value) -> list[Row]:
        return self._connection.execute(self._statements[query], values).fetchall()

    def run(self, query: str, /, **values: Value) -> int:
        return self._connection.execute(self._statements[query], values).rowcount

    def fetch(self, key: str, /) -> bytes:
        if self._blobs is None:
            raise NotFound("object_not_found", f"cannot read object {key}: the database was opened without its blobs")
        return self._blobs.get(key)


@dataclass(slots=True, eq=False)
class _Write:
    """One caller's transaction, waiting for its turn. `told` and `waiting` belong to the caller's loop."""

    work: Callable[[Transaction], Any]
    durable: bool
    waiting: asyncio.Future[None]
    told: bool = False
    result: Any = None
    failure: BaseException | None = None

    def outcome(self) -> Any:
        if self.failure is not None:
            raise self.failure
        return self.result


class SqliteDatabase:
    """One file. Build it with `open_sqlite`."""

    def __init__(self, path: Path, blobs: BlobStore | None = None) -> None:
        self.blobs = blobs
        self._path = path
        self._writer_thread = ThreadPoolExecutor(1, thread_name_prefix="torpor-db-writer")
        self._reader_threads = ThreadPoolExecutor(READERS, thread_name_prefix="torpor-db-reader")
        self._idle_readers: list[sqlite3.Connection] = []
        self._queued: deque[_Write] = deque()
        self._using_writer = Lock()
        self._writer: sqlite3.Connection | None = None
        self._settings: dict[str, str | int] = {}
        self._commits = 0
        self._sync_failed = False

    async def write(self, work: Callable[[Transaction], T], /, *, durable: bool, brief: bool = False) -> T:
        write = _Write(work, durable, asyncio.get_running_loop().create_future())
        if brief and not durable and self._commit_here(write):
            return write.outcome()
        self._queued.append(write)
        if len(self._queued) == 1:
            try:
                self._submit(self._writer_thread, self._commit_queued)
            except Conflict:
                self._queued.remove(write)
                raise
        await self._told(write)
        return write.outcome()

    async def read(self, work: Callable[[Transaction], T], /) -> T:
        return await self._on(self._reader_threads, lambda: self._read(work))

    async def settle(self) -> None:
        await self._on(self._writer_thread, self._settle)

    async def open(self, clock: Clock, schema: str) -> None:
        await self._on(self._writer_thread, lambda: self._open(clock, schema))

    async def close(self) -> None:
        with suppress(Conflict):
            await self._on(self._writer_thread, self._close)
        self._writer_thread.shutdown(wait=False)

    async def _on(self, thread: Executor, work: Callable[[], T]) -> T:
        return await _outcome(self._submit(thread, work))

    def _submit(self, thread: Executor, work: Callable[[], T]) -> Future[T]:
        try:
            return thread.submit(work)
        except RuntimeError as error:
            raise Conflict("database_closed", f"cannot use database {self._path}: it was closed") from error

    async def _told(self, write: _Write) -> None:
        """Wait until a write is done; a cancelled caller takes it back, or waits if it began."""
        try:
            await write.waiting
        except asyncio.CancelledError:
            try:
                self._queued.remove(write)
            except ValueError:
                while not write.told:
                    write.waiting = asyncio.get_running_loop().create_future()
                    with suppress(asyncio.CancelledError):
                        await write.waiting
            raise

    def _commit_queued(self) -> None:
        """Commit what waits, together; who comes to an empty queue has submitted a turn of his own."""
        while self._queued:
            with self._using_writer:
                batch: list[_Write] = []
                with suppress(IndexError):
                    while len(batch) < WRITES_PER_COMMIT_MAX:
                        batch.append(self._queued.popleft())
                if not batch:
                    return
                try:
                    self._commit(batch)
                except BaseException as error:  # noqa: BLE001 - it is the callers' error, and this thread's work goes on
                    for write in batch:
                        write.failure = error
            # Told once the writer is free, or a brief write that follows would find it taken.
            with suppress(RuntimeError):  # their loop was closed: nobody waits any more
                batch[0].waiting.get_loop().call_soon_threadsafe(_tell, batch)
            if self._commits >= COMMITS_PER_COPY:
                with self._using_writer:
                    self._copy_wal()

    def _commit_here(self, write: _Write) -> bool:
        """Commit a brief write on the caller's thread; False if its turn has not come."""
        if self._queued or self._commits >= 4 * COMMITS_PER_COPY or not self._using_writer.acquire(blocking=False):
            return False
        try:
            self._commit([write], wait=False)
        except _Locked:
            return False
        except BaseException as error:  # noqa: BLE001 - `outcome` raises it
            write.failure = error
        finally:
            self._using_writer.release()
        return True

    def _commit(self, batch: Sequence[_Write], *, wait: bool = True) -> None:
        """One transaction. A write that fails is undone alone; an error from here is the whole batch's.

        Raises:
            _Locked: with `wait` false, another process is writing.
        """
        connection = self._writer
        if connection is None:
            raise Conflict("database_closed", f"cannot use database {self._path}: it was closed")
        if self._sync_failed:
            raise MachineUnfit(
                "database_io_failed",
                f"cannot write database {self._path}: the disk failed to keep earlier writes",
                hint="Mend the disk, then start this node anew.",
            )
        durable = any(write.durable for write in batch)
        with self._translating():
            self._set(connection, "synchronous", "FULL" if durable else "NORMAL")
            self._set(connection, "busy_timeout", int(BUSY_TIMEOUT_SECONDS * 1000) if wait else 0)
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not wait and error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                    raise _Locked from error
                raise
            with _transaction(connection):
                before = connection.total_changes
                if len(batch) == 1:
                    batch[0].result = batch[0].work(SqliteTransaction(connection, self.blobs))
                else:
                    self._run_each(connection, batch)
                if durable and connection.total_changes == before:
                    connection.execute("UPDATE durability SET mark = mark + 1")
        self._commits += 1

    def _run_each(self, connection: sqlite3.Connection, batch: Sequence[_Write]) -> None:
        for write in batch:
            try:
                write.result = self._in_savepoint(connection, write.work)
            except BaseException as error:
                if not connection.in_transaction:  # SQLite has rolled back everything: the disk is full
                    raise
                write.failure = error

    def _copy_wal(self) -> None:
        """Copy the WAL into the file, as far as readers allow, and begin it anew if that was all of it.

        The first commit of a new WAL syncs its header, whatever `synchronous` says: it is made here, where
        no loop waits.
        """
        connection, self._commits = self._writer, 0
        if connection is None or self._sync_failed:
            return
        try:
            with self._translating():
                copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if copied["log"] == copied["checkpointed"]:
                    connection.execute("UPDATE durability SET mark = mark + 1")
        except TorporError as error:
            logger.warning("the WAL is not copied: %s", error)

    def _in_savepoint(self, connection: sqlite3.Connection, work: Callable[[Transaction], T]) -> T:
        connection.execute("SAVEPOINT work")
        try:
            with self._translating():
                result = work(SqliteTransaction(connection, self.blobs))
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK TO work")
                connection.execute("RELEASE work")
            raise
        connection.execute("RELEASE work")
        return result

    def _read(self, work: Callable[[Transaction], T]) -> T:
        with self._translating():
            try:
                connection = self._idle_readers.pop()
            except IndexError:
                connection = _connect(self._path, read_only=True)
            try:
                connection.execute("BEGIN")
                with _transaction(connection):
                    return work(SqliteTransaction(connection, self.blobs))
            finally:
                self._idle_readers.append(connection)

    def _settle(self) -> None:
        """Deleted bytes are zeros in the file already (secure_delete); the WAL is emptied into it."""
        if self._writer is None:
            raise Conflict("database_closed", f"cannot use database {self._path}: it was closed")
        with self._using_writer, self._translating():
            self._set(self._writer, "busy_timeout", int(BUSY_TIMEOUT_SECONDS * 1000))
            busy = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()["busy"]
        if busy:
            raise Conflict(
                "database_busy",
                f"cannot empty the WAL of database {self._path}: another process reads an older state",
                hint="What was erased is in the -wal file until the last process that uses the database ends.",
            )

    def _set(self, connection: sqlite3.Connection, name: str, value: str | int) -> None:
        if self._settings.get(name) != value:
            connection.execute(f"PRAGMA {name} = {value}")
            self._settings[name] = value

    @contextmanager
    def _translating(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) in SYNC_FAILURES:
                self._sync_failed = True
            raise translated(error, self._path) from error

    def _open(self, clock: Clock, schema: str) -> None:
        with self._using_writer, self._translating():
            _create_file(self._path)
            connection = _connect(self._path, read_only=False)
            try:
                self._set(connection, "synchronous", "FULL")
                migrate(connection, self._path, clock, schema)
                self._set(connection, "wal_autocheckpoint", 0)
            except BaseException:
                connection.close()
                raise
            self._writer = connection

    def _close(self) -> None:
        self._reader_threads.shutdown(wait=True)
        while self._idle_readers:
            self._idle_readers.pop().close()
        with self._using_writer:
            if self._writer is not None:
                self._writer.close()
                self._writer = None


class _Locked(Exception):
    """Another process is writing."""


def _tell(batch: Sequence[_Write]) -> None:
    """On the callers' loop: their writes are done."""
    for write in batch:
        write.told = True
        if not write.waiting.done():
            write.waiting.set_result(None)


async def _outcome(running: Future[T]) -> T:
    """The result of work on a thread; a cancelled caller waits until it is clear whether it ran."""
    outcome = asyncio.wrap_future(running)
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        running.cancel()
        while not outcome.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([outcome])
        if not outcome.cancelled():
            outcome.exception()  # seen: what counts for the caller is that it was cancelled
        raise


async def open_sqlite(path: str, *, clock: Clock, schema: str = "sqlite", blobs: BlobStore | None = None) -> Database:
    """Open `path`, which is created with its directories (0700, the file 0600) when it is not there."""
    database = SqliteDatabase(Path(path), blobs)
    try:
        await database.open(clock, schema)
    except BaseException:
        await database.close()
        raise
    return database


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Generator[None]:
    """The rest of a transaction that was begun."""
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite has rolled back by itself when the disk was full
            connection.execute("ROLLBACK")
        raise


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=BUSY_TIMEOUT_SECONDS,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA secure_delete = ON")  # what is redacted or forgotten is not left in free pages
        connection.execute(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
    except BaseException:
        connection.close()
        raise
    return connection


def _create_file(path: Path) -> None:
    """Make an empty database file before SQLite does, so that it and its WAL are private from the first byte.

    An existing file is never opened here: closing it would drop the locks that SQLite holds in this process.
    """
    try:
        for directory in reversed(path.parents):
            if not directory.exists():
                with suppress(FileExistsError):
                    directory.mkdir(mode=0o700)
                _sync_directory(directory.parent)
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            _sync_directory(path.parent)
    except OSError as error:
        raise MachineUnfit("database_unopenable", f"cannot create database {path}: {error.strerror}") from error


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
