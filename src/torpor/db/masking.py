"""Masking bytes without changing what is around them: as many bytes, and JSON stays JSON. Pure."""

import bisect
import re
from collections.abc import Iterator

MASK = b"*"
_AROUND = 24
# Part of an escape is never left over: `\"` without its backslash would end the string.
_ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)", re.DOTALL)
_DELTA = re.compile(
    rb'"(text|thinking|content|partial_json|arguments|delta|reasoning|reasoning_content|refusal)"\s*:\s*'
    rb'"((?:[^"\\]|\\.)*+)"'
)
"""Where the events of a streamed answer, in any dialect, carry the next piece of a text."""


def mask(text: bytes, pattern: re.Pattern[bytes]) -> tuple[bytes, list[str]]:
    """The text with every match masked, and each match with what is around it."""
    return _masked(text, _spans(text, pattern))


def mask_answer(body: bytes, pattern: re.Pattern[bytes]) -> tuple[bytes, list[str]]:
    """The same for an answer, also where the text is cut into pieces by the events that carry it."""
    spans = _spans(body, pattern)
    fields: dict[bytes, list[tuple[int, int]]] = {}
    for piece in _DELTA.finditer(body):
        fields.setdefault(piece[1], []).append(piece.span(2))
    for pieces in fields.values():
        if len(pieces) > 1:
            spans += _spans_in_pieces(body, pieces, pattern)
    return _masked(body, sorted(set(spans)))


def shown(text: bytes, start: int, end: int) -> str:
    """A match for a person's eyes: its first and last characters, with what stands around it."""
    found = (
        text[start:end] if end - start <= 2 * _AROUND else text[start : start + _AROUND] + b"..." + text[end - 8 : end]
    )
    return f"{end - start} bytes {found.decode(errors='replace')!r}"


def _spans(text: bytes, pattern: re.Pattern[bytes]) -> list[tuple[int, int]]:
    """Matches that are not empty and not masked already, widened to whole escapes and characters."""
    found = [match.span() for match in pattern.finditer(text) if match[0].strip(MASK)]
    escapes = [escape.span() for escape in _ESCAPE.finditer(text)] if found else []
    return [_whole(text, escapes, *span) for span in found]


def _whole(text: bytes, escapes: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    while start > 0 and 0x80 <= text[start] < 0xC0:
        start -= 1
    while end < len(text) and 0x80 <= text[end] < 0xC0:
        end += 1
    at = max(0, bisect.bisect_right(escapes, (start, 0)) - 1)
    while at < len(escapes) and escapes[at][0] < end:
        if escapes[at][1] > start:
            start, end = min(start, escapes[at][0]), max(end, escapes[at][1])
        at += 1
    return start, end


def _spans_in_pieces(
    body: bytes, pieces: list[tuple[int, int]], pattern: re.Pattern[bytes]
) -> Iterator[tuple[int, int]]:
    """Matches in the pieces' joined text, as spans of the body: one for each piece that has a part."""
    joined = b"".join(body[start:end] for start, end in pieces)
    found = _spans(joined, pattern)
    at = number = 0
    for start, end in pieces:
        length = end - start
        # Both are in order, so a long answer with many matches takes the time of their sum.
        while number < len(found) and found[number][1] <= at:
            number += 1
        here = number
        while here < len(found) and found[here][0] < at + length:
            low, high = max(found[here][0] - at, 0), min(found[here][1] - at, length)
            if low < high:
                yield start + low, start + high
            here += 1
        at += length


def _masked(text: bytes, spans: list[tuple[int, int]]) -> tuple[bytes, list[str]]:
    if not spans:
        return text, []
    masked = bytearray(text)
    for start, end in spans:
        masked[start:end] = MASK * (end - start)
    return bytes(masked), [shown(text, start, end) for start, end in spans]
