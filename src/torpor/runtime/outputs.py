"""Carries the agent's stdout and stderr into the log and to whoever watches, each byte once.

After a restore the agent writes again what it wrote since the cut: the equal part is suppressed, the first difference
is an event, and from there on the new output is the output (RECOVERY section 5.5).
"""

import contextlib
from collections.abc import Callable

from torpor.core.events import EventDraft, Kind
from torpor.core.output import Output, OutputTrack
from torpor.runtime.records import Records
from torpor.sandbox.streams import Stream, StreamGone


class OutputPump:
    """One output stream of one incarnation, from where the image (or the adopted guest) is."""

    def __init__(
        self,
        *,
        records: Records,
        incarnation: int,
        channel: int,
        stream: Stream,
        recorded: bytes,
        show: Callable[[int, bytes], None],
    ) -> None:
        self._records = records
        self._incarnation = incarnation
        self._channel = channel
        self._stream = stream
        self._track = OutputTrack(stream.acknowledged, recorded)
        self._show = show

    async def run(self) -> None:
        """Until the agent's output ends or the sandbox is gone."""
        with contextlib.suppress(StreamGone):
            while piece := await self._stream.receive():
                await self._record(self._track.take(piece))
                self._stream.acknowledge(self._track.position)
            await self._record(self._track.finish())

    async def _record(self, output: Output) -> None:
        """Log what is new. A difference without new bytes is an empty piece, which supersedes the rest as well."""
        if output.differs_at is not None:
            data = {"channel": self._channel, "offset": output.differs_at}
            draft = EventDraft(kind=Kind.OUTPUT_DIFFERED, incarnation=self._incarnation, data=data)
            await self._records.append(draft, durable=False)
        if output.fresh or output.differs_at is not None:
            await self._records.append_output(self._channel, output.offset, self._incarnation, output.fresh)
        if output.fresh:
            self._show(self._channel, output.fresh)
