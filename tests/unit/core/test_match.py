"""Which requests are the same request (RECOVERY 5.2; what real clients do is in the comments)."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.call import RequestKey
from torpor.core.match import DEPTH_MAX, MARKS_MAX, request_key

JSON_TYPE = (("Content-Type", "application/json"),)


def key_of(
    body: object, *, dialect: str = "openai_responses", headers=JSON_TYPE, method="POST", target="/v1/x"
) -> RequestKey:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request_key(dialect=dialect, method=method, target=target, headers=headers, body=raw)


def test_key_order_does_not_change_the_canonical_form():
    one, other = key_of(b'{"a":1,"b":{"c":2,"d":3}}'), key_of(b'{ "b": {"d":3, "c":2}, "a":1 }')
    assert one.exact != other.exact
    assert one.canonical == other.canonical


def test_json_within_strings_is_compared_as_json():
    # Codex re-sends with another key order inside of client_metadata's strings.
    one = key_of({"client_metadata": {"x": '{"a":1,"b":"{\\"c\\":1,\\"d\\":2}"}'}})
    other = key_of({"client_metadata": {"x": '{"b":"{\\"d\\":2,\\"c\\":1}","a":1}'}})
    assert one.canonical == other.canonical


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a":0}', b'{"a":0.0}'),
        (b'{"a":1}', b'{"a":true}'),
        (b'{"a":1}', b'{"a":"1"}'),
        (b'{"a":0}', b'{"a":-0}'),
        (b'{"a":1.0}', b'{"a":1.00}'),
        (b'{"a":100}', b'{"a":1e2}'),
        (b'{"a":null}', b"{}"),
        (b'{"a":null}', b'{"a":"null"}'),
        (b'{"a":{"b":1}}', b'{"a":"{\\"b\\":1}"}'),
        (b'{"a":"{}"}', b'{"a":"@{}"}'),
        (b'{"a":[1,2]}', b'{"a":[2,1]}'),
        (b'{"a":9007199254740993}', b'{"a":9007199254740992}'),
        (b'["a,b"]', b'["a","b"]'),
    ],
)
def test_values_that_differ_never_share_a_key(one: bytes, other: bytes):
    assert key_of(one).logical != key_of(other).logical


@pytest.mark.parametrize(
    "body",
    [b"", b"plain", b"\xff\xfe{}", b'{"a":1,"a":2}', b'{"a":NaN}', b"[" * 100_000 + b"]" * 100_000, b'{"a":1} x'],
)
def test_a_body_without_one_meaning_is_matched_by_its_bytes(body: bytes):
    keys = key_of(body)
    assert keys.exact == keys.canonical == keys.logical


def test_a_body_too_deep_or_too_large_to_take_apart_is_matched_by_its_bytes():
    deep = b"[" * (DEPTH_MAX + 2) + b"]" * (DEPTH_MAX + 2)
    assert key_of(deep).canonical == key_of(deep).exact
    wide = b"[" + b"1," * MARKS_MAX + b"1]"
    assert key_of(wide).canonical == key_of(wide).exact


def test_a_text_that_only_looks_like_json_stays_text():
    assert key_of({"a": "{broken"}).canonical != key_of({"a": "{broken "}).canonical
    assert key_of({"a": '{"b":1,"b":2}'}).canonical != key_of({"a": '{"b":2}'}).canonical


def test_a_non_json_body_cannot_pass_for_the_canonical_form_of_another():
    nested = {"a": '{"b":1}'}
    assert key_of(b'{"a":@{"b":1}}').canonical != key_of(nested).canonical


@pytest.mark.parametrize("dialect", ["anthropic", "openai_chat", "openai_responses"])
def test_a_fallback_without_streaming_is_the_same_logical_call(dialect: str):
    # Claude Code answers a cut stream with the same request without `stream`.
    streaming = key_of({"m": 1, "stream": True}, dialect=dialect)
    plain = key_of({"m": 1}, dialect=dialect)
    assert streaming.canonical != plain.canonical
    assert streaming.logical == plain.logical


def test_geminis_shape_is_in_its_address():
    def ask(target: str, body: object = None) -> RequestKey:
        return key_of(body or {"contents": []}, dialect="gemini", target=target)

    whole = ask("/v1beta/models/m:generateContent")
    events = ask("/v1beta/models/m:streamGenerateContent?alt=sse")
    array = ask("/v1beta/models/m:streamGenerateContent")
    assert whole.logical == events.logical == array.logical
    assert len({whole.canonical, events.canonical, array.canonical}) == 3
    assert ask("/v1beta/models/other:generateContent").logical != whole.logical
    assert ask("/v1beta/models/m:countTokens").logical != whole.logical
    assert ask("/v1beta/models/m:generateContent?x=1").logical != whole.logical
    assert ask("/v1beta/models/m:generateContent", {"contents": [1]}).logical != whole.logical
    # Nobody else's address is touched.
    streamed = key_of({"a": 1}, dialect="raw", target="/v1beta/models/m:streamGenerateContent?alt=sse")
    assert streamed.logical != key_of({"a": 1}, dialect="raw", target="/v1beta/models/m:generateContent").logical


def test_an_effect_keeps_every_field():
    assert key_of({"m": 1, "stream": True}, dialect="raw").logical != key_of({"m": 1}, dialect="raw").logical
    one = key_of({"metadata": {"user_id": "1"}, "amount": 5}, dialect="raw")
    other = key_of({"metadata": {"user_id": "2"}, "amount": 5}, dialect="raw")
    assert one.logical != other.logical


def test_what_a_client_fills_in_anew_is_left_out():
    def claude(session: str) -> RequestKey:
        return key_of({"metadata": {"user_id": json.dumps({"session_id": session})}, "m": 1}, dialect="anthropic")

    def codex(started: int) -> RequestKey:
        turn = json.dumps({"turn_id": "t", "turn_started_at_unix_ms": started})
        return key_of({"client_metadata": {"x-codex-turn-metadata": turn}})

    assert claude("1").canonical == claude("2").canonical
    assert claude("1").exact != claude("2").exact
    assert codex(1).canonical == codex(2).canonical


def test_method_target_and_version_headers_count():
    base = key_of({"a": 1})
    assert key_of({"a": 1}, method="PUT").logical != base.logical
    assert key_of({"a": 1}, target="/v1/x?beta=true").logical != base.logical
    beta = (*JSON_TYPE, ("Anthropic-Beta", "context-1m"))
    assert key_of({"a": 1}, headers=beta).logical != base.logical
    assert key_of({"a": 1}, headers=(("content-type", "text/plain"),)).logical != base.logical


def test_other_headers_do_not_count():
    noise = (
        ("X-Request-Id", "7"),
        ("content-type", "application/JSON; charset=utf-8"),
        ("x-stainless-retry-count", "1"),
    )
    assert key_of({"a": 1}, headers=noise) == key_of({"a": 1})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def reordered(value: object, rng: random.Random) -> object:
    if isinstance(value, dict):
        items = [(name, reordered(item, rng)) for name, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [reordered(item, rng) for item in value] if isinstance(value, list) else value


@given(json_values, st.randoms(use_true_random=False), st.booleans())
def test_any_order_of_keys_and_any_spacing_is_one_canonical_form(value: object, rng: random.Random, nest: bool):
    other = reordered(value, rng)
    one_body, other_body = json.dumps(value), json.dumps(other, indent=1, ensure_ascii=False)
    if nest and one_body[0] in "{[":
        one_body, other_body = json.dumps({"s": one_body}), json.dumps({"s": other_body}, indent=2)
    one = key_of(one_body.encode())
    assert one.canonical == key_of(other_body.encode("utf-8", "surrogatepass")).canonical


@given(json_values, json_values)
def test_one_canonical_form_is_one_value(one: object, other: object):
    same = key_of(one, dialect="raw").canonical == key_of(other, dialect="raw").canonical
    spelled = [json.dumps(value, sort_keys=True) for value in (one, other)]
    assert same == (spelled[0] == spelled[1])


@given(st.binary(max_size=200))
def test_any_bytes_have_keys(body: bytes):
    assert key_of(body).exact == key_of(body).exact
