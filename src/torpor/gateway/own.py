"""Answers requests for Torpor's own API: at once if the answer follows from the request, else as a call in the log.

A note and an account of the session are one transaction with their answer. A checkpoint comes before its answer, and
holds the request's stream with nothing delivered: whoever restores it finds the call unanswered, and answers it with
that checkpoint instead of making another. Order, and what a kill -9 leaves:

    call.intended            a call that was never sent: its stream, or the agent's repeat, starts it again
    the checkpoint commits   the same; the checkpoint is found again by the stream that it holds
    sent, what is written, answer, completed: one transaction
                             delivered from the log
"""

from collections.abc import Awaitable, Callable
from http import HTTPStatus

from torpor.core.call import Call
from torpor.core.checkpoint import Checkpoint
from torpor.core.errors import Conflict, InvalidInput, SandboxFailed
from torpor.core.ids import SessionId
from torpor.db.blobs import Stored
from torpor.db.database import Transaction
from torpor.gateway import agent_api, context, effects, mcp
from torpor.gateway.admission import LocalAnswer
from torpor.gateway.agent_api import (
    WAITING,
    EffectBody,
    Lookup,
    NoteBody,
    Operation,
    Query,
    Refused,
    Reply,
    SendBody,
    SpawnBody,
    Wish,
)
from torpor.gateway.delivery import Recording
from torpor.gateway.record import Recorder
from torpor.gateway.request import Request, RequestLine, decoded_body
from torpor.gateway.waits import Waits

SpawnFor = Callable[[Call, SpawnBody, Checkpoint], Awaitable[SessionId]]
"""A session for a call that nobody has run yet, with the workspace of a checkpoint; the same one for the same call."""

CheckpointFor = Callable[[Call], Awaitable[Checkpoint | None]]
"""A durable checkpoint that holds a call's stream; None if none could be made. SandboxFailed: the sandbox is gone."""


def answer_here(request: Request) -> LocalAnswer | None:
    """The answer of a request that needs no log; None if it does."""
    wish = _read(request)
    return _rendered(request.line, wish) if isinstance(wish, Reply) else None


async def look_up(request: Request, recorder: Recorder) -> LocalAnswer | None:
    """The answer of a request that only reads the log as it is now; None if it is a call."""
    if request.line.path not in {agent_api.LOOKUP_PATH, agent_api.CONTEXT_PATH}:
        return None
    wanted = _read(request)
    if isinstance(wanted, Lookup):
        key = effects.key_of(request.line, wanted)
        return _rendered(request.line, await recorder.read(lambda tx, session: effects.found(tx, session, key)))
    return _rendered(request.line, await recorder.read(context.newest))


class OwnPump:
    """Answers one call; to streams and to `Pumps` it is what a `Pump` is.

    Attributes:
        recording: its rows once they are written.
        failed: never; a call that the sandbox's end cut short stays intended.
    """

    failed = False

    def __init__(
        self,
        *,
        call: Call,
        request: Request,
        recorder: Recorder,
        waits: Waits,
        checkpoint_for: CheckpointFor,
        spawn_for: SpawnFor,
    ) -> None:
        self.call = call
        self.recording = Recording(len(call.attempts) + 1)
        self._request = request
        self._recorder = recorder
        self._waits = waits
        self._checkpoint_for = checkpoint_for
        self._spawn_for = spawn_for

    @property
    def request_bytes(self) -> int:
        return len(self._request.body)

    async def run(self) -> None:
        """Carry the call to its answer.

        Raises:
            Superseded: this node lost the session.
        """
        wish = _read(self._request)
        assert isinstance(wish, Wish), "what became a call was one before"
        checkpoint = stored = spawned = None
        if wish.rule.operation in {Operation.CHECKPOINT, Operation.SPAWN}:
            try:
                checkpoint = await self._checkpoint_for(self.call)
            except SandboxFailed:
                self.recording.end(finished=False)
                return
            if isinstance(wish.body, SpawnBody) and checkpoint is not None:
                spawned = await self._spawn(wish.body, checkpoint)
        elif wish.rule.operation in WAITING:
            await self._waits.until_ready(self.call.call_id, wish)
        elif isinstance(wish.body, SendBody):
            stored = await self._recorder.store_text(wish.body.text)

        def write(tx: Transaction) -> LocalAnswer:
            return self._answer(tx, wish, checkpoint, stored, spawned)

        answer = await self._recorder.answer(self.call.call_id, write)
        self.recording.add_head(answer.head)
        if answer.body:
            self.recording.add_chunk(answer.body)
        self.recording.end(finished=True)

    async def _spawn(self, body: SpawnBody, checkpoint: Checkpoint) -> SessionId | Reply:
        try:
            return await self._spawn_for(self.call, body, checkpoint)
        except (InvalidInput, Conflict) as refused:
            return Reply(status=409, body={"code": refused.code, "message": str(refused), "hint": refused.hint})

    def _answer(
        self,
        tx: Transaction,
        wish: Wish,
        checkpoint: Checkpoint | None,
        stored: Stored | None,
        spawned: SessionId | Reply | None,
    ) -> LocalAnswer:
        if isinstance(spawned, Reply):
            reply = spawned
        elif isinstance(wish.body, SpawnBody) and spawned is not None:
            reply = Reply(
                status=201, body=self._recorder.begin_child(tx, self.call.call_id, spawned, wish.body.on_cancel)
            )
        else:
            reply = self._reply(tx, wish, checkpoint, stored)
        if wish.rpc_id is not None:
            reply = mcp.reply_of(wish.rpc_id, reply)
        return _rendered(self._request.line, reply)

    def _reply(self, tx: Transaction, wish: Wish, checkpoint: Checkpoint | None, stored: Stored | None) -> Reply:
        status = wish.rule.status
        match wish.body:
            case NoteBody(text=text):
                return Reply(status=status, body={"seq": self._recorder.append_note(tx, self.call.call_id, text)})
            case EffectBody(name=name, result=result):
                return Reply(status=status, body=effects.record(tx, self.call, name, result))
            case SendBody(text=text):
                return Reply(
                    status=status, body={"number": self._recorder.send_out(tx, self.call.call_id, text, stored)}
                )
            case _ if wish.rule.operation in WAITING:
                return self._waits.reply(tx, self.call.call_id, wish)
            case _ if wish.rule.operation is Operation.SESSION:
                return Reply(status=status, body=self._recorder.describe(tx))
            case _ if checkpoint is not None and wish.rule.operation is Operation.CHECKPOINT:
                return Reply(status=status, body={"checkpoint": checkpoint.number, "seq": checkpoint.seq})
            case _:
                hint = "The session runs on; its log (`torpor log`) has the reason."
                message = "cannot make a checkpoint: saving failed"
                return Reply(status=503, body={"code": "checkpoint_failed", "message": message, "hint": hint})


def _read(request: Request) -> Wish | Query | Reply:
    line = request.line
    body = decoded_body(line, request.body)
    try:
        agent_api.check_origin(line)
        return (mcp if line.path == mcp.PATH else agent_api).read_wish(request, body)
    except Refused as refused:
        return refused.reply


def _rendered(line: RequestLine, reply: Reply) -> LocalAnswer:
    body = b"" if reply.status == HTTPStatus.ACCEPTED else agent_api.json_bytes(reply.body)
    fields = (("content-type", "application/json"), *reply.headers) if body else reply.headers
    head = line.shape(reply.status, HTTPStatus(reply.status).phrase, fields)
    return LocalAnswer(head=head, body=b"" if head.bodiless else body)
