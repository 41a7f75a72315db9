"""Errors by who must act. Each has a stable code, one sentence and a hint; the CLI's exit status goes by class.

A sentence reads "cannot VERB NOUN ID: REASON". Foreign errors (sqlite3, OSError, runsc's text) are translated at the
one seam where they arise, and are kept as the cause.
"""

from typing import cast


class TorporError(Exception):
    """Base of every error that Torpor raises on purpose.

    Attributes:
        code: stable snake_case name, listed in docs/errors.md.
        hint: what the reader can do next; may be empty.
    """

    exit_status = 70

    def __init__(self, code: str, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class InvalidInput(TorporError):
    """The caller must say something else."""

    exit_status = 64


class NotFound(TorporError):
    """What was named does not exist."""

    exit_status = 66


class Conflict(TorporError):
    """Someone else holds it, or its state forbids this."""

    exit_status = 75


class Superseded(Conflict):
    """This node lost its right to the session: stop at once, write nothing more."""


class MachineUnfit(TorporError):
    """The operator must mend this machine: no runsc, no user namespaces, no space."""

    exit_status = 69


class SandboxFailed(TorporError):
    """The sandbox broke a rule or died: its session must be recovered."""

    exit_status = 71


class Damaged(TorporError):
    """Stored bytes are not what was written."""

    exit_status = 74


class UpstreamFailed(TorporError):
    """A model provider or another server beyond the gateway did not answer properly."""

    exit_status = 76


def innermost(error: BaseException) -> BaseException:
    """The first single error of a group (a TaskGroup wraps what fails in it), or the error itself."""
    while isinstance(error, BaseExceptionGroup):
        first: BaseException = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
        error = first
    return error
