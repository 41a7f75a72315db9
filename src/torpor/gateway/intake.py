"""Turns the bytes of a stream, or a request of the log, into what the gateway needs to know of a call."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import msgspec

from torpor.core.call import RequestKey
from torpor.core.ids import CallId, StreamId
from torpor.core.match import request_key
from torpor.core.usage import Edit, asks_for_usage, usage_edit
from torpor.db.calls import NewCall
from torpor.db.requests import PreparedBody, RequestHead, prepare
from torpor.gateway.admission import LocalAnswer, admit, refuse_unreadable
from torpor.gateway.claim import Claim
from torpor.gateway.dialects import OWN, dialect_named
from torpor.gateway.dialects.base import Route, Shape
from torpor.gateway.dialects.sse import json_value
from torpor.gateway.own import answer_here
from torpor.gateway.request import (
    Request,
    RequestLine,
    RequestReader,
    Room,
    Unreadable,
    decoded_body,
    expects_continue,
    read_body,
    read_line,
)
from torpor.gateway.routing import Destination, Routing
from torpor.gateway.telling import with_note
from torpor.gateway.upstream import Outgoing, target_without_key, without_credentials
from torpor.sandbox.streams import Stream

AT_ONCE_BYTES_MAX = 32 << 10
"""A body up to this is taken apart on the loop: a thread would take longer to begin."""
OPTIONS_BYTES_MAX = 4096
VERSION_FIELD = ":version"
"""A field that no client can send keeps HTTP/1.0 with a request in the log."""


class _Facts(msgspec.Struct):
    """What is shown of a request; everything else in it is skipped."""

    model: str | None = None
    stream: bool | None = None
    stream_options: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Intake:
    """A request that becomes a call, or was one."""

    request: Request
    destination: Destination
    key: RequestKey
    plain_body: bytes
    """The body without its content-encoding."""
    model: str | None
    shape: Shape
    """How its client wants the answer."""
    prepared: PreparedBody
    """The body as the log takes it."""
    hide_usage: bool = False
    """It asks for a stream that has token counts only if asked for, and does not ask for them."""
    options: object = msgspec.UNSET
    """Its `stream_options`; True if they are nothing that a provider would take."""
    usage_edit: Edit | None = None
    """What would make it ask for token counts."""

    @property
    def at_once(self) -> bool:
        """Whether it goes upstream as soon as it is recorded, if no budget stands between."""
        return self.destination.dialect is not OWN

    @property
    def head(self) -> RequestHead:
        """What the log keeps of everything before the body: no credentials."""
        line = self.request.line
        headers = without_credentials(line.headers)
        if line.http_version != "1.1":
            headers += ((VERSION_FIELD, line.http_version),)
        return RequestHead(method=line.method, target=line.target, headers=headers)

    @property
    def outgoing(self) -> Outgoing:
        line = self.request.line
        return Outgoing(
            destination=self.destination,
            model=self.model,
            method=line.method,
            query=line.target.partition("?")[2],
            headers=line.headers,
            body=self.request.body,
        )

    def new_call(self, call_id: CallId, stream: StreamId, incarnation: int) -> NewCall:
        return NewCall(
            call_id=call_id,
            key=self.key,
            dialect=self.destination.dialect.name,
            method=self.request.line.method,
            target=self.request.line.target,
            model=self.model,
            incarnation=incarnation,
            stream=stream,
            request_bytes=self.request.length,
            is_llm=self.destination.route.is_llm,
            hide_usage=self.hide_usage,
        )

    def may_carry(self, note: str | None) -> bool:
        """Whether this is a request to a model that has a place for a note."""
        return note is not None and self.destination.route.is_llm and self.outgoing_with(note) is not None

    def outgoing_with(self, note: str) -> Outgoing | None:
        """The request with a note of Torpor's own in it."""
        body = with_note(self.destination.dialect.name, self.request.body, note)
        return None if body is None else replace(self.outgoing, body=body)

    @property
    def asks_for_usage(self) -> bool:
        """Whether its client itself asks for token counts in a stream that has them only then."""
        return self.destination.dialect.counts_if_asked and asks_for_usage(self.options)

    def asking_for_usage(self, outgoing: Outgoing) -> Outgoing | None:
        """This request, which `outgoing` is as it was made or with a note, as one that asks for token counts.

        None if it asks already, has none to ask for, or is in no form for it.
        """
        if not self.hide_usage:
            return None
        edit = self.usage_edit
        if outgoing.body is not self.request.body:
            edit = _edit_of(outgoing.body, self.options)
        return None if edit is None else replace(outgoing, body=edit.of(outgoing.body))

    def shape_for(self, key: RequestKey) -> Shape:
        """How this request wants the answer of the call with this key, which matched it on some level."""
        if self.key.canonical == key.canonical:
            return Shape.AS_SENT
        return self.shape

    def claim(self, call_id: CallId, stream: StreamId, incarnation: int, shape: Shape = Shape.AS_SENT) -> Claim:
        return Claim(
            call_id=call_id,
            stream=stream,
            incarnation=incarnation,
            request_bytes=self.request.length,
            continued=self.request.line.continued,
            shape=shape,
            hide_usage=self.hide_usage,
        )


