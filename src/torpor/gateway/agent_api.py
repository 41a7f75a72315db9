"""The sandbox's own API: what an agent may ask Torpor itself, on the gateway's port below /torpor/v1/.

One table of operations makes the routes, the OpenAPI document and the tools of the MCP server (`gateway.mcp`). Pure: a
request becomes a `Wish`, which is a call like any other, or an answer that follows from the request alone. What a
wish's answer says is decided once, when it goes to the log (`gateway.own`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from torpor.core.errors import TorporError
from torpor.gateway.request import Headers, Request, RequestLine

PREFIX = "/torpor/v1"
DOCUMENT_PATH = f"{PREFIX}/openapi.json"
EFFECTS_PATH = f"{PREFIX}/effects"
LOOKUP_PATH = f"{EFFECTS_PATH}/find"
CONTEXT_PATH = f"{PREFIX}/context"
NOTE_CHARACTERS_MAX = 16_384
BODY_BYTES_MAX = 1 << 20
MESSAGE_BYTES_MAX = 64 << 20
SECONDS_MAX = 100 * 366 * 86_400

RpcId: TypeAlias = str | int


class NoteBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a note says."""

    text: Annotated[str, msgspec.Meta(min_length=1, max_length=NOTE_CHARACTERS_MAX)]


class EmptyBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing to say."""


_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=NOTE_CHARACTERS_MAX)]
_Choice = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
_Path = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_MAX)]


class AskBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A question to a person.

    Attributes:
        choices: the answers that there are; none: any text.
        free_text: any text will do although there are choices.
        files: what the person should look at, paths in the workspace.
        timeout_seconds: how long the question is open; null: for good.
        wait: false answers at once with the waitpoint, for a later wait.
    """

    question: _Text
    choices: Annotated[list[_Choice], msgspec.Meta(max_length=64)] = []
    free_text: bool = False
    files: Annotated[list[_Path], msgspec.Meta(max_length=64)] = []
    timeout_seconds: _Seconds | None = None
    wait: bool = True


class SleepBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long, or until when (ISO 8601 with an offset); with both until the later."""

    seconds: _Seconds = 0
    until: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    wait: bool = True


class ReceiveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long to wait for a message; null: for good, 0: only what is there."""

    timeout_seconds: _Seconds | None = None


class SendBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a message says."""

    text: Annotated[str, msgspec.Meta(min_length=1)]


class SpawnBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A session to begin.

    Attributes:
        command: as `torpor run` gets it.
        workspace: the part of this session's workspace that it gets a copy of, relative to it.
        environment: added to this session's.
        on_cancel: whether it is cancelled with this session, or goes on by itself.
    """

    command: Annotated[list[Annotated[str, msgspec.Meta(max_length=100_000)]], msgspec.Meta(min_length=1)]
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=63)] | None = None
    workspace: str = "."
    environment: dict[str, str] = {}
    on_cancel: Literal["cancel", "detach"] = "cancel"


class WaitBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to wait for: all of these waitpoints, or any of them."""

    waitpoints: Annotated[list[str], msgspec.Meta(min_length=1, max_length=100)]
    mode: Literal["any", "all"] = "any"
    timeout_seconds: _Seconds | None = None


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class EffectBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a step of the agent's came to, under its name."""

    name: _Name
    result: Any = None


class Lookup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which step's result is looked for. No call: see `gateway.effects`."""

    name: _Name


class ContextQuery(msgspec.Struct, frozen=True):
    """What the model saw last. No call: see `gateway.context`."""


Query: TypeAlias = Lookup | ContextQuery
Body: TypeAlias = (
    NoteBody | EffectBody | EmptyBody | AskBody | SleepBody | ReceiveBody | SendBody | SpawnBody | WaitBody
)


class Operation(StrEnum):
    SESSION = "session"
    CHECKPOINT = "checkpoint"
    NOTE = "note"
    ASK = "ask"
    SLEEP = "sleep"
    RECEIVE = "receive"
    SEND = "send"
    WAIT = "wait"
    EFFECT = "effect"
    SPAWN = "spawn"


WAITING = frozenset({Operation.ASK, Operation.SLEEP, Operation.RECEIVE, Operation.WAIT})
"""What may be answered long after it was asked (`gateway.waits`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table.

    Attributes:
        answer: the members of its JSON answer, each a JSON schema.
        failures: other statuses that it may answer, and why.
    """

    operation: Operation
    method: str
    path: str
    tool: str
    status: int
    summary: str
    description: str
    body: type[Body]
    answer: Mapping[str, Mapping[str, Any]]
    failures: Mapping[int, str]

    @property
    def answer_schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": dict(self.answer), "required": list(self.answer)}

    @property
    def body_schema(self) -> dict[str, Any]:
        return msgspec.json.schema_components([self.body])[1][self.body.__name__]

    @property
    def needs_body(self) -> bool:
        """Whether a request says something that has no default."""
        return bool(self.body_schema.get("required"))


