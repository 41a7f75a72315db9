"""Erasing content for good: finding what fits, and putting a mask of the same length in its place.

A mask keeps every length, and so the chain's digests of layouts, the offsets of half delivered answers, and JSON. The
event session.redacted names the digest of each mask: content that is masked without such an event is damage. Events
themselves, and images from before, keep what they hold; a plan says which events.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torpor.core.call import Attempt
from torpor.core.errors import Conflict, Damaged, NotFound
from torpor.core.events import Event, EventDraft, Kind, canonical_json
from torpor.core.ids import CallId, SessionId
from torpor.core.usage import hidden_alike
from torpor.db import answers, blocks, notes, outputs, requests
from torpor.db.blobs import Stored
from torpor.db.calls import load_calls, tear_open
from torpor.db.database import Transaction
from torpor.db.fence import held_row
from torpor.db.log import append, events
from torpor.db.masking import MASK, mask, mask_answer, shown

Answer = tuple[CallId, int]
"""A call and the number of an attempt."""


@dataclass(slots=True)
class Plan:
    """What a redaction would mask: the content as it will be, by where it is.

    Attributes:
        places: for people, each match with what is around it.
        unread: for people, what can't be looked into, since it is damaged.
        stored: masked contents that were stored ahead of the transaction (`db.ahead`), by their digest.
        kept: seqs of events that hold what fits themselves; the chain would not stand their change.
    """

    blocks: dict[bytes, bytes] = field(default_factory=dict[bytes, bytes])
    answers: dict[Answer, bytes] = field(default_factory=dict[Answer, bytes])
    output: dict[tuple[int, int, int], bytes] = field(default_factory=dict[tuple[int, int, int], bytes])
    places: list[str] = field(default_factory=list[str])
    unread: list[str] = field(default_factory=list[str])
    stored: dict[bytes, Stored] = field(default_factory=dict[bytes, Stored])
    kept: list[int] = field(default_factory=list[int])

    def __bool__(self) -> bool:
        return bool(self.blocks or self.answers or self.output)


def plan_block(tx: Transaction, session_id: SessionId, digest: bytes) -> Plan:
    """The whole of one block, or of every answer with this digest.

    Raises:
        NotFound: `block_not_found`.
        Conflict: `block_redacted`; `manifest_kept`, without a manifest no request comes together.
    """
    plan = Plan()
    for call in load_calls(tx, session_id):
        request = requests.find(tx, call.call_id)
        if request is not None and request.manifest == digest:
            raise Conflict("manifest_kept", f"cannot redact block {digest.hex()}: it lists a request's pieces")
        for attempt in call.attempts:
            body = _answer(tx, call.call_id, attempt.number, plan)
            if body and blocks.digest_of(body) == digest:
                plan.answers[call.call_id, attempt.number] = _as_long_as(attempt, body, MASK * len(body))
                plan.places.append(f"answer of {call.call_id}, attempt {attempt.number}: {len(body)} bytes")
    if tx.one("block/find", session_id=session_id, digest=digest) is not None:
        content = blocks.get(tx, session_id, digest)
        plan.blocks[digest] = MASK * len(content)
        plan.places.append(f"block {digest.hex()}: {shown(content, 0, len(content))}")
    if not plan:
        raise NotFound("block_not_found", f"cannot redact {digest.hex()}: session {session_id} has no such content")
    return plan


def plan_pattern(tx: Transaction, session_id: SessionId, pattern: re.Pattern[bytes]) -> Plan:
    """Everything that fits a pattern: in requests, in answers (also where events cut a text apart), notes, output."""
    plan = Plan()
    pairs: set[tuple[bytes, bytes]] = set()
    for call in load_calls(tx, session_id):
        request = requests.find(tx, call.call_id)
        if request is not None:
            _plan_blocks(tx, session_id, [request.head_digest], pattern, plan, what="request")
            try:
                pieces = requests.pieces_of(requests.read_list(tx, session_id, request.manifest))
            except Damaged as damaged:
                plan.unread.append(str(damaged))
                pieces = []
            for run in _fresh_runs(pieces, pairs):
                _plan_blocks(tx, session_id, run, pattern, plan, what="request")
        for attempt in call.attempts:
            body = _answer(tx, call.call_id, attempt.number, plan)
            masked, places = mask_answer(body, pattern)
            if places:
                plan.answers[call.call_id, attempt.number] = _as_long_as(attempt, body, masked)
                plan.places += [f"answer of {call.call_id}: {place}" for place in places]
    for event in events(tx, session_id):
        note = notes.block_of(event)
        if note is not None:
            _plan_blocks(tx, session_id, [note], pattern, plan, what="note")
        found = pattern.finditer(canonical_json(dict(event.data)).encode("utf-8", "surrogatepass"))
        if any(match[0] for match in found):
            plan.kept.append(event.seq)
    for channel in (outputs.STDOUT, outputs.STDERR):
        _plan_output(tx, session_id, channel, pattern, plan)
    return plan


def _as_long_as(attempt: Attempt, body: bytes, masked: bytes) -> bytes:
    """A masked answer of which an agent gets as many bytes as of the true one: it may have taken some of them."""
    asked = attempt.head is not None and attempt.head.usage_asked
    return hidden_alike(body, masked) if asked else masked


def apply(tx: Transaction, *, session_id: SessionId, owner_token: int, plan: Plan, wall_ns: int) -> Event:
    """Carry a plan out, with its event: all in one transaction, so a crash leaves all of it or nothing."""
    owner: dict[str, Any] = {"session_id": session_id, "owner_token": owner_token}
    row = held_row(tx, session_id, owner_token)
    tear_open(tx, **owner, wall_ns=wall_ns)  # their pumps died with their node; what came of them is closed now
    for digest, masked in plan.blocks.items():
        stored = plan.stored.get(blocks.digest_of(masked))
        blocks.redact(tx, **owner, digest=digest, masked=masked, stored=stored)
    for (call_id, attempt), masked in plan.answers.items():
        stored = plan.stored.get(blocks.digest_of(masked))
        answers.redact(tx, **owner, call_id=call_id, attempt=attempt, masked=masked, stored=stored)
    for (channel, incarnation, position), masked in plan.output.items():
        tx.run(
            "output/redact_fenced", **owner, channel=channel, incarnation=incarnation, position=position, data=masked
        )
    data = {
        "blocks": {digest.hex(): blocks.digest_of(masked).hex() for digest, masked in plan.blocks.items()},
        "answers": [
            [call_id, attempt, blocks.digest_of(masked).hex()] for (call_id, attempt), masked in plan.answers.items()
        ],
        "output_pieces": len(plan.output),
    }
    draft = EventDraft(kind=Kind.SESSION_REDACTED, incarnation=row["incarnation"], data=data)
    return append(tx, **owner, drafts=[draft], wall_ns=wall_ns)[0]


def masks(logged: Iterable[Event]) -> dict[str | Answer, str]:
    """The digest (hex) of each mask by what it masks (a block's digest in hex, or an answer); the last one counts."""
    told: dict[str | Answer, str] = {}
    for event in logged:
        if event.kind is Kind.SESSION_REDACTED:
            told.update(event.data["blocks"])
            told.update({(CallId(call_id), attempt): digest for call_id, attempt, digest in event.data["answers"]})
    return told


def _fresh_runs(pieces: list[bytes], pairs: set[tuple[bytes, bytes]]) -> Iterator[list[bytes]]:
    """The stretches of a body in which two pieces stand side by side that did not before.

    A conversation is sent again and again: so each piece, and each seam, is looked at once.
    """
    run: list[bytes] = []
    previous = b""
    for piece in pieces:
        if (previous, piece) in pairs:
            if run:
                yield run
            run = []
        else:
            pairs.add((previous, piece))
            run = [*run, piece] if run or not previous else [previous, piece]
        previous = piece
    if run:
        yield run


def _answer(tx: Transaction, call_id: CallId, attempt: int, plan: Plan) -> bytes:
    """An attempt's bytes; none if they can't be read: what is damaged keeps nobody from erasing the rest."""
    try:
        return b"".join(chunk.data for chunk in answers.load(tx, call_id, attempt)[0])
    except Damaged as damaged:
        plan.unread.append(str(damaged))
        return b""


def _plan_blocks(
    tx: Transaction, session_id: SessionId, run: list[bytes], pattern: re.Pattern[bytes], plan: Plan, *, what: str
) -> None:
    """Mask what fits in pieces that stand side by side; one that can't be read parts them."""
    try:
        contents = blocks.read_many(tx, session_id, run)
    except Damaged:
        for readable in _readable_runs(tx, session_id, run, plan):
            _plan_blocks(tx, session_id, readable, pattern, plan, what=what)
        return
    text = b"".join(contents[digest].data for digest in run)
    masked, places = mask(text, pattern)
    if not places:
        return
    plan.places += [f"{what}: {place}" for place in places]
    at = 0
    for digest in run:
        end = at + len(contents[digest].data)
        if masked[at:end] != text[at:end]:
            before = plan.blocks.get(digest, contents[digest].data)
            plan.blocks[digest] = _both(before, masked[at:end], contents[digest].data)
        at = end


def _readable_runs(tx: Transaction, session_id: SessionId, run: list[bytes], plan: Plan) -> Iterator[list[bytes]]:
    """What is left of a run without the pieces that can't be read."""
    readable: list[bytes] = []
    for digest in run:
        try:
            blocks.read_many(tx, session_id, [digest])
        except Damaged as damaged:
            plan.unread.append(str(damaged))
            if readable:
                yield readable
            readable = []
        else:
            readable.append(digest)
    if readable:
        yield readable


def _both(one: bytes, other: bytes, original: bytes) -> bytes:
    """What either of two maskings of one text has masked."""
    if one == original:
        return other
    pairs = zip(one, other, original, strict=True)
    return bytes(b if a == o else a for a, b, o in pairs)


def _plan_output(tx: Transaction, session_id: SessionId, channel: int, pattern: re.Pattern[bytes], plan: Plan) -> None:
    """Every row of a channel, also those that a later incarnation supersedes."""
    rows = tx.all("output/list_rows", session_id=session_id, channel=channel)
    text = b"".join(bytes(row["data"]) for row in rows)
    masked, places = mask(text, pattern)
    plan.places += [f"{'stdout' if channel == outputs.STDOUT else 'stderr'}: {place}" for place in places]
    at = 0
    for row in rows:
        end = at + len(row["data"])
        if masked[at:end] != text[at:end]:
            plan.output[channel, row["incarnation"], row["position"]] = masked[at:end]
        at = end
