"""How commands speak: people get text (rich, colours unless NO_COLOR), scripts get JSON; errors have one shape."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console

from torpor.core.errors import TorporError

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
TABLE_WIDTH = 200
"""Wide enough for every listing, but for one with a column as long as people like."""
COLUMN_WIDTH_MIN = 32
"""No column is cut below it: ids are there to be copied."""


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
    # Not rich's table, which looks for markup in every cell and measures each of them several times.
    table = [[cell(row.get(column)) for column in columns] for row in rows]
    header = [column.upper().replace("_", " ") for column in columns]
    # A narrow or no terminal cuts no line in two.
    widths = _widths([header, *table], max(out.width, TABLE_WIDTH))
    out.print(_line(header, widths), style="bold", markup=False)
    out.file.write("".join(f"{_line(cells, widths)}\n" for cells in table))


def _widths(table: Sequence[Sequence[str]], width_max: int) -> list[int]:
    """How wide each column is; the widest ones are cut until a line, with two spaces between columns, fits."""
    widths = [max(_width(text) for text in column) for column in zip(*table, strict=True)]
    while (excess := sum(widths) + 2 * (len(widths) - 1) - width_max) > 0 and max(widths) > COLUMN_WIDTH_MIN:
        widest = widths.index(max(widths))
        widths[widest] = max(COLUMN_WIDTH_MIN, widths[widest] - excess)
    return widths


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(_fitted(text, width) for text, width in zip(cells, widths, strict=True))


def _fitted(text: str, width: int) -> str:
    """Exactly so many columns of a terminal."""
    missing = width - _width(text)
    return text + " " * missing if missing >= 0 else f"{set_cell_size(text, width - 1)}…"


def _width(text: str) -> int:
    """In columns of a terminal, of which some characters take two."""
    return len(text) if text.isascii() else cell_len(text)


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
    if text.isprintable():
        return text
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
