"""Checking a session's whole log against itself: the chain, the tree, and everything that its digests stand for.

Nothing is repaired and nothing is raised: what is wrong is listed, as far as it can be read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from torpor.core.call import Call, CallState
from torpor.core.errors import Damaged
from torpor.core.events import CONTEXT_KINDS, GENESIS_HASH, Event, EventDraft, Kind, event_hash
from torpor.core.ids import SessionId
from torpor.core.money import dollars_text
from torpor.db import answers, blocks, log, notes, redaction, requests
from torpor.db.call_rows import body_facts, head_digest, intent_data
from torpor.db.calls import load_calls
from torpor.db.checkpoints import commit_data, list_intact
from torpor.db.database import Row, Transaction
from torpor.db.log import EVERYTHING, event_of

Masks: TypeAlias = "Mapping[str | redaction.Answer, str]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is not as it was written, and the event that says how it was."""

    code: str
    seq: int | None
    text: str


def verify_chain(tx: Transaction, session_id: SessionId) -> list[Problem]:
    """Everything that is wrong with a session's log; empty when all is as it was written."""
    session = tx.one("session/find_by_id", session_id=session_id)
    if session is None:
        return [Problem(code="session_missing", seq=None, text=f"there is no session {session_id}")]
    rows = tx.all("log/list_events", session_id=session_id, after_seq=0, row_limit=EVERYTHING)
    problems = list(_chain_problems(session, rows))
    if problems:
        return problems  # what follows believes the events
    events = {event.seq: event for event in map(event_of, rows)}
    masks = redaction.masks(events.values())
    return [
        *_tree_problems(session, events),
        *_call_problems(tx, session_id, events, masks),
        *_note_problems(tx, events, masks),
        *_checkpoint_problems(tx, session_id, events),
    ]


def _chain_problems(session: Row, rows: list[Row]) -> Iterator[Problem]:
    """Gaps, links, hashes and the head."""
    prev_hash = GENESIS_HASH
    for expected, row in enumerate(rows, 1):
        seq = row["seq"]
        if seq != expected:
            yield Problem(code="event_missing", seq=seq, text=f"event {expected} is missing")
            return
        if row["prev_hash"] != prev_hash:
            yield Problem(code="chain_broken", seq=seq, text="it does not follow the event before it")
        prev_hash = row["hash"]
        if _recomputed(row) != row["hash"]:
            yield Problem(code="event_changed", seq=seq, text="it is not what was written")
    if (session["head_seq"], session["head_hash"]) != (len(rows), prev_hash):
        yield Problem(code="head_wrong", seq=session["head_seq"], text=f"the last event is {len(rows)}")


def _recomputed(row: Row) -> str | None:
    """The hash of a row's fields; None if they are no event."""
    try:
        event = event_of(row)
        draft = EventDraft(
            kind=event.kind,
            incarnation=event.incarnation,
            call_id=event.call_id,
            parent_seq=event.parent_seq,
            data=event.data,
            refs=event.refs,
        )
        return event_hash(
            session_id=event.session_id, seq=event.seq, draft=draft, wall_ns=event.wall_ns, prev_hash=event.prev_hash
        )
    except (ValueError, TypeError):
        return None


def _tree_problems(session: Row, events: Mapping[int, Event]) -> Iterator[Problem]:
    """Parents are older context events, so there is no cycle; only the root has none."""
    for seq, event in events.items():
        parent = None if event.parent_seq is None else events.get(event.parent_seq)
        if event.kind not in CONTEXT_KINDS or event.kind is Kind.SESSION_CREATED:
            if event.parent_seq is not None:
                yield Problem(code="parent_wrong", seq=seq, text=f"{event.kind} has a parent")
        elif parent is None or parent.seq >= seq or parent.kind not in CONTEXT_KINDS:
            yield Problem(code="parent_wrong", seq=seq, text=f"{event.parent_seq} is not an older context event")
    told = events[1].data.get("parent") if events else None
    named: Mapping[str, Any] = cast("Mapping[str, Any]", told) if isinstance(told, dict) else {}
    if (named.get("session"), named.get("seq")) != (session["parent_id"], session["forked_at_seq"]):
        yield Problem(code="lineage_wrong", seq=1, text=f"the row says that it comes from {session['parent_id']}")
    cursor = events.get(session["cursor_seq"])
    if events and (cursor is None or cursor.kind not in CONTEXT_KINDS):
        yield Problem(code="cursor_wrong", seq=session["cursor_seq"], text="the cursor is on no context event")


