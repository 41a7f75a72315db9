"""What calls cost: prices that the user gave first, then those in the wheel of genai-prices, never the network.

The only module that knows genai-prices. It is imported when a model call is first made, on a thread: that takes most of
a second, and a session without such calls needs none of it.
"""

import fnmatch
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from hashlib import sha256
from typing import Any

from torpor.config import Family, PriceRule
from torpor.core.money import Bill, cost_of, nanos
from torpor.gateway.budget import OutputLimits, RequestSize

_PROVIDERS: Mapping[str, str] = {"openai": "openai", "anthropic": "anthropic", "gemini": "google"}
"""Whose prices count at an address that genai-prices does not know: a proxy's or a region's of the same API."""

OUTPUT_TOKENS_MAX = 32_768
"""The longest answer of a model of which nothing is said here, when its request sets no limit."""
_LONGEST_ANSWERS: Sequence[tuple[str, int]] = (
    ("gpt-5*", 128_000),
    ("o[134]*", 100_000),
    ("gpt-4o*", 16_384),
    ("gemini-*", 65_536),
    ("claude-*", 128_000),
)
_SERVICE = ("service_tier", "speed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Who answers a call: that, the model and the terms make the price."""

    model: str | None
    family: Family | None
    base_url: str | None


class PriceBook:
    """Prices by model. Methods may take most of a second at first: call them on a thread."""

    def __init__(self, rules: Sequence[PriceRule]) -> None:
        self._rules = rules

    def bill(self, source: Source, usage: Mapping[str, int], terms: Mapping[str, str], wall_ns: int) -> Bill:
        """What an answer cost that counted its tokens so; sent at `wall_ns`, since prices change."""
        rule = self._rule(source.model)
        if rule is not None:
            return Bill(cost_nanousd=cost_of(usage, rule.price), prices=_version_of(rule))
        cost = _listed_cost(source, usage, terms, wall_ns)
        return Bill(cost_nanousd=cost, prices=_listed_version() if cost is not None else None)

    def worst_case(self, source: Source, size: RequestSize, wall_ns: int) -> int | None:
        """The most that a request can cost, in nano-dollars; None if its model's price is unknown.

        A token is a byte or more of the request, which is no longer than the model's window. What the request only
        names (an earlier answer, a cache) fills the window. All of it may be written to a cache, at any service tier.
        """
        rule = self._rule(source.model)
        if rule is None:
            return _listed_worst_case(source, size, wall_ns)
        output = _output_tokens(source, size.limits, rule.output_tokens_max)
        dearest = max(rule.price.input, rule.price.cache_write)
        return nanos((size.input_tokens(None) * dearest + output * rule.price.output) / 1_000_000)

    def _rule(self, model: str | None) -> PriceRule | None:
        return next((rule for rule in self._rules if model is not None and _matches(rule.pattern, model)), None)


def _matches(pattern: str, model: str) -> bool:
    return fnmatch.fnmatchcase(model.lower(), pattern.lower())


def _version_of(rule: PriceRule) -> str:
    price = rule.price
    said = json.dumps([rule.pattern, *map(str, (price.input, price.output, price.cache_read, price.cache_write))])
    return f"config.toml {sha256(said.encode()).hexdigest()[:12]}"


def _output_tokens(source: Source, limits: OutputLimits, known: int | None) -> int:
    model = (source.model or "").rpartition("/")[2]
    longest = known or next((most for glob, most in _LONGEST_ANSWERS if _matches(glob, model)), None)
    if limits.tokens is None:
        return limits.answers * (longest or OUTPUT_TOKENS_MAX)
    return limits.answers * (limits.tokens if longest is None else min(limits.tokens, longest))


def _listed_version() -> str:
    import genai_prices

    return f"genai-prices {genai_prices.__version__}"


@cache
def _snapshot() -> Any:
    """All that genai-prices lists. It stays: a collection that walked it would stop every stream meanwhile."""
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    gc.freeze()
    return snapshot


def _listed(source: Source) -> tuple[Any, Any] | None:
    """The provider and the model as genai-prices lists them."""
    if source.model is None:
        return None
    places = [(None, source.base_url), (_PROVIDERS.get(source.family or ""), None)]
    for provider_id, url in places:
        if provider_id is None and url is None:
            continue
        try:
            return _snapshot().find_provider_model(source.model, None, provider_id, url)
        except LookupError:
            continue
    return None


def _listed_cost(source: Source, usage: Mapping[str, int], terms: Mapping[str, str], wall_ns: int) -> int | None:
    listed = _listed(source)
    if listed is None or ("input_tokens" not in usage and "output_tokens" not in usage):
        return None
    read, written = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
    counts = {
        "input_tokens": max(usage.get("input_tokens", 0), read + written),
        "output_tokens": usage.get("output_tokens", 0),
        "cache_read_tokens": read,
        "cache_write_tokens": written,
        "cache_write_1h_tokens": min(written, usage.get("cache_creation_1h_input_tokens", 0)),
    }
    return _priced(listed, counts, terms, wall_ns)


def _listed_worst_case(source: Source, size: RequestSize, wall_ns: int) -> int | None:
    listed = _listed(source)
    if listed is None:
        return None
    model = listed[1]
    tokens = {
        "input_tokens": size.input_tokens(model.context_window),
        "output_tokens": _output_tokens(source, size.limits, None),
    }
    written = {"cache_write_tokens": tokens["input_tokens"]}
    longer = {**written, "cache_write_1h_tokens": tokens["input_tokens"]}
    tiers = [dict[str, str]()] + [
        dict(variant.when) for variant in model.price_variants or () if set(variant.when) & set(_SERVICE)
    ]
    costs = [
        _priced(listed, {**tokens, **more}, tier, wall_ns)
        for tier in tiers
        for more in (dict[str, int](), written, longer)
    ]
    return max((cost for cost in costs if cost is not None), default=None)


def _priced(listed: tuple[Any, Any], counts: Mapping[str, int], terms: Mapping[str, str], wall_ns: int) -> int | None:
    from genai_prices import Usage

    provider, model = listed
    # What is 0 is left out: a model without a price for it is no reason to know nothing.
    usage = Usage(**{name: number for name, number in counts.items() if number or name in _ALWAYS})
    at = datetime.fromtimestamp(wall_ns / 1e9, UTC)
    try:
        total: Decimal = model.calc_price(
            usage, provider, genai_request_timestamp=at, price_context=dict(terms) or None
        ).total_price
    except ValueError:
        return None
    return nanos(total)


_ALWAYS = ("input_tokens", "output_tokens")
