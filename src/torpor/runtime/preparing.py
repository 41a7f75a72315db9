"""Lets the agent's own hooks run before a checkpoint that somebody asked for, and before a sleep (docs/session.md).

Those that the session makes at its turns have none: they are made while the agent waits for a model, and nobody waits
for them (docs/decisions/0141). It changes nothing durable; a node that dies meanwhile leaves programs that go on.
"""

import asyncio
import contextlib

from torpor.core.errors import Conflict, SandboxFailed
from torpor.sandbox.link import Link
from torpor.sandbox.streams import StreamGone
from torpor.sandbox.workers import PREPARE

PREPARE_SECONDS = 15.0
"""For all of them: init gives each program 5, and an agent may have any number."""


async def prepare(link: Link, request_id: int) -> None:
    """Run the programs of `before-checkpoint.d`; returns when they are through, or late, or there can be none.

    Args:
        request_id: as of `Link.work`.
    """
    try:
        stream = await link.work(PREPARE, request_id)
    except (Conflict, SandboxFailed):
        return  # An old init, many workers, or the end of the link, which others are told of.
    try:
        with contextlib.suppress(StreamGone, TimeoutError):
            async with asyncio.timeout(PREPARE_SECONDS):
                while await stream.receive():
                    stream.acknowledge(stream.received)
    finally:
        stream.reset()
        stream.forget()
