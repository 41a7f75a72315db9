"""Whether an agent does nothing but wait for what its session knows of: then it may be put to sleep (RECOVERY 8).

What it waits for goes on without it. That it computes on its own, beside its calls, only its sandbox can tell.
"""

import asyncio
import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torpor.core.ids import CallId
from torpor.gateway.delivery import Recording
from torpor.gateway.pumps import Answer
from torpor.sandbox.fifos import Pulse
from torpor.sandbox.streams import Stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """What all open calls of an idle agent wait for.

    Attributes:
        due_ns: the wall time at which one of them is answered whatever else happens; None: there is no such time.
        for_others: an answer is on its way from somewhere else, as a model's.
    """

    answers: tuple[Answer, ...]
    due_ns: int | None
    for_others: bool

    @property
    def call_ids(self) -> frozenset[CallId]:
        return frozenset(answer.call.call_id for answer in self.answers)

    async def news(self) -> None:
        """Wait until the answer of one of them begins, or will never come."""
        async with asyncio.TaskGroup() as group:
            beginning = [group.create_task(answer.recording.wait_begin()) for answer in self.answers]
            await asyncio.wait(beginning, return_when=asyncio.FIRST_COMPLETED)
            for task in beginning:
                task.cancel()


class Idleness:
    """Counts what the agent's streams are busy with.

    Attributes:
        moves: how often one of them has changed what it is about.
        moved: fires at each.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.moved = Pulse()
        self._unanswered: set[Stream] = set()

    def move(self) -> None:
        self.moves += 1
        self.moved.fire()

    @contextlib.contextmanager
    def asking(self, stream: Stream) -> Generator[None]:
        """The agent is busy with a stream from its first byte on, until it is known which call answers it."""
        self._unanswered.add(stream)
        self.move()
        try:
            yield
        finally:
            self._unanswered.discard(stream)
            self.move()

    def all_wait(self, answers: Sequence[Answer]) -> bool:
        """Whether nothing is asked just now, and nothing of these answers, of which there are some, is there yet."""
        busy = any(stream.received for stream in self._unanswered)
        return bool(answers) and not busy and not any(_has_begun(answer.recording) for answer in answers)


def _has_begun(recording: Recording) -> bool:
    return recording.head is not None or recording.finished is not None
