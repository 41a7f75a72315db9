"""`torpor redact` and `torpor head`: erase content for good, and sign what the log says."""

import asyncio
import json as jsonlib
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import err, out, print_json, printable
from torpor.cli.reading import JSON, SESSION, with_runtime
from torpor.core.errors import Damaged, InvalidInput
from torpor.core.ids import SessionId
from torpor.db import redaction, verify
from torpor.db.database import Transaction
from torpor.node import open_node
from torpor.runtime import heads
from torpor.runtime.runtime import Runtime

_PLACES_SHOWN = 100
_EVENTS_SHOWN = 20


def register(app: typer.Typer) -> None:
    app.command("redact")(redact)
    app.command("head")(head)


def redact(
    session: Annotated[str, SESSION],
    block: Annotated[str | None, typer.Option(metavar="DIGEST", help="Erase this block or answer.")] = None,
    pattern: Annotated[str | None, typer.Option(metavar="REGEX", help="Erase what fits, as it was sent.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Put asterisks in the place of content: requests, answers, notes, output. The log stays valid; nothing undoes it.

    Lists what would be erased first, and asks. Events, images of checkpoints from before, exports and the provider keep
    what they have.
    """
    find = _finder(block, pattern)

    async def work() -> dict[str, Any]:
        async with open_node() as node:
            found = await node.runtime.session(session)
            await node.runtime.finish_redaction(found.session_id, node.holder, wire.answers)
            plan = await node.runtime.database.read(lambda tx: find(tx, found.session_id))
            if not json:
                _tell(plan)
            if plan:
                _agree(yes=yes)
                runtime, me = node.runtime, node.holder
                plan = await runtime.redact(found.session_id, lambda tx: find(tx, found.session_id), me, wire.answers)
            counts = {"blocks": len(plan.blocks), "answers": len(plan.answers), "output_pieces": len(plan.output)}
            told = {"places": plan.places, "unread": plan.unread, "kept_in_events": plan.kept}
            return {"session": found.session_id, **counts, **told}

    fields = asyncio.run(work())
    if json:
        print_json(fields)
        return
    if fields["places"]:
        done = f"{fields['blocks']} blocks, {fields['answers']} answers and {fields['output_pieces']} pieces of output"
        out.print(f"erased in {done}")
        err.print("[yellow]not erased:[/yellow] images and workspaces of checkpoints from before, events, and copies")
    if kept := fields["kept_in_events"]:
        seqs = ", ".join(map(str, kept[:_EVENTS_SHOWN])) + (", ..." if len(kept) > _EVENTS_SHOWN else "")
        err.print(f"[yellow]not erased:[/yellow] {len(kept)} events that hold it themselves: {seqs}")


def head(
    session: Annotated[str, SESSION],
    sign: Annotated[Path | None, typer.Option(metavar="KEYFILE", help="Sign it with an Ed25519 key in PEM.")] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="With --sign: make that file first.")] = False,
    check: Annotated[Path | None, typer.Option(metavar="SIGNATURE", help="Check a signed head; - is stdin.")] = None,
    key: Annotated[str | None, typer.Option(metavar="PUBLIC", help="With --check: the key that it must be of.")] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Print the last event's number and hash, which covers all events before it.

    A signed head, kept elsewhere, shows later that the log up to there was not rewritten.
    """

    async def work(runtime: Runtime) -> dict[str, Any]:
        found = await runtime.session(session)
        if check is not None:
            signed = _read_signed(check)
            held = await runtime.database.read(lambda tx: _checked(tx, found.session_id, signed, key))
            return held.fields | {"checked": True, "head_seq": found.head_seq}
        present = await runtime.database.read(lambda tx: heads.read_head(tx, found.session_id))
        if sign is None:
            return present.fields
        if new_key:
            heads.new_key(sign)
        return heads.sign(present, sign)

    fields = with_runtime(work)
    if json or sign is not None:
        print_json(fields)
    elif check is not None:
        out.print(
            f"the log of {fields['session']} is the one that was signed, up to event {fields['seq']}", markup=False
        )
    else:
        out.print(f"{fields['seq']} {fields['hash']}", markup=False)


def _checked(tx: Transaction, session_id: SessionId, signed: Any, key: str | None) -> heads.Head:
    """The signature covers one hash; that the events before it make up that hash is for the chain to say."""
    held = heads.check(tx, session_id, signed, key=key)
    problems = verify.verify_chain(tx, session_id)
    if problems:
        raise Damaged(
            "log_damaged",
            f"cannot trust the log of session {session_id}: {len(problems)} problems",
            hint=f"`torpor log {session_id} --verify` lists them.",
        )
    return held


def _read_signed(path: Path) -> Any:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        return jsonlib.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidInput("signature_unusable", f"cannot read signature {path}: {error}") from error


Finder = Callable[[Transaction, SessionId], redaction.Plan]


def _finder(block: str | None, pattern: str | None) -> Finder:
    if (block is None) == (pattern is None):
        raise InvalidInput("redaction_unclear", "cannot redact: say either --block or --pattern")
    if block is not None:
        try:
            digest = bytes.fromhex(block)
        except ValueError as error:
            raise InvalidInput("redaction_unclear", f"cannot redact block {block!r}: it is no digest") from error
        return partial(redaction.plan_block, digest=digest)
    try:
        compiled = re.compile((pattern or "").encode())
    except re.error as error:
        raise InvalidInput("redaction_unclear", f"cannot redact by {pattern!r}: {error}") from error
    return partial(redaction.plan_pattern, pattern=compiled)


def _tell(plan: redaction.Plan) -> None:
    if not plan:
        err.print("nothing that can be erased fits")
    for damage in dict.fromkeys(plan.unread):
        err.print(f"not looked into: {printable(damage)}", markup=False, style="yellow")
    for place in plan.places[:_PLACES_SHOWN]:
        out.print(printable(place), markup=False)
    if len(plan.places) > _PLACES_SHOWN:
        out.print(f"... and {len(plan.places) - _PLACES_SHOWN} more")


def _agree(*, yes: bool) -> None:
    if not yes and not sys.stdin.isatty():
        raise InvalidInput("redaction_unconfirmed", "cannot redact: nobody can be asked", hint="Say --yes.")
    if not yes:
        typer.confirm("Erase this for good?", abort=True)
