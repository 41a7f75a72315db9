"""`torpor log`: the event log as people read it, or one event a line; follows a session until it ends."""

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from torpor.cli.printer import err, human_bytes, milliseconds, out, print_json, printable
from torpor.core.clock import SystemClock
from torpor.core.errors import Damaged
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId, SessionId
from torpor.core.session import ENDED
from torpor.db import log as event_log
from torpor.db import notes
from torpor.db.database import Transaction
from torpor.db.notes import Note
from torpor.db.questions import answer_from, question_from
from torpor.db.verify import count_redacted, verify_chain
from torpor.runtime.runtime import Runtime, open_runtime

FOLLOW_SECONDS = 0.25
NOTE_CHARACTERS_SHOWN = 200


def register(app: typer.Typer) -> None:
    app.command("log")(log)


def log(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Id, unique beginning of an id, or name.")],
    json: Annotated[bool, typer.Option("--json", help="One event a line, with all its fields.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the session ends.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the chain, the gaps, the parents and bodies.")
    ] = False,
    after: Annotated[int, typer.Option(metavar="SEQ", min=0, help="Begin behind this event.")] = 0,
) -> None:
    """Show what happened in a session, oldest first.

    With --follow, go on later from where you were: --after the last seq that you saw.
    """
    asyncio.run(_log(session, json, follow, verify, after))


async def _log(text: str, as_json: bool, follow: bool, verify: bool, after: int) -> None:
    async with open_runtime(os.environ, SystemClock()) as runtime:
        found = await runtime.session(text)
        if verify:
            await _verify(runtime, found.session_id, as_json)
            return
        seen, started_ns, calls = after, found.created_ns, CallNumbers()
        if after and not as_json:
            for event in await runtime.database.read(lambda tx: event_log.events(tx, found.session_id, limit=after)):
                calls.of(event)
        while True:
            session = await runtime.session(found.session_id)
            events, texts = await runtime.database.read(lambda tx, seen=seen: _read(tx, found.session_id, seen))
            for event in events:
                if as_json:
                    print_json(_fields(event, texts.get(event.seq)))
                else:
                    _print(event, started_ns, calls, texts.get(event.seq))
            seen = events[-1].seq if events else seen
            if not follow or (session.status in ENDED and seen >= session.head_seq):
                return
            # The log may be written by another process, which has no way to call us: look again.
            await asyncio.sleep(FOLLOW_SECONDS)


def _read(tx: Transaction, session_id: SessionId, after_seq: int) -> tuple[list[Event], dict[int, Note]]:
    """Events, and of those that are notes the texts by seq."""
    events = event_log.events(tx, session_id, after_seq=after_seq)
    return events, {event.seq: notes.read(tx, event) for event in events if notes.has_text(event)}


async def _verify(runtime: Runtime, session_id: Any, as_json: bool) -> None:
    problems = await runtime.database.read(lambda tx: verify_chain(tx, session_id))
    redacted = await runtime.database.read(lambda tx: count_redacted(tx, session_id))
    if as_json:
        listed = [str(problem) for problem in problems]
        print_json({"session": session_id, "problems": listed, "redacted": redacted})
    if problems:
        for problem in problems:
            err.print(str(problem), markup=False)
        raise Damaged(
            "log_damaged",
            f"cannot trust the log of session {session_id}: {len(problems)} problems",
            hint="Restore torpor.db from a backup; what is listed above was changed after it was written.",
        )
    if not as_json:
        out.print(
            f"the log of {session_id} is whole: chain, numbers, parents, requests and answers agree", markup=False
        )
        if redacted:
            out.print(f"{redacted} of its blocks and answers were redacted")


def _fields(event: Event, note: Note | None) -> dict[str, Any]:
    """An event as the log has it; of a note also its text, which lies beside it."""
    return {
        "session": event.session_id,
        "seq": event.seq,
        "parent_seq": event.parent_seq,
        "incarnation": event.incarnation,
        "wall_ns": event.wall_ns,
        "kind": event.kind.value,
        "call": event.call_id,
        "data": dict(event.data),
        "refs": list(event.refs),
        "prev_hash": event.prev_hash,
        "hash": event.hash,
        **({} if note is None else {"text": note.text, "redacted": note.redacted}),
    }


class CallNumbers:
    """Gives each call the number that people know it by: the order in which the agent made them."""

    def __init__(self) -> None:
        self._numbers: dict[CallId, int] = {}

    def of(self, event: Event) -> int | None:
        """Show it every event, in order: a call's first one is, or comes with, its `call.intended`."""
        if event.call_id is None:
            return None
        return self._numbers.setdefault(event.call_id, len(self._numbers) + 1)


def told(event: Event, calls: CallNumbers, note: Note | None = None) -> str:
    """What the timeline says of an event besides its kind."""
    number = calls.of(event)
    tell = _TELLING.get(event.kind)
    said = _shortened(_written(event, note.text)) if note is not None else tell(event.data) if tell else ""
    words = [f"call {number}:" if number else "", said]
    return " ".join(word for word in words if word).strip().removesuffix(":")


