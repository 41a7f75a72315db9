"""Reads the providers' keys on the host when they are first needed. They go upstream and nowhere else."""

import asyncio
from collections.abc import Mapping

from torpor.config import Secret, Upstream
from torpor.core.errors import UpstreamFailed

COMMAND_SECONDS = 30.0


class KeyRing:
    """The keys that were read so far, by upstream."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
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
        if source.environment is not None:
            value = self._environment.get(source.environment, "")
            if not value:
                raise _missing(upstream, f"the variable {source.environment} is not set")
            return Secret(value)
        if source.command:
            return Secret(await _output_of(upstream, source.command))
        return source.value


async def _output_of(upstream: Upstream, command: tuple[str, ...]) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise _missing(upstream, f"its key_command did not start: {error.strerror}") from error
    try:
        async with asyncio.timeout(COMMAND_SECONDS):
            output, _ = await process.communicate()
    except BaseException as error:
        process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            raise _missing(upstream, f"its key_command did not end within {COMMAND_SECONDS:g} s") from error
        raise
    key = output.decode("utf-8", "replace").strip()
    if process.returncode or not key:
        raise _missing(upstream, f"its key_command ended with status {process.returncode} and {len(key)} characters")
    return key


def _missing(upstream: Upstream, reason: str) -> UpstreamFailed:
    return UpstreamFailed("upstream_key_missing", f"cannot call upstream {upstream.name}: {reason}")
