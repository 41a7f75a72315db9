"""Reading a copy of an answer: complete or not, what it cost, and never a word too much believed."""

import gzip
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor.gateway.answer import AnswerReader
from torpor.gateway.dialects import ANTHROPIC, DIALECTS, GEMINI, OPENAI_CHAT, OPENAI_RESPONSES, RAW
from torpor.gateway.dialects.base import Dialect
from torpor.gateway.scrub import Scrubber
from torpor.testing.model_scripts import Answer, Say, UseTool
from torpor.testing.model_wire import Anthropic, OpenAIChat, Stamp, Wire
from torpor.testing.model_wire_gemini import Gemini
from torpor.testing.model_wire_responses import OpenAIResponses

ANSWER = Answer(parts=(Say(text="some words of it"), UseTool(name="run_shell", arguments={"command": "ls"})))
STAMP = Stamp(nonce="n", created=1, model="m", prompt_tokens=7, include_usage=True)
SPOKEN = [
    (OPENAI_CHAT, OpenAIChat()),
    (OPENAI_RESPONSES, OpenAIResponses()),
    (ANTHROPIC, Anthropic()),
    (GEMINI, Gemini(model="m", streams=True)),
]
EACH = pytest.mark.parametrize(("dialect", "wire"), SPOKEN, ids=[dialect.name for dialect, _ in SPOKEN])


def reader(dialect: Dialect, kind: str = "text/event-stream", *, status: int = 200, **headers: str) -> AnswerReader:
    fields = {"content-type": kind} | {name.replace("_", "-"): value for name, value in headers.items()}
    return AnswerReader(dialect, status=status, headers=fields, is_llm=True)