def _written(event: Event, text: str) -> str:
    """A text as people want it: of a question, which is kept with its choices, the words."""
    if event.kind is Kind.WAITPOINT_RESOLVED:
        answer = answer_from(text, has_files="files" in event.data)
        return answer.text + _listed([file.get("name", "") for file in answer.files])
    if event.kind is not Kind.WAITPOINT_CREATED:
        return text
    question = question_from(text)
    return question.text + _listed(question.choices)


def _listed(words: Sequence[str]) -> str:
    return f" ({', '.join(words)})" if words else ""


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= NOTE_CHARACTERS_SHOWN else line[:NOTE_CHARACTERS_SHOWN] + "..."


def _print(event: Event, started_ns: int, calls: CallNumbers, note: Note | None) -> None:
    at = (event.wall_ns - started_ns) / 1e9
    colour = _COLOURS.get(event.kind, "white")
    out.print(f"[dim]{event.seq:>5} {at:>9.3f}s  {event.incarnation:>2}[/dim]  ", end="")
    out.print(f"[{colour}]{event.kind.value:<22}[/{colour}] ", end="")
    out.print(printable(told(event, calls, note)), markup=False)


def _status(data: Any) -> str:
    reason = f": {data['reason']}" if data.get("reason") else ""
    return f"{data.get('from')} -> {data.get('to')}{reason}"


def _started(data: Any) -> str:
    return f"{data.get('mode')} from checkpoint #{data.get('checkpoint')}: {data.get('reason')}"


def _call(data: Any) -> str:
    return f"{data.get('method', '')} {data.get('target', '')} {data.get('model') or ''}".strip()


def _sent(data: Any) -> str:
    asked = ", with token counts asked for" if data.get("usage_asked") else ""
    return f"attempt {data.get('attempt')}{asked}"


def _retried(data: Any) -> str:
    if data.get("usage_asked") is False:
        return (
            f"status {data.get('status')}: {data.get('upstream')} does not count tokens when asked, sent as it was made"
        )
    return f"status {data.get('status')}, sent again after {data.get('wait_ms')} ms"


def _completed(data: Any) -> str:
    usage: dict[str, Any] = data.get("usage") or {}
    tokens = ", ".join(f"{name} {value}" for name, value in usage.items() if isinstance(value, int))
    size = human_bytes(int(data.get("bytes", 0)))
    cost = f", ${data['cost']}" if data.get("cost") is not None else ""
    whose = ", the parent's answer" if "joined" in data else ""
    return f"{size} in {data.get('chunks', 0)} chunks{f', {tokens}' if tokens else ''}{cost}{whose}"


def _joined(data: Any) -> str:
    if data.get("inherited"):
        return f"connection {data.get('stream')}, open at the cut, goes on with attempt {data.get('attempt')}"
    return f"asked again on connection {data.get('stream')}: the same answer, attempt {data.get('attempt')}"


def _repeated(data: Any) -> str:
    return f"made again on connection {data.get('stream')}: it is the same call, attempt {data.get('attempt')}"


def _delivered(data: Any) -> str:
    taken = human_bytes(int(data.get("taken_bytes", 0)))
    endings = {
        "consumed": f"read to its end, {taken}",
        "gone": f"closed by the agent after {taken}",
        "reset": f"broken off after {taken}",
    }
    return endings.get(str(data.get("end")), "")


def _diverged(data: Any) -> str:
    return f"another one than the log's next, of which {len(data.get('pending', ()))} were to be repeated"


def _checkpoint(data: Any) -> str:
    froze = f"froze {milliseconds(data['freeze_ns'])}, " if data.get("freeze_ns") else ""
    return f"#{data.get('number')} ({data.get('reason')}) {froze}stored {human_bytes(data.get('stored_bytes', 0))}"


def _skipped(data: Any) -> str:
    if data.get("reason") == "memory":
        return "no checkpoint of its own: the image has no room beside those on their way to the store"
    return f"no checkpoint of its own: {data.get('owed_ms', 0)} ms are owed for the last ones"


def _overtaken(data: Any) -> str:
    return f"#{data.get('number')} ({data.get('reason')}) was dropped for the newer #{data.get('by')}"


def _forgotten(data: Any) -> str:
    numbers = data.get("numbers", ())
    shown = ", ".join(f"#{number}" for number in numbers[:5])
    return f"({data.get('reason')}) {shown}{f' and {len(numbers) - 5} more' if len(numbers) > 5 else ''}"


def _recovered(data: Any) -> str:
    number = data.get("checkpoint")
    what = {
        "boot": f"booted with the files of checkpoint #{number}",
        "restore": f"restored checkpoint #{number}",
        "adopt": "adopted the living sandbox",
    }
    return f"{what.get(str(data.get('mode')), '')} in {milliseconds(data.get('took_ns', 0))}"


def _waits(data: Any) -> str:
    if data.get("needed") is not None:
        return f"{data.get('kind')}: the call is held, it may cost ${data.get('needed')}"
    return f"{data.get('kind')}{'' if data.get('due_ns') is None else ', until its time comes at the latest'}"


