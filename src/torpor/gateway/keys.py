"""Reads keys on the host when they are first needed. A provider's goes upstream and nowhere else."""

import asyncio

from torpor.config import KeySource, Secret, Upstream
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
        try:
            return await read_key(upstream.key, self._clock)
        except NoKeyError as error:
            raise UpstreamFailed("upstream_key_missing", f"cannot call upstream {upstream.name}: {error}") from error


class NoKeyError(Exception):
    """The place that is configured has no key. What a command said stays out of the reason, which may be logged."""


async def read_key(source: KeySource, clock: Clock) -> Secret | None:
    """The key itself; None if none is configured.

    Raises:
        NoKeyError: one is, and is not there.
    """
    if not source.command:
        return _value(source)
    try:
        finished = await process.run(source.command, deadline_seconds=COMMAND_SECONDS, clock=clock, check=False)
    except TorporError as error:
        raise NoKeyError(f"its key_command could not be run ({error.code})") from error
    return _output(finished)


def read_key_blocking(source: KeySource, clock: Clock) -> Secret | None:
    """`read_key` for a thread of its own."""
    if not source.command:
        return _value(source)
    try:
        finished = process.run_blocking(source.command, deadline_seconds=COMMAND_SECONDS, clock=clock, check=False)
    except TorporError as error:
        raise NoKeyError(f"its key_command could not be run ({error.code})") from error
    return _output(finished)


def _value(source: KeySource) -> Secret | None:
    if source.value is None and source.environment is not None:
        raise NoKeyError(f"the variable {source.environment} is not set")
    return source.value


def _output(finished: process.Finished) -> Secret:
    key = finished.stdout.decode("utf-8", "replace").strip()
    if finished.exit_status or not key:
        raise NoKeyError(f"its key_command ended with status {finished.exit_status} and no key")
    return Secret(key)
