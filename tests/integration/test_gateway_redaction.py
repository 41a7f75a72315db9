"""Content is erased between two nodes: a half delivered answer goes on masked; what can't be sent again is told."""

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest
from tests.integration.gateway_stage import CLOCK, Stage, gateway_stage, http_request
from tests.integration.test_divergence import lived_once
from tests.integration.test_gateway import CHAT, MESSAGES, answered, body_of, client, question, status_of
from tests.integration.test_gateway_restart import slow_at_first

from torpor.core.call import CallState
from torpor.core.divergence import OnDivergence
from torpor.core.events import Kind
from torpor.db import redaction, verify
from torpor.db.database import Transaction, open_database
from torpor.gateway.crossroads import Crossroads
from torpor.sandbox.streams import Stream
from torpor.testing.model_scripts import Answer, Conversation, Try, long, plain

SECRET = "sk-planted-0123456789"


async def redact(stage: Stage, pattern: bytes) -> redaction.Plan:
    """As `torpor redact` does it while no node runs the session."""
    database = await open_database(f"sqlite://{stage.directory / 'torpor.db'}", clock=CLOCK)
    try:
        token = await stage.acquire(database)

        def work(tx: Transaction) -> redaction.Plan:
            plan = redaction.plan_pattern(tx, stage.session_id, re.compile(pattern))
            now = CLOCK.wall_ns()
            redaction.apply(tx, session_id=stage.session_id, owner_token=token, plan=plan, wall_ns=now)
            return plan

        plan = await database.write(work, durable=True)
        assert await database.read(lambda tx: verify.verify_chain(tx, stage.session_id)) == []
        return plan
    finally:
        await database.close()


def slow_when_another(conversation: Conversation, this: Try) -> Answer:
    return (slow_at_first if conversation.last_text == "another" else plain)(conversation, this)


def heard_of_sending(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a stream's bytes are on their way to the sandbox."""
    heard, send = asyncio.Event(), Stream.send

    async def told(stream: Stream, offset: int, data: bytes) -> None:
        heard.set()
        await send(stream, offset, data)

    monkeypatch.setattr(Stream, "send", told)
    return heard


@pytest.mark.parametrize(
    ("path", "pattern"),
    [(CHAT, rb"\d{4}"), (MESSAGES, rb"\d{4}"), (CHAT, b"usage|null"), (CHAT, rb"[{}]")],
    ids=["digits-chat", "digits-messages", "usage", "brackets"],
)
async def test_a_half_delivered_answer_goes_on_with_the_mask_at_its_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, pattern: bytes
) -> None:
    async with gateway_stage(tmp_path, script=long) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            connected = client(stage, http_request(path, question()))
            reader, _ = await connected.__aenter__()
            await answered(node)
            whole = await node.logged_response((await node.calls())[0])
            # What a stopped sandbox has not read stays on its way, and that is less than the answer.
            stage.process.send_signal(signal.SIGSTOP)
            sending = heard_of_sending(monkeypatch)
            stage.on_call.gate.set()
            await sending.wait()
        assert (await redact(stage, pattern)).answers
        stage.process.send_signal(signal.SIGCONT)
        async with stage.node() as node:
            received = await reader.read(-1)
            masked = await node.logged_response((await node.calls())[0])
            assert len(received) == len(whole) == len(masked)
            # The sandbox had a part of the true answer; behind it all is masked.
            seam = next(at for at in range(0, len(whole), 1024) if received[at:] == masked[at:])
            assert received[: seam - 1024] == whole[: seam - 1024]
            assert 1024 < seam < len(whole) - 1024
        await connected.__aexit__(None, None, None)


async def test_a_request_that_was_erased_is_not_sent_again_and_its_client_may_ask_anew(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question(f"use {SECRET}")))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_ANSWERING)
        await redact(stage, rb"sk-planted-\d+")
        async with stage.node() as node:
            told = await reader.read(-1)
            assert status_of(told) == 502
            assert b"x-should-retry: true" in told
            assert json.loads(body_of(told))["error"]["code"] == "request_redacted"
            [call] = await node.calls()
            assert call.state is CallState.FAILED
            assert stage.model.witness.requests == 1
            stage.on_call.gate.set()
            assert status_of(await stage.raw(http_request(CHAT, question(f"use {SECRET}")))) == 200
            assert SECRET.encode() in stage.model.requests[-1].body
        await connected.__aexit__(None, None, None)


async def test_a_request_whose_note_was_erased_is_not_sent_again(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow_when_another) as stage:
        redo = await lived_once(stage)
        stage.on_call.gate.clear()
        async with stage.node(incarnation=2, redo=redo, crossroads=Crossroads(OnDivergence.TELL)) as node:
            begun = len(await node.events(Kind.CALL_ANSWERING))
            connected = client(stage, http_request(CHAT, question("another")))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_ANSWERING, begun + 1)
        asked = stage.model.witness.requests
        await redact(stage, rb"Note from Torpor")
        async with stage.node(incarnation=2, crossroads=Crossroads(OnDivergence.TELL)):
            told = await reader.read(-1)
            assert json.loads(body_of(told))["error"]["code"] == "request_redacted"
            assert stage.model.witness.requests == asked
        await connected.__aexit__(None, None, None)
