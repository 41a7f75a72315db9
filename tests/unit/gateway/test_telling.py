"""A note finds its place in a request of each model API, and in no other."""

import json
from typing import Any

import pytest

from torpor.db.requests import RequestHead
from torpor.gateway.dialects import DIALECTS
from torpor.gateway.intake import from_log
from torpor.gateway.routing import Routing
from torpor.gateway.telling import with_note

ASKED = {"role": "user", "content": "go on"}
PARTS = [{"text": "be brief"}]
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("openai_responses", {"input": "go on"}, {"instructions": "NOTE"}),
    ("openai_responses", {"input": [ASKED], "instructions": "be brief"}, {"instructions": "be brief\n\nNOTE"}),
    ("gemini", {"contents": []}, {"systemInstruction": {"parts": [{"text": "NOTE"}]}}),
    (
        "gemini",
        {"contents": [], "systemInstruction": {"role": "system", "parts": PARTS}},
        {"systemInstruction": {"role": "system", "parts": [*PARTS, {"text": "NOTE"}]}},
    ),
    (
        "gemini",
        {"contents": [], "system_instruction": {"parts": PARTS}},
        {"system_instruction": {"parts": [*PARTS, {"text": "NOTE"}]}},
    ),
    ("openai_chat", {"messages": [ASKED]}, {"messages": [ASKED, {"role": "system", "content": "NOTE"}]}),
    ("anthropic", {"system": "be brief"}, {"system": [{"type": "text", **PARTS[0]}, {"type": "text", "text": "NOTE"}]}),
]


@pytest.mark.parametrize(("dialect", "request_body", "changed"), CASES)
def test_a_note_is_added_where_the_api_has_system_words(
    dialect: str, request_body: dict[str, Any], changed: dict[str, Any]
) -> None:
    told = with_note(dialect, json.dumps(request_body).encode(), "NOTE")
    assert told is not None
    assert json.loads(told) == {**request_body, **changed}


@pytest.mark.parametrize(
    ("dialect", "request_body"),
    [
        ("openai_responses", {"instructions": ["be brief"]}),
        ("gemini", {"systemInstruction": "be brief"}),
        ("gemini", {"systemInstruction": {"parts": "be brief"}}),
        ("raw", {"messages": [ASKED]}),
    ],
)
def test_a_request_without_a_place_for_a_note_gets_none(dialect: str, request_body: dict[str, Any]) -> None:
    assert with_note(dialect, json.dumps(request_body).encode(), "NOTE") is None


def test_every_api_of_a_model_has_a_place_for_a_note() -> None:
    assert {case[0] for case in CASES} == {dialect.name for dialect in DIALECTS if not dialect.opaque}


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        (b"null", True),
        (b"{}", True),
        (b'{"include_usage": false}', True),
        (b'{"include_usage": true}', False),
        (b'"\xde"', False),
        (b"[]", False),
        (b'{"a": [' + b"[]," * 2000 + b"0]}", False),
    ],
)
def test_only_options_that_a_provider_would_take_are_added_to(options: bytes, *, asks: bool) -> None:
    body = b'{"model": "m", "stream": true, "messages": [], "stream_options": %s}' % options
    head = RequestHead(method="POST", target="/v1/chat/completions", headers=())
    intake = from_log(head, body, Routing(()), dialect="openai_chat", is_llm=True)
    assert (intake.asking_for_usage(intake.outgoing) is not None) == asks


def test_a_request_with_a_note_asks_for_token_counts_all_the_same() -> None:
    body = json.dumps({"model": "m", "messages": [ASKED], "stream": True}).encode()
    intake = from_log(
        RequestHead(method="POST", target="/v1/chat/completions", headers=()),
        body,
        Routing(()),
        dialect="openai_chat",
        is_llm=True,
    )
    noted = intake.outgoing_with("NOTE")
    assert noted is not None
    asking = intake.asking_for_usage(noted)
    assert asking is not None
    assert json.loads(asking.body) == {**json.loads(noted.body), "stream_options": {"include_usage": True}}
    assert intake.request.body == body
