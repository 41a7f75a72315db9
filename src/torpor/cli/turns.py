"""`torpor turns`, `turn` and `diff-turns`: a session as its models saw it. What they print is hostile text."""

import asyncio
import json as jsonlib
import sys
from dataclasses import asdict
from difflib import SequenceMatcher
from enum import StrEnum
from typing import Annotated, Any

import typer

from torpor.cli.printer import human_age, human_bytes, milliseconds, notice, out, print_json, print_rows, printable
from torpor.cli.reading import JSON, SESSION, with_runtime
from torpor.core.errors import InvalidInput
from torpor.core.money import dollars_text
from torpor.gateway.transcript import Asked, Message, Part
from torpor.runtime import turns as turn_log
from torpor.runtime.runtime import Runtime
from torpor.runtime.turns import Turn, TurnContent

NUMBER = typer.Argument(metavar="N", help="The turn, counted from 1.")
SHOWN_CHARACTERS = 2_000
_COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "model": "green", "tool": "yellow"}


class Raw(StrEnum):
    REQUEST = "request"
    RESPONSE = "response"


def register(app: typer.Typer) -> None:
    app.command("turns")(turns)
    app.command("turn")(turn)
    app.command("diff-turns")(diff_turns)


def turns(session: Annotated[str, SESSION], json: Annotated[bool, JSON] = False) -> None:
    """List a session's turns, oldest first: model, tokens, cache hits, time, and the tools with their results.

    THINKING is from sending the request to the end of the answer, FROZEN how long the agent stood still for
    checkpoints, DOWN how long it did not live: dead or asleep. COST is empty where no price is known.
    """

    async def work(runtime: Runtime) -> list[Turn]:
        found = await runtime.session(session)
        return await runtime.database.read(lambda tx: turn_log.list_turns(tx, found.session_id))

    rows = [_row(turn) if json else _row(turn) | _told(turn) for turn in with_runtime(work)]
    times = ("thinking", "frozen", "down")
    columns = ("turn", "model", "input", "output", "cached", "cost", *times, "attempts", "ended", "tools")
    print_rows(rows, columns, as_json=json, empty="no turns yet")


