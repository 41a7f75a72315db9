"""A stream with the call that it gets the answer of, and one whose call is only being recorded."""

import asyncio
from dataclasses import dataclass, field

from torpor.gateway.claim import Claim
from torpor.gateway.intake import Intake
from torpor.gateway.pumps import Answer
from torpor.sandbox.streams import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """A stream with the answer that it receives."""

    stream: Stream
    claim: Claim
    answer: Answer
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is known, and logged, how the stream ended."""

    @property
    def status(self) -> int | None:
        """The status of the answer, once that is in the log."""
        head = self.answer.recording.head
        return head.status if head is not None else None

    def may_have_left(self, intake: Intake) -> bool:
        """Whether a request is equal to this stream's, whose client has closed its end, or all, of the connection."""
        left = self.stream.half_closed or self.stream.closed is not None
        return left and self.answer.call.key.logical == intake.key.logical


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """A stream whose call is being recorded."""

    stream: Stream
    logical: str

    @property
    def has_left(self) -> bool:
        return self.stream.half_closed or self.stream.closed is not None
