"""The SQL statements, loaded once from queries/<area>/<verb_noun>.sql and called by that name.

One statement a file, in the subset that SQLite and PostgreSQL share, with named parameters (`:name`).
"""

from functools import cache
from importlib import resources


@cache
def statements() -> dict[str, str]:
    """Every statement by its name, such as "session/find_by_id"."""
    root = resources.files("torpor.db") / "queries"
    return {
        f"{area.name}/{file.name.removesuffix('.sql')}": file.read_text(encoding="utf-8")
        for area in root.iterdir()
        if area.is_dir()
        for file in area.iterdir()
        if file.name.endswith(".sql")
    }
