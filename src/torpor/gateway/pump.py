"""Carries one call upstream and its answer into the log: one attempt, detached from the agent that asked.

Nothing that happens to the agent cancels a pump. It ends in one of three ways: the answer is complete and the call is
answered; the answer broke off and the call failed, so the agent's connection is broken off too; or no answer came, and
an error of the gateway's own is logged in its place. The head waits for the first byte of the body: until then a
failure can still be told in words, which clients retry, where a broken connection is often final for them.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing

from torpor.core.call import Call, ResponseHead
from torpor.db.calls import Chunk
from torpor.gateway.admission import error_answer
from torpor.gateway.answer import AnswerReader
from torpor.gateway.delivery import Recording
from torpor.gateway.intake import Intake
from torpor.gateway.record import Recorder
from torpor.gateway.scrub import Scrubber
from torpor.gateway.upstream import NoAnswer, UpstreamAnswer, UpstreamClient
from torpor.sandbox.fifos import Pulse

ANSWER_BYTES_MAX = 256 << 20


class Pump:
    """One attempt of one call.

    Attributes:
        recording: its rows as they are written.
        sent: set when call.sent is durable, as the request goes upstream.
        failed: it ended without an answer.

    Args:
        note: goes to the model with the request (`agent.told`).
    """

    def __init__(
        self, *, call: Call, intake: Intake, recorder: Recorder, upstreams: UpstreamClient, note: str | None = None
    ) -> None:
        self.call = call
        self.recording = Recording(len(call.attempts) + 1)
        self.sent = asyncio.Event()
        self.failed = False
        self._line = intake.request.line
        self._outgoing = (intake.outgoing_with(note) if note is not None else None) or intake.outgoing
        self._recorder = recorder
        self._upstreams = upstreams
        self._scrubber = Scrubber(None)
        self._sent_ns = 0

    @property
    def request_bytes(self) -> int:
        return len(self._outgoing.body)

    async def run(self) -> None:
        """Carry the attempt to its end.

        Raises:
            Superseded: this node lost the session.
        """
        self._sent_ns = self._recorder.wall_ns()
        self.recording.attempt = await self._recorder.send(self.call.call_id)
        self.sent.set()
        try:
            key = await self._upstreams.key_for(self._outgoing)
            self._scrubber = Scrubber(key.reveal() if key is not None else None)
            async with self._upstreams.send(self._outgoing) as answer:
                await self._receive(answer)
        except NoAnswer as failure:
            await self._fail(failure)

    async def _receive(self, answer: UpstreamAnswer) -> None:
        headers = tuple((name, self._scrubber.text(value)) for name, value in answer.headers)
        head = self._line.shape(answer.status, answer.reason, headers)
        reader = AnswerReader(
            self._outgoing.dialect,
            status=answer.status,
            headers={name.lower(): value for name, value in headers},
            is_llm=self._outgoing.route.is_llm,
        )
        inbox = _Inbox()
        async with asyncio.TaskGroup() as group:
            group.create_task(inbox.fill(answer.pieces()))
            while data := await inbox.next():
                await self._write(head, reader, self._scrubber.feed(data))
        if inbox.failure is not None:
            raise inbox.failure
        await self._write(head, reader, self._scrubber.rest())
        if not reader.complete():
            reason = "the answer stopped in the middle"
            raise NoAnswer("upstream_truncated", reason, status=502, retry=True)
        if self.recording.head is None:
            await self._recorder.receive(self.call.call_id, self.recording.attempt, head=head, chunks=())
        facts = {
            "status": answer.status,
            "finish_reason": reader.facts.finish_reason,
            "in_band_error": reader.facts.error,
        }
        await self._recorder.complete(self.call.call_id, usage=reader.facts.usage, facts=facts)
        if self.recording.head is None:
            self.recording.add_head(head)
        self.recording.end(finished=True)

    async def _write(self, head: ResponseHead, reader: AnswerReader, data: bytes) -> None:
        """Log a piece of the body, then let it be delivered."""
        if not data:
            return
        reader.feed(data)
        first = self.recording.head is None
        chunk = Chunk(
            number=len(self.recording.chunks), offset_ns=max(0, self._recorder.wall_ns() - self._sent_ns), data=data
        )
        await self._recorder.receive(
            self.call.call_id, self.recording.attempt, head=head if first else None, chunks=[chunk]
        )
        if first:
            self.recording.add_head(head)
        self.recording.add_chunk(data)

    async def _fail(self, failure: NoAnswer) -> None:
        """An answer that began is broken off; one that did not is replaced by words of ours."""
        self.failed = True
        error = f"{failure.code}: {self._scrubber.text(str(failure))}"
        if self.recording.head is not None:
            await self._recorder.fail(self.call.call_id, error=error, response=None)
            self.recording.end(finished=False)
            return
        answer = error_answer(
            self._line,
            self._outgoing.dialect,
            status=failure.status,
            code=failure.code,
            message=f"Torpor {self._scrubber.text(str(failure))}.",
            retry=failure.retry,
        )
        failed = await self._recorder.fail(self.call.call_id, error=error, response=(answer.head, answer.body))
        self.recording.attempt = failed.attempts[-1].number
        self.recording.add_head(answer.head)
        if answer.body:
            self.recording.add_chunk(answer.body)
        self.recording.end(finished=True)


class _Inbox:
    """What arrived from upstream and is not logged yet: pieces that come while one is being logged make one chunk."""

    def __init__(self) -> None:
        self.failure: NoAnswer | None = None
        self._arrived: deque[bytes] = deque()
        self._done = False
        self._changed = Pulse()

    async def fill(self, pieces: AsyncGenerator[bytes]) -> None:
        size = 0
        try:
            async with aclosing(pieces):
                async for data in pieces:
                    self._arrived.append(data)
                    self._changed.fire()
                    size += len(data)
                    if size > ANSWER_BYTES_MAX:
                        self.failure = NoAnswer("upstream_endless", "the answer has no end", status=502, retry=False)
                        break
        except NoAnswer as error:
            self.failure = error
        self._done = True
        self._changed.fire()

    async def next(self) -> bytes:
        """Everything that arrived, waiting for something; empty at the end."""
        while not self._arrived and not self._done:
            await self._changed.wait()
        batch = b"".join(self._arrived)
        self._arrived.clear()
        return batch
