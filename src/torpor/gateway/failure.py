"""Why a call has no answer of its provider's, in words for the log and for the agent."""

from torpor.core.errors import UpstreamFailed

NEVER_SENT = frozenset(
    {
        "model_ambiguous",
        "model_not_served",
        "model_price_unknown",
        "upstream_key_missing",
        "upstream_misused",
        "upstream_not_configured",
        "upstream_unreachable",
    }
)
"""Codes of failures before a byte of the request left: they cost nothing."""


class NoAnswer(UpstreamFailed):
    """An upstream did not answer properly, or there is none. `status` and `retry` are what the agent is told."""

    def __init__(self, code: str, reason: str, *, status: int, retry: bool) -> None:
        super().__init__(code, f"cannot get an answer from the model provider: {reason}")
        self.status = status
        self.retry = retry
