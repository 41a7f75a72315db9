"""From a session that stopped anywhere to one that runs: the ladder of RECOVERY sections 4 and 9.

    adopt the living sandbox -> newest eligible checkpoint -> older ones -> a fresh boot (core/ladder.py)

Each rung that is tried and fails is an event with its reason. A machine that lacks what an image needs ends the climb:
the image is well, and a person may mend the machine, or give up the agent's memory (`boot`). Order of a rung: the
incarnation's number and its event are durable, then the sandbox is made, then its streams are inherited. A kill -9 in
between leaves a numbered sandbox that the next recovery finds: it adopts it if it came to life, else kills it and tries
again under a new number.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from torpor.core.checkpoint import Checkpoint, OpenStream, cut_order, every_stream_goes_on
from torpor.core.clock import Clock
from torpor.core.errors import Damaged, MachineUnfit, SandboxFailed, Superseded, innermost
from torpor.core.events import EventDraft, Kind
from torpor.core.ladder import OnLost, Way, ladder, redo_set_of_lost
from torpor.core.pins import PinsUnmet
from torpor.core.redo import RedoSet
from torpor.core.restart import redo_set_after_restarts, still_restore
from torpor.core.session import SessionStatus
from torpor.gateway.server import Gateway
from torpor.runtime.cutting import open_streams
from torpor.runtime.incarnation import Incarnation, Incarnations
from torpor.runtime.records import Records
from torpor.runtime.restarting import load_restarts
from torpor.sandbox.frames import Phase

_NOT_YET_ALIVE = frozenset({SessionStatus.CREATED, SessionStatus.WAKING, SessionStatus.RECOVERING})
"""A node that died in one of these had not begun to run what its last incarnation's number was given to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A sandbox whose link is open, and what is to be done with it.

    Attributes:
        mode: "boot", "restore" or "adopt".
        streams: what was open at the cut, or, adopted, what is open now.
        memory_lost: it begins anew amid its task, and is to be told.
    """

    life: Incarnation
    mode: str
    checkpoint: Checkpoint
    redo: RedoSet
    streams: tuple[OpenStream, ...]
    requested_at: float
    memory_lost: bool = False


class Ladder:
    """Finds the highest rung that holds."""

    def __init__(
        self,
        *,
        records: Records,
        incarnations: Incarnations,
        gateway: Gateway,
        clock: Clock,
        on_lost: OnLost,
        boot: bool,
    ) -> None:
        """Args:
        boot: the first climb leaves out what has a memory.
        """
        self._on_lost = on_lost
        self._records = records
        self._incarnations = incarnations
        self._gateway = gateway
        self._clock = clock
        self._boot = boot

    async def adopt(self) -> Rung | None:
        """The sandbox of the last incarnation, if it lives and none of its streams holds part of a torn answer."""
        session = await self._records.session()
        checkpoints = await self._records.checkpoints()
        # What may be left of one that sleeps was to be destroyed, and of a lost one nothing came to life.
        gone = session.status in {SessionStatus.ASLEEP, SessionStatus.LOST}
        if session.incarnation == 0 or not checkpoints or gone:
            return None
        started_at = self._clock.monotonic()
        life = await self._incarnations.adopt(session.incarnation, has_lived=session.status not in _NOT_YET_ALIVE)
        if life is None:
            return None
        refusal, rung = await self._consider(life, checkpoints, started_at)
        if refusal:
            life.link.close()
            await self._rejected("adopt", None, life.number, refusal)
        return rung

    async def _consider(
        self, life: Incarnation, checkpoints: list[Checkpoint], started_at: float
    ) -> tuple[str, Rung | None]:
        status = life.link.status
        if status.incarnation != life.number or status.phase not in (Phase.RUNNING, Phase.EXITED):
            return f"its sandbox never came to life as incarnation {life.number}", None
        redo, known = await self._gateway.load_incarnation(life.number)
        streams = open_streams(status, known)
        if any(stream.call_id is None and stream.acknowledged for stream in streams):
            return "the last node died before it had taken over its streams", None
        calls = await self._records.calls_of(streams)
        if not every_stream_goes_on(streams, calls, self._gateway.pump_alive):
            return "its agent holds part of an answer that was torn", None
        newest = max(checkpoints, key=cut_order)
        rung = Rung(life=life, mode="adopt", checkpoint=newest, redo=redo, streams=streams, requested_at=started_at)
        return "", rung

    async def restore(self, reason: str) -> Rung:
        """The newest checkpoint that restores.

        Raises:
            SandboxFailed: `session_lost`: none does.
            PinsUnmet: this machine lacks what one of them needs, and a person can do something about it.
            MachineUnfit: `storage_unreachable`: nobody can say.
        """
        async with contextlib.AsyncExitStack() as held:
            try:  # From before the rows are read: what they name stays until it is read.
                await held.enter_async_context(self._incarnations.lease())
            except MachineUnfit as unfit:
                await self._rejected("restore", None, (await self._records.session()).incarnation, str(unfit))
                raise
            return await self._climb(reason)

    async def _climb(self, reason: str) -> Rung:
        started_at = self._clock.monotonic()
        restarts, past = await load_restarts(self._records), await self._records.past()
        intact = [past.point(point) for point in await self._records.checkpoints()]
        had_memory = not any(point.has_memory for point in intact) and await self._records.had_memory()
        checkpoints = still_restore(intact, restarts)
        wanted: dict[str, Any] = {"on_lost": self._on_lost, "had_memory": had_memory, "give_up_memory": self._boot}
        self._boot = False
        calls = await self._records.calls_of([stream for point in checkpoints for stream in point.open_streams])
        for step in ladder(checkpoints, calls, self._gateway.pump_alive, **wanted):
            checkpoint, mode, memory_lost = step.checkpoint, step.mode, step.way is Way.LOST
            session = await self._records.session()
            number = session.incarnation + 1
            await self._records.begin_incarnation(number, checkpoint, mode, reason, memory_lost=memory_lost)
            try:
                make = self._incarnations.restore if step.way is Way.RESTORE else self._incarnations.boot
                life = await make(number, checkpoint)
            except Superseded:
                raise
            except PinsUnmet as error:
                await self._rejected(mode, checkpoint, number, str(error))
                raise
            except (Damaged, SandboxFailed, MachineUnfit, OSError, ExceptionGroup) as error:
                cause = innermost(error)
                await self._rejected(mode, checkpoint, number, str(cause))
                if isinstance(cause, MachineUnfit) and cause.code == "storage_unreachable":
                    raise cause from error  # No checkpoint's fault: the session is whole, and waits for its store.
                continue
            if memory_lost:
                redo = redo_set_of_lost(await self._records.waiting_calls())
            else:
                beyond = past.calls(await self._records.calls_beyond(checkpoint))
                redo = redo_set_after_restarts(beyond, checkpoint, restarts, past.timeline)
            return Rung(
                life=life,
                mode=mode,
                checkpoint=checkpoint,
                redo=redo,
                streams=() if memory_lost else checkpoint.open_streams,
                requested_at=started_at,
                memory_lost=memory_lost,
            )
        raise SandboxFailed(
            "session_lost",
            f"cannot recover session {self._records.session_id}: none of its {len(checkpoints)} checkpoints restores",
            hint="`torpor log SESSION` says why each was rejected; `torpor pull SESSION` still brings its files.",
        )

    async def _rejected(self, mode: str, checkpoint: Checkpoint | None, number: int, reason: str) -> None:
        data = {"mode": mode, "checkpoint": checkpoint.number if checkpoint else None, "reason": reason}
        draft = EventDraft(kind=Kind.RECOVERY_REJECTED, incarnation=number, data=data)
        await self._records.append(draft)
