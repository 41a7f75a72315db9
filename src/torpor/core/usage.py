"""Token counts of OpenAI's chat streams, which have them only if asked for: asking, and hiding what nobody wanted.

A request that asks gets one more event before the last, without choices, and `"usage": null` in the others.
`UsageHider` takes both out again, as if nobody had asked. What it gives follows from the bytes alone, not from how they
were cut into pieces, so a restored stream goes on in the middle of it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

OPTIONS, ASKED = b'"stream_options"', b'{"include_usage":true}'
LINE_BYTES_MAX = 1 << 20
"""A longer line is passed on as it comes: it is no count of tokens, and is not kept waiting."""

_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[\[\]{},]', re.DOTALL)
_QUOTE, _COMMA, _OPENING, _ENDING = ord('"'), ord(","), frozenset(b"[{"), frozenset(b",}")
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")
_USAGE, _FIELD, _OBJECT = b'"usage"', b"data:", re.compile(rb"data:\s*+\{")
_CLEAR_NULL = re.compile(
    rb'"usage"\s*+:\s*+null(?:(?=\s*+\}\s*+\Z)|(\s*+,\s*+)'
    rb'(?=(?:"[^"\\]*+"\s*+:\s*+(?:"[^"\\]*+"|[\w.+-]++)\s*+(?:,\s*+|(?=\})))++\}\s*+\Z))'
)
"""A null of which what follows shows that it stands in the outermost object, with the comma behind it; most are so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """Bytes to put in the place of those from `start` to `end`."""

    start: int
    end: int
    new: bytes

    def of(self, body: bytes) -> bytes:
        return body[: self.start] + self.new + body[self.end :]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """A member of an outermost JSON object: its key with the quotes, where it and its value begin, where both end."""

    key: bytes
    start: int
    value: int
    end: int


def asks_for_usage(options: object) -> bool:
    """Whether a request with these `stream_options` gets token counts in its stream."""
    return isinstance(options, dict) and bool(cast("dict[str, object]", options).get("include_usage"))


def usage_edit(body: bytes, options: object, *, said: bool) -> Edit | None:
    """What makes a streaming request ask for token counts, all its other bytes untouched; None if nothing does.

    Args:
        body: a JSON object with a member or more.
        options: its `stream_options`, if `said`.
    """
    if not said:
        at = body.index(b"{") + 1
        return Edit(start=at, end=at, new=OPTIONS + b":" + ASKED + b",")
    found = [member for member in _members(body) if member.key == OPTIONS]
    if len(found) != 1 or not (options is None or isinstance(options, dict)):
        return None
    more = {**cast("dict[str, Any]", options or {}), "include_usage": True}
    return Edit(start=found[0].value, end=found[0].end, new=json.dumps(more).encode())


def refuses_usage(status: int, body: bytes) -> bool:
    """Whether a provider says that it does not know how to be asked."""
    return status in {400, 422} and (b"stream_options" in body or b"include_usage" in body)


class UsageHider:
    """Feed it the pieces of a stream of events in order; it gives what a client gets that did not ask for counts."""

    __slots__ = ("_held", "_long", "_looked", "_swallow")

    def __init__(self) -> None:
        self._held = bytearray()
        self._looked = 0
        self._long = False
        self._swallow = False

    def feed(self, data: bytes) -> bytes:
        """The lines that became whole, without what is hidden."""
        self._held += data
        shown = bytearray()
        start = 0
        while (end := self._held.find(b"\n", max(start, self._looked)) + 1) > 0:
            shown += self._line(bytes(self._held[start:end]))
            start = end
        del self._held[:start]
        if self._long or len(self._held) > LINE_BYTES_MAX:
            shown += self._held
            self._held.clear()
            self._long, self._swallow = True, False
        self._looked = len(self._held)
        return bytes(shown)

    def rest(self) -> bytes:
        """At the proper end: a line that nobody ended."""
        rest = self._line(bytes(self._held))
        self._held.clear()
        return rest

    def _line(self, line: bytes) -> bytes:
        if self._long:
            self._long = False
            return line
        swallowed, self._swallow = self._swallow and _is_blank(line), False
        edit = Edit(start=0, end=len(line), new=b"") if swallowed else _hiding(line)
        if edit is None:
            return line
        # With the event that is hidden goes the empty line that ends it.
        self._swallow = not swallowed and edit.start == 0
        return edit.of(line)


