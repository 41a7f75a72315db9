"""What sessions cost: `torpor cost` by model and call, `torpor budget` with the way to raise it."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import typer

from torpor.cli.printer import out, print_json, print_rows
from torpor.cli.reading import standing, with_reader
from torpor.core.call import Call
from torpor.core.money import dollars_text, parse_dollars
from torpor.db import calls, sessions
from torpor.db.database import Transaction
from torpor.db.sessions import Session
from torpor.node import open_node
from torpor.runtime.reader import Reader
from torpor.runtime.records import Records

SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
_TOKENS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def register(app: typer.Typer) -> None:
    app.command("cost")(cost)
    app.command("budget")(budget)


def cost(
    session: Annotated[str, SESSION],
    lineage: Annotated[
        bool, typer.Option("--lineage", help="With all that it comes from, and all from those.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a session's model calls cost, in US dollars, by model and by call; or a whole lineage, by session.

    A call whose model has no known price, or whose answer counted no tokens, has no cost. `[prices]` in config.toml
    gives prices for the calls to come.
    """
    report = with_reader(lambda reader: _report(reader, session, lineage=lineage))
    if json:
        print_json(report)
        return
    counted = ("input_tokens", "output_tokens", "cost")
    if lineage:
        print_rows(report["sessions"], ("session", "name", "parent", "calls", *counted), as_json=False, empty="")
    else:
        columns = ("number", "call", "model", "state", "attempts", *counted)
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
        if point["kind"] != "budget":
            continue
        out.print(f"{'held':>10}  call {point['call']}, which may cost {_dollars(point['needed'])}", markup=False)
    if state["hint"]:
        out.print(state["hint"], markup=False)


async def _budget(text: str, amount_nanousd: int | None) -> dict[str, Any]:
    async with open_node() as node:
        runtime = node.runtime
        session_id = (await runtime.session(text)).session_id
        if amount_nanousd is not None:

            async def add(records: Records) -> dict[str, Any]:
                return asdict(await records.add_to_budget(amount_nanousd))

            await node.ask_or_own(session_id, "budget", add, add=amount_nanousd)
        return await runtime.database.read(lambda tx: standing(tx, session_id))


async def _report(reader: Reader, text: str, *, lineage: bool) -> dict[str, Any]:
    def read(tx: Transaction) -> list[tuple[Session, list[Call]]]:
        found = sessions.find(tx, text)
        counted = sessions.lineage(tx, found.session_id) if lineage else [found]
        return [(one, [call for call in calls.load_calls(tx, one.session_id) if call.is_llm]) for one in counted]

    session_id = (await reader.session(text)).session_id
    by_session = await reader.database.read(read)
    made = [call for _, of_it in by_session for call in of_it]
    by_model: dict[str | None, list[Call]] = {}
    for call in made:
        by_model.setdefault(call.model, []).append(call)
    models = [{"model": model, "calls": len(of_it), **_sums(of_it)} for model, of_it in by_model.items()]
    total = {"session": session_id, **_sums(made), "models": models}
    if not lineage:
        return total | {"calls": [_row(number, call) for number, call in enumerate(made, 1)]}
    return total | {"sessions": [_line(one, of_it) for one, of_it in by_session]}


def _line(session: Session, made: list[Call]) -> dict[str, Any]:
    """One session of a lineage."""
    parent = session.parent
    return {
        "session": session.session_id,
        "name": session.name,
        "parent": None if parent is None else parent.session_id,
        "forked_at_seq": None if parent is None else parent.seq,
        "calls": len(made),
        **_sums(made),
    }


def _row(number: int, call: Call) -> dict[str, Any]:
    return {
        "number": number,
        "call": call.call_id,
        "model": call.model,
        "state": call.state.value,
        "attempts": len(call.attempts),
        **_sums([call]),
    }


def _sums(made: list[Call]) -> dict[str, Any]:
    """Tokens, known costs, and how many attempts have none that is known."""
    return {**_tokens(made), "cost": _total(made), "without_cost": sum(map(_without_cost, made))}


def _without_cost(call: Call) -> int:
    # The gateway's own words in place of an answer are an attempt without a cost.
    return 0 if call.state.value == "failed" else sum(attempt.cost_nanousd is None for attempt in call.attempts)


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
