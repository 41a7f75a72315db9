"""Cutting a request body into pieces that come again in the next request. Pure; knows JSON, not dialects.

An agent sends its whole conversation with every call, so pieces must be cut at the same places each time. Cuts fall
around long strings (so that a moved cache marker or a key in another order costs a few bytes, not the message) and,
once a piece is long enough, at the ends of elements of top-level arrays. Pieces are slices of the body: joined, they
are the body, whatever it is. What is not a JSON object is one piece.
"""

import json
import re
from collections.abc import Iterator

PIECE_BYTES = 512
PIECES_MAX = 16_384

_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SPACE = re.compile(r"[ \t\n\r]*+")
# Digits are not turned into numbers: nobody looks at them, and long ones are slow.
_decoder = json.JSONDecoder(parse_int=len, parse_float=len, parse_constant=len)


def split(body: bytes) -> list[bytes]:
    """The pieces of a body, in order."""
    # As Latin-1 every byte is one character: positions agree, no body fails to decode, and JSON's syntax is ASCII.
    text = body.decode("latin-1")
    try:
        soft = list(_element_ends(text))
    except (ValueError, RecursionError):
        return [body]
    cuts = _cuts(len(body), soft, _long_strings(text))
    return [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]


def _cuts(size: int, soft: list[int], hard: list[int]) -> list[int]:
    """Every hard cut, and the soft ones that end a piece of at least PIECE_BYTES."""
    hard_cuts = set(hard)
    cuts: list[int] = []
    last = 0
    for cut in sorted(hard_cuts.union(soft)):
        if cut in hard_cuts or cut - last >= PIECE_BYTES:
            if last < cut < size:
                cuts.append(cut)
            last = cut
    return cuts if len(cuts) < PIECES_MAX else []


def _long_strings(text: str) -> list[int]:
    """Where strings of at least PIECE_BYTES begin and end."""
    return [
        position
        for match in _STRING.finditer(text)
        if match.end() - match.start() >= PIECE_BYTES
        for position in match.span()
    ]


def _element_ends(text: str) -> Iterator[int]:
    """Positions within the arrays of the outermost object: behind "[" and behind each element.

    Raises:
        ValueError, RecursionError: not a JSON object, or one that can't be parsed.
    """
    at = _expect(text, _skip(text, 0), "{")
    while True:
        at = _value_end(text, _skip(text, at))
        at = _skip(text, _expect(text, _skip(text, at), ":"))
        if text.startswith("[", at):
            at += 1
            yield at
            while not text.startswith("]", _skip(text, at)):
                at = _value_end(text, _skip(text, at))
                yield at
                at = _skip(text, at)
                if text.startswith(",", at):
                    at += 1
            at = _skip(text, at) + 1
        else:
            at = _value_end(text, at)
        at = _skip(text, at)
        if text.startswith("}", at):
            return
        at = _expect(text, at, ",")


def _value_end(text: str, at: int) -> int:
    """Where the JSON value ends that begins at `at`."""
    return _decoder.raw_decode(text, at)[1]


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _expect(text: str, at: int, character: str) -> int:
    if not text.startswith(character, at):
        raise ValueError(f"no {character!r} at {at}")
    return at + 1
