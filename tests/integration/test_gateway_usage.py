"""Token counts of chat streams: always known here, and seen by a client only if it asked for them."""

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tests.integration.gateway_stage import Node, gateway_stage, http_request, with_usage_asked
from tests.integration.test_gateway import CHAT, answered, body_of, client, slow, status_of
from tests.integration.test_gateway_restart import redo_everything, slow_at_first

from torpor.core.events import Kind
from torpor.db import requests, verify
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_scripts import long
from torpor.testing.model_server import ModelServer

WANTED: dict[str, Any] = {"stream_options": {"include_usage": True}}


def question(*, stream: bool = True, **more: Any) -> bytes:
    messages = [{"role": "user", "content": "go on"}]
    return json.dumps({"model": "scripted-large", "messages": messages, "stream": stream, **more}).encode()


def events_of(received: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in body_of(received).split(b"\n") if line]
    assert lines.pop() == b"[DONE]"
    return [json.loads(line) for line in lines]


def is_shown_counts(received: bytes) -> bool:
    """Whether a stream has them as OpenAI sends them; or has nothing of them at all."""
    events = events_of(received)
    there = ["usage" in event for event in events]
    if not any(there):
        assert all(event["choices"] for event in events)
        return False
    assert all(there)
    assert [bool(event["usage"]) for event in events] == [not event["choices"] for event in events]
    return True


async def usages(node: Node) -> list[dict[str, Any]]:
    return [event.data["usage"] for event in await node.events(Kind.CALL_COMPLETED)]


async def test_counts_and_cost_are_known_of_a_stream_whose_client_did_not_ask(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(CHAT, question()))
        [call] = await node.calls()
        [completed] = await node.events(Kind.CALL_COMPLETED)
        assert completed.data["usage"]["output_tokens"] > 0
        assert Decimal(completed.data["cost"]) > 0
        # The client sees what it would have seen: all that the provider sent, but for what was asked for.
        sent = b"".join(await node.logged_chunks(call))
        *others, _counts, done, _ = sent.split(b"\n\n")
        assert body_of(received) == b"".join(event + b"\n\n" for event in [*others, done]).replace(
            b',"usage":null', b""
        )
        assert not is_shown_counts(received)


async def test_the_log_has_the_request_as_its_client_made_it_and_says_what_was_added(tmp_path: Path) -> None:
    body = question(n=1.0, stream_options=None).replace(b"{", b"{ ", 1)
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        await stage.raw(http_request(CHAT, body))
        [call] = await node.calls()
        _, logged = await node.database.read(lambda tx: requests.get_request(tx, call.call_id))
        assert logged == body
        assert stage.model.requests[0].body == body.replace(b"null", b'{"include_usage": true}')
        [intended] = await node.events(Kind.CALL_INTENDED)
        [sent] = await node.events(Kind.CALL_SENT)
        assert intended.data["hide_usage"] is True
        assert sent.data["usage_asked"] is True
        assert await node.database.read(lambda tx: verify.verify_chain(tx, stage.session_id)) == []


async def test_a_client_that_asks_gets_the_counts_and_its_request_is_untouched(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        received = await stage.raw(http_request(CHAT, question(**WANTED)))
        [call] = await node.calls()
        assert body_of(received) == b"".join(await node.logged_chunks(call))
        assert is_shown_counts(received)
        assert stage.model.requests[0].body == question(**WANTED)
        [sent] = await node.events(Kind.CALL_SENT)
        assert "usage_asked" not in sent.data


@pytest.mark.parametrize("first", [{}, WANTED], ids=["unasked", "asked"])
async def test_a_repeated_answer_has_the_counts_if_who_repeats_it_asks(tmp_path: Path, first: dict[str, Any]) -> None:
    """A retry with other `stream_options` is the same logical call, and one upstream request."""
    second = {} if first else WANTED
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            received = await stage.raw(http_request(CHAT, question(**first)))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            again = await stage.raw(http_request(CHAT, question(**second)))
            assert [is_shown_counts(received), is_shown_counts(again)] == [bool(first), bool(second)]
            assert len(await node.events(Kind.CALL_REPEATED)) == 1
        assert stage.model.witness.requests == 1


async def test_a_joined_stream_gets_its_own_counts_from_the_next_node(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=long) as stage:
        async with stage.node() as node:
            async with client(stage, http_request(CHAT, question(**WANTED))) as (reader, _):
                await reader.readuntil(b'"content":')
            await node.logged(Kind.CALL_DELIVERED)
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            received = await reader.readexactly(5000)
            await node.logged(Kind.CALL_JOINED)
            await answered(node)
        async with stage.node() as node:
            received += await reader.read(-1)
            assert not is_shown_counts(received)
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 1


async def test_a_stream_goes_on_at_its_offset_under_the_next_node(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=long) as stage:
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            received = await reader.readexactly(1000)
            await answered(node)
        async with stage.node() as node:
            received += await reader.read(-1)
            assert received == await node.logged_response((await node.calls())[0])
            assert not is_shown_counts(received)
        await connected.__aexit__(None, None, None)


async def test_every_attempt_asks(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow_at_first) as stage:
        stage.on_call.gate.clear()
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_ANSWERING)
        async with stage.node() as node:
            assert not is_shown_counts(await reader.read(-1))
            assert [event.data["usage_asked"] for event in await node.events(Kind.CALL_SENT)] == [True, True]
            [counted] = await usages(node)
            assert counted["output_tokens"] > 0
        await connected.__aexit__(None, None, None)
        assert [request.body for request in stage.model.requests] == [with_usage_asked(question())] * 2