_COUNT = {"type": "integer", "minimum": 0}
_WAITPOINT: Mapping[str, Mapping[str, Any]] = {
    "waitpoint": {"type": "string", "description": "The id of what is waited on."},
    "kind": {"type": "string", "description": "ask or timer."},
    "state": {"type": "string", "enum": ["open", "resolved", "timed_out"]},
}

RULES = (
    Rule(
        operation=Operation.SESSION,
        method="GET",
        path=f"{PREFIX}/session",
        tool="torpor_session",
        status=200,
        summary="Who am I?",
        description="The session that this sandbox belongs to, which of its lives this is, and how long it had slept "
        "when it was restored. An agent that was taken back and asks again gets the answer that it got before.",
        body=EmptyBody,
        answer={
            "session": {"type": "string", "description": "The session's id."},
            "name": {"type": ["string", "null"], "description": "Its name, if it has one."},
            "incarnation": {**_COUNT, "description": "Counts the lives of the sandbox, from 1."},
            "slept_for": {"type": "number", "description": "Seconds from the cut that was restored to this life."},
            "memory_lost": {
                "type": "boolean",
                "description": "Whether it began anew amid its task, without its memory.",
            },
            "checkpoint": {"type": ["integer", "null"], "description": "The newest checkpoint's number."},
            "head": {**_COUNT, "description": "The number of the log's last event."},
        },
        failures={},
    ),
    Rule(
        operation=Operation.CHECKPOINT,
        method="POST",
        path=f"{PREFIX}/checkpoint",
        tool="torpor_checkpoint",
        status=200,
        summary="Make a checkpoint now.",
        description="Saves memory, files and open connections; answers when that is durable. The checkpoint holds this "
        "request unanswered, so an agent that is restored from it gets the same answer and goes on from here.",
        body=EmptyBody,
        answer={
            "checkpoint": {**_COUNT, "description": "The checkpoint's number."},
            "seq": {**_COUNT, "description": "The number of the log's last event at the cut."},
        },
        failures={503: "No checkpoint could be made; the session runs on."},
    ),
    Rule(
        operation=Operation.NOTE,
        method="POST",
        path=f"{PREFIX}/notes",
        tool="torpor_note",
        status=201,
        summary="Write a note into the session's log.",
        description="Adds a text to the log, where people read it. It is there once, however often the agent is "
        "restored and writes it again.",
        body=NoteBody,
        answer={"seq": {**_COUNT, "description": "The number of the note's event."}},
        failures={},
    ),
    Rule(
        operation=Operation.ASK,
        method="POST",
        path=f"{PREFIX}/ask",
        tool="torpor_ask_human",
        status=200,
        summary="Ask a person, and wait for the answer.",
        description="Answers when a person did, which may take days; the session may sleep meanwhile, at no cost. "
        "A client that lost its patience asks again with the same words, and waits on for the same answer.",
        body=AskBody,
        answer={
            **_WAITPOINT,
            "answer": {"type": ["string", "null"], "description": "What the person said; null: nothing yet."},
        },
        failures={},
    ),
    Rule(
        operation=Operation.SLEEP,
        method="POST",
        path=f"{PREFIX}/sleep",
        tool="torpor_sleep",
        status=200,
        summary="Wait for a time.",
        description="Answers when the time has come, by the wall clock outside; the session may sleep meanwhile and "
        "costs nothing.",
        body=SleepBody,
        answer=_WAITPOINT,
        failures={},
    ),
    Rule(
        operation=Operation.RECEIVE,
        method="POST",
        path=f"{PREFIX}/receive",
        tool="torpor_wait_for_message",
        status=200,
        summary="Take the next message, waiting for it if need be.",
        description="Messages come with `torpor send`. Each is given out once: an agent that is restored and receives "
        "again gets the one that it got before.",
        body=ReceiveBody,
        answer={
            "state": {"type": "string", "enum": ["resolved", "timed_out"], "description": "Whether one came in time."},
            "number": {"type": ["integer", "null"], "description": "Counts the session's messages from 1."},
            "text": {"type": ["string", "null"], "description": "The message."},
            "sent_at": {"type": ["string", "null"], "description": "ISO 8601, UTC."},
        },
        failures={},
    ),
    Rule(
        operation=Operation.SEND,
        method="POST",
        path=f"{PREFIX}/send",
        tool="torpor_send",
        status=201,
        summary="Send a message out.",
        description="Puts a text into the session's outbox, which people read with `torpor tail`. It is there once, "
        "however often the agent is restored and sends it again.",
        body=SendBody,
        answer={"number": {**_COUNT, "description": "Counts the messages in the outbox from 1."}},
        failures={},
    ),
    Rule(
        operation=Operation.WAIT,
        method="POST",
        path=f"{PREFIX}/wait",
        tool="torpor_wait",
        status=200,
        summary="Wait for any, or all, of several things.",
        description="The waitpoints are those that `ask` and `sleep` gave with `wait: false`.",
        body=WaitBody,
        answer={
            "done": {"type": "boolean", "description": "Whether what was waited for has come, before the timeout."},
            "waitpoints": {
                "type": "array",
                "description": "Each waitpoint, in the order asked for.",
                "items": {"type": "object"},
            },
        },
        failures={404: "The session has no such waitpoint."},
    ),
    Rule(
        operation=Operation.SPAWN,
        method="POST",
        path=f"{PREFIX}/spawn",
        tool="torpor_spawn",
        status=201,
        summary="Begin a session of its own.",
        description="Runs a command as a durable session beside this one, with a copy of the workspace as it is now. "
        "It spends this session's budget. `wait` for the waitpoint tells how it ended.",
        body=SpawnBody,
        answer={
            "session": {"type": "string", "description": "The new session's id."},
            "waitpoint": {"type": "string", "description": "Resolves with its end."},
        },
        failures={409: "It cannot be begun.", 503: "No checkpoint of the workspace could be made."},
    ),
    Rule(
        operation=Operation.EFFECT,
        method="POST",
        path=EFFECTS_PATH,
        tool="torpor_record_result",
        status=201,
        summary="Record what a step came to, under a name.",
        description="The first result under a name counts, and is the answer to every later one: a step whose result "
        "is there need not be done again.",
        body=EffectBody,
        answer={"name": {"type": "string"}, "result": {"description": "The first result under this name; any JSON."}},
        failures={},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What an agent asked for. `rpc_id` is the id of its JSON-RPC request; None: it came as plain HTTP."""

    rule: Rule
    body: Body
    rpc_id: RpcId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer before it has the shape of plain HTTP or of JSON-RPC."""

    status: int
    body: Mapping[str, Any]
    headers: Headers = ()


class Refused(TorporError):
    """A request that asks for nothing that there is. `reply` says so."""

    def __init__(
        self, code: str, reason: str, *, status: int, hint: str = "See docs/agent-api.md.", headers: Headers = ()
    ) -> None:
        super().__init__(code, f"cannot take this request: {reason}", hint=hint)
        body = {"code": code, "message": str(self), "hint": hint}
        self.reply = Reply(status=status, body=body, headers=headers)


def read_wish(request: Request, body: bytes) -> Wish | Query | Reply:
    """What a request for a path below /torpor asks for.

    Args:
        body: the request's, without content-encoding.

    Raises:
        Refused: nothing that there is.
    """
    line = request.line
    if (line.method, line.path) == ("GET", DOCUMENT_PATH):
        from torpor.gateway.openapi import openapi

        return Reply(status=200, body=openapi())
    if (line.method, line.path) == ("POST", LOOKUP_PATH):
        return parse(body or b"{}", Lookup)
    if (line.method, line.path) == ("GET", CONTEXT_PATH):
        return ContextQuery()
    allowed = {rule.method: rule for rule in RULES if rule.path == line.path}
    if not allowed:
        hint = f"GET {DOCUMENT_PATH} says what there is."
        raise Refused("path_unknown", f"there is no {line.path[:200]}", status=404, hint=hint)
    rule = allowed.get(line.method)
    if rule is None:
        raise refuse_method(line, ", ".join(allowed))
    bytes_max = MESSAGE_BYTES_MAX if rule.body is SendBody else BODY_BYTES_MAX
    return Wish(rule=rule, body=parse(body or b"{}", rule.body, bytes_max))


def check_origin(line: RequestLine) -> None:
    """Pages that a browser in the sandbox shows are not the agent.

    Raises:
        Refused: the request was made by such a page.
    """
    origin = line.header("origin")
    host = origin.partition("://")[2].rpartition(":")[0] or origin.partition("://")[2]
    if origin and host not in {"127.0.0.1", "localhost"}:
        raise Refused("origin_refused", f"it comes from a page of {origin[:200]}", status=403)


def refuse_method(line: RequestLine, allowed: str) -> Refused:
    reason = f"{line.path[:200]} takes {allowed}, not {line.method[:20]}"
    return Refused("method_refused", reason, status=405, headers=(("allow", allowed),))


def parse(body: bytes, kind: type[Any], bytes_max: int = BODY_BYTES_MAX) -> Any:
    """JSON of a kind.

    Raises:
        Refused: it is not that.
    """
    if len(body) > bytes_max:
        raise Refused("request_too_large", f"its body is longer than {bytes_max >> 20} MiB", status=413)
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused("request_invalid", f"its body is not what is wanted ({error})", status=400) from error


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """ASCII, so that any string that an agent sent goes back as it came."""
    return json.dumps(body).encode()
