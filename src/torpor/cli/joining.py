"""`torpor wait`: until sessions have ended, from outside."""

import asyncio
import os
from typing import Annotated, Any

import typer

from torpor.cli.printer import notice, print_json
from torpor.core.clock import SystemClock
from torpor.core.errors import MachineUnfit, SandboxFailed
from torpor.core.session import ENDED, SessionStatus
from torpor.db.sessions import Session
from torpor.runtime.runtime import open_runtime

LOOK_SECONDS = 0.25
EXIT_WITHOUT_STATUS = 137
"""What a session exits with that ended without its agent: cancelled, or on another path than the log's."""


def register(app: typer.Typer) -> None:
    app.command("wait")(wait)


def wait(
    sessions: Annotated[
        list[str], typer.Argument(metavar="SESSION...", help="Ids, unique beginnings of ids, or names.")
    ],
    any_: Annotated[bool, typer.Option("--any", help="Until one of them has ended, not all.")] = False,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="Give up after so long (exit status 69).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what ended, one session a line.")] = False,
) -> None:
    """Wait until sessions have ended, whoever runs them, or nobody does.

    Exits with the exit status of the first of them, in the order given, that did not end with 0; with --any, with that
    of the one that ended. One that was killed counts as 137. Fails when a session is gone (66) or lost (71).
    """
    ended = asyncio.run(_wait(sessions, wants_all=not any_, timeout=timeout))
    for session in ended:
        if json:
            print_json(_row(session))
        else:
            notice(f"{session.name or session.session_id} has {session.status}")
    raise typer.Exit(next((status for session in ended if (status := _exit_status(session))), 0))


async def _wait(texts: list[str], *, wants_all: bool, timeout: float | None) -> list[Session]:
    clock = SystemClock()
    began = clock.monotonic()
    async with open_runtime(os.environ, clock) as runtime:
        ids = [(await runtime.session(text)).session_id for text in texts]
        while True:
            found = [await runtime.session(each) for each in ids]
            ended = [session for session in found if session.status in ENDED]
            if len(ended) == len(ids) or (ended and not wants_all):
                return ended if wants_all else ended[:1]
            lost = [session for session in found if session.status is SessionStatus.LOST]
            if lost and (wants_all or len(lost) == len(found)):
                raise _never_ends(lost[0])
            if timeout is not None and clock.monotonic() - began >= timeout:
                raise MachineUnfit(
                    "wait_timed_out",
                    f"cannot wait any longer: {len(ids) - len(ended)} of {len(ids)} sessions have not ended",
                    hint="`torpor ls` says what they do.",
                )
            # A session may be run by another process, or by none, which has no way to call us: look again.
            await asyncio.sleep(LOOK_SECONDS)


def _never_ends(session: Session) -> SandboxFailed:
    return SandboxFailed(
        "session_lost",
        f"cannot wait for session {session.session_id} to end: none of its checkpoints restores, it is lost",
        hint="`torpor log SESSION` says why for each. Mend the store and `torpor resume` it, or `torpor kill` it.",
    )


def _exit_status(session: Session) -> int:
    if session.exit_status is not None:
        return session.exit_status
    return 0 if session.status is SessionStatus.SUCCEEDED else EXIT_WITHOUT_STATUS


def _row(session: Session) -> dict[str, Any]:
    return {
        "session": session.session_id,
        "name": session.name,
        "status": session.status.value,
        "exit_status": session.exit_status,
    }
