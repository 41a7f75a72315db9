"""The beginning of a life on its rung: the agent starts or wakes, and every open stream gets its own (RECOVERY 2, 4).

Nothing is delivered before the guest says that it is alive.
"""

import asyncio
from dataclasses import dataclass

from torpor.core.checkpoint import FORKED, stream_fate
from torpor.core.clock import Clock
from torpor.core.errors import InvalidInput
from torpor.core.events import EventDraft, Kind
from torpor.core.session import SessionStatus
from torpor.gateway.server import Gateway
from torpor.runtime.checkpointing import Checkpointer
from torpor.runtime.incarnation import fresh_entropy
from torpor.runtime.outputs import OutputPump
from torpor.runtime.records import Records
from torpor.runtime.recovery import Rung
from torpor.runtime.spec import SessionSpec
from torpor.runtime.watcher import Watcher
from torpor.sandbox.frames import STDERR, STDOUT, AgentSpec

ALIVE_DEADLINE_SECONDS = 60
MEMORY_LOST = {"TORPOR_MEMORY_LOST": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What it takes to begin the lives of one session.

    Attributes:
        attended: a person's process is its node; else a node daemon is to run it whenever none does.
    """

    spec: SessionSpec
    records: Records
    gateway: Gateway
    checkpointer: Checkpointer
    clock: Clock
    watcher: Watcher
    attended: bool

    async def begin(self, rung: Rung, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Begin a life; its streams are served by `tasks`. Gives the tasks of its outputs.

        Raises:
            InvalidInput: the agent's command can't be run.
            SandboxFailed: the guest did not come to life.
        """
        await self.gateway.begin_incarnation(rung.life.number, rung.redo, adopted=rung.mode == "adopt")
        await self._wake_guest(rung)
        highest = max(point.number for point in await self.records.checkpoints())
        await self.checkpointer.begin_life(
            rung.life, rung.checkpoint, next_number=highest + 1, stands_alone=rung.memory_lost
        )
        outputs = await self._take_over_outputs(rung, tasks)
        await self._take_over_streams(rung, tasks)
        took_ns = round((self.clock.monotonic() - rung.requested_at) * 1e9)
        chosen = EventDraft(
            kind=Kind.RECOVERY_CHOSEN,
            incarnation=rung.life.number,
            data={
                "mode": rung.mode,
                "checkpoint": rung.checkpoint.number,
                "took_ns": took_ns,
                **({"memory_lost": True} if rung.memory_lost else {}),
            },
        )
        await self.records.append(chosen)
        await self.records.run(rung.mode, attended=self.attended)
        # A call that the budget held while the session did not run lets it wait from now on.
        self.gateway.look_again()
        if rung.mode != "boot" or rung.memory_lost:
            self.watcher.notice(_tell(rung, took_ns))
        return outputs

    async def _wake_guest(self, rung: Rung) -> None:
        life, wall_ns = rung.life, self.clock.wall_ns()
        if rung.mode == "boot":
            spec = self.spec
            environment = {**spec.environment, **(MEMORY_LOST if rung.memory_lost else {})}
            arguments = AgentSpec(arguments=spec.argv, environment=environment, cwd=spec.cwd)
            try:
                await life.link.start(arguments, incarnation=life.number, wall_ns=wall_ns, entropy=fresh_entropy())
            except InvalidInput as error:
                await self.records.set_status(SessionStatus.FAILED, str(error), exit_status=127)
                raise
        elif rung.mode == "restore":
            await life.link.restored(
                incarnation=life.number,
                wall_ns=wall_ns,
                slept_ns=max(0, wall_ns - rung.checkpoint.wall_ns),
                entropy=fresh_entropy(),
                environment=self.spec.changes if rung.checkpoint.reason == FORKED else {},
                deadline_seconds=ALIVE_DEADLINE_SECONDS,
            )

    async def _take_over_streams(self, rung: Rung, tasks: asyncio.TaskGroup) -> None:
        calls = await self.records.calls_of(rung.streams)
        for opened in rung.streams:
            call = calls.get(opened.call_id) if opened.call_id else None
            alive = call is not None and self.gateway.pump_alive(call.call_id)
            fate = stream_fate(opened, call, pump_alive=alive)
            # Without a durable call the request starts over: init still has all of it.
            position = opened.read if call is not None else opened.acknowledged
            stream = rung.life.link.inherit(opened.stream, position=position, acknowledged=opened.acknowledged)
            tasks.create_task(self.gateway.inherit(stream, opened, fate, incarnation=rung.life.number))
        inherited = {opened.stream for opened in rung.streams}
        for listed in rung.life.link.status.streams if rung.mode != "boot" else ():
            if listed.kind == "call" and listed.stream not in inherited:
                rung.life.link.refuse(listed.stream)

    async def _take_over_outputs(self, rung: Rung, tasks: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        life = rung.life
        started: list[asyncio.Task[None]] = []
        for channel in (STDOUT, STDERR):
            if rung.mode == "boot":
                stream = life.link.stdout if channel == STDOUT else life.link.stderr
            else:
                # What was acknowledged is in the log. The rest init sends again, whether the log has it or not: its
                # last node may have died, or put it to sleep, with output under way.
                stream = life.link.inherit_output(channel)
            recorded = await self.records.output_after(channel, stream.acknowledged)
            pump = OutputPump(
                records=self.records,
                incarnation=life.number,
                channel=channel,
                stream=stream,
                recorded=recorded,
                show=self.watcher.output,
            )
            started.append(tasks.create_task(pump.run()))
        return started


def _tell(rung: Rung, took_ns: int) -> str:
    milliseconds = took_ns / 1e6
    if rung.memory_lost:
        return f"no memory restores: started anew with the files of checkpoint {rung.checkpoint.number}"
    if rung.mode == "adopt":
        return f"adopted the living sandbox in {milliseconds:.0f} ms"
    return f"restored checkpoint {rung.checkpoint.number} in {milliseconds:.0f} ms"
