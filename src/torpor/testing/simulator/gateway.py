"""The node's side of streams and calls: match, intend, send upstream, write what comes, deliver from the log.

Every `yield` is a place where the node, the sandbox or the power may go.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torpor.core.call import CallState
from torpor.core.delivery import Tape
from torpor.core.join import StreamEnd
from torpor.core.money import Verdict
from torpor.core.output import OutputTrack
from torpor.testing.simulator import kinds
from torpor.testing.simulator.store import WORST_CASE, CallRow, Row, new_entry
from torpor.testing.simulator.streams import STDOUT, Frame, HostStream, StreamStatus
from torpor.testing.simulator.tasks import Task

if TYPE_CHECKING:
    from torpor.testing.simulator.node import Node

ON_RESOLVED = "resolved"
ON_BUDGET = "budget"
ON_COMMIT = "committed"
ON_SETTLED = "settled"
ON_LOGGED = "logged"
ON_STATUS_CHANGE = "status"


class Gateway:
    """What one node does for the calls of one incarnation; `node` holds what they share."""

    __slots__ = ("answers", "node", "output", "streams")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.streams: dict[int, HostStream] = {}
        self.output = OutputTrack()
        self.answers: dict[str, tuple[int, list[StreamStatus]]] = {}
        """The last STATUS, BARRIER_ACK and ALIVE that nobody fetched: (arg, streams)."""

    # --- frames --------------------------------------------------------------------------------------------------

    def receive(self, frame: Frame) -> None:
        nonce, kind, sid, arg, payload = frame
        node = self.node
        if nonce != node.nonce:
            return
        if node.world.trace is not None:
            node.world.note(f"node {node.name} gets {kind} {sid} {arg}")
        if kind == "DATA":
            if sid == STDOUT:
                self._receive_output(arg, payload)
            else:
                self._receive_request(sid, arg, payload)
        elif kind == "CLOSED":
            self.closed(sid, payload)
        elif kind == "EXIT":
            node.life.add(node.finish(arg))
        else:
            self.answers[kind] = (arg, payload)
            node.wake(kind)

    def _receive_request(self, sid: int, offset: int, payload: Any) -> None:
        stream = self.streams.get(sid)
        if stream is None:
            stream = self.streams[sid] = HostStream(sid)
        ask, stream.spelling, pieces = payload
        stream.ask = ask
        if offset > stream.received:
            self.node.world.witness.protocol_error(f"stream {sid} has a gap at {stream.received}")
        stream.received = max(stream.received, offset + pieces)
        if stream.received == ask.length and stream.call_id is None and not stream.serving:
            stream.serving = True
            self.node.life.add(self.serve(stream))

    def _receive_output(self, offset: int, piece: bytes) -> None:
        node = self.node
        if offset != self.output.position:
            node.world.witness.protocol_error(f"output comes at {offset}, expected at {self.output.position}")
        taken = self.output.take(piece)
        if not node.world.rules.suppress_repeated_output:
            taken = OutputTrack(offset).take(piece)
            node.append((kinds.OUTPUT, node.incarnation, None, None, (len(node.db.output), taken.fresh)))
        elif taken.fresh:
            rows: list[Row] = [(kinds.OUTPUT, node.incarnation, None, None, (taken.offset, taken.fresh))]
            if taken.differs_at is not None:
                rows.append((kinds.OUTPUT_DIFFERED, node.incarnation, None, None, taken.differs_at))
            node.append(*rows)
        node.send("ACK", STDOUT, self.output.position)

    def closed(self, sid: int, end: StreamEnd) -> None:
        """Init says how a stream ended: log it, and only then let init forget it."""
        stream = self.streams.pop(sid, None)
        if stream is not None and stream.end is None:
            stream.end = self.node.world.rules.stream_end(end)
            if stream.call_id is not None:
                self._ended(stream)
        if self.node.world.rules.close_logged_before_forgotten:
            self.node.log_later(lambda: self.node.send("FORGET", sid))
        else:
            self.node.send("FORGET", sid)

    def _ended(self, stream: HostStream) -> None:
        """Once for each stream: in memory at once, so that a retry finds it, in the log after what came before."""
        node = self.node
        call_id, end, sid = stream.call_id, stream.end, stream.sid
        assert call_id is not None
        assert end is not None
        node.redo.ended(call_id, end)
        node.log_later(lambda: node.write((kinds.CALL_DELIVERED, node.incarnation, call_id, None, (end, sid))))
        node.wake(call_id)

    # --- requests ------------------------------------------------------------------------------------------------

    def serve(self, stream: HostStream) -> Task:
        """A whole request is here. RECOVERY: match, then intended, then acknowledgement, then upstream.

        The match, the binding of the stream and the place in the redo set are one step in memory; their row follows in
        the order of the decisions. A cut or a retry that comes before the row finds things as they are.
        """
        node = self.node
        assert stream.ask is not None
        if stream.end is not None:
            return
        diverged = node.redo.diverged
        found = node.redo.match(stream.ask.keys[stream.spelling])
        if not node.world.rules.match_binds_at_once:
            yield
        if found is None:
            stream.call_id = node.db.next_call_id()
            entry = new_entry(stream.call_id, stream.ask, stream.spelling, node.db.head + len(node.queue))
            if node.world.rules.new_calls_may_be_joined:
                node.redo.attach(entry)
            newly_diverged = node.redo.diverged and not diverged
            node.log_later(lambda: self._write_intended(stream, newly_diverged=newly_diverged))
        else:
            stream.call_id = found
            node.log_later(lambda: self._write_repeated(stream))
        while not stream.logged:
            yield ON_LOGGED
        node.send("ACK", stream.sid, stream.ask.length)
        if stream.end is None:
            self.bind(stream)

    def _write_repeated(self, stream: HostStream) -> None:
        node = self.node
        assert stream.call_id is not None
        stream.logged = True
        node.write((kinds.CALL_REPEATED, node.incarnation, stream.call_id, None, stream.sid))
        node.tree.reach(node.db.calls[stream.call_id].intended_seq)
        node.world.count("repeated")

    def _write_intended(self, stream: HostStream, *, newly_diverged: bool) -> None:
        node = self.node
        rows: list[Row] = []
        if newly_diverged:
            rows.append((kinds.CALL_DIVERGED, node.incarnation, None, None, None))
            node.world.count("diverged")
        stream.logged = True
        call_id = stream.call_id
        assert stream.ask is not None
        assert call_id is not None
        parent = node.tree.hang(node.db.head + len(rows) + 1)
        data = (stream.ask, stream.spelling, stream.sid, None)
        rows.append((kinds.CALL_INTENDED, node.incarnation, call_id, parent, data))
        # Nothing stands between a call's intent and its sending unless a budget or a checkpoint has to be asked.
        at_once = stream.ask.kind in _SENT_AT_ONCE and not node.world.plan.budget
        if at_once:
            rows.append((kinds.CALL_SENT, node.incarnation, call_id, None, None))
        written = node.write(*rows)
        if node.world.rules.fsync_before_send or not at_once:
            node.db.fsync()
        row = node.db.calls[call_id]
        node.world.witness.intended(node, row)
        if at_once:
            self.start_pump(row, written)

    def bind(self, stream: HostStream) -> None:
        """The stream has its call: see that the call has a pump if it needs one, and deliver from the log."""
        assert stream.call_id is not None
        row = self.node.db.calls[stream.call_id]
        stream.attempt = self.pump_if_needed(row)
        self.node.life.add(self.deliver(stream))
        if self.node.world.chance(self.node.world.plan.checkpoint_rate):
            self.node.life.add(self.node.checkpoint())

    def pump_if_needed(self, row: CallRow) -> int:
        """Which attempt a stream that begins now receives; starts it when nobody else did."""
        node = self.node
        planned = node.pumps.get(row.call_id)
        if planned is not None:
            return planned
        if row.state in _SETTLED:
            return max(1, len(row.attempts))
        number = len(row.attempts) + 1
        if row.state is kinds.UNKNOWN:
            return number
        if row.ask.kind == "receive":
            node.pumps[row.call_id] = number
            node.lasting.add(self.answer_with_message(row))
        elif row.ask.kind == "barrier" and node.world.rules.barrier_waits_for_checkpoint:
            node.life.add(self.hold(row))
        else:
            self.start_pump(row)
        return number

    def start_pump(self, row: CallRow, sent: int | None = None) -> None:
        """Send a call; `sent` is the transaction that says so, if there is one already."""
        self.node.pumps[row.call_id] = len(row.attempts) + (1 if sent is None else 0)
        self.node.lasting.add(self.pump(row, sent))

    # --- upstream ------------------------------------------------------------------------------------------------

    def hold(self, row: CallRow) -> Task:
        """A barrier call waits until a committed checkpoint holds its stream with nothing answered (RECOVERY 7)."""
        node = self.node
        while not node.is_covered(row.call_id):
            while not node.runs:
                yield ON_STATUS_CHANGE
            node.life.add(node.checkpoint())
            yield ON_COMMIT
        if row.call_id not in node.pumps and row.state in _TO_BE_SENT:
            self.start_pump(row)

    def pump(self, row: CallRow, sent: int | None) -> Task:
        """Send one attempt and write what comes. Detached from the client: it outlives streams and sandboxes."""
        node = self.node
        world = node.world
        if sent is None:
            if world.plan.limit is not None and row.ask.is_llm:
                yield from self.admit(row)
            sent = node.append((kinds.CALL_SENT, node.incarnation, row.call_id, None, None))
            if world.rules.fsync_before_send:
                node.db.fsync()
            yield
        served = world.upstream.request(node, row, sent)
        while served is None or (served.truncated and not world.rules.only_refusals_are_sent_again):
            node.append((kinds.CALL_RETRIED, node.incarnation, row.call_id, None, None))
            yield
            served = world.upstream.request(node, row, sent)
        yield
        node.append((kinds.HEAD, node.incarnation, row.call_id, None, served.head))
        node.wake(row.call_id)
        for chunk in served.chunks:
            yield
            node.append((kinds.CHUNK, node.incarnation, row.call_id, None, chunk))
            node.wake(row.call_id)
        yield
        served.finished = not served.truncated
        ends_well = served.finished or not world.rules.truncation_resets
        kind = kinds.CALL_COMPLETED if ends_well else kinds.CALL_FAILED
        node.append((kind, node.incarnation, row.call_id, None, None))
        node.db.fsync()
        del node.pumps[row.call_id]
        node.wake(row.call_id)
        node.wake(ON_BUDGET)

    def admit(self, row: CallRow) -> Task:
        """Under a budget: return when the call's worst case fits, to be reserved in the transaction that sends it.

        A call that does not fit beside what is reserved waits for an end; one that does not fit at all is held until a
        person raises the budget, and then asks again. What is held is in the log, so whoever comes next asks as well.
        """
        node = self.node
        rules = node.world.rules
        while rules.held_call_asks_again or not row.held:
            verdict = rules.decide(node.db.account(), WORST_CASE)
            if verdict is Verdict.SEND:
                if not rules.reserved_with_the_sending:
                    yield
                return
            if verdict is Verdict.HOLD:
                self._hold(row)
            yield ON_BUDGET

    def _hold(self, row: CallRow) -> None:
        """One transaction: the waitpoint, unless the call has one, and the status."""
        node = self.node
        rows: list[Row] = []
        if not row.held:
            rows.append((kinds.WAITPOINT_CREATED, node.incarnation, row.call_id, None, None))
        if node.db.status is kinds.RUNNING:
            rows.append((kinds.SESSION_STATUS, node.incarnation, None, None, kinds.WAITING))
        if rows:
            node.append(*rows)
            node.db.fsync()
            node.world.held()

    def answer_with_message(self, row: CallRow) -> Task:
        """A call that receives a message waits for one; its answer and the inbox's cursor are one transaction."""
        node = self.node
        while True:
            message = node.db.free_message()
            if message is not None:
                break
            yield ON_RESOLVED
        served = node.world.upstream.local(message)
        inc, call_id = node.incarnation, row.call_id
        node.append(
            (kinds.CALL_SENT, inc, call_id, None, None),
            (kinds.HEAD, inc, call_id, None, served.head),
            (kinds.CHUNK, inc, call_id, None, served.chunks[0]),
            (kinds.CALL_COMPLETED, inc, call_id, None, message),
        )
        node.db.fsync()
        del node.pumps[row.call_id]
        node.wake(row.call_id)

    # --- delivery ------------------------------------------------------------------------------------------------

    def deliver(self, stream: HostStream) -> Task:
        """Log rows to frames, live or repeated: one code path (RECOVERY 2.2)."""
        node = self.node
        assert stream.call_id is not None
        call_id = stream.call_id
        row = node.db.calls[call_id]
        tape = Tape(stream.taken)
        while len(row.attempts) < stream.attempt:
            if stream.end is not None:
                return
            if row.state is kinds.FAILED:
                self.reset(stream)
                return
            yield call_id
        attempt = row.attempts[stream.attempt - 1]
        index = -1
        while stream.end is None:
            if attempt.head is not None and index < len(attempt.chunks):
                piece = tape.head(attempt.head) if index < 0 else tape.chunk(attempt.chunks[index])
                index += 1
                if len(piece) > 1 and node.world.chance(0.3):
                    half = len(piece) // 2
                    node.send("DATA", stream.sid, tape.position - len(piece), piece[:half])
                    yield
                    piece = piece[half:]
                if piece:
                    node.send("DATA", stream.sid, tape.position - len(piece), piece)
                has_all = index == len(attempt.chunks) and row.state is kinds.SENT and stream.end is None
                yield call_id if has_all else None
            elif attempt.finished:
                rest = tape.finish()
                if rest:
                    node.send("DATA", stream.sid, tape.position - len(rest), rest)
                node.send("FIN", stream.sid, tape.position)
                return
            elif row.state is kinds.FAILED:
                self.reset(stream)
                return
            else:
                yield call_id

    def reset(self, stream: HostStream) -> None:
        """Break the agent's connection: its answer cannot go on, and must not end cleanly."""
        node = self.node
        # It stays known: a cut that finds it before the RESET arrives still has to name its call.
        stream.end = StreamEnd.RESET
        node.append((kinds.STREAM_RESET, node.incarnation, stream.call_id, None, stream.sid))
        assert stream.call_id is not None
        if node.db.calls[stream.call_id].state is kinds.FAILED:
            node.redo.failed(stream.call_id)
        else:
            self._ended(stream)
        node.send("RESET", stream.sid)


_SENT_AT_ONCE = frozenset({"llm", "effect", "read"})
_TO_BE_SENT = frozenset({CallState.INTENDED, CallState.TORN})
_SETTLED = frozenset({CallState.ANSWERED, CallState.FAILED, CallState.SENT})
