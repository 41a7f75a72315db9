"""A stream's hold of a call, and how the log tells it."""

from dataclasses import dataclass
from typing import Any

from torpor.core.events import Event
from torpor.core.ids import CallId, StreamId
from torpor.db import requests
from torpor.db.database import Transaction
from torpor.gateway.dialects.base import Shape
from torpor.gateway.request import expects_continue


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A stream's hold of a call: by its call.intended, call.repeated or call.joined.

    Attributes:
        request_bytes: length of the request on this stream.
        continued: this stream's client asked for `100 Continue`, and got it.
        shape: how it gets the answer, when it is the same logical request in another shape.
        hide_usage: it gets no token counts that only others asked for (`core.usage`).
    """

    call_id: CallId
    stream: StreamId
    incarnation: int
    request_bytes: int
    continued: bool
    shape: Shape = Shape.AS_SENT
    hide_usage: bool = False


def attached(claim: Claim, attempt: int, *, inherited: bool) -> dict[str, Any]:
    """What the event says by which a stream holds a call that was made before."""
    return {
        "stream": claim.stream,
        "request_bytes": claim.request_bytes,
        "continued": claim.continued,
        "shape": claim.shape.value,
        "attempt": attempt,
        "inherited": inherited,
        **({"hide_usage": True} if claim.hide_usage else {}),
    }


def form_of(event: Event) -> tuple[Shape, bool]:
    """How the stream of such an event gets the answer: `shape` and `hide_usage`."""
    return Shape(event.data.get("shape", Shape.AS_SENT)), event.data.get("hide_usage", False)


def claim_of(tx: Transaction, event: Event, call_id: CallId) -> Claim:
    """The claim that an event of one of the three kinds made."""
    continued = event.data.get("continued")
    if continued is None:
        # The first stream of a call: its request is the one that was logged.
        head = requests.read_head(tx, call_id)
        continued = head is not None and expects_continue("1.1", head.headers)
    shape, hide_usage = form_of(event)
    return Claim(
        call_id=call_id,
        stream=event.data["stream"],
        incarnation=event.incarnation,
        request_bytes=event.data["request_bytes"],
        continued=continued,
        shape=shape,
        hide_usage=hide_usage,
    )
