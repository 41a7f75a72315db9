"""Several upstreams, paths of unknown APIs, and requests that a provider refuses for now."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.gateway_stage import REAL_KEY, Stage, gateway_stage, http_request
from tests.integration.test_gateway import CHAT, MESSAGES, PATHS, body_of, client, question, status_of

from torpor.config import KeySource, Secret
from torpor.core.call import CallState
from torpor.core.events import Kind
from torpor.testing.model_faults import Fault, FaultRule
from torpor.testing.model_server import ModelServer, serve_model

OTHER_KEY = "sk-other-0123456789abcdefghijklmnopqrstuvwxyz"


def other(stage: Stage, model: ModelServer, **fields: object) -> None:
    """Configure a second upstream of OpenAI's family."""
    [openai] = [upstream for upstream in stage.upstreams if upstream.family == "openai"]
    key = KeySource(value=Secret(OTHER_KEY))
    second = replace(openai, name="other", base_url=f"{model.url}/v1", key=key, **fields)
    stage.upstreams = (*stage.upstreams, second)


def asking(model: str, path: str = CHAT) -> bytes:
    return http_request(path, json.dumps({"model": model, "messages": []}).encode())


async def test_a_model_or_a_prefix_picks_the_upstream_and_its_key(tmp_path: Path) -> None:
    async with serve_model(key=OTHER_KEY) as model, gateway_stage(tmp_path) as stage:
        other(stage, model, models=("llama*",), path_prefix="/local")
        async with stage.node() as node:
            for request in (asking("m"), asking("llama3"), asking("m", f"/local{CHAT}")):
                assert status_of(await stage.raw(request)) == 200
            assert [request.credential for request in stage.model.requests] == [REAL_KEY]
            assert [request.credential for request in model.requests] == [OTHER_KEY] * 2
            assert {request.path for request in model.requests} == {CHAT}
            completed = await node.events(Kind.CALL_COMPLETED)
            assert [event.data["upstream"] for event in completed] == ["openai", "other", "other"]
            assert [call.target for call in await node.calls()] == [CHAT, CHAT, f"/local{CHAT}"]


async def test_a_model_that_nobody_serves_is_told_in_words(tmp_path: Path) -> None:
    async with serve_model(key=OTHER_KEY) as model, gateway_stage(tmp_path) as stage:
        other(stage, model, models=("llama*",))
        stage.upstreams = stage.upstreams[-1:]
        async with stage.node() as node:
            received = await stage.raw(asking("gpt-5"))
            assert status_of(received) == 404
            assert b"x-should-retry: false" in received
            error = json.loads(body_of(received))["error"]
            assert error["code"] == "model_not_served" and "gpt-5" in error["message"]
            assert [call.state for call in await node.calls()] == [CallState.FAILED]


async def test_paths_of_an_unknown_api_are_calls_and_announced_only_if_declared(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path) as stage:
        paths = {"paths": ("POST /v1/embeddings",), "llm_paths": ("POST /api/*",)}
        stage.upstreams = (replace(stage.upstreams[0], **paths), *stage.upstreams[1:])
        async with stage.node() as node:
            embedded = await stage.raw(http_request("/v1/embeddings", b'{"model":"e","input":"x"}'))
            assert json.loads(body_of(embedded))["data"]
            said = await stage.raw(http_request("/api/chat", b'{"model":"llama3","messages":[]}'))
            assert [json.loads(line) for line in body_of(said).splitlines()][-1] == {"done": True}
            calls = await node.calls()
            assert [(call.dialect, call.is_llm, call.model) for call in calls] == [
                ("raw", False, "e"),
                ("raw", True, "llama3"),
            ]
            assert [call.state for call in calls] == [CallState.ANSWERED] * 2
            assert stage.on_call.calls == [calls[1].call_id]
            assert [embedded, said] == [await node.logged_response(call) for call in calls]
            assert [request.credential for request in stage.model.requests] == [REAL_KEY] * 2
            assert status_of(await stage.raw(http_request("/v1/files", b"{}"))) == 404


