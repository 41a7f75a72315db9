"""Bringing a SQLite database's schema up to date: schema/NAME/NNNN_*.sql in order, each once, in one transaction."""

import sqlite3
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from torpor.core.clock import Clock
from torpor.core.errors import Conflict, InvalidInput

WAL_SECONDS = 10.0
WAL_PAUSE_SECONDS = 0.005

_MIGRATION_TABLE = """
CREATE TABLE IF NOT EXISTS migration (
    version     INTEGER PRIMARY KEY,
    name        TEXT NOT NULL,
    applied_ns  INTEGER NOT NULL
) STRICT
"""


def migrate(connection: sqlite3.Connection, path: Path, clock: Clock, schema: str = "sqlite") -> None:
    """Apply what is missing; a database that is already up to date is not written.

    Raises:
        Conflict: `schema_newer`, it holds a migration that this version does not have.
        InvalidInput: `database_foreign`, it is another program's database.
    """
    _use_wal(connection, clock)
    known = _migrations(schema)
    if _applied(connection, path, schema) == len(known):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(_MIGRATION_TABLE)
        applied = _applied(connection, path, schema)  # once more: another process may have been quicker
        for version, (name, script) in enumerate(known[applied:], applied + 1):
            for statement in _split(script):
                connection.execute(statement)
            connection.execute("INSERT INTO migration VALUES (?, ?, ?)", (version, name, clock.wall_ns()))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _applied(connection: sqlite3.Connection, path: Path, schema: str) -> int:
    tables = {row["name"] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if not tables:
        return 0
    if "migration" not in tables:
        raise InvalidInput("database_foreign", f"cannot use database {path}: it belongs to another program")
    newest = connection.execute("SELECT COALESCE(MAX(version), 0) AS version FROM migration").fetchone()["version"]
    if newest > len(_migrations(schema)):
        raise Conflict(
            "schema_newer",
            f"cannot use database {path}: its schema {newest} is newer than this version of Torpor",
            hint="Install the version of Torpor that used it last.",
        )
    return newest


def _migrations(schema: str) -> list[tuple[str, str]]:
    folder = resources.files("torpor.db") / "schema" / schema
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".sql")), key=lambda file: file.name)
    return [(file.name.removesuffix(".sql"), file.read_text(encoding="utf-8")) for file in files]


def _split(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _use_wal(connection: sqlite3.Connection, clock: Clock) -> None:
    """Switch to WAL, which stays with the file.

    SQLite says "locked" here without waiting, to two first openers at once and while another process, the last one to
    close the file, writes its WAL back; nothing tells when that is over.
    """
    deadline = clock.monotonic() + WAL_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or clock.monotonic() > deadline:
                raise
            time.sleep(WAL_PAUSE_SECONDS)
        else:
            return
