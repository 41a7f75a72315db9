"""Carries one call upstream and its answer into the log: one attempt, detached from the agent that asked.

Nothing that happens to the agent cancels a pump. It ends in one of three ways: the answer is complete and the call is
answered; the answer broke off and the call failed, so the agent's connection is broken off too; or no answer came, and
an error of the gateway's own is logged in its place. What the provider refuses for now is sent again within the same
attempt, since nothing of a refusal was logged or delivered; so is what it refuses only because Torpor asked for token
counts that the agent had not asked for (`core.usage`). The head waits for the first byte of the body: until then a
failure can still be told in words, which clients retry, where a broken connection is often final for them.
"""

import asyncio
from dataclasses import replace

from torpor.config import Upstream
from torpor.core.call import Call, CallState, ResponseHead
from torpor.core.usage import refuses_usage
from torpor.db.calls import Chunk
from torpor.gateway.admission import error_answer
from torpor.gateway.answer import AnswerReader
from torpor.gateway.backoff import Backoff
from torpor.gateway.billing import Billing
from torpor.gateway.connections import Lease
from torpor.gateway.delivery import Recording
from torpor.gateway.failure import NoAnswer
from torpor.gateway.record import Recorder
from torpor.gateway.routing import choose
from torpor.gateway.scrub import Scrubber
from torpor.gateway.sending import Sending
from torpor.gateway.upstream import UpstreamAnswer, UpstreamClient

ANSWER_BYTES_MAX = 256 << 20
REFUSAL_BYTES_MAX = 64 << 10
"""How much of a refusal is read to see why."""


