"""The world beyond the gateway: a model server that answers differently on every sending, and people with messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torpor.core.call import ResponseHead, head_bytes, response_bytes
from torpor.testing.simulator.asks import POOL, Ask

if TYPE_CHECKING:
    from torpor.testing.simulator.node import Node
    from torpor.testing.simulator.store import CallRow
    from torpor.testing.simulator.world import World

SERIAL_AT = slice(27, 33)


class Served:
    """One answer, known by its serial, which stands in its head and its body."""

    __slots__ = ("ask", "call_id", "chunks", "finished", "head", "message", "serial", "truncated", "whole")

    def __init__(self, serial: int, ask: Ask, call_id: str, chunk_count: int, *, truncated: bool) -> None:
        self.serial = serial
        self.ask = ask
        self.call_id = call_id
        self.head = ResponseHead(status=200, reason="OK", headers=(("x-serial", f"{serial:06}"),))
        self.chunks = [b"%06d.%d" % (serial, number) for number in range(chunk_count)]
        self.whole = response_bytes(self.head, self.chunks, finished=True)
        self.truncated = truncated
        self.finished = False
        self.message: int | None = None


class Upstream:
    """What was asked of the outside, in order. It survives every kill."""

    __slots__ = ("answers", "messages", "world")

    def __init__(self, world: World) -> None:
        self.world = world
        self.answers: list[Served] = []
        self.messages: dict[int, Served] = {}

    def request(self, node: Node, row: CallRow, sent_transaction: int) -> Served | None:
        """One request arrives from a node; None if it is refused for now, which barrier calls never are."""
        world = self.world
        world.witness.sends(node, row, sent_transaction)
        if row.ask.kind != "barrier" and world.chance(world.plan.refusal_rate):
            world.witness.refuses(row)
            world.stats["refused"] += 1
            return None
        truncated = world.chance(world.plan.truncation_rate)
        chunks = 1 + int(world.random() * 2)
        served = Served(len(self.answers), row.ask, row.call_id, chunks, truncated=truncated)
        self.answers.append(served)
        return served

    def local(self, message: int) -> Served:
        """A message of a person as an answer. The same message is the same answer, whoever hands it over."""
        served = self.messages.get(message)
        if served is None:
            served = Served(len(self.answers), POOL["receive"][0], "", 1, truncated=False)
            served.finished = True
            served.message = message
            self.answers.append(served)
            self.messages[message] = served
        return served

    def find(self, received: bytes) -> Served | None:
        """The answer that these bytes on an agent's socket are of, by the serial in their head."""
        serial = received[SERIAL_AT]
        return self.answers[int(serial)] if len(serial) == 6 and serial.isdigit() else None


assert head_bytes(ResponseHead(status=200, reason="OK", headers=(("x-serial", "000042"),)))[SERIAL_AT] == b"000042"