def count_redacted(tx: Transaction, session_id: SessionId) -> int:
    """How many blocks and answers of a session were masked."""
    return len(redaction.masks(log.events(tx, session_id)))


def _call_problems(
    tx: Transaction, session_id: SessionId, events: Mapping[int, Event], masks: Masks
) -> Iterator[Problem]:
    calls = {call.call_id: call for call in load_calls(tx, session_id)}
    seen: set[bytes] = set()
    ended: set[str] = set()
    told: set[redaction.Answer] = set()
    for seq, event in events.items():
        call = calls.get(event.call_id) if event.call_id is not None else None
        if event.call_id is not None and call is None:
            yield Problem(code="call_missing", seq=seq, text=f"there is no call {event.call_id}")
            continue
        if call is None:
            continue
        match event.kind:
            case Kind.CALL_INTENDED:
                yield from _intent_problems(tx, call, event, masks, seen)
            case Kind.CALL_ANSWERING:
                yield from _head_problems(call, event)
            case Kind.CALL_COMPLETED | Kind.CALL_FAILED | Kind.CALL_TORN:
                if event.kind is not Kind.CALL_TORN:
                    ended.add(call.call_id)
                told.add((call.call_id, event.data.get("attempt", 0)))
                yield from _response_problems(tx, call, event, masks)
            case _:
                pass
    for call in calls.values():
        for attempt in call.attempts:
            if (call.call_id, attempt.number) not in told:
                yield from _rest_problems(tx, call, attempt.number)
        if (call.state in {CallState.ANSWERED, CallState.FAILED}) != (call.call_id in ended):
            text = f"call {call.call_id} is {call.state} without an event that says so, or the other way round"
            yield Problem(code="call_state_wrong", seq=call.ended_seq, text=text)


def _intent_problems(tx: Transaction, call: Call, event: Event, masks: Masks, seen: set[bytes]) -> Iterator[Problem]:
    """The call and its request are what was intended; every block is as it was written, or as it was masked."""
    if call.intended_seq != event.seq or any(event.data[name] != value for name, value in intent_data(call).items()):
        yield Problem(code="call_changed", seq=event.seq, text=f"call {call.call_id} is not what was intended")
    request = requests.find(tx, call.call_id)
    if request is None or request.facts != event.data["request"] or event.refs != (request.manifest.hex(),):
        yield Problem(code="request_changed", seq=event.seq, text=f"the request of {call.call_id} is not as written")
        return
    try:
        digests = requests.pieces_of(requests.read_list(tx, call.session_id, request.manifest))
    except Damaged as error:
        yield Problem(code="request_damaged", seq=event.seq, text=str(error))
        return
    heads = [request.head_digest] if request.head_is_block else []
    fresh = [digest for digest in dict.fromkeys([*digests, *heads]) if digest not in seen]
    seen.update(fresh)
    yield from _block_problems(tx, event, fresh, masks, code="request_damaged")


def _block_problems(
    tx: Transaction, event: Event, digests: list[bytes], masks: Masks, *, code: str
) -> Iterator[Problem]:
    """Each block is as it was written, or as it was masked; else `code`."""
    for digest, content in _readable(tx, event.session_id, digests):
        if isinstance(content, Damaged):
            yield Problem(code=code, seq=event.seq, text=str(content))
        elif content.redacted and masks.get(digest.hex()) != blocks.digest_of(content.data).hex():
            text = f"block {digest.hex()} is masked, and no event says so"
            yield Problem(code="redaction_unknown", seq=event.seq, text=text)


