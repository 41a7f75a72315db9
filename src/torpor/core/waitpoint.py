"""A waitpoint: a durable promise that a session waits on. It is resolved once; the first resolution wins.

What is asked and what was answered are small JSON objects, whose fields go by the kind.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torpor.core.ids import CallId, SessionId, WaitpointId


class WaitpointKind(StrEnum):
    BUDGET = "budget"
    """A call does not fit the budget; data: needed (dollars); resolution: limit (dollars)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waitpoint:
    """One row of the waitpoint table.

    Attributes:
        call_id: the call that it holds: safe to send, not sent.
        resolution: None while it is open.
    """

    waitpoint_id: WaitpointId
    session_id: SessionId
    kind: WaitpointKind
    call_id: CallId | None
    data: Mapping[str, Any]
    created_ns: int
    resolved_ns: int | None
    resolution: Mapping[str, Any] | None

    @property
    def is_open(self) -> bool:
        return self.resolved_ns is None
