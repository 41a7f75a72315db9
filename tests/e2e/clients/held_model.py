"""The scripted model with a hand on it: it stands still in the middle of one answer until the test lets it go on.

So a kill in mid-stream is one by construction, however slow the machine is. It runs in a thread of the test's own
process, on a real socket, with its witness in memory.
"""

import asyncio
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torpor.testing.model_connection import Connection
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Script, Try, coding
from torpor.testing.model_server import ModelServer
from torpor.testing.model_witness import Witness

HELD = math.inf
"""The chunk pace that marks the answer to be held."""
EVENTS_BEFORE_HOLD = 5
CHUNK_SECONDS = 0.01


@dataclass(slots=True)
class Hold:
    """Where the model stands still: in the answer to the request with so many tool results."""

    tool_results: int
    released: asyncio.Event = field(default_factory=asyncio.Event)
    events_left: int = 0

    async def pass_by(self) -> None:
        if self.events_left > 0:
            self.events_left -= 1
        else:
            await self.released.wait()


@dataclass(slots=True)
class HeldConnection(Connection):
    hold: Hold | None = None

    async def pause(self, seconds: float | None) -> None:
        if seconds == HELD and self.hold is not None:
            await self.hold.pass_by()
        else:
            await Connection.pause(self, seconds)


class ThreadedModel(ModelServer):
    """The scripted model in a thread of the test's own process."""

    def __init__(self, script: Script, *, key: str, witness_path: Path) -> None:
        super().__init__(script=script, witness=Witness(witness_path), key=key, host="127.0.0.1")
        self._stop = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._stop.set)

    async def serve(self, listening: threading.Event) -> None:
        self.loop = asyncio.get_running_loop()
        with self.witness:
            async with asyncio.TaskGroup() as group:
                await self.listen(group, 0, 0)
                listening.set()
                await self._stop.wait()
                self.close()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve while the context lasts."""
        listening = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self.serve(listening)))
        thread.start()
        try:
            assert listening.wait(30), "the model does not listen"
            yield
        finally:
            self.stop()
            thread.join()


class HeldModel(ThreadedModel):
    """A coding script of `turns` tool calls whose answer number `held_turn` (from 1) stands still half-way."""

    def __init__(self, *, turns: int, held_turn: int, key: str, witness_path: Path) -> None:
        super().__init__(self._say, key=key, witness_path=witness_path)
        self.said: list[str] = []
        """Text of every answer to a request that offered tools, in order."""
        self._coding = coding(turns)
        self._hold = Hold(tool_results=held_turn - 1)

    def release(self) -> None:
        """Let the held answer go on; called by the test's thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._hold.released.set)

    def tries(self) -> list[dict[str, Any]]:
        """Every sending of every request that the witness counted."""
        return [one for request in self.witness.report()["requests"] for one in request["tries"]]

    def _say(self, conversation: Conversation, this: Try) -> Answer:
        answer = self._coding(conversation, this)
        if not conversation.tools:
            return answer
        self.said.append("".join(part.text for part in answer.parts if isinstance(part, Say)))
        held = len(conversation.tool_results) == self._hold.tool_results
        if held:
            self._hold.events_left = EVENTS_BEFORE_HOLD if conversation.stream else 0
        return replace(answer, pace=Pace(chunk_seconds=HELD if held else CHUNK_SECONDS))

    def _accept_model(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(HeldConnection(reader, writer, hold=self._hold), control=False))


@contextmanager
def held_model(*, turns: int, held_turn: int, key: str, witness_path: Path) -> Iterator[HeldModel]:
    model = HeldModel(turns=turns, held_turn=held_turn, key=key, witness_path=witness_path)
    with model.running():
        yield model