class Pump:
    """One attempt of one call.

    Attributes:
        recording: its rows as they are written.
        under_way: set when its agent begins to wait for the answer: call.sent is durable, or what holds the call.
        failed: it ended without an answer.
        held: it waits for a person to raise the budget.

    Args:
        call: with its attempt opened, if that was recorded together with the call.
        sending: what goes upstream.
        reached: a connection that is on its way, for the first sending.
    """

    def __init__(
        self,
        *,
        call: Call,
        sending: Sending,
        recorder: Recorder,
        billing: Billing,
        upstreams: UpstreamClient,
        reached: Lease | None = None,
    ) -> None:
        self.call = call
        self._is_open = call.state is CallState.SENT
        self.recording = Recording(len(call.attempts) + (0 if self._is_open else 1))
        self.under_way = asyncio.Event()
        self.failed = False
        self.held = False
        self._sending = sending
        self._line = sending.intake.request.line
        self._destination = sending.intake.destination
        self._asking = sending.asking
        self._recorder = recorder
        self._billing = billing
        self._upstreams = upstreams
        self._reached = reached
        self._scrubber = Scrubber(None)
        self._reader: AnswerReader | None = None
        self._sent_ns = 0

    @property
    def request_bytes(self) -> int:
        return len(self._sending.outgoing.body)

    async def run(self) -> None:
        """Carry the attempt to its end.

        Raises:
            Superseded: this node lost the session.
        """
        try:
            if not self._is_open:
                self.recording.attempt = await self._billing.open_attempt(
                    self.call,
                    self._sending.plain_body,
                    on_hold=self._hold,
                    usage_asked=self._sending.usage_asked,
                )
                self.held = False
            self._sent_ns = self._recorder.wall_ns()
            self.under_way.set()
            await self._send()
        except NoAnswer as failure:
            self.under_way.set()
            await self._fail(failure)
        finally:
            if self._reached is not None:
                self._reached.end()
            self._billing.look_again()

    def _hold(self) -> None:
        self.held = True
        self.under_way.set()

    async def _send(self) -> None:
        """Send the request until it is taken, or refused for good."""
        upstream = choose(self._destination, self._sending.outgoing.model)
        key = await self._upstreams.key_for(upstream)
        self._scrubber = Scrubber(key.reveal() if key is not None else None)
        backoff = Backoff(upstream, self._recorder.clock, repeatable=self.call.may_be_sent_again)
        while True:
            reached, self._reached = self._reached, None
            outgoing = self._asking or self._sending.outgoing
            async with self._upstreams.send(outgoing, upstream, reached=reached) as answer:
                if await self._was_wrong_to_ask(answer, upstream):
                    continue
                # What is sent at most once is not sent again, whatever the provider says.
                seconds = None if self.call.barrier else backoff.pause(answer.status, answer.headers)
                if seconds is None:
                    await self._receive(answer, upstream.name)
                    return
                await answer.discard()
            facts = {"status": answer.status, "retry": backoff.retries, "wait_ms": round(seconds * 1000)}
            await self._recorder.retry(self.call.call_id, {"upstream": upstream.name, **facts})
            await asyncio.sleep(seconds)

    async def _was_wrong_to_ask(self, answer: UpstreamAnswer, upstream: Upstream) -> bool:
        """Whether the provider refuses the request for what Torpor added to it; then nothing is added from now on."""
        if self._asking is None or answer.status < 400:
            return False
        if not refuses_usage(answer.status, await answer.opening(REFUSAL_BYTES_MAX)):
            return False
        self._asking = None
        self._upstreams.never_ask_again(upstream)
        facts = {"upstream": upstream.name, "status": answer.status, "retry": 0, "wait_ms": 0, "usage_asked": False}
        await self._recorder.retry(self.call.call_id, facts)
        return True

    async def _receive(self, answer: UpstreamAnswer, upstream: str) -> None:
        headers = tuple((name, self._scrubber.text(value)) for name, value in answer.headers)
        asked = self._asking is not None or self._sending.intake.asks_for_usage
        head = replace(self._line.shape(answer.status, answer.reason, headers), usage_asked=asked)
        self._reader = reader = AnswerReader(
            self._destination.dialect,
            status=answer.status,
            headers={name.lower(): value for name, value in headers},
            is_llm=self._destination.route.is_llm,
        )
        size = 0
        while data := await answer.next():
            await self._write(head, reader, self._scrubber.feed(data))
            size += len(data)
            if size > ANSWER_BYTES_MAX:
                raise NoAnswer("upstream_endless", "the answer has no end", status=502, retry=False)
        await self._write(head, reader, self._scrubber.rest())
        if not reader.complete():
            reason = "the answer stopped in the middle"
            raise NoAnswer("upstream_truncated", reason, status=502, retry=True)
        if self.recording.head is None:
            await self._recorder.receive(self.call.call_id, self.recording.attempt, head=head, chunks=())
        facts = {
            "status": answer.status,
            "upstream": upstream,
            "finish_reason": reader.facts.finish_reason,
            "in_band_error": reader.facts.error,
            "response_id": reader.facts.response_id,
        }
        bill = await self._billing.bill(self.call, answer.status, reader.facts, self._sent_ns)
        # What is only read again was paid for by the call that asked for it.
        usage = reader.facts.usage if self._destination.route.is_llm else {}
        await self._recorder.complete(self.call.call_id, recording=self.recording, usage=usage, facts=facts, bill=bill)
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
        said = self._reader.facts if self._reader is not None else None
        bill = await self._billing.bill_failure(self.call, failure, said, self._sent_ns)
        error = f"{failure.code}: {self._scrubber.text(str(failure))}"
        if self.recording.head is not None:
            await self._recorder.fail(
                self.call.call_id, error=error, response=None, bill=bill, recording=self.recording
            )
            self.recording.end(finished=False)
            return
        answer = error_answer(
            self._line,
            self._destination.dialect,
            status=failure.status,
            code=failure.code,
            message=f"Torpor {self._scrubber.text(str(failure))}.",
            retry=failure.retry,
        )
        failed = await self._recorder.fail(
            self.call.call_id, error=error, response=(answer.head, answer.body), bill=bill
        )
        self.recording.attempt = failed.attempts[-1].number
        self.recording.add_head(answer.head)
        if answer.body:
            self.recording.add_chunk(answer.body)
        self.recording.end(finished=True)
