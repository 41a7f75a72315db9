"""`torpor keys`: which keys there are, by their ids, and a new master key for all of them. No key is ever printed."""

import asyncio
import os
from typing import Annotated, Any

import typer

from torpor.cli.printer import err, notice, print_json, print_rows
from torpor.core.clock import SystemClock
from torpor.db import keys
from torpor.runtime.keyring import rotate
from torpor.runtime.runtime import open_runtime

JSON = typer.Option("--json", help="One JSON object a key.")
_COLUMNS = ("key", "kind", "of", "wrapped_by")


def register(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True, help="Show the keys of the snapshots, or change the master key.")
    group.callback()(show)
    group.command("rotate", short_help="Make a new master key, and wrap every key by it.")(rotate_master)
    app.add_typer(group, name="keys")


def show(context: typer.Context, json: Annotated[bool, JSON] = False) -> None:
    """List the ids of the keys that snapshots are encrypted with. A key itself is never shown.

    Fails if the master key that wraps them is not there.
    """
    if context.invoked_subcommand is None:
        rows = asyncio.run(_list())
        print_rows(rows, _COLUMNS, as_json=json, empty="no keys yet: the first session makes them")


def rotate_master(json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Make a new master key, wrap every key by it, and drop the old one. Sessions that run go on.

    A rotation that is cut off is finished by the next one. With the master key in TORPOR_MASTER_KEY, the new one is
    taken from TORPOR_MASTER_KEY_NEXT.
    """

    async def work() -> dict[str, Any]:
        async with open_runtime(os.environ, SystemClock()) as runtime:
            done = await rotate(runtime.database, runtime.stores.masters)
            return {"before": done.before, "after": done.after, "in": done.place, "keys": done.wrapped}

    done = asyncio.run(work())
    if json:
        print_json(done)
        return
    notice(f"{done['keys']} keys are wrapped by {done['after']} now, no more by {done['before']}")
    err.print(f"It is in {done['in']}: keep a copy of it apart from this machine.", markup=False)


async def _list() -> list[dict[str, Any]]:
    async with open_runtime(os.environ, SystemClock()) as runtime:
        tenant = await runtime.database.read(keys.tenant)
        if tenant is None:
            return []
        master = await asyncio.to_thread(runtime.stores.masters.with_id, tenant.master_id)
        rows = [("tenant", tenant), *(("session", row) for row in await runtime.database.read(keys.list_sessions))]
    shown: list[dict[str, Any]] = [{"key": master.key.id, "kind": "master", "of": master.place, "wrapped_by": None}]
    return shown + [
        {"key": row.key_id, "kind": kind, "of": row.whose, "wrapped_by": row.master_id} for kind, row in rows
    ]
