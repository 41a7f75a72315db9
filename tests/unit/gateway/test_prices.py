"""Prices: the user's own first, the listed ones else; a worst case that no answer exceeds."""

import json
import time
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pytest

from torpor.config import PriceRule, read_prices
from torpor.core.errors import InvalidInput
from torpor.core.money import Price
from torpor.gateway.budget import PROMPT_TOKENS_HIDDEN, size_of
from torpor.gateway.prices import OUTPUT_TOKENS_MAX, PriceBook, Source

NOW = 1_795_000_000_000_000_000
FLAT = Price(input=Decimal(1), output=Decimal(10), cache_read=Decimal(1), cache_write=Decimal(2))
MINE = PriceBook([PriceRule(pattern="gpt-*", price=FLAT), PriceRule(pattern="*", price=FLAT, output_tokens_max=7)])
LISTED = PriceBook(())


def openai(model: str | None, url: str | None = None) -> Source:
    return Source(model=model, family="openai", base_url=url)


SONNET = Source(model="claude-sonnet-4-5", family="anthropic", base_url="https://api.anthropic.com")


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_the_users_price_wins_and_says_so() -> None:
    mine = MINE.bill(openai("gpt-4o"), {"input_tokens": 10, "output_tokens": 1}, {}, NOW)
    assert mine.cost_nanousd == 20_000
    assert mine.prices is not None
    assert mine.prices.startswith("config.toml ")
    listed = LISTED.bill(openai("gpt-4o"), {"input_tokens": 10, "output_tokens": 1}, {}, NOW)
    assert listed.cost_nanousd == 35_000
    assert listed.prices is not None
    assert listed.prices.startswith("genai-prices ")


def test_cache_reads_and_both_kinds_of_cache_writes_have_their_listed_prices() -> None:
    usage = {"input_tokens": 1000, "cache_creation_input_tokens": 100, "cache_creation_1h_input_tokens": 40}
    assert LISTED.bill(SONNET, usage, {}, NOW).cost_nanousd == 3_165_000
    read = {"input_tokens": 1000, "cache_read_input_tokens": 1000}
    assert LISTED.bill(SONNET, read, {}, NOW).cost_nanousd == 300_000


def test_a_service_tier_changes_the_price() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    usual, flex = (LISTED.bill(openai("gpt-5"), usage, terms, NOW) for terms in ({}, {"service_tier": "flex"}))
    assert usual.cost_nanousd is not None
    assert flex.cost_nanousd is not None
    assert flex.cost_nanousd < usual.cost_nanousd


@pytest.mark.parametrize("model", [None, "scripted-large", "gpt-oss:20b", ""])
def test_an_unknown_model_has_neither_cost_nor_worst_case(model: str | None) -> None:
    usage = {"input_tokens": 10, "output_tokens": 1}
    assert LISTED.bill(openai(model), usage, {}, NOW).cost_nanousd is None
    assert LISTED.worst_case(openai(model), size_of(body()), NOW) is None


def test_absurd_counts_are_a_cost_or_none_but_no_failure() -> None:
    for usage in ({"input_tokens": 1, "cache_read_input_tokens": 99}, {"output_tokens": 10**15}, {}):
        LISTED.bill(SONNET, usage, {"service_tier": "?"}, NOW)
        MINE.bill(SONNET, usage, {}, NOW)


def test_the_worst_case_covers_every_answer_that_the_request_allows() -> None:
    request = body(model="claude-sonnet-4-5", max_tokens=500, messages=["x" * 5000])
    worst = LISTED.worst_case(SONNET, size_of(request), NOW)
    assert worst is not None
    for cached in ({}, {"cache_creation_input_tokens": 5000, "cache_creation_1h_input_tokens": 5000}):
        cost = LISTED.bill(SONNET, {"input_tokens": 5000, "output_tokens": 500, **cached}, {}, NOW).cost_nanousd
        assert cost is not None
        assert cost <= worst


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 9}, 9),
        ({"max_tokens": 9, "max_completion_tokens": 20}, 20),
        ({"max_output_tokens": 9}, 9),
        ({"max_tokens": 9, "n": 3}, 27),
        ({"generationConfig": {"maxOutputTokens": 5, "candidateCount": 2}}, 10),
        ({"max_tokens": "9"}, OUTPUT_TOKENS_MAX),
        ({"max_tokens": -1}, OUTPUT_TOKENS_MAX),
        ({"max_tokens": True, "generationConfig": 3}, OUTPUT_TOKENS_MAX),
    ],
)
def test_what_a_request_says_of_its_answers_is_believed_or_the_worst_is(fields: dict[str, object], tokens: int) -> None:
    book = PriceBook([PriceRule(pattern="m", price=FLAT)])
    request = body(**fields)
    expected = (len(request) + PROMPT_TOKENS_HIDDEN) * 2000 + tokens * 10_000
    assert book.worst_case(openai("m"), size_of(request), NOW) == expected


def test_a_request_that_names_an_earlier_answer_may_fill_the_window() -> None:
    named = size_of(body(previous_response_id="resp_1", max_output_tokens=1))
    assert named.input_tokens(400_000) == 400_000
    assert size_of(body(max_output_tokens=1)).input_tokens(400_000) < 10_000
    assert size_of(b"no json").input_tokens(None) == 7 + PROMPT_TOKENS_HIDDEN


@pytest.mark.parametrize("name", [b"conversation", b"max_tokens", b"generationConfig"])
def test_measuring_a_request_takes_little_more_memory_than_its_bytes(name: bytes) -> None:
    """Two bytes of JSON would be an object of fifty."""
    request = b'{"max_output_tokens": 7, "%s": [%s0]}' % (name, b"[]," * 1_000_000)
    tracemalloc.start()
    try:
        size = size_of(request)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(request)
    finally:
        tracemalloc.stop()
    assert size.limits.tokens == 7
    assert size.names_more == (name == b"conversation")


def test_prices_are_read_from_the_configuration_in_their_order(tmp_path: Path) -> None:
    text = '[prices."local-*"]\ninput = "0.25"\noutput = 2\n'
    text += '[prices."*"]\ninput = "1"\noutput = "2"\nmax_output_tokens = 9\n'
    (tmp_path / "config.toml").write_text(text)
    first, second = read_prices(tmp_path)
    quarter = Decimal("0.25")
    assert first.price == Price(input=quarter, output=Decimal(2), cache_read=quarter, cache_write=quarter)
    assert (first.pattern, second.pattern, second.output_tokens_max) == ("local-*", "*", 9)


@pytest.mark.parametrize("line", ['input = "-1"', 'input = "x"', 'input = "NaN"', 'inputs = "1"', ""])
def test_a_price_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "config.toml").write_text(f'[prices."m"]\noutput = "1"\n{line}\n')
    with pytest.raises(InvalidInput):
        read_prices(tmp_path)


def test_prices_never_ask_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    PriceBook(()).bill(SONNET, {"input_tokens": 1}, {}, time.time_ns())
