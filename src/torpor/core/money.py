"""Money: US dollars, exact decimals in events, whole nano-dollars in rows; what a call costs, what a budget allows.

Pure. A cost is rounded up to a nano-dollar once, when it is computed, so an event's text and a row's number say the
same. What is unknown is None, never 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from enum import StrEnum

from torpor.core.errors import InvalidInput

NANOS_PER_DOLLAR = 1_000_000_000
DOLLARS_MAX = 1_000_000
_TOKENS_PER_PRICE = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars for a million tokens. What is read from or written to a prompt cache is part of the input."""

    input: Decimal
    output: Decimal
    cache_read: Decimal
    cache_write: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What one attempt cost, by which table; `cost_nanousd` is None where a count or a price is unknown."""

    cost_nanousd: int | None
    prices: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where a session stands, in nano-dollars.

    Attributes:
        limit: its budget; None allows everything.
        spent: by attempts that ended. One whose cost nobody told counts with what was reserved for it.
        reserved: for attempts whose answers are arriving.
    """

    limit: int | None
    spent: int
    reserved: int


class Verdict(StrEnum):
    """What a budget says to a call that is about to be sent."""

    SEND = "send"
    WAIT = "wait"
    """It does not fit beside what is reserved now; when that is settled it may."""
    HOLD = "hold"
    """Only a higher budget lets it go on."""


def decide(account: Account, need: int) -> Verdict:
    """Whether a call of this worst case may be sent."""
    if account.limit is None or account.spent + account.reserved + need <= account.limit:
        return Verdict.SEND
    return Verdict.WAIT if account.spent + need <= account.limit else Verdict.HOLD


def cost_of(usage: Mapping[str, int], price: Price) -> int | None:
    """What these tokens cost in nano-dollars; None if the answer counted none."""
    if "input_tokens" not in usage and "output_tokens" not in usage:
        return None
    read, written = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
    plain = max(0, usage.get("input_tokens", 0) - read - written)
    per_million = (
        plain * price.input
        + read * price.cache_read
        + written * price.cache_write
        + usage.get("output_tokens", 0) * price.output
    )
    return nanos(per_million / _TOKENS_PER_PRICE)


def nanos(dollars: Decimal) -> int:
    """Whole nano-dollars, rounded up."""
    return int((dollars * NANOS_PER_DOLLAR).to_integral_value(ROUND_CEILING))


def dollars_text(amount_nanousd: int) -> str:
    """An exact decimal number of dollars, without needless zeros: what events hold."""
    text = f"{Decimal(amount_nanousd) / NANOS_PER_DOLLAR:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def parse_dollars(text: str) -> int:
    """An amount that a person typed, in nano-dollars.

    Raises:
        InvalidInput: `amount_malformed`, it is no positive number, or beyond every use.
    """
    try:
        amount = Decimal(text.removeprefix("$"))
    except InvalidOperation:
        amount = Decimal(-1)
    if not amount.is_finite() or not 0 < amount <= DOLLARS_MAX or nanos(amount) != amount * NANOS_PER_DOLLAR:
        raise InvalidInput(
            "amount_malformed",
            f"cannot read the amount {text!r}: it is not a positive number of dollars",
            hint="For example 5 or 0.25.",
        )
    return nanos(amount)
