"""What the calls of a session may cost, before they are sent, and did cost, once they ended.

Under a budget a model call is sent only with its worst case reserved. One that does not fit beside calls that are
arriving waits for their ends; one that does not fit at all is held on a waitpoint until a person raises the budget.
Neither is told to its client, whose request stays open: an error would be retried, or end the agent.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from torpor.core.call import Call
from torpor.core.ids import CallId
from torpor.core.money import Bill, Verdict
from torpor.gateway.answer import AnswerReader
from torpor.gateway.budget import size_of
from torpor.gateway.dialects import dialect_named
from torpor.gateway.dialects.base import AnswerFacts
from torpor.gateway.failure import NEVER_SENT, NoAnswer
from torpor.gateway.prices import PriceBook, Source
from torpor.gateway.record import Recorder
from torpor.gateway.routing import Routing, choose
from torpor.sandbox.fifos import Pulse

FREE = Bill(cost_nanousd=0, prices=None)
UNKNOWN = Bill(cost_nanousd=None, prices=None)

RELATIVES_LOOK_SECONDS = 2.0
"""What a call waits for may be reserved by a session that shares the budget, and that another process runs."""


class Billing:
    """One session's calls and their prices."""

    def __init__(self, *, recorder: Recorder, book: PriceBook, routing: Routing) -> None:
        self._recorder = recorder
        self._book = book
        self._routing = routing
        self._limited: bool | None = None
        self._changes = 0
        self._changed = Pulse()

    def look_again(self) -> None:
        """Something was settled, or the budget raised: whoever waits asks again."""
        self._changes += 1
        self._changed.fire()

    async def open_attempt(
        self, call: Call, body: bytes, *, on_hold: Callable[[], object], usage_asked: bool = False
    ) -> int:
        """Open a call's next attempt as soon as the budget allows it; gives its number.

        Args:
            body: the request's, decoded.
            on_hold: called when only a person can let it go on, which is durable then.
            usage_asked: what is sent asks for token counts, and the logged request does not.

        Raises:
            NoAnswer: `model_price_unknown`, there is a budget, and no way to tell whether the call fits.
        """
        needed = await self._needed(call, body)
        while True:
            seen = self._changes
            got = await self._recorder.send(call.call_id, needed_nanousd=needed, usage_asked=usage_asked)
            if not isinstance(got, Verdict):
                return got
            if got is Verdict.HOLD:
                on_hold()
            await self._change(seen, RELATIVES_LOOK_SECONDS if got is Verdict.WAIT else None)

    async def _change(self, seen: int, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._changes == seen:
                    await self._changed.wait()

    async def warm(self, call: Call) -> None:
        """Have the prices of a model at hand before its answer ends."""
        await asyncio.to_thread(self._book.bill, self._source(call), {"input_tokens": 0}, {}, 0)

    async def bill(self, call: Call, status: int, facts: AnswerFacts, sent_ns: int) -> Bill | None:
        """What a model's answer cost; None for what is no model call. A refusal of the provider's costs nothing."""
        if not call.is_llm:
            return None
        if not 200 <= status < 300:
            return FREE
        return await asyncio.to_thread(self._book.bill, self._source(call), facts.usage, facts.terms, sent_ns)

    async def bill_failure(self, call: Call, failure: NoAnswer, facts: AnswerFacts | None, sent_ns: int) -> Bill | None:
        """What an attempt without an answer cost: what it had reported until then."""
        if not call.is_llm:
            return None
        if failure.code in NEVER_SENT:
            return FREE
        return UNKNOWN if facts is None else await self.bill(call, 200, facts, sent_ns)

    async def bill_torn(self) -> dict[CallId, Bill]:
        """What the calls cost that an earlier node had sent and not answered: what the log has of their usage."""
        bills: dict[CallId, Bill] = {}
        for call, chunks in await self._recorder.load_sent():
            head = call.attempts[-1].head
            if not call.is_llm or head is None:
                continue
            headers = {name.lower(): value for name, value in head.headers}
            reader = AnswerReader(dialect_named(call.dialect), status=head.status, headers=headers, is_llm=True)
            for chunk in chunks:
                reader.feed(chunk.data)
            bill = await self.bill(call, head.status, reader.facts, call.attempts[-1].sent_ns)
            if bill is not None:
                bills[call.call_id] = bill
        return bills

    async def _needed(self, call: Call, body: bytes) -> int | None:
        if self._limited is None:
            self._limited = await self._recorder.has_budget()
        if not self._limited or not call.is_llm:
            return None
        worst = await asyncio.to_thread(
            lambda: self._book.worst_case(self._source(call), size_of(body), self._recorder.wall_ns())
        )
        if worst is None:
            model = "a request that names no model" if call.model is None else f"the model {call.model[:200]!r}"
            reason = (
                f"this session has a budget, and the price of {model} is not known; "
                "give it in config.toml of TORPOR_HOME, under [prices]"
            )
            raise NoAnswer("model_price_unknown", reason, status=400, retry=False)
        return worst

    def _source(self, call: Call) -> Source:
        """Who answers a call, by the configuration of now."""
        destination = self._routing.destination(call.method, call.target, (dialect_named(call.dialect),))
        upstream = None
        if destination is not None:
            with suppress(NoAnswer):
                upstream = choose(destination, call.model)
        if upstream is None:
            return Source(model=call.model, family=dialect_named(call.dialect).family, base_url=None)
        return Source(model=call.model, family=upstream.family, base_url=upstream.base_url)
