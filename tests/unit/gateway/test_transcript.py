"""People read what the model saw and answered in one shape, whatever API it was; nothing is refused or lost."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.gateway.transcript import Part, read_answer, read_request

SYSTEM = Part(kind="text", text="Be brief.")
ASKED: dict[str, dict[str, Any]] = {
    "anthropic": {
        "model": "m",
        "system": "Be brief.",
        "tools": [{"name": "bash", "input_schema": {}}],
        "messages": [
            {"role": "user", "content": "list"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "bash", "input": {"c": "ls"}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "a b"}]},
        ],
    },
    "openai_chat": {
        "model": "m",
        "tools": [{"type": "function", "function": {"name": "bash"}}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "list"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "t1", "type": "function", "function": {"name": "bash", "arguments": '{"c": "ls"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "t1", "content": "a b"},
        ],
    },
    "openai_responses": {
        "model": "m",
        "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "bash"}],
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list"}]},
            {"type": "function_call", "call_id": "t1", "name": "bash", "arguments": '{"c": "ls"}'},
            {"type": "function_call_output", "call_id": "t1", "output": "a b"},
        ],
    },
    "gemini": {
        "systemInstruction": {"parts": [{"text": "Be brief."}]},
        "tools": [{"functionDeclarations": [{"name": "bash"}]}],
        "contents": [
            {"role": "user", "parts": [{"text": "list"}]},
            {"role": "model", "parts": [{"functionCall": {"id": "t1", "name": "bash", "args": {"c": "ls"}}}]},
            {
                "role": "user",
                "parts": [{"functionResponse": {"id": "t1", "name": "bash", "response": {"output": "a b"}}}],
            },
        ],
    },
}


def sse(*events: object) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)


ANSWERED: dict[str, bytes] = {
    "anthropic": sse(
        {"type": "message_start", "message": {"id": "r1", "role": "assistant", "model": "m-1", "usage": {"a": 1}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "he"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "llo"}},
        {"type": "message_delta", "delta": {"stop_reason": "end"}, "usage": {"b": 2}},
        {"type": "message_stop"},
    ),
    "openai_chat": sse(
        {"id": "r1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": "he"}}]},
        {"id": "r1", "model": "m-1", "choices": [{"index": 0, "delta": {"content": "llo"}, "finish_reason": "end"}]},
        {"id": "r1", "model": "m-1", "choices": [], "usage": {"b": 2}},
    )
    + b"data: [DONE]\n\n",
    "openai_responses": sse(
        {"type": "response.created", "response": {"id": "r1", "model": "m-1", "output": []}},
        {
            "type": "response.completed",
            "response": {
                "id": "r1",
                "model": "m-1",
                "status": "end",
                "usage": {"b": 2},
                "output": [
                    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hello"}]}
                ],
            },
        },
    ),
    "gemini": sse(
        {"candidates": [{"content": {"parts": [{"text": "he"}]}}]},
        {
            "candidates": [{"content": {"parts": [{"text": "llo"}]}, "finishReason": "end"}],
            "usageMetadata": {"b": 2},
            "modelVersion": "m-1",
            "responseId": "r1",
        },
    ),
}


@pytest.mark.parametrize("dialect", sorted(ASKED))
def test_every_dialects_request_reads_the_same(dialect: str) -> None:
    asked = read_request(dialect, json.dumps(ASKED[dialect]).encode())
    assert asked.system == (SYSTEM,)
    assert [name for name, _ in asked.tools] == ["bash"]
    said, called, got = (part for message in asked.messages for part in message.parts)
    assert said == Part(kind="text", text="list")
    assert (called.kind, called.name, called.tool_id, json.loads(called.text)) == (
        "tool_call",
        "bash",
        "t1",
        {"c": "ls"},
    )
    assert (got.kind, got.tool_id) == ("tool_result", "t1")
    assert "a b" in got.text


@pytest.mark.parametrize("dialect", sorted(ANSWERED))
def test_every_dialects_stream_reads_the_same(dialect: str) -> None:
    answered = read_answer(dialect, ANSWERED[dialect])
    assert answered.message.parts == (Part(kind="text", text="hello"),)
    assert (answered.response_id, answered.model, answered.finish_reason) == ("r1", "m-1", "end")
    assert answered.usage["b"] == 2


@pytest.mark.parametrize("dialect", [*sorted(ANSWERED), "raw"])
def test_an_answer_that_was_cut_off_is_read_as_far_as_it_came(dialect: str) -> None:
    for end in range(0, len(ANSWERED["anthropic"]), 7):
        read_answer(dialect, ANSWERED.get(dialect, ANSWERED["anthropic"])[:end])


def test_what_no_reader_knows_is_shown_as_it_is() -> None:
    assert read_request("raw", b'{"prompt":"x"}').messages[0].parts[0].data == {"prompt": "x"}
    assert read_request("anthropic", b"\xff not json").messages[0].parts[0].text == "\ufffd not json"
    assert read_answer("openai_chat", b'{"error":{"message":"no"}}').message.role == "error"


@given(st.sampled_from(sorted(ASKED)), st.data())
def test_any_json_is_read(dialect: str, data: st.DataObject) -> None:
    leaf = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
    value = st.recursive(leaf, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
    names = st.sampled_from(["messages", "input", "contents", "system", "tools", "choices", "candidates", "content"])
    body = json.dumps(data.draw(st.dictionaries(names, value, max_size=4))).encode()
    read_request(dialect, body)
    read_answer(dialect, body)
    read_answer(dialect, b"data: " + body + b"\n\n")
