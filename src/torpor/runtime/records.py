"""One session's log and rows, written with this owner's token: the runtime's only door to the database.

Every method is one transaction. Superseded from any of them means: stop at once.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torpor.core.call import Call, CallState
from torpor.core.checkpoint import Checkpoint, OpenStream
from torpor.core.clock import Clock
from torpor.core.crash import crash_point
from torpor.core.divergence import OnDivergence
from torpor.core.errors import Conflict, TorporError
from torpor.core.events import Event, EventDraft, Kind
from torpor.core.ids import CallId, SessionId, SnapshotId, WaitpointId
from torpor.core.money import Account
from torpor.core.origin import Origin, Past, Plan
from torpor.core.retention import RetentionPolicy
from torpor.core.session import ENDED, SessionStatus
from torpor.core.waitpoint import ToldFile, Waitpoint
from torpor.db import (
    budgets,
    calls,
    checkpoints,
    copies,
    log,
    messages,
    outputs,
    questions,
    rewinds,
    roots,
    sessions,
    sleeping,
    waitpoints,
)
from torpor.db.ahead import Ahead
from torpor.db.copies import Answer, Joining
from torpor.db.database import Database, Transaction


class Records:
    """The owner's view of its session's rows."""

    def __init__(self, *, database: Database, session_id: SessionId, owner_token: int, clock: Clock) -> None:
        self.database = database
        self.session_id = session_id
        self.owner_token = owner_token
        self._clock = clock

    @property
    def _fence(self) -> Any:
        """What every statement that writes presents."""
        return {"session_id": self.session_id, "owner_token": self.owner_token}

    async def position(self) -> tuple[int, int]:
        """The log's head and the branch's cursor."""
        session = await self.session()
        return session.head_seq, session.cursor_seq

    async def session(self) -> sessions.Session:
        return await self.database.read(lambda tx: sessions.get(tx, self.session_id))

    async def append(self, *drafts: EventDraft, durable: bool = True) -> list[Event]:
        def work(tx: Transaction) -> list[Event]:
            return log.append(
                tx,
                **self._fence,
                drafts=drafts,
                wall_ns=self._clock.wall_ns(),
            )

        return await self.database.write(work, durable=durable)

    async def set_status(self, status: SessionStatus, reason: str = "", exit_status: int | None = None) -> None:
        """Move along the status table; being there already is fine."""

        def work(tx: Transaction) -> None:
            if sessions.get(tx, self.session_id).status is not status:
                sessions.set_status(
                    tx,
                    **self._fence,
                    status=status,
                    wall_ns=self._clock.wall_ns(),
                    reason=reason,
                    exit_status=exit_status,
                )

        await self.database.write(work, durable=True)

    async def fall_asleep(self, checkpoint: Checkpoint, at_latest: int | None) -> bool:
        """Sleep at a checkpoint until what the agent waits for comes; False: some of it came since the cut.

        Args:
            at_latest: when it wakes whatever its waitpoints say; None: they alone do.
        """
        cut: dict[str, Any] = {"cut_seq": checkpoint.seq, "at_latest": at_latest}
        return await self.database.write(
            lambda tx: sleeping.fall_asleep(tx, **self._fence, **cut, wall_ns=self._clock.wall_ns()), durable=True
        )

    async def run(self, reason: str, *, attended: bool) -> None:
        """The session runs. If nobody attends it, a node daemon is to go on with it whenever no node has it."""
        await self._set_status_and_wake(SessionStatus.RUNNING, None if attended else sleeping.NOW, reason)

    async def make_due(self) -> None:
        """A node daemon is to run the session from now on.

        Raises:
            Conflict: `session_ended`.
        """

        def work(tx: Transaction) -> None:
            status = sessions.get(tx, self.session_id).status
            if status in ENDED:
                reason = f"cannot resume session {self.session_id}: it has {status}"
                raise Conflict("session_ended", reason, hint="`torpor log SESSION` shows its past.")
            sleeping.set_wake(tx, **self._fence, wake_ns=sleeping.NOW)

        await self.database.write(work, durable=True)

    async def stop(self, wake_ns: int | None) -> None:
        """A person stopped the session, which is cut and stands still, or sleeps; None: only a person wakes it."""
        await self._set_status_and_wake(SessionStatus.ASLEEP, wake_ns, "stopped by a person")

    async def limit_memory(self, limit_bytes: int) -> None:
        """From its next life on the sandbox may take so much."""
        incarnation = (await self.session()).incarnation
        data = {"limit_bytes": limit_bytes}
        await self.append(EventDraft(kind=Kind.MEMORY_CHANGED, incarnation=incarnation, data=data))

    async def park(self, reason: str) -> None:
        """The session is cut and stands still, and sleeps until a person wakes it."""
        await self._set_status_and_wake(SessionStatus.ASLEEP, None, reason)

    async def _set_status_and_wake(self, status: SessionStatus, wake_ns: int | None, reason: str) -> None:

        def work(tx: Transaction) -> None:
            if sessions.get(tx, self.session_id).status is not status:
                sessions.set_status(tx, **self._fence, status=status, wall_ns=self._clock.wall_ns(), reason=reason)
            sleeping.set_wake(tx, **self._fence, wake_ns=wake_ns)

        await self.database.write(work, durable=True)

    async def wait(self, reason: str) -> None:
        """A session that runs waits from now on; one that is on its way to sleep, or to its end, keeps its status."""
        await self._move(SessionStatus.RUNNING, SessionStatus.WAITING, reason)

    async def go_on(self, reason: str) -> None:
        """A session that waits runs again, unless it also waits on a waitpoint."""
        await self._move(SessionStatus.WAITING, SessionStatus.RUNNING, reason)

    async def _move(self, present: SessionStatus, wanted: SessionStatus, reason: str) -> None:

        def work(tx: Transaction) -> None:
            held = wanted is SessionStatus.RUNNING and waitpoints.open_waitpoints(tx, self.session_id)
            if sessions.get(tx, self.session_id).status is present and not held:
                sessions.set_status(tx, **self._fence, status=wanted, wall_ns=self._clock.wall_ns(), reason=reason)

        await self.database.write(work, durable=True)

    async def begin_incarnation(
        self, number: int, checkpoint: Checkpoint, mode: str, reason: str, *, memory_lost: bool = False
    ) -> None:
        """Make a new incarnation durable before anything of it exists; the cursor goes back to the checkpoint's."""

        def work(tx: Transaction) -> None:
            sessions.set_incarnation(
                tx,
                **self._fence,
                incarnation=number,
                wall_ns=self._clock.wall_ns(),
                data={
                    "mode": mode,
                    "reason": reason,
                    "checkpoint": checkpoint.number,
                    **({"memory_lost": True} if memory_lost else {}),
                },
            )
            sessions.set_cursor(tx, **self._fence, cursor_seq=checkpoint.cursor_seq)

        await self.database.write(work, durable=True)

    async def commit_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Checkpoint row, event and head in one transaction."""

        def work(tx: Transaction) -> Checkpoint:
            return checkpoints.commit(
                tx,
                **self._fence,
                checkpoint=checkpoint,
                wall_ns=self._clock.wall_ns(),
            )

        return await self.database.write(work, durable=True)

    async def retain(
        self, policy: RetentionPolicy, *, in_use: Collection[SnapshotId], at_least: int
    ) -> tuple[int, ...]:
        """Forget what the policy does not keep, written and not synced: a collector syncs before it deletes."""

        def work(tx: Transaction) -> tuple[int, ...]:
            return roots.retain(
                tx,
                **self._fence,
                policy=policy,
                wall_ns=self._clock.wall_ns(),
                in_use=in_use,
                at_least=at_least,
            )

        return await self.database.write(work, durable=False)

    async def forget_damaged(self, damaged: Sequence[roots.Root]) -> None:
        """Give up on checkpoints that do not restore."""

        def work(tx: Transaction) -> None:
            roots.forget_damaged(tx, **self._fence, roots=damaged, wall_ns=self._clock.wall_ns())

        await self.database.write(work, durable=False)

    async def pin(self, number: int, *, is_pinned: bool) -> None:
        """Keep a checkpoint whatever retention says, or leave it to retention again."""

        def work(tx: Transaction) -> None:
            roots.pin(tx, **self._fence, number=number, is_pinned=is_pinned, wall_ns=self._clock.wall_ns())

        await self.database.write(work, durable=True)

    async def move(self, moves: Sequence[roots.Move]) -> list[Checkpoint]:
        """Let checkpoints name their repacked snapshots."""

        def work(tx: Transaction) -> list[Checkpoint]:
            return roots.move(tx, **self._fence, moves=moves, wall_ns=self._clock.wall_ns())

        return await self.database.write(work, durable=True)

    async def checkpoint_failed(self, incarnation: int, reason: str, error: Exception) -> None:
        code = error.code if isinstance(error, TorporError) else "machine_failed"
        data = {"reason": reason, "code": code, "message": str(error)}
        draft = EventDraft(kind=Kind.CHECKPOINT_FAILED, incarnation=incarnation, data=data)
        await self.append(draft, durable=False)

    async def checkpoint_skipped(self, incarnation: int, call_id: CallId, data: Mapping[str, object]) -> None:
        """A turn without a checkpoint of its own. Not synced: nothing depends on it."""
        draft = EventDraft(kind=Kind.CHECKPOINT_SKIPPED, incarnation=incarnation, call_id=call_id, data=data)
        await self.append(draft, durable=False)

    async def checkpoint_overtaken(self, incarnation: int, data: Mapping[str, object]) -> None:
        """A cut that a newer one replaced before its commit began. Not synced, like a failure."""
        draft = EventDraft(kind=Kind.CHECKPOINT_OVERTAKEN, incarnation=incarnation, data=data)
        await self.append(draft, durable=False)

    async def checkpoints(self) -> list[Checkpoint]:
        """All that may restore, oldest first."""
        return await self.database.read(lambda tx: checkpoints.list_intact(tx, self.session_id))

    async def had_memory(self) -> bool:
        """Whether the newest checkpoint that was ever committed had a memory, wherever it is now."""

        def work(tx: Transaction) -> Event | None:
            return log.last_of_kind(tx, self.session_id, Kind.CHECKPOINT_COMMITTED)

        newest = await self.database.read(work)
        return newest is not None and bool(newest.data["has_memory"])

    async def calls(self) -> dict[CallId, Call]:
        found = await self.database.read(lambda tx: calls.load_calls(tx, self.session_id))
        return {call.call_id: call for call in found}

    async def calls_of(self, streams: Collection[OpenStream]) -> dict[CallId, Call]:
        """The calls that these streams carry."""
        found = await self.database.read(lambda tx: calls.load_of_streams(tx, self.session_id, streams))
        return {call.call_id: call for call in found}

    async def calls_beyond(self, checkpoint: Checkpoint) -> dict[CallId, Call]:
        """All that a life from this checkpoint may have to know of."""
        found = await self.database.read(lambda tx: calls.load_beyond(tx, self.session_id, checkpoint))
        return {call.call_id: call for call in found}

    async def waiting_calls(self) -> list[Call]:
        """The calls that nothing was sent of."""
        return await self.database.read(lambda tx: calls.load_in_state(tx, self.session_id, CallState.INTENDED))

    async def events(self, after_seq: int = 0) -> Sequence[Event]:
        return await self.database.read(lambda tx: log.events(tx, self.session_id, after_seq=after_seq))

    async def append_output(self, channel: int, position: int, incarnation: int, data: bytes) -> None:
        """Written, not synced: an image that no longer has these bytes is committed after them, durably."""

        def work(tx: Transaction) -> None:
            outputs.append_output(
                tx,
                **self._fence,
                channel=channel,
                position=position,
                incarnation=incarnation,
                data=data,
                wall_ns=self._clock.wall_ns(),
            )

        await self.database.write(work, durable=False)

    async def output_after(self, channel: int, position: int) -> bytes:
        return await self.database.read(lambda tx: outputs.read(tx, self.session_id, channel, position))

    async def end(self, status: SessionStatus, exit_status: int, final: Checkpoint, data: Mapping[str, object]) -> None:
        """The agent's exit, the session's last status and its final workspace, together."""

        def work(tx: Transaction) -> None:
            checkpoints.commit(
                tx,
                **self._fence,
                checkpoint=final,
                wall_ns=self._clock.wall_ns(),
            )
            draft = EventDraft(kind=Kind.AGENT_EXITED, incarnation=final.incarnation, data=data)
            wall_ns = self._clock.wall_ns()
            log.append(tx, **self._fence, drafts=[draft], wall_ns=wall_ns)
            sessions.set_status(
                tx,
                **self._fence,
                status=status,
                wall_ns=wall_ns,
                reason="the agent exited",
                exit_status=exit_status,
            )

        await self.database.write(work, durable=True)

    async def add_to_budget(self, amount_nanousd: int) -> Account:
        """Raise the budget; whoever waits for it is resolved with it."""

        def work(tx: Transaction) -> Account:
            return budgets.add(
                tx,
                **self._fence,
                amount_nanousd=amount_nanousd,
                wall_ns=self._clock.wall_ns(),
            )

        account = await self.database.write(work, durable=True)
        crash_point("waitpoint.resolved")
        return account

    async def resolve(self, waitpoint_id: WaitpointId, answer: str | None, files: Sequence[ToldFile] = ()) -> Waitpoint:
        """Resolve a waitpoint for a person; see `questions.answer`."""

        def work(tx: Transaction) -> Waitpoint:
            wall_ns = self._clock.wall_ns()
            said: dict[str, Any] = {"text": answer, "files": files}
            return questions.answer(tx, **self._fence, waitpoint_id=waitpoint_id, **said, wall_ns=wall_ns)

        point = await self.database.write(work, durable=True)
        crash_point("waitpoint.resolved")
        return point

    async def deliver(self, text: str) -> int:
        """Put a message into the session's inbox; its number."""
        owned = Ahead(database=self.database, session_id=self.session_id, owner_token=self.owner_token)
        stored = await owned.text(text)

        def work(tx: Transaction) -> int:
            return messages.deliver(tx, **self._fence, text=text, wall_ns=self._clock.wall_ns(), stored=stored).number

        number = await self.database.write(work, durable=True)
        crash_point("message.received")
        return number

    def take_answer(self, tx: Transaction, joining: Joining, answer: Answer) -> None:
        """Give a fork's call its parent's answer."""
        step: dict[str, Any] = {**self._fence, "call_id": joining.call_id, "joined": joining.parent_call}
        copies.take_answer(tx, **step, answer=answer, wall_ns=self._clock.wall_ns())

    async def past(self) -> Past:
        """Where the session has been, by its rewinds."""
        return await self.database.read(lambda tx: rewinds.past_of(tx, self.session_id))

    async def rewind(self, origin: Origin, plan: Plan, *, wake_ns: int | None) -> Checkpoint:
        """Take the session back, while no sandbox of it lives, and say when a node is to run it."""

        def work(tx: Transaction) -> Checkpoint:
            sleeping.set_wake(tx, **self._fence, wake_ns=wake_ns)
            return rewinds.rewind(tx, **self._fence, origin=origin, plan=plan, wall_ns=self._clock.wall_ns())

        return await self.database.write(work, durable=True)

    async def fail_diverged(self, incarnation: int, what: str, pending: Sequence[CallId]) -> None:
        """The agent left the log's path, and its session's policy is to fail: the event and the status, together."""

        def work(tx: Transaction) -> None:
            data = {"pending": list(pending), "orphaned": [], "policy": OnDivergence.FAIL.value, "request": what}
            draft = EventDraft(kind=Kind.CALL_DIVERGED, incarnation=incarnation, data=data)
            wall_ns = self._clock.wall_ns()
            log.append(tx, **self._fence, drafts=[draft], wall_ns=wall_ns)
            reason = f"after a restore the agent took another path than the log's: {what}"
            sessions.set_status(tx, **self._fence, status=SessionStatus.FAILED, wall_ns=wall_ns, reason=reason)

        await self.database.write(work, durable=True)

    async def release(self) -> None:
        """Say that no node drives the session any more."""
        await self.database.write(
            lambda tx: sessions.release(tx, **self._fence, wall_ns=self._clock.wall_ns()),
            durable=True,
        )