async def test_a_call_whose_path_is_no_longer_configured_fails_in_words(tmp_path: Path) -> None:
    """The next node has another configuration: the call that the last one did not send can't be sent."""
    async with gateway_stage(tmp_path) as stage:
        before = stage.upstreams
        stage.upstreams = (replace(before[0], llm_paths=("POST /api/chat",)), *before[1:])
        stage.model.faults.add(FaultRule(fault=Fault.SILENT))
        async with stage.node() as node:
            connected = client(stage, http_request("/api/chat", b"{}"))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_SENT)
        stage.upstreams = before
        async with stage.node() as node:
            received = await reader.read(-1)
            assert status_of(received) == 401
            assert b"x-torpor-error: upstream_not_configured" in received
            assert (await node.calls())[0].state is CallState.FAILED
        await connected.__aexit__(None, None, None)


@PATHS
@pytest.mark.parametrize("fault", [Fault.STATUS_429, Fault.STATUS_529])
async def test_a_refusal_is_sent_again_within_one_call_and_one_attempt(tmp_path: Path, path: str, fault: Fault) -> None:
    async with gateway_stage(tmp_path, retries=2) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=fault, times=1, retry_after="0"))
        received = await stage.raw(http_request(path, question()))
        [call] = await node.calls()
        assert status_of(received) == 200
        assert received == await node.logged_response(call)
        assert [attempt.finished for attempt in call.attempts] == [True]
        [retried] = await node.events(Kind.CALL_RETRIED)
        assert retried.call_id == call.call_id
        status = 429 if fault is Fault.STATUS_429 else 529
        assert (retried.data["attempt"], retried.data["retry"], retried.data["status"]) == (1, 1, status)
        assert retried.data["wait_ms"] == 0 if fault is Fault.STATUS_429 else retried.data["wait_ms"] > 300
        assert [event.data["attempt"] for event in await node.events(Kind.CALL_SENT)] == [1]
        assert stage.model.witness.requests == 2
        assert len(stage.on_call.calls) == 1


async def test_the_last_refusal_is_the_providers_own_answer(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, retries=2) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_429, retry_after="0"))
        received = await stage.raw(http_request(MESSAGES, question()))
        [call] = await node.calls()
        assert status_of(received) == 429
        assert b"retry-after: 0" in received and b"scripted 429" in received
        assert b"x-torpor-error" not in received
        assert call.state is CallState.ANSWERED
        assert received == await node.logged_response(call)
        assert len(await node.events(Kind.CALL_RETRIED)) == 2
        assert stage.model.witness.requests == 3


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER_HEAD, Fault.RESET_MID, Fault.CUT_MID, Fault.ERROR_EVENT])
async def test_nothing_is_sent_again_once_a_good_head_was_received(tmp_path: Path, fault: Fault) -> None:
    async with gateway_stage(tmp_path, retries=9) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=fault))
        async with client(stage, http_request(CHAT, question())) as (reader, _):
            try:
                await reader.read(-1)
            except ConnectionResetError:
                assert fault not in {Fault.ERROR_EVENT, Fault.RESET_AFTER_HEAD}
        assert await node.events(Kind.CALL_RETRIED) == []
        assert stage.model.witness.requests == 1


async def test_a_node_that_dies_while_it_waits_to_send_again_leaves_one_torn_attempt(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, retries=5) as stage:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_429, times=1, retry_after="50"))
        async with stage.node() as node:
            connected = client(stage, http_request(CHAT, question()))
            reader, _ = await connected.__aenter__()
            await node.logged(Kind.CALL_RETRIED)
        async with stage.node() as node:
            received = await reader.read(-1)
            [call] = await node.calls()
            assert status_of(received) == 200
            assert received == await node.logged_response(call)
            assert [attempt.finished for attempt in call.attempts] == [False, True]
            assert len(await node.events(Kind.CALL_TORN)) == 1
        await connected.__aexit__(None, None, None)
        assert stage.model.witness.requests == 2


async def test_a_client_that_gives_up_meanwhile_joins_with_its_retry(tmp_path: Path) -> None:
    async with gateway_stage(tmp_path, retries=5) as stage, stage.node() as node:
        stage.model.faults.add(FaultRule(fault=Fault.STATUS_529, times=2))
        async with client(stage, http_request(CHAT, question())):
            await node.logged(Kind.CALL_RETRIED)
        await node.logged(Kind.CALL_DELIVERED)
        received = await stage.raw(http_request(CHAT, question()))
        [call] = await node.calls()
        assert status_of(received) == 200
        assert received == await node.logged_response(call)
        assert stage.model.witness.requests == 3
