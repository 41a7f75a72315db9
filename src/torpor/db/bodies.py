"""Cutting a request body into pieces that come again in the next request. Pure; knows JSON's brackets, not dialects.

An agent sends its whole conversation with every call, so pieces must be cut at the same places each time. Cuts fall
around long strings (so that a moved cache marker or a key in another order costs a few bytes, not the message), around
long arrays of the outermost object and, once a piece is long enough, at the ends of their elements. This is a scan, not
a parser: bytes that are no JSON are cut somewhere else, and joined the pieces are the body, whatever it is.
"""

import re

PIECE_BYTES = 512
PIECES_MAX = 16_384
_TOKENS_MAX = 2_000_000
"""Bounds the time that a hostile body takes; past them it is one piece."""

# A string that nobody ends goes on to the end, or looking for its end would take quadratic time.
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_QUOTE, _OPENING = ord('"'), frozenset(b"[{")


def split(body: bytes) -> list[bytes]:
    """The pieces of a body, in order."""
    cuts = _cuts(body)
    return [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]


def _cuts(body: bytes) -> list[int]:
    """Every place where a cut must be, and those where one may be that end a long enough piece."""
    must, may = _places(body)
    cuts: list[int] = []
    last = 0
    for place in sorted(must.union(may)):
        if place in must or place - last >= PIECE_BYTES:
            if last < place < len(body):
                cuts.append(place)
            last = place
    return cuts if len(cuts) < PIECES_MAX else []


def _places(body: bytes) -> tuple[set[int], list[int]]:
    """Where cuts must be and where they may be."""
    must: set[int] = set()
    may: list[int] = []
    depth = opened = 0
    for count, token in enumerate(_TOKEN.finditer(body)):
        start, end = token.span()
        if count > _TOKENS_MAX:
            return set(), []
        if body[start] == _QUOTE:
            if end - start >= PIECE_BYTES:
                must.update((start, end))
        elif body[start] in _OPENING:
            depth += 1
            if depth == 2:
                opened = end
        else:
            depth -= 1
            if depth == 2:
                may.append(end)
            elif depth == 1 and start - opened >= PIECE_BYTES:
                must.update((opened, start))
    return must, may
