"""What SQLite's result codes mean to Torpor: the one place that knows them."""

import sqlite3
from pathlib import Path

from torpor.core.errors import Conflict, Damaged, MachineUnfit, TorporError

_PRIMARY = 0xFF

SYNC_FAILURES = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})


def translated(error: sqlite3.Error, path: Path) -> TorporError:
    """The TorporError for an sqlite3 error; a mistake in our own SQL comes back as MachineUnfit `database_failed`."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY
    match code:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Conflict(
                "database_busy",
                f"cannot use database {path}: another process kept it locked",
                hint="Look for a process that stopped in the middle of a write.",
            )
        case sqlite3.SQLITE_CONSTRAINT:
            return Conflict("row_conflict", f"cannot write database {path}: {error}")
        case sqlite3.SQLITE_FULL:
            return MachineUnfit(
                "no_space",
                f"cannot write database {path}: no space is left on its disk",
                hint="Free some space; what was acknowledged is safe.",
            )
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return Damaged(
                "database_damaged",
                f"cannot read database {path}: {error}",
                hint="Keep the file and its -wal as they are, and restore a copy.",
            )
        case sqlite3.SQLITE_IOERR:
            return MachineUnfit(
                "database_io_failed",
                f"cannot use database {path}: the disk failed ({getattr(error, 'sqlite_errorname', error)})",
            )
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_AUTH:
            return MachineUnfit("database_unopenable", f"cannot open database {path}: {error}")
        case _:
            return MachineUnfit("database_failed", f"cannot use database {path}: {error}")
