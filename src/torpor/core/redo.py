"""Which call in the log answers a request, if any (RECOVERY 5): the redo set of one incarnation, and its joins.

A `RedoSet` holds three kinds of calls. *Pending*: made after the cut that this incarnation came from, so the agent is
expected to make them again. *Joinable*: nobody waits for them, but an equal request is theirs. *Attached*: a stream is
receiving the answer, so no other request may have it. Matching is by set, first-in first-out among equals; there are no
positions. Pure: the caller logs what it decides.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torpor.core.branch import Timeline
from torpor.core.call import Call, CallState, RequestKey, changes_outside, only_reads
from torpor.core.checkpoint import Checkpoint
from torpor.core.events import Event, Kind
from torpor.core.ids import CallId
from torpor.core.join import StreamEnd, may_join

LEVELS = ("exact", "canonical", "logical")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedoEntry:
    """What matching needs to know of a call. `intended_seq` orders equals."""

    call_id: CallId
    key: RequestKey
    intended_seq: int
    is_llm: bool = True
    method: str = "POST"
    target: str = ""

    @property
    def repeats_safely(self) -> bool:
        """It read something outside, so a fresh answer is better than an old one once the agent took another path."""
        return not self.is_llm and only_reads(self.method, self.target)

    @property
    def is_effect(self) -> bool:
        return not self.is_llm and changes_outside(self.method, self.target)


def entry_of(call: Call) -> RedoEntry:
    return RedoEntry(
        call_id=call.call_id,
        key=call.key,
        intended_seq=call.intended_seq,
        is_llm=call.is_llm,
        method=call.method,
        target=call.target,
    )


class RedoSet:
    """What may answer the calls of one incarnation. `diverged` says that the agent took another path since its cut."""

    __slots__ = ("_attached", "_by_key", "_expected", "_offered", "diverged")

    def __init__(
        self,
        pending: Iterable[RedoEntry] = (),
        *,
        joinable: Iterable[RedoEntry] = (),
        attached: Iterable[RedoEntry] = (),
    ) -> None:
        self.diverged = False
        self._attached = {entry.call_id: entry for entry in attached}
        self._offered: dict[CallId, RedoEntry] = {}
        self._by_key: dict[tuple[str, str], list[RedoEntry]] = {}
        self._expected: set[CallId] = set()
        for entry in pending:
            self._offer(entry)
            self._expected.add(entry.call_id)
        for entry in joinable:
            self._offer(entry)

    def match(self, key: RequestKey) -> CallId | None:
        """The call that answers this request, which is attached to it from now on; None is a new call.

        The first None while calls are pending is the divergence: `diverged` becomes true, nothing is pending any more.
        """
        entry = self._find(key)
        if entry is not None:
            self.attach(entry)
            return entry.call_id
        if self._expected:
            self.diverge()
        return None

    def offers(self, key: RequestKey) -> bool:
        """Whether a call answers this request."""
        return self._find(key) is not None

    def leaves_path(self, key: RequestKey) -> bool:
        """Whether `match` of this request would be the divergence: a policy decides about it before it is matched."""
        return bool(self._expected) and self._find(key) is None

    def attach(self, entry: RedoEntry) -> None:
        """A stream receives this call's answer: a new call, or one that `match` found."""
        self._withdraw(entry.call_id)
        self._attached[entry.call_id] = entry

    def ended(self, call_id: CallId, end: StreamEnd) -> None:
        """The stream attached to a call ended: the answer is consumed, or waits for the client's retry.

        Say it once for each stream, before any later request is matched, and only of the stream that got the call last.
        """
        entry = self._attached.pop(call_id, None)
        if entry is not None and may_join(end):
            self._offer(entry)

    def offer(self, entry: RedoEntry) -> None:
        """An equal request gets this call's answer; nobody waits for it."""
        self._offer(entry)

    def failed(self, call_id: CallId) -> None:
        """The call failed for good: an equal request is a new call."""
        self._attached.pop(call_id, None)
        self._withdraw(call_id)

    def lost(self, call_id: CallId, *, expected: bool) -> None:
        """The answer of a call that was just matched can't be read: it answers nothing any more.

        Args:
            expected: it was pending before. It still is, so whoever makes the call anew leaves the log's path.
        """
        entry = self._attached.pop(call_id)
        if expected:
            self._offered[call_id] = entry
            self._expected.add(call_id)

    def diverge(self) -> None:
        """The agent is on another path: pending calls stay matchable, but nobody waits for them.

        Only what was merely read outside is let go, since an old answer would be worse than a new request.
        """
        self.diverged = True
        for call_id in self._expected.copy():
            if self._offered[call_id].repeats_safely:
                self._withdraw(call_id)
        self._expected.clear()

    @property
    def pending(self) -> tuple[CallId, ...]:
        """Calls that the agent is expected to make again, oldest first: a checkpoint's `pending_redo`."""
        return tuple(entry.call_id for entry in self._oldest_first() if entry.call_id in self._expected)

    @property
    def joinable(self) -> tuple[CallId, ...]:
        """Calls that answer an equal request but are not waited for, oldest first: a checkpoint's `joinable`."""
        return tuple(entry.call_id for entry in self._oldest_first() if entry.call_id not in self._expected)

    @property
    def attached(self) -> frozenset[CallId]:
        """Calls that have a stream now."""
        return frozenset(self._attached)

    @property
    def orphans(self) -> tuple[CallId, ...]:
        """After a divergence: effects that happened, and that the agent may not know of. Policy decides about them."""
        if not self.diverged:
            return ()
        return tuple(entry.call_id for entry in self._oldest_first() if entry.is_effect)

    def _find(self, key: RequestKey) -> RedoEntry | None:
        for level in LEVELS:
            equals = self._by_key.get((level, getattr(key, level)))
            if equals:
                return min(equals, key=lambda entry: entry.intended_seq)
        return None

    def _oldest_first(self) -> Iterator[RedoEntry]:
        return iter(sorted(self._offered.values(), key=lambda entry: entry.intended_seq))

    def _offer(self, entry: RedoEntry) -> None:
        if entry.call_id in self._offered:
            return
        self._offered[entry.call_id] = entry
        for level in LEVELS:
            self._by_key.setdefault((level, getattr(entry.key, level)), []).append(entry)

    def _withdraw(self, call_id: CallId) -> None:
        entry = self._offered.pop(call_id, None)
        if entry is None:
            return
        self._expected.discard(call_id)
        for level in LEVELS:
            equals = self._by_key.get((level, getattr(entry.key, level)), [])
            if entry in equals:  # one that was lost answers nothing
                equals.remove(entry)


