"""What a session waits on, and talking to it: waitpoints, resolve, send, tail."""

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from torpor.cli.printer import human_age, human_bytes, notice, out, print_json, print_rows, printable
from torpor.cli.reading import with_runtime
from torpor.cli.timeline import FOLLOW_SECONDS
from torpor.core.clock import SystemClock
from torpor.core.errors import Conflict, InvalidInput
from torpor.core.ids import SessionId, WaitpointId
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import FILES_BYTES_MAX, ToldFile, Waitpoint, WaitpointKind, told_file
from torpor.db import messages, questions, waitpoints
from torpor.db.database import Transaction
from torpor.db.messages import Box, Message
from torpor.node import Node, open_node, socket_of
from torpor.runtime.records import Records
from torpor.runtime.runtime import Runtime, open_runtime

SESSION = typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")
JSON = typer.Option("--json", help="One JSON object a line.")
_BY_A_PERSON = frozenset({WaitpointKind.ASK, WaitpointKind.TIMER})


def register(app: typer.Typer) -> None:
    app.command("waitpoints")(list_waitpoints)
    app.command("resolve")(resolve)
    app.command("send")(send)
    app.command("tail")(tail)


def list_waitpoints(
    session: Annotated[str | None, typer.Argument(metavar="[SESSION]", help="Only this session's.")] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """List what sessions wait on and nobody has resolved yet, oldest first: questions, times, messages, budgets."""

    async def work(runtime: Runtime) -> list[dict[str, Any]]:
        found = None if session is None else (await runtime.session(session)).session_id

        def read(tx: Transaction) -> list[dict[str, Any]]:
            points = waitpoints.list_open(tx) if found is None else waitpoints.open_waitpoints(tx, found)
            return [_row(tx, point, runtime.clock.wall_ns()) for point in points]

        return await runtime.database.read(read)

    columns = ("session", "kind", "question", "choices", "files", "due", "age", "waitpoint")
    print_rows(with_runtime(work), columns, as_json=json, empty="nothing to wait for")


def resolve(
    session: Annotated[str, SESSION],
    answer: Annotated[str | None, typer.Argument(help="The answer to its question; `-` reads it from stdin.")] = None,
    waitpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="Which one, if it waits on several; see `torpor waitpoints`.")
    ] = None,
    file: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", exists=True, dir_okay=False, help="Send this file along; may be repeated."),
    ] = None,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Answer the question that a session asks, or let it go on before its time has come.

    The first answer counts. The session need not run: it finds the answer when it does. Files go to the agent with the
    answer, 32 MiB in all at most.
    """
    files = _read_files(file or [])
    text = sys.stdin.read().rstrip("\n") if answer == "-" else answer

    async def work() -> dict[str, Any]:
        async with open_node() as node:
            session_id = (await node.runtime.session(session)).session_id
            wanted = WaitpointId(waitpoint) if waitpoint else await _only(node.runtime, session_id)

            async def act(records: Records) -> dict[str, Any]:
                point = await records.resolve(wanted, text, files)
                return {"waitpoint": point.waitpoint_id, "kind": point.kind.value}

            asked: dict[str, Any] = {"waitpoint": wanted, "answer": text}
            if files:
                asked["files"] = files
            done = await node.ask_or_own(session_id, "resolve", act, **asked)
            await _say_who_wakes(node, session_id)
            return done

    resolved = asyncio.run(work())
    if json:
        print_json(resolved)
    else:
        out.print(f"resolved {resolved['waitpoint']}", markup=False)


def send(
    session: Annotated[str, SESSION],
    text: Annotated[str, typer.Argument(help="What to say; `-` reads it from stdin.")],
    json: Annotated[bool, JSON] = False,
) -> None:
    """Put a message into a session's inbox. It is durable when this returns; the agent takes it when it receives.

    The session need not run.
    """
    said = sys.stdin.read() if text == "-" else text
    if not said:
        raise InvalidInput("message_empty", "cannot send the message: it is empty")

    async def act(records: Records) -> dict[str, Any]:
        return {"number": await records.deliver(said)}

    async def work() -> dict[str, Any]:
        async with open_node() as node:
            session_id = (await node.runtime.session(session)).session_id
            done = await node.ask_or_own(session_id, "send", act, text=said)
            await _say_who_wakes(node, session_id)
            return done

    sent = asyncio.run(work())
    if json:
        print_json(sent)
    else:
        out.print(f"message {sent['number']} is in the inbox")


def tail(
    session: Annotated[str, SESSION],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the session ends.")] = False,
    after: Annotated[int, typer.Option(metavar="NUMBER", min=0, help="Begin behind this message.")] = 0,
    json: Annotated[bool, JSON] = False,
) -> None:
    """Show the messages that a session sent out, oldest first.

    With --follow, go on later from where you were: --after the last number that you saw.
    """

    def show(message: Message) -> None:
        if json:
            print_json({"number": message.number, "wall_ns": message.wall_ns, "text": message.text})
        else:
            for line in message.text.splitlines() or [""]:
                out.print(printable(line), markup=False)

    asyncio.run(_tail(session, after, show, follow=follow))


async def _tail(text: str, after: int, show: Callable[[Message], None], *, follow: bool) -> None:
    async with open_runtime(os.environ, SystemClock()) as runtime:
        session_id = (await runtime.session(text)).session_id
        while True:
            session = await runtime.session(session_id)
            sent = await runtime.database.read(
                lambda tx, seen=after: messages.list_after(tx, session_id, Box.OUT, seen)
            )
            for message in sent:
                show(message)
                after = message.number
            if not follow or session.status in ENDED:
                return
            # The outbox may be written by another process, which has no way to call us: look again.
            await asyncio.sleep(FOLLOW_SECONDS)


async def _say_who_wakes(node: Node, session_id: SessionId) -> None:
    """A person who has told a sleeper something wants to know whether it hears that."""
    session = await node.runtime.session(session_id)
    if session.status is not SessionStatus.ASLEEP or socket_of(node.runtime.home.lock(session_id)) is not None:
        return
    name = session.name or session_id
    if session.wake_ns is None:
        notice(f"it was stopped, and finds this when it is resumed: torpor resume {name}")
    elif socket_of(node.runtime.home.daemon_lock) is None:
        notice(f"no node is there to wake it: torpor up, or torpor resume {name}")


def _read_files(paths: list[Path]) -> list[ToldFile]:
    """Raises:
    InvalidInput: `answer_files_too_big`.
    """
    total = sum(path.stat().st_size for path in paths)
    if total > FILES_BYTES_MAX:
        raise InvalidInput(
            "answer_files_too_big",
            f"cannot send {human_bytes(total)} of files with an answer: {human_bytes(FILES_BYTES_MAX)} is the most",
            hint="torpor cp PATH SESSION:PATH brings big files into the workspace of a session that runs.",
        )
    return [told_file(path.name, path.read_bytes()) for path in paths]


async def _only(runtime: Runtime, session_id: SessionId) -> WaitpointId:
    """What a person means who names no waitpoint.

    Raises:
        Conflict: `nothing_to_resolve`.
        InvalidInput: `waitpoint_ambiguous`.
    """
    points = await runtime.database.read(lambda tx: waitpoints.open_waitpoints(tx, session_id))
    asked = [point for point in points if point.kind is WaitpointKind.ASK]
    meant = asked or [point for point in points if point.kind in _BY_A_PERSON]
    if not meant:
        hint = "".join(f"It waits for a {point.kind}. " for point in points[:1]) + "torpor waitpoints lists all."
        raise Conflict("nothing_to_resolve", f"cannot resolve session {session_id}: it asks nothing", hint=hint)
    if len(meant) > 1:
        raise InvalidInput(
            "waitpoint_ambiguous",
            f"cannot resolve session {session_id}: it waits on {len(meant)} things",
            hint="Name one with --waitpoint; `torpor waitpoints SESSION` lists them.",
        )
    return meant[0].waitpoint_id


def _row(tx: Transaction, point: Waitpoint, now_ns: int) -> dict[str, Any]:
    question = questions.question_of(tx, point) if point.kind is WaitpointKind.ASK else None
    due = None if point.due_ns is None else f"in {human_age((point.due_ns - now_ns) / 1e9)}"
    return {
        "session": point.session_id,
        "kind": point.kind.value,
        "question": question.text if question else None,
        "choices": ", ".join(question.choices) if question else None,
        "files": ", ".join(question.files) if question else None,
        "due": due,
        "age": human_age((now_ns - point.created_ns) / 1e9),
        "waitpoint": point.waitpoint_id,
        "call": point.call_id,
        "free_text": question.free_text or not question.choices if question else None,
        "due_ns": point.due_ns,
        "created_ns": point.created_ns,
        "data": {name: value for name, value in point.data.items() if name != "text"},
    }