def _readable(
    tx: Transaction, session_id: SessionId, digests: list[bytes]
) -> Iterator[tuple[bytes, blocks.Content | Damaged]]:
    """Each block's content, or what is wrong with it. All at once, unless something is."""
    try:
        contents = blocks.read_many(tx, session_id, digests)
    except Damaged:
        contents = {}
    for digest in digests:
        try:
            content = contents.get(digest)
            if content is None or not (content.redacted or blocks.digest_of(content.data) == digest):
                content = blocks.read(tx, session_id, digest)
            yield digest, content
        except Damaged as error:
            yield digest, error


def _note_problems(tx: Transaction, events: Mapping[int, Event], masks: Masks) -> Iterator[Problem]:
    """The text of each note is as it was written, or as it was masked."""
    for event in events.values():
        digest = notes.block_of(event)
        if digest is not None:
            yield from _block_problems(tx, event, [digest], masks, code="note_damaged")


def _rest_problems(tx: Transaction, call: Call, number: int) -> Iterator[Problem]:
    """Of an attempt that broke off no event has a digest; what came of it can be read all the same."""
    try:
        answers.load(tx, call.call_id, number)
    except Damaged as error:
        yield Problem(code="response_changed", seq=call.ended_seq, text=str(error))


def _head_problems(call: Call, event: Event) -> Iterator[Problem]:
    attempts = {attempt.number: attempt for attempt in call.attempts}
    attempt = attempts.get(event.data["attempt"])
    if attempt is None or attempt.head is None or head_digest(attempt.head) != event.data["head_digest"]:
        yield Problem(code="head_changed", seq=event.seq, text=f"a response head of {call.call_id} is not as written")


def _response_problems(tx: Transaction, call: Call, event: Event, masks: Masks) -> Iterator[Problem]:
    """The answer is what the event says of it; of a masked one, all but the bytes."""
    if "digest" not in event.data:
        return
    number = event.data["attempt"]
    try:
        chunks, redacted = answers.load(tx, call.call_id, number)
    except Damaged as error:
        yield Problem(code="response_changed", seq=event.seq, text=str(error))
        return
    facts = body_facts(chunks)
    if redacted and masks.get((call.call_id, number)) != facts.pop("digest"):
        text = f"the answer of {call.call_id} is masked, and no event says so"
        yield Problem(code="redaction_unknown", seq=event.seq, text=text)
    elif any(event.data[name] != value for name, value in facts.items()):
        yield Problem(code="response_changed", seq=event.seq, text=f"the answer of {call.call_id} is not as written")
    if "head_digest" in event.data:
        yield from _head_problems(call, event)
    elif "cost" in event.data:
        billed = next((one.cost_nanousd for one in call.attempts if one.number == event.data["attempt"]), None)
        if (None if billed is None else dollars_text(billed)) != event.data["cost"]:
            yield Problem(code="cost_changed", seq=event.seq, text=f"the cost of {call.call_id} is not as written")


def _checkpoint_problems(tx: Transaction, session_id: SessionId, events: Mapping[int, Event]) -> Iterator[Problem]:
    """Each checkpoint's commit is in the log, behind its cut, and where its row was moved since, that is too."""
    moved = {
        event.data["checkpoint"]: event.data for event in events.values() if event.kind is Kind.CHECKPOINT_REPACKED
    }
    for point in list_intact(tx, session_id, branches=True):
        event = events.get(point.committed_seq)
        told = {**(event.data if event else {}), **moved.get(point.checkpoint_id, {})}
        if event is None or point.seq >= point.committed_seq or told != commit_data(point):
            text = f"checkpoint {point.checkpoint_id} is not as its commit says"
            yield Problem(code="checkpoint_changed", seq=point.committed_seq, text=text)
