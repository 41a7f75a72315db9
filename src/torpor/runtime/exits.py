"""How the agent's main process ended, in the numbers and words that people know."""

import os
import signal
from collections.abc import Mapping


def exit_code(wait_status: int) -> int:
    """The exit status of the agent as a shell gives it: 128 + n for a signal."""
    code = os.waitstatus_to_exitcode(wait_status)
    return code if code >= 0 else 128 - code


def describe_exit(wait_status: int) -> Mapping[str, object]:
    """The agent's exit for its event."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return {"exit_status": code}
    return {"exit_status": 128 - code, "signal": signal.Signals(-code).name}