async def take_in(
    stream: Stream, routing: Routing, room: Room, reserved: AsyncExitStack
) -> Intake | LocalAnswer | None:
    """Read a stream's request; None if the client said nothing. `reserved` is the memory that a large one takes.

    Raises:
        StreamGone: the client left in the middle.
    """
    reader = RequestReader()
    line = await read_line(stream, reader)
    if line is None:
        return None
    if isinstance(line, Unreadable):
        return refuse_unreadable(line)
    destination = admit(line, stream.port, routing)
    if isinstance(destination, LocalAnswer):
        return destination
    request = await read_body(stream, reader, room, reserved)
    if isinstance(request, Unreadable):
        return refuse_unreadable(request)
    if destination.dialect is OWN and (answer := answer_here(request)) is not None:
        return answer
    if len(request.body) <= AT_ONCE_BYTES_MAX:
        return _intake(request, destination)
    # Taking a long conversation apart takes a while: the loop goes on meanwhile.
    return await asyncio.to_thread(_intake, request, destination)


def from_log(head: RequestHead, body: bytes, routing: Routing, *, dialect: str, is_llm: bool) -> Intake:
    """A logged request, to be sent again: where the configuration of now says, which may be nowhere."""
    version = next((value for name, value in head.headers if name == VERSION_FIELD), "1.1")
    line = RequestLine(
        method=head.method,
        target=head.target,
        http_version=version,
        headers=tuple((name, value) for name, value in head.headers if name != VERSION_FIELD),
        continued=expects_continue(version, head.headers),
    )
    destination = routing.destination(line.method, line.target, (dialect_named(dialect),))
    if destination is None:
        route = Route(path=line.path, is_llm=is_llm)
        destination = Destination(dialect=dialect_named(dialect), route=route, candidates=())
    return _intake(Request(line=line, body=body, length=0), destination)


def _intake(request: Request, destination: Destination) -> Intake:
    line = replace(request.line, target=target_without_key(request.line.target))
    body = decoded_body(line, request.body)
    key = request_key(
        dialect=destination.dialect.name, method=line.method, target=line.target, headers=line.headers, body=body
    )
    facts, route = _facts_of(body), destination.route
    hide_usage = destination.dialect.counts_if_asked and facts.stream is True
    options = _options_of(facts)
    hide_usage = hide_usage and not asks_for_usage(options)
    # A compressed body is sent as it is: another one would have to be packed as its client packs.
    may_ask = hide_usage and body is request.body
    return Intake(
        request=replace(request, line=line),
        destination=destination,
        key=key,
        plain_body=body,
        model=route.model or facts.model,
        shape=route.shape or (Shape.EVENTS if facts.stream else Shape.MESSAGE),
        prepared=prepare(request.body),
        hide_usage=hide_usage,
        options=options,
        usage_edit=_edit_of(body, options) if may_ask else None,
    )


def _options_of(facts: _Facts) -> object:
    if facts.stream_options is msgspec.UNSET:
        return msgspec.UNSET
    raw = bytes(facts.stream_options)
    # Few bytes of JSON can become many of objects, and a hostile agent knows that.
    value = json_value(raw) if len(raw) <= OPTIONS_BYTES_MAX else True
    return True if value is None and raw != b"null" else value


def _edit_of(body: bytes, options: object) -> Edit | None:
    return usage_edit(body, options, said=options is not msgspec.UNSET)


def _facts_of(body: bytes) -> _Facts:
    try:
        return msgspec.json.decode(body, type=_Facts)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Facts()
