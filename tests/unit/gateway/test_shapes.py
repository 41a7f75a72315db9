"""An answer means the same in both of its shapes, by the providers' own SDKs."""

import json

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk
from pydantic import TypeAdapter

from torpor.core.call import ResponseHead
from torpor.gateway.dialects import ANTHROPIC, OPENAI_CHAT
from torpor.gateway.dialects.base import Dialect
from torpor.gateway.dialects.sse import EventSplitter, json_object
from torpor.gateway.reshape import Shape, reshaped
from torpor.testing.model_scripts import Answer, Pace, Say, UseTool
from torpor.testing.model_wire import Anthropic, OpenAIChat, Stamp, Wire

ANSWER = Answer(
    parts=(
        Say(text='Say "é" and 漢字\nand more'),
        UseTool(name="run_shell", arguments={"command": "ls", "n": 1.5, "deep": {"a": [1, None]}}),
        UseTool(name="empty", arguments={}),
    ),
    pace=Pace(chunk_characters=3),
)
STAMP = Stamp(nonce="n1", created=1, model="m", prompt_tokens=7, include_usage=True)
BOTH = pytest.mark.parametrize(
    ("dialect", "wire"), [(OPENAI_CHAT, OpenAIChat()), (ANTHROPIC, Anthropic())], ids=["openai", "anthropic"]
)


def head(kind: str) -> ResponseHead:
    return ResponseHead(status=200, reason="OK", headers=(("content-type", kind), ("request-id", "r")))


def events_of(body: bytes) -> list[dict]:
    return [dict(event) for raw in EventSplitter().feed(body) if (event := json_object(raw)) is not None]


@BOTH
def test_streamed_events_make_the_message_that_the_provider_would_have_sent(dialect: Dialect, wire: Wire) -> None:
    streamed = reshaped(dialect, Shape.MESSAGE, head("text/event-stream; charset=utf-8"), wire.events(ANSWER, STAMP))
    assert streamed is not None
    assert json.loads(streamed[1]) == json.loads(wire.message(ANSWER, STAMP))
    assert dict(streamed[0].headers) == {"content-type": "application/json", "request-id": "r"}


def test_an_anthropic_message_streams_as_the_sdk_understands_it() -> None:
    message = Anthropic().message(ANSWER, STAMP)
    streamed = reshaped(ANTHROPIC, Shape.EVENTS, head("application/json"), [message])
    assert streamed is not None
    snapshot, partial = None, {}
    adapter = TypeAdapter(RawMessageStreamEvent)
    for event in events_of(streamed[1]):
        parsed = adapter.validate_python(event)
        snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=partial)
    assert snapshot is not None
    assert [block.type for block in snapshot.content] == ["text", "tool_use", "tool_use"]
    assert snapshot.content[0].text == 'Say "é" and 漢字\nand more'
    assert snapshot.content[1].input == {"command": "ls", "n": 1.5, "deep": {"a": [1, None]}}
    assert snapshot.stop_reason == "tool_use"
    assert snapshot.usage.output_tokens == json.loads(message)["usage"]["output_tokens"]


def test_an_openai_completion_streams_as_the_sdk_understands_it() -> None:
    message = OpenAIChat().message(ANSWER, STAMP)
    streamed = reshaped(OPENAI_CHAT, Shape.EVENTS, head("application/json"), [message])
    assert streamed is not None
    assert streamed[1].endswith(b"data: [DONE]\n\n")
    state = ChatCompletionStreamState()
    for event in events_of(streamed[1]):
        state.handle_chunk(ChatCompletionChunk.model_validate(event))
    completion = state.get_final_completion()
    expected = json.loads(message)
    assert completion.choices[0].message.content == expected["choices"][0]["message"]["content"]
    calls = completion.choices[0].message.tool_calls or []
    assert [call.function.arguments for call in calls] == [
        call["function"]["arguments"] for call in expected["choices"][0]["message"]["tool_calls"]
    ]
    assert completion.usage and completion.usage.total_tokens == expected["usage"]["total_tokens"]


@BOTH
def test_there_and_back_is_the_same_message(dialect: Dialect, wire: Wire) -> None:
    message = wire.message(ANSWER, STAMP)
    there = reshaped(dialect, Shape.EVENTS, head("application/json"), [message])
    assert there is not None
    back = reshaped(dialect, Shape.MESSAGE, there[0], [there[1]])
    assert back is not None
    assert json.loads(back[1]) == json.loads(message)


@BOTH
def test_an_error_in_the_stream_becomes_an_error_status(dialect: Dialect, wire: Wire) -> None:
    broken = [*wire.events(ANSWER, STAMP)[:3], wire.error_event("too busy")]
    streamed = reshaped(dialect, Shape.MESSAGE, head("text/event-stream"), broken)
    assert streamed is not None
    assert streamed[0].status >= 500
    assert b"too busy" in streamed[1]


@BOTH
def test_what_makes_no_message_goes_as_it_was_sent(dialect: Dialect, wire: Wire) -> None:
    garbage = [
        b'data: {"type":"content_block_delta","index":5}\n\n',
        b'data: {"choices":[3,{"delta":7}],"usage":4}\n\n',
    ]
    refused = reshaped(dialect, Shape.MESSAGE, head("text/event-stream"), garbage)
    assert refused is None or refused[0].status == 200
    assert reshaped(dialect, Shape.MESSAGE, head("application/json"), [wire.message(ANSWER, STAMP)]) is None
