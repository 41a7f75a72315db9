"""What a stream gets is a function of the log's rows and of what its client asked for, from any offset on."""

from dataclasses import replace

import pytest

from torpor.core.call import ResponseHead
from torpor.core.delivery import Tape
from torpor.gateway.delivery import Recording, rows_in_shape
from torpor.gateway.dialects import OPENAI_CHAT
from torpor.gateway.dialects.base import Shape
from torpor.testing.model_scripts import Answer, Say
from torpor.testing.model_wire import OpenAIChat, Stamp

HEAD = ResponseHead(
    status=200, reason="OK", headers=(("content-type", "text/event-stream; charset=utf-8"),), usage_asked=True
)
STAMP = Stamp(nonce="n1", created=1, model="m", prompt_tokens=7)
ANSWER = Answer(parts=(Say(text="Say nothing of usage"),))
ASKED = b"".join(OpenAIChat().events(ANSWER, replace(STAMP, include_usage=True)))
UNASKED = b"".join(OpenAIChat().events(ANSWER, STAMP))


def recording(body: bytes, size: int, *, head: ResponseHead = HEAD, finished: bool = True) -> Recording:
    made = Recording(1)
    made.add_head(head)
    for at in range(0, len(body), size):
        made.add_chunk(body[at : at + size])
    made.end(finished=finished)
    return made


async def delivered(made: Recording, *, start: int = 0, hide_usage: bool = True) -> bytes:
    """The bytes from an offset on."""
    tape = Tape(start)
    sent = b""
    async for rows in rows_in_shape(made, OPENAI_CHAT, Shape.AS_SENT, hide_usage=hide_usage):
        for row in rows:
            match row:
                case None:
                    sent += tape.finish()
                case ResponseHead():
                    sent += tape.head(row)
                case _:
                    sent += tape.chunk(row)
    return sent


def body_of(sent: bytes) -> bytes:
    rest, body = sent.partition(b"\r\n\r\n")[2], b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
async def test_a_client_that_did_not_ask_gets_what_it_would_have_got(size: int) -> None:
    assert body_of(await delivered(recording(ASKED, size))) == UNASKED


@pytest.mark.parametrize("size", [7, 100])
async def test_a_restored_stream_goes_on_at_any_offset(size: int) -> None:
    made = recording(ASKED, size)
    whole = await delivered(made)
    for start in range(len(whole) + 1):
        assert await delivered(made, start=start) == whole[start:]


async def test_an_attempt_that_broke_off_gives_a_beginning_of_what_it_would_have_given() -> None:
    whole = await delivered(recording(ASKED, 7))
    for end in range(0, len(ASKED), 7):
        assert whole.startswith(await delivered(recording(ASKED[:end], 7, finished=False)))


@pytest.mark.parametrize(
    "head",
    [
        replace(HEAD, usage_asked=False),
        replace(HEAD, headers=(("content-type", "application/json"),)),
        replace(HEAD, headers=(*HEAD.headers, ("content-encoding", "gzip"))),
    ],
    ids=["nobody asked", "no events", "packed"],
)
async def test_what_was_not_asked_for_or_is_no_stream_of_events_is_untouched(head: ResponseHead) -> None:
    assert body_of(await delivered(recording(ASKED, 100, head=head))) == ASKED


async def test_a_client_that_asked_gets_everything() -> None:
    assert body_of(await delivered(recording(ASKED, 100), hide_usage=False)) == ASKED
