"""How commands speak: people get text (rich, colours unless NO_COLOR), scripts get JSON; errors have one shape."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from torpor.core.errors import TorporError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
TABLE_WIDTH = 200
"""Wide enough for every listing."""


def print_json(value: object) -> None:
    """One JSON value on one line, flushed: a listing's element, a followed event, a result."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    # Half a character, which an agent may send, has no UTF-8; as an escape it is JSON.
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")
    sys.stdout.flush()


def print_rows(rows: Sequence[dict[str, Any]], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """A listing: a table of some columns for people, all fields one object a line for scripts."""
    if as_json:
        for row in rows:
            print_json(row)
        return
    if not rows:
        err.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.upper().replace("_", " "), no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row.get(column)) for column in columns))
    # Ids are there to be copied: a narrow or no terminal cuts no line in two.
    out.width = max(out.width, TABLE_WIDTH)
    out.print(table)


def notice(text: str) -> None:
    """A line about the session, on stderr, so that the agent's stdout stays its own."""
    err.print("[dim]torpor:[/dim] ", end="")
    err.print(printable(text), markup=False)


def print_error(error: TorporError, *, as_json: bool = False) -> None:
    if as_json:
        print_json({"error": {"code": error.code, "message": str(error), "hint": error.hint}})
        return
    err.print(f"[red bold]error[/red bold] [dim]{error.code}[/dim]: ", end="")
    err.print(printable(str(error)), markup=False)
    if error.hint:
        err.print(f"  hint: {printable(error.hint)}", markup=False)


def printable(text: str) -> str:
    """Text that may come out of a sandbox, on one line and without anything that a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def human_bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def human_age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.0f} ms"


def moment(wall_ns: int, now_ns: int) -> str:
    """A time as people want it: local, ISO 8601, and how long ago."""
    at = datetime.fromtimestamp(wall_ns / 1e9, tz=UTC).astimezone()
    return f"{at.isoformat(sep=' ', timespec='seconds')} ({human_age((now_ns - wall_ns) / 1e9)} ago)"


def cell(value: object) -> str:
    return "-" if value is None or value == "" else printable(str(value))
