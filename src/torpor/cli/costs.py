"""What sessions cost: `torpor cost` by model and call, `torpor budget` with the way to raise it."""

import asyncio
import os
from typing import Annotated, Any

import typer

from torpor import wire
from torpor.cli.printer import out, print_json, print_rows
from torpor.core.call import Call
from torpor.core.clock import SystemClock
from torpor.core.ids import SessionId
from torpor.core.money import dollars_text, parse_dollars
from torpor.core.session import ENDED
from torpor.db import budgets, calls, sessions, waitpoints
from torpor.db.database import Transaction
from torpor.node import open_node, socket_of
from torpor.runtime.runtime import open_runtime

SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
NODE_DEADLINE_SECONDS = 30
_TOKENS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def register(app: typer.Typer) -> None:
    app.command("cost", short_help="What a session's calls cost, by model and by call.")(cost)
    app.command("budget", short_help="What a session may spend; raises it.")(budget)


def cost(
    session: Annotated[str, SESSION],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a session's model calls cost, in US dollars, by model and by call.

    A call whose model has no known price, or whose answer counted no tokens, has no cost. `[prices]` in config.toml
    gives prices for the calls to come.
    """
    report = asyncio.run(_report(session))
    if json:
        print_json(report)
        return
    columns = ("number", "call", "model", "state", "attempts", "input_tokens", "output_tokens", "cost")
    print_rows(report["calls"], columns, as_json=False, empty="no model calls yet")
    for model in report["models"]:
        out.print(f"{model['model'] or '(no model)'}: {model['calls']} calls, {_dollars(model['cost'])}", markup=False)
    out.print(f"in all {_dollars(report['cost'])}{_unknown(report['without_cost'])}", markup=False)


def budget(
    session: Annotated[str, SESSION],
    add: Annotated[str | None, typer.Option(metavar="DOLLARS", help="Raise it by so much.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a session may spend, has spent and has reserved; with --add raise it.

    A session that waits for its budget goes on at once when a node runs it, else at `torpor resume`.
    """
    amount = None if add is None else parse_dollars(add)
    state = asyncio.run(_budget(session, amount))
    if json:
        print_json(state)
        return
    for name in ("budget", "spent", "reserved"):
        out.print(f"{name:>10}  {_dollars(state[name]) if state[name] else 'none'}", markup=False)
    for point in state["waits_on"]:
        out.print(f"{'held':>10}  call {point['call']}, which may cost {_dollars(point['needed'])}", markup=False)
    if state["hint"]:
        out.print(state["hint"], markup=False)


def standing(tx: Transaction, session_id: SessionId) -> dict[str, Any]:
    """Where a session stands with its budget, what it waits on, and what a person can do about that."""
    session = sessions.get(tx, session_id)
    account = budgets.account(tx, session_id)
    points = [] if session.status in ENDED else waitpoints.open_waitpoints(tx, session_id)
    return {
        "session": session_id,
        "budget": None if account.limit is None else dollars_text(account.limit),
        "spent": dollars_text(account.spent),
        "reserved": dollars_text(account.reserved),
        "waits_on": [{"kind": point.kind.value, "call": point.call_id, **point.data} for point in points],
        "hint": f"torpor budget {session.name or session_id} --add DOLLARS lets it go on" if points else "",
    }


async def _budget(text: str, amount_nanousd: int | None) -> dict[str, Any]:
    async with open_node() as node:
        runtime = node.runtime
        session_id = (await runtime.session(text)).session_id
        if amount_nanousd is not None:
            socket = socket_of(runtime.home.lock(session_id))
            if socket is None:
                await runtime.add_to_budget(session_id, amount_nanousd, node.holder, wire.answers)
            else:
                await wire.ask(socket, "budget", deadline_seconds=NODE_DEADLINE_SECONDS, add=amount_nanousd)
        return await runtime.database.read(lambda tx: standing(tx, session_id))


async def _report(text: str) -> dict[str, Any]:
    async with open_runtime(os.environ, SystemClock()) as runtime:
        session_id = (await runtime.session(text)).session_id
        made = await runtime.database.read(lambda tx: calls.load_calls(tx, session_id))
    rows = [_row(number, call) for number, call in enumerate((call for call in made if call.is_llm), 1)]
    by_model: dict[str | None, list[Call]] = {}
    for call in made:
        if call.is_llm:
            by_model.setdefault(call.model, []).append(call)
    return {
        "session": session_id,
        "cost": _total([call for call in made if call.is_llm]),
        "without_cost": sum(row["without_cost"] for row in rows),
        "models": [
            {"model": model, "calls": len(of_it), "cost": _total(of_it), **_tokens(of_it)}
            for model, of_it in by_model.items()
        ],
        "calls": rows,
    }


def _row(number: int, call: Call) -> dict[str, Any]:
    unknown = sum(attempt.cost_nanousd is None for attempt in call.attempts)
    # The gateway's own words in place of an answer are an attempt without a cost.
    unknown = 0 if call.state.value == "failed" else unknown
    return {
        "number": number,
        "call": call.call_id,
        "model": call.model,
        "state": call.state.value,
        "attempts": len(call.attempts),
        **_tokens([call]),
        "cost": _total([call]),
        "without_cost": unknown,
    }


def _tokens(made: list[Call]) -> dict[str, int]:
    return {name: sum(call.usage.get(name, 0) for call in made) for name in _TOKENS}


def _total(made: list[Call]) -> str | None:
    """What is known of these calls' costs; None if nothing is."""
    known = [call.cost_nanousd for call in made if call.cost_nanousd is not None]
    return dollars_text(sum(known)) if known else None


def _dollars(text: str | None) -> str:
    return "cost unknown" if text is None else f"${text}"


def _unknown(attempts: int) -> str:
    return f", and {attempts} attempts whose cost is not known" if attempts else ""
