"""Money is exact: nothing is lost or made by adding, and what is unknown is never 0."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.core.errors import InvalidInput
from torpor.core.money import Account, Price, Verdict, cost_of, decide, dollars_text, nanos, parse_dollars

PRICE = Price(input=Decimal(3), output=Decimal(15), cache_read=Decimal("0.3"), cache_write=Decimal("3.75"))


def test_each_part_of_a_prompt_has_its_price() -> None:
    usage = {"input_tokens": 1000, "cache_read_input_tokens": 600, "cache_creation_input_tokens": 300}
    expected = 100 * 3 + 600 * Decimal("0.3") + 300 * Decimal("3.75") + 50 * 15
    assert cost_of({**usage, "output_tokens": 50}, PRICE) == expected * 1000


def test_an_answer_that_counted_nothing_has_no_cost() -> None:
    assert cost_of({}, PRICE) is None
    assert cost_of({"reasoning_output_tokens": 5}, PRICE) is None
    assert cost_of({"input_tokens": 0}, PRICE) == 0


def test_a_part_of_a_nano_dollar_counts_as_a_whole_one() -> None:
    assert nanos(Decimal("0.0000000001")) == 1
    assert (
        cost_of(
            {"input_tokens": 1},
            Price(input=Decimal("0.0001"), output=Decimal(0), cache_read=Decimal(0), cache_write=Decimal(0)),
        )
        == 1
    )


@given(st.integers(min_value=1, max_value=10**15))
def test_an_amounts_text_is_read_as_the_same_amount(amount: int) -> None:
    assert parse_dollars(dollars_text(amount)) == amount


@pytest.mark.parametrize("text", ["", "0", "-1", "NaN", "Infinity", "1e7", "five", "0.0000000001", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        parse_dollars(text)
    assert refused.value.code == "amount_malformed"


@given(*[st.integers(min_value=0, max_value=100)] * 4)
def test_no_call_is_sent_that_could_overrun_the_limit(limit: int, spent: int, reserved: int, need: int) -> None:
    verdict = decide(Account(limit=limit, spent=spent, reserved=reserved), need)
    assert (verdict is Verdict.SEND) == (spent + reserved + need <= limit)
    # Waiting ends: once nothing is reserved any more the call is sent or held.
    settled = decide(Account(limit=limit, spent=spent, reserved=0), need)
    assert (verdict is not Verdict.HOLD) == (settled is Verdict.SEND)
    assert settled is not Verdict.WAIT


def test_without_a_budget_everything_is_sent() -> None:
    assert decide(Account(limit=None, spent=10**12, reserved=0), 10**12) is Verdict.SEND
