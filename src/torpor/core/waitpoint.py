"""A waitpoint: a durable promise that a session waits on. It is resolved once; the first resolution wins.

What is asked and what was answered are small JSON objects, whose fields go by the kind; what people or the agent wrote
is in blocks that they name, so that it can be redacted.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeAlias

from torpor.core.errors import InvalidInput
from torpor.core.ids import CallId, SessionId, WaitpointId


class WaitpointKind(StrEnum):
    BUDGET = "budget"
    """A call does not fit the budget; data: needed (dollars); resolution: limit (dollars)."""
    ASK = "ask"
    """A question to a person; data: question (a block's digest); resolution: answer (a block's digest)."""
    TIMER = "timer"
    """A time, which is when it is due; resolution: nothing."""
    CHILD = "child"
    """The end of a session that the agent began; data: child (its id); resolution: status, exit_status."""
    MESSAGE = "message"
    """The next message of the inbox; resolution: number (of the message)."""


TIMED_OUT: Mapping[str, Any] = {"timed_out": True}
"""How a waitpoint resolves that came to its time; a timer resolves so as well, and it is no failure there."""
ABANDONED: Mapping[str, Any] = {"abandoned": True}
"""How a waitpoint resolves that a rewind left: nobody waits on it any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waitpoint:
    """One row of the waitpoint table.

    Attributes:
        call_id: the call that made it, or that it holds: safe to send, not sent.
        due_ns: wall time at which it resolves by itself; None: never.
        resolution: None while it is open.
    """

    waitpoint_id: WaitpointId
    session_id: SessionId
    kind: WaitpointKind
    call_id: CallId | None
    data: Mapping[str, Any]
    created_ns: int
    due_ns: int | None
    resolved_ns: int | None
    resolution: Mapping[str, Any] | None

    @property
    def is_open(self) -> bool:
        return self.resolved_ns is None

    @property
    def timed_out(self) -> bool:
        """It came to its time before anybody resolved it."""
        return self.resolution is not None and bool(self.resolution.get("timed_out"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What an agent asks a person.

    Attributes:
        choices: the answers that it offers; none: any text.
        free_text: any text will do although there are choices.
        files: what to look at, paths in the workspace.
    """

    text: str
    choices: Sequence[str] = ()
    free_text: bool = False
    files: Sequence[str] = ()

    def check_answer(self, answer: str) -> str:
        """The answer as the agent gets it: a choice in the agent's own spelling, or the text.

        Raises:
            InvalidInput: `answer_not_a_choice`.
        """
        meant = [choice for choice in self.choices if choice == answer] or [
            choice for choice in self.choices if choice.casefold() == answer.strip().casefold()
        ]
        if len(meant) == 1:
            return meant[0]
        if self.choices and not self.free_text:
            raise InvalidInput(
                "answer_not_a_choice",
                f"cannot answer {answer[:200]!r}: it is none of the choices",
                hint=f"The choices: {', '.join(self.choices)}.",
            )
        return answer


ToldFile: TypeAlias = Mapping[str, str]
"""A file that goes with an answer, as the agent gets it: see `told_file`."""

FILES_BYTES_MAX = 32 << 20
"""Of an answer, in all: it goes to the agent in one piece, and into the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a person says to a question.

    Attributes:
        files: those that come along.
    """

    text: str
    files: Sequence[ToldFile] = ()


def told_file(name: str, data: bytes) -> ToldFile:
    """A file as JSON: `name` with its `text`, which a model can read, or with `base64` if it is none."""
    try:
        return {"name": name, "text": data.decode()}
    except UnicodeDecodeError:
        return {"name": name, "base64": base64.b64encode(data).decode()}