async def test_a_retry_in_one_piece_has_the_counts_as_such_answers_always_have(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await reader.readuntil(b"x")
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(CHAT, question(stream=False)))
        assert json.loads(body_of(received))["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("more", [{}, WANTED], ids=["unasked", "asked"])
async def test_a_whole_answer_that_is_retried_as_a_stream_has_the_counts_if_asked(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    async with gateway_stage(tmp_path) as stage:
        async with stage.node() as node:
            await stage.raw(http_request(CHAT, question(stream=False)))
            redo = await redo_everything(node)
        stage.reboot()
        async with stage.node(incarnation=2, redo=redo) as node:
            events = events_of(await stage.raw(http_request(CHAT, question(**more))))
            assert [event for event in events if "usage" in event] == (events[-1:] if more else [])
            assert all(event["choices"] for event in events if "usage" not in event)
        assert stage.model.witness.requests == 1


async def test_a_provider_that_does_not_know_the_option_is_asked_as_the_agent_asks(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.UNKNOWN_OPTION, contains="stream_options"))
        received = [await stage.raw(http_request(CHAT, question())) for _ in range(2)]
        assert list(map(status_of, received)) == [200, 200]
        assert bodies(stage.model) == [with_usage_asked(question()), question(), question()]
        [retried] = await node.events(Kind.CALL_RETRIED)
        assert (retried.data["status"], retried.data["usage_asked"]) == (400, False)
        assert ["usage_asked" in event.data for event in await node.events(Kind.CALL_SENT)] == [True, False]
        for call, shown in zip(await node.calls(), received, strict=True):
            assert len(call.attempts) == 1
            assert body_of(shown) == b"".join(await node.logged_chunks(call))
        # What the agent itself asks for is its own affair.
        assert status_of(await stage.raw(http_request(CHAT, question(**WANTED)))) == 400


async def test_any_other_refusal_passes_byte_for_byte(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, key="sk-right-0123456789") as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_500))
        received = await stage.raw(http_request(CHAT, question()))
        [call] = await node.calls()
        assert status_of(received) == 500
        assert json.loads(body_of(received))["error"]["message"] == "scripted 500"
        assert body_of(received) == b"".join(await node.logged_chunks(call))
        assert await node.events(Kind.CALL_RETRIED) == []
        stage.model.faults.clear()
        await stage.raw(http_request(CHAT, question()))
        assert bodies(stage.model) == [with_usage_asked(question())] * 2


async def test_an_upstream_can_be_spared(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        stage.upstreams = tuple(replace(upstream, stream_usage=False) for upstream in stage.upstreams)
        async with stage.node() as node:
            received = await stage.raw(http_request(CHAT, question()))
            assert bodies(stage.model) == [question()]
            assert not is_shown_counts(received)
            assert await usages(node) == [{}]


def bodies(model: ModelServer) -> list[bytes]:
    return [request.body for request in model.requests]


async def test_a_client_that_leaves_and_asks_again_meets_the_same_call(tmp_path: Path) -> None:
    """The keys are those of the client's own request, whatever was added to it."""
    async with gateway_stage(tmp_path, script=slow) as stage, stage.node() as node:
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            await reader.readuntil(b"x")
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(CHAT, question()))
        [call] = await node.calls()
        assert received == await node.logged_response(call)
        assert stage.model.witness.requests == 1
