"""Faults of the scripted model server: what goes wrong, for which requests, how often.

A fault is asked for by the request header `x-torpor-fault: KIND`, or by a rule that a test adds, in process or with
`POST /faults`. Rules are tried in order; each says which attempts and how many requests it spoils.
"""

from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

FAULT_HEADER = "x-torpor-fault"


class Fault(StrEnum):
    DROP = "drop"
    """Closes in order before any byte of the answer."""
    RESET_BEFORE_HEAD = "reset_before_head"
    RESET_AFTER_HEAD = "reset_after_head"
    RESET_MID = "reset_mid"
    CLOSE_MID = "close_mid"
    """FIN in the middle, without the last chunk."""
    CUT_MID = "cut_mid"
    """A proper HTTP end in the middle of the stream of events: the transport looks fine."""
    TRUNCATED_JSON = "truncated_json"
    """A proper HTTP answer whose JSON (or last event) stops half-way."""
    STATUS_500 = "status_500"
    STATUS_429 = "status_429"
    STATUS_529 = "status_529"
    GARBAGE = "garbage"
    """Bytes that are not HTTP."""
    SLOW = "slow"
    """Every chunk waits for `slow_seconds`."""
    SILENT = "silent"
    """Takes the request and never answers."""
    UNKNOWN_OPTION = "unknown_option"
    """Refuses a request that has `stream_options`, naming them, as servers do that know no such thing."""
    ERROR_EVENT = "error_event"
    """Status 200, some events, then an in-band error event, then a proper end."""


class FaultRule(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests a fault spoils.

    Attributes:
        attempts: attempt numbers of a logical request that it spoils; empty = all.
        times: how many requests in all; None = no limit.
        contains: text that the request's body must hold.
        at_event: index of the stream event where a fault in the middle strikes; None = half-way.
        slow_seconds: the pause of `slow`.
        retry_after: the header of a refusal.
    """

    fault: Fault
    attempts: list[int] = msgspec.field(default_factory=list[int])
    times: int | None = None
    contains: str = ""
    at_event: int | None = None
    slow_seconds: float = 1.0
    retry_after: str = "1"


@dataclass(slots=True)
class FaultTable:
    """The rules in force, and how often each struck."""

    rules: list[FaultRule] = field(default_factory=list[FaultRule])
    struck: list[int] = field(default_factory=list[int])

    def add(self, rule: FaultRule) -> None:
        self.rules.append(rule)
        self.struck.append(0)

    def clear(self) -> None:
        self.rules.clear()
        self.struck.clear()

    def choose(self, *, header: str | None, attempt: int, body: bytes) -> FaultRule | None:
        """The fault of one request, which counts against its rule."""
        if header:
            return FaultRule(fault=Fault(header))
        for index, rule in enumerate(self.rules):
            spent = rule.times is not None and self.struck[index] >= rule.times
            wrong_attempt = bool(rule.attempts) and attempt not in rule.attempts
            if not spent and not wrong_attempt and rule.contains.encode() in body:
                self.struck[index] += 1
                return rule
        return None
