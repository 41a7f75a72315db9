"""Which upstream a request goes to, and where there."""

from dataclasses import replace
from pathlib import Path

import pytest

from torpor.config import Upstream, read_upstreams
from torpor.gateway.dialects import RAW, dialects_told
from torpor.gateway.dialects.base import Shape
from torpor.gateway.failure import NoAnswer
from torpor.gateway.routing import Destination, Routing, choose
from torpor.gateway.upstream import target_without_key, upstream_address

CONFIG = """
[upstreams.openai]
key = "k"
paths = ["POST /v1/embeddings"]

[upstreams.llamas]
family = "openai"
base_url = "http://127.0.0.1:11434/v1"
models = ["llama*", "qwen:0.5b"]
paths = ["GET /api/*", "POST /v1/embeddings"]
llm_paths = ["POST /api/chat"]

[upstreams.quens]
family = "openai"
base_url = "http://127.0.0.1:8001/v1"
models = ["qwen*", "llama-guard*"]

[upstreams.lab]
family = "anthropic"
base_url = "http://lab/base"
path_prefix = "/lab"
paths = ["* /metrics"]
"""


@pytest.fixture
def upstreams(tmp_path: Path) -> tuple[Upstream, ...]:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "config.toml").chmod(0o600)
    return read_upstreams(tmp_path, {"GEMINI_API_KEY": "g"})


@pytest.fixture
def routing(upstreams: tuple[Upstream, ...]) -> Routing:
    return Routing(upstreams)


def found(routing: Routing, request: str, *headers: str) -> Destination:
    method, target = request.split(" ")
    destination = routing.destination(method, target, dialects_told(headers))
    assert destination is not None, request
    return destination


def chosen(routing: Routing, request: str, model: str | None = None) -> str:
    return choose(found(routing, request), model).name


@pytest.mark.parametrize(
    ("request_line", "model", "name"),
    [
        ("POST /v1/chat/completions", "gpt-5", "openai"),
        ("POST /v1/chat/completions", "llama3.1:8b", "llamas"),
        ("POST /v1/responses", "qwen3", "quens"),
        ("POST /v1/responses", "qwen:0.5b", "llamas"),
        ("GET /v1/responses/resp_1", None, "openai"),
        ("GET /v1/models", None, "openai"),
        ("POST /v1/embeddings", "e", "openai"),
        ("POST /v1/embeddings", "llama-embed", "llamas"),
        ("GET /api/tags", None, "llamas"),
        ("POST /lab/v1/messages?beta=true", "anything", "lab"),
        ("POST /lab/v1/chat/completions", "llama3", "lab"),
        ("PUT /lab/metrics", None, "lab"),
        ("POST /v1beta/models/gemini-x:generateContent", "gemini-x", "gemini"),
    ],
)
def test_a_prefix_decides_else_the_model_else_the_familys_default(
    routing: Routing, request_line: str, model: str | None, name: str
) -> None:
    assert chosen(routing, request_line, model) == name


def test_a_model_that_two_serve_or_nobody_is_an_error_in_words(
    upstreams: tuple[Upstream, ...], routing: Routing
) -> None:
    with pytest.raises(NoAnswer, match="llamas and quens") as refused:
        chosen(routing, "POST /v1/chat/completions", "llama-guard-2")
    assert (refused.value.code, refused.value.status, refused.value.retry) == ("model_ambiguous", 404, False)
    only_llamas = Routing([upstream for upstream in upstreams if upstream.name in {"llamas", "quens"}])
    with pytest.raises(NoAnswer, match="'gpt-5', which no upstream") as refused:
        chosen(only_llamas, "POST /v1/chat/completions", "gpt-5")
    assert (refused.value.code, refused.value.status, refused.value.retry) == ("model_not_served", 404, False)
    with pytest.raises(NoAnswer, match="names no model"):
        chosen(only_llamas, "GET /v1/models")
    with pytest.raises(NoAnswer, match="ANTHROPIC_API_KEY"):
        chosen(routing, "POST /v1/messages", "claude")


@pytest.mark.parametrize(
    "request_line",
    [
        "DELETE /v1/embeddings",
        "POST /api/tags",
        "GET /api/../v1/files",
        "GET /api/a%2fb",
        "GET /api/",
        "GET /metrics",
        "GET /lab",
        "POST /labv1/messages",
        "GET /v1/files",
        "GET /v1/responses/..",
        "GET /v1/responses/a/b",
        "PUT /v1/responses/a",
        "POST /v1beta/models/../x:generateContent",
        "POST /v1beta/models/a%2f:generateContent",
        "POST /v1beta/models/m:embedContent",
        "GET /v1beta/models/m:generateContent",
    ],
)
def test_nothing_else_is_let_through(routing: Routing, request_line: str) -> None:
    method, target = request_line.split(" ")
    assert routing.destination(method, target, ()) is None


