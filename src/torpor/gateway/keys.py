"""Reads the providers' keys on the host when they are first needed. They go upstream and nowhere else."""

import asyncio

from torpor.config import Secret, Upstream
from torpor.core.clock import Clock
from torpor.core.errors import TorporError, UpstreamFailed
from torpor.sandbox import process

COMMAND_SECONDS = 30.0


class KeyRing:
    """The keys that were read so far, by upstream."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[str, Secret | None] = {}
        self._reading = asyncio.Lock()

    async def key(self, upstream: Upstream) -> Secret | None:
        """The key of an upstream; None if it is called without one.

        Raises:
            UpstreamFailed: ("upstream_key_missing") the place that is configured has none.
        """
        async with self._reading:
            if upstream.name not in self._known:
                self._known[upstream.name] = await self._read(upstream)
            return self._known[upstream.name]

    async def _read(self, upstream: Upstream) -> Secret | None:
        source = upstream.key
        if source.command:
            return await self._output_of(upstream, source.command)
        if source.value is None and source.environment is not None:
            raise _missing(upstream, f"the variable {source.environment} is not set")
        return source.value

    async def _output_of(self, upstream: Upstream, command: tuple[str, ...]) -> Secret:
        try:
            finished = await process.run(command, deadline_seconds=COMMAND_SECONDS, clock=self._clock, check=False)
        except TorporError as error:
            # What the command said stays here: the reason goes to the agent and into the log.
            raise _missing(upstream, f"its key_command could not be run ({error.code})") from error
        key = finished.stdout.decode("utf-8", "replace").strip()
        if finished.exit_status or not key:
            raise _missing(upstream, f"its key_command ended with status {finished.exit_status} and no key")
        return Secret(key)


def _missing(upstream: Upstream, reason: str) -> UpstreamFailed:
    return UpstreamFailed("upstream_key_missing", f"cannot call upstream {upstream.name}: {reason}")
