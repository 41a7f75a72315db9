"""An answer means the same in both of its shapes, by the providers' own SDKs."""

import json

import openai
import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import RawMessageStreamEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from torpor.core.call import ResponseHead
from torpor.gateway.answer import AnswerReader
from torpor.gateway.dialects import ANTHROPIC, DIALECTS, GEMINI, OPENAI_CHAT, OPENAI_RESPONSES
from torpor.gateway.dialects.base import Dialect, Shape
from torpor.gateway.dialects.sse import EventSplitter, event_bytes, json_object
from torpor.gateway.reshape import reshaped
from torpor.testing.model_scripts import Answer, Pace, Say, UseTool
from torpor.testing.model_wire import Anthropic, OpenAIChat, Stamp, Wire
from torpor.testing.model_wire_gemini import Gemini
from torpor.testing.model_wire_responses import OpenAIResponses

ANSWER = Answer(
    parts=(
        Say(text='Say "é" and 漢字\nand more'),
        UseTool(name="run_shell", arguments={"command": "ls", "n": 1.5, "deep": {"a": [1, None]}}),
        UseTool(name="empty", arguments={}),
    ),
    pace=Pace(chunk_characters=3),
)
STAMP = Stamp(nonce="n1", created=1, model="m", prompt_tokens=7, include_usage=True)
SPOKEN = [
    (OPENAI_CHAT, OpenAIChat()),
    (OPENAI_RESPONSES, OpenAIResponses()),
    (ANTHROPIC, Anthropic()),
    (GEMINI, Gemini(model="m", streams=True)),
]
EACH = pytest.mark.parametrize(("dialect", "wire"), SPOKEN, ids=[dialect.name for dialect, _ in SPOKEN])


def head(kind: str) -> ResponseHead:
    return ResponseHead(status=200, reason="OK", headers=(("content-type", kind), ("request-id", "r")))


def events_of(body: bytes) -> list[dict]:
    return [dict(event) for raw in EventSplitter().feed(body) if (event := json_object(raw)) is not None]


@EACH
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


def test_a_response_streams_as_the_sdk_understands_it() -> None:
    message = OpenAIResponses().message(ANSWER, STAMP)
    streamed = reshaped(OPENAI_RESPONSES, Shape.EVENTS, head("application/json"), [message])
    assert streamed is not None
    state = ResponseStreamState(input_tools=[], text_format=openai.omit)
    adapter = TypeAdapter(ResponseStreamEvent)
    events = events_of(streamed[1])
    seen = [made for event in events for made in state.handle_event(adapter.validate_python(event))]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    [text] = [event.text for event in seen if event.type == "response.output_text.done"]
    assert text == 'Say "é" and 漢字\nand more'
    assert seen[-1].type == "response.completed"
    final = json.loads(message)
    assert [item.type for item in seen[-1].response.output] == [item["type"] for item in final["output"]]
    calls = [event for event in seen if event.type == "response.function_call_arguments.done"]
    assert [call.arguments for call in calls] == [item["arguments"] for item in final["output"][1:]]