def turn(
    session: Annotated[str, SESSION],
    number: Annotated[int, NUMBER],
    raw: Annotated[Raw | None, typer.Option("--raw", help="The exact bytes of one body.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Cut no long text short.")] = False,
    rerun: Annotated[bool, typer.Option("--rerun", help="Fork at this turn, and ask another model.")] = False,
    model: Annotated[str | None, typer.Option(metavar="M", help="With --rerun: the model to ask.")] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Show exactly what the model saw and answered: system prompt, tools, messages, answer, usage.

    Redacted bytes are shown as asterisks. With --rerun the same request goes to another model, from a fork that has its
    answer in place of this one; `torpor resume` runs that on.
    """
    if rerun or model is not None:
        _rerun(session, number, model if rerun else None, None if full else SHOWN_CHARACTERS, as_json=json)
        return
    content = _read(session, number)[0]
    if raw is not None:
        sys.stdout.buffer.write(content.request if raw is Raw.REQUEST else content.answer)
        sys.stdout.buffer.flush()
    elif json:
        print_json(_fields(content))
    else:
        _print_turn(content, None if full else SHOWN_CHARACTERS)


def diff_turns(
    session: Annotated[str, SESSION],
    before: Annotated[int, typer.Argument(metavar="A", help="A turn.")],
    after: Annotated[int, typer.Argument(metavar="B", help="Another one.")],
    json: Annotated[bool, JSON] = False,
) -> None:
    """List what is in one turn's request and not in the other's: system prompt, tools, messages, settings."""
    old, new = (content.asked for content in _read(session, before, after))
    changes = [*_diff_named(old, new), *_diff_messages(old, new)]
    if json:
        for change in changes:
            print_json(change)
        return
    for change in changes:
        colour = {"+": "green", "-": "red"}.get(_MARKS[change["what"]], "yellow")
        out.print(f"[{colour}]{_MARKS[change['what']]}[/{colour}] ", end="")
        out.print(f"{change['where']}: {_short(_summary(change), 300)}", markup=False)
    if not changes:
        out.print("the two requests say the same")


def _rerun(session: str, number: int, model: str | None, limit: int | None, *, as_json: bool) -> None:
    from torpor import wire
    from torpor.node import open_node
    from torpor.runtime.rerunning import Rerun, rerun

    if not model:
        raise InvalidInput("rerun_without_model", "cannot ask another model: --rerun and --model belong together")

    async def work() -> Rerun:
        async with open_node() as node:
            found = await node.runtime.session(session)
            return await rerun(node.runtime, found, number, model, node.holder, wire.answers, notice)

    done = asyncio.run(work())
    if as_json:
        print_json({"session": done.child, "old": _fields(done.old), "new": _fields(done.new)})
        return
    for content in (done.old, done.new):
        out.rule(printable(content.call.model or "no model"), style="bold")
        _print_answer(content, limit)
    notice(f"the second answer is in {done.child}; `torpor resume {done.child}` goes on from there")


def _read(session: str, *numbers: int) -> list[TurnContent]:
    async def work(runtime: Runtime) -> list[TurnContent]:
        found = await runtime.session(session)

        def read(tx: Any) -> list[TurnContent]:
            return [turn_log.read_turn(tx, found.session_id, number) for number in numbers]

        return await runtime.database.read(read)

    return with_runtime(work)


def _row(turn: Turn) -> dict[str, Any]:
    """One turn for scripts; times in nanoseconds."""
    usage = turn.call.usage
    return {
        "turn": turn.number,
        "call": turn.call.call_id,
        "seq": turn.call.intended_seq,
        "wall_ns": turn.wall_ns,
        "dialect": turn.call.dialect,
        "model": turn.call.model,
        "state": turn.call.state.value,
        "usage": dict(usage),
        "cost": None if turn.call.cost_nanousd is None else dollars_text(turn.call.cost_nanousd),
        "thinking_ns": turn.thinking_ns,
        "frozen_ns": turn.frozen_ns,
        "down_ns": turn.down_ns,
        "attempts": len(turn.call.attempts),
        "repeated": turn.repeated,
        "finish_reason": turn.finish_reason,
        "error": turn.error,
        "damage": turn.damage,
        "tools": [asdict(tool) for tool in turn.tools],
    }


def _told(turn: Turn) -> dict[str, Any]:
    """The same for people."""
    usage = turn.call.usage
    tools = ", ".join(
        f"{printable(tool.name)}{'' if tool.result is None else ' failed' if tool.is_error else ' ok'}"
        f"{'' if tool.result is None else f' {human_bytes(len(tool.result.encode()))}'}"
        for tool in turn.tools
    )
    return {
        "model": printable(turn.call.model or "-"),
        "input": usage.get("input_tokens"),
        "output": usage.get("output_tokens"),
        "cached": usage.get("cache_read_input_tokens"),
        "thinking": None if turn.thinking_ns is None else f"{turn.thinking_ns / 1e9:.1f} s",
        "frozen": milliseconds(turn.frozen_ns),
        "down": human_age(turn.down_ns / 1e9) if turn.down_ns else None,
        "ended": printable(_short(turn.error or turn.damage or turn.finish_reason or turn.call.state.value, 60)),
        "tools": tools,
    }


def _fields(content: TurnContent) -> dict[str, Any]:
    asked, answered = content.asked, content.answered
    return {
        "turn": content.number,
        "turns": content.turns,
        "call": content.call.call_id,
        "dialect": content.call.dialect,
        "model": content.call.model,
        "redacted": content.redacted,
        "request": {
            "head": None if content.request_head is None else asdict(content.request_head),
            "system": [asdict(part) for part in asked.system],
            "tools": [tool for _, tool in asked.tools],
            "messages": [asdict(message) for message in asked.messages],
            "settings": dict(asked.settings),
            "bytes": len(content.request),
        },
        "response": {
            "status": None if content.answer_head is None else content.answer_head.status,
            "message": asdict(answered.message),
            "model": answered.model,
            "id": answered.response_id,
            "finish_reason": answered.finish_reason,
            "usage": dict(answered.usage),
            "bytes": len(content.answer),
        },
    }


def _print_turn(content: TurnContent, limit: int | None) -> None:
    asked = content.asked
    head = f"turn {content.number} of {content.turns}  {content.call.method} {content.call.target}"
    out.print(f"{head}  {content.call.model or ''}", markup=False, style="bold")
    if content.redacted:
        out.print("parts of it were redacted: asterisks stand in their place", style="yellow")
    for name, value in asked.settings.items():
        _line(f"{name}: {jsonlib.dumps(value, ensure_ascii=False)}", limit)
    if asked.tools:
        _line(f"tools ({len(asked.tools)}): {', '.join(name for name, _ in asked.tools)}", limit)
    if asked.system:
        _print_message(Message(role="system", parts=asked.system), limit)
    for message in asked.messages:
        _print_message(message, limit)
    out.rule("the answer", style="dim")
    _print_answer(content, limit)


def _print_answer(content: TurnContent, limit: int | None) -> None:
    answered = content.answered
    status = content.answer_head.status if content.answer_head is not None else "none yet"
    _print_message(answered.message, limit)
    usage = ", ".join(f"{name} {value}" for name, value in answered.usage.items() if isinstance(value, int))
    _line(f"status {status}  {answered.finish_reason or ''}  {usage}", limit)


def _print_message(message: Message, limit: int | None) -> None:
    out.print(printable(message.role), style=f"bold {_COLOURS.get(message.role, 'white')}", markup=False)
    for part in message.parts:
        _line(_part_text(part), limit, indent="  ")


def _part_text(part: Part) -> str:
    match part.kind:
        case "text":
            return part.text
        case "thinking":
            return f"(thinks) {part.text}"
        case "tool_call":
            return f"-> {part.name}({part.text})"
        case "tool_result":
            return f"<- {'failed: ' if part.is_error else ''}{part.text}"
        case _:
            return jsonlib.dumps(part.data, ensure_ascii=False)


def _line(text: str, limit: int | None, *, indent: str = "") -> None:
    """Hostile text with its lines, and nothing else that a terminal would obey."""
    shown = text if limit is None else _short(text, limit)
    for line in shown.splitlines() or [""]:
        out.print(indent + printable(line), markup=False)


def _short(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    return f"{text[: limit * 3 // 4]} ... {text[-limit // 4 :]} ({len(text)} characters, --full shows all)"


_MARKS = {"added": "+", "removed": "-", "changed": "~"}


def _summary(change: dict[str, Any]) -> str:
    if change["what"] == "changed":
        return f"{_plain(change['before'])} -> {_plain(change['after'])}"
    return _plain(change["after"] if change["what"] == "added" else change["before"])


def _plain(value: Any) -> str:
    return printable(value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False))


def _change(where: str, before: Any, after: Any) -> dict[str, Any]:
    what = "added" if before is None else "removed" if after is None else "changed"
    return {"what": what, "where": where, "before": before, "after": after}


def _diff_named(old: Asked, new: Asked) -> list[dict[str, Any]]:
    """System prompt, settings and tools, by name."""
    pairs: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("system", _numbered(old), _numbered(new)),
        ("setting", dict(old.settings), dict(new.settings)),
        ("tool", dict(old.tools), dict(new.tools)),
    ]
    return [
        _change(f"{kind} {name}", before.get(name), after.get(name))
        for kind, before, after in pairs
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def _numbered(asked: Asked) -> dict[str, Any]:
    return {str(number): _part_text(part) for number, part in enumerate(asked.system, 1)}


def _diff_messages(old: Asked, new: Asked) -> list[dict[str, Any]]:
    """Whole messages; two that stand in each other's place are one that changed."""
    before, after = (
        [f"{message.role}: " + "\n".join(map(_part_text, message.parts)) for message in asked.messages]
        for asked in (old, new)
    )
    changes: list[dict[str, Any]] = []
    for _, start, end, first, last in SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes():
        if before[start:end] == after[first:last]:
            continue
        for step in range(max(end - start, last - first)):
            one = before[start + step] if start + step < end else None
            other = after[first + step] if first + step < last else None
            place = f"message {(first if other is not None else start) + step + 1}"
            changes.append(_change(place, one, other))
    return changes
