"""The scripted model of the matrix: it stands still at a chosen place of each answer until the test lets it go on.

So a kill "in the middle of a tool call's JSON" is one by construction, however slow the machine is. Turn n stops at
the n-th point; in the last of them the model's answer is whole, and it is the tool that waits for a restore.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import h11

from torpor.testing.model_connection import Connection, Request
from torpor.testing.model_scripts import Answer, Conversation, Pace, Say, Try, UseTool
from torpor.testing.model_server import ModelServer
from torpor.testing.model_wire import Wire
from torpor.testing.model_witness import Witness

TEXT_MARKS = (b'"text_delta"', b'"delta":{"content":"', b'"response.output_text.delta"')
TOOL_MARKS = (b'"input_json_delta"', b'"function":{"arguments":"', b'"response.function_call_arguments.delta"')
STOP_SECONDS = 90
PIECES_BEFORE_STOP = 3
"""Of the text, or of a tool call's JSON, before an answer stands still in its middle."""
WAITING, RESTORED = "waiting", "restored"
HOOK = "/run/torpor/after-restore.d/matrix"


class Point(StrEnum):
    """Where a session is killed."""

    BEFORE_HEADERS = "before headers"
    AFTER_HEADERS = "after headers"
    """With the first event, which has no words: the gateway keeps the headers back until there is a body."""
    MID_TEXT = "mid-text"
    MID_TOOL_CALL = "mid-tool-call JSON"
    BETWEEN_TURNS = "between turns"


POINTS = tuple(Point)
M = TypeVar("M", bound="MatrixModel")


def command_of(turn: int) -> str:
    """What the tool of a turn (from 1) does: it leaves its number; the last one also waits until it was restored."""
    leave = f"echo {turn} >> trail.txt; echo ran {turn}"
    if POINTS[turn - 1] is not Point.BETWEEN_TURNS:
        return leave
    hook = f"printf '#!/bin/sh\\ntouch /workspace/{RESTORED}\\n' > {HOOK}; chmod 755 {HOOK}"
    wait = f"touch {WAITING}; until [ -e {RESTORED} ]; do sleep 0.05; done; rm {WAITING} {RESTORED} {HOOK}"
    return f"mkdir -p /run/torpor/after-restore.d; {hook}; {wait}; {leave}"


def tool_call(command: str, offered: frozenset[str]) -> UseTool:
    """A shell command in the words of whichever client asks."""
    if "Bash" in offered:
        return UseTool(name="Bash", arguments={"command": command, "description": "Go on."})
    if "exec_command" in offered:
        return UseTool(name="exec_command", arguments={"cmd": command, "yield_time_ms": 30_000})
    if "shell_command" in offered:
        return UseTool(name="shell_command", arguments={"command": command, "timeout_ms": 240_000})
    return UseTool(name="run_shell", arguments={"command": command})


@dataclass(slots=True)
class Stop:
    """One place where the model stands still."""

    point: Point
    reached: threading.Event = field(default_factory=threading.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    body_bytes: int = 0
    """What was sent of the answer's body until there."""


@dataclass(slots=True)
class StoppingConnection(Connection):
    stop: Stop | None = None
    pieces: int = 0

    async def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        await self._stand(Point.BEFORE_HEADERS)
        await Connection.head(self, status, headers)

    async def send(self, event: h11.Event) -> None:
        await Connection.send(self, event)
        if self.stop is None or not isinstance(event, h11.Data):
            return
        self.stop.body_bytes += len(event.data)
        await self._stand(Point.AFTER_HEADERS)
        marks = TEXT_MARKS if self.stop.point is Point.MID_TEXT else TOOL_MARKS
        self.pieces += any(mark in event.data for mark in marks)
        if self.pieces == PIECES_BEFORE_STOP:
            await self._stand(Point.MID_TEXT)
            await self._stand(Point.MID_TOOL_CALL)

    async def _stand(self, point: Point) -> None:
        if self.stop is not None and self.stop.point is point:
            self.stop.reached.set()
            await self.stop.released.wait()


class MatrixModel(ModelServer):
    """A tool loop of one turn for each point, then a closing sentence."""

    def __init__(self, *, key: str, witness_path: Path) -> None:
        super().__init__(script=self._say, witness=Witness(witness_path), key=key, host="127.0.0.1")
        self.said: list[str] = []
        """Text of every answer to a request that offered tools, in order."""
        self.stops = [Stop(point) for point in POINTS]
        self._end = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def await_stop(self, turn: int) -> Stop:
        stop = self.stops[turn - 1]
        assert stop.reached.wait(STOP_SECONDS), f"the model never came to {stop.point}"
        return stop

    def release(self, turn: int) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stops[turn - 1].released.set)

    def release_all(self) -> None:
        for turn in range(len(self.stops)):
            self.release(turn + 1)

    def stop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._end.set)

    def tries(self) -> list[dict[str, Any]]:
        """Every sending of every request that the witness counted."""
        return [one for request in self.witness.report()["requests"] for one in request["tries"]]

    async def serve(self, listening: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        with self.witness:
            async with asyncio.TaskGroup() as group:
                await self.listen(group, 0, 0)
                listening.set()
                await self._end.wait()
                self.close()

    def _say(self, conversation: Conversation, this: Try) -> Answer:
        if not conversation.tools:
            return Answer(parts=(Say(text="Fine."),))
        turn, mark = len(conversation.tool_results) + 1, f"(attempt {this.attempt}, {this.nonce})"
        if turn > len(POINTS):
            parts: tuple[Say | UseTool, ...] = (Say(text=f"The task is done after {turn - 1} steps {mark}."),)
        else:
            text = f"Step {turn} of {len(POINTS)} {mark}: I say what I do and then I do it."
            parts = (Say(text=text), tool_call(command_of(turn), conversation.tools))
        self.said += [part.text for part in parts if isinstance(part, Say)]
        return Answer(parts=parts, pace=Pace(chunk_seconds=0.005))

    def _stop_of(self, conversation: Conversation) -> Stop | None:
        turn = len(conversation.tool_results)
        return self.stops[turn] if conversation.tools and turn < len(POINTS) else None

    async def _logical_request(self, connection: Connection, request: Request, wire: Wire, body: Any) -> None:
        assert isinstance(connection, StoppingConnection)
        # The gateway keeps its connections: what the last request left there is none of this one's.
        connection.pieces = 0
        connection.stop = self._stop_of(wire.conversation(body, request.credential))
        await super()._logical_request(connection, request, wire, body)

    def _accept_model(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._serve(StoppingConnection(reader, writer), control=False))


@contextmanager
def running(model: M) -> Iterator[M]:
    """The model in a thread of the test's own process, on a real socket."""
    listening = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(model.serve(listening)))
    thread.start()
    try:
        assert listening.wait(30), "the model does not listen"
        yield model
    finally:
        model.stop()
        thread.join()