def test_every_kind_of_item_of_a_response_is_opened_filled_and_closed() -> None:
    output = [
        {"id": "r", "type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "e"},
        {"id": "c", "type": "custom_tool_call", "input": "ls", "name": "shell", "call_id": "1"},
        {"id": "w", "type": "web_search_call", "status": "completed"},
        {"id": "m", "type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    response = {"id": "resp", "object": "response", "status": "incomplete", "output": output}
    streamed = reshaped(OPENAI_RESPONSES, Shape.EVENTS, head("application/json"), [json.dumps(response).encode()])
    assert streamed is not None
    events = events_of(streamed[1])
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[-1] == "incomplete"
    assert kinds.count("output_item.added") == kinds.count("output_item.done") == 4
    said = {event["type"]: event["delta"] for event in events if "delta" in event}
    assert said == {
        "response.reasoning_summary_text.delta": "hm",
        "response.custom_tool_call_input.delta": "ls",
        "response.refusal.delta": "no",
    }
    back = reshaped(OPENAI_RESPONSES, Shape.MESSAGE, streamed[0], [streamed[1]])
    assert back is not None and json.loads(back[1]) == response


def test_the_items_stand_in_for_an_output_that_the_last_event_leaves_out() -> None:
    item = {"id": "m", "type": "message"}
    events = [
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"id": "r", "status": "completed", "output": []}},
    ]
    body = b"".join(event_bytes(event) for event in events)
    whole = reshaped(OPENAI_RESPONSES, Shape.MESSAGE, head("text/event-stream"), [body])
    assert whole is not None and json.loads(whole[1])["output"] == [item]


@pytest.mark.parametrize("wanted", [Shape.MESSAGE, Shape.EVENTS, Shape.ARRAY])
@pytest.mark.parametrize("recorded", [Shape.MESSAGE, Shape.EVENTS, Shape.ARRAY])
def test_gemini_answers_in_any_of_three_shapes_from_any_other(recorded: Shape, wanted: Shape) -> None:
    wire = Gemini(model="m", streams=True, as_array=recorded is Shape.ARRAY)
    whole = wire.message(ANSWER, STAMP)
    chunks = [whole] if recorded is Shape.MESSAGE else wire.events(ANSWER, STAMP)
    kind = "text/event-stream" if recorded is Shape.EVENTS else "application/json; charset=UTF-8"
    other = reshaped(GEMINI, wanted, head(kind), chunks)
    if wanted is recorded:
        assert other is None
        return
    assert other is not None
    said = [json.loads(other[1])] if wanted is Shape.MESSAGE else events_of(other[1])
    said = json.loads(other[1]) if wanted is Shape.ARRAY else said
    parts = [part for answer in said for part in answer["candidates"][0]["content"]["parts"]]
    assert "".join(part.get("text", "") for part in parts) == 'Say "é" and 漢字\nand more'
    assert [part["functionCall"]["name"] for part in parts if "functionCall" in part] == ["run_shell", "empty"]
    assert said[-1]["candidates"][0]["finishReason"] == "STOP"
    if wanted is Shape.MESSAGE:
        assert said == [json.loads(whole)]


def test_a_signature_stays_with_its_part() -> None:
    parts = [{"text": "a", "thought": True}, {"text": "b"}, {"text": "c"}, {"text": "", "thoughtSignature": "s"}]
    events = [{"candidates": [{"content": {"parts": [part], "role": "model"}, "index": 0}]} for part in parts]
    body = b"".join(map(event_bytes, events))
    whole = reshaped(GEMINI, Shape.MESSAGE, head("text/event-stream"), [body])
    assert whole is not None
    kept = json.loads(whole[1])["candidates"][0]["content"]["parts"]
    assert kept == [{"text": "a", "thought": True}, {"text": "bc"}, {"text": "", "thoughtSignature": "s"}]


@EACH
def test_there_and_back_is_the_same_message(dialect: Dialect, wire: Wire) -> None:
    message = wire.message(ANSWER, STAMP)
    there = reshaped(dialect, Shape.EVENTS, head("application/json"), [message])
    assert there is not None
    back = reshaped(dialect, Shape.MESSAGE, there[0], [there[1]])
    assert back is not None
    assert json.loads(back[1]) == json.loads(message)


@EACH
def test_an_error_in_the_stream_becomes_an_error_status(dialect: Dialect, wire: Wire) -> None:
    broken = [*wire.events(ANSWER, STAMP)[:3], wire.error_event("too busy")]
    streamed = reshaped(dialect, Shape.MESSAGE, head("text/event-stream"), broken)
    assert streamed is not None
    assert streamed[0].status >= 500
    assert b"too busy" in streamed[1]


@EACH
def test_what_makes_no_message_goes_as_it_was_sent(dialect: Dialect, wire: Wire) -> None:
    garbage = [
        b'data: {"type":"content_block_delta","index":5}\n\n',
        b'data: {"choices":[3,{"delta":7}],"usage":4}\n\n',
    ]
    refused = reshaped(dialect, Shape.MESSAGE, head("text/event-stream"), garbage)
    assert refused is None or refused[0].status == 200
    assert reshaped(dialect, Shape.MESSAGE, head("application/json"), [wire.message(ANSWER, STAMP)]) is None


KEYS = """type index delta text response.completed response.output_item.done response item output output_index content
summary status choices message tool_calls function arguments usage error candidates parts functionCall finishReason
content_block_start content_block_delta content_block message_start message_delta message_stop input_json_delta
partial_json annotations output_text function_call reasoning completed incomplete_details logprobs citations
input_tokens input_tokens_details prompt_tokens usageMetadata promptTokenCount code"""
WORDS = st.sampled_from(KEYS.split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats(0, 1) | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(values=st.lists(VALUES, max_size=4), kind=st.sampled_from(["text/event-stream", "application/json"]))
def test_no_answer_however_strange_disturbs_reading_or_reshaping(values: list, kind: str) -> None:
    streamed = b"".join(map(event_bytes, values))
    bodies = [streamed, event_bytes(values)[6:], *(event_bytes(value)[6:] for value in values)]
    for dialect in DIALECTS:
        for body in bodies:
            answer = AnswerReader(dialect, status=200, headers={"content-type": kind}, is_llm=True)
            answer.feed(body)
            answer.complete()
            for shape in Shape:
                other = reshaped(dialect, shape, head(kind), [body])
                assert other is None or isinstance(other[1], bytes)