def redo_set_after_recovery(calls: Iterable[Call], checkpoint: Checkpoint, timeline: Timeline) -> RedoSet:
    """The redo set of the incarnation that restores `checkpoint` after a crash (RECOVERY 5.1).

    It holds what the timeline did after the cut, what was still pending or joinable at the cut, and, attached to the
    streams that the image holds, what was open at the cut. Failed calls answer nothing. Across a rewind a model is
    asked anew, so of what was pending or joinable at the cut only the rest stays.
    """
    by_id = {call.call_id: call for call in calls if call.state is not CallState.FAILED}
    attached = _open_at_cut(by_id, checkpoint)
    kept = by_id if timeline.begun_by(checkpoint.seq) else {i: call for i, call in by_id.items() if not call.is_llm}
    pending = {call.call_id for call in by_id.values() if timeline.after(checkpoint.seq, call.intended_seq)}
    pending |= kept.keys() & set(checkpoint.pending_redo)
    joinable = kept.keys() & set(checkpoint.joinable) - pending
    return RedoSet(
        _entries(by_id, pending - attached.keys()),
        joinable=_entries(by_id, joinable - attached.keys()),
        attached=attached.values(),
    )


def redo_set_at_cut(calls: Iterable[Call], checkpoint: Checkpoint) -> RedoSet:
    """The redo set after a rewind or a fork: only calls open at the cut, each attached to its stream (RECOVERY 5.1)."""
    by_id = {call.call_id: call for call in calls if call.state is not CallState.FAILED}
    return RedoSet(attached=_open_at_cut(by_id, checkpoint).values())


def follow(redo: RedoSet, events: Iterable[Event], calls: Mapping[CallId, Call]) -> RedoSet:
    """Bring an incarnation's first redo set up to now by that incarnation's events: what an adopting node does.

    An end counts only for the stream that had the call last: the end of an earlier one may have been logged after a
    retry had taken the call over.
    """
    holders: dict[CallId, object] = {}
    for event in events:
        call = calls.get(event.call_id) if event.call_id else None
        if event.kind is Kind.CALL_DIVERGED:
            redo.diverge()
        if call is None:
            continue
        stream = event.data.get("stream")
        if event.kind in _ATTACHING:
            redo.attach(entry_of(call))
            holders[call.call_id] = call.stream if event.kind is Kind.CALL_INTENDED else stream
        elif event.kind is Kind.CALL_DELIVERED and (stream is None or holders.get(call.call_id) in {None, stream}):
            redo.ended(call.call_id, StreamEnd(event.data["end"]))
        elif event.kind is Kind.CALL_FAILED:
            redo.failed(call.call_id)
    return redo


_ATTACHING = frozenset({Kind.CALL_INTENDED, Kind.CALL_REPEATED, Kind.CALL_JOINED})


def _open_at_cut(by_id: Mapping[CallId, Call], checkpoint: Checkpoint) -> dict[CallId, RedoEntry]:
    ids = [stream.call_id for stream in checkpoint.open_streams if stream.call_id is not None]
    return {call_id: entry_of(by_id[call_id]) for call_id in ids if call_id in by_id}


def _entries(by_id: Mapping[CallId, Call], ids: Iterable[CallId]) -> list[RedoEntry]:
    return [entry_of(by_id[call_id]) for call_id in ids if call_id in by_id]