@EACH
def test_a_stream_is_complete_only_with_its_last_event(dialect: Dialect, wire: Wire) -> None:
    events = wire.events(ANSWER, STAMP)
    whole, cut = reader(dialect), reader(dialect)
    for event in events:
        whole.feed(event)
    for event in events[: len(events) // 2]:
        cut.feed(event)
    assert whole.complete()
    assert not cut.complete()
    usage = dict(whole.facts.usage)
    assert usage.pop("input_tokens") == 7
    assert usage.pop("output_tokens") > 0
    assert set(usage.values()) <= {0}
    assert whole.facts.finish_reason in {"tool_calls", "tool_use", "completed", "STOP"}


@EACH
def test_a_message_is_complete_only_if_it_is_json(dialect: Dialect, wire: Wire) -> None:
    body = wire.message(ANSWER, STAMP)
    for upto, complete in ((len(body), True), (len(body) // 2, False), (0, False)):
        answer = reader(dialect, "application/json; charset=utf-8")
        answer.feed(body[:upto])
        assert answer.complete() is complete


@EACH
def test_an_error_event_ends_a_stream(dialect: Dialect, wire: Wire) -> None:
    answer = reader(dialect)
    answer.feed(wire.events(ANSWER, STAMP)[0] + wire.error_event("too busy"))
    assert answer.complete()
    assert answer.facts.error


@settings(max_examples=50, deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=8), crlf=st.booleans())
def test_pieces_do_not_matter(cuts: list[int], crlf: bool) -> None:
    for dialect, wire in SPOKEN:
        body = b"".join(wire.events(ANSWER, STAMP))
        body = body.replace(b"\r", b"").replace(b"\n", b"\r\n") if crlf else body
        points = sorted({cut % len(body) for cut in cuts} | {0, len(body)})
        whole, pieces = reader(dialect), reader(dialect)
        whole.feed(body)
        for start, end in itertools.pairwise(points):
            pieces.feed(body[start:end])
        assert pieces.complete() and whole.complete()
        assert pieces.facts == whole.facts


@given(garbage=st.binary(max_size=300))
def test_garbage_disturbs_nothing(garbage: bytes) -> None:
    for dialect in DIALECTS:
        for kind in ("text/event-stream", "application/json"):
            answer = reader(dialect, kind)
            answer.feed(garbage)
            answer.feed(b"data: " + garbage + b"\n\n")
            answer.complete()


@pytest.mark.parametrize(
    "event",
    [
        {"type": "message_start", "message": 7},
        {"type": "message_delta", "delta": [], "usage": "x"},
        {"type": "message_delta", "usage": {"input_tokens": True, "output_tokens": -4}},
        {"choices": [7, None, {"finish_reason": 3}], "usage": []},
        {"choices": 5},
        {"choices": {"a": 1}, "usage": {"prompt_tokens": 1.5, "prompt_tokens_details": 7}},
    ],
)
def test_events_of_a_strange_build_disturb_nothing(event: dict) -> None:
    for dialect in (OPENAI_CHAT, ANTHROPIC):
        answer = reader(dialect)
        answer.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
        assert not answer.complete()
        assert answer.facts.usage == {}


@EACH
def test_what_is_not_understood_is_believed_to_be_whole(dialect: Dialect, wire: Wire) -> None:
    for answer in (
        reader(dialect, "text/html"),
        reader(dialect, "application/json", status=529),
        reader(dialect, content_encoding="br"),
    ):
        answer.feed(b"<html>")
        assert answer.complete()


@EACH
def test_a_compressed_answer_is_read_through(dialect: Dialect, wire: Wire) -> None:
    packed = gzip.compress(b"".join(wire.events(ANSWER, STAMP)))
    whole, cut = reader(dialect, content_encoding="gzip"), reader(dialect, content_encoding="gzip")
    whole.feed(packed)
    cut.feed(packed[: len(packed) // 2])
    assert whole.complete()
    assert not cut.complete()


def test_anthropics_prompt_is_the_sum_of_its_parts_and_the_last_count_counts() -> None:
    answer = reader(ANTHROPIC)
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100, "output_tokens": 1}
    for event in (
        {"type": "message_start", "message": {"usage": usage}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 15}},
    ):
        answer.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert answer.facts.usage == {
        "input_tokens": 123,
        "cache_creation_input_tokens": 20,
        "cache_read_input_tokens": 100,
        "output_tokens": 15,
    }


KEY = "sk-abcabcabcabd"


@given(cuts=st.lists(st.integers(0, 80), max_size=20))
def test_a_key_is_scrubbed_however_it_is_split(cuts: list[int]) -> None:
    text = f"x{KEY}y{KEY}{KEY} sk-abcabcabc sk-abcabc{KEY} end sk-abc".encode()
    scrubber = Scrubber(KEY)
    points = sorted({cut % len(text) for cut in cuts} | {0, len(text)})
    clean = b"".join(scrubber.feed(text[start:end]) for start, end in itertools.pairwise(points))
    clean += scrubber.rest()
    assert clean == text.replace(KEY.encode(), b"*" * len(KEY))


@pytest.mark.parametrize(
    ("event", "complete", "error", "reason"),
    [
        ({"type": "response.completed", "response": {"status": "completed"}}, True, False, "completed"),
        ({"type": "response.failed", "response": {"status": "failed", "error": {"code": "x"}}}, True, True, "failed"),
        (
            {"type": "response.incomplete", "response": {"incomplete_details": {"reason": "max_output_tokens"}}},
            True,
            False,
            "max_output_tokens",
        ),
        ({"type": "error", "message": "m"}, True, True, None),
        ({"type": "response.output_item.done"}, False, False, None),
    ],
)
def test_a_stream_of_responses_ends_with_one_of_four_events(
    event: dict, complete: bool, error: bool, reason: str | None
) -> None:
    answer = reader(OPENAI_RESPONSES)
    answer.feed(b"data: " + json.dumps(event).encode() + b"\n\n")
    assert (answer.complete(), answer.facts.error, answer.facts.finish_reason) == (complete, error, reason)


def test_an_array_of_geminis_is_complete_only_if_it_is_json() -> None:
    wire = Gemini(model="m", streams=True, as_array=True)
    body = b"".join(wire.events(ANSWER, STAMP))
    for upto, complete in ((len(body), True), (len(body) - 1, False)):
        answer = reader(GEMINI, "application/json")
        answer.feed(body[:upto])
        assert answer.complete() is complete
        assert answer.facts.usage.get("input_tokens") == (7 if complete else None)


def test_what_gemini_thinks_is_output_and_what_tools_say_is_input() -> None:
    answer = reader(GEMINI)
    usage = {
        "promptTokenCount": 10,
        "toolUsePromptTokenCount": 3,
        "candidatesTokenCount": 5,
        "thoughtsTokenCount": 7,
        "cachedContentTokenCount": 4,
    }
    blocked = {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": usage}
    answer.feed(b"data: " + json.dumps(blocked).encode() + b"\n\n")
    assert answer.complete()
    assert answer.facts.finish_reason == "SAFETY"
    assert answer.facts.usage == {
        "input_tokens": 13,
        "output_tokens": 12,
        "reasoning_output_tokens": 7,
        "cache_read_input_tokens": 4,
    }


def test_a_kept_answer_that_is_streamed_again_is_watched_and_its_json_is_not() -> None:
    fields = {"content-type": "text/event-stream"}
    streamed = AnswerReader(OPENAI_RESPONSES, status=200, headers=fields, is_llm=False)
    assert not streamed.complete()
    deleted = AnswerReader(OPENAI_RESPONSES, status=200, headers={"content-type": "application/json"}, is_llm=False)
    assert deleted.complete()


def test_an_unknown_api_is_believed_whatever_it_says() -> None:
    for kind in ("text/event-stream", "application/json"):
        answer = AnswerReader(RAW, status=200, headers={"content-type": kind}, is_llm=True)
        answer.feed(b"data: {")
        assert answer.complete()


def test_a_short_key_is_no_secret_and_its_letters_stay() -> None:
    assert Scrubber("ollama").feed(b"ask ollama") == b"ask ollama"
    assert Scrubber(None).feed(b"anything") == b"anything"
