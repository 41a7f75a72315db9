"""What an owner tells the process that runs it: output and notices on the way, and how it ended.

Apart from the owner, so that commands which drive no session need not import what does.
"""

from dataclasses import dataclass

from torpor.core.session import SessionStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an owner's work ended.

    Attributes:
        status: the session's status now.
        exit_status: the agent's exit status as a shell gives it; None while it has none.
    """

    status: SessionStatus
    exit_status: int | None


class Watcher:
    """What the owner tells people meanwhile; the CLI overrides it."""

    def output(self, channel: int, data: bytes) -> None:
        """New output of the agent (channel 1 stdout, 2 stderr), never repeated."""

    def notice(self, text: str) -> None:
        """One line on what happened to the session."""