def _resolved(data: Any) -> str:
    if data.get("limit") is not None:
        return f"{data.get('kind')}: the limit is ${data.get('limit')}"
    number = f": message {data.get('number')}" if data.get("number") is not None else ""
    return f"{data.get('kind')}{': its time came' if data.get('timed_out') else number}"


def _rejected(data: Any) -> str:
    number = data.get("checkpoint")
    return f"{data.get('mode')}{'' if number is None else f' of checkpoint #{number}'}: {data.get('reason')}"


_TELLING: dict[Kind, Callable[[Any], str]] = {
    Kind.SESSION_CREATED: lambda data: " ".join(data.get("spec", {}).get("argv", [])),
    Kind.SESSION_STATUS: _status,
    Kind.INCARNATION_STARTED: _started,
    Kind.INCARNATION_ENDED: lambda data: str(data.get("reason", "")),
    Kind.LEASE_ACQUIRED: lambda data: f"owner token {data.get('owner_token')}, pid {data.get('pid')}",
    Kind.CALL_INTENDED: _call,
    Kind.CALL_SENT: _sent,
    Kind.CALL_RETRIED: _retried,
    Kind.CALL_ANSWERING: lambda data: f"status {data.get('status')}",
    Kind.CALL_COMPLETED: _completed,
    Kind.SESSION_REWOUND: lambda data: f"back to checkpoint #{data.get('checkpoint')}, in turn {data.get('turn')}",
    Kind.CALL_FAILED: lambda data: str(data.get("error", "")),
    Kind.CALL_TORN: lambda data: f"attempt {data.get('attempt')} was cut short: its node died",
    Kind.WAITPOINT_CREATED: _waits,
    Kind.WAITPOINT_RESOLVED: _resolved,
    Kind.MESSAGE_RECEIVED: lambda data: f"message {data.get('number')}",
    Kind.MESSAGE_SENT: lambda data: f"message {data.get('number')}",
    Kind.BUDGET_CHANGED: lambda data: f"from ${data.get('from')} to ${data.get('to')}",
    Kind.CALL_UNKNOWN: lambda _data: "sent, and nobody knows what came of it",
    Kind.CALL_REPEATED: _repeated,
    Kind.CALL_JOINED: _joined,
    Kind.CALL_DELIVERED: _delivered,
    Kind.CALL_DIVERGED: _diverged,
    Kind.STREAM_RESET: lambda data: f"connection {data.get('stream')}: its answer cannot be continued",
    Kind.CHECKPOINT_COMMITTED: _checkpoint,
    Kind.CHECKPOINT_SKIPPED: _skipped,
    Kind.CHECKPOINT_OVERTAKEN: _overtaken,
    Kind.CHECKPOINT_FAILED: lambda data: f"({data.get('reason')}) {data.get('message', '')}",
    Kind.CHECKPOINT_FORGOTTEN: _forgotten,
    Kind.CHECKPOINT_PINNED: lambda data: f"#{data.get('number')}{'' if data.get('pinned') else ' no longer'}",
    Kind.CHECKPOINT_REPACKED: lambda data: f"#{data.get('number')}: its snapshot is {data.get('snapshot')} now",
    Kind.RECOVERY_CHOSEN: _recovered,
    Kind.RECOVERY_REJECTED: _rejected,
    Kind.MEMORY_EXCEEDED: lambda data: (
        f"{data.get('used_bytes', 0) >> 20} MiB of {data.get('limit_bytes', 0) >> 20} MiB"
        f"{' and more, killed' if data.get('killed') else ''}: the session is parked"
    ),
    Kind.MEMORY_CHANGED: lambda data: f"it may take {data.get('limit_bytes', 0) >> 20} MiB",
    Kind.AGENT_RESTARTED: lambda data: (
        f"exit status {data.get('exit_status')} {data.get('signal', '')}: "
        f"restart {data.get('restart')} of {data.get('restarts_max')}, from before event {data.get('failed_seq')}"
    ),
    Kind.AGENT_EXITED: lambda data: f"exit status {data.get('exit_status')} {data.get('signal', '')}",
    Kind.OUTPUT_DIFFERED: lambda data: f"channel {data.get('channel')} at byte {data.get('offset')}",
}
_COLOURS = {
    Kind.CALL_COMPLETED: "green",
    Kind.CHECKPOINT_COMMITTED: "blue",
    Kind.RECOVERY_CHOSEN: "magenta",
    Kind.SESSION_REWOUND: "magenta",
    Kind.CALL_TORN: "yellow",
    Kind.WAITPOINT_CREATED: "yellow",
    Kind.CALL_FAILED: "red",
    Kind.CHECKPOINT_FAILED: "red",
    Kind.RECOVERY_REJECTED: "red",
    Kind.STREAM_RESET: "yellow",
    Kind.CALL_DIVERGED: "yellow",
    Kind.INCARNATION_ENDED: "yellow",
}