def hidden_alike(true: bytes, masked: bytes) -> bytes:
    """A masked stream that hides as many bytes, line by line, as the true one does, so that offsets in it stay right.

    A line of which the mask would change what is hidden, or where it ends, is masked whole.
    """
    alike = bytearray()
    for line in _LINES.findall(true):
        found = masked[len(alike) : len(alike) + len(line)]
        alike += found if _effect(found) == _effect(line) else _masked_line(line)
    return bytes(alike)


def _hiding(line: bytes) -> Edit | None:
    """What is taken out of a line; from its start on, the whole of it."""
    if _OBJECT.match(line) is None or _USAGE not in line or len(line) > LINE_BYTES_MAX:
        return None
    at = line.index(_USAGE)
    if (clear := _CLEAR_NULL.match(line, at)) is not None and line.count(_USAGE) == 1:
        return Edit(start=at if clear[1] else _before_comma(line, at), end=clear.end(), new=b"")
    try:
        event = json.loads(line[len(_FIELD) :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or "usage" not in event:
        return None
    said = cast("Mapping[str, Any]", event)
    if isinstance(said["usage"], dict) and said.get("choices") == []:
        return Edit(start=0, end=len(line), new=b"")
    return _without_member(line, _USAGE) if said["usage"] is None else None


def _without_member(text: bytes, key: bytes) -> Edit | None:
    """The edit that takes a member, with a comma, out of the object in a text; None if it does not stand there once."""
    members = _members(text)
    found = [number for number, member in enumerate(members) if member.key == key]
    if len(found) != 1:
        return None
    number, member = found[0], members[found[0]]
    if number + 1 < len(members):
        return Edit(start=member.start, end=members[number + 1].start, new=b"")
    return Edit(start=_before_comma(text, member.start), end=member.end, new=b"")


def _before_comma(text: bytes, at: int) -> int:
    """Where a comma begins that stands before a place, with the blanks around it; the place itself if there is none."""
    before = text[:at].rstrip()
    return len(before[:-1].rstrip()) if before.endswith(b",") else at


def _members(text: bytes) -> list[_Member]:
    """The members of the one JSON object in a text, which is known to be well formed."""
    found: list[_Member] = []
    depth = 0
    key: re.Match[bytes] | None = None
    for token in _TOKEN.finditer(text):
        mark = text[token.start()]
        ends = depth == 1 and mark in _ENDING
        if key is not None and ends:
            said = text[text.index(b":", key.end()) + 1 : token.start()].lstrip()
            value = token.start() - len(said)
            found.append(_Member(key=key[0], start=key.start(), value=value, end=value + len(said.rstrip())))
            key = None
        if mark == _QUOTE:
            key = token if depth == 1 and key is None else key
        elif mark != _COMMA:
            depth += 1 if mark in _OPENING else -1
    return found


def _is_blank(line: bytes) -> bool:
    return len(line) <= LINE_BYTES_MAX and not line.strip()


def _effect(line: bytes) -> tuple[bool, bool, bool, int]:
    """How many bytes of a line are hidden, and what else the lines around it depend on."""
    edit = _hiding(line)
    hidden = 0 if edit is None else edit.end - edit.start
    return line.endswith(b"\n"), _is_blank(line), hidden == len(line), hidden


def _masked_line(line: bytes) -> bytes:
    content = line.rstrip(b"\r\n")
    ending = line[len(content) :]
    edit = _hiding(line)
    if edit is None:
        return b"*" * len(content) + ending
    if edit.start == 0:
        opening, closing = b'data:{"choices":[],"usage":{', b"}}"
        return opening + b" " * (len(content) - len(opening) - len(closing)) + closing + ending
    hidden = b'"usage":' + b"null".rjust(edit.end - edit.start - len(b'"usage":'))
    opening = b"data:{".ljust(len(content) - len(hidden) - 1)
    return opening + hidden + b"}" + ending
