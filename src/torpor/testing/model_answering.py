"""One answer of the scripted model on its way to the client, with the fault that spoils it."""

from dataclasses import dataclass

import h11

from torpor.testing.model_connection import Connection
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import Answer
from torpor.testing.model_wire import Stamp, Wire

STATUS_OF = {Fault.STATUS_500: 500, Fault.STATUS_429: 429, Fault.STATUS_529: 529}


@dataclass(slots=True)
class Answering:
    """One answer on its way, with the fault that spoils it."""

    connection: Connection
    wire: Wire
    answer: Answer
    stamp: Stamp
    rule: FaultRule | None

    async def whole(self) -> None:
        """The answer as one JSON message."""
        body = self.wire.message(self.answer, self.stamp)
        if await self._spoiled_before_head():
            return
        events = len(self.wire.events(self.answer, self.stamp))
        await self.connection.pause(self.answer.pace.first_byte_seconds + events * self._chunk_seconds())
        fault = self.rule.fault if self.rule else None
        if fault in {Fault.TRUNCATED_JSON, Fault.CUT_MID}:
            body = body[: len(body) // 2]
        if fault is Fault.ERROR_EVENT:
            body = self.wire.error(500, "the model stumbled")
        if fault not in {Fault.RESET_AFTER_HEAD, Fault.RESET_MID, Fault.CLOSE_MID}:
            await self.connection.respond(200, body, request_id=f"req_{self.stamp.nonce}")
            return
        await self._head("application/json", content_length=str(len(body)))
        if fault is not Fault.RESET_AFTER_HEAD:
            await self.connection.send(h11.Data(data=body[: len(body) // 2]))
        await self._end_badly()

    async def stream(self) -> None:
        """The answer as server-sent events, one write each."""
        if await self._spoiled_before_head():
            return
        events = self.wire.events(self.answer, self.stamp)
        await self.connection.pause(self.answer.pace.first_byte_seconds)
        await self._head(self.wire.content_type)
        fault = self.rule.fault if self.rule else None
        middle = len(events) // 2
        if self.rule and self.rule.at_event is not None:
            middle = self.rule.at_event
        for index, event in enumerate(events):
            if index == middle and fault is Fault.ERROR_EVENT:
                await self.connection.send(h11.Data(data=self.wire.error_event("the model is overloaded")))
                break
            if index == middle and fault in {Fault.CUT_MID, Fault.TRUNCATED_JSON}:
                torn = event[: len(event) // 2] if fault is Fault.TRUNCATED_JSON else b""
                await self.connection.send(h11.Data(data=torn))
                break
            if fault is Fault.RESET_AFTER_HEAD or (index == middle and fault in {Fault.RESET_MID, Fault.CLOSE_MID}):
                await self._end_badly()
                return
            await self.connection.send(h11.Data(data=event))
            await self.connection.pause(self._chunk_seconds())
        await self.connection.send(h11.EndOfMessage())

    def _chunk_seconds(self) -> float:
        if self.rule and self.rule.fault is Fault.SLOW:
            return self.rule.slow_seconds
        return self.answer.pace.chunk_seconds

    async def _head(self, content_type: str, **headers: str) -> None:
        fields = [("content-type", content_type), ("request-id", f"req_{self.stamp.nonce}")]
        fields += [(name.replace("_", "-"), value) for name, value in headers.items()]
        await self.connection.head(200, fields)

    async def _end_badly(self) -> None:
        if self.rule and self.rule.fault is Fault.CLOSE_MID:
            await self.connection.close()
        else:
            self.connection.reset()

    async def _spoiled_before_head(self) -> bool:
        """Carry out a fault that comes before the head; True if there was one."""
        match self.rule.fault if self.rule else None:
            case Fault.DROP:
                await self.connection.close()
            case Fault.RESET_BEFORE_HEAD:
                self.connection.reset()
            case Fault.GARBAGE:
                await self.connection.send_raw(b"\x16\x03\x01 this is not HTTP\r\n\r\n" * 3)
                await self.connection.close()
            case Fault.SILENT:
                await self.connection.pause(None)
            case Fault.STATUS_500 | Fault.STATUS_429 | Fault.STATUS_529 as fault:
                status = STATUS_OF[fault]
                extra = {"retry_after": self.rule.retry_after} if self.rule and status == 429 else {}
                await self.connection.respond(status, self.wire.error(status, f"scripted {status}"), **extra)
            case Fault.UNKNOWN_OPTION:
                text = "Unrecognized request argument supplied: stream_options"
                await self.connection.respond(400, self.wire.error(400, text))
            case _:
                return False
        return True
