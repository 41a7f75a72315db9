"""The same request to another model: wherever a dialect names it, and nowhere else."""

import json
from typing import Any

import pytest
from tests.unit.core.conftest import make_call

from torpor.core.errors import InvalidInput
from torpor.db.requests import RequestHead
from torpor.runtime.rerunning import with_model
from torpor.runtime.turns import TurnContent


def turn(body: bytes, **call: Any) -> TurnContent:
    made = make_call("c", 2, **{"model": "old", **call})
    head = RequestHead(method="POST", target=made.target, headers=())
    return TurnContent(
        number=1, turns=1, call=made, request_head=head, request=body, answer_head=None, answer=b"", redacted=False
    )


@pytest.mark.parametrize("dialect", ["anthropic", "openai_chat", "openai_responses"])
def test_a_body_names_its_model_and_says_the_rest_as_before(dialect: str) -> None:
    asked = {"messages": [{"role": "user", "content": "model: old \ud83d \u00e9"}], "model": "old", "n": 1.5}
    other = with_model(turn(json.dumps(asked).encode(), dialect=dialect), "new")
    assert json.loads(other.body) == {**asked, "model": "new"}
    assert (other.target, other.model) == ("/v1/chat/completions", "new")


def test_a_target_that_names_the_model_is_the_one_that_changes() -> None:
    target = "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"
    other = with_model(turn(b'{"contents":[]}', dialect="gemini", model="gemini-2.5-flash", target=target), "gemini-3")
    assert other.target == "/v1beta/models/gemini-3:streamGenerateContent?alt=sse"
    assert other.body == b'{"contents":[]}'


@pytest.mark.parametrize("body", [b"\x1f\x8b compressed", b"[1]", b"{}", b'{"model": 7}'])
def test_a_request_that_names_no_model_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput) as refused:
        with_model(turn(body), "new")
    assert refused.value.code == "rerun_unreadable"


def test_a_target_without_the_model_is_refused() -> None:
    with pytest.raises(InvalidInput):
        with_model(turn(b"{}", dialect="gemini", model=None, target="/v1beta/models"), "new")
