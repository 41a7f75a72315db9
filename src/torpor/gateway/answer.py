"""Reads a copy of an upstream's answer as it passes: usage, finish reason, and whether it was complete.

Nothing here can disturb the bytes. What can't be read (an unknown encoding, an event beyond every bound) makes the
reader blind, and a blind reader believes the transport that the answer was complete.
"""

import zlib
from collections.abc import Mapping
from typing import Any

from torpor.gateway.dialects.base import AnswerFacts, Dialect, items, mapping
from torpor.gateway.dialects.sse import EventSplitter, json_object, json_value

EVENT_BYTES_MAX = 16 << 20
MESSAGE_BYTES_MAX = 64 << 20

_UNREADABLE = (AttributeError, LookupError, TypeError, ValueError, zlib.error)
"""What a provider's JSON of an unexpected build, or its damaged compression, can raise."""


class AnswerReader:
    """Feed it the body of one answer in order, then ask `complete`."""

    def __init__(self, dialect: Dialect, *, status: int, headers: Mapping[str, str], is_llm: bool) -> None:
        self.facts = AnswerFacts()
        self._dialect = dialect
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        self._is_message = kind == "application/json"
        encoding = headers.get("content-encoding", "identity").lower()
        self._inflate = zlib.decompressobj(wbits=47) if encoding in {"gzip", "x-gzip", "deflate"} else None
        decodable = encoding == "identity" or self._inflate is not None
        # A stream of events that is only read again (a kept response) must not end early either.
        speaks = kind == "text/event-stream" or (self._is_message and is_llm)
        self._blind = not (decodable and speaks and 200 <= status < 300 and not dialect.opaque)
        self._splitter = EventSplitter()
        self._message = bytearray()

    def feed(self, data: bytes) -> None:
        if self._blind:
            return
        try:
            self._read(self._decoded(data))
        except _UNREADABLE:
            self._blind = True
        if len(self._message) > MESSAGE_BYTES_MAX or self._splitter.buffered_bytes > EVENT_BYTES_MAX:
            self._blind = True
            self._message.clear()

    def complete(self) -> bool:
        """Whether an answer whose transport ended properly lacks nothing."""
        if not self._blind and self._is_message:
            try:
                self._read_message(json_value(bytes(self._message)))
            except _UNREADABLE:
                self._blind = True
        return self._blind or self.facts.terminal

    def _read_message(self, value: Any) -> None:
        if isinstance(value, list):
            # A stream of events in one array: that it is whole JSON says that none is missing.
            for event in items(value):  # pyright: ignore[reportUnknownArgumentType]
                self._dialect.read_event(mapping(event), self.facts)
                _note_terms(mapping(event), self.facts)
            self.facts.terminal = True
        elif isinstance(value, dict):
            self._dialect.read_message(mapping(value), self.facts)  # pyright: ignore[reportUnknownArgumentType]
            _note_terms(mapping(value), self.facts)  # pyright: ignore[reportUnknownArgumentType]

    def _read(self, plain: bytes) -> None:
        if self._is_message:
            self._message += plain
            return
        for raw in self._splitter.feed(plain):
            self._read_event(raw)

    def _decoded(self, data: bytes) -> bytes:
        if self._inflate is None:
            return data
        plain = self._inflate.decompress(data, MESSAGE_BYTES_MAX)
        if self._inflate.unconsumed_tail:
            raise zlib.error("it unpacks to more than we look at")
        return plain

    def _read_event(self, raw: bytes) -> None:
        if self._dialect.last_event is not None and raw.strip() == self._dialect.last_event:
            self.facts.terminal = True
        elif (event := json_object(raw)) is not None:
            self._dialect.read_event(event, self.facts)
            _note_terms(event, self.facts)


def _note_terms(said: Mapping[str, Any], facts: AnswerFacts) -> None:
    """The terms that an answer was made on, which every API says beside its usage or in it; the last word counts."""
    for place in (said, mapping(said.get("message")), mapping(said.get("response"))):
        for source in (place, mapping(place.get("usage"))):
            facts.terms |= {name: source[name] for name in _TERMS if isinstance(source.get(name), str)}


_TERMS = ("service_tier", "speed")
