"""The sandbox's own API: each request is a call in the log, answered once however often its agent is restored."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_stage import Node, Stage, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, body_of, client, question, status_of
from tests.integration.test_gateway_restart import redo_everything

from torpor.core.call import CallState
from torpor.core.checkpoint import Checkpoint, StreamFate
from torpor.core.errors import SandboxFailed
from torpor.core.events import Kind
from torpor.core.ids import CheckpointId, SnapshotId
from torpor.core.redo import RedoSet
from torpor.gateway.agent_api import RULES

SESSION, CHECKPOINT, NOTES = (f"/torpor/v1/{name}" for name in ("session", "checkpoint", "notes"))


def note(text: str) -> bytes:
    return http_request(NOTES, json.dumps({"text": text}).encode())


def get(path: str) -> bytes:
    return http_request(path, b"", method="GET")


def json_of(received: bytes) -> Any:
    return json.loads(body_of(received))


def checkpoint_of(stage: Stage, number: int = 3) -> Checkpoint:
    return Checkpoint(
        checkpoint_id=CheckpointId("cp_test"),
        session_id=stage.session_id,
        number=number,
        seq=17,
        committed_seq=18,
        cursor_seq=1,
        incarnation=1,
        snapshot_id=SnapshotId("snap_test"),
        manifest_digest="",
        has_memory=True,
        open_streams=(),
        next_stream=16,
        stdout_bytes=0,
        stderr_bytes=0,
        reason="agent",
        wall_ns=0,
        freeze_ns=0,
        commit_ns=0,
        raw_bytes=0,
        stored_bytes=0,
    )


async def notes_of(node: Node) -> list[str]:
    return await node.texts(Kind.NOTE_ADDED)


async def test_an_agent_learns_who_it_is_by_a_call_in_the_log(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(get(SESSION))
        [call] = await node.calls()
        assert status_of(received) == 200
        assert received == await node.logged_response(call)
        assert call.dialect == "torpor"
        assert call.state is CallState.ANSWERED
        told = json_of(received)
        assert {"head": told.pop("head") > call.intended_seq} == {"head": True}
        assert told == {
            "session": stage.session_id,
            "name": None,
            "incarnation": 1,
            "slept_for": 0.0,
            "memory_lost": False,
            "checkpoint": None,
        }
        assert stage.model.requests == []


async def test_a_note_is_in_the_log_with_its_text_and_its_call(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        text = "half done\r\nsee \u00e9 \U0001f600 \x00"
        received = await stage.raw(note(text))
        [call] = await node.calls()
        [event] = await node.events(Kind.NOTE_ADDED)
        assert status_of(received) == 201
        assert json_of(received) == {"seq": event.seq}
        assert (event.call_id, event.data) == (call.call_id, {"bytes": len(text.encode())})
        assert await notes_of(node) == [text]


async def test_a_note_that_a_restored_agent_writes_again_is_there_once(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            first = await stage.raw(note("one"))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            assert await stage.raw(note("one")) == first
            assert await notes_of(node) == ["one"]
            # What it had not written before its cut is new, though it says the same.
            assert await stage.raw(note("one")) != first
            assert await notes_of(node) == ["one", "one"]


async def test_a_note_whose_client_left_is_not_written_again_by_its_retry(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with client(stage, note("one")):
            await node.logged(Kind.CALL_INTENDED)
        await node.logged(Kind.CALL_DELIVERED)
        assert status_of(await stage.raw(note("one"))) == 201
        assert await notes_of(node) == ["one"]
        assert len(await node.events(Kind.CALL_JOINED)) == 1


async def test_a_restored_agent_that_asks_again_who_it_is_hears_what_it_heard(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            first = await stage.raw(get(SESSION))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo):
            assert await stage.raw(get(SESSION)) == first
            assert json_of(await stage.raw(get(SESSION)))["incarnation"] == 2


async def test_a_checkpoint_is_answered_after_it_is_made_and_holds_its_own_request_unanswered(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.checkpoint_for.gate.clear()
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        async with client(stage, http_request(CHECKPOINT, b"")) as (reader, _):
            await stage.checkpoint_for.asked.wait()
            [call] = await node.calls()
            assert call.state is CallState.INTENDED
            status = await node.link.cut(10)
            node.link.release()
            assert [stream.taken for stream in status.streams if stream.kind == "call"] == [0]
            assert [held.call_id for held in node.gateway.open_streams().values()] == [call.call_id]
            stage.checkpoint_for.gate.set()
            received = await reader.read(-1)
        assert json_of(received) == {"checkpoint": 3, "seq": 17}
        assert received == await node.logged_response((await node.calls())[0])


async def test_a_checkpoint_request_whose_node_died_is_answered_once_by_the_next(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        stage.checkpoint_for.gate.clear()
        async with stage.node() as node:
            connected = client(stage, http_request(CHECKPOINT, b"{}"))
            reader, _ = await connected.__aenter__()
            await stage.checkpoint_for.asked.wait()
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        stage.checkpoint_for.gate.set()
        async with stage.node() as node:
            received = await reader.read(-1)
            [call] = await node.calls()
            assert list(node.fates.values()) == [StreamFate.RESEND]
            assert json_of(received) == {"checkpoint": 3, "seq": 17}
            assert received == await node.logged_response(call)
            assert stage.checkpoint_for.calls == [call.call_id] * 2
        await connected.__aexit__(None, None, None)


async def test_a_checkpoint_request_outlives_the_sandbox_that_made_it(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.checkpoint_for.gate.clear()
        stage.checkpoint_for.outcome = SandboxFailed("sandbox_gone", "cannot make a checkpoint: it is gone")
        async with client(stage, http_request(CHECKPOINT, b"{}")):
            await stage.checkpoint_for.asked.wait()
            redo = await redo_everything(node)
            await node.lives[-1].end()
            stage.reboot()
        stage.checkpoint_for.gate.set()
        await node.live(2, redo)
        stage.checkpoint_for.outcome = replace(checkpoint_of(stage), number=4)
        assert json_of(await stage.raw(http_request(CHECKPOINT, b"{}")))["checkpoint"] == 4
        assert len(await node.calls()) == 1
        assert len(await node.events(Kind.CALL_REPEATED)) == 1


async def test_a_checkpoint_that_fails_is_an_answer_and_not_the_end(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node():
        received = await stage.raw(http_request(CHECKPOINT, b""))
        assert status_of(received) == 503
        assert set(json_of(received)) == {"code", "message", "hint"}
        assert json_of(received)["code"] == "checkpoint_failed"
        assert status_of(await stage.raw(note("on I go"))) == 201


async def test_five_equal_notes_at_once_are_five(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        async with asyncio.TaskGroup() as group:
            asking = [group.create_task(stage.raw(note("again"))) for _ in range(5)]
        assert len({task.result() for task in asking}) == 5
        assert await notes_of(node) == ["again"] * 5


async def test_notes_and_model_calls_share_one_redo_set(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            answers = [await stage.raw(note("a")), await stage.raw(http_request(CHAT, question()))]
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            await stage.raw(note("another way"))
            [diverged] = await node.events(Kind.CALL_DIVERGED)
            assert len(diverged.data["pending"]) == 2
            assert [await stage.raw(note("a")), await stage.raw(http_request(CHAT, question()))] == answers
            assert await notes_of(node) == ["a", "another way"]


REFUSED = {
    "no such path": (get("/torpor/v1/files"), 404, "path_unknown"),
    "no version": (get("/torpor"), 404, "path_unknown"),
    "traversal": (get("/torpor/v1/../v1/models"), 404, "path_unknown"),
    "wrong method": (http_request(SESSION, b""), 405, "method_refused"),
    "get of mcp": (get("/mcp"), 405, "method_refused"),
    "not json": (http_request(NOTES, b"{"), 400, "request_invalid"),
    "not an object": (http_request(NOTES, b"[]"), 400, "request_invalid"),
    "no text": (http_request(NOTES, b"{}"), 400, "request_invalid"),
    "empty text": (http_request(NOTES, b'{"text": ""}'), 400, "request_invalid"),
    "other type": (http_request(NOTES, b'{"text": 1}'), 400, "request_invalid"),
    "unknown field": (http_request(NOTES, b'{"text": "a", "level": 1}'), 400, "request_invalid"),
    "too long": (note("x" * 16_385), 400, "request_invalid"),
    "much too long": (note("x" * (1 << 20)), 413, "request_too_large"),
    "deep": (http_request(NOTES, b'{"text":' + b"[" * 500_000), 400, "request_invalid"),
    "from a page": (http_request(NOTES, b'{"text": "a"}', {"origin": "https://evil.example"}), 403, "origin_refused"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_asks_for_nothing_that_there_is_is_refused_in_words_and_is_no_call(
    tmp_path: Path, name: str
) -> None:
    request, status, code = REFUSED[name]
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(request)
        assert status_of(received) == status
        told = json_of(received)
        assert (set(told), told["code"]) == ({"code", "message", "hint"}, code)
        assert (b"\r\nallow: " in received) == (status == 405)
        assert await node.calls() == []


async def test_a_refused_request_half_answered_goes_on_under_another_node(tmp_path: Path) -> None:
    request = http_request(NOTES, b'{"text": 1}', {"expect": "100-continue"})
    async with gateway_stage(tmp_path) as stage:
        async with stage.node():
            whole = await stage.raw(request)
            connected = client(stage, request[:-3])
            reader, writer = await connected.__aenter__()
            beginning = await reader.readexactly(25)
        async with stage.node():
            writer.write(request[-3:])
            assert beginning + await reader.read(-1) == whole
        await connected.__aexit__(None, None, None)


async def test_an_agent_reads_what_its_model_saw_last_and_that_is_no_call(tmp_path: Path) -> None:
    context = get("/torpor/v1/context")
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        nothing = {"seq": None, "model": None, "target": None, "request": None, "answer": None}
        assert json_of(await stage.raw(context)) == nothing
        await stage.raw(http_request(CHAT, question("first")))
        answered = body_of(await stage.raw(http_request(CHAT, question("second", stream=False))))
        await stage.raw(note("not a model's"))
        told = json_of(await stage.raw(context))
        calls = await node.calls()
        assert len(calls) == 3
        assert (told["seq"], told["target"], told["model"]) == (calls[1].intended_seq, CHAT, "m")
        assert json.loads(told["request"])["messages"] == [{"role": "user", "content": "second"}]
        assert told["answer"].encode() == answered


async def test_the_document_is_served_where_it_says(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(get("/torpor/v1/openapi.json"))
        document = json_of(received)
        bodies: dict[str, Any] = {
            NOTES: {"text": "a"},
            "/torpor/v1/ask": {"question": "Go on?", "wait": False},
            "/torpor/v1/receive": {"timeout_seconds": 0},
            "/torpor/v1/send": {"text": "a"},
            "/torpor/v1/spawn": {"command": ["true"]},
            "/torpor/v1/effects": {"name": "a", "result": [1]},
            "/torpor/v1/effects/find": {"name": "a"},
        }
        for path, operations in document["paths"].items():
            for method in operations:
                body = json.dumps(bodies[path]).encode() if path in bodies else b""
                stage.checkpoint_for.outcome = checkpoint_of(stage)
                answer = await stage.raw(http_request(path, body, method=method.upper()))
                assert str(status_of(answer)) in operations[method]["responses"]
                assert status_of(answer) < 300
                if path == "/torpor/v1/ask":
                    asked = json_of(answer)["waitpoint"]
                    bodies["/torpor/v1/wait"] = {"waitpoints": [asked], "timeout_seconds": 0}
        assert len(await node.calls()) == len(RULES)


async def test_an_empty_redo_set_makes_a_checkpoint_anew(tmp_path: Path) -> None:
    """A rewind to before the request: what was asked for then answers nothing now."""
    async with gateway_stage(tmp_path) as stage:
        stage.checkpoint_for.outcome = checkpoint_of(stage)
        async with stage.node():
            first = await stage.raw(http_request(CHECKPOINT, b""))
        stage.reboot()
        stage.checkpoint_for.outcome = checkpoint_of(stage, number=9)
        async with stage.node(incarnation=2, redo=RedoSet()):
            assert await stage.raw(http_request(CHECKPOINT, b"")) != first


async def test_what_torpor_is_asked_needs_no_price_no_budget_and_no_upstream(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, budget="0.000001") as stage:
        # An upstream that would take everything takes nothing of this API.
        starred = replace(stage.upstreams[0], name="all", paths=("* /*",))
        stage.upstreams, stage.prices = (starred,), ()
        async with stage.node() as node:
            assert status_of(await stage.raw(note("free"))) == 201
            assert status_of(await stage.raw(get(SESSION))) == 200
            assert [call.attempts[-1].cost_nanousd for call in await node.calls()] == [None, None]
            assert {call.dialect for call in await node.calls()} == {"torpor"}
            assert stage.model.requests == []