@pytest.mark.parametrize(
    ("request_line", "dialect", "is_llm"),
    [
        ("POST /v1/responses", "openai_responses", True),
        ("POST /v1/responses/compact", "openai_responses", True),
        ("POST /v1/responses/input_tokens", "openai_responses", False),
        ("GET /v1/responses/resp_1?stream=true&starting_after=3", "openai_responses", False),
        ("DELETE /v1/responses/resp_1", "openai_responses", False),
        ("POST /v1/responses/resp_1/cancel", "openai_responses", False),
        ("GET /v1/responses/resp_1/input_items", "openai_responses", False),
        ("POST /v1beta/models/m:generateContent", "gemini", True),
        ("POST /v1beta/models/m:countTokens", "gemini", False),
        ("POST /v1beta/tunedModels/t:generateContent", "gemini", True),
        ("GET /v1beta/models", "gemini", False),
        ("GET /v1beta/models/m", "gemini", False),
        ("POST /v1/embeddings", "raw", False),
        ("POST /api/chat", "raw", True),
    ],
)
def test_which_requests_a_model_thinks_for(routing: Routing, request_line: str, dialect: str, *, is_llm: bool) -> None:
    destination = found(routing, request_line)
    assert (destination.dialect.name, destination.route.is_llm) == (dialect, is_llm)


@pytest.mark.parametrize(
    ("request_line", "shape"),
    [
        ("POST /v1beta/models/m:generateContent", Shape.MESSAGE),
        ("POST /v1beta/models/m:streamGenerateContent?alt=sse", Shape.EVENTS),
        ("POST /v1beta/models/m:streamGenerateContent", Shape.ARRAY),
    ],
)
def test_the_address_says_how_gemini_answers(routing: Routing, request_line: str, shape: Shape) -> None:
    route = found(routing, request_line).route
    assert (route.shape, route.model) == (shape, "m")


@pytest.mark.parametrize(
    ("request_line", "address"),
    [
        ("POST /v1/chat/completions", "/v1/chat/completions"),
        ("POST /v1/embeddings", "/v1/embeddings"),
        ("GET /api/tags", "/api/tags"),
        ("POST /lab/v1/messages", "/base/v1/messages"),
        ("GET /lab/metrics", "/base/metrics"),
        ("POST /v1beta/models/m:countTokens", "/v1beta/models/m:countTokens"),
    ],
)
def test_where_a_path_is_below_an_upstreams_address(routing: Routing, request_line: str, address: str) -> None:
    destination = found(routing, request_line)
    assert upstream_address(destination.candidates[0], destination.route.path) == address


def test_headers_decide_about_a_path_that_several_have(routing: Routing) -> None:
    for header, dialect in (("anthropic-version", "anthropic"), ("x-goog-api-key", "gemini"), ("x-y", "openai_chat")):
        assert found(routing, "GET /v1/models", header).dialect.name == dialect


def test_a_hostile_path_does_not_make_patterns_slow(upstreams: tuple[Upstream, ...]) -> None:
    """With backtracking this takes hours; pytest's own deadline would notice."""
    starred = replace(upstreams[0], paths=("GET /a*a*a*a*a*a*a*b",))
    assert Routing([starred]).destination("GET", "/" + "a" * 100_000, ()) is None
    assert Routing([starred]).destination("GET", "/aaaaaaaab", ()) is not None


def test_what_is_no_longer_configured_is_told(routing: Routing) -> None:
    destination = found(routing, "POST /v1/embeddings")
    with pytest.raises(NoAnswer, match="any more"):
        choose(Destination(dialect=RAW, route=destination.route, candidates=()), "m")


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("/a", "/a"),
        ("/a?", "/a"),
        ("/a?key=secret", "/a"),
        ("/a?alt=sse&key=secret", "/a?alt=sse"),
        ("/a?%6bey=secret&b=key", "/a?b=key"),
        ("/a?key&keys=1", "/a?keys=1"),
    ],
)
def test_a_key_in_the_query_is_dropped(target: str, kept: str) -> None:
    assert target_without_key(target) == kept
